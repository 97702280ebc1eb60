#!/usr/bin/env bash
# kernels 0.17.2: which of two builds of one kernel is loaded depends on Python's hash seed.
#
# A repository has a variant of tvm-ffi for the CPU and one of torch without an architecture, torch-cpu. The comment in
# kernels.variants prefers tvm-ffi; the sort keys of both are equal, and the folders come from a set of strings, whose
# order is drawn anew in every process. So the same folder on the same machine gives now the one, now the other. For
# CUDA 13.0 it is the same, for 12.6 not: there the minor version breaks the tie.
#
# Seen: {'torch-cpu', 'tvm-ffi01-cpu-x86_64-linux'} over ten seeds. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check kernels==0.17.2 'apache-tvm-ffi>=0.1.9,<0.2'
cat >"$work/load.py" <<'PY'
import json
import platform
import sys
from pathlib import Path

import kernels

folder = Path(sys.argv[1])
for name in ("torch-cpu", f"tvm-ffi01-cpu-{platform.machine()}-linux"):
    variant = folder / "build" / name
    variant.mkdir(parents=True, exist_ok=True)
    (variant / "__init__.py").write_text(f"NAME = {name!r}\n")
    about = {"id": f"relu_{len(name)}", "name": "relu", "version": 1, "license": "Apache-2.0"}
    about |= {"python-depends": [], "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(about))
print(kernels.get_local_kernel(folder, backend="cpu").NAME)
PY
seen=$(for seed in 0 1 2 3 4 5 6 7 8 9; do PYTHONHASHSEED=$seed "$work/venv/bin/python" "$work/load.py" "$work/relu"; done |
  sort | uniq -c)
echo "kernels 0.17.2: $seen"
[ "$(echo "$seen" | wc -l)" = 2 ]
