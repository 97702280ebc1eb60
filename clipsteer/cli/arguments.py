"""Options that several commands share, options from settings, and what they stand for."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

from clipsteer.cli.images import add_skip_unreadable, class_means
from clipsteer.clip.positions import RULES
from clipsteer.clip.tokens import TOKENS
from clipsteer.training.settings import (
    Setting,
    alternatives,
    base_type,
    read_value,
    settings_of,
)

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------- values


def reader(kind: Any) -> Callable[[str], Any]:
    """What argparse calls for an option whose values are of a settings field's type."""

    def read(text: str) -> Any:
        try:
            return read_value(kind, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


whole = reader(int)


def count(text: str) -> int:
    """A whole number of at least 1, for options that belong to no settings."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return value


# ---------------------------------------------------------------- settings

Config = TypeVar("Config")


class Options(Generic[Config]):
    """A settings dataclass as options: names, types, defaults and help are its fields'.

    Args:
        names: fields whose option has another name.
        leave: fields that are no options.
        exclusive: pairs of fields of which one can be given.
        unset: fields for which the command has a value of its own where they are not given, and
            what the help calls that value.
    """

    def __init__(
        self,
        config: type[Config],
        *,
        names: Mapping[str, str] | None = None,
        leave: Collection[str] = (),
        exclusive: Collection[tuple[str, str]] = (),
        unset: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.exclusive = exclusive
        self.unset = unset or {}
        self.fields = {
            name: field for name, field in settings_of(config).items() if name not in leave
        }
        renamed = names or {}
        self.spelling = {
            name: "--" + renamed.get(name, name).replace("_", "-") for name in self.fields
        }

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add the options to a command, whose arguments then know them as ``args.options``."""
        parser.set_defaults(options=self)
        group = parser.add_argument_group("settings")
        together: dict[str, Any] = {}
        for pair in self.exclusive:
            together.update(dict.fromkeys(pair, group.add_mutually_exclusive_group()))
        for field in self.fields.values():
            self._add(together.get(field.name, group), field)

    def _add(self, group: Any, field: Setting) -> None:
        kind = alternatives(field.kind)
        single = base_type(kind[0]) if len(kind) == 1 else None
        default = None if field.name in self.unset else field.default
        more: dict[str, Any] = {"type": reader(field.kind), "metavar": _metavar(field, single)}
        if single is bool:
            more = {"action": argparse.BooleanOptionalAction}
        elif get_origin(single) is Literal:
            more = {"choices": get_args(single)}
        added = group.add_argument(self.spelling[field.name], default=default, **more)
        # not as an argument: BooleanOptionalAction adds a default of its own to the help
        added.help = _help(field, self.unset.get(field.name))

    def given(self, args: argparse.Namespace) -> dict[str, Any]:
        """The value of each field, but for those left to the command."""
        values = {
            name: getattr(args, option[2:].replace("-", "_"))
            for name, option in self.spelling.items()
        }
        return {
            name: value
            for name, value in values.items()
            if value is not None or name not in self.unset
        }

    def read(self, args: argparse.Namespace) -> Config:
        """The settings; ``SettingError`` for one out of its range."""
        return self.config(**self.given(args))


def _metavar(field: Setting, kind: Any) -> str:
    if field.name.endswith("_every"):
        return "STEPS"
    if get_origin(kind) is tuple:
        return "N,N,…"
    return "N" if kind is int else "X"


def _help(field: Setting, own: str | None) -> str:
    """The docstring and the default, which is ``own`` words of the command where it has any."""
    text, _, told = field.doc.replace("%", "%%").partition(" (default: ")
    if own is not None:
        return f"{text} (default: {own})"
    # None and False are told in the docstring, if there is something to tell
    if told or field.default is None or field.default is False:
        return field.doc.replace("%", "%%")
    if field.default is True:
        return f"{text} (default: yes)"
    shown = f"{field.default:g}" if isinstance(field.default, float) else field.default
    return f"{text} (default: {shown})"


# ---------------------------------------------------------------- shared options


def _text(*lines: str) -> None:
    """Write lines; names from files are among their words."""
    from clipsteer.io.messages import printable

    sys.stdout.write(printable("\n".join(lines)) + "\n")


def read_words(path: Path | None, classes: Sequence[str] | None = None) -> list[str]:
    """The lines of a file, or the bundled concepts after the classes."""
    from clipsteer.data.emoji import names_of_things
    from clipsteer.io.files import read_text

    if path is None:
        return names_of_things(classes or ())
    words = [w.strip() for w in read_text(path).splitlines()]
    return list(dict.fromkeys(w for w in words if w))


def add_model(
    p: argparse.ArgumentParser,
    default: str | None = "emojiclip",
    otherwise: str = "what the SAE was trained on",
) -> None:
    """Options that name a model and its weights."""
    source = default or otherwise
    p.add_argument(
        "--model",
        default=default,
        metavar="NAME",
        help="open_clip name, hf-hub:org/repo, timm:NAME, hf:org/name or hf:PATH (transformers), "
        "the folder of a run, or emojiclip "
        f"(default: {source})",
    )
    p.add_argument("--pretrained", metavar="TAG", help="open_clip tag or a local weights file")
    add_setup(p)
    add_device(p)


def add_setup(p: argparse.ArgumentParser, whose: str = "") -> None:
    """Options of what weights do not say of a model; ``whose`` stands in front of their names."""
    own = "default: what was written or published with the weights"
    p.add_argument(
        f"--{whose}preprocess",
        type=_preprocess,
        metavar="TAG|JSON",
        help="how images are prepared: as for this tag of the architecture, or fields such as "
        f'\'{{"interpolation": "bilinear"}}\' ({own})',
    )
    p.add_argument(
        f"--{whose}force-quick-gelu",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"towers with QuickGELU, or with GELU ({own})",
    )
    p.add_argument(
        f"--{whose}image-size",
        f"--{whose}force-image-size",
        dest=f"{whose.replace('-', '_')}force_image_size",
        type=_image_size,
        metavar="N|HxW",
        help=f"of what the model sees; position embeddings are resampled ({own})",
    )
    p.add_argument(
        f"--{whose}position-interpolation",
        choices=RULES,
        help="how they are: bicubically with an antialiasing filter, as open_clip and timm do, or "
        "without one, as DINOv2 and transformers do (default: what was written with the weights, "
        "or the way of the code that they come from)",
    )


def _preprocess(text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a tag or a JSON object, got {text!r} ({error})"
        ) from None


def _image_size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    try:
        lengths = [whole(part) for part in parts]
    except argparse.ArgumentTypeError:
        lengths = []
    if len(lengths) not in (1, 2) or min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"expected N or HxW, such as 336 or 240x320, got {text!r}")
    return lengths[0], lengths[-1]


