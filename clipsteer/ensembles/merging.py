"""WiSE-FT: a zero-shot and a fine-tuned model averaged in weight space.

    theta(alpha) = (1-alpha)·theta_zeroshot + alpha·theta_finetuned

Files are streamed piece by piece, in a few MiB of memory, whatever the size of a model or of its
tensors. Source: Wortsman et al. 2022 (arXiv 2109.01903), section 3.
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
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from clipsteer.clip.setup import Setup, header_of, setup_in, setup_of
from clipsteer.ensembles.blend import blend
from clipsteer.io.doors import door
from clipsteer.io.files import safetensors_layout, tensor_bytes, write_atomically
from clipsteer.io.weights import Entry, Source, Weights, open_weights, some

logger = logging.getLogger(__name__)

Alpha = float | Mapping[str, float]

# elements a piece: few calls, and what is made of it still stays in cache
_PIECE = 1 << 18


@door
def wise_ft(
    zeroshot: Weights,
    finetuned: Weights,
    alpha: Alpha | Sequence[Alpha] = 0.5,
    out: str | Path | Sequence[str | Path] | None = None,
) -> Any:
    """Average a zero-shot and a fine-tuned model: theta = (1-alpha)*zeroshot + alpha*finetuned.

    Args:
        zeroshot, finetuned: each a .safetensors file, an index of shards
            (``*.safetensors.index.json``, ``pytorch_model.bin.index.json``), a folder that holds
            one of these (transformers' and open_clip's names), a ``.pt``/``.bin`` file of weights
            (or of a checkpoint with them under "state_dict" or "model"), a state dict or a module.
            Names, shapes and dtypes must be the same; in files, what torch.compile
            (``_orig_mod.``) and DistributedDataParallel (``module.``) put into the names does not
            count.
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

    What a file or module says of its preprocessing and activation is said of the average, too.

    Raises:
        ValueError: models that do not match, with a list of what differs; that say different
            things of their preprocessing or activation; alpha outside [0, 1]; a name in `out`.
        FileFormatError: a damaged file. FileNotFoundError: no such file, or a folder without
            weights.

    Source: Wortsman et al. 2022 (arXiv 2109.01903).
    """
    several = not isinstance(alpha, (int, float, Mapping))
    alphas: list[Any] = list(cast(Any, alpha)) if several else [alpha]
    paths = None if out is None else _paths(out, alphas, several)
    with ExitStack() as stack, torch.no_grad():
        first = open_weights("zeroshot", zeroshot, stack)
        second = open_weights("finetuned", finetuned, stack)
        _check_same(first, second)
        setup = same_setup(
            first.where, _setup(first, zeroshot), second.where, _setup(second, finetuned)
        )
        by_tensor = [_resolve(a, first.entries) for a in alphas]
        results: list[Any]
        if paths is None:
            results = [_in_memory(first, second, chosen) for chosen in by_tensor]
            if isinstance(zeroshot, nn.Module) and isinstance(finetuned, nn.Module):
                results = [_with_weights(zeroshot, weights) for weights in results]
        else:
            _stream(first, second, by_tensor, paths, alphas, setup)
            results = list(paths)
    return results if several else results[0]


def _setup(source: Source, weights: Weights) -> Setup | None:
    if isinstance(weights, nn.Module):
        return setup_of(weights)
    return setup_in(source.where, source.metadata)


def same_setup(
    first: str | Path, one: Setup | None, second: str | Path, other: Setup | None
) -> Setup | None:
    """The setup of two models that are averaged, or of the one that says its own.

    Raises ValueError where they differ: between two preprocessings or activations lies none that
    the average would be right under, and no figure would show it.
    """
    if one is None or other is None or one == other:
        return one or other
    ours, theirs = ({**setup.preprocess, **vars(setup)} for setup in (one, other))
    differing = [
        f"{name} {ours.get(name)} and {theirs.get(name)}"
        for name in {**ours, **theirs}
        if name != "preprocess" and ours.get(name) != theirs.get(name)
    ]
    raise ValueError(
        f"wise_ft: {first} and {second} see images differently ({'; '.join(differing)}), so that "
        "their average has no right way; average models of one setup. If one of them was opened "
        "in a wrong one, load it with preprocess=… and save it anew"
    )


def _check_same(zeroshot: Source, finetuned: Source) -> None:
    first = zeroshot.entries
    second = finetuned.entries
    found: dict[str, list[str]] = {
        "only in the first": sorted(first.keys() - second.keys()),
        "only in the second": sorted(second.keys() - first.keys()),
        "shapes differ": [],
        "dtypes differ": [],
    }
    for name, a, b in [(name, first[name], second[name]) for name in first if name in second]:
        if a.shape != b.shape:
            found["shapes differ"].append(f"{name} {a.shape} and {b.shape}")
        if a.dtype != b.dtype:
            found["dtypes differ"].append(f"{name} {a.dtype} and {b.dtype}")
    lines = [f"  {what} ({len(items)}): {some(items)}" for what, items in found.items() if items]
    if lines:
        where = f"wise_ft: the two models do not match, {zeroshot.where} and {finetuned.where}:"
        raise ValueError("\n".join([where, *lines]))


def deciding(alpha: Mapping[str, float], names: Iterable[str]) -> dict[str, str]:
    """Tensor name -> the pattern that sets its alpha. Raises ValueError for a name without one, and
    for a pattern that decides none."""
    chosen: dict[str, str] = {}
    missed = []
    for name in names:
        matching = [pattern for pattern in alpha if fnmatchcase(name, pattern)]
        if matching:
            chosen[name] = matching[0]
        else:
            missed.append(name)
    if missed:
        raise ValueError(
            f"wise_ft: no pattern in alpha matches {some(missed)}; add '*' for all others"
        )
    used = set(chosen.values())
    if unused := [pattern for pattern in alpha if pattern not in used]:
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


def _piece(
    first: Entry, second: Entry, start: int, stop: int, alphas: Sequence[float]
) -> Iterator[Tensor]:
    """Elements [start, stop) of the average, for each alpha; an end that no alpha needs is not
    read."""
    nothing = torch.empty(0)
    a = first.read(start, stop) if min(alphas) < 1 else nothing
    b = second.read(start, stop) if max(alphas) > 0 else nothing
    for alpha in alphas:
        if alpha == 1:
            yield b
        elif alpha == 0 or not first.dtype.is_floating_point:
            yield a
        else:
            yield blend(a, b, alpha)


def _spans(entry: Entry) -> Iterator[tuple[int, int]]:
    """[start, stop) of an entry's pieces."""
    n = math.prod(entry.shape)
    for start in range(0, n, _PIECE):
        yield start, min(n, start + _PIECE)


