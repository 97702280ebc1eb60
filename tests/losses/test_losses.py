"""The losses as modules, beside open_clip's own: values, gradients, processes, its training loop."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize

from _command import in_processes
from clipsteer import DRRhoLoss, losses

open_clip_losses = pytest.importorskip("open_clip.loss")

# Runs open_clip's module and ours on the same features, in every process, and compares what they return and every
# gradient that their sum leaves in this process's own.
WORKER = """
import itertools, sys
import torch, torch.distributed as dist
import open_clip.loss as theirs
from clipsteer import losses as ours
from clipsteer.training.world import World

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
        said = lambda message: f"{what}: {name}: {message}"
        torch.testing.assert_close(values[name], expected[name], rtol=1e-12, atol=1e-12, msg=said)
    for number, (x, y) in enumerate(zip(grads, truth)):
        said = lambda message: f"{what}: leaf {number}: {message}"
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12, msg=said)


count = 0
for local, with_grad, cache in itertools.product((False, True), repeat=3):
    options = {"local_loss": local, "gather_with_grad": with_grad, "cache_labels": cache, **flags}
    for kind, name in (("clip", "ClipLoss"), ("clip with a bias", "ClipLoss"), ("distill", "DistillClipLoss")):
        for backend in ("auto", "reference"):
            more = {"backend": backend, "equal_rows": backend == "auto"}
            a, b = getattr(ours, name)(**options, **more), getattr(theirs, name)(**options)
            for seed in (1, 2):  # a second call, as labels are cached
                compare(a, b, kind, seed, f"{kind} {options} {backend}")
                count += 1
for how in (None, "bidir", "shift", "reduce", "gather"):
    options = {"cache_labels": True, "dist_impl": how, **flags}
    compare(ours.SigLipLoss(**options), theirs.SigLipLoss(**options), "siglip", 3, f"siglip {options}")
    count += 1
# no process gathers what all have, in a ring
World.gather = None
for how, equal, backend in itertools.product((None, "bidir", "shift"), (False, True), ("auto", "reference")):
    options = {"cache_labels": True, "dist_impl": how, **flags}
    a = ours.SigLipLoss(**options, ring=True, equal_rows=equal, backend=backend)
    for seed in (4, 5):
        compare(a, theirs.SigLipLoss(**options), "siglip", seed, f"ring {options} {equal} {backend}")
        count += 1
assert count == 8 * 3 * 2 * 2 + 5 + 12 * 2
if size > 1:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_flag_equals_open_clips_own_module(size: int, tmp_path: Path) -> None:
    in_processes(WORKER, size, size=size)


