"""Sets without the images that cannot be read, where somebody would rather go on without them."""

from __future__ import annotations

import os
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from clipsteer.data.dataset import ImageDataset, renamed
from clipsteer.io.files import FileFormatError


def unreadable(dataset: ImageDataset) -> dict[int, str]:
    """Row -> why its image cannot be read, of all that cannot. Every image is read once, in
    threads, and nothing of it is kept."""
    first: dict[Hashable, int] = {}
    same = [first.setdefault(source, row) for row, source in enumerate(dataset.sources)]

    def look(row: int) -> str | None:
        try:
            dataset[row]
        except (FileFormatError, OSError) as error:
            return str(error)
        return None

    rows = list(first.values())
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        bar = tqdm(total=len(rows), desc="look for unreadable images", unit="image", disable=None)
        found: dict[int, str] = {}
        with bar:
            for row, why in zip(rows, threads.map(look, rows)):
                bar.update()
                if why is not None:
                    found[row] = why
    return {row: found[at] for row, at in enumerate(same) if at in found}


def without_unreadable(dataset: ImageDataset) -> ImageDataset:
    """The samples whose images can be read; `unreadable` of the set says of the others why.

    Classes that nothing is left of are left out too, as empty folders are.

    Raises ValueError where no image can be read.
    """
    found = unreadable(dataset)
    kept = [row for row in range(len(dataset)) if row not in found]
    whys = list(dict.fromkeys(found.values()))
    if found and not kept:
        raise ValueError(f"none of {len(dataset)} images can be read; the first: {whys[0]}")
    if found:
        dataset = dataset.subset(kept)
        if dataset.classes is not None:
            present = sorted(set(dataset.targets))
            dataset = renamed(dataset, [dataset.classes[target] for target in present])
    dataset.unreadable = whys
    return dataset
