#!/usr/bin/env bash
# torch 2.14.1, CPU: cross_entropy with label smoothing is infinite in float16, for logits whose loss is 7.
#
# What is smoothed is a mean over rows and classes of -log p; it is summed over all of them in the logits' type before
# it is divided. 16 rows of 768 logits sum to 90,000, more than float16 holds. Without smoothing the same logits have
# their loss. reduction="none" sums a row alone, and fails from about 7,000 classes on: contrastive logits of a large
# batch. The gradient is finite and right either way, so training goes on under a loss scaler that watches the gradient,
# and whoever watches the loss sees inf.
#
# Seen: (rows, classes) (4, 768) right; (16, 768), (256, 256) inf with mean; (1, 16384) inf with none; without smoothing
# all are right. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy
"$work/venv/bin/python" - <<'PY'
import sys

import torch
import torch.nn.functional as F

torch.manual_seed(0)
seen = {}
for rows, classes, reduction in ((4, 768, "mean"), (16, 768, "mean"), (256, 256, "mean"), (1, 16384, "none")):
    logits = torch.randn(rows, classes).half().requires_grad_()
    labels = torch.arange(rows) % classes
    wide = logits.detach().float().requires_grad_()
    losses = []
    for smoothing in (0.0, 0.1):
        given = {"label_smoothing": smoothing, "reduction": reduction}
        loss, wanted = F.cross_entropy(logits, labels, **given).sum(), F.cross_entropy(wide, labels, **given).sum()
        losses += [loss.item(), wanted.item()]
    # of the smoothed loss
    gradients = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(wanted, wide)[0]
    off = (gradients[0].float() - gradients[1]).norm() / gradients[1].norm()
    plain, plain_wanted, smooth, smooth_wanted = losses
    right = abs(plain / plain_wanted - 1) < 0.002, abs(smooth / smooth_wanted - 1) < 0.002
    seen[rows, classes, reduction] = (*right, smooth == float("inf"), bool(off < 0.01))
    print(f"torch {torch.__version__}: {rows} x {classes}, {reduction}: {plain:.4g} without smoothing, {smooth:.4g} "
          f"with it for {smooth_wanted:.4g}; the gradient is {off:.1e} off")
failing = (True, False, True, True)
sys.exit([*seen.values()] != [(True, True, False, True), failing, failing, failing])
PY
