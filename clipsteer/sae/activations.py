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

from clipsteer.clip.hooks import harvest, harvest_each
from clipsteer.clip.model import provenance
from clipsteer.clip.module import module_of
from clipsteer.clip.pixels import image_loader
from clipsteer.clip.shortcut import Shortcut
from clipsteer.data.identity import Identity, identity_of
from clipsteer.io.digests import described, digest_of, weights_digest
from clipsteer.io.files import FileFormatError
from clipsteer.sae import shards
from clipsteer.sae.sources import (
    ActivationSource,
    Batch,
    IterableSource,
    Position,
    TensorSource,
    as_source,
    generator,
    side_by_side,
)
from clipsteer.training.claim import claimed
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

_DTYPES = shards.DTYPES
_PROVENANCE = (*shards.PROVENANCE, "setup")


class HarvestSource(ActivationSource):
    """A CLIP model run on the fly: an epoch permutes the images, and `images_per_group` of them
    fill a group.

    Args:
        clip: what ``clipsteer.load`` returns.
        dataset: map-style, of images (PIL, paths, preprocessed tensors) or (image, target) pairs.
        hook_point, tokens: one module, and which of its tokens: "all", "cls" or "patches".
        target_hook_point: another one, for a transcoder: rows are pairs of both, from one pass.
        batch_size, num_workers: of the forward passes, and of the reading.

    A larger group shuffles better and holds images_per_group · tokens rows in memory. Random
    augmentations draw from torch's generator, which is seeded per (seed, epoch, group), so a
    resumed run sees the same ones.
    """

    from_files = True

    def __init__(
        self,
        clip: Any,
        dataset: Any,
        hook_point: str,
        *,
        tokens: str = "all",
        target_hook_point: str | None = None,
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
        self._hook_points = [hook_point]
        if target_hook_point is not None:
            self._hook_points.append(target_hook_point)
            self.provenance["target_hook_point"] = target_hook_point
        self._shortcut = Shortcut(module_of(clip))
        probe = self._run([0])
        self.tokens_per_image = len(probe[0])
        self.d_in = probe[0].shape[1]
        if target_hook_point is not None:
            self.d_out = probe[1].shape[1]
            if len(probe[1]) != len(probe[0]):
                raise ValueError(
                    f"hook points: an image has {len(probe[0])} tokens at {hook_point!r} and "
                    f"{len(probe[1])} at {target_hook_point!r}"
                )

    def identity(self) -> Identity | None:
        """Of the images and of the model that sees them."""
        return {"kind": "harvest", **_seen(self.clip, self.dataset)}

    def arrangement(self) -> dict[str, Any]:
        """The images, and how they fall into groups."""
        return {
            "data": identity_of(self.dataset),
            "images_per_group": self.images_per_group,
            "tokens_per_image": self.tokens_per_image,
        }

    def _run(self, images: Sequence[int]) -> list[Tensor]:
        """The rows (n, d) of some images at each hook point."""
        chosen = Subset(self.dataset, images)
        loader = image_loader(self.clip, chosen, self.batch_size, self.num_workers)
        parts = harvest_each(
            self.clip, loader, self._hook_points, tokens=self.tokens, shortcut=self._shortcut
        )
        return [torch.cat(list(rows)) for rows in zip(*parts)]

    def group_sizes(self, seed: int, epoch: int) -> list[int]:
        """Tokens of each group of images; the last may be smaller."""
        total, step = len(self.dataset), self.images_per_group
        return [min(step, total - at) * self.tokens_per_image for at in range(0, total, step)]

    def load_group(self, seed: int, epoch: int, group: int) -> Tensor:
        """The activations (n, d) of a group of images, pairs of them with a target."""
        order = torch.randperm(len(self.dataset), generator=generator(seed, epoch))
        images = order[group * self.images_per_group : (group + 1) * self.images_per_group].tolist()
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would seed the GPUs' generators as well
            torch.default_generator.manual_seed(generator(seed, epoch, group).initial_seed())
            found = self._run(images)
        return found[0] if len(found) == 1 else side_by_side(*found)


class ActivationStore(ActivationSource):
    """A directory of activation shards written by `harvest_to_store`; complete shards alone are
    read.

    An epoch permutes the shards; `buffer_shards` of them at a time are read and their rows permuted
    together (all of them, hence a full permutation, when `buffer_shards` is None). Memory: the
    buffer in the stored dtype. Each shard is held against its checksum when it is first read.

    Raises:
        FileFormatError: a damaged description or index, a shard of another size, or none that is
            complete. FileNotFoundError.
    """

    from_files = True

    def __init__(self, directory: str | Path, *, buffer_shards: int | None = 4) -> None:
        self.directory = Path(directory)
        self.metadata: dict[str, Any] = shards.read_description(self.directory)
        total = self.metadata["shards"]
        self.d_in = self.metadata["d_in"]
        self.shards = shards.shards_of(self.directory, total)
        self._entries = [shards.read_index(path) for path in self.shards]
        self._sizes = [entry["rows"] for entry in self._entries]
        # those that need not be looked at again
        self._checked = {i for i, entry in enumerate(self._entries) if "sha256" not in entry}
        if self._checked:
            logger.warning(
                "%s: %d shards of a version that kept no checksums; taken as they are",
                self.directory,
                len(self._checked),
            )
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
        if index not in self._checked:
            shards.check_shard(path, self._entries[index])
            self._checked.add(index)
        return shards.read_rows(path, self.metadata["dtype"], self._sizes[index], self.d_in)

    def identity(self) -> Identity | None:
        """Of the shards that are there: their checksums, or their sizes and times where they have
        none."""
        parts = []
        for path, entry in zip(self.shards, self._entries):
            known = entry.get("sha256") or [entry["bytes"], int(path.stat().st_mtime)]
            parts.append([path.name, entry["rows"], known])
        return {"kind": "shards", "rows": len(self), "shards": digest_of(parts)}

    def arrangement(self) -> dict[str, Any]:
        """The shards' rows and images, and how many shards are shuffled together."""
        found = {
            "rows": len(self),
            "shards": {path.name: size for path, size in zip(self.shards, self._sizes)},
            "buffer_shards": self.buffer_shards,
            "tokens_per_image": self.metadata["tokens_per_image"],
        }
        return found | {k: self.metadata[k] for k in ("data",) if k in self.metadata}

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
    (float16 overflows at 65504 and raises then). Another model, data set or setting in the same
    directory raises ValueError, another process that writes there RuntimeError. Under ``torchrun``
    every process must call it: each writes its share of the shards, and none returns before all are
    there; the directory must be one that they all see.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected one of {sorted(_DTYPES)}, got {dtype!r}")
    if len(dataset) == 0:
        raise ValueError("dataset: it is empty")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    probe_loader = image_loader(clip, Subset(dataset, [0]), 1, 0)
    asked: dict[str, Any] = {"tokens": tokens, "shortcut": Shortcut(module_of(clip))}
    probe = torch.cat(list(harvest(clip, probe_loader, hook_point, **asked)))
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
    settings |= _seen(clip, dataset)
    if (directory / shards.DESCRIPTION).exists():
        shards.begin(directory, settings)
    paths = [shards.shard_path(directory, index) for index in range(settings["shards"])]
    # a store that is whole is read, by any number of runs
    if world.any(not all(map(shards.is_done, paths))):
        with claimed(directory, "harvest_to_store", world):
            shards.begin(directory, settings)
            todo = [i for i in range(len(paths)) if i % world.size == world.rank]
            todo = [i for i in todo if not shards.is_done(paths[i])]
            for index in tqdm(todo, desc=f"harvest {hook_point}", unit="shard", disable=None):
                span = range(index * images, min((index + 1) * images, len(dataset)))
                loader = image_loader(clip, Subset(dataset, span), batch_size, num_workers)
                parts = [
                    part.to("cpu", _DTYPES[dtype])
                    for part in harvest(clip, loader, hook_point, **asked)
                ]
                rows = torch.cat(parts).contiguous()
                if not torch.isfinite(rows).all():
                    raise ValueError(
                        f"{hook_point}: activations are not finite in {dtype}; pass dtype='float32'"
                    )
                shards.write_shard(paths[index], rows, span)
            world.any(False)  # wait for the others
    store = ActivationStore(directory)
    if not store.complete:
        raise RuntimeError(
            f"{directory}: shards that other processes wrote are not seen here; use a shared "
            f"directory"
        )
    return store


def _seen(clip: Any, dataset: Any) -> dict[str, Any]:
    """What is seen and what sees it, beyond their names."""
    return {
        "data": identity_of(dataset),
        "weights": weights_digest(module_of(clip)),
        "preprocess": described(clip.preprocess),
    }