def features(B: int, *widths: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(B)
    return [normalize(torch.randn(B, d, generator=g, dtype=torch.float64), dim=1).to(dtype) for d in widths]


class Tiny(torch.nn.Module):
    """A linear tower a side, what it returns as open_clip's models do."""

    def __init__(self, seed: int, bias: bool) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.image = torch.nn.Parameter(torch.randn(3 * 4 * 4, 8, generator=g) / 7)
        self.text = torch.nn.Parameter(torch.randn(6, 8, generator=g) / 3)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.logit_bias = torch.nn.Parameter(torch.tensor(-5.0)) if bias else None

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {
            "image_features": normalize(images.flatten(1) @ self.image, dim=1),
            "text_features": normalize(texts.float() @ self.text, dim=1),
            "logit_scale": self.logit_scale.exp(),
        }
        return found if self.logit_bias is None else {**found, "logit_bias": self.logit_bias}


class DRRhoAsClip(DRRhoLoss):
    """With ε = 1/B and no memory, times s and with log B, it is CLIP's loss; it learns nothing of its own."""

    def __init__(self, **options: object) -> None:
        assert options["world_size"] == 1
        super().__init__(eps=1 / 12, rho=0.0)
        assert not list(self.parameters())

    def forward(self, *, logit_scale: torch.Tensor, output_dict: bool, **features: torch.Tensor) -> object:
        found = super().forward(logit_scale=logit_scale, output_dict=output_dict, **features)
        return {"contrastive_loss": found["contrastive_loss"] * logit_scale + math.log(12)}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("kind", ["clip", "siglip", "distill", "drrho"])
def test_open_clips_training_loop(kind: str, precision: str, accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of `open_clip_train`, the loss made by open_clip's factory: with its classes, and with ours there."""
    import open_clip.factory as factory

    train = pytest.importorskip("open_clip_train.train")
    if kind == "distill" and accumulate > 1:
        pytest.skip("open_clip refuses the two together")
    if kind == "drrho" and accumulate > 1:
        pytest.skip("its batch is then twice as large, and so is 1/ε")
    given = {
        "distill": kind == "distill", "siglip": kind == "siglip", "model": "tiny", "local_loss": False,
        "gather_with_grad": False, "rank": 0, "world_size": 1, "horovod": False, "loss_dist_impl": None,
        "device": "cpu", "precision": precision, "accum_freq": accumulate, "skip_scheduler": True,
        "grad_clip_norm": None, "batch_size": 12, "log_every_n_steps": 1, "wandb": False, "distributed": False,
        "local_rank": 0, "no_set_device_rank": False,
    }  # fmt: skip
    args = SimpleNamespace(**given)
    g = torch.Generator().manual_seed(0)
    shapes = [(12, 3, 4, 4), (12, 6)]
    batches = [[torch.randn(shape, generator=g) for shape in shapes] for _ in range(2 * accumulate)]

    class Loader(list):
        num_batches, num_samples = len(batches), 24

    data = {"train": SimpleNamespace(dataloader=Loader(batches), set_epoch=lambda epoch: None)}
    seen = {}
    for whose in ("theirs", "ours"):
        if whose == "ours":
            for name in ("ClipLoss", "SigLipLoss", "DistillClipLoss"):
                drop_in = DRRhoAsClip if (kind, name) == ("drrho", "ClipLoss") else getattr(losses, name)
                monkeypatch.setattr(factory, name, drop_in)
        loss = factory.create_loss(args)
        assert any(c.__module__.startswith("clipsteer") for c in type(loss).__mro__) == (whose == "ours")
        seen[whose] = []
        loss.register_forward_hook(lambda m, a, out, kept=seen[whose]: kept.append([v.item() for v in out.values()]))
        model, teacher = Tiny(1, kind == "siglip"), Tiny(2, False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        train.train_one_epoch(model, data, loss, 0, optimizer, None, None, teacher, args)
        assert float(model.logit_scale.detach()) != 2.0
        seen[whose].append([float(p.detach().double().square().sum()) for p in model.parameters()])
    assert len(seen["ours"]) == 2 * accumulate + 1
    # under autocast open_clip's logits are rounded to bfloat16
    off = 1e-5 if precision == "fp32" else 2e-2
    for ours, theirs in zip(seen["ours"], seen["theirs"]):
        assert ours == pytest.approx(theirs, rel=off)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_halves_are_rounded_once(dtype: torch.dtype) -> None:
    """A loss of half-precision features is that of these numbers in float64, where open_clip's rounds its logits."""
    image, text, teacher_image, teacher_text = features(33, 24, 24, 10, 10, dtype=dtype)
    scale = torch.tensor(50.0)
    wide = [x.double() for x in (image, text, teacher_image, teacher_text)]
    student, teacher = (image, text, scale), (teacher_image, teacher_text)
    cases = (
        ("ClipLoss", (image, text, scale), (*wide[:2], 50.0)),
        ("SigLipLoss", (image, text, scale, -9.0), (*wide[:2], 50.0, -9.0)),
        ("DistillClipLoss", (*student, *teacher, 30.0), (*wide[:2], 50.0, *wide[2:], 30.0)),
    )  # fmt: skip
    for name, given, exact in cases:
        found = getattr(losses, name)()(*given, output_dict=True)
        truth = getattr(open_clip_losses, name)()(*exact, output_dict=True)
        for key in truth:
            assert float(found[key]) == pytest.approx(float(truth[key]), rel=1e-5)
            assert found[key].dtype == torch.float32


def test_a_teacher_of_another_precision_and_width() -> None:
    image, text, teacher_image, teacher_text = features(9, 8, 8, 5, 5)
    halves = [x.bfloat16().requires_grad_() for x in (image, text)]
    found = losses.DistillClipLoss()(*halves, 20.0, teacher_image, teacher_text, 30.0)
    assert all(x.dtype == torch.float32 for x in found)
    sum(found).backward()
    assert all(x.grad.dtype == torch.bfloat16 for x in halves)


def test_what_open_clip_would_take_is_named_where_it_is_not_served() -> None:
    image, text = features(5, 4, 4)
    with pytest.raises(RuntimeError, match="use_horovod is not served; run under torchrun"):
        losses.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl must be one of"):
        losses.SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match=r"ring=True goes with dist_impl of .*bidir.*shift.*, got 'gather'"):
        losses.SigLipLoss(dist_impl="gather", ring=True)
    with pytest.raises(RuntimeError, match="world_size=2 needs a process group"):
        losses.ClipLoss(world_size=2)(image, text, 1.0)
    with pytest.raises(ValueError, match="logit_scale must be positive"):
        losses.ClipLoss()(image, text, torch.tensor(-1.0))


UNEVEN = """
import sys, torch, torch.distributed as dist
from clipsteer import losses
from clipsteer.training.world import World
dist.init_process_group("gloo")
rank = dist.get_rank()
x = torch.randn(3 + rank, 4)
for module in (losses.ClipLoss, losses.SigLipLoss):
    given = (x, x, 1.0) if module is losses.ClipLoss else (x, x, 1.0, 0.0)
    try:
        module(rank=rank, world_size=2)(*given)
    except ValueError as error:
        assert "as many pairs each, got [3, 4]" in str(error), error
    else:
        raise AssertionError("uneven processes")
    equal = module(rank=rank, world_size=2, equal_rows=True)
    few = [y[:2] if torch.is_tensor(y) else y for y in given]
    assert torch.isfinite(equal(*few))
    counts = World.counts
    World.counts = None  # nobody asks again
    assert torch.isfinite(equal(*few))
    try:
        equal(*given)
    except ValueError as error:
        assert f"the first batch had 2 pairs of this process, got {3 + rank}" in str(error), error
    else:
        raise AssertionError("another number of rows")
    World.counts = counts
    try:
        module(rank=1 - rank, world_size=2)(*given)
    except ValueError as error:
        assert f"got {1 - rank} and 2" in str(error), error
    else:
        raise AssertionError("another rank")
dist.destroy_process_group()
"""


def test_uneven_processes_and_wrong_ranks_are_refused_by_all(tmp_path: Path) -> None:
    in_processes(UNEVEN, size=2)


def test_drrho_takes_open_clips_call_and_the_models_temperature() -> None:
    """With ε = 1/B it is CLIP's loss over s, less its log B, with its gradients; ids only where γ < 1."""
    image, text = (x.requires_grad_() for x in features(11, 6, 6, dtype=torch.float64))
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    live = (image, text, scale)
    loss = DRRhoLoss(eps=1 / 11, rho=0.0)
    found = loss(*live, output_dict=True)["contrastive_loss"] * scale + torch.tensor(11.0).double().log()
    expected = open_clip_losses.ClipLoss()(*live)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, live), torch.autograd.grad(expected, live)):
        torch.testing.assert_close(a, b)
    assert loss.u.shape == (2, 0)
    named = loss(image_features=image, text_features=text, logit_scale=scale)
    assert torch.equal(named, loss(*live))
    with pytest.raises(ValueError, match=r"gamma=0\.5 < 1 needs ids"):
        loss(*live, gamma=0.5)
    with pytest.raises(ValueError, match="a logit_scale beside a temperature of the loss's own"):
        DRRhoLoss(9, temperature=0.07, learnable_temperature=True)(*live)
    # the call of before
    ids = torch.arange(11)
    remembering = DRRhoLoss(20, temperature=0.1)
    before = remembering(image, text, ids, image.detach(), text.detach())
    now = remembering(image, text, ids=ids, ref_image=image.detach(), ref_text=text.detach())
    assert torch.equal(before, now)
    assert int(remembering.u.isfinite().sum()) == 22
    assert torch.equal(remembering(image=image, text=text, ids=ids), remembering(image, text, ids))


