#!/usr/bin/env bash
# pytorch-metric-learning 2.9.0: at a temperature of 0.01 SupConLoss depends on the precision, and grows as rows are
# solved.
#
# Its losses of rows are averaged over those above 0. A row whose pair is far ahead of the others has a loss of e^-20,
# which is above 0 in float64 and 0 in float32: whether it counts is a matter of rounding. With two views of each image
# SupCon and NT-Xent are one formula, and NTXentLoss of the same package averages over all rows. At a temperature of 0.1
# they agree to seven digits; at 0.01, where CLIPs end up, SupConLoss is almost twice as large, with gradients as much
# larger. Each row that is solved leaves the mean and makes it larger.
#
# Seen, 128 rows, float32 and float64: NTXentLoss 1.42, 1.42 and SupConLoss 1.42, 1.42 at 0.1; 2.38, 2.38 and 4.23, 2.43
# at 0.01. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 pytorch-metric-learning==2.9.0
"$work/venv/bin/python" -W ignore - <<'PY'
import sys
from importlib.metadata import version

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

torch.manual_seed(0)
first = F.normalize(torch.randn(64, 32), dim=-1)
second = F.normalize(first + 0.3 * torch.randn(64, 32), dim=-1)
views = torch.cat([first, second])
labels = torch.arange(64).repeat(2)
seen = {}
for temperature in (0.1, 0.01):
    for kind in (NTXentLoss, SupConLoss):
        for given in (views, views.double()):
            given = given.clone().requires_grad_()
            loss = kind(temperature)(given, labels)
            loss.backward()
            seen.setdefault((temperature, kind.__name__), []).append((loss.item(), given.grad.norm().item()))
for (temperature, name), values in seen.items():
    told = "; ".join(f"{loss:.4f}, gradient {norm:.4f}" for loss, norm in values)
    print(f"pytorch-metric-learning {version('pytorch-metric-learning')}, {temperature}: {name} {told}")


def ratios(temperature):
    wanted = seen[temperature, "NTXentLoss"]
    return [loss / wanted[1][0] for loss, _ in seen[temperature, "NTXentLoss"] + seen[temperature, "SupConLoss"]]


agree = all(abs(ratio - 1) < 1e-5 for ratio in ratios(0.1))
single, double, sup_single, sup_double = ratios(0.01)
sys.exit(not (agree and abs(single - 1) < 1e-5 and 1.5 < sup_single < 2.2 and 1.01 < sup_double < 1.2))
PY
