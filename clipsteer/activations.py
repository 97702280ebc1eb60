"""Where an SAE's training tokens come from: a tensor, a resumable store on disk, or a CLIP model harvested on the fly.

Every source is a list of *groups* of rows, each small enough for memory. An epoch visits the groups in a permuted
order and the rows of a group in a permuted order; both permutations are functions of (seed, epoch, group) alone, so
the pair (epoch, row) is the complete state of the shuffle and any position can be reached without replaying.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from clipsteer._files import FileFormatError, read_json, read_safetensors, write_json, write_safetensors

logger = logging.getLogger(__name__)

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Position(NamedTuple):
    """A place in the shuffled stream: the epoch, and the rows of it already served."""

    epoch: int = 0
    row: int = 0


class Batch(NamedTuple):
    rows: Tensor  # (batch_size / world, d)
    next: Position  # where the batch after this one starts


def _generator(*key: int) -> torch.Generator:
    # splitmix-like mixing keeps (seed, epoch, group) streams apart without overflow
    state = 0
    for value in key:
        state = (state * 6364136223846793005 + (value + 1) * 1442695040888963407) % (1 << 63)
    return torch.Generator().manual_seed(state)


class ActivationSource:
    """Rows (N, d) served in shuffled batches. Subclasses say how rows fall into groups and how a group is read."""

    d_in: int

    def group_sizes(self, seed: int, epoch: int) -> list[int]:
        """Rows of each group in the order in which this epoch visits them."""
        raise NotImplementedError

    def load_group(self, seed: int, epoch: int, group: int) -> Tensor:
        """The rows (n, d) of the group visited as number `group`, in any fixed order."""
        raise NotImplementedError

    def rows_per_epoch(self) -> int | None:
        """Rows of one pass, or None where only reading would tell."""
        return sum(self.group_sizes(0, 0))

    def batches(
        self, batch_size: int, *, seed: int = 0, start: Position = Position(), rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Endless shuffled batches from `start` on; with `world` processes each yields its equal slice of the batch.

        The rows left over at the end of an epoch that do not fill a batch are dropped.
        """
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size must be a positive multiple of the {world} processes, got {batch_size}")
        share = batch_size // world
        epoch, row = start
        while True:
            total = sum(self.group_sizes(seed, epoch))
            if total < batch_size:
                raise ValueError(f"batch_size is {batch_size}, but an epoch has only {total} rows")
            for rows in self._epoch(batch_size, seed, epoch, row):
                row += batch_size
                following = Position(epoch, row) if row + batch_size <= total else Position(epoch + 1, 0)
                yield Batch(rows[rank * share : (rank + 1) * share], following)
            epoch, row = epoch + 1, 0

    def _epoch(self, batch_size: int, seed: int, epoch: int, row: int) -> Iterator[Tensor]:
        """The batches of one epoch from its row `row` on; a batch may straddle groups."""
        pieces: list[Tensor] = []
        need = batch_size
        first = 0  # the epoch's row at which the group begins
        for group, size in enumerate(self.group_sizes(seed, epoch)):
            at = max(row - first, 0)
            first += size
            if at >= size:
                continue
            rows = self.load_group(seed, epoch, group)
            if len(rows) != size:
                raise RuntimeError(f"group {group} of epoch {epoch} has {len(rows)} rows, {size} were promised")
            order = torch.randperm(size, generator=_generator(seed, epoch, group))
            while at < size:
                chosen = order[at : at + need].to(rows.device)
                pieces.append(rows[chosen])
                at += len(chosen)
                need -= len(chosen)
                if need == 0:
                    yield torch.cat(pieces) if len(pieces) > 1 else pieces[0]
                    pieces, need = [], batch_size
            del rows  # before the next group comes


class TensorSource(ActivationSource):
    """A tensor (N, d) in memory: one group, so the permutation is a full one."""

    def __init__(self, rows: Tensor) -> None:
        if rows.ndim < 2 or not rows.is_floating_point():
            raise ValueError(
                f"activations: expected a floating-point tensor (..., d_in), got {rows.dtype} {tuple(rows.shape)}"
            )
        self.rows = rows.detach().reshape(-1, rows.shape[-1])
        self.d_in = self.rows.shape[1]

    def group_sizes(self, seed: int, epoch: int) -> list[int]:
        return [len(self.rows)]

    def load_group(self, seed: int, epoch: int, group: int) -> Tensor:
        return self.rows


