from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clipsteer import SAE, FileFormatError
from clipsteer.continual import plasticity
from clipsteer.continual.plasticity import Plasticity, fit_saes, load_saes, pack_history, save_saes, unpack_history

D, N, T = 6, 12, 5
BLOCKS = ["blocks.0", "blocks.1"]


class Tower(nn.Module):
    """(B, 1, T, D) pixels that are tokens; two blocks, with dropout that evaluation must switch off."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)) for _ in range(2)])
        self.unused = nn.Linear(D, D)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, pixels):
        x = pixels[:, 0]
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, T, D, generator=torch.Generator().manual_seed(seed))


def saes(architecture: str = "topk") -> dict[str, SAE]:
    made = {}
    for i, block in enumerate(BLOCKS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(i)
            made[block] = SAE(D, N, architecture, 3, normalize="layer_norm")
    return made


@pytest.mark.parametrize("architecture", ["topk", "relu", "batch_topk"])
def test_usage_is_the_mean_activation_over_images_and_tokens(architecture):
    tower, made, pixels = Tower().train(), saes(architecture), images(11)
    usage = Plasticity(made).usage(tower, pixels.split(4))
    tower.eval()
    with torch.no_grad():
        x = pixels[:, 0]
        for block, sae in made.items():
            x = tower.get_submodule(block)(x)
            expected = sae.eval().encode(x).double().mean((0, 1))
            assert usage[block].dtype == torch.float64
            assert expected.any()
            torch.testing.assert_close(usage[block], expected, rtol=1e-5, atol=1e-6)
    # tuples whose first item is the images, any batch size, any mode
    again = Plasticity(made).usage(tower, [(part, None) for part in pixels.split(3)])
    for block in BLOCKS:
        torch.testing.assert_close(again[block], usage[block], rtol=1e-5, atol=1e-7)


def test_usage_leaves_modes_and_gradients_alone():
    tower, made = Tower().train(), saes()
    made["blocks.0"].train()
    Plasticity(made).usage(tower, [images(2)])
    assert tower.training
    assert tower.blocks[0][1].training
    assert made["blocks.0"].training
    assert all(p.grad is None for p in tower.parameters())
    assert tower(images(2)).requires_grad


def vector(*values: float) -> torch.Tensor:
    return torch.tensor([*values, *[0.0] * (N - len(values))], dtype=torch.float64)


def test_multipliers_follow_the_formula():
    model = Plasticity(saes(), floor=0.25)
    new = {"blocks.0": vector(1, 1), "blocks.1": vector(0, 0, 2)}
    far = {"blocks.0": vector(0, 0, 1), "blocks.1": vector(0, 0, 3)}
    near = {"blocks.0": vector(5), "blocks.1": vector(1)}
    assert model.multipliers(new, []) == {"blocks.0": 1.0, "blocks.1": 1.0}
    assert model.multipliers(new, [far]) == {"blocks.0": 0.25, "blocks.1": pytest.approx(1.0)}
    got = model.multipliers(new, [far, near])
    assert got == {"blocks.0": pytest.approx(0.25 + 0.75 / math.sqrt(2)), "blocks.1": pytest.approx(1.0)}
    assert model.overlaps(new, [near])["blocks.1"] == 0
    # neither length nor order matter, and a task that uses nothing is like none
    scaled = {block: 1e-6 * usage for block, usage in new.items()}
    assert model.multipliers(scaled, [near, far]) == pytest.approx(got)
    assert model.multipliers({block: vector() for block in BLOCKS}, [near]) == dict.fromkeys(BLOCKS, 0.25)
    assert model.multipliers(new, [new]) == dict.fromkeys(BLOCKS, pytest.approx(1.0))


def test_a_background_is_subtracted():
    common = {block: vector(9, 9, 9) for block in BLOCKS}
    one = {block: vector(9, 9, 9, 1) for block in BLOCKS}
    two = {"blocks.0": vector(9, 9, 10), "blocks.1": vector(9, 9, 10, 1)}
    raw, centred = Plasticity(saes(), 0.0), Plasticity(saes(), 0.0, background=common)
    assert raw.multipliers(one, [two])["blocks.0"] > 0.98
    assert centred.multipliers(one, [two]) == {"blocks.0": 0.0, "blocks.1": pytest.approx(1 / math.sqrt(2))}
    # opposite directions are no overlap either
    assert centred.multipliers({**one, "blocks.0": vector(9, 9, 8)}, [two])["blocks.0"] == 0.0
    with pytest.raises(ValueError, match="background: expected finite usage"):
        Plasticity(saes(), background={"blocks.0": vector()})


def test_arguments():
    for bad in ({}, {"blocks.0": nn.Linear(1, 1)}):
        with pytest.raises(ValueError, match="saes must map"):
            Plasticity(bad)
    for floor in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="floor must be"):
            Plasticity(saes(), floor)
    model, good = Plasticity(saes()), {block: vector(1) for block in BLOCKS}
    for bad in ({}, {**good, "blocks.1": torch.ones(N - 1)}, {**good, "blocks.1": vector(-1)},
                {**good, "blocks.1": vector(math.nan)}):  # fmt: skip
        for usage, history in ((bad, [good]), (good, [good, bad]), (bad, [])):
            with pytest.raises(ValueError, match="overlaps: expected finite usage"):
                model.multipliers(usage, history)
    with pytest.raises(ValueError, match="no image"):
        model.usage(Tower(), [])
    with pytest.raises(ValueError, match="never calls 'unused'"):
        Plasticity({"unused": saes()["blocks.0"]}).usage(Tower(), [images(1)])
    narrow = SAE(D - 1, N, "topk", k=2)
    with pytest.raises(ValueError, match=rf"the SAE of 'blocks\.0' has d_in = {D - 1}, but"):
        Plasticity({"blocks.0": narrow}).usage(Tower(), [images(1)])
    with pytest.raises(ValueError, match="no module of the model matches"):
        Plasticity({"blocks.7": saes()["blocks.0"]}).usage(Tower(), [images(1)])


def test_history_survives_a_checkpoint():
    history = [{block: torch.rand(N, dtype=torch.float64) for block in BLOCKS} for _ in range(11)]
    back = unpack_history(dict(reversed(pack_history(history).items())))
    assert len(back) == 11
    assert all(torch.equal(a[b], c[b]) for a, c in zip(back, history) for b in BLOCKS)
    assert unpack_history({}) == []
    for bad in ({"x": vector()}, {"1/blocks.0": vector()}, {"-1/b": vector()}):
        with pytest.raises(ValueError, match="unpack_history: expected"):
            unpack_history(bad)


def test_saes_are_trained_on_their_blocks_and_come_back(tmp_path):
    tower, pixels = Tower().train(), images(400)
    settings = {"d_sae": 24, "k": 4, "steps": 300, "seed": 3, "lr": 3e-3, "batch_size": 128, "normalize": "none"}
    before = torch.get_rng_state()
    made = fit_saes(tower, BLOCKS, pixels.split(64), **settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(made) == BLOCKS
    tower.eval()
    with torch.no_grad():
        x = pixels[:, 0]
        fvu = {}
        for block, sae in made.items():
            x = tower.get_submodule(block)(x)
            rows = x.flatten(0, 1)
            spread = (rows - rows.mean(0)).square().sum()
            fvu[block] = float((sae(rows).x_hat - rows).square().sum() / spread)
            assert sae.metadata["hook_point"] == block
        # each explains its own block and not the other's
        other = float((made["blocks.0"](rows).x_hat - rows).square().sum() / spread)
    assert max(fvu.values()) < 0.3 < other
    again = fit_saes(tower, BLOCKS, pixels.split(64), **settings)
    assert all(torch.equal(again[b].W_enc, made[b].W_enc) for b in BLOCKS)

    many = {f"blocks.{i}": made["blocks.0"] for i in (10, 2, 1)}
    save_saes(tmp_path / "saes", many)
    loaded = load_saes(tmp_path / "saes")
    assert list(loaded) == ["blocks.1", "blocks.2", "blocks.10"]
    assert torch.equal(loaded["blocks.2"].W_dec, made["blocks.0"].W_dec)
    with pytest.raises(ValueError, match="not a module's name"):
        save_saes(tmp_path, {"../x": made["blocks.0"]})
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match="no folder of an SAE"):
        load_saes(tmp_path / "empty")


def test_the_rows_kept_are_a_sample_of_all(monkeypatch):
    seen = {}

    def record(rows, config, **_):
        seen[len(seen)] = (rows, config)

    monkeypatch.setattr(plasticity, "train_sae", record)
    tower, pixels = Tower().eval(), images(1000)
    fit_saes(tower, BLOCKS, pixels.split(7), N, 2, steps=50, max_rows=200)
    with torch.no_grad():
        every = tower.blocks[0](pixels[:, 0]).flatten(0, 1)
        second = tower.blocks[1](every)
    (rows, config), (rows1, _) = seen[0], seen[1]
    assert rows.shape == rows1.shape == (200, D)
    assert (config.batch_size, config.warmup_steps, config.normalize) == (200, 5, "layer_norm")
    distance = torch.cdist(rows.double(), every.double())
    assert float(distance.amin(1).max()) < 1e-5
    place = distance.argmin(1)
    # the same tokens of every block, each at most once, from early and late images alike
    torch.testing.assert_close(rows1, second[place], rtol=1e-4, atol=1e-5)
    assert len(place.unique()) == 200
    # each fifth has 40 in the mean, with a standard deviation below 6
    assert all(15 <= int(((place >= a) & (place < a + 1000)).sum()) <= 65 for a in range(0, 5000, 1000))
    seen.clear()
    fit_saes(tower, BLOCKS, pixels[:10].split(3), N, 2, steps=50)
    torch.testing.assert_close(seen[0][0], every[:50], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="max_rows of at least 2"):
        fit_saes(tower, BLOCKS, pixels.split(7), N, 2, steps=50, max_rows=1)
