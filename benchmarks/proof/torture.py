"""Selections of the k largest, each put to the torture set: what it promises and what it keeps.

    python -m benchmarks.proof.torture --out benchmarks/results/proofs/torture.json

A table is written beside the file. Each subject runs in a process of its own, since instruction sets and Triton's
interpreter are chosen at import; what is not installed is left out and said so. What a subject promises is what its
documentation says; what its documentation says nothing about is looked at all the same.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.testing import torture

Pair = tuple[Tensor, Tensor]
DESCEND, LOWER, LARGEST, _, ROW, LONG, REPEATS, ALONE, META = torture.PROMISES
DOCUMENTED = (DESCEND, LONG)
SMALL = ((2, 65, 7),)  # what Triton's interpreter has time for


@dataclass(frozen=True)
class Subject:
    """How one is made, whose it is, what its documentation promises, and in which surroundings it runs."""

    make: Callable[[], Callable[..., Any]]
    package: str = "torch"
    promises: tuple[str, ...] = ()
    encoder: bool = False
    relu: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    sizes: tuple[tuple[int, int, int], ...] = torture.SIZES
    environment: dict[str, str] = field(default_factory=dict)
    dense: bool = False  # the whole row comes out, so nothing can be said of indices
    needs: str = ""  # of the processor


def from_dense(acts: Tensor, k: int) -> Pair:
    """(values, indices) of rows that hold zeros where nothing was selected: what is not zero first, then the first
    zeros. More than k that are not zero are one index too many."""
    acts = acts.detach()
    present = acts != 0
    most = max(int(present.sum(-1).max()), k) if len(acts) else k
    order = torch.sort((~present).int(), dim=-1, stable=True).indices[:, :most]
    return acts.gather(-1, order), order


def sort(x: Tensor, k: int) -> Pair:
    values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def compiled() -> Callable[..., Any]:
    def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Pair:
        return torch.topk(F.linear(x, W_enc, b_enc).relu(), k)

    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(encode, dynamic=True)


def onnxruntime() -> Callable[..., Any]:
    onnx = importlib.import_module("onnx")
    runtime = importlib.import_module("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("TopK", ["x", "k"], ["values", "indices"], axis=-1, largest=1, sorted=1)],
        "topk",
        [
            helper.make_tensor_value_info("x", kinds.FLOAT, ["B", "n"]),
            helper.make_tensor_value_info("k", kinds.INT64, [1]),
        ],
        [
            helper.make_tensor_value_info("values", kinds.FLOAT, ["B", "k"]),
            helper.make_tensor_value_info("indices", kinds.INT64, ["B", "k"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def topk(x: Tensor, k: int) -> Pair:
        given = {"x": x.contiguous().numpy(), "k": torch.tensor([k]).numpy()}
        values, indices = session.run(None, given)
        return torch.from_numpy(values), torch.from_numpy(indices)

    return topk


def sparsify() -> Callable[..., Any]:
    fused = importlib.import_module("sparsify.fused_encoder").fused_encoder

    def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Pair:
        found = fused(x, W_enc, b_enc, k, "topk")
        return found.top_acts, found.top_indices

    return encode


def saelens(kind: str) -> Callable[..., Any]:
    module = importlib.import_module("sae_lens.saes.topk_sae")

    def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Pair:
        sizes: dict[str, Any] = {"d_in": W_enc.shape[1], "d_sae": W_enc.shape[0], "k": k, "apply_b_dec_to_input": False}
        # the dictionary is the encoder alone
        sizes["rescale_acts_by_decoder_norm"] = False
        if kind == "inference":
            sae = module.TopKSAE(module.TopKSAEConfig(**sizes))
        else:
            sae = module.TopKTrainingSAE(module.TopKTrainingSAEConfig(**sizes, use_sparse_activations=True))
        with torch.no_grad():
            sae.W_enc.copy_(W_enc.T)
            sae.b_enc.copy_(b_enc)
            acts = sae.encode(x)
        return from_dense(acts.to_dense(), k)

    return encode


def dictionary_learning() -> Callable[..., Any]:
    module = importlib.import_module("dictionary_learning.trainers.top_k")

    def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Pair:
        sae = module.AutoEncoderTopK(W_enc.shape[1], W_enc.shape[0], k)
        with torch.no_grad():
            sae.encoder.weight.copy_(W_enc)
            sae.encoder.bias.copy_(b_enc)
            _, values, indices, _ = sae.encode(x, return_topk=True)
        return values, indices

    return encode


def ours(backend: str) -> Callable[..., Any]:
    from clipsteer.ops import topk_encode

    def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Pair:
        # shapes alone are computed by no backend
        named = "auto" if x.is_meta else backend
        return topk_encode(x, W_enc, b_enc, k=k, backend=named)

    return encode


WIDE = (torch.float32, torch.bfloat16)
KEPT = (DESCEND, LOWER, ROW, LONG, REPEATS, META)


def _ours(backend: str, **options: Any) -> Subject:
    return Subject(lambda: ours(backend), "clipsteer", KEPT, encoder=True, relu=True, **options)


SUBJECTS: dict[str, Subject] = {
    "torch.topk": Subject(lambda: torch.topk, promises=DOCUMENTED, dtypes=WIDE),
    "torch.topk, sorted=False": Subject(
        lambda: lambda x, k: torch.topk(x, k, sorted=False), promises=(LONG,), dtypes=WIDE
    ),
    "torch.sort, stable": Subject(lambda: sort, promises=(DESCEND, LOWER, LONG), dtypes=WIDE),
    "torch.compile of linear, relu, topk": Subject(compiled, promises=DOCUMENTED, encoder=True, relu=True),
    "onnxruntime TopK": Subject(onnxruntime, "onnxruntime", (DESCEND, LOWER, LONG)),
    "sparsify fused_encoder": Subject(sparsify, "eai-sparsify", encoder=True, relu=True),
    "SAELens TopKSAE.encode": Subject(
        lambda: saelens("inference"), "sae-lens", encoder=True, relu=True, dense=True
    ),
    "SAELens TopKTrainingSAE.encode, sparse": Subject(
        lambda: saelens("training"), "sae-lens", encoder=True, relu=True, dense=True
    ),
    "dictionary_learning AutoEncoderTopK.encode": Subject(
        dictionary_learning, "dictionary-learning", encoder=True, relu=True
    ),
    "clipsteer topk_encode, reference": _ours("reference", dtypes=WIDE),
    **{
        f"clipsteer topk_encode, cpp, {isa}": _ours(
            "cpp", dtypes=WIDE, environment={"CLIPSTEER_CPU_ISA": isa}, needs=needs
        )
        for isa, needs in (("portable", ""), ("avx2", "avx2"), ("avx512", "avx512f"), ("amx", "amx_tile"))
    },
    "clipsteer topk_encode, triton interpreted": _ours(
        "triton", sizes=SMALL, environment={"TRITON_INTERPRET": "1"}
    ),
}  # fmt: skip


def measure(name: str) -> dict[str, Any]:
    """A subject's report as JSON, rows that say nothing about it left out."""
    subject = SUBJECTS[name]
    found = torture.topk(
        subject.make(),
        encoder=subject.encoder,
        relu=subject.relu,
        promises=subject.promises,
        sizes=subject.sizes,
        dtypes=subject.dtypes,
    ).to_json()
    if subject.dense:
        found["rows"] = [row for row in found["rows"] if row["prop"] not in (DESCEND, LOWER, LONG, META)]
    # what is as it should be needs no place, seed and sizes
    for row in found["rows"]:
        for key in ("output", "where", "sizes", "seed", "scale", "unbounded", "refused", "again", "promised"):
            if row["worst"] == 0 or not row[key]:
                del row[key]
    found |= {"fast": name, "package": subject.package, "version": version(subject.package)}
    return found


