"""What a served site asks of the model: any feature at any strength, and pictures of one's own."""

from __future__ import annotations

import base64
import json
import math
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from clipsteer.browse.cost import Budget
from clipsteer.browse.explained import Explained, Predictions, find_predictions
from clipsteer.browse.files import Folder, listed
from clipsteer.browse.images import entries
from clipsteer.browse.probes import Probes
from clipsteer.browse.survey import Survey
from clipsteer.clip.pixels import as_pixels, image_of
from clipsteer.io.digests import digest_of
from clipsteer.io.files import FileFormatError
from clipsteer.io.images import read_image

# pictures that are steered in one answer
MOST_IMAGES = 32
# multiply-adds for removing features of one picture
_BUDGET = 5e10
# groups of pictures whose activations, and pictures of one's own whose pixels, are kept
_KEPT = 8

T = TypeVar("T")


def read_data(out: Path, key: str) -> Any:
    """A piece of a site's data. Raises FileFormatError where it is not as a build writes it."""
    path = out / "data" / f"{key}.js"
    head, tail = f'clipsteer.put("{key}",', ");"
    text = path.read_text(encoding="ascii").strip()
    if not (text.startswith(head) and text.endswith(tail)):
        raise FileFormatError(f"{path}: expected one call of clipsteer.put; build the site again")
    try:
        value = json.loads(text[len(head) : -len(tail)])
        if isinstance(value, str):
            value = json.loads(zlib.decompress(base64.b64decode(value)))
    except (ValueError, zlib.error) as error:
        raise FileFormatError(f"{path}: damaged ({error}); build the site again") from error
    return value


class Live:
    """The model behind a site. One call at a time: it is not safe from several threads.

    Args:
        out: a site that was built to its end.
        explained: the SAE at its place in the model that the site is of.
        dataset: the images that it was built over.

    Raises ValueError where the site is of another SAE or of other images.
    """

    def __init__(self, out: Path, explained: Explained, dataset: Any) -> None:
        self.site = read_data(out, "site")
        there = (self.site["sae"]["d_sae"], self.site["data"]["images"])
        here = (explained.sae.d_sae, len(dataset))
        if there != here:
            raise ValueError(
                f"serve: {out} is a site of {there[0]} features over {there[1]} images, got "
                f"{here[0]} and {here[1]}; build it for these"
            )
        self.dataset = dataset
        peaks = np.asarray(read_data(out, "overview")["peak"], dtype=np.float32)
        self.peaks = np.where(peaks > 0, peaks, np.nan)
        answers = self.site["predictions"]
        if answers is not None:
            found = find_predictions(explained.clip, dataset, answers["names"])
            if found is None or found.names != answers["names"]:
                raise ValueError(f"serve: {out} tells images apart by other names; build it again")
            explained = replace(explained, predictions=found)
        self.explained = explained
        self._probes: OrderedDict[Any, Probes] = OrderedDict()
        self._own: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def predictions(self) -> Predictions:
        """What images are told apart by. Raises ValueError where there is nothing."""
        found = self.explained.predictions
        if found is None:
            raise ValueError("there is nothing to predict: no text tower and no classes")
        return found

    def describe(self, content: bytes) -> dict[str, Any]:
        """A picture of one's own, as a site describes one of its images, with ``id`` and ``thumb``
        (a data URL). Raises FileFormatError for bytes that are no image."""
        image = read_image(content, "the picture")
        with tempfile.TemporaryDirectory() as place:
            survey = Survey(
                self.explained,
                [image],
                Folder(Path(place), {}),
                "own",
                thumbs=True,
                budget=Budget(_BUDGET),
            )
            survey.run()
            (entry,) = entries(survey, survey.seen(0), self.explained.predictions, self.peaks)
            (thumb,) = survey.folder.thumbs.iterdir()
            encoded = base64.b64encode(thumb.read_bytes()).decode("ascii")
        name = digest_of([content.hex()])
        _keep(self._own, name, as_pixels(image, self.explained.clip.preprocess))
        return {**entry, "id": name, "thumb": f"data:image/webp;base64,{encoded}"}

    def steer(
        self, feature: int, strength: float, rows: Sequence[int], own: str | None
    ) -> dict[str, Any]:
        """Probabilities (P, C) of pictures before and after a feature is set to a multiple of its
        peak: ``own`` first, where it is given, then images of the data.

        Raises ValueError for what is not there.
        """
        if not 0 <= feature < len(self.peaks):
            raise ValueError(f"feature: expected one in [0, {len(self.peaks)}), got {feature}")
        if not math.isfinite(self.peaks[feature]):
            raise ValueError(f"feature {feature} is never active: it has no peak")
        wanted = strength * float(self.peaks[feature])
        if not math.isfinite(wanted) or abs(wanted) > torch.finfo(torch.float32).max:
            raise ValueError(f"strength: expected a finite multiple of the peak, got {strength}")
        predictions = self.predictions
        probes = self._pictures(rows, own)
        after = predictions.of(probes.set([feature], torch.tensor([[wanted]]))[0, 0])
        before = predictions.of(probes.embeddings)
        return {"before": listed(before.cpu().numpy()), "after": listed(after.cpu().numpy())}

    def _pictures(self, rows: Sequence[int], own: str | None) -> Probes:
        key = (own, *rows)
        if key not in self._probes:
            images = len(self.dataset)
            if not 1 <= len(rows) + (own is not None) <= MOST_IMAGES:
                raise ValueError(f"images: expected 1 to {MOST_IMAGES}, got {len(rows)}")
            if outside := [row for row in rows if not 0 <= row < images]:
                raise ValueError(f"images: expected rows in [0, {images}), got {outside[0]}")
            if own is not None and own not in self._own:
                raise ValueError("your picture was forgotten; choose it again")
            clip = self.explained.clip
            pixels = [] if own is None else [self._own[own]]
            given = (image_of(self.dataset[row]) for row in rows)
            pixels += [as_pixels(image, clip.preprocess) for image in given]
            stacked = torch.stack(pixels).to(clip.device, clip.dtype)
            _keep(self._probes, key, Probes(self.explained, stacked))
        self._probes.move_to_end(key)
        return self._probes[key]


def _keep(kept: OrderedDict[Any, T], key: Any, value: T) -> None:
    """Add a value, and forget the one that was asked for longest ago."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > _KEPT:
        kept.popitem(last=False)
