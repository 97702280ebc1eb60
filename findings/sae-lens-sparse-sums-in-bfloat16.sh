#!/usr/bin/env bash
# sae-lens 6.54.12, torch 2.14.1, CPU: use_sparse_activations makes the reconstructions of a bfloat16 SAE 4 to 11 times
# worse, the more so the larger k is.
#
# The option is there for speed: the k features of a row become a sparse tensor, and torch.sparse.mm takes the place of
# the dense product. On a CPU that adds in the type of the weights, so each of a row's k terms is rounded to eight bits
# as it is added, where the dense product adds in float32 and rounds once. 600 ones by ones are 256 there.
#
# Seen, relative errors of decode against float64 with the same activations: dense 0.0017 and 0.0016 for k = 32 and 256,
# sparse 0.0070 and 0.0177; the sum of 600 ones 600 and 256. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 sae-lens==6.54.12
"$work/venv/bin/python" -W ignore - <<'PY'
import sys
from importlib.metadata import version

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

D, N = 512, 4096
seen = {}
for k in (32, 256):
    for sparse in (False, True):
        torch.manual_seed(0)
        options = {"rescale_acts_by_decoder_norm": False, "use_sparse_activations": sparse, "dtype": "bfloat16"}
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=N, k=k, **options))
        with torch.no_grad():
            directions = torch.nn.functional.normalize(torch.randn(N, D), dim=1)
            sae.W_dec.copy_(directions)
            sae.W_enc.copy_(directions.T)
            sae.b_enc.zero_()
            sae.b_dec.zero_()
            acts = sae.encode(torch.randn(64, D).bfloat16() + 1)
            dense = acts.to_dense() if acts.is_sparse else acts
            wanted = dense.double() @ sae.W_dec.double()
            seen[k, sparse] = float((sae.decode(acts).double() - wanted).norm() / wanted.norm())
ones = torch.ones(1, 600, dtype=torch.bfloat16)
sums = (ones @ ones.T).item(), torch.sparse.mm(ones.to_sparse(), ones.T).item()
told = ", ".join(f"k = {k} {'sparse' if sparse else 'dense'} {error:.4f}" for (k, sparse), error in seen.items())
print(f"sae-lens {version('sae-lens')}, torch {torch.__version__}: {told}; 600 ones: {sums}")
worse = [seen[k, True] / seen[k, False] for k in (32, 256)]
sys.exit(not (seen[256, False] < 0.0025 and 3 < worse[0] < 6 and 8 < worse[1] < 14 and sums == (600, 256)))
PY
