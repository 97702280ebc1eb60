#!/usr/bin/env bash
# hdbscan 0.8.44: the soft memberships of the rows that it was fitted to depend on which of its two functions is asked.
#
# `all_points_membership_vectors(fit)` and `membership_vector(fit, rows)` with the very rows of the fit: the second takes
# them for new points, puts each anew into the tree, and gives other numbers. Who publishes concepts by clusters has to
# say which, and code that calls the second on training rows (it looks the more general) measures something else.
#
# Seen, on 900 points of three Gaussian blobs and noise: single memberships differ by up to .31 (on 3,000 tokens of a ViT
# it was .80, and 3 % of them belonged most to another cluster). Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check hdbscan==0.8.44 numpy==2.3.5 scikit-learn==1.7.2
"$work/venv/bin/python" - <<'PY'
import sys
import hdbscan
import numpy as np

random = np.random.RandomState(0)
centres = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
rows = np.concatenate([centres[i % 3] + random.randn(2) for i in range(750)]).reshape(-1, 2)
rows = np.concatenate([rows, random.uniform(-4, 8, (150, 2))])
fit = hdbscan.HDBSCAN(min_cluster_size=50, min_samples=20, cluster_selection_method="leaf", prediction_data=True)
fit.fit(rows)
own = hdbscan.all_points_membership_vectors(fit)
new = hdbscan.membership_vector(fit, rows)
apart = np.abs(own - new).max()
print(f"{own.shape[1]} clusters; memberships of the same rows differ by up to {apart:.2f}")
sys.exit(not (own.shape == new.shape == (900, 3) and 0.2 < apart < 0.5))
PY
