"""The same rows of several layers and models: one pass over the images a model, resumable.

Of patches, places are drawn on the picture, not in the grid, inside of what every model sees of it:
models with other grids and other crops are compared at the same places.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer.alignment.config import AlignmentConfig
from clipsteer.clip.hooks import captured, evaluating, match
from clipsteer.clip.model import CLIP, provenance
from clipsteer.clip.module import module_of
from clipsteer.clip.pixels import as_pixels, image_of
from clipsteer.clip.seen import Box, seen_box
from clipsteer.clip.shortcut import Shortcut
from clipsteer.clip.tokens import Layout, layout_at
from clipsteer.data.identity import identity_of
from clipsteer.io.digests import described, digest_of, weights_digest
from clipsteer.io.images import read_image
from clipsteer.sae import shards
from clipsteer.sae.site import grid_side
from clipsteer.training.claim import claimed
from clipsteer.training.schedule import seed_of

logger = logging.getLogger(__name__)

EMBEDDING = "embedding"  # a layer beside the modules: unit image embeddings
_PER_SHARD = 512  # images
# a sequence whose points fill a square evenly, whatever their number (Roberts 2018)
_PLASTIC = 1.324717957244746
_STEPS = (1 / _PLASTIC, 1 / _PLASTIC**2)


class Rows(NamedTuple):
    """Rows of some layers of one model; layers have the names of modules."""

    layers: dict[str, Tensor]  # name -> (N, d)
    images: Tensor  # (N,) int64


@dataclass(frozen=True)
class Places:
    """Where on each picture rows are taken, in shares of its sides.

    Attributes:
        transforms: the preprocessing of every model that is compared.
        count: places of a picture.
    """

    transforms: tuple[Any, ...]
    count: int
    seed: int

    def __post_init__(self) -> None:
        ways = {described(transform): transform for transform in self.transforms}
        unknown = [t for t in ways.values() if seen_box(t, (64, 64)) is None]
        if len(ways) > 1 and unknown:
            logger.warning(
                "align: what part of a picture %s shows is not known; it is taken for the whole, "
                "so that rows may lie elsewhere in the other model",
                unknown[0],
            )

    def of_picture(self, number: int, size: tuple[int, int] | None) -> list[tuple[float, float]]:
        """(x, y) of each place of a picture of this size, inside of what all models see."""
        generator = torch.Generator().manual_seed(seed_of("place", self.seed, number))
        start = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        boxes = [_box(transform, size) for transform in self.transforms]
        left, top = (max(0.0, *side) for side in zip(*((b.left, b.top) for b in boxes)))
        right, bottom = (min(1.0, *side) for side in zip(*((b.right, b.bottom) for b in boxes)))
        found = []
        for i in range(self.count):
            u, v = ((s + i * step) % 1 for s, step in zip(start, _STEPS))
            found.append((left + u * (right - left), top + v * (bottom - top)))
        return found

    def digest(self) -> str:
        """Of all that decides where places are."""
        how = [described(transform) for transform in self.transforms]
        return digest_of([how, self.count, self.seed])[:12]


def _box(transform: Any, size: tuple[int, int] | None) -> Box:
    """What a model sees; of tensors, and through transforms that are not known, all."""
    found = None if size is None else seen_box(transform, size)
    return Box(0.0, 0.0, 1.0, 1.0) if found is None else found


def layers_of(clip: CLIP, patterns: Sequence[str]) -> list[str]:
    """The modules that patterns match, each once, in the order of the patterns; of a pattern that
    matches modules of both towers those of the image tower.

    Raises ValueError for a pattern that matches none.
    """
    names = []
    for pattern in patterns:
        found = [EMBEDDING] if pattern == EMBEDDING else match("align", clip, pattern)
        names += [name for name in found if name.startswith("visual.")] or found
    return list(dict.fromkeys(names))


def every_block(clip: CLIP) -> list[str]:
    """The blocks of the image tower. Raises ValueError for a tower that has none."""
    for pattern in ("visual.transformer.resblocks.*", "visual.trunk.blocks.*"):
        names = [name for name, _ in module_of(clip).named_modules()]
        stem = pattern.removesuffix("*")
        found = [n for n in names if n.startswith(stem) and n.removeprefix(stem).isdecimal()]
        if found:
            return found
    raise ValueError(
        f"align: {clip.name} has no blocks at visual.transformer.resblocks or visual.trunk.blocks; "
        "pass hook points, names or patterns of its modules"
    )


def harvest_rows(
    clip: CLIP,
    dataset: Any,
    layers: Sequence[str],
    config: AlignmentConfig,
    places: Places,
    folder: str | Path,
    title: str = "rows",
) -> Rows:
    """Rows of some layers over the images of a data set, kept in a folder.

    A second call with the same settings does only what is missing.

    Args:
        layers: names of modules, or "embedding".
        places: of the rows, where ``config.tokens`` is "patches".

    Raises:
        ValueError: no image; another harvest in the folder; tokens that a layer has not.
        FileFormatError: a damaged file. RuntimeError: another process writes there.
    """
    if len(dataset) == 0:
        raise ValueError("align: the data set is empty")
    if not layers:
        raise ValueError("align: there is no layer to look at")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    taken = _Taken(clip, layers, config, places)
    probe = taken([_image(dataset, 0)], range(1))
    widths = [part.shape[1] for part in probe]
    each = len(probe[0])
    count = len(dataset)
    settings = {
        **provenance(clip, " ".join(layers), f"{config.tokens} at {places.digest()}"),
        "dtype": "float32",
        "d_in": sum(widths),
        "tokens_per_image": each,
        "images": count,
        "images_per_shard": _PER_SHARD,
        "shards": math.ceil(count / _PER_SHARD),
        "data": identity_of(dataset),
        "weights": weights_digest(module_of(clip)),
        "preprocess": described(clip.preprocess),
    }
    with claimed(folder, "align"):
        shards.begin(folder, settings)
        paths = [shards.shard_path(folder, i) for i in range(settings["shards"])]
        todo = [i for i, path in enumerate(paths) if not shards.is_done(path)]
        images = sum(min(_PER_SHARD, count - i * _PER_SHARD) for i in todo)
        with tqdm(total=images, desc=title, unit="image", disable=None) as bar:
            for i in todo:
                span = range(i * _PER_SHARD, min((i + 1) * _PER_SHARD, count))
                parts = []
                for some in _batches(span, config.batch_size):
                    found = taken([_image(dataset, row) for row in some], some)
                    parts.append(torch.cat(found, 1))
                    bar.update(len(some))
                rows = torch.cat(parts)
                if not bool(rows.isfinite().all()):
                    raise ValueError(f"align: {clip.name} gives activations that are not finite")
                shards.write_shard(paths[i], rows, span)
    every = []
    for path in paths:
        index = shards.read_index(path)
        shards.check_shard(path, index)
        every.append(shards.read_rows(path, "float32", index["rows"], sum(widths)))
    split = torch.cat(every).split(widths, 1)
    owner = torch.arange(count).repeat_interleave(each)
    return Rows(dict(zip(layers, (part.contiguous() for part in split))), owner)


def _batches(span: range, size: int) -> Iterator[range]:
    for at in range(span.start, span.stop, size):
        yield range(at, min(at + size, span.stop))


def _image(dataset: Any, row: int) -> Any:
    image = image_of(dataset[row])
    return read_image(os.fspath(image)) if isinstance(image, str | os.PathLike) else image


class _Taken:
    """The rows that images have in some layers of a model."""

    def __init__(
        self, clip: CLIP, layers: Sequence[str], config: AlignmentConfig, places: Places
    ) -> None:
        self.clip = clip
        self.layers = layers
        self.tokens = config.tokens
        self.places = places
        # passes end at the last layer that is looked at
        self.shortcut = None if EMBEDDING in layers else Shortcut(module_of(clip))
        self.layouts = {name: layout_at(clip, name) for name in layers if name != EMBEDDING}
        for layout in self.layouts.values():
            layout.check("align", ["cls" if config.tokens == "cls" else "patches"])
        if self.tokens == "patches" and EMBEDDING in layers:
            raise ValueError(
                "align: an image has one embedding, not one a patch; pass tokens='cls' or 'mean'"
            )

    def __call__(self, images: Sequence[Any], numbers: range) -> list[Tensor]:
        """(images · rows, d) of each layer, float32 on the CPU."""
        sizes = [getattr(image, "size", None) for image in images]
        sizes = [size if isinstance(size, tuple) else None for size in sizes]
        pixels = torch.stack([as_pixels(image, self.clip.preprocess) for image in images])
        if self.shortcut is not None:
            self.shortcut.next(pixels)
        names = list(self.layouts)
        watch = captured("align", self.clip, names, detach=True, shortcut=self.shortcut)
        embedded = torch.empty(0)
        with evaluating(self.clip), watch as found:
            embedded = self.clip.embed(pixels)
        parts = []
        for name in self.layers:
            if name == EMBEDDING:
                rows = embedded
            elif name in found:
                rows = self._rows(found[name], self.layouts[name], numbers, sizes)
            else:
                raise ValueError(f"align: the forward pass never calls {name!r} as a module")
            parts.append(rows.float().cpu())
        return parts

    def _rows(
        self,
        x: Tensor,  # (B, T, d)
        layout: Layout,
        numbers: range,
        sizes: Sequence[tuple[int, int] | None],
    ) -> Tensor:
        """(B · rows, d)"""
        kind = "cls" if self.tokens == "cls" else "patches"
        kept = x[:, layout.where("align", kind, x.shape[1])]  # (B, T', d)
        if self.tokens == "cls":
            return kept[:, 0]
        if self.tokens == "mean":
            return kept.mean(1)
        side = grid_side(kept.shape[1])
        if not side:
            raise ValueError(
                f"align: the {kept.shape[1]} patches at {layout.hook_point!r} form no square grid; "
                "pass tokens='mean' or 'cls'"
            )
        where = []
        for row, (number, size) in enumerate(zip(numbers, sizes)):
            box = _box(self.clip.preprocess, size)
            for px, py in self.places.of_picture(number, size):
                column = _cell(px, box.left, box.right, side)
                line = _cell(py, box.top, box.bottom, side)
                where.append(row * side * side + line * side + column)
        return kept.flatten(0, 1)[torch.tensor(where, device=kept.device)]


def _cell(place: float, low: float, high: float, cells: int) -> int:
    """Which of the cells between low and high holds a place."""
    share = (place - low) / (high - low)
    return min(max(int(share * cells), 0), cells - 1)
