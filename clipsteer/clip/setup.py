"""What weights do not say of a model: how its images are preprocessed, and its activation.

A `Setup` is written with every model, and with whatever is fitted on one: into the header of the
weights, and under "setup" into metadata. Whoever opens the model again goes by it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from clipsteer.clip.positions import ANTIALIAS, RULES
from clipsteer.io.files import FileFormatError, read_safetensors_header

_HEADER = "clipsteer_setup"


# ---------------------------------------------------------------- the fields of a preprocessing


def _numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == count
        and all(isinstance(x, int | float) and -1e6 < x < 1e6 for x in value)
    )


def _is_mean(value: Any) -> bool:
    return _numbers(value, 3)


def _is_std(value: Any) -> bool:
    return _numbers(value, 3) and min(value) > 0


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 < value <= 1 << 14


def _is_size(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) == 2 and all(map(_is_length, value))
    return _is_length(value)


def _is_input_size(value: Any) -> bool:
    return isinstance(value, list | tuple) and value[:1] in ([3], (3,)) and _is_size(value[1:])


def _is_level(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255


def _is_share(value: Any) -> bool:
    # some published models see more than the image, with a border about it
    return isinstance(value, int | float) and 0 < value <= 2


class _OneOf:
    """Whether a value is one of some words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __call__(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.words


Field = tuple[Callable[[Any], bool], str]
_MEAN: Field = (_is_mean, "three numbers")
_STD: Field = (_is_std, "three numbers above 0")

# of open_clip's PreprocessCfg
OPEN_CLIP: dict[str, Field] = {
    "size": (_is_size, "an image size N or (H, W)"),
    "mode": (_OneOf("RGB"), "'RGB'"),
    "mean": _MEAN,
    "std": _STD,
    "interpolation": (
        _OneOf("bicubic", "bilinear", "random"),
        "'bicubic', 'bilinear' or 'random'",
    ),
    "resize_mode": (
        _OneOf("shortest", "longest", "squash"),
        "'shortest', 'longest' or 'squash'",
    ),
    "fill_color": (_is_level, "a level from 0 to 255"),
}
_RESAMPLINGS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
# of timm's data configuration
TIMM_DATA: dict[str, Field] = {
    "input_size": (_is_input_size, "(3, H, W)"),
    "interpolation": (_OneOf(*_RESAMPLINGS), f"one of {', '.join(_RESAMPLINGS)}"),
    "mean": _MEAN,
    "std": _STD,
    "crop_pct": (_is_share, "a share in (0, 2]"),
    "crop_mode": (_OneOf("center", "squash", "border"), "'center', 'squash' or 'border'"),
}


def check_preprocess(cfg: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """The same with tuples for lists, as the libraries have them.

    Raises ValueError for an unknown field or a value out of its range.
    """
    found = {}
    for name, value in cfg.items():
        if name not in fields:
            raise ValueError(f"preprocess has the fields {', '.join(fields)}; got {name!r}")
        is_right, expected = fields[name]
        if name in ("mean", "std") and isinstance(value, int | float):
            value = (value,) * 3
        if not is_right(value):
            raise ValueError(f"preprocess: {name} must be {expected}, got {value!r:.80}")
        found[name] = tuple(value) if isinstance(value, list | tuple) else value
    return found


# ---------------------------------------------------------------- a model's setup


@dataclass(frozen=True)
class Setup:
    """How a model was set up where its weights do not tell.

    Attributes:
        preprocess: what open_clip calls preprocess_cfg ("size", "mode", "mean", "std",
            "interpolation", "resize_mode", "fill_color"), or timm's data configuration
            ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode").
        quick_gelu: whether open_clip's towers have QuickGELU in place of GELU.
        position_interpolation: how the position table is resampled for images of another size,
            "antialias" or "bicubic"; what was written before there were two was made by the first.
    """

    preprocess: Mapping[str, Any]
    quick_gelu: bool = False
    position_interpolation: str = ANTIALIAS

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of what the model sees."""
        if "input_size" in self.preprocess:
            _, height, width = self.preprocess["input_size"]
            return height, width
        return as_size(self.preprocess["size"])

    def to_json(self) -> dict[str, Any]:
        """As it stands in files: beside the preprocessing, what is not as in the oldest of them."""
        found = json.loads(json.dumps(asdict(self)))
        usual = {"quick_gelu": False, "position_interpolation": ANTIALIAS}
        return {name: value for name, value in found.items() if value != usual.get(name)}

    @classmethod
    def from_json(cls, where: str | Path, value: Any) -> Setup:
        """Undo `to_json`; `where` names the file in the FileFormatError for anything else."""
        try:
            if isinstance(value, str):
                value = json.loads(value)
            cfg = value["preprocess"]
            quick_gelu = value.get("quick_gelu", False)
            rule = as_rule(value.get("position_interpolation", ANTIALIAS))
            fields = TIMM_DATA if "input_size" in cfg else OPEN_CLIP
            checked = check_preprocess(cfg, fields)
            if missing := [name for name in fields if name not in checked]:
                raise ValueError(f"preprocess lacks {', '.join(missing)}")
            if not isinstance(quick_gelu, bool):
                raise ValueError("quick_gelu must be true or false")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FileFormatError(f"{where}: not a model's setup: {error}") from None
        return cls(checked, quick_gelu, rule)


def as_rule(value: Any) -> str:
    """A rule of position interpolation. Raises ValueError where it is none."""
    if value not in RULES:
        raise ValueError(
            f"position_interpolation must be {' or '.join(map(repr, RULES))}, got {value!r:.80}"
        )
    return str(value)


def as_size(value: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image size. Raises ValueError where it is none."""
    if not _is_size(value):
        raise ValueError(
            f"image_size must be a number of pixels or (height, width), got {value!r:.80}"
        )
    height, width = value if isinstance(value, list | tuple) else (value, value)
    return height, width


def setup_of(model: nn.Module) -> Setup | None:
    """That of a module of open_clip's or of ``timm:``; None for one that was built by hand."""
    visual = getattr(model, "visual", None)
    cfg = getattr(visual, "preprocess_cfg", None)
    if not isinstance(cfg, Mapping) or not cfg:
        return None
    fields = TIMM_DATA if "input_size" in cfg else OPEN_CLIP
    rule = getattr(visual, "position_interpolation", ANTIALIAS)
    return Setup(check_preprocess(cfg, fields), has_quick_gelu(model), rule)


def has_quick_gelu(model: nn.Module) -> bool:
    """Whether an activation of the model is open_clip's QuickGELU."""
    transformer = sys.modules.get("open_clip.transformer")  # a model of timm's may come without
    return transformer is not None and any(
        isinstance(module, transformer.QuickGELU) for module in model.modules()
    )


def header_of(setup: Setup | None) -> dict[str, str]:
    """The metadata of a safetensors file of weights that have this setup."""
    if setup is None:
        return {"format": "pt"}
    return {"format": "pt", _HEADER: json.dumps(setup.to_json(), sort_keys=True)}


def setup_in(path: str | Path, metadata: Mapping[str, str]) -> Setup | None:
    """What a header that `header_of` made says. Raises FileFormatError."""
    text = metadata.get(_HEADER)
    return None if text is None else Setup.from_json(path, text)


def read_setup(path: str | Path) -> Setup | None:
    """What a weights file says of its model, if it is a safetensors file and says so.

    Raises FileFormatError.
    """
    if Path(path).suffix != ".safetensors":
        return None
    return setup_in(path, read_safetensors_header(path).metadata)


@dataclass(frozen=True)
class Asked:
    """What is asked of ``load`` beside a name: fields as its arguments.

    known: what is written with the model, or with something that was fitted on it.
    """

    preprocess: str | Mapping[str, Any] | None = None
    quick_gelu: bool | None = None
    image_size: tuple[int, int] | None = None
    known: Setup | None = None
    position_interpolation: str | None = None

    @classmethod
    def of(
        cls,
        preprocess: str | Mapping[str, Any] | None,
        force_quick_gelu: bool | None,
        image_size: int | tuple[int, int] | None,
        force_image_size: int | tuple[int, int] | None,
        position_interpolation: str | None,
        known: Setup | None = None,
    ) -> Asked:
        """Of arguments of ``load``, checked: one size under two names, and a rule that there is."""
        if None not in (image_size, force_image_size) and image_size != force_image_size:
            raise ValueError(
                f"image_size and force_image_size are one thing, got {image_size!r} and "
                f"{force_image_size!r}"
            )
        size = force_image_size if image_size is None else image_size
        rule = position_interpolation
        return cls(
            preprocess,
            force_quick_gelu,
            None if size is None else as_size(size),
            known,
            None if rule is None else as_rule(rule),
        )

    def knowing(self, weights: str | None) -> Asked:
        """The same, with what a weights file says."""
        if self.known is not None or weights is None or not Path(weights).is_file():
            return self
        return replace(self, known=read_setup(weights))

    def rule(self, origin: str = ANTIALIAS) -> str:
        """How positions are resampled: as is asked for, as is written, or as the weights' origin
        has it."""
        if self.position_interpolation is not None:
            return self.position_interpolation
        return origin if self.known is None else self.known.position_interpolation


NOTHING = Asked()
