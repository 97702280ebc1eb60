"""WiSE-FT: a zero-shot and a fine-tuned model averaged in weight space, theta(a) = (1-a)*theta_zs + a*theta_ft.

Source: Wortsman et al. 2022 (arXiv 2109.01903), section 3. Files are streamed piece by piece, in a few MiB of memory,
whatever the size of a model or of its tensors.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from clipsteer._files import (
    FileFormatError,
    read_json,
    read_safetensors_header,
    read_torch_weights_only,
    safetensors_layout,
    tensor_bytes,
    write_atomically,
)

logger = logging.getLogger(__name__)

Weights = str | Path | nn.Module | Mapping[str, Tensor]
Alpha = float | Mapping[str, float]

# elements a piece: few calls, and what is made of it still stays in cache
_PIECE = 1 << 18
_FOLDER = (
    "model.safetensors.index.json", "open_clip_model.safetensors.index.json", "model.safetensors",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin",
)  # fmt: skip
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def wise_ft(
    zeroshot: Weights,
    finetuned: Weights,
    alpha: Alpha | Sequence[Alpha] = 0.5,
    out: str | Path | Sequence[str | Path] | None = None,
) -> Any:
    """Average a zero-shot and a fine-tuned model: theta = (1-alpha)*zeroshot + alpha*finetuned.

    Args:
        zeroshot, finetuned: each a .safetensors file, an index of shards (``*.safetensors.index.json``), a folder that
            holds one of these (transformers' and open_clip's names), a ``.pt``/``.bin`` file of weights alone, a state
            dict or a module. Names, shapes and dtypes must be the same.
        alpha: 0 is zero-shot, 1 fine-tuned. A mapping of fnmatch patterns to numbers sets it by tensor: the first
            pattern that matches counts, and every tensor needs one. A list gives a result each, in one pass.
        out: the ``.safetensors`` file to write, also for sharded input; a list of alphas takes as many files, or one
            name with ``{alpha}`` in it. Without it the result stays in memory.

    Returns:
        The path written; without `out` a state dict, or, of two modules, a copy of the first with the new weights. A
        list of alphas gives a list.

    float16, bfloat16 and float32 are averaged in float32, float64 in float64, and the dtype is kept. Every value lies
    between its two ends; where these agree in every bit, so does the result. alpha = 0 and 1 copy their model bit for
    bit, integers and booleans too; at other alphas those are taken from `zeroshot` and a warning names the ones that
    differ. Writing needs a few MiB of memory, and `out` appears only once it is whole.

    Raises:
        ValueError: models that do not match, with a list of what differs; alpha outside [0, 1]; a name in `out`.
        FileFormatError: a damaged file. FileNotFoundError: no such file, or a folder without weights.

    Source: Wortsman et al. 2022 (arXiv 2109.01903).
    """
    several = not isinstance(alpha, (int, float, Mapping))
    alphas = list(alpha) if several else [alpha]
    paths = None if out is None else _paths(out, alphas, several)
    with ExitStack() as stack, torch.no_grad():
        sources = [_open(name, w, stack) for name, w in (("zeroshot", zeroshot), ("finetuned", finetuned))]
        _check_same(*sources)
        by_tensor = [_resolve(a, sources[0].entries) for a in alphas]
        if paths is None:
            results: list[Any] = [_in_memory(*sources, chosen) for chosen in by_tensor]
            if isinstance(zeroshot, nn.Module) and isinstance(finetuned, nn.Module):
                results = [_with_weights(zeroshot, weights) for weights in results]
        else:
            _stream(*sources, by_tensor, paths, alphas)
            results = paths
    return results if several else results[0]


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]  # elements [start, stop) as a flat tensor


class _Source(NamedTuple):
    where: str
    entries: dict[str, _Entry]


def _open(argument: str, weights: Weights, stack: ExitStack) -> _Source:
    if isinstance(weights, nn.Module):
        return _Source(argument, _tensors(argument, weights.state_dict()))
    if isinstance(weights, Mapping):
        return _Source(argument, _tensors(argument, weights))
    if not isinstance(weights, (str, Path)):
        raise TypeError(f"wise_ft: {argument} must be a path, a state dict or a module, got {type(weights).__name__}")
    path = Path(weights)
    if path.is_dir():
        found = next((path / name for name in _FOLDER if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path}: no weights in it; looked for {', '.join(_FOLDER)}")
        path = found
    if path.name.endswith(".index.json"):
        return _Source(str(path), _shards(path, stack))
    if path.suffix == ".safetensors":
        return _Source(str(path), _file(path, stack))
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(f"wise_ft: {argument} must be .safetensors, .index.json, .pt, .pth or .bin, got {path}")
    value = read_torch_weights_only(path)
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
        raise FileFormatError(f"{path}: not a state dict, nor a checkpoint with one under 'state_dict'")
    if value and all(name.startswith("module.") for name in value):  # as DistributedDataParallel saves it
        value = {name[7:]: tensor for name, tensor in value.items()}
    return _Source(str(path), _tensors(str(path), value))


def _tensors(where: str, weights: Mapping[str, Tensor]) -> dict[str, _Entry]:
    def entry(name: str, tensor: Any) -> _Entry:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_complex():
            got = f"{tensor.layout} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"wise_ft: {where}: {name!r} must be a dense real tensor, got {got}")
        flat = tensor.detach().reshape(-1)
        return _Entry(tensor.dtype, tuple(tensor.shape), lambda start, stop: flat[start:stop])

    return {name: entry(name, tensor) for name, tensor in weights.items()}


def _file(path: Path, stack: ExitStack) -> dict[str, _Entry]:
    header = read_safetensors_header(path)
    file = stack.enter_context(path.open("rb", buffering=0))

    def reader(name: str, dtype: torch.dtype, begin: int) -> Callable[[int, int], Tensor]:
        def read(start: int, stop: int) -> Tensor:
            piece = torch.empty(stop - start, dtype=dtype)
            file.seek(begin + start * dtype.itemsize)
            rest = memoryview(piece.view(torch.uint8).numpy()) if len(piece) else memoryview(b"")
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise FileFormatError(f"{path}: ends inside the data of {name!r}")
                rest = rest[count:]
            return piece

        return read

    return {e.name: _Entry(e.dtype, e.shape, reader(e.name, e.dtype, header.start + e.begin)) for e in header.entries}


def _shards(index: Path, stack: ExitStack) -> dict[str, _Entry]:
    value = read_json(index)
    places = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(f, str) for f in places.values()):
        raise FileFormatError(f"{index}: expected a weight_map from tensor names to file names")
    files = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise FileFormatError(f"{index}: shard {name!r} is not a file name beside the index")
        files[name] = _file(index.parent / name, stack)
    if lost := [name for name, file in places.items() if name not in files[file]]:
        raise FileFormatError(f"{index}: its shards lack {_some(lost)}")
    return {name: files[file][name] for name, file in places.items()}


def _some(items: Sequence[str], limit: int = 8) -> str:
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest


def _check_same(zeroshot: _Source, finetuned: _Source) -> None:
    a, b = zeroshot.entries, finetuned.entries
    both = [name for name in a if name in b]
    shape = [f"{n} {a[n].shape} and {b[n].shape}" for n in both if a[n].shape != b[n].shape]
    dtype = [f"{n} {a[n].dtype} and {b[n].dtype}" for n in both if a[n].dtype != b[n].dtype]
    found = {
        "only in the first": sorted(a.keys() - b.keys()),
        "only in the second": sorted(b.keys() - a.keys()),
        "shapes differ": shape,
        "dtypes differ": dtype,
    }
    lines = [f"  {what} ({len(items)}): {_some(items)}" for what, items in found.items() if items]
    if lines:
        where = f"wise_ft: the two models do not match, {zeroshot.where} and {finetuned.where}:"
        raise ValueError("\n".join([where, *lines]))


def _resolve(alpha: Alpha, names: Iterable[str]) -> dict[str, float]:
    """Tensor name -> alpha."""
    table = dict(alpha) if isinstance(alpha, Mapping) else {"*": alpha}
    for pattern, value in table.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            where = f" for {pattern!r}" if isinstance(alpha, Mapping) else ""
            raise ValueError(f"wise_ft: alpha must be a number in [0, 1], got {value!r}{where}")
    chosen = {name: next((p for p in table if fnmatchcase(name, p)), None) for name in names}
    if missed := [name for name, pattern in chosen.items() if pattern is None]:
        raise ValueError(f"wise_ft: no pattern in alpha matches {_some(missed)}; add '*' for all others")
    if isinstance(alpha, Mapping) and (unused := [p for p in table if p not in chosen.values()]):
        raise ValueError(f"wise_ft: patterns in alpha that decide no tensor: {_some(unused)}; the first match counts")
    return {name: float(table[pattern]) for name, pattern in chosen.items()}


def _paths(out: str | Path | Sequence[str | Path], alphas: list[Alpha], several: bool) -> list[Path]:
    if isinstance(out, (str, Path)):
        if "{alpha}" in str(out) and all(isinstance(a, (int, float)) for a in alphas):
            paths = [Path(str(out).replace("{alpha}", f"{a:g}")) for a in alphas]
        elif several:
            raise ValueError(f"wise_ft: for a list of alphas give a list of files, or '{{alpha}}' in out; got {out}")
        else:
            paths = [Path(out)]
    else:
        paths = [Path(path) for path in out]
    if len(set(paths)) != len(alphas) or len(paths) != len(alphas):
        raise ValueError(f"wise_ft: out must be {len(alphas)} different file(s), got {[str(p) for p in paths]}")
    if wrong := [str(p) for p in paths if p.suffix != ".safetensors"]:
        raise ValueError(f"wise_ft: out must end in .safetensors, got {_some(wrong)}")
    return paths


def _blend(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Average 0 < alpha < 1 of float tensors of one dtype and shape."""
    wide = torch.promote_types(a.dtype, torch.float32)
    x, y = a.to(wide), b.to(a.device, wide)
    near, far, share = (x, y, alpha) if alpha < 0.5 else (y, x, 1 - alpha)
    # torch.lerp's form in single operations: torch.lerp fuses a multiply-add in its vector loop but not at the loop's
    # ends, so that its last bits depend on how the tensor is cut up. Subtracting last keeps -0 where both ends have it.
    mixed = torch.sub(near, far).mul_(share)
    torch.sub(near, mixed, out=mixed)
    out = mixed.to(a.dtype)
    if math.isfinite(mixed.sum()):
        return out
    # infinities and NaN payloads that both ends share
    bits = _BITS[a.dtype.itemsize]
    a_bits = a.view(bits)
    return torch.where(a_bits == b.to(a.device).view(bits), a_bits, out.view(bits)).view(a.dtype)


