"""Hook points by module name: finding them, capturing and editing activations there.

Every function takes what ``clipsteer.load`` returns, or any torch module. Every activation is shown
as (B, T, d), whatever the block's own layout is: sequence-first blocks are transposed, feature maps
(B, C, H, W) flattened to (B, H*W, C), pooled outputs (B, d) given one token.
"""

from __future__ import annotations

import difflib
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clipsteer.clip.module import module_of
from clipsteer.clip.tokens import layout_at

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


def _batch_first(model: nn.Module, name: str) -> bool:
    """Layout of a module's output: the innermost enclosing module that has a `batch_first` says
    it."""
    module = model
    innermost: Any = True
    for part in name.split("."):
        innermost = getattr(module, "batch_first", innermost)
        module = getattr(module, part)
    # a transformer transposes back on its way out; attention alone keeps its own layout to the end
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.batch_first)
    return bool(innermost)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _channels_last(module: nn.Module) -> bool:
    # timm's patch embeddings for images of any size give (B, H, W, C)
    return "NHWC" in str(getattr(module, "output_fmt", ""))


def _as_tokens(name: str, output: Any, batch_first: bool, channels_last: bool) -> Tensor:
    """A module's output as (B, T, d); of several outputs the first counts. A view where the layout
    allows it."""
    x = _first(output)
    if not isinstance(x, Tensor) or x.ndim not in (2, 3, 4):
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"hook point {name!r}: expected an output with 2, 3 or 4 dimensions, got {got}"
        )
    if x.ndim == 2:
        return x[:, None]
    if x.ndim == 4:
        return x.flatten(1, 2) if channels_last else x.flatten(2).transpose(1, 2)
    return x if batch_first else x.transpose(0, 1)


def _from_tokens(
    x: Tensor,  # (B, T, d)
    output: Any,
    batch_first: bool,
    channels_last: bool,
) -> Any:
    """Undo `_as_tokens`: x in the place and layout of a module's output."""
    old = _first(output)
    if old.ndim == 2:
        x = x[:, 0]
    elif old.ndim == 4:
        x = (x if channels_last else x.transpose(1, 2)).reshape(old.shape)
    elif not batch_first:
        x = x.transpose(0, 1)
    if not isinstance(output, tuple | list):
        return x
    parts = (x, *output[1:])
    if hasattr(output, "_fields"):  # a named tuple
        return type(output)(*parts)
    return type(output)(parts)


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
        ValueError: a pattern without a match; in the forward pass, an fn that changes the shape.
        RuntimeError: the module, or one that it is part of, is compiled: torch.compile leaves hooks
            out.
    """
    root = module_of(model)
    with ExitStack() as stack:
        for pattern, fn in functions.items():
            for name in _hook_points("apply_at", root, [pattern]):
                hook = _edit_hook(name, _batch_first(root, name), fn)
                handle = root.get_submodule(name).register_forward_hook(hook)
                stack.callback(handle.remove)
        yield model


def _edit_hook(name: str, batch_first: bool, fn: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = _as_tokens(name, output, batch_first, _channels_last(module))
        y = fn(x)
        if y is x:
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"apply_at: at {name!r} the function must return shape {tuple(x.shape)}, got {got}"
            )
        return _from_tokens(y, output, batch_first, _channels_last(module))

    return hook


@contextmanager
def capture(
    model: Any, patterns: str | Iterable[str], *, detach: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Collect activations while the block runs: yields a dict, module name -> (B, T, d) of its
    latest call.

    Args:
        model: what ``clipsteer.load`` returns, or any module tree.
        patterns: one fnmatch pattern of module names or several.
        detach: cut the tensors from the graph; without it gradients flow through them.

    A module that the forward pass does not call stays absent. Raises ValueError for a pattern
    without a match, and RuntimeError for a module that is compiled or part of one.
    """
    found: dict[str, Tensor] = {}

    def record(name: str, batch_first: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = _as_tokens(name, output, batch_first, _channels_last(module))
            found[name] = x.detach() if detach else x

        return hook

    root = module_of(model)
    names = _hook_points("capture", root, [patterns] if isinstance(patterns, str) else patterns)
    with ExitStack() as stack:
        for name in names:
            hook = record(name, _batch_first(root, name))
            handle = root.get_submodule(name).register_forward_hook(hook)
            stack.callback(handle.remove)
        yield found


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
    model: Any, loader: Iterable[Any], hook_point: str, tokens: str = "all"
) -> Iterator[Tensor]:
    """Activations of one hook point over a loader, batch by batch, without gradients and in eval
    mode.

    Args:
        model: what ``clipsteer.load`` returns, or a module with encode_image and encode_text.
        loader: batches (B, 3, H, W) of preprocessed images, or (B, context) of token ids for the
            text tower; of a tuple or list the first item counts.
        hook_point: one module name, or a pattern that matches exactly one.
        tokens: "all", "cls" (the class token) or "patches" (what follows the class and register
            tokens).

    Yields (N, d) tensors on the model's device, N = B times the tokens kept, image by image.

    Raises:
        ValueError: unknown `tokens`, a hook point that is not one module, that the forward pass
            does not reach, or that has no such tokens.
    """
    root: Any = module_of(model)
    names = match("harvest", root, hook_point)
    if len(names) != 1:
        raise ValueError(
            f"harvest: hook_point must name one module, got {hook_point!r}, which matches "
            f"{len(names)}"
        )
    name = names[0]
    layout = layout_at(root, name)
    layout.check("harvest", [tokens])
    device = next(root.parameters()).device
    dtype = _float_dtype(root)
    for batch in loader:
        x = _first(batch).to(device)
        # the guards are opened per batch: a consumer may stop, or train, between two of them
        with evaluating(root), capture(root, name, detach=True) as found:
            if x.is_floating_point():
                root.encode_image(x.to(dtype))
            else:
                root.encode_text(x)
        if name not in found:
            raise ValueError(
                f"harvest: the forward pass never calls {name!r} as a module; choose another hook "
                f"point"
            )
        acts = found[name]  # (B, T, d)
        kept = acts[:, layout.where("harvest", tokens, acts.shape[1])]
        yield kept.reshape(-1, kept.shape[-1])
