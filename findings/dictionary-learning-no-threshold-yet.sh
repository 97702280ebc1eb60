#!/usr/bin/env bash
# dictionary_learning 0.1.0: a BatchTopKSAE trained for up to 1,000 steps encodes as a plain ReLU.
#
# Its encode goes by a threshold, which training estimates only after threshold_start_step = 1,000 steps and which is -1
# until then. In training the batch's k·B largest are kept, so the losses look right; the SAE that comes out, and what
# is saved of it, keeps every feature above 0.
#
# Seen: after 300 steps with k = 8 of 256 features, 8 features a row in training and 47 at inference; with
# threshold_start_step=200 it is 8 and 10. Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 "setuptools<81" \
    dictionary-learning==0.1.0
"$work/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

truth = torch.nn.functional.normalize(torch.randn(128, 32, generator=torch.Generator().manual_seed(0)), dim=1)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(256, 128, generator=generator) * (torch.rand(256, 128, generator=generator) < 0.05)
    return codes @ truth


def trained(**options):
    trainer = BatchTopKTrainer(
        steps=300, activation_dim=32, dict_size=256, k=8, layer=0, lm_name="", lr=3e-3, warmup_steps=10, seed=0,
        device="cpu", **options,
    )
    for step in range(300):
        trainer.update(step, batch(step))
    x = batch(1000)
    with torch.no_grad():
        codes = [trainer.ae.encode(x, use_threshold=inference) for inference in (False, True)]
        errors = [float((x - trainer.ae.decode(part)).norm() / x.norm()) for part in codes]
    return [float((part > 0).sum(1).float().mean()) for part in codes], errors, float(trainer.ae.threshold)


(count, kept), errors, threshold = trained()
early = trained(threshold_start_step=200)
print(f"dictionary_learning {version('dictionary-learning')}: threshold {threshold}; features a row {count:.0f} in "
      f"training, {kept:.0f} at inference, errors {errors[0]:.2f} and {errors[1]:.2f}; from step 200: {early}")
sys.exit(not (threshold == -1 and count <= 8 and kept > 30 and early[0][1] < 20))
PY
