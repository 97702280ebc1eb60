#!/usr/bin/env bash
# eai-sparsify 1.3.3: AuxK and Multi-TopK losses have no gradient to the encoder.
#
# Both read the pre-activations that FusedEncoder returns, and its backward drops their gradient: dead latents move in
# the decoder alone, while what would make them fire again, their encoder rows, stays where it is.
#
# Seen: after backward of auxk_loss (and of multi_topk_fvu) W_dec has a gradient, encoder.weight none but zeros; the same
# losses written out in torch have gradients of norm 0.01 and more there. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy eai-sparsify==1.3.3
SPARSIFY_DISABLE_TRITON=1 "$work/venv/bin/python" - <<'PY'
import sys
import torch
from sparsify import SparseCoder, SparseCoderConfig

torch.manual_seed(0)
x = torch.randn(64, 16)
dead = torch.arange(128) % 2 == 0


def written_out(sae, name):
    pre = torch.relu(torch.nn.functional.linear(x - sae.b_dec, sae.encoder.weight, sae.encoder.bias))
    values, indices = pre.topk(4)
    x_hat = (values[..., None] * sae.W_dec[indices]).sum(1) + sae.b_dec
    if name == "auxk_loss":
        values, indices = torch.where(dead, pre, -torch.inf).topk(8)
        error = (values[..., None] * sae.W_dec[indices]).sum(1) - (x - x_hat).detach()
    else:
        values, indices = pre.topk(16)
        error = (values[..., None] * sae.W_dec[indices]).sum(1) + sae.b_dec - x
    return error.square().sum() / (x - x.mean(0)).square().sum()


found = True
for name in ("auxk_loss", "multi_topk_fvu"):
    norms = []
    for loss_of in (lambda sae: getattr(sae(x, dead_mask=dead), name), lambda sae: written_out(sae, name)):
        torch.manual_seed(1)
        sae = SparseCoder(16, SparseCoderConfig(num_latents=128, k=4, multi_topk=True))
        loss = loss_of(sae)
        loss.backward()
        of_encoder = 0.0 if sae.encoder.weight.grad is None else float(sae.encoder.weight.grad.norm())
        norms.append((float(loss), of_encoder, float(sae.W_dec.grad.norm())))
    print(f"{name}: (loss, gradient of the encoder, of the decoder) {norms[0]}, written out {norms[1]}")
    found &= abs(norms[0][0] - norms[1][0]) < 1e-5 and norms[0][1] == 0 and norms[1][1] > 0.01 and norms[0][2] > 0.01
sys.exit(not found)
PY
