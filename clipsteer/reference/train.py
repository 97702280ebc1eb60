"""Training both towers of a CLIP on images with captions, alone or with a frozen reference model
beside it.

Losses: "drrho" (Wei et al. 2025, arXiv 2505.06699), "global" (FastCLIP's global contrastive loss,
arXiv 2407.01445), "clip" (Radford et al. 2021), "siglip" (the sigmoid loss with its learnt bias,
Zhai et al. 2023, arXiv 2303.15343), "distill" (CLIP's loss and the reference's similarities as soft
targets).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clipsteer.clip.model import CLIP
from clipsteer.data.dataset import ImageDataset
from clipsteer.reference.config import ContrastiveConfig
from clipsteer.reference.features import ReferenceFeatures
from clipsteer.reference.trainer import ContrastiveRun
from clipsteer.training.claim import claimed
from clipsteer.training.world import World


def train_contrastive(
    clip: CLIP,
    dataset: ImageDataset,
    config: ContrastiveConfig | None = None,
    *,
    reference: ReferenceFeatures | CLIP | None = None,
    out: str | Path | None = None,
    validation: Mapping[str, ImageDataset] | None = None,
    templates: tuple[str, ...] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    workers: int = 0,
    resume: bool = True,
    world: World | None = None,
) -> CLIP:
    """Train `clip`, in place, on a data set of images with captions (or with classes, whose names
    are the captions).

    Args:
        reference: frozen. Kept features of the whole images, or a model that sees the very crops
            that `clip` sees. Needed for drrho and distill, and for `select`.
        out: folder for the trained model (model.safetensors, config.json, and architecture.json
            where the architecture came from a file), log.jsonl and checkpoints/. A run that was
            stopped there, by Ctrl-C, SIGTERM or otherwise, goes on from its last checkpoint, on a
            CPU bit for bit; `clip` must then be what it started from.
        validation: name -> data set, measured by `evaluate` every `evaluate_every` steps (None:
            every epoch) and at the end.
        templates: prompts for data sets with classes; see `clip.zero_shot_head`.
        on_log: called with every line of the log. "loss_share" is the part of the last step's time,
            reading data not counted, that went into the loss and its gradient in the features; of
            several processes, waiting included. "loss_ratio" is the loss over that of one answer
            for every input, see `share_of_constant`.
        world: under torchrun; every process is given the same `clip`, the batch is divided among
            them.

    Returns `clip`, in eval mode, its logit_scale set to that of 1/τ, and where it has a logit_bias
    and the loss learns one, that as well; config.json has the latter in any case.

    Raises:
        ValueError: a data set of less than a batch, no reference where one is needed or one of
            other pairs, or a run in `out` with other settings, data or starting weights.
        FileFormatError: a checkpoint in `out` that is not of such a run.
        RuntimeError: the loss is not finite, or another process writes to `out`. SystemExit(143):
            SIGTERM came and the state is saved; KeyboardInterrupt: so did Ctrl-C.
    """
    run = ContrastiveRun(
        clip,
        dataset,
        config or ContrastiveConfig(),
        reference,
        None if out is None else Path(out),
        dict(validation or {}),
        templates,
        workers,
        world or World(clip.device),
    )
    with claimed(run.out, run.name, run.world):
        return run.run(on_log, resume)
