"""Real pictures of known kinds: stamps of Tux Paint and pictures of GCompris, out of two Debian packages.

    python -m benchmarks.real_vit.pictures --out pictures

fetches tuxpaint-stamps-default and gcompris-qt-data (GPL-2+ and freer licences, see their copyright files; nothing of
them is in this repository), unpacks them with dpkg-deb, takes the pictures out of GCompris' Qt resources, and writes
index.json: of each picture its file, kind, whether it is drawn, and the group of near-duplicates that it belongs to.

A kind is a folder of stamps, or of GCompris' categorisation game, joined where both have it. Near-duplicates (one
drawing in two colours, mirrored, or numbered variants) share a group, and no group is on two sides of a split.
"""

from __future__ import annotations

import argparse
import functools
import re
import struct
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from clipsteer.continual.scenario import Scenario, task_sizes
from clipsteer.data.dataset import ImageDataset, _Reader, read_image
from clipsteer.data.emoji import stratified
from clipsteer.io.files import read_json, write_json
from clipsteer.io.images import IMAGE_SUFFIXES, open_image

PACKAGES = ("tuxpaint-stamps-default", "gcompris-qt-data")
INDEX = "index.json"
_STAMPS = "usr/share/tuxpaint/stamps"
_RESOURCES = "usr/share/gcompris-qt/rcc"
# GCompris' folder -> the kind of stamps that shows the same
_JOINED = {"fishes": "animals/fish", "tools": "household/tools", "monuments": "town/monuments"}
_ACTIVITY = "gcompris/src/activities/categorization/resource/images/"
# letters in three languages, filled and outlined: hundreds of near-duplicates; and what is no kind
_LEFT_OUT = {"symbols/alphabets", "town/cartoon", "gcompris/others"}
GROUPS = 8  # of near-duplicates, that a kind has at least
# share of neighbouring opaque pixels of one colour: photographs have noise, drawings have areas
PHOTO, DRAWING = 0.1, 0.5
ALIKE = 0.96  # correlation of thumbnails, mirrored or not


@dataclass(frozen=True)
class Picture:
    """One picture: its file relative to the folder, its kind, whether it is drawn (None: hard to say), its group."""

    file: str
    kind: str
    drawn: bool | None
    group: int


def fetch(folder: Path) -> None:
    """Download and unpack the packages into the folder, those that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if (folder / package).is_dir():
            continue
        if not list(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True)
        (archive,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder / package)], check=True)


def members(resource: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the uncompressed files in a Qt resource (.rcc): a tree of nodes, names, data, big-endian."""
    if resource[:4] != b"qres":
        raise ValueError(f"expected a Qt resource, which begins with 'qres', got {resource[:4]!r}")
    version, tree, data, names = struct.unpack_from(">4I", resource, 4)
    size = 22 if version >= 2 else 14  # with or without the time of change
    waiting = [(0, "")]
    while waiting:
        number, path = waiting.pop()
        at = tree + number * size
        name_at, flags = struct.unpack_from(">IH", resource, at)
        if number:
            (length,) = struct.unpack_from(">H", resource, names + name_at)
            start = names + name_at + 6  # behind a hash
            path = f"{path}/{resource[start : start + 2 * length].decode('utf-16-be')}".lstrip("/")
        if flags & 2:  # a folder: how many children, and the first
            count, first = struct.unpack_from(">2I", resource, at + 6)
            waiting += [(first + i, path) for i in range(count)]
        elif not flags & 5:  # neither zlib nor zstandard, which pictures gain nothing by
            (where,) = struct.unpack_from(">I", resource, at + 10)
            (length,) = struct.unpack_from(">I", resource, data + where)
            yield path, resource[data + where + 4 : data + where + 4 + length]


def _found(folder: Path) -> dict[str, str]:
    """File -> kind, of every picture."""
    kinds = {}
    stamps = folder / PACKAGES[0] / _STAMPS
    for path in sorted(stamps.rglob("*.png")):
        parts = path.relative_to(stamps).parts
        if len(parts) > 2:
            kinds[str(path.relative_to(folder))] = "/".join(parts[:2])
    unpacked = folder / "categorization"
    resource = folder / PACKAGES[1] / _RESOURCES / "categorization.rcc"
    for name, content in members(resource.read_bytes()):
        kind, _, file = name.removeprefix(_ACTIVITY).partition("/")
        if name.startswith(_ACTIVITY) and file and Path(file).suffix in IMAGE_SUFFIXES:
            path = unpacked / kind / Path(file).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            kinds[str(path.relative_to(folder))] = _JOINED.get(kind, f"gcompris/{kind}")
    return {file: kind for file, kind in kinds.items() if kind not in _LEFT_OUT}


def _drawn(path: Path) -> bool | None:
    """Whether a picture is a drawing, by its folder or its areas of one colour; None in between."""
    with open_image(path) as image:
        pixels = np.asarray(image.convert("RGBA")).astype(int)
    opaque = pixels[..., 3] > 200
    pairs = opaque[:, 1:] & opaque[:, :-1]
    same = (pixels[:, 1:, :3] == pixels[:, :-1, :3]).all(-1) & pairs
    flat = same.sum() / max(pairs.sum(), 1)
    if "cartoon" in path.parts or flat >= DRAWING:
        return True
    return None if flat >= PHOTO else False


def _thumbnail(path: Path) -> torch.Tensor:  # (1024,)
    """Grey, 32 x 32, of mean 0 and norm 1."""
    grey = read_image(path).convert("L").resize((32, 32))
    flat = torch.tensor(np.asarray(grey), dtype=torch.float64).flatten()
    flat = flat - flat.mean()
    return flat / flat.norm().clamp(min=1e-9)


def _base(file: str, known: Collection[str]) -> str:
    """The file that this one is a variant of, by its name, or itself: "cat_mirror", and "cat-2" or "cat_b" where there
    is a "cat" too. Numbers alone, as of flower1 … flower10, tell different pictures apart."""
    folder, _, name = file.rpartition("/")
    stem = name.rpartition(".")[0].lower()
    plain = re.sub(r"[-_ ]?(mirror|flip|left|right)$", "", stem)
    shorter = re.sub(r"[-_ ]?(\d+|[a-z])$", "", plain)
    if f"{folder}/{shorter}" in known:
        plain = shorter
    return f"{folder}/{plain}"


def groups(files: Sequence[str], thumbnails: torch.Tensor) -> list[int]:
    """The group of each file: near-duplicates by name, or by a correlation of their thumbnails of ALIKE and more,
    mirrored or not; and what is linked by others.

    thumbnails: (n, 1024), 32 x 32 of mean 0 and norm 1.
    """
    mirrored = thumbnails.reshape(-1, 32, 32).flip(2).flatten(1)
    alike = torch.maximum(thumbnails @ thumbnails.T, thumbnails @ mirrored.T) >= ALIKE
    group = list(range(len(files)))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    first: dict[str, int] = {}
    known = {file.rpartition(".")[0].lower() for file in files}
    for i, file in enumerate(files):
        group[root(i)] = root(first.setdefault(_base(file, known), i))
    for i, j in alike.nonzero().tolist():
        group[root(i)] = root(j)
    return [root(i) for i in range(len(files))]


def index(folder: Path) -> list[Picture]:
    """The pictures of kinds with at least GROUPS groups; read from index.json where that is there."""
    file = folder / INDEX
    if file.exists():
        return [Picture(**row) for row in read_json(file)]
    kinds = _found(folder)
    files = sorted(kinds)
    bar = tqdm(files, desc="pictures", unit="picture", disable=None)
    group = groups(files, torch.stack([_thumbnail(folder / file) for file in bar]))
    found = [Picture(name, kinds[name], _drawn(folder / name), g) for name, g in zip(files, group)]
    by_kind: dict[str, set[int]] = {}
    for picture in found:
        by_kind.setdefault(picture.kind, set()).add(picture.group)
    found = [picture for picture in found if len(by_kind[picture.kind]) >= GROUPS]
    write_json(file, [asdict(picture) for picture in found])
    return found


def split(pictures: Sequence[Picture], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows (kept, held out): of each kind about ``share`` of its groups, whole groups.

    A group that has two kinds goes with the first of them.
    """
    kinds = {picture.group: picture.kind for picture in reversed(pictures)}
    names = sorted(kinds)
    _, held = stratified([kinds[g] for g in names], seed, share)
    out = {names[i] for i in held}
    rows: tuple[list[int], list[int]] = ([], [])
    for row, picture in enumerate(pictures):
        rows[picture.group in out].append(row)
    return rows


@functools.cache
def _opened(path: str) -> Any:
    """An image on white, kept: runs of many epochs over some hundred pictures decode each once."""
    image = read_image(path)
    image.info["source"] = path  # what is computed of it may be kept by this
    return image


def dataset(folder: Path, pictures: Sequence[Picture], classes: Sequence[str]) -> ImageDataset:
    """The pictures with their kinds as targets, on white."""
    number = {kind: c for c, kind in enumerate(classes)}
    reader = _Reader(_opened, [(str(folder / picture.file),) for picture in pictures])
    return ImageDataset(reader, [number[picture.kind] for picture in pictures], classes)


def scenario(folder: Path, tasks: int, seed: int, pictures: Sequence[Picture] | None = None) -> Scenario:
    """All kinds in so many tasks. The parts (three tenths of the groups to test on, a fifth of the rest for
    validation) are the same for every seed, which is of the order of the classes."""
    pictures = index(folder) if pictures is None else pictures
    classes = sorted({picture.kind for picture in pictures})
    kept, held = split(pictures, 0.3, seed=0)
    rest = [pictures[row] for row in kept]
    fit, validation = split(rest, 0.2, seed=1)
    parts = [[rest[r] for r in fit], [rest[r] for r in validation], [pictures[r] for r in held]]
    train, chosen, test = (dataset(folder, part, classes) for part in parts)
    order = iter(np.random.RandomState(seed).permutation(len(classes)).tolist())
    cut = [[next(order) for _ in range(size)] for size in task_sizes(len(classes), tasks)]
    return Scenario(train, chosen, test, cut, classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    fetch(args.out)
    pictures = index(args.out)
    for kind in sorted({picture.kind for picture in pictures}):
        own = [picture for picture in pictures if picture.kind == kind]
        drawn = [picture.drawn for picture in own]
        sys.stdout.write(
            f"{kind}: {len(own)} pictures in {len({picture.group for picture in own})} groups, "
            f"{drawn.count(False)} photographs, {drawn.count(True)} drawings\n"
        )


if __name__ == "__main__":
    main()
