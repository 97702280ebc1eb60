"""Steering: change the residual stream at named hook points, while code runs.

An SAE takes x to x + sd · Σ_i (s_i - f_i(x)) · W_dec[i] over the steered features i, with s_i the
wanted activation and f_i(x) the present one; sd undoes the SAE's input normalisation (Joseph et al.
2025, arXiv 2504.08729). That is decode(f with f_i := s_i) + (x - SAE(x)): whatever the SAE does not
explain stays in place. A conceptor C takes h to β·C(h - μ) + μ, addition to h + β·(m - μ) (Postmus
& Abreu 2024, arXiv 2410.16314). All of it runs in forward hooks; no weight is touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from clipsteer.clip.hooks import beside, edited, match
from clipsteer.clip.tokens import Layout, layout_at
from clipsteer.conceptors.conceptor import Conceptor
from clipsteer.ops._check import what_came
from clipsteer.sae.site import set_features as set_features
from clipsteer.sae.steering import SAESteering as SAESteering
from clipsteer.sae.steering import Tokens as Tokens
from clipsteer.sae.steering import check_finite, check_tokens, check_width

Form = Literal["project", "residual"]


def _check_vector(owner: str, name: str, value: Any, d: int | None = None) -> None:
    is_vector = isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point()
    if not is_vector or d not in (None, len(value)):
        raise ValueError(
            f"{owner}: {name} must be a floating tensor of shape ({d or 'd'},), got "
            f"{what_came(value)}"
        )


@dataclass(frozen=True, eq=False)
class VectorSteering:
    """Add ``strength · vector`` to the activations.

    Args:
        vector: (d,) direction in the space of the hook point, used as it is (not normalised).
        strength: factor; negative steers away.
        tokens: "all", "cls" or "patches", as in ``SAESteering``.

    Raises:
        ValueError: a vector of another shape, a strength that is not finite, unknown ``tokens``.
    """

    vector: Tensor  # (d,)
    strength: float = 1.0
    tokens: Tokens = "all"
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_tokens(self.tokens)
        _check_vector("VectorSteering", "vector", self.vector)
        check_finite("VectorSteering", "strength", self.strength)

    @property
    def width(self) -> tuple[str, int]:
        """What has to fit the activations, and their width."""
        return "the vector", len(self.vector)

    def apply(self, x: Tensor) -> Tensor:
        """(…, d) -> (…, d), every position steered."""
        check_width(*self.width, x)
        return x + beside(self._cache, x, lambda v: self.strength * v, self.vector)


class AdditiveSteering(VectorSteering):
    """``VectorSteering`` by a difference of means: ``beta · (mean - background)`` is added.

    Args:
        mean: (d,) mean activation of the examples of what to steer towards; see ``fit``.
        background: (d,) the same of a generic corpus (mean-centred addition); None for 0 (plain).
        beta: factor; negative steers away.
        tokens: "all", "cls" or "patches", as in ``SAESteering``.

    Raises:
        ValueError: shapes that do not fit, a beta that is not finite, unknown ``tokens``.
    """

    mean: Tensor  # (d,)
    background: Tensor | None  # (d,)

    def __init__(
        self,
        mean: Tensor,  # (d,)
        background: Tensor | None = None,  # (d,)
        beta: float = 1.0,
        tokens: Tokens = "all",
    ) -> None:
        _check_vector("AdditiveSteering", "mean", mean)
        check_finite("AdditiveSteering", "beta", beta)
        vector = mean
        if background is not None:
            _check_vector("AdditiveSteering", "background", background, len(mean))
            vector = mean - background.to(mean)
        super().__init__(vector, beta, tokens)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "background", background)

    @property
    def beta(self) -> float:
        """What the difference of means is multiplied by."""
        return self.strength

    @classmethod
    def fit(
        cls,
        x: Tensor | Iterable[Tensor],  # (…, d)
        background: Tensor | None = None,  # (d,)
        *,
        beta: float = 1.0,
        tokens: Tokens = "all",
    ) -> AdditiveSteering:
        """From activations, or an iterable of batches of them, of what to steer towards.

        Raises ValueError where there is no row.
        """
        total: Tensor | None = None  # (d,)
        count = 0
        for batch in [x] if isinstance(x, Tensor) else x:
            rows = batch.detach().flatten(0, -2).double()
            total = rows.sum(0) if total is None else total + rows.sum(0)
            count += len(rows)
        if total is None or not count:
            raise ValueError("AdditiveSteering: there is no row to take the mean of")
        return cls(total / count, background, beta, tokens)


@dataclass(frozen=True, eq=False)
class ConceptorSteering:
    """Take h to ``beta · C (h - μ) + μ``: keep what the conceptor keeps, soften the rest.

    The form "project" is the paper's as we read it (Postmus & Abreu 2024, arXiv 2410.16314); with
    "residual" h goes to ``beta · C (h - μ) + h``, which its authors' repository applies: nothing is
    taken away, and what the conceptor keeps is made stronger.

    Args:
        conceptor: a single one of the hook point's width, such as ``animals & ~sketch``.
        beta: strength.
        mean: (d,) the μ above; None takes the one that the conceptor was fitted about, 0 if none.
        tokens: "all", "cls" or "patches", as in ``SAESteering``.
        form: "project" or "residual".

    Raises:
        ValueError: a batch, shapes that do not fit, a beta that is not finite, unknown ``tokens``
            or ``form``.
    """

    conceptor: Conceptor
    beta: float = 1.0
    mean: Tensor | None = None  # (d,)
    tokens: Tokens = "all"
    form: Form = "project"
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_tokens(self.tokens)
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
        check_finite("ConceptorSteering", "beta", self.beta)
        if self.form not in get_args(Form):
            raise ValueError(
                f"ConceptorSteering: form must be 'project' or 'residual', got {self.form!r}"
            )

    @property
    def width(self) -> tuple[str, int]:
        """What has to fit the activations, and their width."""
        return "the conceptor", self.conceptor.d

    def apply(self, x: Tensor) -> Tensor:
        """(…, d) -> (…, d), every position steered, in x's dtype."""
        check_width(*self.width, x)
        mean = self.conceptor.mean if self.mean is None else self.mean
        if mean is not None:
            mean = beside(self._cache, x, lambda m: m, mean)
        # under autocast too: rounding βC(x - μ) + μ would round all of the residual stream
        kind = x.device.type
        active = kind != "meta" and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if active else nullcontext():
            steered = self.conceptor.project(x, beta=self.beta, mean=mean)
            if self.form == "project":
                return steered
            return x + (steered if mean is None else steered - mean)


