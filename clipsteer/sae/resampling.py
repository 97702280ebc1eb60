"""Dead features start anew: resampling (Bricken et al. 2023, "Towards Monosemanticity"), often, and
along what is left unexplained.

A batch has fewer rows than there may be dead features. Those of the last steps before none starts
any more are asleep until all have a row: born one batch after another, the later ones would take
the directions of what the earlier ones, untrained, do too much.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.sae.losses import TrainingOutput
from clipsteer.sae.model import SAE
from clipsteer.sae.parallel import Sums
from clipsteer.sae.shard import is_spread
from clipsteer.training.world import JointBatch

# so many times the mean activation of the batch a row gives a feature that it starts, at most: a
# louder one takes the place of others on rows of other kinds
_LOUDEST = 3.0
# so many times as much is taken off the bias of a feature that is asleep
_SILENT = 1000.0
# the biases that let a feature be active
_OPENING = ("b_enc", "b_gate")


@torch.no_grad()
def resample(
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    dead: Tensor,  # (m,) int64
    x: Tensor,  # (B, d_in) as ``plan`` sees them
    out: TrainingOutput,
    plan: Sums,
    seed: int,
    asleep: Tensor | None = None,  # (d_sae,) bool, not the dead
) -> Tensor:  # (at most m,)
    """Let dead features start anew; returns which did. Where others are ``asleep``, even if none
    is, these are too, until ``wake``.

    Rows of the batch are drawn by their squared error, each at most once; where more features are
    dead than that, the last ones wait for another batch. A feature's rows of both dictionaries take
    the direction of x - x̂ of its row; the encoder's is as long as those that are not dead are on
    average, unless its activation would be above three times that of others; the bias (threshold,
    …) is the mean of those that are not dead. Adam's moments of all that are set to 0.
    """
    first, number = plan.place(dead)
    if number == 0:
        return dead
    alive = torch.ones(sae.d_sae, dtype=torch.bool, device=dead.device)
    alive[dead] = False
    if asleep is not None:
        alive &= ~asleep
    count = plan.total(alive.sum())
    left = x - out.x_hat
    batch = JointBatch(plan.view, len(x))
    errors = batch.join(left.double().square().sum(1)).cpu()  # (rows,) of all processes
    errors = torch.where(errors.isfinite(), errors, 0)
    number = min(number, int((errors > 0).sum()))
    if number == 0 or count == 0:
        return dead[:0]
    drawn = torch.multinomial(errors, number, generator=torch.Generator().manual_seed(seed))
    # of all dead features in order those that are here
    drawn = drawn[first : first + len(dead)].to(x.device)
    dead = dead[: len(drawn)]
    here = (drawn >= batch.offset) & (drawn < batch.offset + len(x))
    own = drawn[here] - batch.offset
    rows = x.new_zeros(2, len(drawn), x.shape[1])
    rows[:, here] = torch.stack([x[own], left[own]])
    rows, left = plan.view.sum_(rows)

    left = F.normalize(left, dim=1)
    means = _biases(sae, alive, plan)
    length = plan.total((torch.linalg.vector_norm(sae.W_enc, dim=1) * alive).sum()) / count
    active = plan.total(torch.stack([out.acts.clamp(min=0).sum(), (out.acts > 0).sum()]))
    active = plan.view.sum_(active)
    along = plan.total((left * sae._centred(rows)[0]).sum()) / number
    bias = sum(mean for name, mean in means.items() if name in _OPENING)
    loudest = _LOUDEST * active[0] / active[1].clamp(min=1) - bias
    length = torch.where(length * along > loudest, (loudest / along).clamp(min=0), length)
    for name, parameter in sae.named_parameters():
        if not is_spread(name, parameter):
            continue
        if name in means:
            parameter[dead] = means[name]
            if asleep is not None and name in _OPENING:
                parameter[dead] -= _SILENT * loudest.abs()
        else:
            value = left if name == "W_dec" else length * left
            parameter[dead] = value.to(parameter.dtype)
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][moment].index_fill_(0, dead, 0)
    return dead


def _biases(sae: SAE, alive: Tensor, plan: Sums) -> dict[str, Tensor]:
    """The mean over features that are alive (d_sae,) of every parameter of one number a feature."""
    count = plan.total(alive.sum()).clamp(min=1)
    return {
        name: plan.total(torch.where(alive, parameter, 0).sum()) / count
        for name, parameter in sae.named_parameters()
        if is_spread(name, parameter) and parameter.dim() == 1
    }


@torch.no_grad()
def wake(
    sae: SAE,
    asleep: Tensor,  # (d_sae,) bool
    alive: Tensor,  # (d_sae,) bool
    plan: Sums,
) -> None:
    """Let features that are asleep be active, with the mean bias of those that are alive."""
    means = _biases(sae, alive, plan)
    for name in _OPENING:
        if name in means:
            getattr(sae, name)[asleep] = means[name]
