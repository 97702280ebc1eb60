"""Triton kernels compiled ahead of time, without a GPU: the binaries of real launches keep their budgets.

Every case calls a launcher as the ops do, on tensors of the CPU, with a driver that compiles for a GPU and launches
nothing. So what is looked at is what a launch there takes: its configuration, flags, dtypes and specialisation.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from _forks import Forks
from clipsteer.io.files import write_json

try:
    import fcntl
except ImportError:  # not POSIX, where triton is not either
    fcntl = None

INSTALLED = importlib.util.find_spec("triton") is not None
VERSION = importlib.metadata.version("triton") if INSTALLED else ""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="triton is not installed"),
]


class Target(NamedTuple):
    """A chip's limits, and which of its instructions multiply what; "": plain fused multiplications do."""

    shared_kib: int  # of a block
    bf16: str
    fp16: str
    fp32: str  # in float32 or three products of TF32
    tf32: str  # the same where TF32 is allowed


TARGETS = {
    "sm_75": Target(64, "", "", "", ""),
    "sm_80": Target(163, "mma.sync", "mma.sync", "mma.sync", "mma.sync"),
    "sm_89": Target(99, "mma.sync", "mma.sync", "mma.sync", "mma.sync"),
    "sm_90": Target(227, "wgmma", "wgmma", "wgmma", "wgmma"),
    "sm_100": Target(227, "tcgen05", "tcgen05", "tcgen05", "tcgen05"),
    "sm_120": Target(99, "mma.sync", "mma.sync", "mma.sync", "mma.sync"),
    "gfx90a": Target(64, "v_mfma", "v_mfma", "v_mfma_f32_f32", "v_mfma_f32_f32"),
    "gfx942": Target(64, "v_mfma", "v_mfma", "v_mfma_f32_f32", "v_mfma"),
    "gfx950": Target(160, "v_mfma", "v_mfma", "v_mfma_f32_f32", "v_mfma_f32_f32"),
    "gfx1100": Target(64, "v_wmma", "v_wmma", "", ""),
    "gfx1201": Target(64, "v_wmma", "v_wmma", "", ""),
}
EVERY_DAY = "sm_90"
COPIES_TILES = ("sm_90", "sm_100", "sm_120")  # by themselves
# Triton 3.10 does not fuse multiplications and additions unless it is told to: a chip of each compiler, and the one
# whose registers are fewest for what they hold.
UNFUSED = [f"{name} without fusion" for name in ("sm_90", "sm_120", "gfx942")]
# Bytes of a thread that compilers put aside where that lets one more block run (at 128 and 168 registers of 255); which
# binaries have them changes with the release of triton. Tiles too large for the registers spill hundreds.
PARKED = 32
# Two programs on a multiprocessor leave 128 registers, which hold DRRho's weights with triton 3.8; 3.6 and 3.9 put
# up to 80 bytes aside there, most of them in tiles at an edge or beside the diagonal. They were measured so, with 3.6.
PARKED_OF_TWO = 32 if VERSION.startswith("3.8.") else 88
ENCODE = ["topk_encode_fwd", "topk_encode_select"]
MAHALANOBIS = ["grouped_matmul", "mahalanobis_centre", "mahalanobis_covariance_loss", "mahalanobis_finish"]
DRIFT = ["drift_change", "drift_square", "drift_tile"]
ABOVE = ["threshold_count", "threshold_write"]
AGREEMENT = ["agreement_counts", "agreement_sums", "concept_distances"]
KERNELS = {  # a case, whose last word is the dtype, and what it launches
    "encode bf16": ENCODE,
    "encode fp16": ENCODE,
    "encode fp32": ENCODE,
    "encode tf32": ENCODE,
    "encode by rows bf16": ["topk_encode_keys"],
    "encode by rows fp32": ["topk_encode_keys"],
    "encode of odd width, no bias bf16": ENCODE,
    "encode with a scale bf16": ENCODE,
    "encode with a scale fp32": ENCODE,
    "encode across bf16": ENCODE,
    "encode across fp32": ENCODE,
    "encode across by rows bf16": ["topk_encode_keys"],
    "encode some columns bf16": ENCODE,
    "encode some columns across bf16": ENCODE,
    "decode bf16": ["gather_dot", "sparse_decode_fwd", "sparse_outer_bwd"],
    "decode fp32": ["gather_dot", "sparse_decode_fwd", "sparse_outer_bwd"],
    "decode of 70,000 features bf16": ["gather_dot", "sparse_decode_fwd", "sparse_outer_bwd"],
    "encode above thresholds bf16": ABOVE,
    "encode above thresholds fp32": ABOVE,
    "encode above thresholds tf32": ABOVE,
    "encode above thresholds of odd width bf16": ABOVE,
    "encode above thresholds with a scale across bf16": ABOVE,
    "encode above thresholds of some columns bf16": ABOVE,
    "encode a batch with a scale bf16": ["batch_bins", *ABOVE, "topk_encode_fwd"],
    "encode a batch across bf16": ["batch_bins", *ABOVE, "topk_encode_fwd"],
    "encode a batch bf16": ["batch_bins", *ABOVE, "topk_encode_fwd"],
    "encode a batch fp32": ["batch_bins", *ABOVE, "topk_encode_fwd"],
    "ragged decode bf16": ["ragged_decode_fwd", "ragged_dot", "sparse_outer_bwd"],
    "ragged decode fp32": ["ragged_decode_fwd", "ragged_dot", "sparse_outer_bwd"],
    "one conceptor bf16": ["grouped_matmul", "grouped_outer", "low_rank_project"],
    "conceptors bf16": ["group", "grouped_matmul", "grouped_outer", "low_rank_project"],
    "conceptors fp16": ["group", "grouped_matmul", "grouped_outer", "low_rank_project"],
    "conceptors fp32": ["group", "grouped_matmul", "grouped_outer", "low_rank_project"],
    "conceptors tf32": ["group", "grouped_matmul", "grouped_outer", "low_rank_project"],
    "conceptors of few rows bf16": ["group", "grouped_matmul", "grouped_outer", "low_rank_project"],
    "conceptors of 8,192 rows bf16": ["group", "grouped_matmul", "grouped_outer", "low_rank_project"],
    "conceptors of many rows bf16": ["grouped_matmul", "grouped_outer", "low_rank_project"],
    "conceptors of rank 256 bf16": ["group", "grouped_matmul", "grouped_outer", "low_rank_project"],
    "conceptors of rank 512 bf16": ["group", "grouped_matmul", "grouped_outer"],
    "drift bf16": DRIFT,
    "drift fp16": DRIFT,
    "drift fp32": DRIFT,
    "drift tf32": DRIFT,
    "drift of odd width bf16": DRIFT,
    "drift of few columns fp32": DRIFT,
    "mahalanobis bf16": MAHALANOBIS,
    "mahalanobis fp16": MAHALANOBIS,
    "mahalanobis fp32": MAHALANOBIS,
    "mahalanobis tf32": MAHALANOBIS,
    "mahalanobis of low rank bf16": MAHALANOBIS,
    "mahalanobis of low rank fp32": MAHALANOBIS,
    "mahalanobis of 4,096 rows fp32": MAHALANOBIS,
    "drrho bf16": ["drrho_sums", "drrho_weights"],
    "drrho fp16": ["drrho_sums", "drrho_weights"],
    "drrho fp32": ["drrho_sums", "drrho_weights"],
    "drrho tf32": ["drrho_sums", "drrho_weights"],
    "drrho of odd width bf16": ["drrho_sums", "drrho_weights"],
    "drrho of few columns fp32": ["drrho_sums", "drrho_weights"],
    "siglip bf16": ["siglip_weights"],
    "siglip fp16": ["siglip_weights"],
    "siglip fp32": ["siglip_weights"],
    "siglip tf32": ["siglip_weights"],
    "siglip of odd width bf16": ["siglip_weights"],
    "distill bf16": ["distill_sums", "distill_weights"],
    "distill fp16": ["distill_sums", "distill_weights"],
    "distill fp32": ["distill_sums", "distill_weights"],
    "distill tf32": ["distill_sums", "distill_weights"],
    "distill of odd width bf16": ["distill_sums", "distill_weights"],
    "agreement bf16": AGREEMENT,
    "agreement fp32": AGREEMENT,
    "adam fp32": ["adam_rows", "adam_scales"],
}
PRODUCTS = ("topk_encode_fwd", "threshold_count", "threshold_write", "topk_encode_keys", "grouped_matmul",
            "grouped_outer", "low_rank_project", "drift_tile", "drrho_sums", "drrho_weights", "siglip_weights",
            "distill_sums", "distill_weights")  # fmt: skip
