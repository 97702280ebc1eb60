"""Features by effect: those that, at their peak, make a model say a thing."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.browse.explained import Explained, Predictions, find_predictions, templates_of
from clipsteer.browse.probes import Probes
from clipsteer.clip.zero_shot import zero_shot_head
from clipsteer.data.dataset import spread

# pictures on which features are tried
IMAGES = 8
# the most promising to first order, which are tried
TRIED = 64


def features_towards(
    explained: Explained,
    dataset: Any,
    text: str,
    peaks: Tensor,  # (d_sae,)
    *,
    words: Sequence[str] | None = None,
    multiple: float = 1.0,
    count: int = 3,
) -> list[tuple[int, float]]:
    """At most ``count`` features that raise the probability of ``text`` most, and by how much on
    average.

    The derivative of the embedding tells which are worth a try; TRIED of them are set to
    ``multiple`` times their peaks, one by one, on IMAGES pictures.

    Args:
        text: anything where there is a text tower, else a class of the data set.
        peaks: largest activations, as ``feature_statistics`` gives them.
        words: what else could be said; by default the classes.

    Raises ValueError: nothing can be told apart, no such class, or no feature that raises it.
    """
    predictions = explained.predictions
    if predictions is None:
        predictions = find_predictions(explained.clip, dataset, words)
    predictions, answer = _with(explained, predictions, text)
    rows = spread(range(len(dataset)), IMAGES)
    probes = Probes.of(explained, dataset, rows)
    clean = predictions.of(probes.embeddings)  # (P, C)
    # ∂ log p of the answer / ∂ embedding, up to a factor
    wanted = predictions.head[answer] - clean.mean(0) @ predictions.head  # (e,)
    direction = probes.jacobian().T @ wanted  # (d,)
    promise = (explained.sae.W_dec.detach().to(direction) @ direction).cpu() * peaks.cpu()
    order = promise.argsort(descending=True, stable=True)[:TRIED]
    tried = order[(promise[order] > 0) & (peaks.cpu()[order] > 0)]
    if len(tried) == 0:
        raise ValueError(f"no feature that is active on these images leads towards {text!r}")
    strengths = peaks.cpu()[tried][:, None] * multiple
    p = predictions.of(probes.set(tried.tolist(), strengths))[:, 0, :, answer]  # (m, P)
    change = (p - clean[:, answer]).mean(1).cpu()
    best = change.argsort(descending=True, stable=True)[:count]
    found = [(int(tried[i]), float(change[i])) for i in best.tolist() if change[i] > 0]
    if not found:
        raise ValueError(
            f"no feature raises the probability of {text!r} at {multiple:g} times its peak; try "
            "another strength, or more images"
        )
    return found


def _with(
    explained: Explained, predictions: Predictions | None, text: str
) -> tuple[Predictions, int]:
    """What images are told apart by, the text among it, and the text's place."""
    clip = explained.clip
    names = [] if predictions is None else predictions.names
    if text in names:
        assert predictions is not None
        return predictions, names.index(text)
    if not clip.has_text or predictions is None:
        near = difflib.get_close_matches(text, names, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(
            f"{clip.name} has no text tower and knows the classes of the images alone, none of "
            f"which is {text!r}{hint}"
        )
    with torch.no_grad():
        row = zero_shot_head(clip, [text], templates_of(clip)).to(predictions.head)
    head = torch.cat([predictions.head, F.normalize(row, dim=1)])
    return replace(predictions, names=[*names, text], head=head), len(names)
