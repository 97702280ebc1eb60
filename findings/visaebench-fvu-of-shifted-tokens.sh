#!/usr/bin/env bash
# visaebench 0.1.0: the fraction of variance unexplained depends on where 0 is, up to infinity.
#
# FVU is Var(x - x̂) / Var(x) there with Var(x) = Σx²/n - (Σx/n)², n the tokens, and both sums go over all D dimensions:
# the squared mean that is subtracted is D times too large. Its own pipeline subtracts the data's mean from the tokens
# first; `FVU().compute(sae, tokens)` on tokens as they are says so nowhere. Of one tensor (images, patches, D), which
# the runner hands over as it is, n is the images, and the mean counts as many times more as an image has patches.
#
# Seen, of 512 tokens of 64 dimensions and unit variance, given back with noise of a tenth of it (textbook: 0.0101
# whatever the mean), around a mean of 0, 0.1, 0.13 and 0.3 in all dimensions: rows 0.0102, 0.0194, 0.0756, inf; the
# same as 64 images of 8 patches 0.0109, inf, inf, inf. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 visaebench==0.1.0
"$work/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import torch
from visaebench.metrics import METRIC_REGISTRY


class Noisy:
    """Gives back tokens with noise of a tenth of their deviation."""

    def encode(self, x):
        return x

    def decode(self, codes):
        generator = torch.Generator().manual_seed(1)
        return codes + 0.1 * torch.randn(codes.shape, generator=generator)


torch.manual_seed(0)
base = torch.randn(512, 64)
fvu = METRIC_REGISTRY["fvu"](batch_size=512)
found = {}
for mean in (0.0, 0.1, 0.13, 0.3):
    x = base + mean
    error = (Noisy().decode(x) - x).square().sum()
    textbook = float(error / (x - x.mean(0)).square().sum())
    rows = fvu.compute(Noisy(), x, device="cpu").value
    images = fvu.compute(Noisy(), x.reshape(64, 8, 64), device="cpu").value
    found[mean] = [round(value, 4) for value in (textbook, rows, images)]
print(f"visaebench {version('visaebench')}, by the mean of all dimensions: [textbook, rows, images] {found}")
inf = float("inf")
same = found[0.0] == [0.0101, 0.0102, 0.0109] and found[0.13] == [0.0101, 0.0756, inf]
sys.exit(not (same and found[0.1] == [0.0101, 0.0194, inf] and found[0.3] == [0.0101, inf, inf]))
PY
