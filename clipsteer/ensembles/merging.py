"""WiSE-FT: a zero-shot and a fine-tuned model averaged in weight space.

    theta(alpha) = (1 - alpha) · theta_zeroshot + alpha · theta_finetuned

Source: Wortsman et al. 2022 (arXiv 2109.01903), section 3. Files are streamed piece by piece, in a
few MiB of memory, whatever the size of a model or of its tensors.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from clipsteer.io.files import safetensors_layout, tensor_bytes, write_atomically
from clipsteer.io.weights import Entry, Source, Weights, open_weights, some

logger = logging.getLogger(__name__)

Alpha = float | Mapping[str, float]

# elements a piece: few calls, and what is made of it still stays in cache
_PIECE = 1 << 18
# elements of half precision that are widened at a time
_BLOCK = 1 << 17
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def wise_ft(
    zeroshot: Weights,
    finetuned: Weights,
    alpha: Alpha | Sequence[Alpha] = 0.5,
    out: str | Path | Sequence[str | Path] | None = None,
) -> Any:
    """Average a zero-shot and a fine-tuned model: (1 - alpha) · zeroshot + alpha · finetuned.

    Args:
        zeroshot, finetuned: each a .safetensors file, an index of shards
            (``*.safetensors.index.json``), a folder that holds one of these (transformers' and
            open_clip's names), a ``.pt``/``.bin`` file of weights alone, a state dict or a module.
            Names, shapes and dtypes must be the same.
        alpha: 0 is zero-shot, 1 fine-tuned. A mapping of fnmatch patterns to numbers sets it by
            tensor: the first pattern that matches counts, and every tensor needs one. A list gives
                a result each, in one pass.
        out: the ``.safetensors`` file to write, also for sharded input; a list of alphas takes as
            many files, or one name with ``{alpha}`` in it. Without it the result stays in memory.

    Returns:
        The path written; without `out` a state dict, or, of two modules, a copy of the first with
        the new weights. A list of alphas gives a list.

    float16, bfloat16 and float32 are averaged in float32, float64 in float64, and the dtype is
    kept. Every value lies between its two ends; where these agree in every bit, so does the result.
    alpha = 0 and 1 copy their model bit for bit, integers and booleans too; at other alphas those
    are taken from `zeroshot` and a warning names the ones that differ. Writing needs a few MiB of
    memory for each output, and `out` appears only once it is whole.

    Raises:
        ValueError: models that do not match, with a list of what differs; alpha outside [0, 1]; a
            name in `out`.
        FileFormatError: a damaged file. FileNotFoundError: no such file, or a folder without
            weights.

    Source: Wortsman et al. 2022 (arXiv 2109.01903).
    """
    several = not isinstance(alpha, (int, float, Mapping))
    alphas = list(alpha) if several else [alpha]
    paths = None if out is None else _paths(out, alphas, several)
    with ExitStack() as stack, torch.no_grad():
        sources = [
            open_weights(name, w, stack)
            for name, w in (("zeroshot", zeroshot), ("finetuned", finetuned))
        ]
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


def _check_same(zeroshot: Source, finetuned: Source) -> None:
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
    lines = [f"  {what} ({len(items)}): {some(items)}" for what, items in found.items() if items]
    if lines:
        where = f"wise_ft: the two models do not match, {zeroshot.where} and {finetuned.where}:"
        raise ValueError("\n".join([where, *lines]))


def deciding(alpha: Mapping[str, float], names: Iterable[str]) -> dict[str, str]:
    """Tensor name -> the pattern that sets its alpha. ValueError for a name without one, and for an
    unused pattern."""
    chosen = {name: next((p for p in alpha if fnmatchcase(name, p)), None) for name in names}
    if missed := [name for name, pattern in chosen.items() if pattern is None]:
        raise ValueError(
            f"wise_ft: no pattern in alpha matches {some(missed)}; add '*' for all others"
        )
    if unused := [p for p in alpha if p not in chosen.values()]:
        raise ValueError(
            f"wise_ft: patterns in alpha that decide no tensor: {some(unused)}; the first match "
            f"counts"
        )
    return chosen


def _resolve(alpha: Alpha, names: Iterable[str]) -> dict[str, float]:
    """Tensor name -> alpha."""
    table = dict(alpha) if isinstance(alpha, Mapping) else {"*": alpha}
    for pattern, value in table.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            where = f" for {pattern!r}" if isinstance(alpha, Mapping) else ""
            raise ValueError(f"wise_ft: alpha must be a number in [0, 1], got {value!r}{where}")
    if not isinstance(alpha, Mapping):
        return dict.fromkeys(names, float(alpha))
    return {name: float(table[pattern]) for name, pattern in deciding(table, names).items()}


def _paths(
    out: str | Path | Sequence[str | Path], alphas: list[Alpha], several: bool
) -> list[Path]:
    if isinstance(out, (str, Path)):
        if "{alpha}" in str(out) and all(isinstance(a, (int, float)) for a in alphas):
            paths = [Path(str(out).replace("{alpha}", f"{a:g}")) for a in alphas]
        elif several:
            raise ValueError(
                f"wise_ft: for a list of alphas give a list of files, or '{{alpha}}' in out; got "
                f"{out}"
            )
        else:
            paths = [Path(out)]
    else:
        paths = [Path(path) for path in out]
    if len(set(paths)) != len(alphas) or len(paths) != len(alphas):
        raise ValueError(
            f"wise_ft: out must be {len(alphas)} different file(s), got {[str(p) for p in paths]}"
        )
    if wrong := [str(p) for p in paths if p.suffix != ".safetensors"]:
        raise ValueError(f"wise_ft: out must end in .safetensors, got {some(wrong)}")
    return paths


def _blend(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Average 0 < alpha < 1 of float tensors of one dtype and shape."""
    b = b.to(a.device)
    # torch.lerp's form in single operations: torch.lerp fuses a multiply-add in its vector loop but
    # not at the loop's ends, so that its last bits depend on how the tensor is cut up. Subtracting
    # last keeps -0 where both ends have it.
    near, far, share = (a, b, alpha) if alpha < 0.5 else (b, a, 1 - alpha)
    wide = torch.promote_types(a.dtype, torch.float32)
    out = torch.empty_like(a)
    if wide == a.dtype:
        torch.sub(near, far, out=out)
        torch.sub(near, out.mul_(share), out=out)
        return out if math.isfinite(out.sum()) else _mend(a, b, alpha, out)
    # block by block through the same two buffers: fresh ones of this size cost more in page faults
    # than the arithmetic
    size = min(len(a), _BLOCK) if a.device.type == "cpu" else len(a)
    buffers = [torch.empty(size, dtype=wide, device=a.device) for _ in range(2)]
    for n, f, result in zip(*(t.split(max(size, 1)) for t in (near, far, out))):
        x, y = (buffer[: len(n)] for buffer in buffers)
        x.copy_(n)
        torch.sub(x, y.copy_(f), out=y)
        torch.sub(x, y.mul_(share), out=y)
        result.copy_(y)
        if not math.isfinite(y.sum()):
            result.copy_(_mend(n, f, share, result))
    return out


def _mend(a: Tensor, b: Tensor, alpha: float, mixed: Tensor) -> Tensor:
    """`mixed` where it is finite; bits that both ends share (infinities, NaN payloads); an average
    whose difference overflowed, by the form that cannot."""
    wide = torch.promote_types(a.dtype, torch.float32)
    apart = a.isfinite() & b.isfinite() & ~mixed.isfinite()
    mixed = torch.where(apart, ((1 - alpha) * a.to(wide) + alpha * b.to(wide)).to(a.dtype), mixed)
    bits = _BITS[a.dtype.itemsize]
    a_bits = a.view(bits)
    return torch.where(a_bits == b.view(bits), a_bits, mixed.view(bits)).view(a.dtype)


def _piece(
    first: Entry, second: Entry, start: int, stop: int, alphas: Sequence[float]
) -> Iterator[Tensor]:
    """Elements [start, stop) of the average, for each alpha; an end that no alpha needs is not
    read."""
    a = first.read(start, stop) if min(alphas) < 1 else None
    b = second.read(start, stop) if max(alphas) > 0 else None
    for alpha in alphas:
        if alpha in (0, 1) or not first.dtype.is_floating_point:
            yield b if alpha == 1 else a
        else:
            yield _blend(a, b, alpha)


def _warn_of_integers(
    zeroshot: Source, finetuned: Source, alphas: Sequence[Mapping[str, float]]
) -> None:
    differ = []
    for name, entry in zeroshot.entries.items():
        if entry.dtype.is_floating_point or all(chosen[name] in (0, 1) for chosen in alphas):
            continue
        n = math.prod(entry.shape)
        for start in range(0, n, _PIECE):
            stop = min(n, start + _PIECE)
            if not torch.equal(
                entry.read(start, stop).cpu(), finetuned.entries[name].read(start, stop).cpu()
            ):
                differ.append(name)
                break
    if differ:
        logger.warning(
            "wise_ft: integers are not averaged; these differ and are the zero-shot's: %s",
            some(differ),
        )


def _in_memory(
    zeroshot: Source, finetuned: Source, alphas: Mapping[str, float]
) -> dict[str, Tensor]:
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
    zeroshot: Source,
    finetuned: Source,
    by_tensor: list[dict[str, float]],
    paths: list[Path],
    alphas: list[Alpha],
) -> None:
    _warn_of_integers(zeroshot, finetuned, by_tensor)
    entries = zeroshot.entries
    described = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    noted = [json.dumps(dict(alpha) if isinstance(alpha, Mapping) else alpha) for alpha in alphas]
    heads = [
        safetensors_layout(described, {"format": "pt", "wise_ft_alpha": note}) for note in noted
    ]
    order = heads[0][1]

    def fill(files: list[BinaryIO]) -> None:
        for file, (head, _) in zip(files, heads):
            file.write(head)
        with ThreadPoolExecutor(1) as writer:  # writes one step while the next is read and computed
            pending: Future[None] | None = None
            for pieces in computed():
                if pending is not None:
                    pending.result()
                pending = writer.submit(put, files, pieces)
            if pending is not None:
                pending.result()

    def computed() -> Iterator[list[Tensor]]:
        for name in order:
            n, weights = math.prod(entries[name].shape), [chosen[name] for chosen in by_tensor]
            for start in range(0, n, _PIECE):
                yield list(
                    _piece(
                        entries[name],
                        finetuned.entries[name],
                        start,
                        min(n, start + _PIECE),
                        weights,
                    )
                )

    def put(files: list[BinaryIO], pieces: list[Tensor]) -> None:
        for file, piece in zip(files, pieces):
            file.write(tensor_bytes(piece))

    def opened(files: list[BinaryIO]) -> None:
        if len(files) == len(paths):
            fill(files)
        else:
            write_atomically(paths[len(files)], lambda file: opened([*files, file]))

    opened([])