def setup_options(args: argparse.Namespace, whose: str = "") -> dict[str, Any]:
    """What the options of ``add_setup`` say, as arguments of ``clipsteer.load``."""
    names = ("preprocess", "force_quick_gelu", "force_image_size", "position_interpolation")
    found = {name: getattr(args, whose.replace("-", "_") + name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def add_device(p: argparse.ArgumentParser) -> None:
    """The option that names a device."""
    p.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")


def load_known(args: argparse.Namespace, metadata: Mapping[str, Any], what: Any) -> Any:
    """The model that a file's metadata name, or ``--model``.

    Raises ValueError where neither names one, and where its weights would be random: what the file
    was made from is then another model.
    """
    from clipsteer.clip.model import load_origin, needs_weights

    known = metadata.get("clip_model")
    name = args.model or known
    if name is None:
        raise ValueError(
            f"{what} does not say which model it belongs to; pass --model and --hook-point"
        )
    pretrained = args.pretrained or (metadata.get("pretrained") if name == known else None)
    if pretrained is None and needs_weights(name):
        raise ValueError(
            f"{what} belongs to {name}, of which no weights are named, and random ones would be "
            f"another model; pass --pretrained, a tag of open_clip or a weights file"
        )
    if pretrained == "random" == metadata.get("pretrained"):
        logger.warning("%s belongs to random weights, which are others each time", what)
    named = {"model": args.model, "pretrained": pretrained, **setup_options(args)}
    return load_origin(metadata, device=device_of(args), **named)


def add_data(p: argparse.ArgumentParser, what: str) -> None:
    """The options that name images, ``what`` is done with them, and what with unreadable ones."""
    p.add_argument(
        "--data",
        metavar="PATH",
        help=f"emoji[:style[:part]], folder, captions .csv/.tsv/.jsonl, or .tar shards: {what}",
    )
    add_skip_unreadable(p)


def add_site(p: argparse.ArgumentParser, what: str) -> None:
    """Which activations are ``what``: a module's output, on some of the tokens."""
    p.add_argument(
        "--hook-point", help=f"module whose output is {what} (default: the last but one block)"
    )
    p.add_argument("--tokens", choices=TOKENS, default="all", help="which tokens (default: all)")


def add_known_site(p: argparse.ArgumentParser, default: str) -> None:
    """The same where a file says which activations they were."""
    p.add_argument("--hook-point", help=f"default: {default}")
    p.add_argument("--tokens", choices=TOKENS, help=f"default: {default}")


def device_of(args: argparse.Namespace) -> str:
    """The device asked for, or the GPU where there is one."""
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def add_workers(p: argparse.ArgumentParser) -> None:
    """The option that says how many processes read images."""
    p.add_argument(
        "--workers",
        type=whole,
        default=0,
        metavar="N",
        help="processes that read images (default: 0)",
    )


def add_shown(p: argparse.ArgumentParser) -> None:
    """The arguments that ``show_steering`` reads."""
    p.add_argument(
        "--words",
        type=Path,
        metavar="FILE",
        help="what to predict, one a line (default: the classes, or the bundled concepts)",
    )
    p.add_argument(
        "--top", type=whole, default=3, metavar="N", help="predictions an image (default: 3)"
    )
    p.add_argument("--count", type=whole, default=8, metavar="N", help="images (default: 8)")


def show_steering(
    args: argparse.Namespace, clip: Any, dataset: Any, hook_point: str, steering: Any
) -> int:
    """Write predictions on a few images before and after steering, and which moved most."""
    import torch

    from clipsteer.clip.model import EMOJICLIP
    from clipsteer.clip.zero_shot import zero_shot_head
    from clipsteer.data.dataset import sample_names, spread, told_apart
    from clipsteer.data.emoji import EmojiStyles
    from clipsteer.steering import steer

    if args.top < 1 or args.count < 1:
        raise ValueError(f"--top and --count must be at least 1, got {args.top} and {args.count}")
    classes = told_apart(dataset)
    if args.words is not None:
        words = read_words(args.words)
    else:
        words = classes or [c.label for c in EmojiStyles().concepts]
    if clip.has_text or args.words is not None:
        templates = None if clip.name == EMOJICLIP else ("a photo of a {}.",)
        head = zero_shot_head(clip, words, templates)
    else:
        head = class_means(clip, dataset)
    rows = spread(range(len(dataset)), args.count)
    images = [dataset[i][0] for i in rows]
    before = (100 * clip.encode_images(images) @ head.T).softmax(-1)
    with steer(clip, {hook_point: steering}):
        after = (100 * clip.encode_images(images) @ head.T).softmax(-1)

    def shown(p: torch.Tensor) -> str:
        best = p.topk(min(args.top, len(words)))
        return ", ".join(
            f"{words[i]} {v:.0%}" for v, i in zip(best.values.tolist(), best.indices.tolist())
        )

    names = sample_names(dataset)
    for i, p, q in zip(rows, before, after):
        _text(names[i][:60], f"  before  {shown(p)}", f"  after   {shown(q)}")
    change = (after - before).mean(0)
    order = change.abs().argsort(descending=True)[: 2 * args.top].tolist()
    _text("mean change, in points")
    for i in sorted(order, key=lambda i: -float(change[i])):
        _text(f"  {100 * float(change[i]):+6.1f}  {words[i]}")
    return 0