def why_not(subject: Subject) -> str:
    """The reason why a subject cannot run here, or ""."""
    try:
        version(subject.package)
    except PackageNotFoundError:
        return f"{subject.package} is not installed"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "" if subject.needs in flags else f"the processor has no {subject.needs}"


def _apart(name: str) -> dict[str, Any]:
    """The same in a process of its own."""
    subject = SUBJECTS[name]
    reason = why_not(subject)
    if reason:
        return {"fast": name, "package": subject.package, "left_out": reason}
    environment = {**os.environ, "SPARSIFY_DISABLE_TRITON": "1", **subject.environment}
    command = [sys.executable, "-m", "benchmarks.proof.torture", "--subject", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _word(rows: list[dict[str, Any]]) -> str:
    """Of a promise, over the dtypes."""
    verdicts = {row["verdict"] for row in rows}
    if not verdicts:
        return ""
    if verdicts <= {"kept", "NOT KEPT"}:
        return "kept" if verdicts == {"kept"} else "**not kept**"
    return "(holds)" if verdicts == {"not promised, kept"} else "–"


def table(results: list[dict[str, Any]]) -> str:
    short = {
        DESCEND: "descending", LOWER: "ties to the lower index", LARGEST: "NaN largest", ROW: "NaN: whole row",
        REPEATS: "repeats", ALONE: "row alone the same", META: "meta, > 2^31",
    }  # fmt: skip
    lines = [
        f"| selection | version | contract | {' | '.join(short.values())} |",
        "|" + "---|" * (3 + len(short)),
    ]
    notes = []
    for result in results:
        name = result["fast"]
        if "left_out" in result:
            notes.append(f"- {name}: left out, {result['left_out']}.")
            continue
        owed = [row for row in result["rows"] if row["prop"] not in torture.PROMISES]
        wrong = [row for row in owed if row["verdict"] == "FAIL"]
        total = sum(row.get("cases", 0) for row in owed)
        contract = f"{len(owed) - len(wrong)} of {len(owed)} kinds, {total:,} cases"
        by_promise = [_word([row for row in result["rows"] if row["prop"] == promise]) for promise in short]
        lines.append(f"| {name} | {result['version']} | {contract} | {' | '.join(by_promise)} |")
        notes += [f"- {name}, {row['prop']} ({row['dtype']}): {row['where']}; at {row['sizes']}." for row in wrong]
    return "\n".join([*lines, "", *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=SUBJECTS, help="this one alone, as JSON on standard output")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="SUBJECT")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.subject is not None:
        sys.stdout.write(json.dumps(measure(args.subject)) + "\n")
        return
    results = []
    for name in args.only:
        results.append(_apart(name))
        sys.stderr.write(f"{name}\n")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(json.dumps(result).replace('{"prop"', '\n {"prop"') for result in results)
        args.out.write_text(f"[\n{rows}\n]\n")
        args.out.with_suffix(".md").write_text(PAGE + table(results) + "\n")
    sys.stdout.write(table(results) + "\n")


PAGE = """# Selections of the k largest, tortured

Made by `python -m benchmarks.proof.torture --out benchmarks/results/proofs/torture.json`.
*Contract* is what everybody owes: values are those at their indices, indices lie in the row and occur once, nothing
left out is larger, the input stays as it was; in kinds of cases and layouts that are without a fault. *kept*: its
documentation promises that, and it held in all cases. *(holds)*: nobody promises that, and it held. *–*: nobody
promises that, and it did not hold. Empty: its output does not show it.

"""

if __name__ == "__main__":
    main()
