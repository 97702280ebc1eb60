"""What steering one feature does to the concepts of later blocks.

    python -m benchmarks.alignment.steered --work work --out benchmarks/results/alignment/steered

Of the SAE of EmojiCLIP's third block 20 features, evenly spaced from the most to the least used, are set to their
largest activation on every token, one at a time, on the drawings of every third test concept of Classify-30. Every
later block is compared with the block of the tower that is not steered, by the features of its own SAE, on a patch of
each drawing; beside it stands how many predictions among the 30 kinds change. Does a feature that moves more concepts
change more predictions?
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.alignment.towers import block_saes, rank_correlation, rows_of
from clipsteer.alignment.measure import agreement, follow_concepts
from clipsteer.alignment.scores import of_features
from clipsteer.clip.model import EMOJICLIP, load
from clipsteer.data.emoji import EmojiStyles, classify30, split
from clipsteer.demo.wise_ft import HEAD, heads
from clipsteer.io.files import write_json
from clipsteer.report.charts import Chart
from clipsteer.report.layers import Dots, Line
from clipsteer.steering import SAESteering, steer

BLOCK = 2
COUNT = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for the SAEs, trained where missing")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="PATH.json and PATH.svg")
    args = parser.parse_args()
    saes, usage = block_saes(args.work)
    block = list(saes)[BLOCK]
    later = list(saes)[BLOCK + 1 :]
    parts = split()
    clip = load(EMOJICLIP)
    images = classify30(EmojiStyles.styles, parts.test[::3])
    head = heads(clip, sorted(parts.fit + parts.validation))[HEAD]
    clean = rows_of(clip, images)
    kinds = (clip.encode_images(images) @ head.T).argmax(1)
    before = {name: of_features(saes[name], clean[name]) for name in later}
    acts = saes[block].encode(clean[block]).detach()
    used = usage[block].argsort(descending=True)
    used = used[(acts[:, used] > 0).any(0)]
    features = used[torch.linspace(0, len(used) - 1, COUNT).long()].tolist()
    rows: list[dict[str, Any]] = []
    owner = torch.arange(len(images))
    for feature in features:
        strength = float(acts[:, feature].max())
        row: dict[str, Any] = {"feature": feature, "strength": strength, "usage": float(usage[block][feature])}
        with steer(clip, {f"visual.{block}": SAESteering(saes[block], {feature: strength})}):
            moved = rows_of(clip, images)
            row["changed"] = float(((clip.encode_images(images) @ head.T).argmax(1) != kinds).double().mean())
        for name in later:
            after = of_features(saes[name], moved[name])
            followed = follow_concepts(before[name], after, owner, count=64)
            row[name] = {
                **agreement(before[name].scores, after.scores, owner).to_json(),
                "distance": statistics.fmean(m.relative.value for m in followed),
                "gone": sum(m.relative.low > 0.5 for m in followed) / len(followed),
            }
        rows.append(row)
        sys.stdout.write(f"feature {feature}: {row['changed']:.3f} changed\n")
        sys.stdout.flush()
    changed = [row["changed"] for row in rows]
    body: dict[str, Any] = {"block": block, "images": len(images), "features": rows, "correlation": {}, "mean": {}}
    for name in later:
        distances = [row[name]["distance"] for row in rows]
        body["correlation"][name] = rank_correlation([(distances, changed)])
        body["mean"][name] = {
            "above_chance": statistics.fmean(row[name]["details"]["above_chance"] for row in rows),
            "distance": statistics.fmean(distances),
            "gone": statistics.fmean(row[name]["gone"] for row in rows),
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out.with_suffix(".json"), body)
    xs = [row[later[-1]]["distance"] for row in rows]
    ys = [100 * value for value in changed]
    order = sorted(range(len(xs)), key=xs.__getitem__)
    thirds = [order[i * len(order) // 3 : (i + 1) * len(order) // 3] for i in range(3)]
    trend = Line(
        "mean of a third of the features",
        [statistics.fmean(xs[i] for i in part) for part in thirds],
        [statistics.fmean(ys[i] for i in part) for part in thirds],
    )
    title = "Features of block 2, steered: concepts moved in the last block and predictions changed"
    chart = Chart(title, Dots(xs, ys), trend, x="mean relative distance of 64 concepts", y="predictions changed, %")
    chart.write(args.out.with_suffix(".svg"))
    sys.stdout.write(f"{body['correlation']}\n{body['mean']}\n")


if __name__ == "__main__":
    main()
