"""Build a site: look at the images once, work out what features are and do, write pages' data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipsteer._version import __version__
from clipsteer.browse import images, pictures
from clipsteer.browse.compare import Comparison, is_same_sae, match, order_of_matches
from clipsteer.browse.cost import Budget
from clipsteer.browse.effects import STRENGTHS
from clipsteer.browse.explained import Explained, labelled
from clipsteer.browse.features import FEATURE_SHARD, FeaturePages
from clipsteer.browse.files import FORMAT, Folder, check_place
from clipsteer.browse.relations import Coactivity
from clipsteer.browse.sides import Job, Side
from clipsteer.browse.survey import IMAGE_SHARD, facts_of
from clipsteer.browse.words import HOW
from clipsteer.clip.model import CLIP
from clipsteer.clip.module import module_of
from clipsteer.data.dataset import told_apart
from clipsteer.data.emoji import names_of_things
from clipsteer.data.identity import identity_of
from clipsteer.io.digests import described, digest_of, tensors_digest, weights_digest
from clipsteer.sae.model import SAE
from clipsteer.training.claim import claimed

# multiply-adds for steering and for removing features: some ten seconds each on two cores
BUDGET = 1e12


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
    compare: Explained | None = None,
    compare_name: str | None = None,
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
            first; None: as many as half of 10¹² multiply-adds allow.
        compare: another SAE at its place in a model, or this one on another model; ``compare_name``
            is how it is shown.
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
    out = Path(out)
    check_place(out)
    known = _words(clip, dataset, words)
    explained = Explained.find(
        sae, clip, hook_point=hook_point, tokens=tokens, target_hook_point=target_hook_point
    )
    if clip.has_text and len(known) < 2:
        raise ValueError(f"words: expected at least 2 that differ, got {known}")
    # what does not fit is said before anything is written
    for one in (explained, compare):
        if one is not None:
            facts_of(one, dataset)
    names = {"name": name or "SAE", "data": data_name or "images"}
    names["title"] = title or f"{names['name']} on {names['data']}"
    settings = _settings(explained, known)
    settings |= {"names": names, "data": identity_of(dataset), "steer": steer, "seed": seed}
    if compare is not None:
        names["compare"] = compare_name or compare.clip.name
        settings["compare"] = _settings(compare, known)
    with claimed(out, "sae browse"):
        folder = Folder(out, settings)
        if not folder.is_complete:
            job = Job(dataset, folder, known, labelled(clip, dataset), Budget(BUDGET), seed)
            _build(job, explained, compare, names, steer)
            folder.finish()
    return out / "index.html"


def _words(clip: CLIP, dataset: Any, words: Sequence[str] | None) -> list[str]:
    if not clip.has_text:
        return []
    if words is None:
        return names_of_things(told_apart(dataset) or ())
    return list(dict.fromkeys(words))


def _settings(explained: Explained, words: list[str]) -> dict[str, Any]:
    """What is explained, by its digests."""
    sae, clip = explained.sae, explained.clip
    return {
        "version": __version__,
        "sae": digest_of([sae.config, tensors_digest(sae.state_dict())]),
        "model": digest_of([weights_digest(module_of(clip)), described(clip.preprocess)]),
        "hook_point": explained.site.hook_point,
        "target_hook_point": explained.target.hook_point,
        "tokens": explained.site.tokens,
        "words": digest_of(words),
    }


def _build(
    job: Job,
    explained: Explained,
    compare: Explained | None,
    names: dict[str, str],
    steer: int | None,
) -> None:
    mine = Side.look(job, explained, "images", thumbs=True)
    effects = mine.effects(job, mine.order(), steer)
    coactivity = Coactivity(mine.survey)
    FeaturePages(mine, job, effects, coactivity).write(job.folder)
    columns = images.write_images(job.folder, mine)
    job.folder.put("pictures", images.captions(job.dataset, job.known) | columns)
    found = None if compare is None else _compare(job, mine, compare, names["compare"])
    site = _site(job, mine, names)
    site |= {
        "steered": 0 if effects is None else len(effects),
        "coactive_tokens": coactivity.tokens,
        "compare": found,
    }
    job.folder.put("site", site, plain=True)


def _compare(job: Job, mine: Side, explained: Explained, name: str) -> dict[str, Any]:
    """Write the comparison, and say with what."""
    theirs = Side.look(job, explained, "compared", thumbs=False)
    matched = match(mine.codes, theirs.codes)
    effects = theirs.effects(job, order_of_matches(mine.order(), matched), 0)
    Comparison(mine, theirs, job, matched, effects).write(job.folder)
    facts = theirs.survey.facts
    return {
        "kind": "model" if is_same_sae(mine.explained, explained) else "sae",
        "name": name,
        "model": explained.clip.name,
        "hook_point": explained.site.hook_point,
        "d_sae": explained.sae.d_sae,
        "grid": facts.grid,
        "how": matched.how,
    }


def _site(job: Job, mine: Side, names: dict[str, str]) -> dict[str, Any]:
    """What is said of the whole site."""
    explained = mine.explained
    sae, clip, predictions = explained.sae, explained.clip, explained.predictions
    survey = mine.survey
    answers = None
    if predictions is not None:
        answers = {"names": predictions.names, "how": predictions.how}
    words = {"count": len(job.words), "how": HOW.format(images=mine.read_on)}
    return {
        "format": FORMAT,
        "version": __version__,
        "title": names["title"],
        "model": {
            "name": clip.name,
            "pretrained": clip.pretrained,
            "hook_point": explained.site.hook_point,
            "target_hook_point": None if sae.d_out is None else explained.target.hook_point,
            "tokens": explained.site.tokens,
        },
        "sae": {
            "name": names["name"],
            "architecture": sae.architecture,
            "k": sae.k,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
        },
        "data": {
            "name": names["data"],
            "images": survey.images,
            "tokens": survey.facts.tokens,
            "classes": None if job.known is None else job.known.classes,
        },
        "grid": survey.facts.grid,
        "prefix": survey.facts.prefix,
        "predictions": answers,
        "words": words if mine.words is not None else None,
        "strengths": STRENGTHS,
        "steer_images": len(mine.probed),
        "bins": pictures.BINS,
        "feature_shard": FEATURE_SHARD,
        "image_shard": IMAGE_SHARD,
        "per_patch": images.PER_PATCH,
        "live": False,
    }
