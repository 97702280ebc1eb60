"""What is published with weights beside them: preprocessing and activation, of open_clip's tags.

A weights file that does not say its own gets what all weights of its architecture have; where they
differ a warning says what was taken, and how to choose.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from clipsteer.clip.runs import CONFIG, WEIGHTS
from clipsteer.clip.setup import OPEN_CLIP, Asked, as_size, check_preprocess

logger = logging.getLogger(__name__)


class Settled(NamedTuple):
    """How a model is built.

    preprocess: what differs from the library's; without the size.
    quick_gelu, image_size: None is the architecture's own.
    rule: how positions are resampled.
    written: the size that the weights were written with, if they say.
    """

    preprocess: dict[str, Any]
    quick_gelu: bool | None
    image_size: Any  # (height, width)
    rule: str
    written: Any = None  # (height, width)


def default_preprocess() -> dict[str, Any]:
    """open_clip's preprocessing where a tag says nothing else; without the size."""
    from open_clip.transform import PreprocessCfg

    return {name: value for name, value in asdict(PreprocessCfg()).items() if name != "size"}


def preprocess_of_tag(open_clip: Any, known: str, tag: str) -> dict[str, Any]:
    """The published preprocessing of an architecture's tag; without the size. ValueError."""
    cfg = open_clip.get_pretrained_cfg(known, tag)
    if not cfg:
        tags = open_clip.list_pretrained_tags_by_model(known)
        raise ValueError(
            f"load: preprocess must be one of {known}'s tags {tags}, or a dictionary with fields "
            f"of {', '.join(OPEN_CLIP)}; got {tag!r}"
        )
    default = default_preprocess()
    return {name: cfg.get(name, value) for name, value in default.items()}


def settle(open_clip: Any, known: str, pretrained: str | None, asked: Asked) -> Settled:
    """What a model of an architecture that open_clip knows is built with.

    What is asked for comes first, then what was written with the weights, then what is published
    with them. Raises ValueError for a preprocessing that there is not.
    """
    asked = asked.knowing(pretrained)
    known = known.replace("/", "-")
    cfg = open_clip.get_pretrained_cfg(known, pretrained) if pretrained else {}
    preprocess: dict[str, Any] = {}
    quick_gelu = None
    if asked.known is not None:
        preprocess = dict(asked.known.preprocess)
        quick_gelu = asked.known.quick_gelu
    elif cfg:
        # a tag that is silent was trained as its architecture says
        quick_gelu = cfg.get("quick_gelu")
        if asked.quick_gelu is None:
            _say_activation(open_clip, known, pretrained, quick_gelu)
    elif pretrained:
        preprocess, quick_gelu = _of_file(open_clip, known, pretrained, asked)
    size = written = preprocess.pop("size", None)
    if isinstance(asked.preprocess, str):
        preprocess = preprocess_of_tag(open_clip, known, asked.preprocess)
    elif asked.preprocess is not None:
        preprocess |= check_preprocess(asked.preprocess, OPEN_CLIP)
        size = preprocess.pop("size", size)
    if asked.quick_gelu is not None:
        quick_gelu = asked.quick_gelu
    if written is not None:
        written = as_size(written)
    return Settled(preprocess, quick_gelu, asked.image_size or size, asked.rule(), written)


def _own_activation(open_clip: Any, known: str) -> bool:
    return bool((open_clip.get_model_config(known) or {}).get("quick_gelu", False))


def _say_activation(open_clip: Any, known: str, tag: str | None, quick_gelu: bool | None) -> None:
    if quick_gelu is not None and quick_gelu != _own_activation(open_clip, known):
        logger.warning(
            "%s: the weights %r were trained with %s, and the model is built with it; "
            "force_quick_gelu=%s builds the other",
            known,
            tag,
            "QuickGELU" if quick_gelu else "GELU",
            not quick_gelu,
        )


def _of_file(
    open_clip: Any, known: str, path: str, asked: Asked
) -> tuple[dict[str, Any], bool | None]:
    """Preprocessing and activation of weights that do not say theirs."""
    tags = open_clip.list_pretrained_tags_by_model(known)
    if not tags:
        return {}, None
    default = default_preprocess()
    own = _own_activation(open_clip, known)
    cfgs = {tag: open_clip.get_pretrained_cfg(known, tag) for tag in tags}
    preprocessings = {tag: preprocess_of_tag(open_clip, known, tag) for tag in tags}
    activations = {tag: cfg.get("quick_gelu", own) for tag, cfg in cfgs.items()}
    if is_old_run(path):
        # earlier versions built these with the architecture's activation, and opened them with
        # open_clip's preprocessing, whatever they were trained with
        preprocess = default
        quick_gelu = own
        doubtful = any(cfg != default for cfg in preprocessings.values())
        is_known = True
    else:
        preprocess = _commonest(preprocessings, default)
        quick_gelu = _commonest(activations, own)
        doubtful = len({_key(cfg) for cfg in preprocessings.values()}) > 1
        is_known = len(set(activations.values())) == 1
    if doubtful and asked.preprocess is None:
        _warn_preprocess(known, path, preprocess, preprocessings)
    elif preprocess != default and asked.preprocess is None:
        logger.info("%s: as all published weights of %s: %s", path, known, told(preprocess))
    if not is_known and asked.quick_gelu is None:
        others = [tag for tag, quick in activations.items() if quick != quick_gelu]
        logger.warning(
            "%s: the file does not say its activation, and weights of %s are published with both; "
            "%s is taken. Pass force_quick_gelu=%s (--%sforce-quick-gelu) if the model is like %s",
            path,
            known,
            "QuickGELU" if quick_gelu else "GELU",
            not quick_gelu,
            "no-" if quick_gelu else "",
            ", ".join(others),
        )
    return preprocess, quick_gelu


def is_old_run(path: str | Path) -> bool:
    """Whether the weights lie in a run of a version that did not write setups."""
    return Path(path).name == WEIGHTS and (Path(path).parent / CONFIG).is_file()


def _key(value: Any) -> Hashable:
    return repr(value)


def _commonest(by_tag: Mapping[str, Any], default: Any) -> Any:
    """The one thing that all tags have; of several the default, or what most have."""
    values = list(by_tag.values())
    if len({_key(value) for value in values}) > 1 and default in values:
        return default
    (key, _), *_ = Counter(map(_key, values)).most_common(1)
    return next(value for value in values if _key(value) == key)


def _warn_preprocess(
    known: str, path: str, taken: Mapping[str, Any], by_tag: Mapping[str, Mapping[str, Any]]
) -> None:
    like = [tag for tag, cfg in by_tag.items() if cfg == taken]
    whose = f"that of {', '.join(like)}" if like else "open_clip's own"
    others: dict[Hashable, str] = {}
    for tag, cfg in by_tag.items():
        if tag not in like:
            others.setdefault(_key(cfg), tag)
    choices = " or ".join(f"preprocess={tag!r} (--preprocess {tag})" for tag in others.values())
    logger.warning(
        "%s: the file does not say how its images are preprocessed, and weights of %s are "
        "published with several ways; taken is %s: %s. If the model was trained otherwise, pass %s",
        path,
        known,
        whose,
        told(taken),
        choices,
    )


def told(cfg: Mapping[str, Any]) -> str:
    """A preprocessing in a line of text."""
    names = ("mean", "std", "interpolation", "resize_mode", "crop_pct", "crop_mode")
    return ", ".join(f"{name} {_shown(cfg[name])}" for name in names if name in cfg)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(f"{x:.4g}" for x in value) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
