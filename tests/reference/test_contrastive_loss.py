from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from _command import in_processes
from clipsteer.reference.losses import ContrastiveLoss, SigmoidLoss, select_learnable


def pairs(B=7, d=5, r=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(B, n, generator=g, dtype=torch.float64), dim=1) for n in (d, d, r, r)]


def test_it_is_open_clips_loss():
    import open_clip

    image, text, *_ = pairs()
    ours, theirs = [(x.clone().requires_grad_(), y.clone().requires_grad_()) for x, y in [(image, text)] * 2]
    loss = ContrastiveLoss(temperature=0.05).double()
    expected = open_clip.ClipLoss()(*theirs, loss.logit_scale.detach().exp())
    torch.testing.assert_close(loss(*ours), expected, rtol=1e-12, atol=0)
    loss(*ours).backward()
    expected.backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)
    step = 1e-6
    value = lambda shift: open_clip.ClipLoss()(
        image, text, torch.tensor(-math.log(0.05) + shift, dtype=torch.float64).exp()
    )
    torch.testing.assert_close(loss.logit_scale.grad, (value(step) - value(-step)) / (2 * step), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["plain", "auto", "reference"])
def test_the_sigmoid_loss_is_open_clips(backend):
    import open_clip.loss

    image, text, *_ = pairs()
    ours, theirs = [(x.clone().requires_grad_(), y.clone().requires_grad_()) for x, y in [(image, text)] * 2]
    loss = SigmoidLoss(temperature=0.2, logit_bias=-3.0, backend=backend).double()
    scale = loss.logit_scale.detach().clone().requires_grad_()
    bias = loss.logit_bias.detach().clone().requires_grad_()
    expected = open_clip.loss.SigLipLoss()(*theirs, scale.exp(), bias)
    found = loss(*ours)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found.backward()
    expected.backward()
    for a, b in zip((*ours, loss.logit_scale, loss.logit_bias), (*theirs, scale, bias)):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)
    assert [name for name, _ in loss.named_parameters()] == ["logit_scale", "logit_bias"]


def test_distillation_is_the_divergence_from_the_reference():
    image, text, ref_image, ref_text = pairs()
    tau, weight = 0.2, 0.3
    value = ContrastiveLoss(temperature=tau, distill=weight).double()(image, text, None, ref_image, ref_text)
    s, r = image @ text.T / tau, ref_image @ ref_text.T / tau
    expected = torch.zeros((), dtype=torch.float64)
    for mine, theirs in ((s, r), (s.T, r.T)):
        p, q = theirs.softmax(1), mine.softmax(1)
        expected += (1 - weight) / 2 * -q.diagonal().log().mean() + weight / 2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=0)  # τ is kept in float32
    # nothing is left to learn from a reference with the same similarities
    image, text = ref_image.clone().requires_grad_(), ref_text.clone().requires_grad_()
    same = ContrastiveLoss(distill=1.0).double()(image, text, None, ref_image, ref_text)
    same.backward()
    assert float(same.detach()) == pytest.approx(0, abs=1e-12)
    assert float(image.grad.abs().max()) < 1e-12


BOTH = """
import sys, torch, torch.distributed as dist
from torch.nn.functional import normalize
from clipsteer.reference.losses import ContrastiveLoss, SigmoidLoss
size = int(sys.argv[1])
rank = 0
if size > 1:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
B = (6, 1, 0)[rank]

g = torch.Generator().manual_seed(rank)
rows = [normalize(torch.randn(B, n, generator=g, dtype=torch.float64), dim=1) for n in (5, 5, 3, 3)]
for distill in (0.0, 0.3, 1.0, None):
    found = []
    for backend in ("plain", "auto", "reference"):
        if distill is None:
            loss = SigmoidLoss(temperature=0.2, logit_bias=-2.0, backend=backend).double()
        else:
            loss = ContrastiveLoss(temperature=0.2, distill=distill, backend=backend).double()
        image, text = (x.clone().requires_grad_() for x in rows[:2])
        value = loss(image, text, None, *(rows[2:] if distill else ()))
        (3 * value).backward()
        found.append((value.detach(), image.grad, text.grad, *(p.grad for p in loss.parameters())))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert B == 0 or bool(a.any())
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    if distill is None and size > 1:
        # averaged over the processes it is the loss of the joint batch
        every = [None] * size
        dist.all_gather_object(every, rows[:2])
        alone = SigmoidLoss(temperature=0.2, logit_bias=-2.0).double()
        alone.world = None
        value = alone(*(torch.cat(x) for x in zip(*every)))
        (3 * value).backward()
        for a, b in zip((found[0][0], *found[0][3:]), (value.detach(), *(p.grad for p in alone.parameters()))):
            dist.all_reduce(a)
            torch.testing.assert_close(a / size, b, rtol=1e-9, atol=1e-12)
if size > 1:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiles_give_what_whole_matrices_do(size, tmp_path):
    """Value and gradients, with uneven processes, one of them without a pair."""
    in_processes(BOTH, size, size=size)


def test_clip_never_scales_by_more_than_100():
    loss = ContrastiveLoss(temperature=0.02)
    with torch.no_grad():
        loss.logit_scale += 10
    loss.settle_temperature_()
    assert float(loss.temperature.detach()) == pytest.approx(0.01)
    fixed = ContrastiveLoss(temperature=0.001, learnable_temperature=False)
    fixed.settle_temperature_()
    assert float(fixed.temperature.detach()) == pytest.approx(0.001)


def test_learnable_pairs_are_picked_and_noise_is_not():
    """40 pairs, half with a text of another image. The learner knows nothing; the reference tells right from wrong."""
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(40, 64, generator=g), dim=1)
    text = image.clone()
    text[20:] = image[20:].roll(1, 0)
    learner = F.normalize(torch.randn(2, 40, 256, generator=g), dim=2)
    torch.manual_seed(0)
    picked = [select_learnable(*learner, image, text, 16, temperature=0.1, chunks=8) for _ in range(20)]
    assert all(len(p.unique()) == 16 for p in picked)
    later = torch.cat([p[2:] for p in picked])  # the first chunk is drawn evenly
    # a wrong pair can be told only once the image of its text is in: more than half, 280 draws, 7 standard deviations
    assert float((later < 20).float().mean()) > 0.7
    # a learner that has learnt it all has nothing to pick
    even = torch.cat([select_learnable(image, text, image, text, 16, temperature=0.1) for _ in range(50)])
    assert 0.4 < float((even < 20).float().mean()) < 0.6
    assert sorted(select_learnable(*learner, image, text, 40, temperature=0.1).tolist()) == list(range(40))


def test_mistakes():
    image, text, *reference = pairs()
    with pytest.raises(ValueError, match="temperature must be positive"):
        ContrastiveLoss(temperature=0.0)
    with pytest.raises(ValueError, match=r"distill in \[0, 1\]"):
        ContrastiveLoss(distill=1.5)
    with pytest.raises(ValueError, match="needs ref_image"):
        ContrastiveLoss(distill=0.5)(image, text)
    with pytest.raises(ValueError, match="SigmoidLoss: logit_bias must be finite"):
        SigmoidLoss(logit_bias=math.inf)
    with pytest.raises(ValueError, match="SigmoidLoss: temperature must be positive"):
        SigmoidLoss(temperature=0.0)
    for keep, chunks in ((0, 4), (8, 4), (3, 0)):
        with pytest.raises(ValueError, match="keep must be in"):
            select_learnable(image, text, *reference, keep, temperature=0.1, chunks=chunks)
