"""Hook points by module name: finding them, capturing and editing activations there.

Every function takes what ``clipsteer.load`` returns, or any torch module. Every activation is shown
as (B, T, d), whatever the block's own layout is (``clipsteer.clip.axes``).
"""

from __future__ import annotations

import difflib
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clipsteer.clip.axes import Axes, as_tokens, first_of, from_tokens
from clipsteer.clip.calls import Calls
from clipsteer.clip.module import module_of
from clipsteer.clip.shortcut import Shortcut
from clipsteer.clip.tokens import Layout, layout_at

logger = logging.getLogger(__name__)

Model = TypeVar("Model")


def beside(
    cache: dict[Any, Any], x: Tensor, make: Callable[..., Tensor], *sources: Tensor
) -> Tensor:
    """``make(*sources)`` in x's dtype on x's device.

    If a source is on another device, the result is kept in ``cache`` until a source is changed:
    copying it anew would stop the host in every pass, and cannot be captured in a CUDA graph.
    Sources that need a gradient are never cached.
    """
    if all(s.device == x.device for s in sources) or any(s.requires_grad for s in sources):
        return make(*sources).to(x)
    key = ("beside", x.dtype, x.device)
    state = [(id(s), None if s.is_inference() else s._version) for s in sources]
    found = cache.get(key)
    if found is None or found[0] != state:
        # a tensor made under inference_mode could not be saved for a later backward pass
        with torch.inference_mode(False):
            # the sources are held, so that their ids are not given away
            cache[key] = found = (state, make(*sources).to(x), sources)
    return found[1]


def hook_points(model: Any, pattern: str = "*") -> list[str]:
    """Names of the model's modules that match an fnmatch pattern, in the model's order ("*" also
    crosses dots). model: what ``clipsteer.load`` returns, or a module."""
    modules = module_of(model).named_modules()
    return [name for name, _ in modules if name and fnmatchcase(name, pattern)]


def match(where: str, model: Any, pattern: str) -> list[str]:
    """`hook_points`, of which there must be one. Raises ValueError, with `where` in front."""
    names = hook_points(model, pattern)
    if not names:
        near = difflib.get_close_matches(pattern, hook_points(model), n=3)
        hint = f"; near matches: {', '.join(near)}" if near else ""
        raise ValueError(f"{where}: no module of the model matches hook point {pattern!r}{hint}")
    return names


_REMEDY = (
    "steer the model that is not compiled, or set "
    "torch._dynamo.config.skip_nnmodule_hook_guards = False before it is compiled"
)