Steering = SAESteering | VectorSteering | ConceptorSteering
_KINDS = (SAESteering, VectorSteering, ConceptorSteering)


def _positions(
    steering: Steering,
    x: Tensor,  # (B, T, d)
    layout: Layout,
) -> Tensor:
    """Steer the positions that ``steering.tokens`` names; the others keep their bits."""
    where = layout.where("steer", steering.tokens, x.shape[1])
    check_width(*steering.width, x, repr(layout.hook_point))
    if steering.tokens == "all":
        return steering.apply(x)
    parts = [x[:, : where.start], steering.apply(x[:, where])]
    if where.stop is not None:
        parts.append(x[:, where.stop :])
    return torch.cat(parts, dim=1)


def _compose(steerings: Sequence[Steering], layout: Layout) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        for steering in steerings:
            x = _positions(steering, x, layout)
        return x

    return apply


class SteeringHandle:
    """What ``steer`` returns: ``hook_points``, which are steered until ``remove()`` is called or
    a ``with`` block is left."""

    def __init__(self, hook_points: list[str], stack: ExitStack) -> None:
        self.hook_points = hook_points
        self._stack = stack

    def remove(self) -> None:
        """Steer no more; twice is fine.

        Raises ValueError, without steering any longer, where the model ran and a module to be
        steered was never called.
        """
        # an error that is on its way goes first
        self._stack.__exit__(*sys.exc_info())

    def __enter__(self) -> SteeringHandle:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.__exit__(*exc_info)


def steer(model: Any, steerings: Mapping[str, Steering | Sequence[Steering]]) -> SteeringHandle:
    """Steer ``model`` at any number of hook points, from this call until the handle is removed.

        model = clipsteer.load("ViT-B-32", "laion2b_s34b_b79k")
        steering = clipsteer.SAESteering(sae, {123: 50.0})
        with clipsteer.steer(model, {"visual.transformer.resblocks.9": steering}):
            features = model.encode_images(images)
        with clipsteer.steer(model, {"visual.transformer.resblocks.[6-9]": steering}):
            features = model.encode_images(images)  # the same at four blocks

    Args:
        model: what ``clipsteer.load`` returns, or a module whose named modules give (B, T, d).
        steerings: hook point -> one steering or a list of them, applied in order. A hook point is a
            plain module name or an fnmatch pattern, such as "visual.transformer.resblocks.[6-9]";
            "*" also crosses dots, so that "resblocks.*" takes what is inside of the blocks as well.

    Returns:
        a ``SteeringHandle``: use it in a ``with`` statement, or keep it and call ``remove()``.

    Raises:
        ValueError: a pattern that matches no module (near matches are named), "cls" or "patches"
            where the tower has no class token; at the next forward pass, "cls" or "patches" at a
            module without such tokens, and a steering whose width is not that of the hook point;
            when steering ends, a hook point that the forward pass never called.
        RuntimeError: the module, or one that it is part of, is compiled: torch.compile leaves hooks
            out.
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
                names = ", ".join(kind.__name__ for kind in _KINDS)
                got = type(steering).__name__
                raise TypeError(f"steer: {pattern!r} needs one of {names}, got {got}")
        for name in match("steer", model, pattern):
            chosen.setdefault(name, []).extend(listed)
    functions = {}
    for name, listed in chosen.items():
        layout = layout_at(model, name)
        layout.check("steer", [s.tokens for s in listed])
        functions[name] = _compose(listed, layout)
    with ExitStack() as stack:
        stack.enter_context(edited("steer", model, functions))
        return SteeringHandle(list(functions), stack.pop_all())