TILED = ("topk_encode_fwd", "threshold_count", "threshold_write", "topk_encode_keys", "drift_tile", "drrho_sums",
         "drrho_weights", "siglip_weights", "distill_sums", "distill_weights")  # fmt: skip
LOADED_WIDE = (*PRODUCTS, "ragged_decode_fwd", "ragged_dot", "sparse_decode_fwd", "gather_dot", "sparse_outer_bwd",
               "adam_rows")  # fmt: skip


# Of chips that are not looked at every day, at night: those that spilled most; all with CLIPSTEER_EVERY_CASE=1.
AT_NIGHT = ("encode bf16", "encode fp32", "encode above thresholds bf16", "decode bf16", "drift bf16", "drrho bf16",
            "siglip bf16")  # fmt: skip
AT_NIGHT_UNFUSED = ("encode bf16", "decode fp32", "mahalanobis fp32")


def cases_of(target: str) -> Sequence[str]:
    if target == EVERY_DAY or os.environ.get("CLIPSTEER_EVERY_CASE") == "1":
        return list(KERNELS)
    return AT_NIGHT_UNFUSED if target in UNFUSED else AT_NIGHT


@functools.cache
def key() -> str:
    """Of all that a binary comes from: the kernels, what this file launches, and the compilers."""
    import torch
    import triton

    import clipsteer.kernels

    files = [*sorted(Path(clipsteer.kernels.__file__).parent.rglob("*.py")), Path(__file__)]
    every = os.environ.get("CLIPSTEER_EVERY_CASE")
    versions = f"{triton.__version__} {torch.__version__} {sys.version} {every}"
    return hashlib.sha256(versions.encode() + b"".join(file.read_bytes() for file in files)).hexdigest()[:24]


