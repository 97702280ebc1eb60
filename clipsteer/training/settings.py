"""Settings of a run: dataclasses whose fields say all there is to know about a setting.

A field has a name, a type with its range (``Count``, ``Positive``, … below, or a ``Literal`` of
choices), a default, and a docstring, the string literal under it. Checks, readers of text and the
command line take it from there, without torch.
"""

from __future__ import annotations

import ast
import dataclasses
import linecache
import math
import re
import sys
import types
from collections.abc import Mapping
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

# fields that change nothing in what a run ends in
COSMETIC = ("checkpoint_every", "log_every", "track")


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers of at least ``least``, above ``above`` and of at most ``most``."""

    text: str
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, Real) or not math.isfinite(value):
            return False
        number = float(value)
        return self.least <= number <= self.most and number > self.above


Count = Annotated[int, Range("at least 1", least=1)]
CountOrZero = Annotated[int, Range("at least 0", least=0)]
Finite = Annotated[float, Range("finite")]
Positive = Annotated[float, Range("positive and finite", above=0)]
NotNegative = Annotated[float, Range("finite and at least 0", least=0)]
Share = Annotated[float, Range("in (0, 1]", above=0, most=1)]
Weight = Annotated[float, Range("in [0, 1]", least=0, most=1)]


class SettingError(ValueError):
    """Settings that are out of range or do not go together.

    Args:
        config: name of the settings' class.
        text: what is wrong, with the names of fields in braces: "{lr} must be positive, got 0".
    """

    def __init__(self, config: str, text: str) -> None:
        super().__init__(config, text)
        self.config = config
        self.text = text

    def spelled(self, names: Mapping[str, str]) -> str:
        """What is wrong, each field under the name that its user knows, if there is one."""
        return re.sub(r"\{(\w+)\}", lambda found: names.get(found[1], found[1]), self.text)

    def __str__(self) -> str:
        return f"{self.config}: {self.spelled({})}"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of a settings dataclass: its type with the range, its default and its docstring."""

    name: str
    kind: Any
    default: Any
    doc: str


def settings_of(config: type) -> dict[str, Setting]:
    """The fields of a settings dataclass, in their order."""
    kinds = _kinds(config)
    docs: dict[str, str] = {}
    for parent in reversed(config.__mro__):
        docs.update(_field_docs(parent))
    return {
        field.name: Setting(field.name, kinds[field.name], field.default, docs.get(field.name, ""))
        for field in dataclasses.fields(config)
    }


def _kinds(config: type) -> dict[str, Any]:
    return get_type_hints(config, include_extras=True)


