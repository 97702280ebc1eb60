"""The demo: what a CLIP model sees, a sparse autoencoder trained on its tokens, what steering a
feature does, conceptors, and a WiSE-FT curve.

``run`` leaves a page, the SAE and the figures in a folder. The same seed on the same machine gives
the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import clipsteer
from clipsteer.clip.model import CLIP, EMOJICLIP, default_hook_point, load
from clipsteer.clip.zero_shot import EMOJI_TEMPLATES, SIMPLE_TEMPLATES, zero_shot_head
from clipsteer.continual.metrics import Run
from clipsteer.data.dataset import ImageDataset, spread
from clipsteer.data.files import open_dataset
from clipsteer.demo import conceptors as demo_conceptors
from clipsteer.demo import continual as demo_continual
from clipsteer.demo import page as demo_page
from clipsteer.demo import wise_ft as demo_wise_ft
from clipsteer.demo.autoencoder import evaluate, train
from clipsteer.demo.explore import (
    Feature,
    Predictor,
    choose,
    class_means,
    count_steerable,
    describe,
    few,
    largest,
    probe,
    response,
    zero_shot,
)
from clipsteer.demo.pictures import (
    GROUPS,
    Pictures,
    emoji_pictures,
    folder_pictures,
    look,
    pixels,
)
from clipsteer.ensembles.robustness import averages
from clipsteer.io.files import write_json
from clipsteer.sae.features import feature_peaks
from clipsteer.sae.model import SAE
from clipsteer.sae.site import find_site
from clipsteer.splice.dictionary import ConceptDictionary
from clipsteer.steering import Tokens

_NEEDS_CLASSES = "its predictions are among classes of your own: pass --data, a folder CLASS/…"
# strengths, as multiples of a feature's largest activation
MULTIPLES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
PROBE = 5.0
OTHER_PROBES = (1.0, 2.0, 10.0)
STEERABLE = 0.10


@dataclass(frozen=True)
class Demo:
    """What a run left behind."""

    page: Path
    sae: Path
    metrics: Path
    figures: dict[str, Any]

    def lines(self) -> list[str]:
        """A summary in a few lines."""
        found = self.figures
        lines = []
        for row in found.get("zero_shot", []):
            ways = [f"{n}-way {way['accuracy']:.1%}" for n, way in row["ways"].items()]
            how = "zero-shot" if found["named_by"] == "text" else "nearest class mean"
            lines.append(f"{how}, {row['group']} ({row['images']} images): {', '.join(ways)}")
        for group, row in found["sae"]["evaluation"].items():
            lines.append(f"SAE, {group}: explained variance {row['ev']:.3f}, L0 {row['l0']:.1f}")
        if "conceptors" in found["conceptors"]:
            lines.append(_conceptors_line(found["conceptors"]))
        if "rows" in found["wise_ft"]:
            lines.append(_wise_ft_line(found["wise_ft"]["rows"]))
        for title, run in found["continual"].get("runs", {}).items():
            accuracy = Run.from_json(run).A_last
            lines.append(f"class-incremental, {title}: {accuracy:.1%} on all classes at the end")
        share = found["steering"]
        lines.append(
            f"steerable (S > {STEERABLE}): {share['steerable']} of {share['probed']} features "
            "probed"
        )
        return lines


def _conceptors_line(found: Mapping[str, Any]) -> str:
    rows = found["conceptors"]
    unsteered = found["probability"]["unsteered"]
    before = sum(unsteered["mass"][k] for k in range(len(rows))) / len(rows)
    after = sum(row["effect"]["itself"]["mass"][k] for k, row in enumerate(rows)) / len(rows)
    return f"conceptors, probability of their own kind: {before:.1%} unsteered, {after:.1%} steered"


def _wise_ft_line(rows: Sequence[Mapping[str, Any]]) -> str:
    shifted = {}
    for row in averages(rows):
        if row["method"] == "weight":
            shifted[row["alpha"]] = row["shifted"]
    shown = [f"{shifted[a]:.1%} at alpha {a:g}" for a in (0.0, 0.5, 1.0) if a in shifted]
    return f"WiSE-FT, shifted styles: {', '.join(shown)}"


def run(
    out: str | Path = "clipsteer-demo",
    *,
    seed: int = 0,
    model: str = EMOJICLIP,
    pretrained: str | None = None,
    sae: str | Path | None = None,
    words: Sequence[str] | None = None,
    data: str | Path | None = None,
    hook_point: str | None = None,
    minutes: float = 1.0,
    max_images: int | None = None,
    device: str = "cpu",
    open_images: Callable[[str | Path], ImageDataset] = open_dataset,
    open_model: Callable[[Mapping[str, Any]], CLIP] | None = None,
    **setup: Any,
) -> Demo:
    """Run the demo into the folder ``out``.

    It leaves report.html, metrics.json, sae/ (but where it is given one) and, where the images have
    a few classes, conceptors.safetensors.

    Args:
        seed: of the SAE, its batches and what is drawn.
        model, pretrained: as in ``clipsteer.load`` (one without a text tower needs ``data`` in
            classes, among which it predicts by their means), and setup its preprocess,
            force_quick_gelu and image_size.
        sae: one that is trained already, as in ``SAE.from_pretrained``.
        words: in which features are named, and among which is predicted where the images have no
            two classes; by default the classes and bundled ones.
        data: as in ``clipsteer.data.open_dataset``; by default the bundled drawings in four cells.
        hook_point: a block's module name; by default the last but one of the image tower.
        minutes: SAE training, in nominal minutes of two CPU cores. It sets the number of steps, so
            that the result does not depend on how fast the machine is; wide models get at least 800
            a minute, which takes longer.
        max_images: at most so many; by default all bundled drawings for EmojiCLIP and 1000
            otherwise.
        open_images: opens ``data``.
        open_model: opens the model in place of these where there is ``sae``, by its metadata.

    Raises ValueError for arguments or data that do not fit, RuntimeError where no SAE feature is
    worth a look.
    """
    if not 0 < minutes < math.inf:
        raise ValueError(f"demo: minutes must be positive, got {minutes}")
    if max_images is not None and max_images < 16:
        raise ValueError(f"demo: max_images must be at least 16, got {max_images}")
    out = Path(out)
    given = None if sae is None else SAE.from_pretrained(sae, device=device)
    if given is None or open_model is None:
        clip = load(model, pretrained, device=device, **setup)
    else:
        clip = open_model(given.metadata)
        model, pretrained = clip.name, clip.pretrained
    if data is not None and str(data) == "emoji":
        data = None
    emojiclip = model == EMOJICLIP
    bundled = data is None
    limit = max_images if emojiclip and bundled else max_images or 1000
    if data is None:
        if not clip.has_text:
            raise ValueError(f"demo: {clip.name} has no text tower; {_NEEDS_CLASSES}")
        pictures = emoji_pictures(limit, emojiclip, words)
    else:
        known = ("four fifths of the images", "the other fifth") if given else GROUPS
        pictures = folder_pictures(data, seed, limit or 1000, open_images, words, known)
    if given is None:
        site = None
        hook_point = hook_point or default_hook_point(clip)
    else:
        site = find_site(given, clip, hook_point, None)
        hook_point = site.hook_point
    tokens, embeddings = look(clip, pictures, hook_point)  # (N, T, d), (N, e)
    if clip.has_text:
        # the prompts of a large vocabulary cost a real text tower minutes: one template does
        templates = EMOJI_TEMPLATES if emojiclip else SIMPLE_TEMPLATES
        texts = list(dict.fromkeys([*pictures.vocabulary, *pictures.words]))
        embedded = dict(zip(texts, zero_shot_head(clip, texts, templates).cpu()))
        head = torch.stack([embedded[text] for text in pictures.vocabulary])  # (V, e)
        named = torch.stack([embedded[text] for text in pictures.words])  # (W, e)
    else:
        if words is not None:
            raise ValueError(f"demo: {clip.name} has no text tower to read words with")
        pictures = _among_classes(pictures, clip.name)
        head = named = class_means(pictures, embeddings)
    figures: dict[str, Any] = {
        "model": {"name": model, "pretrained": pretrained, "hook_point": hook_point},
        "data": {"path": str(data) if data else "EmojiStyles", "images": len(pictures.dataset)},
        "seed": seed,
        "named_by": "text" if clip.has_text else "class means",
        "vocabulary": len(pictures.vocabulary),
        "words": len(pictures.words),
    }
    if setup:
        figures["model"]["setup"] = setup
    if pictures.classes is not None:
        figures["zero_shot"] = zero_shot(pictures, embeddings, head[: len(pictures.classes)])
    if given is None:
        trained, history = train(clip, pictures, tokens, hook_point, seed, minutes, out)
        folder = out / "sae"
    else:
        trained, history = given, []
        folder = Path(str(sae))
    evaluation = evaluate(clip, pictures, trained, hook_point)
    figures["sae"] = {**trained.config, "evaluation": evaluation}
    rows = tokens
    predictor = Predictor(clip, trained, hook_point, head)
    if site is not None:
        rows = site.select(tokens)
        predictor.tokens = cast(Tokens, site.tokens)
    dictionary = clipsteer.ConceptDictionary(pictures.words, named, embeddings.mean(0))
    peaks = feature_peaks(trained, rows)  # (N, d_sae)
    chosen, figures["steering"] = _steer(predictor, pictures, dictionary, peaks, embeddings)
    figures["conceptors"] = demo_conceptors.measure(
        predictor, pictures, tokens, embeddings, bundled, out / "conceptors.safetensors"
    )
    if emojiclip and bundled:
        figures["wise_ft"] = demo_wise_ft.measure(seed, device)
        figures["continual"] = demo_continual.measure(seed, device)
    else:
        figures["wise_ft"] = {"skipped": demo_wise_ft.ELSEWHERE}
        figures["continual"] = {"skipped": demo_continual.ELSEWHERE}
    write_json(out / "metrics.json", figures)
    page = demo_page.build(
        predictor, pictures, figures, history, tokens, embeddings, chosen, out, folder
    )
    return Demo(page.write(out / "report.html"), folder, out / "metrics.json", figures)


def _among_classes(pictures: Pictures, name: str) -> Pictures:
    if pictures.classes is None:
        raise ValueError(f"demo: {name} has no text tower; {_NEEDS_CLASSES}")
    return replace(pictures, vocabulary=pictures.classes, words=pictures.classes)


def _steer(
    predictor: Predictor,
    pictures: Pictures,
    dictionary: ConceptDictionary,
    peaks: Tensor,  # (N, d_sae)
    embeddings: Tensor,  # (N, e)
) -> tuple[list[Feature], dict[str, Any]]:
    """Probe the features, and study a few: these, and the figures of steering."""
    N = len(peaks)
    # a pass over the probe images for every feature: fewer of both where a pass is dear
    narrow = predictor.sae.d_in <= 256
    most_features = 256 if narrow else 32
    most_images = 24 if narrow else 8
    rows = spread(pictures.held_out, most_images)
    probed = pixels(predictor.clip, pictures, rows)
    features = describe(peaks, embeddings, dictionary, most_features)
    if not features:
        least, most = few(N)
        raise RuntimeError(
            f"demo: no SAE feature is active on {least} to {most} of the {N} images; take more "
            "images (--max-images, --data), or train longer (--minutes)"
        )
    probe(predictor, pictures, embeddings, rows, features, PROBE)
    chosen = choose(features, 6)
    if not chosen:
        raise RuntimeError(
            f"demo: none of the {len(features)} features that were probed moves a prediction at "
            f"{PROBE:g} times its peak; look at another --hook-point"
        )
    studies = []
    for feature in chosen:
        studied = study(predictor, pictures, embeddings, feature, probed)
        studies.append({**asdict(feature), "response": studied})
    steerable = {PROBE: sum(feature.steerability > STEERABLE for feature in features)}
    for multiple in OTHER_PROBES:
        steerable[multiple] = count_steerable(
            predictor, pictures, embeddings, rows, features, multiple, STEERABLE
        )
    scores = sorted((feature.steerability for feature in features), reverse=True)
    return chosen, {
        "probed": len(features),
        "probe_images": len(probed),
        "probe_rows": rows,
        "multiple_of_peak": PROBE,
        "threshold": STEERABLE,
        "active_on": few(N),
        "steerable": steerable[PROBE],
        "steerable_by_multiple": {f"{m:g}": steerable[m] for m in sorted(steerable)},
        "scores": scores,
        "features": studies,
    }


def study(
    predictor: Predictor,
    pictures: Pictures,
    embeddings: Tensor,  # (N, e)
    feature: Feature,
    probed: Tensor,  # (B, 3, H, W)
) -> dict[str, Any]:
    """What one feature does: its target's mean probability by strength, and its top images without
    it."""
    name = feature.effect[0][0]
    target = pictures.vocabulary.index(name)
    curve = response(predictor, feature, probed, target, MULTIPLES)
    own = pixels(predictor.clip, pictures, feature.top)
    clean = predictor.of(embeddings[feature.top])
    change = predictor.steered(own, feature.index, 0.0) - clean  # (top, V)
    feature.removed = largest(change.mean(0), pictures.vocabulary, 6)
    return {"target": name, "multiples": list(MULTIPLES), "probability": curve}
