"""Build a site: look at the images once, work out what features are and do, write pages' data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clipsteer._version import __version__
from clipsteer.browse import images, pictures
from clipsteer.browse.codes import FeatureCodes
from clipsteer.browse.cost import Budget
from clipsteer.browse.effects import STRENGTHS, Effects, how_many
from clipsteer.browse.explained import Explained, find_predictions, labelled
from clipsteer.browse.features import FEATURE_SHARD, FeaturePages
from clipsteer.browse.files import FORMAT, Folder
from clipsteer.browse.probes import Probes
from clipsteer.browse.relations import Classes, Coactivity
from clipsteer.browse.survey import IMAGE_SHARD, Survey
from clipsteer.browse.words import HOW, Words
from clipsteer.clip.model import CLIP
from clipsteer.clip.module import module_of
from clipsteer.data.dataset import spread, told_apart
from clipsteer.data.emoji import EmojiStyles
from clipsteer.data.identity import identity_of
from clipsteer.io.digests import described, digest_of, tensors_digest, weights_digest
from clipsteer.sae.model import SAE
from clipsteer.training.claim import claimed

# multiply-adds for steering and for removing features: some ten seconds each on two cores
BUDGET = 1e12
STEER_IMAGES = 4
# pictures through whose derivative directions are read
_READ_ON = 8


def build_site(
    sae: SAE,
    clip: CLIP,
    dataset: Any,
    out: str | Path,
    *,
    words: Sequence[str] | None = None,
    title: str | None = None,
    name: str | None = None,
    data_name: str | None = None,
    hook_point: str | None = None,
    tokens: str | None = None,
    target_hook_point: str | None = None,
    steer: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a site on which an SAE can be looked into: a folder that opens from disk.

    A build that was stopped goes on where it was, and gives the same files; one that is done is
    left as it is.

    Args:
        dataset: N images or (image, target) pairs, map-style.
        out: a new folder, or one in which the same site was begun. What else is there is never
            touched.
        words: what features can be called; by default the classes and the bundled concepts. Not
            used where the tower has no text.
        title, name, data_name: of the site, the SAE and the images, as they are shown.
        hook_point, tokens, target_hook_point: by default what the SAE's metadata say.
        steer: of how many features predictions over all strengths are stored, the most steerable
            first; None: as many as 10¹² multiply-adds allow (all of a small model's).
        seed: of the pictures that are drawn from intervals of activation.

    Returns the path of the page.

    Raises:
        ValueError: no images, an SAE that does not fit the model, a folder that holds something
            else. RuntimeError: another process builds there.
    """
    if len(dataset) == 0:
        raise ValueError("dataset: it is empty; a site needs images")
    if steer is not None and steer < 0:
        raise ValueError(f"steer: expected a number of features, at least 0, got {steer}")
    known = _words(clip, dataset, words)
    place = {"hook_point": hook_point, "tokens": tokens, "target_hook_point": target_hook_point}
    explained = Explained.find(sae, clip, **place)
    names = {
        "name": name or "SAE",
        "data": data_name or "images",
    }
    names["title"] = title or f"{names['name']} on {names['data']}"
    settings = _settings(explained, dataset, known, names, steer, seed)
    out = Path(out)
    with claimed(out, "sae browse"):
        folder = Folder(out, settings)
        if not folder.is_complete:
            _Build(explained, dataset, folder, known, names, steer, seed).run()
            folder.finish()
    return out / "index.html"


def _words(clip: CLIP, dataset: Any, words: Sequence[str] | None) -> list[str]:
    if not clip.has_text:
        return []
    if words is None:
        classes = [name.replace("_", " ") for name in told_apart(dataset) or []]
        words = [*classes, *(concept.label for concept in EmojiStyles().concepts)]
    return list(dict.fromkeys(words))


def _settings(
    explained: Explained,
    dataset: Any,
    words: list[str],
    names: dict[str, str],
    steer: int | None,
    seed: int,
) -> dict[str, Any]:
    """All that a site depends on."""
    sae, clip = explained.sae, explained.clip
    return {
        "version": __version__,
        "names": names,
        "sae": digest_of([sae.config, tensors_digest(sae.state_dict())]),
        "model": digest_of([weights_digest(module_of(clip)), described(clip.preprocess)]),
        "hook_point": explained.site.hook_point,
        "target_hook_point": explained.target.hook_point,
        "tokens": explained.site.tokens,
        "data": identity_of(dataset),
        "words": digest_of(words),
        "steer": steer,
        "seed": seed,
    }


