"""Kernels of other people's, from PyPI, each held by ``testing.prove`` to a definition in plain torch.

    pip install liger-kernel eai-sparsify rotary-embedding-torch entmax open_clip_torch
    python -m benchmarks.proof.others --out benchmarks/results/proofs/others

A report for each kernel, and a table of them all. Without a GPU Triton's kernels run under its interpreter
(``TRITON_INTERPRET=1``), which shows their arithmetic and indexing, and neither what a compiler does with them nor
races. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from clipsteer import testing
from clipsteer.testing import Cases

Function = Callable[..., Any]
ROWS = [{"B": B, "d": d} for B, d in ((1, 1), (3, 5), (2, 33), (5, 64), (3, 129), (2, 1000))]


@dataclass(frozen=True)
class Kernel:
    """Whose it is, how it is called, what it computes by its own documentation, and how cases are drawn."""

    package: str
    make: Callable[[], Function]
    definition: Function
    inputs: Any
    note: str = ""
    gradients: bool = True
    cases: int = 60


@triton.jit
def _rsqrt(x):  # type: ignore[no-untyped-def]
    return tl.rsqrt(x)


def as_compiled(module: Any) -> None:
    """What the interpreter lacks: it leaves a number that is no integer as Python's, without the methods of a value in
    a kernel, where the compiler takes it as float32; and functions of libdevice return nothing."""
    import numpy as np
    from triton.runtime import interpreter

    if hasattr(module, "rsqrt"):
        module.rsqrt = _rsqrt
    before: Any = interpreter._implicit_cvt

    def convert(value: Any) -> Any:
        if type(value) is not float:
            return before(value)
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = convert


def liger(module: str, name: str) -> Any:
    found = importlib.import_module(f"liger_kernel.ops.{module}")
    if not torch.cuda.is_available():
        as_compiled(found)
    return getattr(found, name)


def _softmax() -> Function:
    function = liger("softmax", "LigerSoftmaxFunction")
    return lambda x: function.apply(x)


def _sparsemax() -> Function:
    function = liger("sparsemax", "LigerSparsemaxFunction")
    return lambda x: function.apply(x, -1)


def _layer_norm() -> Function:
    function = liger("layer_norm", "LigerLayerNormFunction")
    return lambda x, w, b: function.apply(x, w, b, 1e-6)


def _rms_norm() -> Function:
    function = liger("rms_norm", "LigerRMSNormFunction")
    # in place it takes the gradient's memory, which is the caller's here
    return lambda x, w: function.apply(x, w, 1e-6, 0.0, "llama", False)


def _cross_entropy() -> Function:
    function = liger("cross_entropy", "LigerCrossEntropyFunction")
    # its gradient is written over its input
    return lambda x, y: function.apply(x.clone(), y, None, -100, 0.0, 0.1, "mean")[0]


def _linear_cross_entropy() -> Function:
    function = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    return lambda x, w, y: function.apply(x, w, y)[0]


def _silu_mul() -> Function:
    function = liger("swiglu", "LigerSiLUMulFunction")
    return lambda a, b: function.apply(a, b)


def _rope() -> Function:
    function = liger("rope", "LigerRopeFunction")

    def rotated(q: Tensor, k: Tensor, angles: Tensor) -> Any:
        table = torch.cat([angles, angles], -1).detach()[None]
        # it rotates in place
        return function.apply(q.clone(), k.clone(), table.cos(), table.sin())

    return rotated


def _kl_div() -> Function:
    function = liger("kl_div", "LigerKLDivLossFunction")
    return lambda p, q: function.apply(p.log_softmax(-1), q.softmax(-1), "batchmean", False, 1e-10)


def _group_norm() -> Function:
    function = liger("group_norm", "LigerGroupNormFunction")
    return lambda x, w, b: function.apply(x, w, b, x.shape[1], 2, 1e-6)


def _rotary_embedding() -> Function:
    apply = importlib.import_module("rotary_embedding_torch").apply_rotary_emb
    return lambda t, freqs: apply(freqs.repeat_interleave(2, -1), t)


def _entmax() -> Function:
    return lambda x: importlib.import_module("entmax").sparsemax(x, dim=-1)


def _eager_decode() -> Function:
    eager = importlib.import_module("sparsify.utils").eager_decode
    return lambda acts, index, w: eager(index, acts, w.mT)


def _quick_gelu() -> Function:
    layer = importlib.import_module("open_clip.transformer").QuickGELU()
    return lambda x: layer(x)


def compiled(function: Function) -> Function:
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(function, dynamic=True)


def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, 1e-6)


def sparsemax(x: Tensor) -> Tensor:
    """Martins & Astudillo 2016: (x - τ)₊ with the threshold at which it sums to one."""
    ordered = x.sort(-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1)
    above = ordered.cumsum(-1) - 1
    # at least one, but for rows of NaN
    support = (count * ordered > above).sum(-1, keepdim=True).clamp(min=1)
    return (x - above.gather(-1, support - 1) / support).relu()


def cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y, label_smoothing=0.1)


def linear_cross_entropy(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The label's logit taken off the logarithm of the sum, in its own order."""
    logits = x @ w.T
    return (logits.logsumexp(-1) - logits.gather(1, y[:, None])[:, 0]).mean()


