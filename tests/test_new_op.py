"""An op is one record, its file and its spec: a copy of the package gets one more, and nothing else of it changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

RECORD = """    Op("row_sums", {}, backends=("reference",)),
"""
OP = '''"""``row_sums``: s_b = Σ_j x_bj."""

from torch import Tensor

from clipsteer.ops._check import check_tensors
from clipsteer.ops._dispatch import choose

__all__ = ["row_sums", "row_sums_reference"]


def row_sums_reference(x: Tensor) -> Tensor:
    return x.sum(-1)


def row_sums(x: Tensor, *, backend: str = "auto") -> Tensor:
    check_tensors("row_sums", {"x": x})
    assert choose("row_sums", backend, x) == "reference"
    return row_sums_reference(x)
'''
SPEC = '''"""What ``row_sums`` may be off by."""

from clipsteer.ops._bounds import fraction_of_bound
from clipsteer.ops._spec import OpSpec, sizes
from clipsteer.ops.row_sums import row_sums, row_sums_reference


def draw(case):
    return {"x": case.tensor(case.shape["B"], case.shape["d"])}


def check(inputs, outputs):
    x = inputs["x"].double()
    return {"sums": fraction_of_bound(outputs["sums"], x.sum(-1), x.abs().sum(-1), x.shape[-1])}


def check_grads(inputs, outputs, grad_out, grads):
    g = grad_out["sums"].double()[:, None].expand_as(inputs["x"])
    return {"x": fraction_of_bound(grads["x"], g, g.abs(), 0)}


SPEC = OpSpec(
    name="row_sums",
    function=row_sums,
    reference=row_sums_reference,
    outputs=("sums",),
    differentiable=("x",),
    draw=draw,
    check=check,
    check_grads=check_grads,
    shapes=sizes("B d", (5, 33), (33, 31), (1, 1), (0, 8), (3, 129), (31, 128), (2, 32), (4, 127)),
    small_shape={"B": 3, "d": 4},
    repeat_shape={"B": 70, "d": 40},
    bench_shapes={"B256": {"B": 256, "d": 768}},
    gpu_bench_shapes={"B256": {"B": 256, "d": 768}},
    rows=("x",),
    baselines={"sum": row_sums_reference},
)
SPECS = (SPEC,)
'''
USE = """
import dataclasses
import torch
import clipsteer
from clipsteer import ops, testing
from clipsteer.ops import specs

assert clipsteer.__file__.startswith(FOLDER), clipsteer.__file__
assert {"row_sums", "row_sums_reference"} <= set(ops.__all__)
assert list(ops.REGISTRY)[0] == "row_sums"
x = torch.ones(2, 3, requires_grad=True)
ops.row_sums(x).sum().backward()
assert x.grad.eq(1).all()

told = {s.backend: s for s in ops.explain("row_sums", x)}
assert told["reference"].reason == "chosen by auto"
assert told["cpp"].reason == "it has no kernel for row_sums, which reference serve"
rows = testing.validate(["row_sums"], ["reference"], cases=10)
assert [r.verdict for r in rows] == ["pass"] * 4, testing.table(rows)

torch.compile = lambda function: function
records = testing.bench.run(["row_sums"], repeats=1, device="cpu")
assert {(r["contender"], r["pass"]) for r in records} == {
    (c, p) for c in ("sum", "torch.compile") for p in ("forward", "forward+backward")
}

device = torch.device("cpu")
assert specs.verdict("row_sums", "reference", device, torch.float32) is None
spec = ops.REGISTRY["row_sums"]
wrong = lambda x, backend: ops.row_sums(x, backend=backend) * (1 + 1e-3)
ops.REGISTRY["row_sums"] = dataclasses.replace(spec, function=wrong)
assert "failed" in specs.verdict("row_sums", "reference", device, torch.float32)
(row,) = testing.validate(["row_sums"], ["reference"], [torch.float32], cases=10)
assert row.verdict == "FAIL"
"""


def test_an_op_is_a_record_its_file_and_its_spec(tmp_path):
    package = tmp_path / "clipsteer"
    shutil.copytree(ROOT / "clipsteer", package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    records = (package / "ops/_lowlevel.py").read_text(encoding="utf-8")
    assert records.count("\nRECORDS = (\n") == 1
    changed = records.replace("\nRECORDS = (\n", "\nRECORDS = (\n" + RECORD)
    (package / "ops/_lowlevel.py").write_text(changed, encoding="utf-8")
    (package / "ops/row_sums.py").write_text(OP, encoding="utf-8")
    (package / "ops/specs/row_sums.py").write_text(SPEC, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, "-c", f"FOLDER = {str(tmp_path)!r}\n{USE}"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_running_an_op_loads_no_spec():
    code = """
import sys, torch
from clipsteer import ops
ops.topk_encode(torch.ones(2, 3), torch.ones(4, 3), k=1)
ops.explain("topk_encode")
loaded = [name for name in sys.modules if name.startswith("clipsteer.ops.specs")]
assert not loaded, loaded
assert "topk_encode" in ops.REGISTRY and "clipsteer.ops.specs" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
