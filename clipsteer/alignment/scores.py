"""How near every row is to every concept of a layer: proximity scores in [0, 1], rows of which sum
to at most 1.

    features of an SAE     f_k / Σ f           f the codes of a row
    words of SpLiCE        w_k / Σ w           w the weights of an image's embedding
    classes                e_k / max(1, Σ e)   e_k = ‖C_k h‖² / ‖h‖², C_k the conceptor of a class
    clusters               in ``clipsteer.alignment.clusters``

Codes and weights say what a row is made of, whatever its length, so that they become shares. An
energy is a share already, but of directions that classes have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from clipsteer.clip.hooks import evaluating
from clipsteer.conceptors.conceptor import Conceptor
from clipsteer.ops._check import what_came
from clipsteer.sae.site import chunks

if TYPE_CHECKING:
    from clipsteer.sae.model import SAE
    from clipsteer.splice.dictionary import ConceptDictionary


class Proximity(NamedTuple):
    """Scores of N rows with K concepts, float32 on the CPU, and what the concepts are called."""

    scores: Tensor  # (N, K)
    names: list[str]


def shares(
    scores: Tensor,  # (N, K), at least 0
) -> Tensor:
    """Rows divided by their sums; rows of zeros stay."""
    total = scores.sum(1, keepdim=True)
    return scores / torch.where(total > 0, total, 1)


def of_features(
    sae: SAE,
    x: Tensor,  # (N, d_in)
) -> Proximity:
    """Features of an SAE that are active anywhere, by their share of a row's code.

    Raises ValueError for rows of another width.
    """
    if x.ndim != 2 or x.shape[1] != sae.d_in:
        raise ValueError(
            f"of_features: the SAE takes rows (N, {sae.d_in}), got {what_came(x)}; it belongs to "
            "another layer or model"
        )
    with evaluating(sae):
        rows = x.to(sae.W_enc)
        acts = torch.cat([sae.encode(part).float().cpu() for part in chunks(sae, rows)])
    alive = (acts > 0).any(0).nonzero().flatten()
    names = [f"feature {i}" for i in alive.tolist()]
    return Proximity(shares(acts[:, alive]), names)


def of_words(
    dictionary: ConceptDictionary,
    embeddings: Tensor,  # (N, e)
    l1: float = 0.25,
) -> Proximity:
    """Words that any image is made of, by their share of its weights."""
    weights = dictionary.decompose(embeddings, l1).weights.float().cpu()
    used = (weights > 0).any(0).nonzero().flatten()
    names = [dictionary.concepts[i] for i in used.tolist()]
    return Proximity(shares(weights[:, used]), names)


def of_classes(
    x: Tensor,  # (N, d)
    labels: Tensor,  # (N,) int64
    classes: Sequence[str],
) -> Proximity:
    """Classes, by the energy that their conceptors leave of a row.

    Conceptors are fitted to these rows about their mean, with the aperture of
    ``conceptors.choose_aperture``. Classes without a row are left out.
    """
    there, own = labels.unique(return_inverse=True)
    rows = x.double()
    mean = rows.mean(0)
    fitted = Conceptor.fit(rows, mean=mean, labels=own, classes=len(there))
    h = rows - mean
    whole = h.square().sum(1)  # (N,)
    kept = torch.stack([(h @ fitted[k].matrix).square().sum(1) for k in range(len(there))], 1)
    energy = kept / torch.where(whole > 0, whole, 1)[:, None]
    scores = energy / energy.sum(1, keepdim=True).clamp_min(1)
    return Proximity(scores.float().cpu(), [classes[i] for i in there.tolist()])