class RunningEnsemble:
    """The weight-space ensemble of where fine-tuning began and where it is, kept up to date while
    training.

        ensemble = RunningEnsemble(model)              # before the first step
        for batch in loader:
            ...
            optimizer.step()
            ensemble.update(model)
        with ensemble.applied(model):                  # evaluate, or save
            ...

    theta = (1 - alpha) · theta_start + alpha · mean(theta_t), the mean exponential with `decay`;
    with decay 0 it is the current weights, and the ensemble at the end of training is exactly
    ``wise_ft(start, end, alpha)``.

    Args:
        model: its weights now are the zero-shot end.
        alpha: as in `wise_ft`; it can be changed at any time.
        decay: in [0, 1); the share of the old mean that each update keeps.
    """

    def __init__(self, model: nn.Module, alpha: Alpha = 0.5, decay: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"RunningEnsemble: decay must be in [0, 1), got {decay}")
        self.alpha, self.decay = alpha, decay
        self.zeroshot = {
            name: tensor.detach().clone() for name, tensor in model.state_dict().items()
        }
        # float32 at least: in half precision a mean with a decay near 1 would stand still
        self.mean = {
            name: tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            if tensor.is_floating_point()
            else tensor
            for name, tensor in self.zeroshot.items()
        }
        _resolve(alpha, self.zeroshot)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's weights into the mean; call it after each optimizer step."""
        for name, tensor in model.state_dict().items():
            mean, new = self.mean[name], tensor.detach().to(self.mean[name].device, copy=True)
            averaged = self.decay > 0 and mean.is_floating_point()
            self.mean[name] = (
                mean.lerp(new.to(mean.dtype), 1 - self.decay) if averaged else new.to(mean.dtype)
            )

    def state_dict(self) -> dict[str, Tensor]:
        """The ensemble's weights."""
        mean = {name: tensor.to(self.zeroshot[name].dtype) for name, tensor in self.mean.items()}
        return wise_ft(self.zeroshot, mean, self.alpha)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the ensemble's weights inside the block; its own come back, bit for bit,
        at the end."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        try:
            model.load_state_dict(self.state_dict())
            yield model
        finally:
            model.load_state_dict(own)
