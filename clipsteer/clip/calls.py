"""Which modules of a model run while hooks stand on some of them, and on what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from clipsteer.clip.axes import Axes, Seen, is_batch_first
from clipsteer.clip.module import WRAPPED

# more channels than that are no pixels
_COLOURS = 4
# they hold modules, and are never called themselves
_LISTS = (nn.ModuleList, nn.ModuleDict)


class Calls:
    """A watch over a model, from ``stand`` to ``end``.

    Args:
        where: the function that messages begin with.
        root: the model.
        groups: what was asked for -> the modules that it stands for. Of each group one at least
            must run where the model does.
    """

    def __init__(self, where: str, root: nn.Module, groups: Mapping[str, Sequence[str]]) -> None:
        self.where = where
        self.root = root
        self.groups = groups
        self.ran: set[str] = set()
        # modules that run now, and what they were given; a name is in front of those inside of it
        self._open: dict[str, Seen | None] = {}
        self.axes = {name: Axes(root, name) for names in groups.values() for name in names}

    def stand(self, stack: ExitStack, hooks: Iterable[tuple[str, Callable[..., Any]]]) -> None:
        """Register forward hooks (module, inputs, output), and those that watch around them, until
        the stack closes."""
        around = dict.fromkeys(["", *_towers(self.root)])
        for name in self.axes:
            parts = name.split(".")
            around |= dict.fromkeys(".".join(parts[:end]) for end in range(len(parts)))
        for name, hook in hooks:
            handle = self.root.get_submodule(name).register_forward_hook(self._noting(name, hook))
            stack.callback(handle.remove)
        for name in around:
            module = self.root.get_submodule(name)
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks
            enter, leave = self._watch(name)
            handle = module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
            # after the hooks above: a module that has one is open while they look
            handle = module.register_forward_hook(leave, always_call=True)
            stack.callback(handle.remove)

    def _watch(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        path = Axes(self.root, name).path if name else [self.root]
        is_outermost = name.rpartition(".")[2] in ("", *WRAPPED)
        axis = 0 if is_batch_first(path) else 1

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.ran.add(name)
            self._open[name] = _seen([*args, *kwargs.values()], axis, is_outermost)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._open.pop(name, None)

        return enter, leave

    def _noting(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def noted(module: nn.Module, args: Any, output: Any) -> Any:
            self.ran.add(name)
            return hook(module, args, output)

        return noted

    def seen(self) -> Seen | None:
        """What the outermost of the modules that run now was given; None where nothing tells."""
        return next((seen for seen in self._open.values() if seen is not None), None)

    def end(self) -> None:
        """Raise ValueError where the model ran and none of a group's modules did."""
        hooked_ran = not self.ran.isdisjoint(self.axes)
        for asked, names in self.groups.items():
            if not self.ran or not self.ran.isdisjoint(names):
                continue
            never = [name for name in names if self._parent(name) in self.ran]
            if hooked_ran and not never:
                continue  # of another tower, which nothing was given to
            which = repr(asked)
            if len(names) > 1:
                which += f", {len(names)} modules,"
            if never:
                raise ValueError(
                    f"{self.where}: the forward pass never calls {which} as a module; choose "
                    f"{self._instead(never[0])}"
                )
            raise ValueError(
                f"{self.where}: {which} did not run, though other parts of the model did; choose "
                "a hook point of the tower that runs"
            )

    def _parent(self, name: str) -> str:
        """The nearest module around it that can be called: lists of modules cannot."""
        path = self.axes[name].path
        parts = name.split(".")
        end = len(parts) - 1
        while end and isinstance(path[end], _LISTS):
            end -= 1
        return ".".join(parts[:end])

    def _instead(self, name: str) -> str:
        module = self.axes[name].module
        if isinstance(module, _LISTS) and len(module):
            return f"a hook point in it, such as '{name}.{next(iter(module._modules))}'"
        parent = self._parent(name)
        return f"{parent!r}, which it is part of, or another hook point" if parent else "another"


def _towers(root: nn.Module) -> Iterator[str]:
    """The modules that a model calls first: those in it, or in what wraps it."""
    for name, child in root.named_children():
        yield name
        if name in WRAPPED:
            yield from (f"{name}.{inner}" for inner in _towers(child))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor) and value.ndim > 1:
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())


def _seen(values: Iterable[Any], axis: int, is_outermost: bool) -> Seen | None:
    """What inputs say of a pass, the batch being an axis of those with three dimensions."""
    tensors = list(_tensors(values))
    batches = [x.shape[axis if x.ndim == 3 else 0] for x in tensors]
    # a whole model may be given texts as well, in another number
    if not batches or (is_outermost and len(set(batches)) > 1):
        return None
    for x in tensors if is_outermost else tensors[:1]:
        if x.ndim == 4 and x.shape[1] <= _COLOURS and x.is_floating_point():
            return Seen(batches[0], (x.shape[2], x.shape[3]))
    return Seen(batches[0], None)
