#!/usr/bin/env bash
# dictionary_learning 0.1.0: JumpReluTrainer's L0 penalty takes its step of the activations, not of the pre-activations.
#
# Below its threshold an activation is 0, so of the kernel of the straight-through estimator only the upper half is ever
# seen: features just below the threshold, which the estimator weighs as much as those just above, have no part in the
# gradient. And once a threshold is under half a bandwidth, all that are inactive, however far, have a part.
#
# Seen: the threshold's gradient is half of the estimator's for pre-activations that lie evenly about the threshold (0.5
# to a few percent), and for a threshold of 0.0004 (bandwidth 0.001) features at -5 give the whole of it, where the
# estimator has 0. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy 'setuptools<81' dictionary-learning==0.1.0
WANDB_MODE=disabled "$work/venv/bin/python" - <<'PY'
import sys
import torch
from dictionary_learning.trainers.jumprelu import JumpReLUFunction, JumpReluTrainer, StepFunction

BANDWIDTH = 0.001


def gradients(pre, level):
    """Of the mean L0, as the trainer makes it and as the estimator of pre-activations has it."""
    found = []
    for jump in (True, False):
        threshold = torch.full((pre.shape[1],), level, requires_grad=True)
        read = JumpReLUFunction.apply(pre, threshold, BANDWIDTH) if jump else pre
        StepFunction.apply(read, threshold, BANDWIDTH).sum(-1).mean().backward()
        found.append(float(threshold.grad.sum()))
    return found


# what its loss hands to the step, as it is called
handed = []
trainer = JumpReluTrainer(steps=10_000, activation_dim=8, dict_size=16, layer=0, lm_name="none", sparsity_warmup_steps=0)
original = StepFunction.forward
StepFunction.forward = staticmethod(lambda ctx, x, *rest: (handed.append(x.detach()), original(ctx, x, *rest))[1])
x = torch.randn(32, 8)
trainer.loss(x, step=1)
StepFunction.forward = original
of_acts = float((handed[0] < 0).sum()) == 0 and float((x @ trainer.ae.W_enc < 0).sum()) > 0

even = 0.01 + BANDWIDTH * (torch.rand(20_000, 4) - 0.5)
taken, estimator = gradients(even, 0.01)
far, none = gradients(torch.full((100, 4), -5.0), 0.0004)
print(f"the step is given activations: {of_acts}; its share of the gradient {taken / estimator:.2f}; far away {far}, {none}")
sys.exit(not (of_acts and abs(taken / estimator - 0.5) < 0.05 and far < -100 and none == 0))
PY
