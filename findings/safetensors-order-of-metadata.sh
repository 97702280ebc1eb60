#!/usr/bin/env bash
# safetensors 0.8.0: two files of the same tensors and the same metadata need not be the same bytes.
#
# save_file keeps its metadata in a hash map that is seeded anew in each process and writes it in that map's order, so
# equal calls in two processes differ in the header; tensors and their offsets are in one order. A digest of a file is
# no identity of what it holds, and a byte-for-byte test of a checkpoint passes by luck, with one key always.
#
# Seen: 20 processes, 8 keys: 20 different digests; with one key: 1. Exits with 1 when that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy
cat > "$work/save.py" <<'PY'
import hashlib, sys
import numpy as np
from safetensors.numpy import save_file

path, keys = sys.argv[1], int(sys.argv[2])
save_file({"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}, path, {f"key{i}": "x" for i in range(keys)})
print(hashlib.sha256(open(path, "rb").read()).hexdigest())
PY
for keys in 1 8; do
  for _ in $(seq 20); do "$work/venv/bin/python" "$work/save.py" "$work/file.safetensors" "$keys"; done |
    sort -u | wc -l | tr -d ' ' > "$work/$keys"
done
"$work/venv/bin/python" -c 'import safetensors; print("safetensors", safetensors.__version__)'
echo "different digests of 20 equal files: $(cat "$work/1") with one key of metadata, $(cat "$work/8") with eight"
[ "$(cat "$work/1")" = 1 ] && [ "$(cat "$work/8")" -gt 1 ]
