"""Which layers one step of SGD moves the features with: why a tower that is trained whole drifts on pictures on white.

    python -m benchmarks.real_vit.sensitivity --weights vit_s.safetensors --pictures pictures \\
        --out benchmarks/results/real_vit/sensitivity.json

A linear head is fitted for STEPS steps on the frozen features of a batch of the first task's pictures. Then, for the
gradient of its cross-entropy, each kind of layer alone takes one step of SGD at LR (ten steps of SLCA's 1e-4 at a
momentum of 0.9 are as long), and the relative movement of the features is written down. The same with white areas at
the mean colour, which is 0 in pixels: a shared background is a constant input to the projection of patches.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.real_vit.incremental import ORDER, TASKS
from benchmarks.real_vit.pictures import scenario
from benchmarks.real_vit.tower import encoder_of
from clipsteer.continual.backbone import Encoder
from clipsteer.io.files import write_json

LR, STEPS = 1e-3, (0, 10)


def layer_of(name: str) -> str:
    """The kind of layer that a parameter is of."""
    if name.startswith("patch_embed"):
        return "projection of patches"
    if "attn" in name:
        return "attention"
    if "mlp" in name:
        return "MLP"
    return "norms and scales" if name.startswith("blocks") else "class token and positions"


def movements(encoder: Encoder, x: Tensor, y: Tensor, steps: int) -> dict[str, float]:
    """Kind of layer -> mean over images of ‖Δ feature‖ / ‖feature‖; "all blocks" beside them."""
    with torch.no_grad():
        features = encoder(x)
    head = 0.02 * torch.randn(int(y.max()) + 1, features.shape[1], generator=torch.Generator().manual_seed(0))
    head.requires_grad_()
    sgd = torch.optim.SGD([head], 0.01, momentum=0.9)
    for _ in range(steps):
        sgd.zero_grad()
        F.cross_entropy(features @ head.T, y).backward()
        sgd.step()
    encoder.zero_grad()
    F.cross_entropy(encoder(x) @ head.T, y).backward()
    kinds: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in encoder.module.named_parameters():
        if parameter.grad is not None:
            kinds.setdefault(layer_of(name), []).append(parameter)
            if name.startswith("blocks"):
                kinds.setdefault("all blocks", []).append(parameter)
    found = {}
    for kind, parameters in kinds.items():
        starts = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.sub_(LR * parameter.grad)
            moved = (encoder(x) - features).norm(dim=1) / features.norm(dim=1)
            for parameter, start in zip(parameters, starts):
                parameter.copy_(start)
        found[kind] = float(moved.mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--images", type=int, default=8)
    args = parser.parse_args()
    encoder = encoder_of(args.weights)
    images = scenario(args.pictures, TASKS, ORDER)
    rows = images.rows("train", 0)
    rows = rows[:: len(rows) // args.images][: args.images]
    x = torch.stack([encoder.preprocess(images.train[row][0]) for row in rows])
    y = torch.tensor([images.tasks[0].index(images.train.targets[row]) for row in rows])
    white = x.amax((0, 2, 3), keepdim=True)
    grounds = {"white": x, "mean colour": torch.where((x == white).all(1, keepdim=True), 0.0, x)}
    found = {}
    for ground, pixels in grounds.items():
        for steps in STEPS:
            found[f"{ground}, head of {steps} steps"] = movements(encoder, pixels, y, steps)
    write_json(args.out, {"lr": LR, "images": len(rows), "moved": found})
    for what, kinds in found.items():
        sys.stdout.write(f"{what}: " + ", ".join(f"{k} {v:.3f}" for k, v in kinds.items()) + "\n")


if __name__ == "__main__":
    main()
