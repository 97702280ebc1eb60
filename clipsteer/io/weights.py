"""Named tensors to read piece by piece: safetensors files, shards, torch files, modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipsteer.io.doors import door
from clipsteer.io.files import (
    FileFormatError,
    open_regular,
    read_json,
    read_safetensors_header,
    tensor_bytes,
)
from clipsteer.io.messages import naming
from clipsteer.io.torch_files import check_npz, read_torch_weights_only

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

Weights = str | Path | nn.Module | Mapping[str, Tensor]

_FOLDER = (
    "model.safetensors.index.json",
    "open_clip_model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
# under which a checkpoint holds its state dict
_UNDER = ("state_dict", "model", "model_state_dict")
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")
# whose settings stand beside the weights of many training scripts
_STAND_INS = ("argparse",)


class Entry(NamedTuple):
    """A tensor that need not be in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]  # elements [start, stop) as a flat tensor


class Source(NamedTuple):
    """The tensors of one model, what to call it in a message, and what the file's header says."""

    where: str
    entries: dict[str, Entry]
    metadata: Mapping[str, str] = {}


@door
def open_weights(argument: str, weights: Weights, stack: ExitStack) -> Source:
    """The tensors of what `wise_ft` was given as `argument`; files stay open until the stack
    closes.

    Raises:
        TypeError, ValueError: what cannot be weights. FileNotFoundError. FileFormatError: a damaged
            file, or one that holds something else.
    """
    if isinstance(weights, nn.Module):
        return Source(argument, _tensors(argument, weights.state_dict()))
    if isinstance(weights, Mapping):
        return Source(argument, _tensors(argument, weights))
    if not isinstance(weights, (str, Path)):
        raise TypeError(
            f"wise_ft: {argument} must be a path, a state dict or a module, got "
            f"{type(weights).__name__}"
        )
    path = Path(weights)
    if path.is_dir():
        found = next((path / name for name in _FOLDER if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path}: no weights in it; looked for {', '.join(_FOLDER)}")
        path = found
    if path.name.endswith(".index.json"):
        return _plain(_shards(path, stack))
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"wise_ft: {argument} must be .safetensors, .index.json, .pt, .pth or .bin, got {path}"
        )
    return _plain(_file(path, stack))


def check_weights_file(path: str | Path) -> None:
    """Raise FileFormatError where reading a weights file would take much more memory than it has
    bytes, or run what is in it: for files that another library then reads.

    Takes what open_clip takes: safetensors, torch.save's formats, numpy's.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        read_safetensors_header(path)
    elif path.suffix == ".npz":
        check_npz(path)
    elif path.suffix == ".npy":
        open_regular(path)[0].close()
    else:
        read_torch_weights_only(path, before_archives=True)


def _file(path: Path, stack: ExitStack) -> Source:
    if path.suffix == ".safetensors":
        return _safetensors(path, stack)
    value = read_torch_weights_only(path, stand_in_modules=_STAND_INS)
    if isinstance(value, dict):
        value = next((value[k] for k in _UNDER if isinstance(value.get(k), dict)), value)
    if not isinstance(value, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()
    ):
        raise FileFormatError(
            f"{path}: not a state dict, nor a checkpoint with one under "
            f"{', '.join(map(repr, _UNDER))}"
        )
    try:
        return Source(str(path), _tensors(str(path), value))
    except TypeError as error:
        raise FileFormatError(str(error)) from None


def _plain(source: Source) -> Source:
    """Names as the model itself has them: torch.compile puts a part of its own into them, and
    DistributedDataParallel one in front of all."""
    plain = {_COMPILED.sub("", name): entry for name, entry in source.entries.items()}
    if len(plain) != len(source.entries):
        return source
    while plain and all(name.startswith("module.") for name in plain):
        plain = {name[7:]: entry for name, entry in plain.items()}
    return source._replace(entries=plain)


def _tensors(where: str, weights: Mapping[str, Tensor]) -> dict[str, Entry]:
    def entry(name: str, tensor: Any) -> Entry:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_complex():
            got = type(tensor).__name__
            if isinstance(tensor, Tensor):
                got = f"{tensor.layout} {tensor.dtype}"
            raise TypeError(f"wise_ft: {where}: {name!r} must be a dense real tensor, got {got}")
        if tensor.is_meta:
            raise TypeError(f"wise_ft: {where}: {name!r} is on meta, where it has no values")
        if tensor.is_quantized or (tensor.is_floating_point() and tensor.dtype.itemsize < 2):
            raise TypeError(
                f"wise_ft: {where}: {name!r} is {tensor.dtype}; float16, bfloat16, float32 and "
                f"float64 can be averaged"
            )
        flat = tensor.detach().reshape(-1)
        return Entry(tensor.dtype, tuple(tensor.shape), lambda start, stop: flat[start:stop])

    return {name: entry(name, tensor) for name, tensor in weights.items()}


def _safetensors(path: Path, stack: ExitStack) -> Source:
    header = read_safetensors_header(path)
    file = stack.enter_context(path.open("rb", buffering=0))

    def reader(name: str, dtype: torch.dtype, begin: int) -> Callable[[int, int], Tensor]:
        def read(start: int, stop: int) -> Tensor:
            piece = torch.empty(stop - start, dtype=dtype)
            file.seek(begin + start * dtype.itemsize)
            rest = tensor_bytes(piece)
            while rest:
                with naming(path):
                    count = file.readinto(rest)
                if not count:
                    raise FileFormatError(f"{path}: ends inside the data of {name!r}")
                rest = rest[count:]
            return piece

        return read

    found = {}
    for name, dtype, shape, begin, _ in header.entries:
        found[name] = Entry(dtype, shape, reader(name, dtype, header.start + begin))
    return Source(str(path), found, header.metadata)


def _shards(index: Path, stack: ExitStack) -> Source:
    value = read_json(index)
    places = value.get("weight_map") if isinstance(value, dict) else None
    named = isinstance(places, dict) and all(isinstance(file, str) for file in places.values())
    if not named or not places:
        raise FileFormatError(f"{index}: expected a weight_map from tensor names to file names")
    files = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or Path(name).suffix not in _SUFFIXES:
            raise FileFormatError(
                f"{index}: shard {name!r:.200} is not a file of weights beside the index"
            )
        files[name] = _file(index.parent / name, stack)
    if lost := [name for name, file in places.items() if name not in files[file].entries]:
        raise FileFormatError(f"{index}: its shards lack {some(lost)}")
    entries = {name: files[file].entries[name] for name, file in places.items()}
    metadata: dict[str, str] = {}
    for file in files.values():
        metadata.update(file.metadata)
    return Source(str(index), entries, metadata)


def some(items: Sequence[str], limit: int = 8) -> str:
    """The first names of a list, for a message."""
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest
