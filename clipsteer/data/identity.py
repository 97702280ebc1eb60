"""What a data set is known by, so that a run is not resumed on another.

Of files: their number, names below the folder that they share, sizes and targets; and their
contents, where there are at most 10,000 of at most 256 MiB together, or else the times of their
last change, in whole seconds. A folder that was moved, or copied with its times (``cp -a``,
``rsync -a``), is the same; so is a small one however it was copied. A file that was changed is seen
by its content, its size or its time. A large set costs a look at each file's size and time, some
microseconds each.

Of tensors, arrays and their data sets: a digest of all elements. Of any other data set: its length
and eight of its items, those of them that are the same when they are read twice, so that random
crops do not count; more cannot be had.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from clipsteer.data.dataset import ImageDataset
from clipsteer.io.checked import file_digest
from clipsteer.io.digests import described
from clipsteer.io.files import tensor_bytes

MAX_FILES = 10_000
MAX_BYTES = 256 << 20
ITEMS = 8
# of a tensor that is copied at a time
_PIECE = 1 << 24

Identity = dict[str, Any]


def identity_of(dataset: Any) -> Identity:
    """What ``dataset`` is known by: JSON-able, the same in every process and wherever it lies.

    Args:
        dataset: an `ImageDataset`, a tensor, paths of files with or without targets, or any
            map-style data set; of torchvision's, torch's and those of Hugging Face more is known
            than of others.
    """
    if isinstance(dataset, ImageDataset):
        return _of_images(dataset)
    if isinstance(dataset, Tensor):
        return {"kind": "tensor", "rows": len(dataset), "contents": tensor_digest([dataset])}
    if isinstance(dataset, Subset):
        rows = _digest(map(str, dataset.indices))
        return {"kind": "subset", "rows": rows, "of": identity_of(dataset.dataset)}
    if isinstance(dataset, ConcatDataset):
        parts = {str(i): identity_of(part) for i, part in enumerate(dataset.datasets)}
        return {"kind": "concatenation", **parts}
    if isinstance(dataset, TensorDataset):
        return _of_arrays(dataset.tensors, ())
    # what torchvision's data sets have: files with classes, or all images as one array
    arrays = getattr(dataset, "data", None)
    if isinstance(arrays, (Tensor, np.ndarray)):
        return _of_arrays([arrays], getattr(dataset, "targets", ()))
    fingerprint = getattr(dataset, "_fingerprint", None)
    if isinstance(fingerprint, str):
        return {"kind": "fingerprint", "samples": len(dataset), "fingerprint": fingerprint}
    listed = dataset if isinstance(dataset, (list, tuple)) else getattr(dataset, "samples", None)
    files = _files_of(listed)
    if files is not None:
        return _of_files(*files)
    return {"kind": "items", "samples": len(dataset), "items": _items(dataset)}


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of dtypes, shapes and elements, a piece of each on the CPU at a time."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        rows = max(1, _PIECE * len(tensor) // max(1, tensor.numel())) if tensor.ndim else 1
        for part in tensor.split(rows) if tensor.ndim else [tensor]:
            digest.update(tensor_bytes(part))
    return digest.hexdigest()


def _digest(words: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for word in words:
        # names of files may hold bytes that are no UTF-8
        digest.update(word.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _targets(targets: Iterable[Any], classes: Sequence[str] | None = None) -> str:
    return _digest([*map(str, classes or ()), "", *map(str, targets)])


def _of_images(dataset: ImageDataset) -> Identity:
    sources = dataset.sources
    targets = _targets(dataset.targets, dataset.classes)
    if sources and isinstance(sources[0], tuple):
        first = sources[0]
        if isinstance(first[0], Path):
            return _of_files(sources, targets)
        if isinstance(first[0], str):  # (style, index) of the bundled drawings
            names = _digest(map(str, sources))
            return {"kind": "drawings", "samples": len(sources), "names": names, "targets": targets}
    found = {"kind": "items", "samples": len(dataset), "targets": targets}
    return {**found, "items": _items(dataset)}


def _of_arrays(arrays: Sequence[Tensor | np.ndarray], targets: Iterable[Any]) -> Identity:
    tensors = [torch.as_tensor(array) for array in arrays]
    found = {"kind": "arrays", "samples": len(tensors[0]), "targets": _targets(targets)}
    return {**found, "contents": tensor_digest(tensors)}


def _files_of(listed: Any) -> tuple[list[tuple[Path, ...]], str] | None:
    """Files and a digest of their targets, of a list of paths or of (path, target) pairs."""
    if not isinstance(listed, (list, tuple)) or not listed:
        return None
    pairs = [item if isinstance(item, tuple) else (item,) for item in listed]
    if not all(pair and isinstance(pair[0], (str, os.PathLike)) for pair in pairs):
        return None
    return [(Path(pair[0]),) for pair in pairs], _targets(pair[1:] for pair in pairs)


def _of_files(sources: Sequence[tuple[Any, ...]], targets: str) -> Identity:
    """Of samples (file, …), what follows saying where in the file they are."""
    paths = list(dict.fromkeys(os.path.abspath(source[0]) for source in sources))
    folders = {os.path.dirname(path) for path in paths}
    shared = len(os.path.commonpath(folders)) if folders else 0
    stats = [_stat(path) for path in paths]
    total = sum(size for size, _ in stats)
    contents = None
    if len(paths) <= MAX_FILES and total <= MAX_BYTES:
        contents = _digest(file_digest(Path(path)) for path in paths if os.path.isfile(path))
    names = (path[shared:].lstrip(os.sep).replace(os.sep, "/") for path in paths)
    place = {path: number for number, path in enumerate(paths)}
    order = (f"{place[os.path.abspath(source[0])]} {source[1:]}" for source in sources)
    return {
        "kind": "files",
        "samples": len(sources),
        "names": _digest([*names, "", *order]),
        "sizes": _digest(str(size) for size, _ in stats),
        "targets": targets,
        "times": _digest(str(time) for _, time in stats),
        "contents": contents,
    }


def _stat(path: str) -> tuple[int, int]:
    """Size and time of last change in seconds; of what is not there, -1: reading will say it."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, int(found.st_mtime)


