"""The metrics of SAEs of real tokens, in both definitions, beside visaebench's own functions: numbers and time.

    pip install visaebench==0.1.0
    python -m benchmarks.real_vit.metrics --tokens tokens.safetensors --pictures stamps --runs runs \
        --out benchmarks/results/real_vit/metrics.json

Tokens are those of ``benchmarks.real_vit.tokens`` of the same pictures, whose kinds (the folder below ``stamps``) are
the labels; the other tower of monosemanticity is EmojiCLIP. Two SAEs (seeds 0 and 1) are trained where ``--runs`` has
none. Of the pictures some are taken at equal distances, as many as give about ``--rows`` patches; all of them are the
SAEs' training data too. Times are of this process, from tokens to numbers: what it takes here for all metrics together,
and what each of visaebench's functions takes with its own SAE class and the same weights. Its localisation counts
features that are told in 50 images or more. It is a matter of ten minutes; ``--peer`` does a part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import clipsteer
from benchmarks.real_vit.tokens import pictures_in
from clipsteer import SAE
from clipsteer.io.files import write_json
from clipsteer.sae import TrainConfig
from clipsteer.sae.metrics import evaluate_metrics
from clipsteer.sae.metrics.visaebench import THEIRS

_SEEDS = (0, 1)
_TOKENS = 257


def trained(tokens: Tensor, runs: Path, steps: int) -> list[SAE]:
    saes = []
    for seed in _SEEDS:
        folder = runs / f"seed{seed}"
        if not folder.exists():
            config = TrainConfig(d_sae=12288, k=32, steps=steps, batch_size=2048, lr=1e-3, seed=seed)
            clipsteer.train_sae(tokens, config).save_pretrained(folder)
        saes.append(SAE.from_pretrained(folder).eval())
    return saes


def kinds_of(pictures: list[Path]) -> tuple[list[int], list[str]]:
    """Labels by the folder below ``stamps``, and their names."""
    names = [path.parts[path.parts.index("stamps") + 1] for path in pictures]
    kinds = sorted(set(names))
    return [kinds.index(name) for name in names], kinds


def timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = function()
    return found, {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - cpu}


def as_theirs(sae: SAE) -> Any:
    """The same weights in visaebench's class."""
    from visaebench.hub.loader import load_sae_from_weights

    weights = {
        "encoder.weight": sae.W_enc.detach(),
        "encoder.bias": (sae.b_enc - sae.W_enc @ sae.b_dec).detach(),
        "decoder.weight": sae.W_dec.detach(),
        "decoder.bias": sae.b_dec.detach(),
    }
    config = {"activation": "topk", "k": sae.k, "input_dim": sae.d_in, "hidden_dim": sae.d_sae}
    return load_sae_from_weights(weights, config, device="cpu")


class Embedded:
    """An evaluator that knows the embeddings of images by their number."""

    def __init__(self, embeddings: Tensor) -> None:
        self.embeddings = embeddings

    def extract_activations(self, images: list[int], *, layer: int = -1) -> Tensor:
        return self.embeddings[torch.tensor(images)][:, None]


