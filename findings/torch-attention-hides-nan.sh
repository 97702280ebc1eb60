#!/usr/bin/env bash
# torch 2.13.0, CPU: F.scaled_dot_product_attention gives zeros for a query that holds a NaN.
#
# float32 tensors take the fused kernel by default, which writes 0 where softmax gives NaN. The "math" backend, and
# softmax(q kᵀ) v written out, give NaN in that row. A NaN in a key or in a value is kept by both. So a loss that is
# watched for NaN, and a test that plants one, see nothing.
#
# Seen: of 32 results NaN by default and by math, query 0 and 8 (the row is zeros), key 32 and 32, value 4 and 4. Exits
# with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$work/venv/bin/python" -W ignore - <<'END'
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

print("torch", torch.__version__)
torch.manual_seed(0)
counts = {}
for name in ("query", "key", "value"):
    given = {part: torch.randn(1, 1, 4, 8) for part in ("query", "key", "value")}
    given[name][0, 0, 1, 2] = float("nan")
    by_default = F.scaled_dot_product_attention(**given)
    with sdpa_kernel(SDPBackend.MATH):
        by_math = F.scaled_dot_product_attention(**given)
    counts[name] = int(by_default.isnan().sum()), int(by_math.isnan().sum())
    print(f"NaN in one {name}: {counts[name][0]} of 32 results are NaN by default, {counts[name][1]} by math")
    if name == "query":
        row = by_default[0, 0, 1]
        print("that row by default:", row.tolist())
        assert torch.equal(row, torch.zeros(8))
assert counts == {"query": (0, 8), "key": (32, 32), "value": (4, 4)}, counts
END