def _warn_of_integers(
    zeroshot: Source, finetuned: Source, alphas: Sequence[Mapping[str, float]]
) -> None:
    differ = []
    for name, entry in zeroshot.entries.items():
        if entry.dtype.is_floating_point or all(chosen[name] in (0, 1) for chosen in alphas):
            continue
        other = finetuned.entries[name]
        for start, stop in _spans(entry):
            if not torch.equal(entry.read(start, stop).cpu(), other.read(start, stop).cpu()):
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
        n = math.prod(entry.shape)
        (flat,) = _piece(entry, finetuned.entries[name], 0, n, [alphas[name]])
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
    setup: Setup | None,
) -> None:
    """Write every average at once, a piece of each at a time."""
    _warn_of_integers(zeroshot, finetuned, by_tensor)
    entries = zeroshot.entries
    described = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    heads = []
    for alpha in alphas:
        note = json.dumps(dict(alpha) if isinstance(alpha, Mapping) else alpha)
        metadata = {**header_of(setup), "wise_ft_alpha": note}
        head, order = safetensors_layout(described, metadata)
        heads.append(head)

    def fill(files: list[BinaryIO]) -> None:
        for file, head in zip(files, heads):
            file.write(head)
        # writes one step while the next is read and computed
        with ThreadPoolExecutor(1) as writer:
            pending: Future[None] | None = None
            for pieces in computed():
                if pending is not None:
                    pending.result()
                pending = writer.submit(put, files, pieces)
            if pending is not None:
                pending.result()

    def computed() -> Iterator[list[Tensor]]:
        for name in order:
            first = entries[name]
            second = finetuned.entries[name]
            weights = [chosen[name] for chosen in by_tensor]
            for start, stop in _spans(first):
                yield list(_piece(first, second, start, stop, weights))

    def put(files: list[BinaryIO], pieces: list[Tensor]) -> None:
        for file, piece in zip(files, pieces):
            file.write(tensor_bytes(piece))

    def opened(files: list[BinaryIO]) -> None:
        if len(files) == len(paths):
            fill(files)
        else:
            write_atomically(paths[len(files)], lambda file: opened([*files, file]))

    opened([])


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class RunningEnsemble:
    """The weight-space ensemble of where fine-tuning began and where it is, kept while training.

        ensemble = RunningEnsemble(model)              # before the first step
        for batch in loader:
            ...
            optimizer.step()
            ensemble.update(model)
        with ensemble.applied(model):                  # evaluate, or save
            ...

    theta = (1-alpha)*theta_start + alpha*mean(theta_t), where the mean is exponential with `decay`;
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
        self.alpha = alpha
        self.decay = decay
        self.zeroshot = _copied(model)
        self.mean = {}
        for name, tensor in self.zeroshot.items():
            if tensor.is_floating_point():
                # in half precision a mean with a decay near 1 would stand still
                tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            self.mean[name] = tensor
        _resolve(alpha, self.zeroshot)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's weights into the mean; call it after each optimizer step."""
        for name, tensor in model.state_dict().items():
            mean = self.mean[name]
            new = tensor.detach().to(mean.device, copy=True).to(mean.dtype)
            if self.decay > 0 and mean.is_floating_point():
                new = mean.lerp(new, 1 - self.decay)
            self.mean[name] = new

    def state_dict(self) -> dict[str, Tensor]:
        """The ensemble's weights."""
        mean = {name: tensor.to(self.zeroshot[name].dtype) for name, tensor in self.mean.items()}
        return wise_ft(self.zeroshot, mean, self.alpha)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the ensemble's weights inside the block; its own come back, bit for bit,
        at the end."""
        own = _copied(model)
        try:
            model.load_state_dict(self.state_dict())
            yield model
        finally:
            model.load_state_dict(own)
