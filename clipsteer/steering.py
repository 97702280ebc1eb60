"""Steering: change the residual stream at named hook points, by SAE features, vectors or
conceptors, while code runs.

    x_out = x + sd · Σ_i (s_i - f_i(x)) · W_dec[i]

over the steered features i, with s_i the wanted activation and f_i(x) the present one; sd undoes
the SAE's input normalisation (Joseph et al. 2025, arXiv 2504.08729). It equals decode(f with f_i :=
s_i) + (x - SAE(x)): whatever the SAE does not explain stays in place. Everything runs in forward
hooks; no weight of the model is touched. A conceptor C takes h to β·C(h - μ) + μ, addition to h +
β·(m - μ) (Postmus & Abreu 2024, arXiv 2410.16314).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clipsteer.clip.hooks import apply_at, beside, match
from clipsteer.clip.tokens import TOKENS as _TOKENS
from clipsteer.clip.tokens import Layout, layout_at
from clipsteer.sae.site import set_features

if TYPE_CHECKING:
    from clipsteer.conceptors.conceptor import Conceptor
    from clipsteer.sae.model import SAE

Tokens = Literal["all", "cls", "patches"]


def _check_tokens(tokens: str) -> None:
    if tokens not in _TOKENS:
        raise ValueError(f"steer: tokens must be one of {_TOKENS}, got {tokens!r}")


def _check_width(what: str, width: int, x: Tensor) -> None:
    if x.shape[-1] != width:
        raise ValueError(
            f"steer: {what} has d_in = {width}, but the activations at this hook point are "
            f"{tuple(x.shape)}; "
            f"they must have {width} in the last dimension"
        )


@dataclass(frozen=True, eq=False)
class SAESteering:
    """Set features of a sparse autoencoder to given activations.

    Args:
        sae: an autoencoder trained at the hook point it is used at.
        strengths: feature index in [0, d_sae) -> wanted activation, in the units of ``sae.encode``;
            0 suppresses. A feature's usual range is what ``sae.encode`` gives on images that show
            it.
        tokens: "all" positions, the class token alone ("cls"), or "patches" (what follows class and
            register tokens).

    Only the steered features are encoded, except that for ``architecture="topk"`` a feature's
    activation depends on every other pre-activation: there f_i is the true top-k activation, which
    takes a full ``ops.topk_encode``.

    Raises:
        ValueError: no feature, a feature out of range, a strength that is not finite, unknown
            ``tokens``.
    """

    sae: SAE
    strengths: Mapping[int, float]
    tokens: Tokens = "all"

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        if not isinstance(self.strengths, Mapping) or not self.strengths:
            raise ValueError(
                f"SAESteering: strengths must be a mapping {{feature: strength}}, got "
                f"{self.strengths!r}"
            )
        n = self.sae.d_sae
        clean = {}
        for feature, strength in self.strengths.items():
            index, value = operator.index(feature), float(strength)
            if not 0 <= index < n:
                raise ValueError(
                    f"SAESteering: feature must be in [0, {n}) (d_sae = {n}), got {index}"
                )
            if not math.isfinite(value):
                raise ValueError(
                    f"SAESteering: strength of feature {index} must be finite, got {value}"
                )
            clean[index] = value
        object.__setattr__(self, "strengths", clean)
        self._tables(self.sae.W_dec)

    def _tables(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Features (m,) and strengths (m,) beside the SAE, made once: a copy to a GPU would stop
        every forward pass."""
        found = self.__dict__.get("_cache")
        if found is None or (found[1].device, found[1].dtype) != (weight.device, weight.dtype):
            with torch.inference_mode(False):
                features = torch.tensor(list(self.strengths), device=weight.device)
                wanted = torch.tensor(
                    list(self.strengths.values()), device=weight.device, dtype=weight.dtype
                )
            found = (features, wanted)
            object.__setattr__(self, "_cache", found)
        return found

    def apply(self, x: Tensor) -> Tensor:
        """(…, d_in) -> (…, d_in), every position steered; ``tokens`` is applied by ``steer``."""
        _check_width("the SAE", self.sae.d_in, x)
        weight = self.sae.W_dec
        features, wanted = self._tables(weight)
        acts, scale = self.sae.feature_acts(x, features)  # (…, m), (…, 1)
        return set_features(x, acts, wanted, weight[features], scale)


