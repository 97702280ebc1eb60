#!/usr/bin/env bash
# visaebench 0.1.0: sparse probing finds classes in noise, and an SAE that never fires has them all absorbed.
#
# SparseProbing ranks the features by their F statistic over all images, the held-out ones among them, and then splits:
# the features that fit those by chance are the ones that are probed. FeatureAbsorption compares the ten most active
# features of a class with its siblings'; where none is active, argsort gives both the same ten.
#
# Seen: of uniform noise on 250 images of 5 classes (chance 0.2) the area under accuracy over k is 0.30 with 100
# features, 0.47 with 1,000 and 0.55 with 10,000; of codes that are 0 everywhere the absorption rate is 1.0, of 5 tests.
# Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 visaebench==0.1.0
"$work/venv/bin/python" -W ignore - <<'PY'
import sys
from importlib.metadata import version

import numpy as np
import torch
from visaebench.metrics import METRIC_REGISTRY


class Itself:
    """What is encoded are the codes."""

    def encode(self, x):
        return x


labels = np.arange(250) % 5
probing = METRIC_REGISTRY["sparse_probing"]()
of_noise = {}
for width in (100, 1000, 10000):
    noise = torch.rand(250, 1, width, generator=torch.Generator().manual_seed(0))
    of_noise[width] = round(probing.compute(Itself(), noise, device="cpu", labels=labels).value, 2)
groups = {"all": {"class_indices": list(range(5)), "hierarchy_depth": 1}}
absorption = METRIC_REGISTRY["absorption"]()
silent = torch.zeros(250, 1, 100)
of_none = absorption.compute(Itself(), silent, device="cpu", labels=labels, sibling_groups=groups)
print(f"visaebench {version('visaebench')}: sparse probing of noise, chance 0.2: {of_noise}")
print(f"absorption of an SAE that never fires: {of_none.value}, of {of_none.metadata['num_tests']} tests")
sys.exit(of_noise != {100: 0.3, 1000: 0.47, 10000: 0.55} or (of_none.value, of_none.metadata["num_tests"]) != (1.0, 5))
PY
