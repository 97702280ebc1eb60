#!/usr/bin/env bash
# triton 3.8.0: tl.dot compiles to no tensor-core instruction on sm_75, in any type.
#
# A T4 (sm_75) has tensor cores for float16, and Triton takes the target without a word. Compiled ahead of time, which
# needs no GPU, a product of 32 x 32 becomes 256 single fused multiply-adds of float32 in each thread there, and 4 mma
# instructions on sm_80. Kernels that are fast elsewhere are an order of magnitude slower than cuBLAS on such a card.
#
# Seen: fp16 on sm_75: 0 mma, 256 fma; bf16 likewise; on sm_80 and sm_90: 4 mma, 0 fma. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.8.0
cat > "$work/product.py" <<'PY'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, c):
    i = tl.arange(0, 32)
    rows = i[:, None] * 32 + i[None, :]
    tl.store(c + rows, tl.dot(tl.load(a + rows), tl.load(b + rows)))


seen = {}
for arch in (75, 80, 90):
    for dtype in ("fp16", "bf16"):
        source = ASTSource(product, {"a": f"*{dtype}", "b": f"*{dtype}", "c": "*fp32"}, {})
        ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
        seen[arch, dtype] = len(re.findall(r"\bmma\.", ptx)), len(re.findall(r"\bfma\.rn\.f32", ptx))
        print(f"triton {triton.__version__}, sm_{arch}, {dtype}: {seen[arch, dtype][0]} mma, {seen[arch, dtype][1]} fma")
sys.exit(any(seen[key] != ((0, 256) if key[0] == 75 else (4, 0)) for key in seen))
PY
TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/product.py"
