"""Folders that runs of clipsteer leave: which model they hold, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from clipsteer.io.files import FileFormatError, read_json

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
ARCHITECTURE = "architecture.json"


class Run(NamedTuple):
    """A model on disk: the name of its architecture, its weights, and what else config.json says.

    `model` is a name that ``clipsteer.load`` takes; of an architecture in the folder, its path.
    """

    model: str
    weights: Path
    config: dict[str, Any]


def read_run(folder: str | Path) -> Run:
    """What `clipsteer train`, `finetune` or `wise-ft merge` left in a folder.

    Raises:
        FileNotFoundError: config.json or model.safetensors is not there.
        FileFormatError: config.json does not name a model.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    name = config.get("model") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise FileFormatError(f"{folder / CONFIG}: expected the name of a model")
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: the model's weights are not there")
    if name.endswith(".json"):  # the architecture lies in the folder
        name = str(folder / name)
    return Run(name, weights, config)


def missing_run(folder: Path) -> str:
    """Why a folder without config.json is no model, and what to name instead."""
    ends = [str(folder / part) for part in ("zeroshot", "finetuned") if (folder / part).is_dir()]
    if ends:
        return f"{folder} holds a run of clipsteer finetune; name {' or '.join(ends)}"
    if (folder / "open_clip_config.json").is_file():
        return f"{folder} holds a model of open_clip's; write local-dir:{folder}"
    return (
        f"{folder} holds no model: expected {CONFIG} and {WEIGHTS}, as clipsteer train, finetune "
        "and wise-ft merge leave them when they are done"
    )
