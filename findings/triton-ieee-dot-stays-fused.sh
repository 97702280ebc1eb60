#!/usr/bin/env bash
# triton 3.8.0: enable_fp_fusion=False reaches a * b + c, and not tl.dot with input_precision="ieee".
#
# The option is there for sums that must round as written: with it, a * b + c compiles to a product and a sum. A dot
# product in "ieee" is a chain of the same two operations, and keeps its 256 fused multiply-adds either way. So a kernel
# with tl.dot cannot be made to agree bit for bit with separate roundings, and says nothing of it.
#
# Seen (sm_80, ahead of time, no GPU): a * b + c: 1 fma, and with the option 0; tl.dot: 256 fma, and with the option
# 256. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.8.0
cat > "$work/fused.py" <<'PY'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def elementwise(a, b, c):
    i = tl.arange(0, 128)
    tl.store(c + i, tl.load(a + i) * tl.load(b + i) + tl.load(c + i))


@triton.jit
def product(a, b, c):
    i = tl.arange(0, 32)
    rows = i[:, None] * 32 + i[None, :]
    tl.store(c + rows, tl.dot(tl.load(a + rows), tl.load(b + rows), input_precision="ieee"))


seen = []
for kernel in (elementwise, product):
    for fusion in (True, False):
        source = ASTSource(kernel, {"a": "*fp32", "b": "*fp32", "c": "*fp32"}, {})
        made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": fusion})
        seen.append(len(re.findall(r"\bfma\.rn\.f32", made.asm["ptx"])))
        print(f"triton {triton.__version__}, {kernel.__name__}, enable_fp_fusion={fusion}: {seen[-1]} fma")
sys.exit(seen != [1, 0, 256, 256])
PY
TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/fused.py"
