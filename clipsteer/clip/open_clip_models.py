"""Models through open_clip: its own names, architectures in .json files, and the bundled ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from clipsteer import assets
from clipsteer.clip.architectures import check_architecture
from clipsteer.clip.build import SetupError, build, evaluation_transform, fill, fits, resize
from clipsteer.clip.published import Settled, settle
from clipsteer.clip.setup import NOTHING, OPEN_CLIP, Asked, as_size
from clipsteer.io.files import (
    FileFormatError,
    json_object,
    read_json,
    read_safetensors,
    refuse_nan,
)
from clipsteer.io.weights import check_weights_file

EMOJICLIP = "emojiclip"
EMOJI_TINY = "emoji-tiny"
BUNDLED = (EMOJICLIP, EMOJI_TINY)
# names that open_clip resolves itself, and that bring weights
PREFIXES = ("hf-hub:", "local-dir:")
_ASSETS = assets.EMOJI
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")


class Parts(NamedTuple):
    """A model with its transform of PIL images and its tokenizer."""

    model: nn.Module
    preprocess: Any
    tokenizer: Any


def import_open_clip() -> Any:
    """The package. Raises RuntimeError where it cannot be imported, with the remedy."""
    try:
        import open_clip
    except ImportError as error:
        raise RuntimeError(
            f"open_clip could not be imported ({error}); install it with: "
            "pip install open_clip_torch"
        ) from error
    except (RuntimeError, AttributeError, OSError) as error:
        raise RuntimeError(
            f"open_clip could not be imported: {error}. torch is {torch.__version__}; its "
            "torchvision was most likely built for another torch, so that its compiled operators "
            "do not load. Install the pair from one index, for example: pip install --upgrade "
            "torch torchvision --index-url https://download.pytorch.org/whl/cpu"
        ) from error
    return open_clip


def known_names() -> list[str]:
    """Architectures by name: the bundled ones and open_clip's."""
    return list(dict.fromkeys([*BUNDLED, *import_open_clip().list_models()]))


def is_open_clip(name: str) -> bool:
    """Whether `open_parts` takes a name."""
    if name.startswith(PREFIXES) or name in BUNDLED or name.endswith(".json"):
        return True
    return name.replace("/", "-") in known_names()


def open_parts(
    name: str, pretrained: str | None, device: str | torch.device, asked: Asked = NOTHING
) -> Parts:
    """A model that open_clip makes; the arguments are those of ``clipsteer.load``.

    Raises:
        ValueError: an unknown tag, a file that is not there, or a setup that the model cannot have.
        FileFormatError: a damaged file, or weights of another architecture.
        RuntimeError: open_clip cannot be imported; weights could not be downloaded.
    """
    open_clip = import_open_clip()
    if name.startswith(PREFIXES):
        return _with_own_weights(open_clip, name, pretrained, device, asked)
    known = name
    tokenizer_args: dict[str, str] = {}
    if name in BUNDLED:
        if name not in open_clip.list_models():
            open_clip.add_model_config(_ASSETS / f"{name}.json")
        if name == EMOJICLIP and pretrained is None:
            pretrained = str(_ASSETS / "emojiclip.safetensors")
        tokenizer_args = {"bpe_path": str(_ASSETS / "bpe_merges.txt.gz")}
    elif name.endswith(".json"):
        known = _add_architecture(open_clip, Path(name), pretrained)
    _check_weights(open_clip, known, pretrained)
    settled = settle(open_clip, known, pretrained, asked)
    return _create(open_clip, name, known, pretrained, device, tokenizer_args, settled)