class Compiler:
    """Compiles the cases of a family for a target when one is first asked for, and keeps what binaries are like."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.forks: Forks | None = None
        self.found: dict[tuple[str, str], dict[str, list[dict]]] = {}

    def binaries(self, target: str, case: str) -> list[dict]:
        family = KERNELS[case][0]
        if (target, family) not in self.found:
            self.found[target, family] = self.kept(target, family)
        return self.found[target, family][case]

    def kept(self, target: str, family: str) -> dict[str, list[dict]]:
        name = f"{target} {family}".replace(" ", "-")
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / f"{name}-{key()}.json"
        with (self.folder / f"{name}.lock").open("w") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.exists():
                for old in self.folder.glob(f"{name}-*.json"):
                    old.unlink()
                write_json(place, self.compiled(target, family))
        return json.loads(place.read_text())

    def compiled(self, target: str, family: str) -> dict[str, list[dict]]:
        if self.forks is None:
            # A process of its own: under TRITON_INTERPRET=1 the decorated kernels cannot be compiled.
            path = os.pathsep.join(filter(None, sys.path))
            self.forks = Forks(("torch", "triton", "pytest"), {"TRITON_INTERPRET": "0", "PYTHONPATH": path})
        size = min(4, os.cpu_count() or 1)
        codes, written = self.forks.run(Path(__file__).read_text(), target, family, size=size)
        assert codes == [0] * size, written[-4000:]
        found = [json.loads(line) for line in written.splitlines() if line.startswith("{")]
        return {case: budgets for share in found for case, budgets in share.items()}


@pytest.fixture(scope="session")
def compiler(pytestconfig: pytest.Config) -> Iterator[Compiler]:
    made = Compiler(pytestconfig.rootpath / ".cache" / "ahead-of-time")
    yield made
    if made.forks is not None:
        made.forks.close()


def everywhere(names: Iterable[str], cases: Iterable[str] = KERNELS) -> pytest.MarkDecorator:
    """One chip every day, the others at night."""
    wanted = set(cases)
    pairs = [(t, c) for t in names for c in cases_of(t) if c in wanted]
    params = [pytest.param(t, c, marks=() if t == EVERY_DAY else pytest.mark.nightly) for t, c in pairs]
    return pytest.mark.parametrize(("target", "case"), params)


@everywhere([*TARGETS, *UNFUSED])
def test_launches_keep_their_budgets(compiler: Compiler, target: str, case: str) -> None:
    found = compiler.binaries(target, case)
    # few registers, or those that hold halves as float32 too, have no room for r-vectors of 256
    in_two = case.startswith("conceptors of rank 256") and target.startswith(("gfx1", "sm_75"))
    assert sorted({binary["kernel"] for binary in found}) == [
        kernel for kernel in KERNELS[case] if not (in_two and kernel == "low_rank_project")
    ]
    for binary in found:
        two = binary["kernel"] == "drrho_weights" and binary["registers"] == 128
        assert binary["spilled_bytes"] <= (PARKED_OF_TWO if two else PARKED), binary
        assert binary["shared_memory"] <= TARGETS[target.split()[0]].shared_kib * 1024, binary


@everywhere(TARGETS, [case for case in KERNELS if set(KERNELS[case]) & set(PRODUCTS)])
def test_products_run_on_matrix_units(compiler: Compiler, target: str, case: str) -> None:
    for binary in (b for b in compiler.binaries(target, case) if b["kernel"] in PRODUCTS):
        expected = getattr(TARGETS[target], case.split()[-1])
        if case.endswith("fp32") and target.startswith("sm") and binary["flags"]["PRECISION"] == "ieee":
            # NVIDIA's take float32 as TF32, in three products, which a sum of few terms may not afford
            assert not expected or binary["kernel"] == "grouped_outer" or "few columns" in case, binary
            expected = ""
        elif expected in ("wgmma", "tcgen05") and "encode" not in case:
            expected = "any"  # blocks of few rows take the warps' instructions there too
        found = binary["instructions"]
        assert found["any"] == 0 if not expected else found[expected] > 0, (expected, binary)
        if expected == "v_mfma_f32_f32":  # IEEE, and nothing else
            assert found["any"] == found[expected], binary


@everywhere(TARGETS, [c for c in KERNELS if (c.endswith("bf16") and "odd" not in c) or c == "adam fp32"])
def test_tiles_and_gathers_are_read_16_bytes_a_lane(compiler: Compiler, target: str, case: str) -> None:
    for binary in (b for b in compiler.binaries(target, case) if b["kernel"] in LOADED_WIDE):
        assert binary["instructions"]["load_16_bytes"] > 0, binary


@everywhere(COPIES_TILES)
def test_whole_tiles_are_copied_where_the_chip_does_it(compiler: Compiler, target: str, case: str) -> None:
    for binary in compiler.binaries(target, case):
        # one kernel multiplies only where it is told to
        tiled = binary["flags"].get("WHOLE", binary["kernel"] in TILED)
        expected = tiled and not any(word in case for word in ("odd", "few columns", "some columns"))
        assert (binary["instructions"]["bulk_copy"] > 0) == expected, binary


@pytest.mark.nightly
@pytest.mark.parametrize("target", [target for target in UNFUSED if target.startswith("sm")])
def test_what_has_to_be_fused_says_so(compiler: Compiler, target: str) -> None:
    """A row like the first of its class is at exactly 0, which two roundings of the one's product would not leave."""
    assert all(binary["instructions"]["fused"] == 0 for binary in compiler.binaries(target, "decode fp32"))
    centres = [b for b in compiler.binaries(target, "mahalanobis fp32") if b["kernel"] == "mahalanobis_centre"]
    assert {b["flags"]["NORMALIZE"] for b in centres} == {True, False}
    for binary in centres:
        # of a norm of 1 nothing is left to multiply by
        assert (binary["instructions"]["fused_f64"] > 0) == binary["flags"]["NORMALIZE"], binary


