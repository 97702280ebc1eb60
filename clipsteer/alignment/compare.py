"""Two models, or the layers of one, compared concept by concept.

    compared = align(clip, tuned, photos, out="runs/align")
    compared.matrix("A", "B")        # GRI of every layer of one with every layer of the other
    compared.write("runs/align")     # alignment.json, layers.csv, concepts.csv

Rows and scores of a layer are kept in the folder: what is there is not made again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer.alignment import clusters, scores
from clipsteer.alignment.config import AlignmentConfig
from clipsteer.alignment.measure import Matching, agreement, match_concepts
from clipsteer.alignment.rows import (
    EMBEDDING,
    Places,
    Rows,
    every_block,
    harvest_rows,
    layers_of,
)
from clipsteer.alignment.scores import Proximity
from clipsteer.clip.model import CLIP
from clipsteer.data.dataset import ImageDataset, labelled
from clipsteer.io.digests import digest_of, parts_digest, tensors_digest
from clipsteer.io.files import FileFormatError, write_json
from clipsteer.io.kinds import Kind, read_kind, write_kind
from clipsteer.report.page import write_csv
from clipsteer.sae.metrics.estimate import Estimate
from clipsteer.sae.model import SAE
from clipsteer.splice.dictionary import ConceptDictionary

_SCORES = Kind("clipsteer-proximity", 1, "scores of a layer", "scores.safetensors", "scores.json")
# settings of what is done with scores
_AFTER = ("matched", "universal", "pictures", "batch_size")


class Side(NamedTuple):
    """One of the models: what to call it, and what its concepts are read with."""

    label: str  # "A" or "B"
    clip: CLIP
    layers: list[str]
    saes: Mapping[str, SAE]  # layer -> the SAE of its rows
    dictionary: ConceptDictionary | None


class Layer(NamedTuple):
    """A layer of one of the models."""

    model: str  # "A" or "B"
    name: str

    def __str__(self) -> str:
        return f"{self.model} {self.name}"


@dataclass(frozen=True)
class Compared:
    """What `align` finds.

    Attributes:
        models: "A", and "B" where there are two -> what it is called.
        layers: in the models' order.
        proximity: scores of each layer's rows.
        images: (N,) int64, the image of each row.
        agreements: GRI of every two layers, the earlier first.
        matchings: of layers whose concepts were matched.
        config: as given.
    """

    models: dict[str, str]
    layers: list[Layer]
    proximity: dict[Layer, Proximity]
    images: Tensor
    agreements: dict[tuple[Layer, Layer], Estimate]
    matchings: dict[tuple[Layer, Layer], Matching]
    config: AlignmentConfig

    def of(self, model: str) -> list[Layer]:
        """The layers of one of the models."""
        return [layer for layer in self.layers if layer.model == model]

    def agreement(self, a: Layer, b: Layer) -> Estimate:
        """GRI of two layers; that of a layer with itself is 1."""
        if a == b:
            details = {"chance": math.nan, "above_chance": 1.0}
            return Estimate(1.0, 1.0, 1.0, int(self.images.max()) + 1, "images", details)
        return self.agreements[(a, b) if (a, b) in self.agreements else (b, a)]

    def matrix(self, rows: str = "A", columns: str | None = None) -> list[list[Estimate]]:
        """GRI of every layer of one model with every layer of another, by default the same."""
        others = self.of(rows if columns is None else columns)
        return [[self.agreement(a, b) for b in others] for a in self.of(rows)]

    def top_images(self, layer: Layer, concept: int, count: int) -> list[int]:
        """The images with the rows nearest to a concept, each once; none that is not near."""
        values = self.proximity[layer].scores[:, concept]
        best = torch.zeros(int(self.images.max()) + 1)
        best = best.scatter_reduce(0, self.images, values, "amax")
        order = best.argsort(descending=True, stable=True)[:count]
        return [i for i in order.tolist() if best[i] > 0]

    def to_json(self) -> dict[str, Any]:
        """All figures, plain data."""
        pairs = [
            {"a": str(a), "b": str(b), **found.to_json()}
            for (a, b), found in self.agreements.items()
        ]
        matched = [
            {
                "a": str(a),
                "b": str(b),
                "universal": len(found.universal(self.config.universal)),
                "unique_a": len(found.unique_a(self.config.universal)),
                "unique_b": len(found.unique_b(self.config.universal)),
                "matches": self._matches(a, b),
            }
            for (a, b), found in self.matchings.items()
        ]
        layers = [
            {"layer": str(layer), "concepts": self.proximity[layer].names} for layer in self.layers
        ]
        return {
            "models": self.models,
            "config": asdict(self.config),
            "images": int(self.images.max()) + 1,
            "rows": len(self.images),
            "layers": layers,
            "agreements": pairs,
            "matchings": matched,
        }

    def _matches(self, a: Layer, b: Layer) -> list[dict[str, Any]]:
        found = []
        for match in self.matchings[a, b].matches:
            row: dict[str, Any] = {
                "concept_a": self.proximity[a].names[match.a],
                "concept_b": self.proximity[b].names[match.b],
            }
            for name, estimate in (("distance", match.distance), ("relative", match.relative)):
                plain = estimate.to_json()
                row |= {name: plain["value"]}
                row |= {f"{name}_{end}": plain[end] for end in ("low", "high")}
            found.append(row)
        return found

    def write(self, folder: str | Path) -> list[Path]:
        """alignment.json, layers.csv and concepts.csv; returns their paths."""
        folder = Path(folder)
        paths = [folder / name for name in ("alignment.json", "layers.csv", "concepts.csv")]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(paths[0], self.to_json())
        lines = []
        for (a, b), found in self.agreements.items():
            line = {"a": str(a), "b": str(b), "gri": found.value, "low": found.low}
            lines.append(line | {"high": found.high} | found.details)
        write_csv(paths[1], lines)
        rows = []
        for a, b in self.matchings:
            rows += [{"a": str(a), "b": str(b)} | row for row in self._matches(a, b)]
        write_csv(paths[2], rows)
        return paths


def align(
    a: CLIP,
    b: CLIP | None,
    dataset: ImageDataset,
    *,
    out: str | Path,
    config: AlignmentConfig | None = None,
    hook_points: Sequence[str] | None = None,
    hook_points_b: Sequence[str] | None = None,
    saes: Sequence[SAE] = (),
    saes_b: Sequence[SAE] | None = None,
    dictionary: ConceptDictionary | None = None,
    dictionary_b: ConceptDictionary | None = None,
) -> Compared:
    """Compare two models, or the layers of one, on the images of a data set.

    Args:
        a, b: models, as ``clipsteer.load`` gives them; b None compares the layers of a.
        dataset: images; for ``score="conceptor"`` with classes.
        out: folder of rows and scores; a call that was stopped goes on there.
        config: what counts as a concept.
        hook_points: names or patterns of modules; by default every block of the image tower, with
            SAEs theirs, and for ``score="splice"`` the embedding.
        hook_points_b: of b, where they are others.
        saes: for ``score="sae"``, of the layers that their metadata name; ``saes_b`` those of b,
            by default the same.
        dictionary: for ``score="splice"``, of a; ``dictionary_b`` that of b.

    Raises:
        ValueError: hook points, tokens, SAEs or images that do not fit; another run in the folder.
        RuntimeError: umap-learn, hdbscan or scipy is missing where it is needed.
    """
    config = AlignmentConfig() if config is None else config
    if config.score == "clusters":
        clusters.check_libraries()
    own = _side("A", a, config, hook_points, saes, dictionary)
    sides = [own]
    if b is not None:
        points = hook_points if hook_points_b is None else hook_points_b
        other = dictionary if dictionary_b is None else dictionary_b
        sides.append(_side("B", b, config, points, saes if saes_b is None else saes_b, other))
    out = Path(out)
    places = Places(
        tuple(side.clip.preprocess for side in sides), config.rows_per_image, config.seed
    )
    proximity: dict[Layer, Proximity] = {}
    images = torch.empty(0, dtype=torch.int64)
    for side in sides:
        title = f"rows of {side.label}"
        where = out / side.label
        rows = harvest_rows(side.clip, dataset, side.layers, config, places, where, title)
        images = rows.images
        bar = tqdm(side.layers, desc=f"concepts of {side.label}", unit="layer", disable=None)
        for number, name in enumerate(bar):
            kept = where / f"scores-{number:03d}"
            proximity[Layer(side.label, name)] = _scored(side, name, rows, dataset, config, kept)
    layers = list(proximity)
    every = list(combinations(layers, 2))
    agreements = {}
    for p, q in tqdm(every, desc="agreement", unit="pair", disable=None):
        found = agreement(proximity[p].scores, proximity[q].scores, images, config.seed)
        agreements[p, q] = found
    models = {side.label: side.clip.name for side in sides}
    compared = Compared(models, layers, proximity, images, agreements, {}, config)
    for p, q in tqdm(_partners(compared), desc="matching", unit="pair", disable=None):
        compared.matchings[p, q] = match_concepts(
            proximity[p],
            proximity[q],
            images,
            count=config.matched,
            seed=config.seed,
        )
    return compared


def _partners(compared: Compared) -> list[tuple[Layer, Layer]]:
    """Layers whose concepts are matched: of two models each of A with that of B which agrees most
    with it, of one each with the next."""
    own = compared.of("A")
    others = compared.of("B")
    if not others:
        return list(pairwise(own))
    pairs = []
    for layer in own:
        best = max(others, key=lambda other: compared.agreement(layer, other).value)
        pairs.append((layer, best))
    return pairs


def _side(
    label: str,
    clip: CLIP,
    config: AlignmentConfig,
    hook_points: Sequence[str] | None,
    saes: Sequence[SAE],
    dictionary: ConceptDictionary | None,
) -> Side:
    """One of the models, once what its concepts are read with is known to be there."""
    known: dict[str, SAE] = {}
    if config.score == "sae":
        for sae in saes:
            layer = sae.metadata.get("hook_point")
            if not isinstance(layer, str) or layer in known:
                raise ValueError(
                    "align: every SAE must name a hook point of its own in its metadata; "
                    f"got {[s.metadata.get('hook_point') for s in saes]}"
                )
            trained = sae.metadata.get("tokens")
            if {trained, config.tokens} == {"cls", "patches"}:
                raise ValueError(
                    f"align: the SAE of {layer} was trained on tokens={trained!r}, and tokens is "
                    f"{config.tokens!r}"
                )
            known[layer] = sae
        hook_points = list(known) if hook_points is None else hook_points
    if config.score == "splice":
        if dictionary is None:
            raise ValueError("align: score='splice' needs a dictionary, a ConceptDictionary")
        hook_points = [EMBEDDING] if hook_points is None else hook_points
    layers = every_block(clip) if hook_points is None else layers_of(clip, hook_points)
    without = [name for name in layers if config.score == "sae" and name not in known]
    if without or not layers:
        raise ValueError(
            f"align: score='sae' needs an SAE of every layer; none of {', '.join(without) or label}"
        )
    if config.score == "splice" and layers != [EMBEDDING]:
        raise ValueError(
            f"align: SpLiCE decomposes image embeddings; hook points must be [{EMBEDDING!r}], got "
            f"{layers}"
        )
    return Side(label, clip, layers, known, dictionary)


def _scored(
    side: Side,
    name: str,
    rows: Rows,
    dataset: ImageDataset,
    config: AlignmentConfig,
    folder: Path,
) -> Proximity:
    """The scores of a layer, as they are in the folder or made and written there."""
    x = rows.layers[name]
    marks: dict[str, Any] = {
        "layer": name,
        "rows": tensors_digest({"x": x}),
        "config": digest_of({k: v for k, v in asdict(config).items() if k not in _AFTER}),
    }
    if config.score == "sae":
        marks["with"] = parts_digest(side.saes[name])
    elif config.score == "conceptor":
        marks["with"] = digest_of(list(map(str, dataset.targets)))
    elif side.dictionary is not None:
        marks["with"] = digest_of(side.dictionary.concepts)
    if folder.exists():
        try:
            tensors, values = read_kind(folder, _SCORES)
            names = [str(part) for part in values["names"]]
            if values["marks"] == marks and tensors["scores"].shape == (len(x), len(names)):
                return Proximity(tensors["scores"], names)
        except (FileNotFoundError, FileFormatError, KeyError, TypeError):
            pass  # torn or of another run: made anew
    found = _made(side, name, x, rows.images, dataset, config)
    write_kind(folder, _SCORES, {"scores": found.scores}, {"names": found.names, "marks": marks})
    return found


def _made(
    side: Side,
    name: str,
    x: Tensor,  # (N, d)
    images: Tensor,  # (N,)
    dataset: ImageDataset,
    config: AlignmentConfig,
) -> Proximity:
    if config.score == "clusters":
        return clusters.of_clusters(x, config).proximity
    if config.score == "sae":
        return scores.of_features(side.saes[name], x)
    if config.score == "splice":
        assert side.dictionary is not None
        return scores.of_words(side.dictionary, x, config.l1)
    classes = labelled(dataset, "align: score='conceptor'")
    assert classes.classes is not None
    return scores.of_classes(x, torch.tensor(classes.targets)[images], classes.classes)