def _piece(first: _Entry, second: _Entry, start: int, stop: int, alphas: Sequence[float]) -> Iterator[Tensor]:
    """Elements [start, stop) of the average, for each alpha; an end that no alpha needs is not read."""
    a = first.read(start, stop) if min(alphas) < 1 else None
    b = second.read(start, stop) if max(alphas) > 0 else None
    for alpha in alphas:
        if alpha in (0, 1) or not first.dtype.is_floating_point:
            yield b if alpha == 1 else a
        else:
            yield _blend(a, b, alpha)


def _warn_of_integers(zeroshot: _Source, finetuned: _Source, alphas: Sequence[Mapping[str, float]]) -> None:
    differ = []
    for name, entry in zeroshot.entries.items():
        if entry.dtype.is_floating_point or all(chosen[name] in (0, 1) for chosen in alphas):
            continue
        n = math.prod(entry.shape)
        for start in range(0, n, _PIECE):
            stop = min(n, start + _PIECE)
            if not torch.equal(entry.read(start, stop).cpu(), finetuned.entries[name].read(start, stop).cpu()):
                differ.append(name)
                break
    if differ:
        logger.warning("wise_ft: integers are not averaged; these differ and are the zero-shot's: %s", _some(differ))


def _in_memory(zeroshot: _Source, finetuned: _Source, alphas: Mapping[str, float]) -> dict[str, Tensor]:
    _warn_of_integers(zeroshot, finetuned, [alphas])
    out = {}
    for name, entry in zeroshot.entries.items():
        (flat,) = _piece(entry, finetuned.entries[name], 0, math.prod(entry.shape), [alphas[name]])
        out[name] = flat.reshape(entry.shape).clone()
    return out


