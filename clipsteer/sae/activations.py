"""Activations of a CLIP model as training data: a resumable store of shards on disk, or the model
run on the fly.

Both are sources in the sense of ``clipsteer.sae.sources``: shuffled batches whose whole state is
(epoch, row). A store permutes its shards and shuffles a few of them together; a harvest permutes
the images and shuffles the rows of a group.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from clipsteer.clip.hooks import harvest
from clipsteer.clip.model import provenance
from clipsteer.clip.pixels import image_loader
from clipsteer.io.files import (
    FileFormatError,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from clipsteer.sae.sources import (
    ActivationSource,
    Batch,
    IterableSource,
    Position,
    TensorSource,
    as_source,
    generator,
)
from clipsteer.training.world import World

__all__ = [
    "ActivationSource",
    "ActivationStore",
    "Batch",
    "HarvestSource",
    "IterableSource",
    "Position",
    "TensorSource",
    "as_source",
    "harvest_to_store",
]

logger = logging.getLogger(__name__)

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_PROVENANCE = ("clip_model", "pretrained", "hook_point", "tokens", "setup")


class HarvestSource(ActivationSource):
    """A CLIP model run on the fly: an epoch permutes the images, and `images_per_group` of them
    fill a group.

    Args:
        clip: what ``clipsteer.load`` returns.
        dataset: map-style, of images (PIL, paths, preprocessed tensors) or (image, target) pairs.
        hook_point, tokens: one module, and which of its tokens: "all", "cls" or "patches".
        batch_size, num_workers: of the forward passes, and of the reading.

    A larger group shuffles better and holds images_per_group · tokens rows in memory. Random
    augmentations draw from torch's generator, which is seeded per (seed, epoch, group), so a
    resumed run sees the same ones.
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
        self.clip = clip
        self.dataset = dataset
        self.hook_point = hook_point
        self.tokens = tokens
        self.images_per_group = images_per_group
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.provenance = provenance(clip, hook_point, tokens)
        probe = self._run([0])
        self.tokens_per_image, self.d_in = probe.shape

    def _run(self, images: Sequence[int]) -> Tensor:
        chosen = Subset(self.dataset, images)
        loader = image_loader(self.clip, chosen, self.batch_size, self.num_workers)
        return torch.cat(list(harvest(self.clip, loader, self.hook_point, tokens=self.tokens)))

    def group_sizes(self, seed: int, epoch: int) -> list[int]:
        """Tokens of each group of images; the last may be smaller."""
        total, step = len(self.dataset), self.images_per_group
        return [min(step, total - at) * self.tokens_per_image for at in range(0, total, step)]

    def load_group(self, seed: int, epoch: int, group: int) -> Tensor:
        """The activations (n, d) of a group of images."""
        order = torch.randperm(len(self.dataset), generator=generator(seed, epoch))
        images = order[group * self.images_per_group : (group + 1) * self.images_per_group].tolist()
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would seed the GPUs' generators as well
            torch.default_generator.manual_seed(generator(seed, epoch, group).initial_seed())
            return self._run(images)


