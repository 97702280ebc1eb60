"""The loss with its memory, in one process and in several."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clipsteer import ops
from clipsteer.reference_model import DRRhoLoss, gamma_schedule


def pairs(B: int = 9, d: int = 6, r: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Unit rows: image, text, ref_image, ref_text."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randn(B, n, generator=g, dtype=torch.float64) for n in (d, d, r, r)]
    return tuple(torch.nn.functional.normalize(x, dim=1).to(dtype) for x in rows)


def test_gamma_goes_from_one_to_its_least_value():
    values = [gamma_schedule(e, 4, 0.2) for e in range(6)]
    assert values[0] == 1
    assert values[2] == pytest.approx(0.6)
    assert values[4:] == [0.2, 0.2]
    assert values == sorted(values, reverse=True)
    for bad in ((-1, 4, 0.2), (0, 0, 0.2), (0, 4, 0.0), (0, 4, 1.1)):
        with pytest.raises(ValueError, match="gamma_schedule"):
            gamma_schedule(*bad)


def test_u_is_remembered_by_sample_and_averaged():
    image, text, *reference = pairs()
    loss, ids = DRRhoLoss(30, temperature=0.1, eps=1e-3), torch.arange(9) * 3
    assert loss.u.isnan().all()
    assert loss(image, text, ids, *reference) == ops.drrho_loss(image, text, *reference, temperature=0.1, eps=1e-3)[0]
    first = ops.drrho_loss(image, text, *reference, temperature=0.1, eps=1e-3)[1]
    assert torch.equal(loss.u[:, ids], first)
    assert int(loss.u.isnan().sum()) == 2 * 21
    loss(text, image, ids, *reference, gamma=0.25)
    new = ops.drrho_loss(text, image, *reference, temperature=0.1, eps=1e-3)[1]
    torch.testing.assert_close(loss.u[:, ids].exp(), 0.75 * first.exp() + 0.25 * new.exp(), rtol=1e-5, atol=0)
    before = loss.u.clone()
    loss.eval()(image, text, ids, *reference, gamma=0.25)
    assert torch.equal(loss.u, before) or torch.equal(loss.u.nan_to_num(), before.nan_to_num())
    again = DRRhoLoss(30, temperature=0.1)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.u.nan_to_num(), loss.u.nan_to_num())


def test_of_a_sample_that_comes_twice_the_later_pair_is_remembered():
    image, text, *_ = pairs()
    loss, ids = DRRhoLoss(5, temperature=0.1), torch.tensor([0, 1, 2, 0, 1, 4, 4, 0, 3])
    loss(image, text, ids)
    u = ops.drrho_loss(image, text, temperature=0.1)[1]
    assert torch.equal(loss.u, u[:, [7, 4, 2, 8, 6]])


def test_a_learnt_temperature_has_its_gradient_and_its_rule():
    image, text, *reference = pairs()
    loss, ids = DRRhoLoss(9, temperature=0.07, learnable_temperature=True, rho=6.5), torch.arange(9)
    loss(image, text, ids, *reference).backward()
    tau = torch.tensor(0.07, requires_grad=True)
    (expected,) = torch.autograd.grad(ops.drrho_loss(image, text, *reference, temperature=tau, rho=6.5)[0], tau)
    torch.testing.assert_close(loss.logit_scale.grad, -0.07 * expected, rtol=1e-5, atol=0)
    assert loss.temperature_lr(3.0) == 3
    for scale, kept in ((10.0, 0.01), (-1.0, 1.0), (math.log(1 / 0.02), 0.02)):
        loss.logit_scale.data.fill_(scale)
        loss.clamp_temperature_()
        assert float(loss.temperature.detach()) == pytest.approx(kept, rel=1e-6)
    assert loss.temperature_lr(3.0) == 1
    fixed = DRRhoLoss(9)
    assert list(fixed.parameters()) == []
    assert fixed.temperature == 0.01


def test_mistakes_are_named():
    image, text, *reference = pairs()
    loss, ids = DRRhoLoss(9), torch.arange(9)
    for error, message, args in (
        (TypeError, "int64", (image, text, ids.int())),
        (ValueError, r"of shape \(B,\)", (image, text, ids[:3])),
        (ValueError, r"in \[0, 9\)", (image, text, ids + 1)),
        (ValueError, "text must be of shape", (image, text[:, :3], ids)),
        (ValueError, "ref_text must be given", (image, text, ids, reference[0])),
    ):
        with pytest.raises(error, match=message):
            loss(*args)
    for bad in ({"num_samples": 0}, {"num_samples": 3, "temperature": 0.001}, {"num_samples": 3, "temperature_min": 0}):
        with pytest.raises(ValueError, match="DRRhoLoss"):
            DRRhoLoss(**bad)