def _with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    merged = copy.deepcopy(module)
    merged.load_state_dict(weights)
    return merged


def _stream(
    zeroshot: _Source, finetuned: _Source, by_tensor: list[dict[str, float]], paths: list[Path], alphas: list[Alpha]
) -> None:
    _warn_of_integers(zeroshot, finetuned, by_tensor)
    entries = zeroshot.entries
    described = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    noted = [json.dumps(dict(alpha) if isinstance(alpha, Mapping) else alpha) for alpha in alphas]
    heads = [safetensors_layout(described, {"format": "pt", "wise_ft_alpha": note}) for note in noted]
    order = heads[0][1]

    def fill(files: list[BinaryIO]) -> None:
        for file, (head, _) in zip(files, heads):
            file.write(head)
        for name in order:
            n, weights = math.prod(entries[name].shape), [chosen[name] for chosen in by_tensor]
            for start in range(0, n, _PIECE):
                pieces = _piece(entries[name], finetuned.entries[name], start, min(n, start + _PIECE), weights)
                for file, piece in zip(files, pieces):
                    file.write(tensor_bytes(piece))

    def opened(files: list[BinaryIO]) -> None:
        if len(files) == len(paths):
            fill(files)
        else:
            write_atomically(paths[len(files)], lambda file: opened([*files, file]))

    opened([])