class ActivationStore(ActivationSource):
    """A directory of activation shards written by `harvest_to_store`; complete shards alone are
    read.

    An epoch permutes the shards; `buffer_shards` of them at a time are read and their rows permuted
    together (all of them, hence a full permutation, when `buffer_shards` is None). Memory: the
    buffer in the stored dtype.
    """

    def __init__(self, directory: str | Path, *, buffer_shards: int | None = 4) -> None:
        self.directory = Path(directory)
        path = self.directory / "store.json"
        self.metadata: dict[str, Any] = read_json(path)
        there = self.metadata if isinstance(self.metadata, dict) else {}
        total = there.get("shards")
        d_in = there.get("d_in")
        if type(total) is not int or type(d_in) is not int or total < 1 or d_in < 1:
            raise FileFormatError(f"{path}: not the description of an activation store")
        self.d_in = d_in
        self.shards: list[Path] = []
        self._sizes: list[int] = []
        for path in sorted(self.directory.glob("shard-*.safetensors")):
            entry = _read_entry(path)
            if entry is not None and path.stem[6:].isdecimal() and int(path.stem[6:]) < total:
                self.shards.append(path)
                self._sizes.append(entry["rows"])
        if not self.shards:
            raise FileFormatError(
                f"{self.directory}: no complete shard; run harvest_to_store again to go on with it"
            )
        if not self.complete:
            logger.warning("%s: %d of %d shards are there", self.directory, len(self.shards), total)
        known = [name for name in _PROVENANCE if name != "setup" or name in self.metadata]
        self.provenance = {name: self.metadata.get(name) for name in known}
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
            raise FileFormatError(
                f"{path}: expected activations {(self._sizes[index], self.d_in)}, got {got}"
            )
        return rows

    def _order(self, seed: int, epoch: int) -> list[list[int]]:
        order = torch.randperm(len(self.shards), generator=generator(seed, epoch)).tolist()
        return [
            order[at : at + self.buffer_shards] for at in range(0, len(order), self.buffer_shards)
        ]

    def group_sizes(self, seed: int, epoch: int) -> list[int]:
        """Rows of each group of shards."""
        return [sum(self._sizes[shard] for shard in group) for group in self._order(seed, epoch)]

    def load_group(self, seed: int, epoch: int, group: int) -> Tensor:
        """The rows (n, d) of a group of shards."""
        return torch.cat([self.read_shard(shard) for shard in self._order(seed, epoch)[group]])


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
    """Write the activations of `hook_point` over a map-style data set to shards under `directory`;
    resumable.

    A shard holds the rows of a fixed run of images (about `shard_rows` rows) and counts once its
    index file, written after it, is there; a second call with the same settings does only what is
    missing. `tokens` is "all", "cls" or "patches"; `dtype` "float16", "bfloat16" or "float32"
    (float16 overflows at 65504 and raises then). Another model, data set length or setting in the
    same directory raises ValueError. Under ``torchrun`` every process must call it: each writes its
    share of the shards, and none returns before all are there; the directory must be one that they
    all see.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected one of {sorted(_DTYPES)}, got {dtype!r}")
    if len(dataset) == 0:
        raise ValueError("dataset: it is empty")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    probe_loader = image_loader(clip, Subset(dataset, [0]), 1, 0)
    probe = torch.cat(list(harvest(clip, probe_loader, hook_point, tokens=tokens)))
    tokens_per_image, d_in = probe.shape
    images = max(1, shard_rows // tokens_per_image)
    settings = {
        **provenance(clip, hook_point, tokens),
        "dtype": dtype,
        "d_in": d_in,
        "tokens_per_image": tokens_per_image,
        "images": len(dataset),
        "images_per_shard": images,
        "shards": math.ceil(len(dataset) / images),
    }
    world = World(clip.device)
    _claim(directory, settings)
    mine = range(world.rank, settings["shards"], world.size)
    todo = [i for i in mine if _read_entry(_shard_path(directory, i)) is None]
    for index in tqdm(todo, desc=f"harvest {hook_point}", unit="shard", disable=None):
        span = range(index * images, min((index + 1) * images, len(dataset)))
        loader = image_loader(clip, Subset(dataset, span), batch_size, num_workers)
        parts = [
            part.to("cpu", _DTYPES[dtype])
            for part in harvest(clip, loader, hook_point, tokens=tokens)
        ]
        rows = torch.cat(parts).contiguous()
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"{hook_point}: activations are not finite in {dtype}; pass dtype='float32'"
            )
        path = _shard_path(directory, index)
        write_safetensors(path, {"activations": rows})
        entry = {"rows": len(rows), "images": [span.start, span.stop], "bytes": path.stat().st_size}
        write_json(path.with_suffix(".json"), entry)
    world.any(False)  # wait for the others
    store = ActivationStore(directory)
    if not store.complete:
        raise RuntimeError(
            f"{directory}: shards that other processes wrote are not seen here; use a shared "
            f"directory"
        )
    return store


def _claim(directory: Path, settings: dict[str, Any]) -> None:
    path = directory / "store.json"
    if not path.exists():
        write_json(path, settings)
        return
    found = read_json(path)
    if not isinstance(found, dict):
        raise FileFormatError(f"{path}: expected a JSON object")
    if "setup" not in found and "setup" in settings and "quick_gelu" not in settings["setup"]:
        # of a version that did not write it, and built every model without
        logger.warning("%s does not say how its images were preprocessed", path)
        settings = {key: value for key, value in settings.items() if key != "setup"}
    changed = [key for key, value in settings.items() if found.get(key) != value]
    differing = [f"{key}: {found.get(key)!r} there, {settings[key]!r} asked for" for key in changed]
    if differing:
        raise ValueError(
            f"{directory} holds another harvest ({'; '.join(differing)}); choose another directory"
        )


def _shard_path(directory: Path, index: int) -> Path:
    return directory / f"shard-{index:06d}.safetensors"


def _read_entry(path: Path) -> dict[str, Any] | None:
    try:
        entry = read_json(path.with_suffix(".json"))
        rows, size = entry["rows"], entry["bytes"]
        return entry if type(rows) is int and rows > 0 and path.stat().st_size == size else None
    except (OSError, FileFormatError, KeyError, TypeError):
        return None