@dataclass(frozen=True, eq=False)
class VectorSteering:
    """Add ``strength · vector`` to the activations.

    Args:
        vector: (d,) direction in the space of the hook point, used as it is (not normalised).
        strength: factor; negative steers away.
        tokens: "all", "cls" or "patches", as in ``SAESteering``.
    """

    vector: Tensor
    strength: float = 1.0
    tokens: Tokens = "all"
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        if (
            not isinstance(self.vector, Tensor)
            or self.vector.dim() != 1
            or not self.vector.is_floating_point()
        ):
            got = (
                tuple(self.vector.shape)
                if isinstance(self.vector, Tensor)
                else type(self.vector).__name__
            )
            raise ValueError(
                f"VectorSteering: vector must be a floating tensor of shape (d,), got {got}"
            )
        if not math.isfinite(self.strength):
            raise ValueError(f"VectorSteering: strength must be finite, got {self.strength}")

    def apply(self, x: Tensor) -> Tensor:
        """(…, d) -> (…, d), every position steered."""
        _check_width("the vector", self.vector.shape[0], x)
        return x + beside(self._cache, x, lambda v: self.strength * v, self.vector)


def _check_vector(owner: str, name: str, value: object, d: int | None = None) -> None:
    if (
        not isinstance(value, Tensor)
        or value.dim() != 1
        or not value.is_floating_point()
        or d not in (None, len(value))
    ):
        got = (
            f"{value.dtype} {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise ValueError(
            f"{owner}: {name} must be a floating tensor of shape ({d or 'd'},), got {got}"
        )


@dataclass(frozen=True, eq=False)
class AdditiveSteering:
    """Add ``beta · (mean - background)``: the mean activation of what is wanted, less that of a
    background.

    Args:
        mean: (d,) mean activation of the examples of what to steer towards; see ``fit``.
        background: (d,) mean activation of a generic corpus (mean-centred addition), or None for 0
            (plain addition).
        beta: factor; negative steers away.
        tokens: "all", "cls" or "patches", as in ``SAESteering``.

    Raises:
        ValueError: shapes that do not fit, a beta that is not finite, unknown ``tokens``.
    """

    mean: Tensor
    background: Tensor | None = None
    beta: float = 1.0
    tokens: Tokens = "all"
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        _check_vector("AdditiveSteering", "mean", self.mean)
        if self.background is not None:
            _check_vector("AdditiveSteering", "background", self.background, len(self.mean))
        if not math.isfinite(self.beta):
            raise ValueError(f"AdditiveSteering: beta must be finite, got {self.beta}")

    @classmethod
    def fit(
        cls,
        x: Tensor | Iterable[Tensor],
        background: Tensor | None = None,
        *,
        beta: float = 1.0,
        tokens: Tokens = "all",
    ) -> AdditiveSteering:
        """From activations (…, d), or an iterable of such batches, of what to steer towards."""
        total, count = None, 0
        for batch in [x] if isinstance(x, Tensor) else x:
            rows = batch.detach().flatten(0, -2).double()
            total = rows.sum(0) if total is None else total + rows.sum(0)
            count += len(rows)
        if not count:
            raise ValueError("AdditiveSteering: there is no row to take the mean of")
        return cls(total / count, background, beta, tokens)

    @property
    def vector(self) -> Tensor:
        """(d,): what beta multiplies."""
        return self.mean if self.background is None else self.mean - self.background.to(self.mean)

    def apply(self, x: Tensor) -> Tensor:
        """(…, d) -> (…, d), every position steered."""
        _check_width("the mean", len(self.mean), x)
        sources = (self.mean,) if self.background is None else (self.mean, self.background)
        return x + beside(self._cache, x, lambda *_: self.beta * self.vector, *sources)