def kl_div(p: Tensor, q: Tensor) -> Tensor:
    # it has no gradient for the target
    return F.kl_div(p.log_softmax(-1), q.softmax(-1).detach(), reduction="batchmean")


def rotated_half(t: Tensor) -> Tensor:
    first, second = t.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rope(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    table = torch.cat([angles, angles], -1).detach()
    cos, sin = table.cos(), table.sin()
    return q * cos + rotated_half(q) * sin, k * cos + rotated_half(k) * sin


def rotary(t: Tensor, freqs: Tensor) -> Tensor:
    pairs = t.unflatten(-1, (-1, 2))
    first, second = pairs.unbind(-1)
    cos, sin = freqs.cos(), freqs.sin()
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


def decode(acts: Tensor, index: Tensor, w: Tensor) -> Tensor:
    return (acts.unsqueeze(-1) * w[index]).sum(-2)


NORM = Cases({"x": "B d", "w": "d", "b": "d"}, ROWS)
CODES = Cases(
    {"acts": "B k", "index": "B k < n", "w": "n d"},
    [
        {"B": B, "k": k, "n": n, "d": d}
        for B, k, n, d in ((1, 1, 1, 1), (3, 4, 9, 33), (17, 8, 65, 16), (5, 32, 257, 70))
    ],
)  # fmt: skip
LABELS = Cases({"x": "B n", "y": "B < n"}, [{"B": B, "n": n} for B, n in ((1, 2), (5, 33), (3, 129), (4, 1000))])
INTERPRETED = "under Triton's interpreter" if not torch.cuda.is_available() else ""

KERNELS: dict[str, Kernel] = {
    "liger-kernel softmax": Kernel("liger-kernel", _softmax, softmax, Cases({"x": "B d"}, ROWS), INTERPRETED),
    "liger-kernel sparsemax": Kernel("liger-kernel", _sparsemax, sparsemax, Cases({"x": "B d"}, ROWS), INTERPRETED),
    "liger-kernel layer norm": Kernel("liger-kernel", _layer_norm, layer_norm, NORM, INTERPRETED),
    "liger-kernel RMS norm": Kernel(
        "liger-kernel", _rms_norm, lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6),
        Cases({"x": "B d", "w": "d"}, ROWS), INTERPRETED,
    ),
    "liger-kernel cross entropy, smoothed": Kernel("liger-kernel", _cross_entropy, cross_entropy, LABELS, INTERPRETED),
    "liger-kernel linear cross entropy": Kernel(
        "liger-kernel", _linear_cross_entropy, linear_cross_entropy,
        Cases(
            {"x": "B d", "w": "n d", "y": "B < n"},
            [{"B": B, "d": 17, "n": n} for B, n in ((1, 2), (5, 33), (9, 200))],
        ),
        INTERPRETED,
    ),
    "liger-kernel SiLU and product": Kernel(
        "liger-kernel", _silu_mul, lambda a, b: F.silu(a) * b, Cases({"a": "B d", "b": "B d"}, ROWS), INTERPRETED
    ),
    "liger-kernel rotary embedding": Kernel(
        "liger-kernel", _rope, rope,
        Cases(
            {"q": "2 3 T d", "k": "2 1 T d", "angles": "T h"},
            [{"T": T, "d": 2 * h, "h": h} for T, h in ((1, 1), (5, 4), (9, 16))],
        ),
        INTERPRETED,
    ),
    "liger-kernel KL divergence": Kernel(
        "liger-kernel", _kl_div, kl_div, Cases({"p": "B d", "q": "B d"}, ROWS), INTERPRETED
    ),
    "liger-kernel group norm": Kernel(
        "liger-kernel", _group_norm, lambda x, w, b: F.group_norm(x, 2, w, b, 1e-6),
        Cases(
            {"x": "B c s", "w": "c", "b": "c"},
            [{"B": B, "c": c, "s": s} for B, c, s in ((1, 2, 2), (2, 6, 5), (3, 8, 33))],
        ),
        INTERPRETED,
    ),
    "sparsify eager_decode": Kernel("eai-sparsify", _eager_decode, decode, CODES),
    "entmax sparsemax": Kernel("entmax", _entmax, sparsemax, Cases({"x": "B d"}, ROWS)),
    "rotary-embedding-torch apply_rotary_emb": Kernel(
        "rotary-embedding-torch", _rotary_embedding, rotary,
        Cases(
            {"t": "B T d", "freqs": "T h"},
            [{"B": 2, "T": T, "d": 2 * h, "h": h} for T, h in ((1, 1), (5, 4), (9, 16))],
        ),
    ),
    "open_clip QuickGELU": Kernel(
        "open_clip_torch", _quick_gelu, lambda x: x * torch.sigmoid(1.702 * x), Cases({"x": "B d"}, ROWS)
    ),
    "torch.compile of softmax": Kernel("torch", lambda: compiled(softmax), softmax, Cases({"x": "B d"}, ROWS)),
    "torch.compile of layer norm": Kernel("torch", lambda: compiled(layer_norm), layer_norm, NORM),
    "torch.compile of a sparse decode": Kernel("torch", lambda: compiled(decode), decode, CODES),
}  # fmt: skip


