"""Passes that end at the hook point: the same bits, what follows does not run, other people's hooks see every pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import clipsteer
from clipsteer import clip
from clipsteer.clip import hooks as clip_hooks
from clipsteer.sae import activations
from clipsteer.sae.evaluate import evaluate_sae, feature_statistics, top_images
from clipsteer.sae.metrics.stream import from_tower
from clipsteer.sae.model import SAE

pytest.importorskip("open_clip")


class Counted:
    """Counts calls of a module without a hook on it."""

    def __init__(self, module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        forward = module.forward

        def counting(*args, **kwargs):
            self.calls += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(module, "forward", counting)


@pytest.fixture(scope="module")
def loaded():
    torch.manual_seed(0)
    return clip.load("emoji-tiny")


def images(loaded, count: int = 6, seed: int = 0) -> torch.Tensor:
    side = clipsteer.data.open_dataset("emoji")[0][0].size[0]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.visual.transformer.resblocks


POINTS = ["0", "1", "0.mlp", "1.attn", "0.ln_2", "1.mlp.c_fc"]


@pytest.mark.parametrize("point", POINTS)
def test_what_is_kept_has_the_same_bits_and_what_follows_runs_once(loaded, monkeypatch, point):
    name = f"visual.transformer.resblocks.{point}"
    batches = images(loaded).split(2)
    with torch.no_grad(), clip.capture(loaded.model, name) as found:
        whole = []
        for batch in batches:
            loaded.model.encode_image(batch)
            whole.append(found[name].flatten(0, 1).clone())
    blocks = blocks_of(loaded.model)
    after = Counted(blocks[-1], monkeypatch)
    here = Counted(loaded.model.get_submodule(name), monkeypatch)
    got = list(clip.harvest(loaded, batches, name))
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
    assert here.calls == len(batches)
    assert after.calls == (len(batches) if point.split(".")[0] == str(len(blocks) - 1) else 1)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in loaded.model.modules())


def test_of_two_points_the_later_one_ends_the_pass(loaded, monkeypatch):
    names = [f"visual.transformer.resblocks.{point}" for point in ("1", "0")]
    batches = images(loaded).split(3)
    after = Counted(loaded.model.visual.ln_post, monkeypatch)
    pairs = list(clip_hooks.harvest_each(loaded, batches, names))
    for batch, (later, sooner) in zip(batches, pairs, strict=True):
        for name, rows in zip(names, (later, sooner)):
            assert torch.equal(rows, next(clip.harvest(loaded, [batch], name)))
    # once in the pass that ran whole, and once in each of the four harvests of one batch
    assert after.calls == 1 + 2 * len(batches)


class Twice(nn.Module):
    """Calls one layer twice, and another once between."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.shared(self.other(self.shared(x))))


def test_the_latest_call_of_a_module_counts(monkeypatch):
    torch.manual_seed(0)
    model = Twice()
    batches = [torch.randn(2, 3, 4) for _ in range(3)]
    after = Counted(model.last, monkeypatch)
    got = list(clip.harvest(model, batches, "shared"))
    with torch.no_grad():
        for batch, rows in zip(batches, got, strict=True):
            twice = model.shared(model.other(model.shared(batch)))
            assert torch.equal(rows, twice.flatten(0, 1))
    assert after.calls == 1


def test_other_peoples_hooks_see_every_pass(loaded):
    name = "visual.transformer.resblocks.0"
    seen = []
    handle = loaded.model.visual.ln_post.register_forward_hook(lambda *_: seen.append(1))
    try:
        list(clip.harvest(loaded, images(loaded).split(2), name))
    finally:
        handle.remove()
    assert len(seen) == 3


def test_each_shape_of_images_has_a_pass_that_runs_whole(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    after = Counted(model[1], monkeypatch)
    batches = [torch.randn(2, tokens, 4) for tokens in (3, 5, 3, 5, 5)]
    sizes = [len(rows) for rows in clip.harvest(model, batches, "0")]
    assert sizes == [6, 10, 6, 10, 10]
    assert after.calls == 2


def test_an_error_of_the_model_is_no_end(loaded):
    def fail(*_):
        raise RuntimeError("of the model itself")

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    rows = clip.harvest(model, [torch.randn(2, 3, 4)] * 2, "1")
    next(rows)
    model[0].forward = fail
    with pytest.raises(RuntimeError, match="of the model itself"):
        next(rows)


def test_stores_sources_and_features_pay_for_one_whole_pass(loaded, monkeypatch, tmp_path):
    name = "visual.transformer.resblocks.0"
    pixels = list(images(loaded, 12))
    last = Counted(blocks_of(loaded.model)[-1], monkeypatch)
    store = activations.harvest_to_store(loaded, pixels, name, tmp_path, dtype="float32", shard_rows=40, batch_size=2)
    assert len(store.shards) > 2
    assert last.calls == 1
    source = activations.HarvestSource(loaded, pixels, name, images_per_group=4, batch_size=2)
    for group in range(3):
        source.load_group(0, 0, group)
    assert last.calls == 2
    sae = SAE(store.d_in, 24, k=3)
    sae.metadata.update(source.provenance)
    feature_statistics(sae, loaded, pixels, batch_size=2)
    assert last.calls == 3
    top_images(sae, loaded, pixels, [0, 1], batch_size=2)
    assert last.calls == 4
    # without classes nothing that follows the SAE is looked at
    evaluate_sae(sae, loaded, pixels, batch_size=2)
    assert last.calls == 5
    list(from_tower(sae, loaded, pixels, batch_size=2))
    assert last.calls == 6
