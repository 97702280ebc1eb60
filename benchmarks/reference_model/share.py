"""What the loss is of a whole training step: EmojiCLIP on its drawings, with whole matrices of logits and by tiles.

    OMP_NUM_THREADS=1 python -m benchmarks.reference_model.share [--batch-size 256] [--rounds 3]

Processor time of one thread, towers forward and backward, loss and optimizer, without reading data. The ways take
turns, two steps each a round, of which the second counts; medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.reference_model.data import EMOJI, training
from clipsteer.clip.model import EMOJICLIP, load
from clipsteer.io.files import write_json
from clipsteer.reference.config import REFERRED, ContrastiveConfig
from clipsteer.reference.features import ReferenceFeatures
from clipsteer.reference.trainer import ContrastiveRun
from clipsteer.testing.machine import machine
from clipsteer.training.world import World

# drrho_loss has its definition in the place of whole matrices
WAYS = dict.fromkeys(("clip", "siglip", "distill"), ("plain", "auto")) | {"drrho": ("reference", "auto")}


class Run(ContrastiveRun):
    def _now(self) -> float:
        return time.process_time()


def step(loss: str, backend: str, batch_size: int) -> dict[str, float]:
    """Milliseconds of the loss, and its share."""
    pairs = EMOJI.captioned(training()[0], "noisy")
    reference = None
    if loss in REFERRED:
        g = torch.Generator().manual_seed(0)
        features = torch.nn.functional.normalize(torch.randn(2, len(pairs), 256, generator=g), dim=2)
        reference = ReferenceFeatures(*features, "random", "", "")
    config = ContrastiveConfig(loss=loss, batch_size=batch_size, samples=2 * batch_size, log_every=1,
                               loss_backend=backend)  # fmt: skip
    clip = load()
    run = Run(clip, pairs, config, reference, None, {}, None, 0, World(clip.device))
    found: list[dict[str, float]] = []
    run.run(lambda row: found.append({"loss_ms": 1000 * run.loss_seconds, "share": row["loss_share"]}), False)
    return found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "loss_share.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seen: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for loss, backends in WAYS.items():
            for backend in backends:
                seen.setdefault((loss, backend), []).append(step(loss, backend, args.batch_size))
    rows: list[dict[str, Any]] = []
    for (loss, backend), each in seen.items():
        row = {name: statistics.median(one[name] for one in each) for name in ("loss_ms", "share")}
        rows.append({"loss": loss, "backend": backend, **row, "each": each})
        sys.stdout.write(f"{loss:8} {backend:9} {row['loss_ms']:7.2f} ms  {100 * row['share']:.3f} % of a step\n")
    write_json(args.out, {"machine": machine(), "model": EMOJICLIP, "batch_size": args.batch_size, "rows": rows})
    sys.stdout.write(f"{args.out}\n")


if __name__ == "__main__":
    main()