def theirs(name: str, sae: SAE, x: Tensor, labels: list[int], embeddings: Tensor) -> dict[str, Any]:
    """Value and time of one of visaebench's functions."""
    from visaebench.metrics import METRIC_REGISTRY

    warnings.simplefilter("ignore")
    more: dict[str, Any] = {"labels": labels} if name in ("sparse_probing", "downstream_preservation") else {}
    if name == "monosemanticity":
        more = {"images": range(len(x)), "evaluator_backbone": Embedded(embeddings)}
    elif name == "absorption":
        siblings = {"class_indices": sorted(set(labels)), "hierarchy_depth": 1}
        more = {"labels": labels, "sibling_groups": {"all": siblings}}
    model = as_theirs(sae)
    metric = METRIC_REGISTRY[name](**({"grid_size": (16, 16)} if name == "localization" else {}))
    rows = x.flatten(0, 1) if name == "fvu" else x
    with torch.no_grad():
        result, spent = timed(lambda: metric.compute(model, rows, device="cpu", **more))
    return {"value": result.value, **spent, "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE")
    parser.add_argument("--pictures", type=Path, required=True, metavar="DIR")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="SAEs, trained where missing")
    parser.add_argument("--steps", type=int, default=400, help="of training (default: 400)")
    parser.add_argument("--rows", type=int, default=100_000, help="tokens to measure on (default: 100,000)")
    parser.add_argument(
        "--peer",
        nargs="*",
        default=list(THEIRS),
        choices=list(THEIRS),
        help="of visaebench's functions those that are run; of the others the file's are kept (default: all)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    tokens = load_file(args.tokens)["tokens"]
    pictures = pictures_in(args.pictures)
    if len(pictures) * _TOKENS != len(tokens):
        parser.error(f"{len(pictures)} pictures of {_TOKENS} tokens are not the {len(tokens)} tokens")
    labels, kinds = kinds_of(pictures)
    saes = trained(tokens, args.runs, args.steps)
    count = min(len(pictures), round(args.rows / (_TOKENS - 1)))
    chosen = [i * len(pictures) // count for i in range(count)]
    x = tokens.unflatten(0, (-1, _TOKENS))[chosen, 1:].contiguous()  # patches
    of_chosen = [labels[i] for i in chosen]
    embeddings = clipsteer.load("emojiclip").encode_images([pictures[i] for i in chosen]).float()
    del tokens

    def measured(definition: str, metrics: str | list[str] = "all") -> tuple[Any, dict[str, float]]:
        return timed(
            lambda: evaluate_metrics(
                saes[0], x, metrics=metrics, labels=of_chosen, embeddings=embeddings, definition=definition
            )
        )

    measured("clipsteer", "fvu")  # loads what is loaded once
    ours, spent = measured("clipsteer")
    same, spent_same = measured("visaebench-0.1.0")
    matched, spent_matched = timed(
        lambda: evaluate_metrics(saes[0], x[:1], metrics=["stability"], others=saes[1:])["stability"]
    )
    result: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "visaebench", "scikit-learn", "scipy")},
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "sae": {"d_sae": saes[0].d_sae, "k": saes[0].k, "steps": args.steps, "seeds": _SEEDS},
        "images": count,
        "tokens": count * (_TOKENS - 1),
        "kinds": dict(zip(kinds, torch.bincount(torch.tensor(of_chosen), minlength=len(kinds)).tolist())),
        "clipsteer": {
            "metrics": {name: found.to_json() for name, found in (ours | {"stability": matched}).items()},
            **spent,
            "stability": spent_matched,
        },
        "visaebench-0.1.0 here": {
            "metrics": {name: found.to_json() for name, found in same.items()},
            **spent_same,
        },
    }
    for name, found in ours.items():
        sys.stdout.write(f"{name:<16} {found.value:.4f}  {found.low:.4f} … {found.high:.4f}\n")
    sys.stdout.write(f"{spent['seconds']:.1f} s; visaebench's definition {spent_same['seconds']:.1f} s\n")
    sys.stdout.flush()
    peer = json.loads(args.out.read_text())["visaebench 0.1.0"]["metrics"] if args.out.exists() else {}
    for name in args.peer:
        peer[THEIRS[name]] = theirs(name, saes[0], x, of_chosen, embeddings)
        sys.stdout.write(f"visaebench {name}: {peer[THEIRS[name]]}\n")
        sys.stdout.flush()
    total = {key: sum(part[key] for part in peer.values()) for key in spent}
    result["visaebench 0.1.0"] = {"metrics": peer, **total}
    if len(peer) == len(THEIRS):
        result["times as fast"] = {
            "clipsteer": total["processor_seconds"] / spent["processor_seconds"],
            "visaebench-0.1.0 here": total["processor_seconds"] / spent_same["processor_seconds"],
        }
        sys.stdout.write(json.dumps(result["times as fast"]) + "\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)


if __name__ == "__main__":
    main()
