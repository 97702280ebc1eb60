"""Which axes of a module's output are the batch, the tokens and the channels.

Whatever takes activations sees them as (B, T, d): sequence-first blocks are transposed, feature
maps flattened to (B, H·W, d) wherever their channels stand, pooled outputs (B, d) given one token.
The axes are read from the module itself, from the pixels of the pass, or from what the tower
declares; where none of them tells, the output is refused rather than guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import (
    _AdaptiveAvgPoolNd,
    _AdaptiveMaxPoolNd,
    _AvgPoolNd,
    _LPPoolNd,
    _MaxPoolNd,
)

from clipsteer.clip.tokens import OF_HEADS

# their channels are axis 1, whatever else they do
_FIRST = (
    *(_ConvNd, _NormBase, nn.GroupNorm, nn.LocalResponseNorm, nn.PixelShuffle, nn.Unfold),
    *(_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _LPPoolNd, _MaxPoolNd),
)
_WIDTHS = ("in_channels", "out_channels", "num_channels", "in_features", "out_features")
# formats of timm and transformers by the name of the attribute that holds them
_DECLARED = ("output_fmt", "data_format")
# what timm calls the parts of its mixers that are given (B, d, T)
_TOKEN_MIXERS = {"mlp_tokens", "linear_tokens"}


class Seen(NamedTuple):
    """What is known of the forward pass in which a module runs."""

    batch: int
    size: tuple[int, int] | None  # height and width of the pixels


class Axes:
    """How the outputs of the module called ``name`` are laid out."""

    def __init__(self, root: nn.Module, name: str) -> None:
        self.root = root
        self.name = name
        self.path = [root]  # from the root to the module
        for part in name.split("."):
            self.path.append(getattr(self.path[-1], part))
        self.batch_first = is_batch_first(self.path)
        # by shape of a map: a block that is checkpointed runs again when nothing is known of pixels
        self._found: dict[torch.Size, bool] = {}

    @property
    def module(self) -> nn.Module:
        """The hook point's module."""
        return self.path[-1]

    def order(self, output: Any, seen: Seen | None) -> tuple[int, ...]:
        """The permutation of the output's axes to batch, tokens, channels; of several outputs the
        first counts.

        Raises:
            TypeError: no tensor of 2, 3 or 4 dimensions.
            ValueError: axes that cannot be told, and outputs that are not divided by images, such
                as windows of an attention.
        """
        x = first_of(output)
        if not isinstance(x, Tensor) or x.ndim not in (2, 3, 4):
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"hook point {self.name!r}: expected an output with 2, 3 or 4 dimensions, got {got}"
            )
        if x.ndim == 2:
            return (0, 1)
        if x.ndim == 3:
            order: tuple[int, ...] = (0, 1, 2) if self.batch_first else (1, 0, 2)
            if self._is_channels_first():
                order = (0, 2, 1)
        else:
            shape = x.shape[1:]
            if shape not in self._found:
                self._found[shape] = self._map_is_channels_first(x, seen)
            order = (0, 2, 3, 1) if self._found[shape] else (0, 1, 2, 3)
        if seen is not None and x.shape[order[0]] not in (seen.batch, 1):
            raise ValueError(self._other_batch(x, order[0], seen.batch))
        return order

    def _other_batch(self, x: Tensor, axis: int, batch: int) -> str:
        count = x.shape[axis]
        what = f"hook point {self.name!r}: axis {axis} of its output {tuple(x.shape)}"
        if x.ndim == 3 and x.shape[1 - axis] == batch:
            flag = axis == 1
            return (
                f"{what} is not the batch of {batch}, axis {1 - axis} is: set batch_first = {flag} "
                "on the block that it belongs to"
            )
        why = "windows or patches of the images lie in it as well" if count % batch == 0 else ""
        why = why or "it is not divided by images"
        return (
            f"{what} has {count} rows for a batch of {batch}: {why}; take the block around it as "
            "the hook point"
        )

    def _is_channels_first(self) -> bool:
        """Whether an output with three axes is (B, d, T)."""
        declared = _declared(self.module, 3)
        if declared is not None:
            return declared
        if isinstance(self.module, _FIRST):
            return True
        if isinstance(self.module, nn.Linear) and _is_gate(self.path[-2]):
            return True
        return not _TOKEN_MIXERS.isdisjoint(self.name.split("."))

    def _map_is_channels_first(
        self,
        x: Tensor,  # (B, d, H, W) or (B, H, W, d)
        seen: Seen | None,
    ) -> bool:
        told = _declared(self.module, 4)
        if self.name.rpartition(".")[2] in OF_HEADS:
            told = False
        if told is None:
            told = _of_leaf(self.module, x)
        if told is not None:
            return told
        told = _by_pixels(x, seen)
        for module in reversed(self.path):
            if told is None:
                told = _declared(module, 4)
        if told is None:
            told = self._of_parts(x)
        # what is no width of a layer is no number of channels: attention has maps as well
        if told is None or x.shape[1 if told else 3] not in self._widths():
            shape = tuple(x.shape)
            raise ValueError(
                f"hook point {self.name!r}: it is not known whether axis 1 or axis 3 of its output "
                f"{shape} holds the channels; say so by an attribute of the module, output_fmt = "
                "'NCHW' or 'NHWC', or take another hook point"
            )
        return told

    def _of_parts(self, x: Tensor) -> bool | None:
        """What all layers agree on, of the module or the nearest around it that has some."""
        for module in reversed(self.path):
            found = {_of_leaf(part, None) for part in _layers(module)} - {None}
            if found:
                return found.pop() if len(found) == 1 else None
        return None

    def _widths(self) -> set[int]:
        """The numbers of channels that layers of the model take or give; what has no layers itself
        belongs to those of the module around it."""
        for module in reversed(self.path):
            if any(True for _ in _layers(module)):
                around = self.root if module is self.module else module
                return {width for layer in _layers(around) for width in _widths_of(layer)}
        return set()