def _create(
    open_clip: Any,
    name: str,
    known: str,
    weights: str | None,
    device: str | torch.device,
    tokenizer_args: dict[str, str],
    settled: Settled,
) -> Parts:
    given = weights is not None and Path(weights).is_file()
    if given:
        check_weights_file(str(weights))
    try:
        module = build(open_clip, known, weights, device, settled)
    except Exception as error:
        if given and not isinstance(error, SetupError):
            raise FileFormatError(
                f"{weights}: cannot be loaded as weights of {name}: {error}"
            ) from error
        local = name.endswith(".json") or name.startswith("local-dir:")
        if local and not isinstance(error, (FileNotFoundError, SetupError)):
            raise FileFormatError(f"{name}: no model can be made of it: {error}") from error
        raise
    if weights is not None or name.startswith(PREFIXES):
        refuse_nan(weights or name, module.state_dict(), infinity=True)
    tokenizer = open_clip.get_tokenizer(known, **tokenizer_args)
    return Parts(module, evaluation_transform(module), tokenizer)


def _with_own_weights(
    open_clip: Any, name: str, weights: str | None, device: str | torch.device, asked: Asked
) -> Parts:
    """A model of a repository or folder; a weights file, such as a run leaves, replaces its own."""
    if weights is not None and not Path(weights).is_file():
        raise ValueError(
            f"load: {name!r} brings its own weights; pretrained must be None or a weights file, "
            f"got {weights!r}"
        )
    _check_folder(name)
    if isinstance(asked.preprocess, str):
        raise ValueError(
            f"load: {name!r} has no tags; preprocess must be a dictionary with fields of "
            f"{', '.join(OPEN_CLIP)}, got {asked.preprocess!r}"
        )
    # its description says how it is preprocessed, and which activation it has
    settled = settle(open_clip, name, None, asked.knowing(weights))
    parts = _create(open_clip, name, name, None, device, {}, settled)
    if weights is None:
        return parts
    tensors = read_safetensors(weights)
    refuse_nan(weights, tensors, infinity=True)
    try:
        if settled.image_size is None or fits(parts.model, tensors):
            fill(parts.model, tensors, weights, settled.rule)
            return parts
        # of the published size: the tower is set to another afterwards
        native = settled._replace(image_size=None)
        parts = _create(open_clip, name, name, None, device, {}, native)
        fill(parts.model, tensors, weights, settled.rule)
    except RuntimeError as error:
        raise FileFormatError(
            f"{weights}: cannot be loaded as weights of {name}: {error}"
        ) from error
    resize(parts.model.visual, as_size(settled.image_size), settled.rule)
    return parts._replace(preprocess=evaluation_transform(parts.model))


def _check_folder(name: str) -> None:
    """What open_clip is about to read in a folder of "local-dir:"."""
    folder = Path(name.removeprefix("local-dir:"))
    described = folder / "open_clip_config.json"
    if not name.startswith("local-dir:") or not described.is_file():
        return
    files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pth")]
    for file in files:
        check_weights_file(file)
    config = json_object(described, read_json(described)).get("model_cfg")
    sizes = {file.stat().st_size: file for file in files}
    check_architecture(described, config, sizes[max(sizes)] if sizes else None)


def _add_architecture(open_clip: Any, path: Path, weights: str | None) -> str:
    """Make open_clip know the architecture of a .json file; returns its name."""
    if not path.is_file():
        raise ValueError(f"load: no such file: {path}")
    file = None if weights is None or not Path(weights).is_file() else Path(weights)
    check_architecture(path, read_json(path), file)
    open_clip.add_model_config(path)
    return path.stem


def _check_weights(open_clip: Any, name: str, pretrained: str | None) -> None:
    if pretrained is None or Path(pretrained).is_file():
        return
    if Path(pretrained).suffix in _WEIGHT_SUFFIXES or len(Path(pretrained).parts) > 1:
        raise ValueError(f"load: pretrained names a file that does not exist: {pretrained}")
    tags = open_clip.list_pretrained_tags_by_model(name.replace("/", "-"))
    if pretrained.lower().replace("-", "_") not in tags:
        raise ValueError(
            f"load: pretrained must be a file or one of {name}'s tags {tags}, got {pretrained!r}"
        )
