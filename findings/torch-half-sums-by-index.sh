#!/usr/bin/env bash
# torch 2.13.0, CPU: whether a gradient by index is summed in float32 or in bfloat16 depends on the spelling, and for two
# spellings on the number of dimensions.
#
# 10,000 rows of ones are taken from one row of a bfloat16 table; its gradient is 10,000 (9984 in bfloat16). t[index],
# F.embedding and index_put_ add in bfloat16, where 256 + 1 is 256. index_select's backward and index_add_ are right on a
# matrix and wrong on a vector. gather and scatter_add_ are right on both. So a bias that is taken by index_select loses
# what the weight beside it keeps.
#
# Seen: 256 256 256 | matrix 9984 9984 | vector 256 256 | 9984 9984. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$work/venv/bin/python" - <<'PY'
import sys
import torch
import torch.nn.functional as F

index = torch.zeros(10_000, dtype=torch.int64)


def gradient(take, *shape):
    table = torch.ones(*shape, dtype=torch.bfloat16, requires_grad=True)
    take(table).sum().backward()
    return int(table.grad.flatten()[0])


def added(method, *shape):
    ones = torch.ones(len(index), *shape[1:], dtype=torch.bfloat16)
    return int(method(torch.zeros(*shape, dtype=torch.bfloat16), ones).flatten()[0])


seen = {
    "t[index]": gradient(lambda t: t[index], 4, 8),
    "F.embedding": gradient(lambda t: F.embedding(index, t), 4, 8),
    "index_put_": added(lambda t, ones: t.index_put_((index,), ones, accumulate=True), 4, 8),
    "index_select, matrix": gradient(lambda t: t.index_select(0, index), 4, 8),
    "index_add_, matrix": added(lambda t, ones: t.index_add_(0, index, ones), 4, 8),
    "index_select, vector": gradient(lambda t: t.index_select(0, index), 4),
    "index_add_, vector": added(lambda t, ones: t.index_add_(0, index, ones), 4),
    "gather, vector": gradient(lambda t: t.gather(0, index), 4),
    "scatter_add_, vector": added(lambda t, ones: t.scatter_add_(0, index, ones), 4),
}
print(f"torch {torch.__version__}: {seen}")
sys.exit([*seen.values()] != [256, 256, 256, 9984, 9984, 256, 256, 9984, 9984])
PY