def _items(dataset: Any) -> str:
    rows = sorted(set(np.linspace(0, len(dataset) - 1, ITEMS).round().astype(int).tolist()))
    with _generators_kept():
        first, second = ([_item(dataset, row) for row in rows] for _ in range(2))
    return _digest(a if a == b else "random" for a, b in zip(first, second))


def _item(dataset: Any, row: int) -> str:
    try:
        return _digest(_words(dataset[row]))
    except Exception as error:
        # reading it will say it, and may have been told to pass it over
        return type(error).__name__


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Random transforms of the items draw from no generator that training draws from."""
    python = random.getstate()
    array = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _words(item: Any) -> Iterator[str]:
    """An item of a data set as text: an image, a tensor, a path, or what holds these."""
    if isinstance(item, Tensor):
        yield tensor_digest([item])
    elif isinstance(item, np.ndarray):
        yield f"{item.dtype} {item.shape} {hashlib.sha256(item.tobytes()).hexdigest()}"
    elif hasattr(item, "tobytes") and hasattr(item, "mode"):  # a PIL image
        yield f"{item.mode} {item.size} {hashlib.sha256(item.tobytes()).hexdigest()}"
    elif isinstance(item, Mapping):
        for key, value in item.items():
            yield str(key)
            yield from _words(value)
    elif isinstance(item, (list, tuple)):
        for value in item:
            yield from _words(value)
    elif isinstance(item, (str, os.PathLike)) and os.path.isfile(item):
        yield f"{os.path.basename(item)} {file_digest(Path(item))}"
    else:
        yield described(item)[:1000]
