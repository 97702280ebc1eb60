#!/usr/bin/env bash
# avalanche-lib 0.6.0: the importances of EWC are those of the method divided by the batch size.
#
# The diagonal of the Fisher information is the mean over samples of squared gradients. EWCPlugin squares the gradient
# of a batch's mean loss: for a model that has converged the gradients in a batch cancel, and what is left is the mean
# of squares divided by the batch. Its after_training_exp takes the strategy's train_mb_size, so the same ewc_lambda
# holds a model 128 times less with batches of 128 than with single samples, and a sweep over batch sizes is one over
# lambda.
#
# Seen, of a softmax regression at its optimum (2,048 samples, 10 classes), importances over the mean of squares: 1.000,
# 0.125, 0.031, 0.007 for batches of 1, 8, 32, 128. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 avalanche-lib==0.6.0
"$work/venv/bin/python" -W ignore - <<'PY'
import sys
from importlib.metadata import version

import torch
import torch.nn.functional as F
from avalanche.training.plugins import EWCPlugin
from torch import nn

torch.manual_seed(0)
x = torch.randn(2048, 32)
y = torch.distributions.Categorical(logits=x @ torch.randn(32, 10)).sample()
model = nn.Sequential(nn.Linear(32, 10))
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200)


def closure():
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


optimizer.step(closure)
squares = 0
for row, label in zip(x, y):
    model.zero_grad()
    F.cross_entropy(model(row[None]), label[None]).backward()
    squares = squares + model[0].weight.grad ** 2 / len(x)
samples = [(row, int(label), 0) for row, label in zip(x, y)]
ratios = {}
for batch in (1, 8, 32, 128):
    plugin = EWCPlugin(ewc_lambda=1.0)
    found = plugin.compute_importances(model, nn.CrossEntropyLoss(), optimizer, samples, "cpu", batch)
    ratios[batch] = float(found["0.weight"].data.mean() / squares.mean())
told = ", ".join(f"{batch}: {ratio:.3f}" for batch, ratio in ratios.items())
print(f"avalanche-lib {version('avalanche-lib')}: importances over the mean of squares, by batch: {told}")
sys.exit(not all(0.8 < ratio * batch < 1.2 for batch, ratio in ratios.items()))
PY
