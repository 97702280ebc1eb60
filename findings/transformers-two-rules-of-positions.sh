#!/usr/bin/env bash
# transformers 5.24.0: DINOv2 with registers resamples its position table with antialiasing, DINOv2 without does not.
#
# Both are published by one group with tables of 37 x 37 patches, and are mostly run at 224 px, on 16 x 16. What their
# classes do with the same table there differs by half its size; neither has an option for it, and timm antialiases both.
# Tokens of a real DINOv2-small move by 5 to 10 per cent from one rule to the other.
#
# Seen: a table of 6 x 6 at 3 x 3, relative distance from F.interpolate(bicubic) without antialiasing and with it:
# Dinov2Model 0 and 0.8, Dinov2WithRegistersModel 0.5 and 0. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy transformers==5.24.0
"$work/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
import torch.nn.functional as F
import transformers
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

print("transformers", transformers.__version__)
torch.manual_seed(0)
small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 84, "patch_size": 14}
table = torch.randn(1, 37, 32)
grid = table[:, 1:].reshape(1, 6, 6, 32).permute(0, 3, 1, 2)
seen = {}
for kind, config in ((Dinov2Model, Dinov2Config), (Dinov2WithRegistersModel, Dinov2WithRegistersConfig)):
    embeddings = kind(config(**small)).embeddings
    with torch.no_grad():
        embeddings.position_embeddings.copy_(table)
        found = embeddings.interpolate_pos_encoding(torch.zeros(1, 10, 32), 42, 42)[:, 1:]
    seen[kind.__name__] = []
    for antialias in (False, True):
        wanted = F.interpolate(grid, size=(3, 3), mode="bicubic", antialias=antialias, align_corners=False)
        wanted = wanted.permute(0, 2, 3, 1).reshape(1, 9, 32)
        seen[kind.__name__].append(float((found - wanted).norm() / wanted.norm()))
    print(f"{kind.__name__}: {seen[kind.__name__][0]:.1g} from bicubic, {seen[kind.__name__][1]:.1g} from antialiased")
(plain, smooth), (plain_r, smooth_r) = seen.values()
sys.exit(not (plain < 1e-6 < 0.1 < smooth and smooth_r < 1e-6 < 0.1 < plain_r))
PY
