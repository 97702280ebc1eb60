"""Models through open_clip: its own names, architectures in .json files, and the bundled ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from clipsteer import assets
from clipsteer.io.files import FileFormatError, read_json, read_safetensors

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


def open_parts(name: str, pretrained: str | None, device: str | torch.device) -> Parts:
    """A model that open_clip makes; the arguments are those of ``clipsteer.load``.

    Raises:
        ValueError: an unknown tag, or a file that is not there.
        FileFormatError: a damaged file, or weights of another architecture.
        RuntimeError: open_clip cannot be imported; weights could not be downloaded.
    """
    open_clip = import_open_clip()
    if name.startswith(PREFIXES):
        return _with_own_weights(open_clip, name, pretrained, device)
    known = name
    tokenizer_args: dict[str, str] = {}
    if name in BUNDLED:
        if name not in open_clip.list_models():
            open_clip.add_model_config(_ASSETS / f"{name}.json")
        if name == EMOJICLIP and pretrained is None:
            pretrained = str(_ASSETS / "emojiclip.safetensors")
        tokenizer_args = {"bpe_path": str(_ASSETS / "bpe_merges.txt.gz")}
    elif name.endswith(".json"):
        known = _add_architecture(open_clip, Path(name))
    _check_weights(open_clip, known, pretrained)
    return _create(open_clip, name, known, pretrained, device, tokenizer_args)


def _create(
    open_clip: Any,
    name: str,
    known: str,
    weights: str | None,
    device: str | torch.device,
    tokenizer_args: dict[str, str],
) -> Parts:
    try:
        module, _, preprocess = open_clip.create_model_and_transforms(
            known, pretrained=weights, device=device
        )
    except Exception as error:
        if weights is not None and Path(weights).is_file():
            raise FileFormatError(
                f"{weights}: cannot be loaded as weights of {name}: {error}"
            ) from error
        raise
    return Parts(module, preprocess, open_clip.get_tokenizer(known, **tokenizer_args))


def _with_own_weights(
    open_clip: Any, name: str, weights: str | None, device: str | torch.device
) -> Parts:
    """A model of a repository or folder; a weights file, such as a run leaves, replaces its own."""
    if weights is not None and not Path(weights).is_file():
        raise ValueError(
            f"load: {name!r} brings its own weights; pretrained must be None or a weights file, "
            f"got {weights!r}"
        )
    parts = _create(open_clip, name, name, None, device, {})
    if weights is not None:
        try:
            parts.model.load_state_dict(read_safetensors(weights))
        except RuntimeError as error:
            raise FileFormatError(
                f"{weights}: cannot be loaded as weights of {name}: {error}"
            ) from error
    return parts


def _add_architecture(open_clip: Any, path: Path) -> str:
    """Make open_clip know the architecture of a .json file; returns its name."""
    if not path.is_file():
        raise ValueError(f"load: no such file: {path}")
    parts = ("embed_dim", "vision_cfg", "text_cfg")
    config = read_json(path)
    if not isinstance(config, dict) or not all(part in config for part in parts):
        raise FileFormatError(f"{path}: not a model of open_clip's: expected {', '.join(parts)}")
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