class IterableSource(ActivationSource):
    """Any iterable of tensors (..., d): rows in the order in which they come, no shuffling.

    A position is reached by reading up to it, so resuming needs an iterable that repeats itself.
    """

    def __init__(self, parts: Iterable[Tensor]) -> None:
        self._iterator = iter(parts)
        self._again = parts if self._iterator is not parts else None
        first = next(self._iterator, None)
        if first is None:
            raise ValueError("activations: the iterable is empty")
        self.d_in = first.shape[-1]
        self._first: Tensor | None = first

    def rows_per_epoch(self) -> int | None:
        return None

    def _parts(self) -> Iterator[Tensor]:
        while True:
            if self._first is not None:
                first, self._first = self._first, None
                yield first
            yield from self._iterator
            if self._again is None:
                raise ValueError("activations: the iterator ended before training did; pass more rows or fewer steps")
            self._iterator = iter(self._again)

    def batches(
        self, batch_size: int, *, seed: int = 0, start: Position = Position(), rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size must be a positive multiple of the {world} processes, got {batch_size}")
        share = batch_size // world
        held: list[Tensor] = []
        count, skip, row = 0, start.row, start.row
        for part in self._parts():
            part = part.detach().reshape(-1, self.d_in)
            dropped = min(skip, len(part))
            skip -= dropped
            held.append(part[dropped:])
            count += len(held[-1])
            if count < batch_size:
                continue
            rows = torch.cat(held)
            used = 0
            while used + batch_size <= count:
                row += batch_size
                used += batch_size
                mine = rows[used - batch_size + rank * share : used - batch_size + (rank + 1) * share]
                yield Batch(mine, Position(0, row))
            held = [rows[used:]]
            count -= used


class HarvestSource(ActivationSource):
    """A CLIP model run on the fly: an epoch permutes the images, and `images_per_group` of them fill a group.

    A larger group shuffles better and holds images_per_group · tokens rows in memory. Random augmentations draw from
    torch's generator, which is seeded per (seed, epoch, group), so a resumed run sees the same ones.
    """

    def __init__(
        self,
        clip: Any,
        dataset: Any,
        hook_point: str,
        *,
        tokens: str = "all",
        images_per_group: int = 2048,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        self.clip, self.dataset, self.hook_point, self.tokens = clip, dataset, hook_point, tokens
        self.images_per_group, self.batch_size, self.num_workers = images_per_group, batch_size, num_workers
        probe = self._run([0])
        self.tokens_per_image, self.d_in = probe.shape

    def _run(self, images: Sequence[int]) -> Tensor:
        from clipsteer.clip import harvest

        loader = _loader(self.clip, Subset(self.dataset, images), self.batch_size, self.num_workers)
        return torch.cat(list(harvest(self.clip.model, loader, self.hook_point, tokens=self.tokens)))

    def group_sizes(self, seed: int, epoch: int) -> list[int]:
        total, step = len(self.dataset), self.images_per_group
        return [min(step, total - at) * self.tokens_per_image for at in range(0, total, step)]

    def load_group(self, seed: int, epoch: int, group: int) -> Tensor:
        order = torch.randperm(len(self.dataset), generator=_generator(seed, epoch))
        images = order[group * self.images_per_group : (group + 1) * self.images_per_group].tolist()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_generator(seed, epoch, group).initial_seed())
            return self._run(images)


class ActivationStore(ActivationSource):
    """A directory of activation shards written by `harvest_to_store`; complete shards alone are read.

    An epoch permutes the shards; `buffer_shards` of them at a time are read and their rows permuted together (all of
    them, hence a full permutation, when `buffer_shards` is None). Memory: the buffer in the stored dtype.
    """

    def __init__(self, directory: str | Path, *, buffer_shards: int | None = 4) -> None:
        self.directory = Path(directory)
        self.metadata: dict[str, Any] = read_json(self.directory / "store.json")
        self.shards: list[Path] = []
        self._sizes: list[int] = []
        for index in range(self.metadata.get("shards", 0)):
            entry = _read_entry(self.directory, index)
            if entry is not None:
                self.shards.append(_shard_path(self.directory, index))
                self._sizes.append(entry["rows"])
        if not self.shards:
            raise FileFormatError(f"{self.directory}: no complete shard; run harvest_to_store again to go on with it")
        self.d_in = int(self.metadata["d_in"])
        self.buffer_shards = len(self.shards) if buffer_shards is None else buffer_shards
        if self.buffer_shards < 1:
            raise ValueError(f"buffer_shards must be at least 1 or None, got {buffer_shards}")

    def __len__(self) -> int:
        return sum(self._sizes)

    @property
    def complete(self) -> bool:
        """Whether every shard of the harvest is there."""
        return len(self.shards) == self.metadata["shards"]

    def read_shard(self, index: int) -> Tensor:
        """Rows (n, d) of one shard, images in the data set's order."""
        path = self.shards[index]
        rows = read_safetensors(path).get("activations")
        if rows is None or tuple(rows.shape) != (self._sizes[index], self.d_in):
            got = None if rows is None else tuple(rows.shape)
            raise FileFormatError(f"{path}: expected activations {(self._sizes[index], self.d_in)}, got {got}")
        return rows

    def _order(self, seed: int, epoch: int) -> list[list[int]]:
        order = torch.randperm(len(self.shards), generator=_generator(seed, epoch)).tolist()
        return [order[at : at + self.buffer_shards] for at in range(0, len(order), self.buffer_shards)]

    def group_sizes(self, seed: int, epoch: int) -> list[int]:
        return [sum(self._sizes[shard] for shard in group) for group in self._order(seed, epoch)]

    def load_group(self, seed: int, epoch: int, group: int) -> Tensor:
        return torch.cat([self.read_shard(shard) for shard in self._order(seed, epoch)[group]])


def as_source(activations: Tensor | ActivationSource | Iterable[Tensor]) -> ActivationSource:
    """A tensor, a source or any iterable of tensors as an `ActivationSource`."""
    if isinstance(activations, ActivationSource):
        return activations
    if isinstance(activations, Tensor):
        return TensorSource(activations)
    if isinstance(activations, Iterable) and not isinstance(activations, str | bytes | dict):
        return IterableSource(activations)
    raise TypeError(
        f"activations: expected a tensor, an ActivationStore or an iterable of tensors, got {type(activations)}"
    )


def harvest_to_store(
    clip: Any,
    dataset: Any,
    hook_point: str,
    directory: str | Path,
    *,
    tokens: str = "all",
    dtype: str = "float16",
    shard_rows: int = 65536,
    batch_size: int = 64,
    num_workers: int = 0,
) -> ActivationStore:
    """Write the activations of `hook_point` over a map-style data set to shards under `directory`; resumable.

    A shard holds the rows of a fixed run of images (about `shard_rows` rows) and counts once its index file, written
    after it, is there; a second call with the same settings does only what is missing.
    `tokens` is "all", "cls" or "patches"; `dtype` "float16", "bfloat16" or "float32" (float16 overflows at 65504 and
    raises then). Another model, data set length or setting in the same directory raises ValueError.
    """
    from clipsteer.clip import harvest

    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected one of {sorted(_DTYPES)}, got {dtype!r}")
    if len(dataset) == 0:
        raise ValueError("dataset: it is empty")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    probe_loader = _loader(clip, Subset(dataset, [0]), 1, 0)
    probe = torch.cat(list(harvest(clip.model, probe_loader, hook_point, tokens=tokens)))
    tokens_per_image, d_in = probe.shape
    images = max(1, shard_rows // tokens_per_image)
    settings = {
        "model": clip.name,
        "pretrained": clip.pretrained,
        "hook_point": hook_point,
        "tokens": tokens,
        "dtype": dtype,
        "d_in": d_in,
        "tokens_per_image": tokens_per_image,
        "images": len(dataset),
        "images_per_shard": images,
        "shards": math.ceil(len(dataset) / images),
    }
    _claim(directory, settings)
    todo = [i for i in range(settings["shards"]) if _read_entry(directory, i) is None]
    for index in tqdm(todo, desc=f"harvest {hook_point}", unit="shard", disable=None):
        span = range(index * images, min((index + 1) * images, len(dataset)))
        loader = _loader(clip, Subset(dataset, span), batch_size, num_workers)
        parts = [part.to("cpu", _DTYPES[dtype]) for part in harvest(clip.model, loader, hook_point, tokens=tokens)]
        rows = torch.cat(parts).contiguous()
        if not torch.isfinite(rows).all():
            raise ValueError(f"{hook_point}: activations are not finite in {dtype}; pass dtype='float32'")
        path = _shard_path(directory, index)
        write_safetensors(path, {"activations": rows})
        entry = {"rows": len(rows), "images": [span.start, span.stop], "bytes": path.stat().st_size}
        write_json(path.with_suffix(".json"), entry)
    return ActivationStore(directory)


def _claim(directory: Path, settings: dict[str, Any]) -> None:
    path = directory / "store.json"
    if not path.exists():
        write_json(path, settings)
        return
    found = read_json(path)
    if not isinstance(found, dict):
        raise FileFormatError(f"{path}: expected a JSON object")
    changed = [key for key, value in settings.items() if found.get(key) != value]
    differing = [f"{key}: {found.get(key)!r} there, {settings[key]!r} asked for" for key in changed]
    if differing:
        raise ValueError(f"{directory} holds another harvest ({'; '.join(differing)}); choose another directory")


def _shard_path(directory: Path, index: int) -> Path:
    return directory / f"shard-{index:05d}.safetensors"


def _read_entry(directory: Path, index: int) -> dict[str, Any] | None:
    path = _shard_path(directory, index)
    try:
        entry = read_json(path.with_suffix(".json"))
        return entry if path.stat().st_size == entry["bytes"] and entry["rows"] > 0 else None
    except (OSError, FileFormatError, KeyError, TypeError):
        return None


def _loader(clip: Any, dataset: Any, batch_size: int, num_workers: int) -> DataLoader:
    return DataLoader(_Images(dataset, clip.preprocess), batch_size=batch_size, num_workers=num_workers)


class _Images(torch.utils.data.Dataset):
    """The preprocessed images of a map-style data set whose items are images or (image, label) pairs."""

    def __init__(self, dataset: Any, preprocess: Any) -> None:
        self.dataset, self.preprocess = dataset, preprocess

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        item = self.dataset[index]
        image = item[0] if isinstance(item, tuple | list) else item
        return image if isinstance(image, Tensor) else self.preprocess(image)
