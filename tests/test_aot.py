"""Triton kernels compiled ahead of time, without a GPU: the binaries keep their budgets.

One configuration a kernel and target: what a launch at the main shape (bf16, d = 768, n = 49,152, k = 64; conceptors of
rank 64) takes.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

KERNELS = (
    "topk_encode_fwd",
    "topk_encode_fwd_fp32",
    "topk_encode_keys",
    "topk_encode_select",
    "sparse_decode_fwd",
    "gather_dot",
    "sparse_outer_bwd",
    "grouped_matmul",
    "grouped_matmul_transposed",
    "grouped_matmul_mean",
    "grouped_matmul_centred",
    "grouped_matmul_centred_fp32",
    "group",
    "grouped_outer",
    "low_rank_project",
    "low_rank_project_mean",
    "low_rank_project_fp32",
    "low_rank_project_r256",
    "drift_square",
    "drift_peaks",
    "drift_peaks_fp32",
    "drift_weights",
    "drift_weights_fp32",
    "drift_change",
    "mahalanobis_centre",
    "mahalanobis_finish",
    "mahalanobis_covariance_loss",
    "mahalanobis_covariance_loss_low_rank",
    "drrho_sums",
    "drrho_sums_fp32",
    "drrho_weights",
    "drrho_weights_fp32",
)
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # a block's limit, bytes


@pytest.fixture(scope="module", params=SHARED_MEMORY)
def binaries(request: pytest.FixtureRequest) -> tuple[str, dict[str, dict]]:
    return request.param, compiled_for(request.param)


@functools.lru_cache(None)
def compiled_for(target: str) -> dict[str, dict]:
    # A process of its own: under TRITON_INTERPRET=1 the decorated kernels cannot be compiled.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, target], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_spills(binaries: tuple[str, dict[str, dict]], kernel: str) -> None:
    assert binaries[1][kernel]["spilled_bytes"] == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_shared_memory_fits(binaries: tuple[str, dict[str, dict]], kernel: str) -> None:
    target, found = binaries
    assert found[kernel]["shared_memory"] <= SHARED_MEMORY[target]


@pytest.mark.parametrize(
    "kernel",
    [
        "topk_encode_fwd", "topk_encode_keys", "grouped_matmul", "grouped_matmul_transposed", "grouped_matmul_mean",
        "grouped_outer", "low_rank_project", "low_rank_project_mean", "low_rank_project_r256",
        "drift_peaks", "drift_weights", "drrho_sums", "drrho_weights",
    ],
)  # fmt: skip
def test_matrix_product_runs_on_tensor_cores(binaries: tuple[str, dict[str, dict]], kernel: str) -> None:
    target, found = binaries
    wide = kernel.startswith("topk")  # blocks of few rows take the warps' instructions on sm_90 too
    expected = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async" if wide else "mma", "gfx942": "v_mfma"}[target]
    assert found[kernel]["instructions"][expected] > 0


def test_fp32_keeps_ieee_products(binaries: tuple[str, dict[str, dict]]) -> None:
    target, found = binaries
    for kernel in (
        "topk_encode_fwd_fp32", "low_rank_project_fp32", "grouped_matmul_centred_fp32", "drift_peaks_fp32",
        "drift_weights_fp32", "drrho_sums_fp32", "drrho_weights_fp32",
    ):  # fmt: skip
        instructions = found[kernel]["instructions"]
        # CDNA's fp32 matrix instructions are IEEE; NVIDIA's tensor cores would round the operands to TF32.
        if target == "gfx942":
            assert instructions["v_mfma"] == instructions["v_mfma_f32_f32"] > 0
        else:
            assert instructions["mma.sync"] == instructions["wgmma.mma_async"] == 0


@pytest.mark.parametrize("kernel", ["sparse_decode_fwd", "gather_dot", "sparse_outer_bwd"])
def test_gathers_read_16_bytes_a_lane(binaries: tuple[str, dict[str, dict]], kernel: str) -> None:
    assert binaries[1][kernel]["instructions"]["load_16_bytes"] > 0


def test_matrix_tiles_are_copied_16_bytes_a_lane(binaries: tuple[str, dict[str, dict]]) -> None:
    for kernel in (
        "topk_encode_fwd", "grouped_matmul", "low_rank_project", "drift_peaks", "drift_weights", "drrho_sums",
        "drrho_weights",
    ):  # fmt: skip
        assert binaries[1][kernel]["instructions"]["load_16_bytes"] > 0


# From here on: what the subprocess runs.

INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync",
    "mma": r"mma\.(?:sync|mma_async)",
    "wgmma.mma_async": r"wgmma\.mma_async",
    "v_mfma": r"\bv_mfma_",
    "v_mfma_f32_f32": r"\bv_mfma_f32_\w+_?f32\b",
    "load_16_bytes": (
        r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64"
        r"|cp\.async\.c[ag][^\n]*, 0x10\b|cp\.async\.bulk\.tensor|(?:global|buffer)_load_dwordx4"
    ),
}


def compile_all(target_name: str) -> dict[str, dict]:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    hip = target_name.startswith("gfx")
    target = GPUTarget("hip", target_name, 64) if hip else GPUTarget("cuda", int(target_name[3:]), 32)
    torch.version.hip = "ahead of time" if hip else None  # what the launchers ask to choose a configuration

    from clipsteer.kernels import (
        conceptor_project,
        drrho_loss,
        mahalanobis_covariance_loss,
        semantic_drift,
        sparse_decode,
        topk_encode,
    )

    def build(kernel, pointers: dict[str, str], scalars: str, config: dict) -> dict:
        options = {name: config.pop(name) for name in ("num_warps", "num_stages") if name in config}
        names = kernel.arg_names
        signature = dict.fromkeys(names, "constexpr") | dict.fromkeys(scalars.split(), "i32") | pointers
        aligned = [
            name
            for name in (*pointers, *scalars.split())
            if not pointers.get(name, "*").startswith("tensordesc") and name not in ("B", "K", "N", "C", "M", "offset")
        ]
        attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in config.items()}, attrs)
        return budget(triton.compile(source, target=target, options=options))

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
            "registers": registers,
            "spilled_bytes": sum(map(int, sizes)),
            "shared_memory": binary.metadata.shared,
            "instructions": {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()},
        }

    def loaded(blocks: dict[str, tuple[int, int]], dtype: torch.dtype) -> tuple[dict[str, str], bool]:
        """Matrices as a launch hands them over, as descriptors of blocks or as pointers, and which of the two."""
        tma = target_name == "sm_90" and dtype != torch.float32
        if not tma:
            return dict.fromkeys(blocks, KINDS[dtype]), tma
        return {name: f"tensordesc<{KINDS[dtype][1:]}[{a},{b}]>" for name, (a, b) in blocks.items()}, tma

    def matmul(kernel, dtype: torch.dtype, outputs: dict[str, str], whole_rows: bool = False, **more: int) -> dict:
        kind = KINDS[dtype]
        config = topk_encode.tile_config(dtype, "ieee", SHARED_MEMORY[target_name], whole_rows)
        operands, tma = loaded({"x_ptr": (config["BLOCK_B"], config["BLOCK_D"]),
                                "w_ptr": (config["BLOCK_N"], config["BLOCK_D"])}, dtype)  # fmt: skip
        config |= {"HAS_BIAS": True, "TMA": tma, "EVEN_D": True, "PRECISION": "ieee", "GROUP_B": 32, **more}
        return build(kernel, {**operands, "b_ptr": kind, **outputs}, "B n d", config)

    def low_rank(dtype: torch.dtype, r: int, mean: bool = False) -> dict:
        kind, half = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype], dtype != torch.float32
        flags = {"HAS_MEAN": mean, "SPLIT_X": mean and half, "SPLIT_R": half, **by_index, "PRECISION": "ieee"}
        pointers = {"x_ptr": kind, "u_ptr": kind, "s_ptr": "*fp32", **numbers, "mean_ptr": kind, "out_ptr": kind}
        config = conceptor_project.low_rank_config(dtype, r, mean)
        return build(conceptor_project._low_rank_project_kernel, pointers, "B K d r", flags | config)

    def grouped_matmul(transpose: bool, mean: bool = False, centred: torch.dtype | None = None) -> dict:
        """``centred``: of float32 rows, new and old at once, with a factor of this dtype."""
        x, w = ("*fp32", KINDS[centred]) if centred else (kind, kind)
        flags = {"HAS_SCALE": False, **dict.fromkeys(("HAS_BETA", "MEAN_IN", "MEAN_OUT", "SPLIT"), mean)}
        flags |= {"PRECISION": "ieee", "w_row" if transpose else "w_col": 1}
        flags |= (
            by_order | {"SPLIT": w != "*fp32", "LEAST": 2, "SIDES": 2}
            if centred
            else by_index | {"LEAST": 1, "SIDES": 1}
        )
        pointers = {"x_ptr": x, "w_ptr": w, **numbers, "scale_ptr": kind, "beta_ptr": "*fp32", "mean_ptr": kind,
                    "out_ptr": x}  # fmt: skip
        scalars = "B K m n x_row out_row " + ("w_col" if transpose else "w_row")
        config = conceptor_project.matmul_config(torch.bfloat16, d, mean)
        if centred:
            config = mahalanobis_covariance_loss.product_config(centred, 26, d)
        return build(conceptor_project._grouped_matmul_kernel, pointers, scalars, flags | config)

    def drift(dtype: torch.dtype, weights: bool) -> dict:
        config = semantic_drift.tile_config(dtype)
        operands, tma = loaded({"old_ptr": (config["BLOCK_N"], config["BLOCK_D"]),
                                "means_ptr": (config["BLOCK_C"], config["BLOCK_D"])}, dtype)  # fmt: skip
        sums = dict.fromkeys(("old_square_ptr", "mean_square_ptr", "peak_ptr", "column_ptr"), "*fp32")
        pointers = {**operands, **sums, **dict.fromkeys(("w_ptr", "rest_ptr"), KINDS[dtype]), "scale_ptr": "*fp64"}
        flags = {"WEIGHTS": weights, "SPLIT": dtype != torch.float32, "SCALED": True, "FAR": 2.0**123, "TMA": tma}
        return build(
            semantic_drift._drift_tile_kernel, pointers, "N C d stride", flags | {"PRECISION": "ieee"} | config
        )

    def pairs(n: int, weighted: bool) -> dict:
        names = ("y_ptr", "diag_ptr", "s_ptr", "parts_ptr", "pull_ptr")
        config = mahalanobis_covariance_loss.pairs_config(256, n) | {"HAS_WEIGHTS": weighted, "NEED_GRAD": True}
        kernel = mahalanobis_covariance_loss._mahalanobis_covariance_loss_kernel
        numbers = {"order_ptr": "*i32", "offsets_ptr": "*i32"}
        return build(kernel, dict.fromkeys(names, "*fp32") | numbers, "B C d n", config)

    def by_rows(name: str, pointers: str, scalars: str, **flags: int) -> dict:
        config = mahalanobis_covariance_loss.rows_config(d) | flags | {"NORMALIZE": True}
        kinds = dict.fromkeys(pointers.split(), "*fp32") | {"new_ptr": kind, "inverse_ptr": "*fp64"}
        kinds |= {p: t for p, t in {"old_ptr": kind, "labels_ptr": "*i64", **numbers}.items() if p in kinds}
        return build(getattr(mahalanobis_covariance_loss, f"_mahalanobis_{name}_kernel"), kinds, scalars, config)

    def drrho(dtype: torch.dtype) -> dict[str, dict]:
        config = drrho_loss.tile_config(dtype)
        operands, tma = loaded({"rows_ptr": (config["BLOCK_M"], config["BLOCK_D"]),
                                "cols_ptr": (config["BLOCK_N"], config["BLOCK_D"])}, dtype)  # fmt: skip
        flags = {"TMA": tma, "PRECISION": "ieee"}
        pointers = {**operands, "diag_ptr": "*fp32", "scale_ptr": "*fp32"}
        names = ("row_u_ptr", "col_u_ptr", "own_ptr", "moment_ptr")
        sums, weights = drrho_loss._drrho_sums_kernel, drrho_loss._drrho_weights_kernel
        lse = dict.fromkeys(("row_lse_ptr", "col_lse_ptr"), "*fp32")
        return {
            "drrho_sums": build(sums, pointers | lse, "M N D offset", flags | config),
            "drrho_weights": build(
                weights,
                pointers | dict.fromkeys(names, "*fp32") | dict.fromkeys(("weight_ptr", "rest_ptr"), KINDS[dtype]),
                "M N D stride offset",
                flags | {"SPLIT": dtype != torch.float32} | drrho_loss.tile_config(dtype),
            ),
        }

    KINDS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    numbers = {"index_ptr": "*i64", "order_ptr": "*i32", "offsets_ptr": "*i32"}
    by_index = {"GROUPING": "index", "SCAN": 4096, "BINS": 32}
    by_order = {"GROUPING": "order", "SCAN": 1, "BINS": 128}
    d, n, k, kind = 768, 49152, 64, "*bf16"
    candidates = {"order_ptr": "*i32", "col_ptr": "*u8"}
    operands = {"x_ptr": kind, "w_ptr": kind, "b_ptr": kind}
    per_bucket = topk_encode.candidates_per_bucket(n // 256, k)
    gather = sparse_decode.gather_config(d, 2)
    return {
        "topk_encode_fwd": matmul(
            topk_encode._topk_encode_fwd_kernel, torch.bfloat16, candidates, J=per_bucket
        ),
        "topk_encode_fwd_fp32": matmul(topk_encode._topk_encode_fwd_kernel, torch.float32, candidates, J=per_bucket),
        "topk_encode_keys": matmul(
            topk_encode._topk_encode_keys_kernel, torch.bfloat16, {"keys_ptr": "*i64"}, whole_rows=True
        ),
        "topk_encode_select": build(
            topk_encode._topk_encode_select_kernel,
            candidates | operands | {"acts_ptr": kind, "indices_ptr": "*i64"},
            "B n d k",
            topk_encode.select_config(k, n // 256 * per_bucket, 256, 2) | {"J": per_bucket, "HAS_BIAS": True},
        ),
        "sparse_decode_fwd": build(
            sparse_decode._sparse_decode_fwd_kernel,
            {"acts_ptr": kind, "indices_ptr": "*i64", "w_ptr": kind, "b_ptr": kind, "out_ptr": kind},
            "B d k",
            gather | {"HAS_BIAS": True},
        ),
        "gather_dot": build(
            sparse_decode._gather_dot_kernel,
            {"rows_ptr": kind, "indices_ptr": "*i64", "w_ptr": kind, "out_ptr": kind},
            "B d k",
            sparse_decode.gather_config(d, 2, dot=True),
        ),
        "sparse_outer_bwd": build(
            sparse_decode._sparse_outer_bwd_kernel,
            {"coeff_ptr": kind, "pairs_ptr": "*i64", "offsets_ptr": "*i64", "rows_ptr": kind, "dw_ptr": kind,
             "db_ptr": kind},
            "n d k",
            sparse_decode.outer_config(d, 2),
        ),
        "grouped_matmul": grouped_matmul(False),
        "grouped_matmul_transposed": grouped_matmul(True),
        "grouped_matmul_mean": grouped_matmul(True, mean=True),
        "grouped_matmul_centred": grouped_matmul(False, centred=torch.bfloat16),
        "grouped_matmul_centred_fp32": grouped_matmul(False, centred=torch.float32),
        "group": build(conceptor_project._group_kernel, dict(numbers), "B K", {"SCAN": 4096}),
        "grouped_outer": build(
            conceptor_project._grouped_outer_kernel,
            {"a_ptr": kind, "b_ptr": kind, "order_ptr": "*i32", "offsets_ptr": "*i32", "out_ptr": kind},
            "B m n",
            conceptor_project.outer_config(torch.bfloat16, d, d) | {"HAS_INDEX": True, "PRECISION": "ieee"},
        ),
        "low_rank_project": low_rank(torch.bfloat16, 64),
        "low_rank_project_mean": low_rank(torch.bfloat16, 64, mean=True),
        "low_rank_project_fp32": low_rank(torch.float32, 64),
        "low_rank_project_r256": low_rank(torch.bfloat16, 256, mean=True),
        "drift_square": build(
            semantic_drift._drift_square_kernel,
            {"x_ptr": kind, "scale_ptr": "*fp64", "out_ptr": "*fp32"},
            "N d",
            {"FAR": 2.0**123, "BLOCK_N": 16, "BLOCK_D": 128, "num_warps": 4},
        ),
        "drift_peaks": drift(torch.bfloat16, False),
        "drift_peaks_fp32": drift(torch.float32, False),
        "drift_weights": drift(torch.bfloat16, True),
        "drift_weights_fp32": drift(torch.float32, True),
        "drift_change": build(
            semantic_drift._drift_change_kernel,
            dict.fromkeys(("old_ptr", "new_ptr", "change_ptr", "rest_ptr"), kind),
            "total",
            {"SPLIT": True, "BLOCK": 4096},
        ),
        **drrho(torch.bfloat16),
        **{f"{name}_fp32": found for name, found in drrho(torch.float32).items()},
        "mahalanobis_centre": by_rows(
            "centre", "old_ptr labels_ptr y_ptr order_ptr offsets_ptr parts_ptr", "B C d y_row", BLOCK_C=32, SCAN=256
        ),
        "mahalanobis_finish": by_rows(
            "finish", "g_ptr pull_ptr parts_ptr loss_ptr d_new_ptr", "B d pull_row", ADD=True, BLOCK_S=256
        ),
        "mahalanobis_covariance_loss": pairs(d, weighted=False),
        "mahalanobis_covariance_loss_low_rank": pairs(d + k, weighted=True),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
