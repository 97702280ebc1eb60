"""dictionary_learning's own training loop with its own dictionaries and with ours: 50 steps, then files."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("dictionary_learning")

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE

from clipsteer.integrations import dictionary_learning
from clipsteer.integrations._codes import Codes, Preactivations
from clipsteer.integrations._on_demand import waits

D, N, B, STEPS = 32, 256, 64, 50
CASES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "top-k": (TopKTrainer, dictionary_learning.FastTopK, {"k": 8}),
    "batch top-k": (BatchTopKTrainer, dictionary_learning.FastBatchTopK, {"k": 8}),
    "matryoshka": (
        MatryoshkaBatchTopKTrainer, dictionary_learning.FastMatryoshkaBatchTopK,
        {"k": 8, "group_fractions": [0.125, 0.375, 0.5]},
    ),
    "jumprelu": (JumpReluTrainer, dictionary_learning.FastJumpReLU, {"sparsity_warmup_steps": 0, "seed": 0}),
}  # fmt: skip


def batches(seed: int = 1, count: int = STEPS) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(64, D, generator=draw)
    used = [(torch.rand(B, 64, generator=draw) < 0.1).float() for _ in range(count)]
    return [each @ directions + 0.1 * torch.randn(B, D, generator=draw) for each in used]


def trained(case: str, ours: bool, dead: int, folder: Any = None) -> tuple[Any, list[float]]:
    """The trainer after 50 steps of the library's loop, and its losses."""
    kind, fast, options = CASES[case]
    losses: list[float] = []
    found = []

    class Recorded(kind):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.dead_feature_threshold = dead
            self.threshold_start_step = 10
            found.append(self)

        def update(self, step: int, x: torch.Tensor) -> float:
            losses.append(super().update(step, x))
            return losses[-1]

    torch.manual_seed(0)
    config = {
        "trainer": Recorded, "steps": 1000, "activation_dim": D, "dict_size": N, "layer": 0, "lm_name": "none",
        "device": "cpu", "lr": 1e-3, "warmup_steps": 0, **copy.deepcopy(options),
    } | ({"dict_class": fast} if ours else {})  # fmt: skip
    trainSAE(batches(), [config], STEPS, save_dir=None if folder is None else str(folder), device="cpu")
    return found[0], losses


@pytest.mark.parametrize("dead", [10**7, 200])
@pytest.mark.parametrize("case", CASES)
def test_fifty_steps(case, dead):
    (ours, mine), (theirs, wanted) = (trained(case, which, dead) for which in (True, False))
    a, b = torch.tensor(mine), torch.tensor(wanted)
    assert len(a) == STEPS
    assert len(set(wanted)) > STEPS / 2
    assert float(((a - b).abs() / b.abs()).max()) <= 1e-6
    assert torch.equal(ours.num_tokens_since_fired, theirs.num_tokens_since_fired)
    if dead == 200 and case != "jumprelu":
        assert ours.dead_features == theirs.dead_features
    state = ours.ae.state_dict()
    assert state.keys() == theirs.ae.state_dict().keys()
    for name, tensor in theirs.ae.state_dict().items():
        assert (state[name].shape, state[name].dtype) == (tensor.shape, tensor.dtype)
        assert float((state[name] - tensor).double().norm()) <= 1e-4 * float(tensor.double().norm()), name
    # what a trainer logs of the codes
    x = batches(5, 1)[0]
    logged = [trainer.loss(x.clone(), step=STEPS, logging=True) for trainer in (ours, theirs)]
    for name, value in logged[1].losses.items():
        assert logged[0].losses[name] == pytest.approx(value, rel=1e-4)
    assert float((logged[0].f != 0).float().sum(dim=-1).mean()) == float((logged[1].f != 0).float().sum(dim=-1).mean())
    assert case == "jumprelu" or waits(logged[0].f, Codes)


@pytest.mark.parametrize("case", ["top-k", "batch top-k", "matryoshka"])
def test_nothing_dense_is_made(case):
    """Nor where features are dead: AuxK asks for them alone."""
    trainer, _ = trained(case, True, 200)
    kept = []
    encode = trainer.ae.encode
    trainer.ae.encode = lambda *args, **options: kept.append(encode(*args, **options)) or kept[-1]
    trainer.num_tokens_since_fired[:100] = 10**6
    trainer.update(STEPS, batches(7, 1)[0])
    assert trainer.dead_features >= 10
    codes, *_, pre = kept[0]
    assert waits(codes, Codes)
    assert waits(pre, Preactivations)


@pytest.mark.parametrize("case", CASES)
def test_files_load_in_both(case, tmp_path):
    ours, _ = trained(case, True, 10**7, tmp_path)
    folder = tmp_path / "trainer_0"
    kind = CASES[case][1]
    theirs = kind.__mro__[1].from_pretrained(folder / "ae.pt")
    assert type(theirs).__module__.startswith("dictionary_learning")
    assert json.loads((folder / "config.json").read_text())["trainer"]["dict_class"] == type(theirs).__name__
    again = kind.from_pretrained(folder / "ae.pt")
    assert type(again) is kind
    x = batches(3, 1)[0]
    options = {} if case == "jumprelu" else {"use_threshold": True}
    with torch.no_grad():
        want = theirs.encode(x, **options)
        for ae in (ours.ae, again):
            got = ae.encode(x, **options)
            assert waits(got, Codes)
            torch.testing.assert_close(ae.decode(got), theirs.decode(want), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.clone(), want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ae(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_groups_that_are_not_active_are_taken_out_after_the_selection():
    found = []
    for kind in (dictionary_learning.FastMatryoshkaBatchTopK, dictionary_learning.MatryoshkaBatchTopKSAE):
        torch.manual_seed(0)
        ae = kind(D, N, 8, [32, 96, 128])
        ae.active_groups = 2
        with torch.no_grad():
            codes, active, pre = ae.encode(batches(2, 1)[0], return_active=True, use_threshold=False)
            found.append((codes.clone(), active, pre.clone()))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)
    assert 0 < int((found[0][0] != 0).sum()) < 8 * B


def test_in_place():
    torch.manual_seed(0)
    theirs = dictionary_learning.AutoEncoderTopK(D, N, 8)
    x = batches(2, 1)[0]
    want = theirs(x)
    state = copy.deepcopy(theirs.state_dict())
    ours = dictionary_learning.fast(theirs)
    assert ours is theirs is dictionary_learning.fast(ours)
    assert type(ours) is dictionary_learning.FastTopK
    # rows of features in memory, and the same to whoever reads them
    assert ours.encoder.weight.is_contiguous()
    assert ours.decoder.weight.t().is_contiguous()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    torch.testing.assert_close(ours(x), want)
    with pytest.raises(TypeError, match="takes one of AutoEncoderTopK"):
        dictionary_learning.fast(nn.Linear(2, 2))


def test_a_square_dictionary_lies_as_rows_of_features():
    ae = dictionary_learning.FastTopK(8, 8, 2)
    assert ae.encoder.weight.is_contiguous()
    assert ae.decoder.weight.t().is_contiguous()


def test_k_of_a_file():
    with pytest.raises(ValueError, match="k=3"):
        dictionary_learning.FastTopK.from_pretrained(_saved(), k=3)


def _saved() -> Any:
    import io

    file = io.BytesIO()
    torch.save(dictionary_learning.FastTopK(8, 16, 2).state_dict(), file)
    file.seek(0)
    return file
