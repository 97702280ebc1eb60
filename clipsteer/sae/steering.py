"""Setting features of a sparse autoencoder, as ``clipsteer.steer`` does at a hook point.

x becomes x + sd · Σ_i (s_i - f_i(x)) · W_dec[i] over the steered features i, with s_i the wanted
activation and f_i(x) the present one; sd undoes the SAE's input normalisation (Joseph et al. 2025,
arXiv 2504.08729).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clipsteer.clip.tokens import TOKENS
from clipsteer.ops._check import what_came
from clipsteer.sae.model import SAE
from clipsteer.sae.site import set_features

Tokens = Literal["all", "cls", "patches"]


def check_tokens(tokens: str) -> None:
    """Raise ValueError for unknown tokens."""
    if tokens not in TOKENS:
        raise ValueError(f"steer: tokens must be one of {TOKENS}, got {tokens!r}")


def check_width(what: str, width: int, x: Tensor, place: str = "this hook point") -> None:
    """Raise ValueError for activations of another width than something has."""
    if x.shape[-1] != width:
        raise ValueError(
            f"steer: {what} has d_in = {width}, but the activations at {place} are "
            f"{tuple(x.shape)}; they must have {width} in the last dimension"
        )


def check_finite(owner: str, name: str, value: float) -> None:
    """Raise ValueError, with the owner in front, for what is not finite."""
    if not math.isfinite(value):
        raise ValueError(f"{owner}: {name} must be finite, got {value}")


@dataclass(frozen=True, eq=False)
class SAESteering:
    """Set features of a sparse autoencoder to given activations.

    Args:
        sae: an autoencoder trained at the hook point it is used at.
        strengths: feature in [0, d_sae) -> wanted activation, in the units of ``sae.encode``; 0
            suppresses. Its usual range is what ``sae.encode`` gives on images that show it.
        tokens: "all", the class token alone ("cls"), or "patches" (what follows class and register
            tokens).
        relative: strengths are multiples of each feature's largest activation, which ``peaks``
            holds: 1 is as strong as it gets on images that show it.
        peaks: (d_sae,) largest activations, such as ``feature_statistics(sae, model, images)
            .maximum`` of ``clipsteer.sae``; for ``relative`` alone.

    Only the steered features are encoded, except that for ``architecture="topk"`` a feature's
    activation depends on every other pre-activation: there f_i is the true top-k activation, which
    takes a full ``ops.topk_encode``.

    Raises:
        ValueError: no feature, one out of range, a strength not finite, unknown ``tokens``; a
            transcoder; ``relative`` without ``peaks`` or the other way round, and a feature that is
            never active, of which there are no multiples.
    """

    sae: SAE
    strengths: Mapping[int, float]
    tokens: Tokens = "all"
    relative: bool = False
    peaks: Tensor | None = None  # (d_sae,)

    def __post_init__(self) -> None:
        check_tokens(self.tokens)
        if not isinstance(self.strengths, Mapping) or not self.strengths:
            raise ValueError(
                f"SAESteering: strengths must be a mapping {{feature: strength}}, got "
                f"{self.strengths!r}"
            )
        if self.sae.d_out is not None:
            raise ValueError(
                "SAESteering: a transcoder reads at one hook point and writes at another; add its "
                "features there with VectorSteering(sae.W_dec[i].detach(), strength)"
            )
        n = self.sae.d_sae
        clean = {}
        for feature, strength in self.strengths.items():
            index = operator.index(feature)
            if not 0 <= index < n:
                raise ValueError(
                    f"SAESteering: feature must be in [0, {n}) (d_sae = {n}), got {index}"
                )
            clean[index] = float(strength)
            check_finite("SAESteering", f"strength of feature {index}", clean[index])
        object.__setattr__(self, "strengths", clean)
        self._check_peaks()
        self._tables(self.sae.W_dec)

    def _check_peaks(self) -> None:
        if self.relative != (self.peaks is not None):
            raise ValueError(
                "SAESteering: relative=True and peaks go together; peaks are such as "
                "clipsteer.sae.feature_statistics(sae, model, images).maximum"
            )
        if self.peaks is None:
            return
        if not isinstance(self.peaks, Tensor) or self.peaks.shape != (self.sae.d_sae,):
            raise ValueError(
                f"SAESteering: peaks must be a tensor of shape (d_sae = {self.sae.d_sae},), got "
                f"{what_came(self.peaks)}"
            )
        for feature in self.strengths:
            peak = float(self.peaks[feature])
            if not (math.isfinite(peak) and peak > 0):
                raise ValueError(
                    f"SAESteering: feature {feature} has the peak {peak:g}: it is never active "
                    "there, and has no multiples; give its strength as an activation"
                )

    @property
    def activations(self) -> dict[int, float]:
        """Feature -> wanted activation, in the units of ``sae.encode``."""
        if self.peaks is None:
            return dict(self.strengths)
        return {i: s * float(self.peaks[i]) for i, s in self.strengths.items()}

    @property
    def width(self) -> tuple[str, int]:
        """What has to fit the activations, and their width."""
        return "the SAE", self.sae.d_in

    def _tables(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Features (m,) and strengths (m,), made once: a copy would stop every forward pass."""
        found = self.__dict__.get("_cache")
        if found is None or (found[1].device, found[1].dtype) != (weight.device, weight.dtype):
            with torch.inference_mode(False):
                features = torch.tensor(list(self.strengths), device=weight.device)
                values = [*self.activations.values()]
                wanted = torch.tensor(values, dtype=weight.dtype).to(weight)
            found = (features, wanted)
            object.__setattr__(self, "_cache", found)
        return found

    def apply(self, x: Tensor) -> Tensor:
        """(…, d_in) -> (…, d_in), every position steered; ``tokens`` is applied by ``steer``."""
        check_width(*self.width, x)
        weight = self.sae.W_dec
        features, wanted = self._tables(weight)
        acts, scale = self.sae.feature_acts(x, features)  # (…, m), (…, 1)
        return set_features(x, acts, wanted, weight[features], scale)