def _hook_points(where: str, model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """The modules that patterns match, each once. Raises where a compiled module would run without
    their hooks."""
    names = list(
        dict.fromkeys(name for pattern in patterns for name in match(where, model, pattern))
    )
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not dynamo.config.skip_nnmodule_hook_guards:
        return names
    for name in names:
        parts = name.split(".")
        for end in range(len(parts) + 1):
            module = model.get_submodule(".".join(parts[:end]))
            # hooks on the wrapper itself run outside of the compiled code
            wrapper = isinstance(module, dynamo.eval_frame.OptimizedModule) and end < len(parts)
            if wrapper or getattr(module, "_compiled_call_impl", None) is not None:
                compiled = f"{'.'.join(parts[:end])!r}" if end else "the model"
                raise RuntimeError(
                    f"{where}: {compiled} is compiled, and torch.compile takes no notice of hooks "
                    f"such as the one at {name!r}; {_REMEDY}"
                )
    if dynamo.utils.counters["frames"]["ok"]:
        _warn_of_compilation(where)
    return names


@functools.cache
def _warn_of_compilation(where: str) -> None:
    # a module does not know what was compiled around it, so this cannot be an error
    logger.warning(
        "%s: code that was compiled and calls this model leaves hooks out: %s", where, _REMEDY
    )


@contextmanager
def apply_at(model: Model, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[Model]:
    """Replace activations x by fn(x) at hook points while the block runs.

    Args:
        model: what ``clipsteer.load`` returns, or any module tree.
        functions: fnmatch pattern of module names -> fn, (B, T, d) -> (B, T, d). Where several
            patterns match a module, theirs are applied in the order given.

    Yields the model. The hooks are gone afterwards, also after an error; weights are never touched,
    and an fn that returns its argument leaves every output bit-identical.

    Raises:
        ValueError: a pattern without a match, or one that matches no module that ran, though the
            model did, when the block ends; in the forward pass, an fn that changes the shape, and
            an output that cannot be shown as (B, T, d), such as windows of several images.
        RuntimeError: the module, or one that it is part of, is compiled: torch.compile leaves hooks
            out.
    """
    with edited("apply_at", model, functions):
        yield model


@contextmanager
def edited(
    where: str, model: Any, functions: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """`apply_at`, with `where` in front of its messages."""
    root = module_of(model)
    groups = {pattern: _hook_points(where, root, [pattern]) for pattern in functions}
    calls = Calls(where, root, groups)
    hooks = []
    for pattern, fn in functions.items():
        hooks += [(name, _edit_hook(where, calls, name, fn)) for name in groups[pattern]]
    with ExitStack() as stack:
        calls.stand(stack, hooks)
        yield
        calls.end()


def _edit_hook(
    where: str, calls: Calls, name: str, fn: Callable[[Tensor], Tensor]
) -> Callable[..., Any]:
    axes = calls.axes[name]

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        seen = calls.seen()
        order = axes.order(output, seen)
        x = as_tokens(output, order, seen)
        y = fn(x)
        if y is x:
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"{where}: at {name!r} the function must return shape {tuple(x.shape)}, got {got}"
            )
        return from_tokens(y, output, order)

    return hook


@contextmanager
def capture(
    model: Any, patterns: str | Iterable[str], *, detach: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Collect activations while the block runs: yields a dict, module name -> (B, T, d) of its
    latest call. What is the same for every image, such as learnt queries, has B = 1.

    Args:
        model: what ``clipsteer.load`` returns, or any module tree.
        patterns: one fnmatch pattern of module names or several.
        detach: cut the tensors from the graph; without it gradients flow through them.

    Of a pattern that matches several modules, those that the forward pass does not call, and those
    whose outputs cannot be shown as (B, T, d), stay absent.

    Raises:
        ValueError: a pattern without a match, or one that matches no module that ran, though the
            model did, when the block ends; in the forward pass, an output that cannot be shown as
            (B, T, d), such as windows of several images, of a single module.
        RuntimeError: the module, or one that it is part of, is compiled.
    """
    with captured("capture", model, patterns, detach=detach) as found:
        yield found


@contextmanager
def captured(
    where: str,
    model: Any,
    patterns: str | Iterable[str],
    *,
    detach: bool = False,
    shortcut: Shortcut | None = None,
) -> Iterator[dict[str, Tensor]]:
    """`capture`, with `where` in front of its messages, of a pass that takes a shortcut."""
    found: dict[str, Tensor] = {}
    root = module_of(model)
    listed = [patterns] if isinstance(patterns, str) else patterns
    groups = {pattern: _hook_points(where, root, [pattern]) for pattern in listed}
    calls = Calls(where, root, groups)
    alone = {names[0] for names in groups.values() if len(names) == 1}

    def record(name: str, axes: Axes) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen = calls.seen()
            try:
                x = as_tokens(output, axes.order(output, seen), seen)
            except (TypeError, ValueError):
                if name in alone:
                    raise
                found.pop(name, None)
                return
            found[name] = x.detach() if detach else x
            if shortcut is not None:
                shortcut.called()

        return hook

    with ExitStack() as stack:
        if shortcut is not None:
            stack.enter_context(shortcut.taken())
        calls.stand(stack, [(name, record(name, axes)) for name, axes in calls.axes.items()])
        yield found
        calls.end()


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """No gradients and evaluation mode; the modes come back afterwards, also on error."""
    roots = [module_of(model) for model in models]
    modes = [(module, module.training) for root in roots for module in root.modules()]
    for root in roots:
        root.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _float_dtype(model: nn.Module) -> torch.dtype:
    tower = getattr(model, "visual", model)
    return next(
        (p.dtype for p in tower.parameters() if p.is_floating_point() and p.ndim > 1), torch.float32
    )


def harvest(
    model: Any,
    loader: Iterable[Any],
    hook_point: str,
    tokens: str = "all",
    *,
    shortcut: Shortcut | None = None,
) -> Iterator[Tensor]:
    """Activations of one hook point over a loader, batch by batch, without gradients and in eval
    mode. Passes end at the hook point: of each shape of images the first one alone runs whole.

    Args:
        model: what ``clipsteer.load`` returns, or a module with encode_image and encode_text
            (transformers: get_image_features, get_text_features), or one that is called itself.
        loader: batches (B, 3, H, W) of preprocessed images, or (B, context) of token ids for the
            text tower; of a tuple or list the first item counts.
        hook_point: one module name, or a pattern that matches exactly one.
        tokens: "all", "cls" (the class token) or "patches" (what follows the class and register
            tokens).
        shortcut: of another harvest of the same hook point, whose first pass ran whole.

    Yields (N, d) tensors on the model's device, N = B times the tokens kept, image by image.

    Raises:
        ValueError: unknown `tokens`, a hook point that is not one module, that the forward pass
            does not reach, or that has no such tokens.
    """
    for (rows,) in harvest_each(model, loader, [hook_point], tokens, shortcut=shortcut):
        yield rows


def harvest_each(
    model: Any,
    loader: Iterable[Any],
    hook_points: Sequence[str],
    tokens: str = "all",
    *,
    shortcut: Shortcut | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """`harvest` of several hook points in one pass: a tensor (N, d) of each, in their order."""
    root: Any = module_of(model)
    layouts: list[tuple[str, Layout]] = []
    for hook_point in hook_points:
        names = match("harvest", root, hook_point)
        if len(names) != 1:
            raise ValueError(
                f"harvest: hook_point must name one module, got {hook_point!r}, which matches "
                f"{len(names)}"
            )
        layout = layout_at(root, names[0])
        layout.check("harvest", [tokens])
        layouts.append((names[0], layout))
    device = next(root.parameters()).device
    dtype = _float_dtype(root)
    shortcut = shortcut or Shortcut(root)
    every = [name for name, _ in layouts]
    for batch in loader:
        x = first_of(batch).to(device)
        # the guards are opened per batch: a consumer may stop, or train, between two of them
        shortcut.next(x)
        watch = captured("harvest", root, every, detach=True, shortcut=shortcut)
        with evaluating(root), watch as found:
            if x.is_floating_point():
                _encoder(root, "image")(x.to(dtype))
            else:
                _encoder(root, "text")(x)
        parts = []
        for name, layout in layouts:
            if name not in found:
                raise ValueError(
                    f"harvest: the forward pass never calls {name!r} as a module; choose another "
                    f"hook point"
                )
            acts = found[name]  # (B, T, d)
            if len(acts) != len(x):
                raise ValueError(
                    f"harvest: {name!r} gives {tuple(acts.shape)} for {len(x)} images, the same "
                    "for all of them; choose another hook point"
                )
            kept = acts[:, layout.where("harvest", tokens, acts.shape[1])]
            parts.append(kept.reshape(-1, kept.shape[-1]))
        yield tuple(parts)


def _encoder(root: Any, kind: str) -> Callable[[Tensor], Any]:
    """What runs a tower: as open_clip calls it, as transformers does, or the module itself."""
    for name in (f"encode_{kind}", f"get_{kind}_features"):
        if hasattr(root, name):
            return getattr(root, name)
    return root
