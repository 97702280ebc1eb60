"""SAELens's own trainer over its own SAEs and over ours: 50 steps, then files, hooks and instances in place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

sae_lens = pytest.importorskip("sae_lens")

from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402

from clipsteer.integrations import saelens  # noqa: E402
from clipsteer.integrations._codes import Codes, Preactivations  # noqa: E402
from clipsteer.integrations._on_demand import waits  # noqa: E402

D, N, B, STEPS = 32, 256, 64, 50
TOPK = {"k": 8}
LEVELS = {"k": 7.5, "matryoshka_widths": [32, 128, 256]}
JUMP = {"jumprelu_init_threshold": 0.5, "jumprelu_bandwidth": 0.1, "l0_coefficient": 0.2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "top-k": ("TopK", TOPK),
    "top-k without scale": ("TopK", TOPK | {"rescale_acts_by_decoder_norm": False}),
    "top-k, layer norm": ("TopK", TOPK | {"normalize_activations": "layer_norm"}),
    "top-k, b_dec left": ("TopK", TOPK | {"apply_b_dec_to_input": False}),
    "top-k, sparse tensors": ("TopK", TOPK | {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}),
    "batch top-k": ("BatchTopK", {"k": 7.5}),
    "batch top-k without scale": ("BatchTopK", {"k": 7.5, "rescale_acts_by_decoder_norm": False}),
    "matryoshka": ("MatryoshkaBatchTopK", LEVELS),
    "matryoshka, AuxK of each level": ("MatryoshkaBatchTopK", LEVELS | {"use_matryoshka_aux_loss": True}),
    "jumprelu": ("JumpReLU", JUMP),
    "jumprelu, tanh, to the input": (
        "JumpReLU", JUMP | {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True},
    ),
    "jumprelu, quadratic": ("JumpReLU", JUMP | {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.0}),
    "jumprelu, of the dead": ("JumpReLU", JUMP | {"pre_act_loss_coefficient": 1e-4}),
}  # fmt: skip
FAST = {theirs.__name__.removesuffix("TrainingSAE"): ours for theirs, ours in saelens.FAST.items()}


def batches(seed: int = 1):
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(64, D, generator=draw)
    while True:
        used = (torch.rand(B, 64, generator=draw) < 0.1).float()
        yield used @ directions + 0.1 * torch.randn(B, D, generator=draw)


def make(case: str, ours: bool) -> Any:
    name, options = CASES[case]
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=D, d_sae=N, **copy.deepcopy(options))
    torch.manual_seed(0)
    sae = FAST[name](config) if ours else getattr(sae_lens, f"{name}TrainingSAE")(config)
    if name == "JumpReLU":
        # a few features a row, as after some training
        sae.b_enc.data -= 0.5
    return sae


class Run:
    """A run of SAELens's trainer, what its steps gave, and the last of them."""

    def __init__(self, sae: Any, dead: int = 1000, folder: Any = None, steps: int = STEPS) -> None:
        settings = SAETrainerConfig(
            steps * B, B, lr=1e-3, lr_end=1e-3, dead_feature_window=dead, save_final_checkpoint=folder is not None,
            checkpoint_path=None if folder is None else str(folder),
        )  # fmt: skip
        self.trainer = SAETrainer(settings, sae, batches())
        self.losses: list[list[float]] = []
        step = self.trainer.step

        def recorded(batch):
            self.last = step(batch)
            self.losses.append([float(self.last.loss), *(float(loss) for loss in self.last.losses.values())])
            return self.last

        self.trainer.step = recorded
        self.sae = self.trainer.fit()


def assert_same_losses(ours: Run, theirs: Run, tolerance: float = 1e-6) -> None:
    a, b = torch.tensor(ours.losses), torch.tensor(theirs.losses)
    assert len(a) == STEPS
    assert len(set(b[:, 0].tolist())) > STEPS / 2  # it trains
    assert float(((a - b).abs() / b[:, :1].abs()).max()) <= tolerance
    assert torch.equal(ours.trainer.act_freq_scores, theirs.trainer.act_freq_scores)
    fired = "n_forward_passes_since_fired"
    assert torch.equal(getattr(ours.trainer, fired), getattr(theirs.trainer, fired))


