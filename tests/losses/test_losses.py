"""The losses as modules, beside open_clip's own: values, gradients, processes, its training loop."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipsteer import losses, ops
from tests._command import in_processes

open_clip_losses = pytest.importorskip("open_clip.loss")

# Runs open_clip's module and ours on the same features, in every process, and compares what they return and every
# gradient that their sum leaves in this process's own.
WORKER = """
import itertools, sys
import torch, torch.distributed as dist
import open_clip.loss as theirs
from clipsteer import losses as ours

size = int(sys.argv[1])
rank = 0
if size > 1:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
flags = {"rank": rank, "world_size": size}
B, d, e = 7, 12, 9


def leaves(seed):
    g = torch.Generator().manual_seed(100 * seed + rank)
    rows = [torch.randn(B, n, generator=g, dtype=torch.float64) for n in (d, d, e, e)]
    rows = [torch.nn.functional.normalize(x, dim=1) for x in rows]
    return rows[:2], rows[2:], [torch.tensor(v, dtype=torch.float64) for v in (14.0, -3.0, 25.0)]


def results(module, seed, kind):
    student, teacher, (scale, bias, theirs) = leaves(seed)
    live = [x.requires_grad_() for x in (*student, scale)]
    extra = []
    if kind == "distill":
        extra = [*teacher, theirs]
    elif kind != "clip":
        live.append(bias.requires_grad_())
        extra = [bias]
    found = module(*live[:3], *extra, output_dict=True)
    total = sum((i + 1) * loss for i, loss in enumerate(found.values()))
    total.backward()
    return found, [x.grad for x in live]


def compare(a, b, kind, seed, what):
    values, grads = results(a, seed, kind)
    expected, truth = results(b, seed, kind)
    assert list(values) == list(expected), what
    for name in values:
        torch.testing.assert_close(values[name], expected[name], rtol=1e-12, atol=1e-12, msg=lambda m: f"{what}: {name}: {m}")
    for number, (x, y) in enumerate(zip(grads, truth)):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12, msg=lambda m: f"{what}: leaf {number}: {m}")


count = 0
for local, with_grad, cache in itertools.product((False, True), repeat=3):
    options = {"local_loss": local, "gather_with_grad": with_grad, "cache_labels": cache, **flags}
    for kind, name in (("clip", "ClipLoss"), ("clip with a bias", "ClipLoss"), ("distill", "DistillClipLoss")):
        for backend in ("auto", "reference"):
            a, b = getattr(ours, name)(**options, backend=backend), getattr(theirs, name)(**options)
            for seed in (1, 2):  # a second call, as labels are cached
                compare(a, b, kind, seed, f"{kind} {options} {backend}")
                count += 1
for how in (None, "bidir", "shift", "reduce", "gather"):
    options = {"cache_labels": True, "dist_impl": how, **flags}
    compare(ours.SigLipLoss(**options), theirs.SigLipLoss(**options), "siglip", 3, f"siglip {options}")
    count += 1
assert count == 8 * 3 * 2 * 2 + 5
if size > 1:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_flag_equals_open_clips_own_module(size: int, tmp_path: Path) -> None:
    in_processes(tmp_path, WORKER, size, size=size)