# From here on: what the subprocesses run.

INSTRUCTIONS = {
    "any": r"\bmma\.sync|wgmma\.mma_async|\btcgen05\.mma|\bv_wmma_|\bv_mfma_",
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "v_mfma": r"\bv_mfma_",
    "v_wmma": r"\bv_wmma_",
    "v_mfma_f32_f32": r"\bv_mfma_f32_\w+_?f32\b",
    "fused": r"\bfma\.rn\.f32",
    "fused_f64": r"\bfma\.rn\.f64",
    "bulk_copy": r"cp\.async\.bulk\.tensor",
    "load_16_bytes": (
        r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64"
        r"|cp\.async\.c[ag][^\n]*, 0x10\b|cp\.async\.bulk\.tensor|(?:global|buffer)_load_(?:dwordx4|b128)"
    ),
}


def compile_all(target_name: str, cases: list[str]) -> dict[str, list[dict]]:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    from clipsteer.kernels import (
        _launch,
        _weights,
        adam_rows,
        batch_topk_encode,
        conceptor_project,
        distill_loss,
        drrho_loss,
        mahalanobis_covariance_loss,
        pairwise_agreement,
        ragged_decode,
        semantic_drift,
        siglip_loss,
        sparse_decode,
        threshold_encode,
        topk_encode,
    )

    modules = (
        adam_rows, batch_topk_encode, conceptor_project, distill_loss, drrho_loss, mahalanobis_covariance_loss,
        pairwise_agreement, ragged_decode, semantic_drift, siglip_loss, sparse_decode, threshold_encode, topk_encode,
    )  # fmt: skip
    target_name, _, without_fusion = target_name.partition(" ")
    triton.knobs.language.default_fp_fusion = not without_fusion
    hip = target_name.startswith("gfx")
    lanes = 64 if target_name.startswith("gfx9") else 32
    target = GPUTarget("hip", target_name, lanes) if hip else GPUTarget("cuda", int(target_name[3:]), lanes)
    # what the launchers ask to choose a configuration, and the products that torch makes between launches
    torch.version.hip = "ahead of time" if hip else None
    _launch.chip_name = lambda device: target_name
    _weights.add_product = lambda total, a, b: total
    for module in (_weights, distill_loss, semantic_drift):
        module.multiply = lambda a, b: torch.empty(*a.shape[:-1], b.shape[-1])

    gpu = SimpleNamespace(  # to compile for; nothing runs on it
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        launcher_cls=lambda source, metadata: lambda *args: None,
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 30},
            load_binary=lambda *args: (0, 0, 0, 0, 1024),
            unload_module=lambda module: None,
        ),
    )
    compiled, launched = triton.compiler.compile, []

    def compile_and_keep(*args, **kwargs):
        launched.append(compiled(*args, **kwargs))
        return launched[-1]

    triton.compiler.compile = compile_and_keep
    triton.runtime.driver.set_active(gpu)

    def budget(binary) -> dict:
        text = binary.asm["amdgcn" if hip else "ptx"]
        if hip:
            # SGPRs spill into lanes of a VGPR; only VGPRs spill to memory, which is the private segment.
            sizes = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
            assert len(sizes) == 2, sizes
            registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        else:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(binary.asm["cubin"])
                file.flush()
                tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
                usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
            # No kernel here has arrays of its own, so that its stack is its spills.
            registers, *sizes = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout).groups())
        return {
            "kernel": binary.metadata.name.removeprefix("_").removesuffix("_kernel"),
            "flags": {binary.src.fn.arg_names[name[0]]: value for name, value in binary.src.constants.items()},
            "registers": registers,
            "spilled_bytes": sum(map(int, sizes)),
            "shared_memory": binary.metadata.shared,
            "instructions": {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()},
        }

    def empty(*shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or kind)

    def numbers(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int64)

    def dictionary(d: int, n: int, across: bool) -> torch.Tensor:
        return empty(d, n).t() if across else empty(n, d)

    def options(n: int, scale: bool, some: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return empty(n) if scale else None, numbers(n // 4) if some else None

    def encode(
        d: int = 768, n: int = 49152, k: int = 64, bias: bool = True, scale: bool = False, some: bool = False,
        across: bool = False,
    ) -> None:  # fmt: skip
        more = True, *options(n, scale, some), not scale
        topk_encode.topk_encode(empty(48, d), dictionary(d, n, across), empty(n) if bias else None, k, *more)

    def encode_above(
        d: int = 768, n: int = 49152, scale: bool = False, some: bool = False, across: bool = False
    ) -> None:
        for thresholds in (1, n):
            limits = empty(thresholds), 48 * 64, *options(n, scale, some)
            threshold_encode.threshold_encode(empty(48, d), dictionary(d, n, across), empty(n), *limits)

    def encode_batch(d: int = 768, n: int = 49152, scale: bool = False, across: bool = False) -> None:
        more = 48 * 64, *options(n, scale, False)
        batch_topk_encode.batch_topk_encode(empty(48, d), dictionary(d, n, across), empty(n), *more)

    def ragged(n: int = 49152, B: int = 48, m: int = 48 * 64, d: int = 768) -> None:
        offsets = numbers(B + 1)
        ragged_decode.ragged_decode(empty(m), numbers(m), offsets, empty(n, d), empty(d), [n // 2, n])
        ragged_decode.ragged_dot(empty(B, d), numbers(m), numbers(m), empty(n, d))
        ragged_decode.ragged_outer(empty(m), numbers(m), numbers(m), empty(B, d), n)

    def decode(n: int = 49152, B: int = 48, k: int = 64, d: int = 768) -> None:
        indices = numbers(B, k)
        sparse_decode.sparse_decode(empty(B, k), indices, empty(n, d), empty(d))
        sparse_decode.gather_dot(empty(B, d), indices, empty(n, d))
        sparse_decode.sparse_outer(empty(B, k), indices, empty(B, d), n)

    def conceptors(B: int = 4096, K: int = 16, r: int = 64, d: int = 768, plain: bool = False) -> None:
        index = numbers(B) if K > 1 else None
        for mean in (None,) if plain else (None, empty(K, d)):
            conceptor_project.low_rank_project(empty(B, d), empty(K, d, r), empty(K, r), index, mean)
            for transpose in (False, True):
                beta = None if mean is None else empty(K, dtype=torch.float32)
                conceptor_project.grouped_matmul(empty(B, d), empty(K, d, d), index, beta, mean, transpose)
        conceptor_project.grouped_outer(empty(B, d), empty(B, d), index, K)

    def drift(N: int = 1024, C: int = 1000, d: int = 768) -> None:
        scale = empty(3, dtype=torch.float64)
        semantic_drift.drift_sums(empty(N, d), empty(N, d), empty(C, d), scale)

    def mahalanobis(B: int = 256, C: int = 20, d: int = 768, r: int | None = None) -> None:
        for normalize in (True, False):
            for gradient in (True, False):
                s, diag = (None, None) if r is None else (empty(C, r), empty(C, d))
                mahalanobis_covariance_loss.mahalanobis_covariance_loss(
                    empty(B, d), empty(B, d), numbers(B), empty(C, d, r or d), s, diag, normalize, gradient
                )

    def drrho(B: int = 1024, D: int = 1024) -> None:
        single = torch.zeros(B)
        rows = empty(B, D), empty(B, D), single, torch.zeros(())
        drrho_loss.drrho_sums(*rows, 0, True)
        drrho_loss.drrho_grad(*rows, 0, single, single, single, single.new_empty(0, B), D // 2, True, True)

    def siglip(D: int = 1024) -> None:
        single = torch.zeros(())
        for wanted in (True, False):
            siglip_loss.siglip_sweep(empty(1024, D), empty(1024, D), single, single, 0, wanted, wanted)

    def distill(D: int = 1024) -> None:
        single = torch.zeros(1024)
        pairs = (empty(1024, D), empty(1024, D), single, torch.zeros(())) * 2
        distill_loss.distill_sums(*pairs, 0, True)
        both, none = torch.zeros(2, 1024), single.new_empty(0, 1024)
        distill_loss.distill_grad(*pairs, 0, both, both, single, torch.zeros(2), none, none, True, True)

    def agreement(N: int = 1024, K: int = 100) -> None:
        sides = (empty(N, K), None, None, K) * 2
        for images in (None, numbers(N)):
            pairwise_agreement.agreement_sums(*sides, images, 0, 1)
        pairwise_agreement.agreement_counts(*sides, 0, 1, True, True)
        pairwise_agreement.concept_distances(*sides, None)

    def adam() -> None:
        for d in (64, 768, 4096, adam_rows.MAX_COLUMNS):
            w, m, v, grad = empty(4, 64, d)
            for unit in (True, False):
                adam_rows.adam_rows(w, m, v, empty(), grad, unit, 1e-3, 0.9, 0.999, 1e-8, empty())

    calls = {
        "encode": encode,
        "encode by rows": lambda: encode(n=2048, k=512),
        "encode of odd width, no bias": lambda: encode(d=771, bias=False),
        "encode with a scale": lambda: encode(scale=True),
        "encode across": lambda: encode(across=True),
        "encode across by rows": lambda: encode(n=2048, k=512, across=True),
        "encode some columns": lambda: encode(some=True),
        "encode some columns across": lambda: encode(some=True, across=True),
        "encode above thresholds": encode_above,
        "encode above thresholds with a scale across": lambda: encode_above(scale=True, across=True),
        "encode above thresholds of some columns": lambda: encode_above(some=True),
        "encode a batch with a scale": lambda: encode_batch(scale=True),
        "encode a batch across": lambda: encode_batch(across=True),
        "encode above thresholds of odd width": lambda: encode_above(d=771),
        "encode a batch": encode_batch,
        "ragged decode": ragged,
        "decode": decode,
        "decode of 70,000 features": lambda: decode(n=70_000),
        "one conceptor": lambda: conceptors(K=1),
        "conceptors": conceptors,
        "conceptors of few rows": lambda: conceptors(B=64, plain=True),
        "conceptors of 8,192 rows": lambda: conceptors(B=8192, plain=True),
        "conceptors of many rows": lambda: conceptors(B=10_000, plain=True),
        "conceptors of rank 256": lambda: conceptors(r=256),
        "conceptors of rank 512": lambda: conceptors(r=512),
        "drift": drift,
        "drift of odd width": lambda: drift(d=771),
        "drift of few columns": lambda: drift(d=48),
        "mahalanobis": mahalanobis,
        "mahalanobis of low rank": lambda: mahalanobis(r=64),
        "mahalanobis of 4,096 rows": lambda: mahalanobis(B=4096),
        "drrho": drrho,
        "drrho of odd width": lambda: drrho(D=771),
        "drrho of few columns": lambda: drrho(D=48),
        "siglip": siglip,
        "siglip of odd width": lambda: siglip(771),
        "distill": distill,
        "distill of odd width": lambda: distill(771),
        "agreement": agreement,
        "adam": adam,
    }
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
    found = {}
    for case in cases:
        name, _, word = case.rpartition(" ")
        kind = kinds[word]
        torch.set_float32_matmul_precision("high" if word == "tf32" else "highest")
        launched.clear()
        for module in modules:
            for kernel in (value for value in vars(module).values() if hasattr(value, "device_caches")):
                kernel.device_caches.clear()  # so that every case names all that it launches
        calls[name]()
        found[case] = [budget(binary) for binary in launched]
    return found


if __name__ == "__main__":
    share, shares = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mine = [case for case in cases_of(sys.argv[1]) if KERNELS[case][0] == sys.argv[2]][share::shares]
    print(json.dumps(compile_all(sys.argv[1], mine)))