def slug(name: str) -> str:
    words = "".join(c.lower() if c.isalnum() else " " for c in name).split()
    return "_".join(words)


def measure(name: str) -> dict[str, Any]:
    """The report of one kernel as JSON, and as text."""
    kernel = KERNELS[name]
    report = testing.prove(
        kernel.make(), kernel.definition, kernel.inputs, cases=kernel.cases, gradients=kernel.gradients
    )
    report.fast, report.reference = name, "its definition in plain torch"
    about = {"package": kernel.package, "version": version(kernel.package), "note": kernel.note}
    return {**about, **report.to_json(), "text": str(report).splitlines()}


def table(reports: list[dict[str, Any]]) -> str:
    lines = ["| kernel | version | verdict | worst share of the bound, by property |", "|---|---|---|---|"]
    notes = []
    for report in reports:
        worst = ", ".join(f"{row['prop']} {_share(row['worst'])}" for row in report["rows"])
        verdict = "proved" if report["passed"] else "**refuted**"
        where = f" ({report['note']})" if report["note"] else ""
        lines.append(f"| {report['fast']}{where} | {report['package']} {report['version']} | {verdict} | {worst} |")
        for row in report["rows"]:
            if not row["passed"]:
                notes.append(f"- {report['fast']}, {row['prop']}: {row['output']}{row['where']}; at {row['sizes']}.")
    return "\n".join([*lines, "", *notes])


def _share(worst: float | str) -> str:
    return worst if isinstance(worst, str) else f"{worst:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS), metavar="KERNEL")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    reports = []
    for name in args.only:
        try:
            version(KERNELS[name].package)
        except PackageNotFoundError:
            sys.stderr.write(f"{name}: left out, {KERNELS[name].package} is not installed\n")
            continue
        reports.append(measure(name))
        sys.stderr.write("\n".join(reports[-1]["text"]) + "\n\n")
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{slug(name)}.json").write_text(json.dumps(reports[-1], indent=1) + "\n")
    if args.out is not None:
        files = [args.out / f"{slug(name)}.json" for name in KERNELS]
        reports = [json.loads(file.read_text()) for file in files if file.exists()]
        (args.out / "README.md").write_text(PAGE + table(reports) + "\n")
    sys.stdout.write(table(reports) + "\n")


PAGE = """# Kernels of other people's, proved or refuted

Made by `python -m benchmarks.proof.others --out benchmarks/results/proofs/others`, a report each beside this page.
*proved*: in all drawn cases outputs and gradients are within the bound that `testing.bound` derives of the definition,
exact on small integers, the same in other layouts of memory, with NaN where the definition has it, and the same in
three runs. *refuted*: some property is not, which below says where. That may be what its authors never promised, or a
grouping of the operations other than the definition's, of which the bound is.

"""

if __name__ == "__main__":
    main()