@pytest.mark.parametrize("dead", [1000, 3])
@pytest.mark.parametrize("case", CASES)
def test_fifty_steps(case, dead):
    if dead == 3 and case == "top-k, layer norm":
        pytest.skip("SAELens refuses AuxK over normalized activations")
    ours, theirs = Run(make(case, True), dead), Run(make(case, False), dead)
    assert_same_losses(ours, theirs)
    if "jumprelu" not in case:
        assert (max(loss[2] for loss in ours.losses) > 0) == (dead == 3)  # AuxK
    elif case == "jumprelu, of the dead":
        assert (max(loss[3] for loss in ours.losses) > 0) == (dead == 3)
    mine = ours.sae.state_dict()
    assert mine.keys() == theirs.sae.state_dict().keys()
    for name, tensor in theirs.sae.state_dict().items():
        assert mine[name].shape == tensor.shape
        # Adam moves an element whose gradient is rounding by as much as any other
        assert float((mine[name] - tensor).norm() / tensor.norm()) < 1e-4, name
    # the dense tensors were never made
    if case != "jumprelu, of the dead":  # whose loss has most of them near their thresholds soon
        assert waits(ours.last.hidden_pre, Preactivations)
        assert waits(ours.last.feature_acts, Codes) != (case == "top-k, sparse tensors")
    assert ours.last.feature_acts.is_sparse == theirs.last.feature_acts.is_sparse
    of_codes = [run.last.feature_acts.detach().to_dense() for run in (ours, theirs)]
    torch.testing.assert_close(*of_codes, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_what_a_step_gives_is_saelens_own(case):
    found = []
    for ours in (True, False):
        sae = make(case, ours)
        sae(next(batches()))
        found.append(sae.encode_with_hidden_pre(next(batches())))
    for a, b in zip(*found):
        assert (a.shape, a.dtype, a.is_sparse, a.requires_grad) == (b.shape, b.dtype, b.is_sparse, b.requires_grad)
        torch.testing.assert_close(a.detach().to_dense().clone(), b.detach().to_dense(), rtol=1e-5, atol=1e-5)


def test_what_belongs_to_other_weights_is_not_made_up():
    run = Run(make("top-k", True), steps=2)
    with pytest.raises(RuntimeError, match="look at it before"):
        run.last.hidden_pre.mean()
    assert int((run.last.feature_acts > 0).sum()) == B * 8  # the codes are kept


def test_jumprelu_is_dense_until_its_codes_are_few():
    config = sae_lens.JumpReLUTrainingSAEConfig(d_in=D, d_sae=N)
    torch.manual_seed(0)
    sae = saelens.FastJumpReLUTrainingSAE(config)
    run = Run(sae, steps=3)
    assert sae._share > saelens.DENSE
    assert not isinstance(run.last.feature_acts, Codes)
    sae.b_enc.data -= 2
    run = Run(sae, steps=3)
    assert sae._share <= saelens.DENSE
    assert waits(run.last.feature_acts, Codes)


@pytest.mark.parametrize("case", ["top-k", "batch top-k", "matryoshka", "jumprelu"])
def test_files_load_in_both(case, tmp_path):
    run = Run(make(case, True), folder=tmp_path / "ours")
    (folder,) = (tmp_path / "ours").iterdir()
    theirs = sae_lens.TrainingSAE.load_from_disk(folder)
    assert type(theirs).__name__ == f"{CASES[case][0]}TrainingSAE"
    ours = FAST[CASES[case][0]].load_from_disk(folder)
    assert type(ours) is FAST[CASES[case][0]]
    x = next(batches(9))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.encode(x).clone(), theirs.encode(x), rtol=1e-5, atol=1e-5)
    # the trainer's state, too, is read by a run of the other kind, which goes on the same
    next_losses = []
    for sae in (ours, theirs):
        trainer = SAETrainer(run.trainer.cfg, sae, batches(2))
        trainer.load_trainer_state(folder)
        next_losses.append(float(trainer.step(next(batches(2))).loss))
    assert next_losses[0] == pytest.approx(next_losses[1], rel=1e-6)
    # and what SAELens makes of it for inference computes the same
    inference = []
    for sae in (ours, theirs):
        sae.save_inference_model(tmp_path / type(sae).__name__)
        inference.append(sae_lens.SAE.load_from_disk(tmp_path / type(sae).__name__))
    with torch.no_grad():
        torch.testing.assert_close(inference[0](x), inference[1](x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["top-k", "batch top-k", "matryoshka", "jumprelu"])
def test_every_hook_sees_and_changes_what_it_does_in_saelens(case):
    ours, theirs = make(case, True), make(case, False)
    x = next(batches(3))
    with torch.no_grad():
        kept = [sae.run_with_cache(x) for sae in (ours, theirs)]
    assert kept[0][1].keys() == kept[1][1].keys() >= {"hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"}
    torch.testing.assert_close(kept[0][0], kept[1][0])
    for name, tensor in kept[1][1].items():
        torch.testing.assert_close(kept[0][1][name], tensor, msg=name)
    halved = [("hook_sae_acts_post", lambda acts, hook: acts * 0.5)]
    changed = [sae.run_with_hooks(x, fwd_hooks=halved) for sae in (ours, theirs)]
    torch.testing.assert_close(changed[0], changed[1])
    assert not torch.allclose(changed[0], kept[0][0])
    for name in ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post"):
        found = []
        for sae in (ours, theirs):
            leaf, grads = x.clone().requires_grad_(), []
            with sae.hooks(bwd_hooks=[(name, lambda grad, hook, grads=grads: grads.append(grad.clone()))]):
                sae(leaf).square().sum().backward()
            found.append((leaf.grad, *grads))
        assert len(found[0]) == len(found[1]) == 2
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_loss_on_the_codes_has_the_gradient_of_saelens():
    """L1 on what the trainer is given, which reaches the decoder through its norms."""
    grads = []
    for ours in (True, False):
        sae = make("top-k", ours)
        acts = sae.encode(next(batches()))
        assert waits(acts, Codes) == ours
        (acts.abs().sum() + sae.decode(acts).square().sum()).backward()
        grads.append({name: p.grad for name, p in sae.named_parameters()})
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-4, atol=1e-3, msg=name)


