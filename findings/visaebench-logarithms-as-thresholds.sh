#!/usr/bin/env bash
# visaebench 0.1.0, overcomplete 0.3.0: a JumpSAE of overcomplete loads, and its thresholds are other ones.
#
# visaebench's loader takes the state dicts of overcomplete, "thresholds" of a jumprelu among them. Those are logarithms
# there (a threshold is the exponential, and they start at -3); here they are compared with as they are. Negative ones,
# which is what training starts from, are below every ReLU: each feature above 0 stays.
#
# Seen: with thresholds of e^-0.5 overcomplete keeps 27 % of the features and visaebench the 50 % that are above 0; with
# e^0.5 they keep 5 % and 31 %. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# with matplotlib 3.11 overcomplete does not import
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 visaebench==0.1.0 \
    overcomplete==0.3.0 matplotlib==3.10.8
"$work/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import torch
from overcomplete.sae import JumpSAE
from visaebench.hub.loader import load_sae_from_weights

torch.manual_seed(0)
x = torch.randn(256, 64)
kept = {}
for logarithm in (-0.5, 0.5):
    sae = JumpSAE(64, 512)
    with torch.no_grad():
        sae.encoder.final_block[0].weight.normal_(std=64**-0.5)
        sae.thresholds.fill_(logarithm)
        sae.train()
        sae.eval()
        theirs = load_sae_from_weights(sae.state_dict(), {"activation": "jumprelu"}, device="cpu")
        codes = sae.encode(x)[1], theirs.encode(x)
    kept[logarithm] = [round(float((part > 0).float().mean()), 2) for part in codes]
names = ", ".join(f"{name} {version(name)}" for name in ("overcomplete", "visaebench"))
print(f"{names} keep, of all features, with logarithms of thresholds of -0.5 and 0.5: {kept}")
sys.exit(kept != {-0.5: [0.27, 0.5], 0.5: [0.05, 0.31]})
PY
