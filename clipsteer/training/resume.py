"""What a resumed run asks of a checkpoint before it takes anything from it."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipsteer.io.checkpoint import Checkpoint
from clipsteer.io.files import FileFormatError
from clipsteer.io.layout import Layout, Spec
from clipsteer.training.settings import other_data
from clipsteer.training.spread import scatter
from clipsteer.training.world import World

logger = logging.getLogger(__name__)

_OPTIMIZER = "optimizer."
# names of squares, as torch's optimizers call them
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq")
_PROBE = (2, 3)


def _state_of(optimizer: torch.optim.Optimizer, like: Tensor) -> dict[str, Tensor]:
    """What a step of such an optimizer keeps of a parameter (2, 3) like this one."""
    weight = nn.Parameter(torch.zeros(_PROBE, dtype=like.dtype, device=like.device))
    weight.grad = torch.zeros_like(weight)
    probe = copy.copy(optimizer)
    probe.state = defaultdict(dict)
    probe.param_groups = [{**optimizer.param_groups[0], "params": [weight]}]
    probe.step()
    return {key: value for key, value in probe.state[weight].items() if value is not None}


def optimizer_layout(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> Layout:
    """What the optimizer's state of each parameter must be; a parameter without a gradient so far
    has none."""
    kinds: dict[Any, dict[str, Tensor]] = {}
    found: Layout = {}
    for name, parameter in parameters.items():
        kind = (parameter.dtype, parameter.device)
        if kind not in kinds:
            kinds[kind] = _state_of(optimizer, parameter)
        for key, value in kinds[kind].items():
            is_like = value.shape == _PROBE
            spec = Spec(value.dtype, tuple(parameter.shape if is_like else value.shape))
            # a square may overflow, its root then divides by infinity and nothing moves
            if key in _SQUARES:
                spec = spec._replace(least=0.0, most=torch.inf)
            elif key == "step":
                spec = spec._replace(least=1.0)
            found[f"{_OPTIMIZER}{key}.{name}"] = spec._replace(optional=True)
    return found


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], list[str]]:
    """The optimizer's state by name, and the parameters that have none."""
    found = {}
    without = []
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        tensors = {key: value for key, value in state.items() if value is not None}
        if not tensors:
            without.append(name)
        for key, value in tensors.items():
            found[f"{_OPTIMIZER}{key}.{name}"] = value
    return found, without


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(_OPTIMIZER):
            _, key, parameter = name.split(".", 2)
            states.setdefault(parameter, {})[key] = value
    return states


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Undo `optimizer_tensors`; the tensors are known to be right."""
    for name, state in _by_parameter(tensors).items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            key: value.cpu() if key == "step" else strided_like(parameter, value)
            for key, value in state.items()
        }


def strided_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of ``value`` with the strides of ``parameter``: a fused optimizer walks through both
    in the order of memory."""
    return torch.zeros_like(parameter, dtype=value.dtype).copy_(value)


def check_optimizer(found: Checkpoint, layout: Layout, parameters: Iterable[str]) -> None:
    """Raise FileFormatError unless each parameter has all of its state, or none and is known to
    have none."""
    wanted: dict[str, set[str]] = {}
    for name in layout:
        if name.startswith(_OPTIMIZER):
            _, key, parameter = name.split(".", 2)
            wanted.setdefault(parameter, set()).add(key)
    states = _by_parameter(found.tensors)
    without = None  # unknown to older versions
    if "without state" in found.meta:
        without = entry(found, "without state", list)
        known = list(parameters)
        if strange := [name for name in without if name not in known]:
            raise FileFormatError(
                f"{found.meta_path}: 'without state' must name parameters, got {strange[0]!r:.80}"
            )
    for parameter, keys in wanted.items():
        state = states.get(parameter, {})
        lacks = keys - state.keys()
        expects_none = not state if without is None else parameter in without
        if (lacks and not expects_none) or (state and expects_none):
            raise FileFormatError(
                f"{found.tensors_path}: the optimizer's state of {parameter!r} must be "
                f"{sorted(keys)}, got {sorted(state)}"
            )
        if "step" in state and not bool(state["step"] <= found.step):
            steps = float(state["step"])
            raise FileFormatError(
                f"{found.tensors_path}: '{_OPTIMIZER}step.{parameter}' is {steps:g} at step "
                f"{found.step}"
            )


def check_generator(path: Path, name: str, state: Tensor, device: torch.device | str) -> None:
    """Raise FileFormatError where ``state`` is none of a random generator of the device."""
    try:
        torch.Generator(device).set_state(state.cpu())
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise FileFormatError(f"{path}: {name!r} is no generator's state: {reason}") from None


def entry(found: Checkpoint, name: str, kind: type) -> Any:
    """What a checkpoint's index says under a name; FileFormatError unless it is of this kind."""
    value = found.meta.get(name)
    if not isinstance(value, kind):
        raise FileFormatError(
            f"{found.meta_path}: {name!r} must be a JSON {kind.__name__}, got {value!r:.80}"
        )
    return value


def check_same_data(
    name: str, folder: Path, there: Mapping[str, Any] | None, here: Mapping[str, Any] | None
) -> None:
    """Raise ValueError where `folder` holds a run on other data.

    Both are identities of data, such as `clipsteer.data.identity_of` gives; None where nothing is
    known. A run of a version that noted none goes on with a warning.
    """
    if here is None:
        return
    if there is None:
        logger.warning(
            "%s: %s holds a run of a version that did not note its data; that they are the same "
            "is not checked",
            name,
            folder,
        )
        return
    reason = other_data(there, here)
    if reason is not None:
        raise ValueError(
            f"{name}: {folder} holds a run on other data ({reason}); use another folder"
        )


def shared(
    world: World,
    found: Checkpoint | None,
    error: Exception | None,
    spread: Collection[str] = (),
) -> Checkpoint | None:
    """What rank 0 found, in every process; so is its error. Of the tensors of these names every
    process gets its part of the rows."""
    shapes: dict[str, Any] = {}
    if found is not None:
        for name, tensor in found.tensors.items():
            shapes[name] = [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
    step = -1 if found is None else found.step
    refusal = None if error is None else [isinstance(error, FileFormatError), str(error)]
    step, shapes, refusal = world.broadcast_json([step, shapes, refusal])
    if error is not None:
        raise error
    if refusal is not None:
        is_format, text = refusal
        raise FileFormatError(text) if is_format else ValueError(text)
    if step < 0:
        return None
    tensors = {}
    for name, (shape, dtype) in shapes.items():
        if name in spread:
            rows, *others = shape
            part = torch.empty(
                (rows // world.size, *others), dtype=getattr(torch, dtype), device=world.device
            )
            whole = None if found is None else found.tensors[name]
            tensors[name] = scatter(whole, part, world)
            continue
        if found is not None:
            tensor = found.tensors[name].to(world.device)
        else:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=world.device)
        tensors[name] = world.broadcast_(tensor)
    return Checkpoint(step, tensors, {})