def test_an_activation_function_of_ones_own_stays():
    class Squared(nn.Module):
        def forward(self, x):
            return x.square()

    got = []
    for ours in (True, False):
        sae = make("top-k", ours)
        sae.activation_fn = Squared()
        got.append(sae(next(batches())))
    assert torch.equal(*got)


def test_the_norms_of_the_decoder_take_no_part_in_the_reconstruction():
    """They scale what is selected, and are divided away again. SAELens's gradient has both, and what is left is
    rounding."""
    sae = make("top-k", True)
    codes = sae.encode(next(batches()))
    sae.decode(codes).sum().backward()
    nodes, names = [sae.decode(codes).grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert not any("Norm" in name for name in names)


def test_in_place():
    theirs = make("top-k", False)
    optimizer = torch.optim.Adam(theirs.parameters())
    sae = saelens.fast(theirs)
    assert sae is theirs is saelens.fast(sae)
    assert type(sae) is saelens.FastTopKTrainingSAE
    assert optimizer.param_groups[0]["params"] == list(sae.parameters())
    assert_same_losses(Run(sae), Run(make("top-k", False)))
    with pytest.raises(TypeError, match="takes one of TopKTrainingSAE"):
        saelens.fast(nn.Linear(2, 2))


@pytest.mark.parametrize("case", ["top-k", "batch top-k"])
def test_autocast(case):
    """Types are SAELens's, values within bfloat16's rounding."""
    outputs = []
    for ours in (True, False):
        sae, x = make(case, ours), next(batches())
        with torch.autocast("cpu", torch.bfloat16):
            acts, hidden_pre = sae.encode_with_hidden_pre(x)
            x_hat = sae.decode(acts)
        x_hat.square().mean().backward()
        outputs.append((acts.dtype, hidden_pre.dtype, x_hat.dtype, sae.W_enc.grad.dtype, x_hat.detach()))
    assert outputs[0][:4] == outputs[1][:4]
    assert float((outputs[0][4] - outputs[1][4]).norm() / outputs[1][4].norm()) < 0.05


def test_gradients_are_written_where_they_were_the_step_before():
    sae = make("top-k", True)
    where = []
    for step, x in zip(range(3), batches()):
        sae(x).square().mean().backward()
        where.append({name: sae.get_parameter(name).grad.data_ptr() for name in ("W_enc", "W_dec")})
        if step < 2:
            sae.zero_grad()
    assert where[0] == where[1] == where[2]
    held = {name: sae.get_parameter(name).grad.clone() for name in ("W_enc", "W_dec")}
    sae(next(batches())).square().mean().backward()  # accumulated: nothing is overwritten
    for name, grad in held.items():
        assert not torch.equal(sae.get_parameter(name).grad, grad)