def _classes(module: str) -> dict[str, ast.ClassDef]:
    # inspect.getsource would look for every class by itself, in three times the time
    names = vars(sys.modules[module])
    lines = linecache.getlines(names.get("__file__", ""), names)
    tree = ast.parse("".join(lines))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _field_docs(config: type) -> dict[str, str]:
    """The string literal under each field of a class, in one line."""
    found = _classes(config.__module__).get(config.__name__)
    body = found.body if found is not None else []
    docs = {}
    for field, below in pairwise(body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union without None, or the type itself."""
    if get_origin(kind) not in (Union, types.UnionType):
        return (kind,)
    return tuple(member for member in get_args(kind) if member is not types.NoneType)


def base_type(kind: Any) -> Any:
    """A type without its range: int for ``Count``."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _expected(kind: Any, value: Any) -> str | None:
    """What a type or range would have instead of a value; None where the value is right."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return None if value in choices else f"one of {choices}"
    if get_origin(kind) is Annotated:
        allowed: Range = get_args(kind)[1]
        return None if value in allowed else allowed.text
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return "a tuple"
        wrong = [text for item in value if (text := _expected(get_args(kind)[0], item))]
        return f"a tuple of numbers that are {wrong[0]}" if wrong else None
    return None


def check_fields(config: Any) -> None:
    """Raise ``SettingError`` for a field out of its range or choices; for ``__post_init__``."""
    for name, kind in _kinds(type(config)).items():
        value = getattr(config, name)
        if value is None and types.NoneType in get_args(kind):
            continue
        expected = [_expected(member, value) for member in alternatives(kind)]
        if None not in expected:
            wanted = " or ".join(text for text in expected if text is not None)
            raise SettingError(type(config).__name__, f"{{{name}}} must be {wanted}, got {value!r}")


def read_value(kind: Any, text: str) -> Any:
    """A value of a field's type from text; its range is not looked at.

    A whole number is 200, 1_000 or 2e6; a bool is 1, 0, on or off; a tuple has commas between its
    members.

    Raises:
        ValueError: the text is none; it says what was expected.
    """
    members = alternatives(kind)
    for member in members[:-1]:
        try:
            return read_value(member, text)
        except ValueError:
            continue
    return _read_one(base_type(members[-1]), text)


_SWITCH = {"1": True, "on": True, "0": False, "off": False}


def _read_one(kind: Any, text: str) -> Any:
    if kind is str:
        return text
    if get_origin(kind) is tuple:
        return tuple(read_value(get_args(kind)[0], part) for part in text.split(","))
    if kind is int:
        return whole_number(text)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"expected a number, got {text!r}") from None
    choices = tuple(_SWITCH) if kind is bool else get_args(kind)
    if text not in choices:
        raise ValueError(f"expected one of {', '.join(choices)}, got {text!r}")
    return _SWITCH[text] if kind is bool else text


def whole_number(text: str) -> int:
    """A whole number: 200, 1_000 or 2e6; ValueError for anything else."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer():
        raise ValueError(f"expected a whole number such as 200 or 2e6, got {text!r}")
    return int(value)


# what earlier versions did not write down of a model's setup; they built every one with GELU
_PREPROCESS = "setup.preprocess."


def check_same_settings(
    name: str,
    folder: Path,
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    cosmetic: tuple[str, ...] = (),
) -> None:
    """Raise ValueError where `folder` holds a run with other settings than those asked for.

    Both are as JSON gives them back; dictionaries in them are compared entry by entry, and a
    setting that is None is as good as none.
    """
    old = _flat(there)
    new = _flat(here)
    if not any(_PREPROCESS in key for key in old):
        new = {key: value for key, value in new.items() if _PREPROCESS not in key}
    if new.get("data order") != old.get("data order"):
        raise ValueError(
            f"{name}: {folder} holds a run of another version of clipsteer, which draws other data "
            f"from a seed (data order {old.get('data order', 1)} there, {new.get('data order', 1)} "
            f"here); finish it with that version or use another folder"
        )
    changed = [
        f"{key}: {old.get(key)!r:.80} there, {new.get(key)!r:.80} asked for"
        for key in {**old, **new}
        if key not in cosmetic and old.get(key) != new.get(key)
    ]
    if changed:
        raise ValueError(
            f"{name}: {folder} holds a run with other settings ({', '.join(changed)}); use another "
            f"folder"
        )


_REMEDIES = {
    "times": "times of files; a copy must keep them, as cp -a and rsync -a do, where the files are "
    "too many to be read at once",
    "names": "names of files",
    "sizes": "sizes of files",
    "targets": "classes or captions",
    "contents": "contents of files",
}


def other_data(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """In what two identities of data differ; None where nothing does.

    Times of files are looked at only where not all contents are known: a copy may have new ones.
    """
    has_contents = bool(there.get("contents")) and bool(here.get("contents"))
    for key in {**there, **here}:
        old = there.get(key)
        new = here.get(key)
        if old == new or (key == "times" and has_contents):
            continue
        if key == "contents" and not has_contents:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            reason = other_data(old, new)
            if reason is not None:
                return reason
            continue
        if key in _REMEDIES:
            return f"other {_REMEDIES[key]}"
        return f"{key}: {old!r:.80} there, {new!r:.80} given"
    return None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
