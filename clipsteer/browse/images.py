"""Data of pictures: what they are called, what is seen in them, which features are active where."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from clipsteer.browse.explained import Labelled, Predictions
from clipsteer.browse.files import Folder, listed, shares
from clipsteer.browse.sides import Side
from clipsteer.browse.survey import Survey
from clipsteer.data.dataset import ImageDataset, file_of, sample_names
from clipsteer.io.names import spoken

PREDICTED = 5
STRONGEST = 12
PER_PATCH = 16
_CAPTION = 200


def write_images(folder: Folder, side: Side) -> dict[str, list[Any]]:
    """Write images/S of every shard, and give the columns of all pictures that these fill."""
    survey, peaks = side.survey, side.codes.peaks
    predictions = side.explained.predictions
    columns: dict[str, list[Any]] = {"thumb": [], "first": [], "p": []}
    for shard in range(survey.shards):
        found = survey.seen(shard)
        records = entries(survey, found, predictions, peaks)
        folder.put(f"images/{shard}", {"images": records})
        columns["thumb"] += [bytes(name).hex() for name in found["names"].tolist()]
        for record in records:
            best = record["predicted"][:1] or [[-1, None]]
            columns["first"].append(best[0][0])
            columns["p"].append(best[0][1])
    return columns


def captions(dataset: Any, known: Labelled | None) -> dict[str, list[Any]]:
    """Columns of all pictures: name, file, truth."""
    names = [f"image {row}" for row in range(len(dataset))]
    files = [""] * len(dataset)
    truth = [-1] * len(dataset) if known is None else known.labels.tolist()
    if isinstance(dataset, ImageDataset):
        names = [spoken(str(name)) for name in sample_names(dataset)]
        files = [spoken(file_of(source)) for source in dataset.sources]
    elif known is not None:
        names = [known.classes[i] if i >= 0 else name for i, name in zip(truth, names)]
    return {"name": [name[:_CAPTION] for name in names], "file": files, "truth": truth}


def entries(
    survey: Survey,
    found: dict[str, Tensor],
    predictions: Predictions | None,
    peaks: np.ndarray,
) -> list[dict[str, Any]]:
    """What is written of each picture of a shard."""
    counts = found["counts"].numpy().reshape(-1, survey.facts.tokens)
    features = found["features"].numpy()
    acts = found["acts"].numpy()
    ends = counts.sum(1).cumsum()
    places = {row: at for at, row in enumerate(found["rows"].tolist())}
    p = None if predictions is None else _probabilities(predictions, found["embeddings"])
    records = []
    for image, (begin, end) in enumerate(zip([0, *ends.tolist()], ends.tolist())):
        mine, given = features[begin:end], acts[begin:end]
        record: dict[str, Any] = {
            "predicted": [],
            "active": counts[image].tolist(),
            "patches": _patches(counts[image], mine, given),
            "strongest": _strongest(mine, given, peaks),
            "removed": None,
        }
        if p is not None and predictions is not None:
            best = p[image].argsort(descending=True, stable=True)[:PREDICTED]
            values = shares(p[image][best])
            record["predicted"] = [list(pair) for pair in zip(best.tolist(), values)]
            if image in places:
                at = places[image]
                without = _probabilities(predictions, found["without"][at])
                record["removed"] = _removed(found["removed"][at], without, p[image])
        records.append(record)
    return records


def _probabilities(predictions: Predictions, embeddings: Tensor) -> Tensor:
    return predictions.of(embeddings.to(predictions.head.device)).cpu()


def _patches(counts: np.ndarray, features: np.ndarray, acts: np.ndarray) -> dict[str, Any]:
    """The strongest features of each token, strongest first."""
    token = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((features, -acts, token))
    begin = counts.cumsum() - counts
    rank = np.arange(len(order)) - begin[token]
    kept = order[rank < PER_PATCH]
    offsets = np.minimum(counts, PER_PATCH).cumsum()
    return {
        "offsets": [0, *offsets.tolist()],
        "features": features[kept].tolist(),
        "acts": listed(acts[kept]),
    }


def _strongest(features: np.ndarray, acts: np.ndarray, peaks: np.ndarray) -> list[list[Any]]:
    """[feature, largest activation, share of its peak] of the features nearest to their peaks."""
    there, place = np.unique(features, return_inverse=True)
    largest = np.zeros(len(there), np.float32)
    np.maximum.at(largest, place, acts)
    share = largest / peaks[there]
    order = np.argsort(-share, kind="stable")[:STRONGEST]
    rows = zip(there[order].tolist(), listed(largest[order]), listed(share[order]))
    return [list(row) for row in rows]


def _removed(features: Tensor, p: Tensor, clean: Tensor) -> list[list[Any]]:
    """[feature, change of the first prediction's p, what is first without it]."""
    first = int(clean.argmax())
    rows = []
    for feature, without in zip(features.tolist(), p):
        if feature >= 0:
            change = float(without[first]) - float(clean[first])
            rows.append([feature, shares(change), int(without.argmax())])
    return rows
