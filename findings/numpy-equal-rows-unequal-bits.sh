#!/usr/bin/env bash
# numpy 2.4.6 (OpenBLAS of its wheel): equal rows of one product need not get equal bits; where a row stands decides.
#
# OpenBLAS's Haswell kernels (any AVX2 processor) multiply rows in blocks and the rest by another path, which adds in
# another order. Triton's interpreter multiplies with numpy, so a kernel that promises bits for its own sums keeps that
# promise on a GPU and seems to break it in the interpreter: compare interpreted products within a bound.
#
# Seen: 75 of 120 shapes with rows that differ. Exits with 1 when no shape does.
set -euo pipefail
grep -qw avx2 /proc/cpuinfo || { echo "needs a processor with AVX2"; exit 0; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6
OPENBLAS_NUM_THREADS=1 OPENBLAS_CORETYPE=Haswell "$work/venv/bin/python" - <<'PY'
import sys
from itertools import product
import numpy as np

rng = np.random.default_rng(0)
shapes = list(product((3, 5, 7, 9, 17, 33), (8, 33, 64, 70, 140), (4, 9, 16, 33)))
unequal = 0
for rows, inner, columns in shapes:
    row = rng.standard_normal((1, inner)).astype(np.float32)
    found = np.repeat(row, rows, axis=0) @ rng.standard_normal((inner, columns)).astype(np.float32)
    unequal += not (found == found[0]).all()
print(f"numpy {np.__version__}: equal rows differ in {unequal} of {len(shapes)} shapes")
sys.exit(not unequal)
PY
