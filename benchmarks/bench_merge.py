"""wise_ft on files against copying them, the plain loop, and mergekit where it is installed.

    python benchmarks/bench_merge.py --mib 400 --dir /dev/shm --out benchmarks/results/merge.json

Every contender runs once a round, in turn; medians are reported, of wall time and of processor time. Each ends with its
output on disk (fsync). Correctness comes first: the results must agree within one rounding of the dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import clipsteer
from clipsteer.io.files import read_safetensors, write_json, write_safetensors
from clipsteer.testing import bench

# tensors of a ViT-L/14 block: attention, MLP, norms
SHAPES = {
    "attn.in_proj": (3072, 1024), "attn.out_proj": (1024, 1024), "mlp.c_fc": (4096, 1024), "mlp.c_fc.bias": (4096,),
    "mlp.c_proj": (1024, 4096), "ln_1": (1024,), "ln_2": (1024,),
}  # fmt: skip


def model(mib: int, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    g, tensors, size = torch.Generator().manual_seed(seed), {}, 0
    while size < mib << 20:
        block = len(tensors) // len(SHAPES)
        for name, shape in SHAPES.items():
            tensors[f"resblocks.{block}.{name}"] = (torch.randn(shape, generator=g) * 0.02).to(dtype)
            size += tensors[f"resblocks.{block}.{name}"].nbytes
    return tensors


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def contenders(a: Path, b: Path, folder: Path) -> dict[str, Callable[[], None]]:
    def copy(*files: Path) -> None:
        for i, file in enumerate(files):
            shutil.copyfile(file, folder / f"copy-{i}")
            sync(folder / f"copy-{i}")

    def loop() -> None:
        theta_0, theta_1 = load_file(a), load_file(b)
        save_file({k: 0.5 * theta_0[k] + 0.5 * theta_1[k] for k in theta_0}, folder / "loop.safetensors")
        sync(folder / "loop.safetensors")

    found = {
        "copy one file": lambda: copy(a),
        "copy both files": lambda: copy(a, b),
        "wise_ft": lambda: clipsteer.wise_ft(a, b, 0.5, folder / "wise.safetensors"),
        "wise_ft, five alphas": lambda: clipsteer.wise_ft(
            a, b, [0.1, 0.3, 0.5, 0.7, 0.9], str(folder / "wise-{alpha}.safetensors")
        ),
        "plain loop (load, average, save)": loop,
    }
    if kit := mergekit(a, b, folder):
        found["mergekit-pytorch linear"] = kit
    return found


def mergekit(a: Path, b: Path, folder: Path) -> Callable[[], None] | None:
    try:
        import mergekit.merge_methods as methods
        from mergekit.graph import Executor
        from mergekit.options import MergeOptions
        from mergekit.scripts import merge_raw_pytorch as raw
    except ImportError as error:
        sys.stderr.write(f"mergekit is left out: {error}\n")
        return None
    assert methods

    def run() -> None:
        raw.SimpleLoaderCache._instance = None
        models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (a, b)]
        config = raw.RawPyTorchMergeConfig(merge_method="linear", models=models, parameters={"normalize": False})
        out = folder / "kit"
        shutil.rmtree(out, ignore_errors=True)
        options = MergeOptions(safe_serialization=True)
        Executor(raw.plan_flat_merge(config, str(out), False, False, options)).execute()
        for file in out.iterdir():
            sync(file)

    return run


def gate(folder: Path, a: Path, b: Path) -> dict[str, float]:
    """Largest difference of each result from float64, in units of the dtype's rounding of |a| + |b|."""
    theta_0, theta_1 = read_safetensors(a), read_safetensors(b)
    places = {"wise_ft": folder / "wise.safetensors", "plain loop (load, average, save)": folder / "loop.safetensors"}
    if (folder / "kit").is_dir():
        places["mergekit-pytorch linear"] = next((folder / "kit").glob("*.safetensors"))
    worst = {}
    for name, path in places.items():
        merged, worst[name] = read_safetensors(path), 0.0
        assert merged.keys() == theta_0.keys(), name
        for key in list(theta_0)[:: max(1, len(theta_0) // 12)]:
            x, y = theta_0[key].double(), theta_1[key].double()
            unit = torch.finfo(theta_0[key].dtype).eps / 2 * (x.abs() + y.abs()) + 1e-30
            worst[name] = max(worst[name], float(((merged[key].double() - (x + y) / 2).abs() / unit).max()))
        assert worst[name] < 4, (name, worst[name])
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    system = subprocess.run(["stat", "-f", "-c", "%T", str(args.dir)], capture_output=True, text=True).stdout.strip()
    result = {"machine": bench.machine(), "mib": args.mib, "rounds": args.rounds, "filesystem": system, "dtypes": {}}
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory(dir=args.dir) as name:
            folder = Path(name)
            a, b = folder / "a.safetensors", folder / "b.safetensors"
            write_safetensors(a, model(args.mib, getattr(torch, dtype), 0), {"format": "pt"})
            write_safetensors(b, model(args.mib, getattr(torch, dtype), 1), {"format": "pt"})
            calls = contenders(a, b, folder)
            for call in calls.values():
                call()
            worst = gate(folder, a, b)
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
            for _ in range(args.rounds):
                for name, call in calls.items():
                    wall, cpu = time.perf_counter(), time.process_time()
                    call()
                    times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            rows = {}
            for name, pairs in times.items():
                wall, cpu = (statistics.median(t) for t in zip(*pairs))
                ratios = {}
                for base in ("copy one file", "copy both files"):
                    for i, clock in enumerate(("wall", "cpu")):
                        ratio = statistics.median(x[i] / y[i] for x, y in zip(times[base], pairs))
                        ratios[f"{clock} speed against {base}"] = round(ratio, 3)
                rows[name] = {"wall_s": round(wall, 4), "cpu_s": round(cpu, 4), **ratios}
                sys.stdout.write(f"{dtype:9} {name:34} {json.dumps(rows[name])}\n")
            result["dtypes"][dtype] = {"bytes": a.stat().st_size, "times": rows, "error_in_roundings": worst}
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result)


if __name__ == "__main__":
    main()
