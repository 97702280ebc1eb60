#!/usr/bin/env bash
# liger-kernel 0.8.5: rotary embedding of contiguous queries of one token rotates the wrong heads, some of them twice.
#
# Queries (B, heads, T, d) are brought to (B, T, heads, d) by transpose and contiguous. With T = 1 the transpose counts
# as contiguous, whatever the stride of its dimension of size 1, and that stride is what the kernel steps from token to
# token by: d, not heads · d. Queries that are a view of (B, T, heads, d), as transformers makes them, are right; a
# contiguous copy of the same is not. Shown under Triton's interpreter, on a CPU.
#
# Seen: B = 2, 3 heads: off by more than 1 at T = 1 if contiguous; right as a view, and right at T = 2 either way. Exits
# with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy triton==3.8.0 liger-kernel==0.8.5
cat > "$work/run.py" <<'PY'
import sys

import torch
from liger_kernel.ops.rope import LigerRopeFunction


def rotated_half(t):
    first, second = t.chunk(2, -1)
    return torch.cat([-second, first], -1)


torch.manual_seed(0)
off = {}
for tokens in (1, 2):
    angles = torch.rand(tokens, 4) * 3
    table = torch.cat([angles, angles], -1)[None]
    cos, sin = table.cos(), table.sin()
    queries, keys = torch.randn(2, tokens, 3, 8), torch.randn(2, tokens, 1, 8)
    for name in ("view", "contiguous"):
        q, k = (t.clone().transpose(1, 2) for t in (queries, keys))
        if name == "contiguous":
            q, k = (t.clone(memory_format=torch.contiguous_format) for t in (q, k))
        truth = q * cos[:, None] + rotated_half(q) * sin[:, None]
        found, _ = LigerRopeFunction.apply(q, k, cos, sin)
        off[f"T = {tokens}, {name}"] = float((found - truth).abs().max())
print(off)
right = {name: error < 1e-5 for name, error in off.items()}
sys.exit([*right.values()] != [True, False, True, True])
PY
TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/run.py"