DATA_PARALLEL = """
import torch, torch.distributed as dist
from clipsteer import DRRhoLoss
alone = DRRhoLoss(eps=0.1)  # made before there is a group, of a single process
dist.init_process_group("gloo")
rank = dist.get_rank()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = torch.nn.Linear(6, 6, bias=False)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        torch.nn.init.eye_(self.tower.weight)

    def forward(self, x, y):
        image, text = (torch.nn.functional.normalize(self.tower(t), dim=1) for t in (x, y))
        return {"image_features": image, "text_features": text, "logit_scale": self.logit_scale.exp()}


g = torch.Generator().manual_seed(0)
batches = torch.randn(3, 2, 10, 6, generator=g)
shared = torch.nn.parallel.DistributedDataParallel(Model()), DRRhoLoss(eps=0.1), slice(5 * rank, 5 * rank + 5)
found = []
for model, loss, mine in (shared, (Model(), alone, slice(None))):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for x, y in batches:
        optimizer.zero_grad()
        loss(**model(x[mine], y[mine]), output_dict=True)["contrastive_loss"].backward()
        optimizer.step()
    found.append([p.detach().clone() for p in model.parameters()])
for a, b in zip(*found):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
assert all(float(p.detach()) != 2.0 for n, p in model.named_parameters() if n == "logit_scale")
dist.destroy_process_group()
"""


def test_drrho_trains_the_models_temperature_under_data_parallel_training(tmp_path: Path) -> None:
    """Three steps, which end where one process with the whole batch does."""
    in_processes(DATA_PARALLEL, size=2)