class _Build:
    """The steps of a build, each of which needs those before it."""

    def __init__(
        self,
        explained: Explained,
        dataset: Any,
        folder: Folder,
        words: list[str],
        names: dict[str, str],
        steer: int | None,
        seed: int,
    ) -> None:
        self.explained = explained
        self.dataset = dataset
        self.folder = folder
        self.words = words
        self.names = names
        self.steer = steer
        self.seed = seed
        self.budget = Budget(BUDGET)
        self.known = labelled(explained.clip, dataset)

    def run(self) -> None:
        """All of it; what is there already is read."""
        survey = Survey(
            self.explained, self.dataset, self.folder, "images", thumbs=True, budget=self.budget
        )
        survey.run()
        embeddings = survey.column("embeddings")
        predictions = find_predictions(self.explained.clip, self.dataset, self.words, embeddings)
        self.explained = replace(self.explained, predictions=predictions)
        codes = FeatureCodes(survey)
        moved, read_on = self._moved(survey, embeddings.shape[1])
        words = None
        if self.words:
            words = Words(self.explained.clip, self.words, embeddings, moved)
        probed = spread(range(survey.images), STEER_IMAGES)
        found = self._effects(survey, codes, moved, probed)
        classes = None
        if self.known is not None:
            classes = Classes(self.known.labels.numpy(), len(self.known.classes))
        coactivity = Coactivity(survey)
        pages = FeaturePages(codes, coactivity, classes, words, found, probed, self.seed)
        pages.write(self.folder)
        columns = images.write_images(self.folder, survey, predictions, codes.peaks)
        self.folder.put("pictures", images.captions(self.dataset, self.known) | columns)
        self.folder.put("site", self._site(survey, found, coactivity, read_on), plain=True)

    def _moved(self, survey: Survey, width: int) -> tuple[Tensor, int]:
        """(d_sae, e) where each decoder row takes the embedding, and on how many pictures that was
        read."""
        explained = self.explained
        passes = self.budget.passes(explained, survey.facts.tokens) // width
        rows = spread(range(survey.images), min(_READ_ON, max(1, passes)))
        jacobian = Probes.of(explained, self.dataset, rows).jacobian()  # (e, d)
        directions = explained.sae.W_dec.detach()
        return (directions.to(jacobian) @ jacobian.T).float().cpu(), len(rows)

    def _effects(
        self,
        survey: Survey,
        codes: FeatureCodes,
        moved: Tensor,  # (d_sae, e)
        probed: list[int],
    ) -> Effects | None:
        predictions = self.explained.predictions
        if predictions is None:
            return None
        probes = Probes.of(self.explained, self.dataset, probed)
        # to first order, how far the feature at its peak takes the embedding
        promise = moved.norm(dim=1).numpy() * codes.peaks
        order = np.argsort(-promise, kind="stable")[: int((codes.peaks > 0).sum())]
        measured, tabled = how_many(
            self.budget, probes, survey.facts.tokens, self.steer, len(order)
        )
        return Effects(
            probes,
            predictions,
            self.folder,
            survey.name,
            order.tolist(),
            codes.peaks,
            measured=measured,
            tabled=tabled,
        )

    def _site(
        self, survey: Survey, found: Effects | None, coactivity: Coactivity, read_on: int
    ) -> dict[str, Any]:
        explained = self.explained
        sae, clip, predictions = explained.sae, explained.clip, explained.predictions
        target = None if sae.d_out is None else explained.target.hook_point
        has_words = {"count": len(self.words), "how": HOW.format(images=read_on)}
        answers = None
        if predictions is not None:
            answers = {"names": predictions.names, "how": predictions.how}
        return {
            "format": FORMAT,
            "version": __version__,
            "title": self.names["title"],
            "model": {
                "name": clip.name,
                "pretrained": clip.pretrained,
                "hook_point": explained.site.hook_point,
                "target_hook_point": target,
                "tokens": explained.site.tokens,
            },
            "sae": {
                "name": self.names["name"],
                "architecture": sae.architecture,
                "k": sae.k,
                "d_in": sae.d_in,
                "d_sae": sae.d_sae,
            },
            "data": {
                "name": self.names["data"],
                "images": survey.images,
                "tokens": survey.facts.tokens,
                "classes": None if self.known is None else self.known.classes,
            },
            "grid": survey.facts.grid,
            "prefix": survey.facts.prefix,
            "predictions": answers,
            "words": has_words if self.words else None,
            "strengths": STRENGTHS,
            "steered": 0 if found is None else len(found),
            "steer_images": min(STEER_IMAGES, survey.images),
            "bins": pictures.BINS,
            "feature_shard": FEATURE_SHARD,
            "image_shard": IMAGE_SHARD,
            "coactive_tokens": coactivity.tokens,
            "per_patch": images.PER_PATCH,
            "live": False,
            "compare": None,
        }