@dataclass(frozen=True, eq=False)
class ConceptorSteering:
    """Take activations h to ``beta · C (h - μ) + μ``: keep what the conceptor keeps, soften the
    rest.

    Args:
        conceptor: a single one of the hook point's width. Compose with its algebra: ``animals &
            ~sketch``.
        beta: strength.
        mean: (d,) the μ above; None takes the conceptor's own, which is 0 for an uncentred one. It
            should be the mean that the conceptor was fitted about.
        tokens: "all", "cls" or "patches", as in ``SAESteering``.

    Raises:
        ValueError: a batch of conceptors, shapes that do not fit, a beta that is not finite,
            unknown ``tokens``.
    """

    conceptor: Conceptor
    beta: float = 1.0
    mean: Tensor | None = None
    tokens: Tokens = "all"
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        from clipsteer.conceptors.conceptor import Conceptor

        _check_tokens(self.tokens)
        if not isinstance(self.conceptor, Conceptor):
            raise TypeError(
                f"ConceptorSteering: expected a Conceptor, got {type(self.conceptor).__name__}"
            )
        if self.conceptor.is_batch:
            raise ValueError(
                f"ConceptorSteering: expected one conceptor, got a batch of {len(self.conceptor)}; "
                f"take C[k]"
            )
        if self.mean is not None:
            _check_vector("ConceptorSteering", "mean", self.mean, self.conceptor.d)
        if not math.isfinite(self.beta):
            raise ValueError(f"ConceptorSteering: beta must be finite, got {self.beta}")

    def apply(self, x: Tensor) -> Tensor:
        """(…, d) -> (…, d), every position steered, in x's dtype."""
        _check_width("the conceptor", self.conceptor.d, x)
        # under autocast too: rounding βC(x - μ) + μ would round all of the residual stream
        kind = x.device.type
        active = kind != "meta" and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if active else nullcontext():
            mean = None if self.mean is None else beside(self._cache, x, lambda m: m, self.mean)
            return self.conceptor.project(x, beta=self.beta, mean=mean)


Steering = SAESteering | VectorSteering | AdditiveSteering | ConceptorSteering
_KINDS = (SAESteering, VectorSteering, AdditiveSteering, ConceptorSteering)


def _positions(steering: Steering, x: Tensor, layout: Layout) -> Tensor:
    """Steer the positions that ``steering.tokens`` names; the others keep their bits. x: (B, T,
    d)."""
    if steering.tokens == "all":
        return steering.apply(x)
    where = layout.where("steer", steering.tokens, x.shape[1])
    parts = [x[:, : where.start], steering.apply(x[:, where])]
    return torch.cat(parts if where.stop is None else [*parts, x[:, where.stop :]], dim=1)


def _compose(steerings: Sequence[Steering], layout: Layout) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        for steering in steerings:
            x = _positions(steering, x, layout)
        return x

    return apply


class SteeringHandle:
    """What ``steer`` returns: already active; ``remove()`` or leaving a ``with`` block ends it.
    Removing twice is fine.

    Attributes:
        hook_points: the module names that are being steered.
    """

    def __init__(self, hook_points: list[str], stack: ExitStack) -> None:
        self.hook_points = hook_points
        self._stack = stack

    def remove(self) -> None:
        self._stack.close()

    def __enter__(self) -> SteeringHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()


def steer(model: Any, steerings: Mapping[str, Steering | Sequence[Steering]]) -> SteeringHandle:
    """Steer ``model`` at any number of hook points, from this call until the handle is removed.

    Args:
        model: what ``clipsteer.load`` returns, or any module tree whose named modules give
            (B, T, d) tensors.
        steerings: hook point -> one steering or a list of them, applied in order. A hook point is a
            plain module name or an fnmatch pattern ("visual.transformer.resblocks.*").

    Returns:
        a ``SteeringHandle``: use it in a ``with`` statement, or keep it and call ``remove()``.

    Raises:
        ValueError: a pattern that matches no module (near matches are named), "cls" or "patches"
            where the tower has no class token; at the next forward pass, "cls" or "patches" at a
            module without such tokens, and a steering whose width is not that of the hook point.
        RuntimeError: the module, or one that it is part of, is compiled: torch.compile leaves hooks
            out.

        >>> model = clipsteer.load("ViT-B-32", "laion2b_s34b_b79k")
        >>> steering = clipsteer.SAESteering(sae, {123: 50.0})
        >>> with clipsteer.steer(model, {"visual.transformer.resblocks.9": steering}):
        ...     features = model.encode_images(images)
    """
    if not isinstance(steerings, Mapping) or not steerings:
        raise ValueError(
            f"steer: steerings must be a mapping {{hook point: steering}}, got {steerings!r}"
        )
    chosen: dict[str, list[Steering]] = {}
    for pattern, given in steerings.items():
        listed = list(given) if isinstance(given, Sequence) else [given]
        for steering in listed:
            if not isinstance(steering, _KINDS):
                names, got = ", ".join(k.__name__ for k in _KINDS), type(steering).__name__
                raise TypeError(f"steer: {pattern!r} needs one of {names}, got {got}")
        for name in match("steer", model, pattern):
            chosen.setdefault(name, []).extend(listed)
    functions = {}
    for name, listed in chosen.items():
        layout = layout_at(model, name)
        layout.check("steer", [s.tokens for s in listed])
        functions[name] = _compose(listed, layout)
    with ExitStack() as stack:
        stack.enter_context(apply_at(model, functions))
        return SteeringHandle(list(functions), stack.pop_all())