class RunningEnsemble:
    """The weight-space ensemble of where fine-tuning began and where it is, kept up to date while training.

        ensemble = RunningEnsemble(model)              # before the first step
        for batch in loader:
            ...
            optimizer.step()
            ensemble.update(model)
        with ensemble.applied(model):                  # evaluate, or save
            ...

    theta = (1-alpha)*theta_start + alpha*mean(theta_t), where the mean is exponential with `decay`; with decay 0 it is
    the current weights, and the ensemble at the end of training is exactly ``wise_ft(start, end, alpha)``.

    Args:
        model: its weights now are the zero-shot end.
        alpha: as in `wise_ft`; it can be changed at any time.
        decay: in [0, 1); the share of the old mean that each update keeps.
    """

    def __init__(self, model: nn.Module, alpha: Alpha = 0.5, decay: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"RunningEnsemble: decay must be in [0, 1), got {decay}")
        self.alpha, self.decay = alpha, decay
        self.zeroshot = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        # float32 at least: in half precision a mean with a decay near 1 would stand still
        self.mean = {
            name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor
            for name, tensor in self.zeroshot.items()
        }
        _resolve(alpha, self.zeroshot)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's weights into the mean; call it after each optimizer step."""
        for name, tensor in model.state_dict().items():
            mean, new = self.mean[name], tensor.detach().to(self.mean[name].device, copy=True)
            averaged = self.decay > 0 and mean.is_floating_point()
            self.mean[name] = mean.lerp(new.to(mean.dtype), 1 - self.decay) if averaged else new.to(mean.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """The ensemble's weights."""
        mean = {name: tensor.to(self.zeroshot[name].dtype) for name, tensor in self.mean.items()}
        return wise_ft(self.zeroshot, mean, self.alpha)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the ensemble's weights inside the block; its own come back, bit for bit, at the end."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        try:
            model.load_state_dict(self.state_dict())
            yield model
        finally:
            model.load_state_dict(own)