def _is_gate(module: nn.Module) -> bool:
    # of a gMLP, which transposes for its product with the tokens alone
    return type(module).__name__ == "SpatialGatingUnit"


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Those whose weights tell where their channels are."""
    for part in module.modules():
        if next(_widths_of(part), None) is not None:
            yield part


def _widths_of(layer: nn.Module) -> Iterator[int]:
    for name in _WIDTHS:
        width = getattr(layer, name, None)
        if isinstance(width, int):
            yield width
    if isinstance(layer, _NormBase):
        yield layer.num_features
    yield from getattr(layer, "normalized_shape", ())


def _of_leaf(module: nn.Module, x: Tensor | None) -> bool | None:
    """Whether channels are axis 1 of a layer's 4-dimensional output; None where its kind does not
    tell."""
    if isinstance(module, _FIRST):
        return True
    if isinstance(module, nn.Linear):
        return False
    normalized = getattr(module, "normalized_shape", None)
    if normalized is None or len(normalized) != 1:
        return None
    if x is not None and (x.shape[1] == normalized[0]) != (x.shape[3] == normalized[0]):
        return x.shape[1] == normalized[0]
    # norms for maps are called so everywhere
    return "2d" in type(module).__name__.lower()


def _declared(module: nn.Module, ndim: int) -> bool | None:
    """Whether a module says that its channels are axis 1, or that they come last."""
    for attribute in _DECLARED:
        name = str(getattr(module, attribute, "")).rpartition(".")[2].upper()
        if name in ("CHANNELS_FIRST", "CHANNELS_LAST"):
            return name == "CHANNELS_FIRST"
        if len(name) == ndim and set(name) in ({*"NHWC"}, {*"NLC"}):
            return name[1] == "C"
    return None


def _by_pixels(x: Tensor, seen: Seen | None) -> bool | None:
    """Which two axes are the image's height and width over a whole stride; None for neither and for
    both."""
    if seen is None or seen.size is None:
        return None
    first = _is_map(seen.size, x.shape[2], x.shape[3])
    last = _is_map(seen.size, x.shape[1], x.shape[2])
    return first if first != last else None


def _is_map(size: tuple[int, int], height: int, width: int) -> bool:
    high, wide = size
    for stride in range(max(high // (height + 1), 1), high // max(height - 1, 1) + 2):
        rounded_down = (high // stride, wide // stride)
        rounded_up = (-(-high // stride), -(-wide // stride))
        if (height, width) in (rounded_down, rounded_up):
            return True
    return False


def is_batch_first(path: list[nn.Module]) -> bool:
    """Layout of the outputs of a path's last module: the innermost around it that has a
    ``batch_first`` says it."""
    *around, module = path
    # a transformer transposes back on its way out; attention alone keeps its own layout to the end
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.batch_first)
    innermost: Any = True
    for parent in around:
        innermost = getattr(parent, "batch_first", innermost)
    return bool(innermost)


def first_of(output: Any) -> Any:
    """What a module gives; of several outputs the first."""
    return output[0] if isinstance(output, tuple | list) else output


def as_tokens(output: Any, order: tuple[int, ...], seen: Seen | None) -> Tensor:
    """A module's output as (B, T, d), with the order that ``Axes`` found. A view where the layout
    allows it; what is the same for every image, such as queries (n, d), has B = 1."""
    x: Tensor = first_of(output)
    if x.ndim == 2:
        is_shared = seen is not None and len(x) != seen.batch
        return x[None] if is_shared else x[:, None]
    if order == (0, 1, 2):
        return x  # itself, so that gradients can be taken in it
    return x.permute(order).flatten(1, -2)


def from_tokens(
    x: Tensor,  # (B, T, d)
    output: Any,
    order: tuple[int, ...],
) -> Any:
    """Undo `as_tokens`: x in the place and layout of a module's output."""
    old: Tensor = first_of(output)
    if old.ndim == 2:
        x = x.reshape(old.shape)
    else:
        middle = [old.shape[axis] for axis in order[1:-1]]
        back = [order.index(axis) for axis in range(old.ndim)]
        x = x.unflatten(1, middle).permute(back)
    if not isinstance(output, tuple | list):
        return x
    parts = (x, *output[1:])
    if hasattr(output, "_fields"):  # a named tuple
        return type(output)(*parts)
    return type(output)(parts)
