"""EmojiStyles: the bundled drawings, their split and Classify-30."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from clipsteer import assets
from clipsteer.data.dataset import ImageDataset, _Reader, renamed
from clipsteer.io.images import read_image

if TYPE_CHECKING:
    from PIL.Image import Image


TRAINED_STYLES = ("noto", "fluent")
HELD_OUT_STYLE = "twemoji"
ALL_STYLES = (*TRAINED_STYLES, HELD_OUT_STYLE)

# what STYLE and PART of "emoji:STYLE:PART" stand for
STYLES: Mapping[str, tuple[str, ...]] = {
    **{style: (style,) for style in ALL_STYLES},
    "trained": TRAINED_STYLES,
    "held-out": (HELD_OUT_STYLE,),
    "all": ALL_STYLES,
}
PARTS: Mapping[str, Mapping[str, Any]] = {
    "train": {"classify30": "train"},
    "test": {"classify30": "test"},
    "seen": {"seen": True},
    "unseen": {"seen": False},
}

Drawing = tuple[str, int]  # (style, index of the concept)
Target = Literal["label", "category", "subcategory"]
TARGETS = ("label", "category", "subcategory")

_EMOJI = assets.EMOJI


@dataclass(frozen=True)
class Concept:
    """What one drawing shows.

    Attributes:
        id: its code points in hexadecimal, joined by hyphens, without variation selectors.
        label, tags: names and keywords in English.
        category, subcategory: Unicode's groups ("animals-nature", "animal-mammal").
        seen: whether EmojiCLIP was trained on it.
        classify30: its part in Classify-30 ("train" or "test"; every test concept is unseen), or
            None.
    """

    id: str
    label: str
    tags: tuple[str, ...]
    category: str
    subcategory: str
    seen: bool
    classify30: Literal["train", "test"] | None

    def captions(self) -> list[str]:
        """Texts that describe the concept: its label first, then the label with each tag."""
        others = [tag for tag in self.tags if tag != self.label]
        return [self.label, *(f"{self.label}, {tag}" for tag in others)]


@cache
def _labels() -> dict[str, Any]:
    path = _EMOJI / "labels.json"
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def _atlas(style: str) -> np.ndarray:
    head = _labels()
    size = head["tile"]
    columns = head["columns"]
    n = len(head["concepts"])
    sheet = np.asarray(read_image(_EMOJI / f"{style}.webp"))
    rows = sheet.shape[0] // size
    grid = sheet.reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    tiles = grid.reshape(-1, size, size, 3)[:n]
    tiles.flags.writeable = False
    return tiles


def _concept(row: dict[str, Any]) -> Concept:
    tags = tuple(row["tags"])
    return Concept(**{**row, "tags": tags})


def _emoji_tile(style: str, index: int) -> Image:
    from PIL import Image

    return Image.fromarray(_atlas(style)[index])


def _known(what: str, name: str, table: Mapping[str, Any]) -> Any:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"EmojiStyles: {what} must be one of {', '.join(table)}, got {name!r}{hint}")


class EmojiStyles:
    """857 concrete concepts as 64 px drawings on white in three vendors' styles, with names, tags
    and one fixed split.

    EmojiCLIP was trained on TRAINED_STYLES (and OpenMoji) of the `seen` concepts; HELD_OUT_STYLE is
    new to it. The four cells trained/held-out style × seen/unseen concept measure the two shifts
    apart. Fluent lacks eight concepts.
    """

    styles = ALL_STYLES

    @cached_property
    def concepts(self) -> list[Concept]:
        """The 857 drawn concepts; their position is their index everywhere."""
        return [_concept(row) for row in _labels()["concepts"]]

    @cached_property
    def undrawn(self) -> list[Concept]:
        """The 1,049 other concepts of the split (people, symbols, flags …): names and tags without
        a drawing."""
        return [_concept(row) for row in _labels()["undrawn"]]

    def __len__(self) -> int:
        return len(self.concepts)

    def _style(self, style: str) -> str:
        if style not in self.styles:
            raise ValueError(f"EmojiStyles: style must be one of {self.styles}, got {style!r}")
        return style

    def array(self, style: str) -> np.ndarray:
        """(857, 64, 64, 3) uint8, read-only; a concept that the style lacks is white (see
        `drawn`)."""
        return _atlas(self._style(style))

    def drawn(self, style: str) -> np.ndarray:
        """(857,) bool: which concepts the style draws."""
        missing = _labels()["missing"]
        lacking = set(missing[self._style(style)])
        return np.array([concept.id not in lacking for concept in self.concepts])

    def image(self, style: str, index: int) -> Image:
        """One drawing, RGB, 64 × 64. Raises ValueError where the style lacks the concept."""
        if not self.drawn(style)[index]:
            label = self.concepts[index].label
            raise ValueError(f"EmojiStyles: {style} has no drawing of {label!r} (index {index})")
        return _emoji_tile(style, index)

    def indices(
        self,
        style: str | None = None,
        *,
        seen: bool | None = None,
        classify30: Literal["train", "test"] | None = None,
        category: str | None = None,
    ) -> list[int]:
        """Concepts that meet every condition given; with `style`, only those it draws."""
        drawn = np.ones(len(self), bool) if style is None else self.drawn(style)
        wanted = {"seen": seen, "classify30": classify30, "category": category}
        conditions = {name: value for name, value in wanted.items() if value is not None}
        return [
            i
            for i, concept in enumerate(self.concepts)
            if drawn[i] and all(getattr(concept, name) == conditions[name] for name in conditions)
        ]

    def cells(self) -> dict[tuple[str, bool], list[Drawing]]:
        """(“trained” or “held-out” style, seen concept?) -> its drawings as (style, index)
        pairs."""
        found = {}
        for style in ("trained", "held-out"):
            found[style, True] = self.drawings(style, "seen")
            found[style, False] = self.drawings(style, "unseen")
        return found

    def drawings(self, style: str = "all", part: str | None = None) -> list[Drawing]:
        """(style, index) pairs, style by style, in the order of the concepts.

        Args:
            style: "noto", "fluent", "twemoji", "trained" (those that EmojiCLIP was trained on),
                "held-out" or "all".
            part: "train" or "test" of Classify-30, "seen" or "unseen" by EmojiCLIP; None takes
                every concept.

        Raises ValueError for another style or part.
        """
        styles = _known("style", style, STYLES)
        conditions = {} if part is None else _known("part", part, PARTS)
        found: list[Drawing] = []
        for name in styles:
            found += [(name, i) for i in self.indices(name, **conditions)]
        return found

    def dataset(
        self,
        drawings: Iterable[Drawing],
        target: Target = "label",
    ) -> ImageDataset:
        """A data set of (style, index) pairs, as `cells` gives them; its classes are the distinct
        names of `target`."""
        rows = range(len(self))
        pairs = [(self._style(style), rows[index]) for style, index in drawings]
        if target not in TARGETS:
            raise ValueError(
                f"EmojiStyles: target must be 'label', 'category' or 'subcategory', got {target!r}"
            )
        self._check_drawn(pairs)
        names = [getattr(self.concepts[i], target) for _, i in pairs]
        classes = sorted(set(names))
        rank = {name: i for i, name in enumerate(classes)}
        targets = [rank[name] for name in names]
        return ImageDataset(_Reader(_emoji_tile, pairs), targets, classes)

    def _check_drawn(self, pairs: Sequence[Drawing]) -> None:
        for style in {style for style, _ in pairs}:
            drawn = self.drawn(style)
            lacking = [i for s, i in pairs if s == style and not drawn[i]]
            if lacking:
                raise ValueError(f"EmojiStyles: {style} has no drawing of the concepts {lacking}")

    def captioned(
        self, drawings: Iterable[Drawing], captions: Literal["label", "noisy"]
    ) -> ImageDataset:
        """Image–caption pairs: each drawing with its label, or with all that is said of it.

        "noisy": the label, the label with each tag, and each tag alone, which may name many other
        things ("animal").
        """
        if captions not in ("label", "noisy"):
            raise ValueError(f"EmojiStyles: captions must be 'label' or 'noisy', got {captions!r}")
        pairs: list[Drawing] = []
        texts: list[str] = []
        for style, i in drawings:
            concept = self.concepts[i]
            said = [concept.label]
            if captions == "noisy":
                tags = [tag for tag in concept.tags if tag != concept.label]
                said = [*concept.captions(), *tags]
            pairs += [(style, i)] * len(said)
            texts += said
        return ImageDataset(self.dataset(pairs)._read, texts)


class Split(NamedTuple):
    """Concept indices: `fit` and `validation` make up Classify-30's training part."""

    fit: list[int]
    validation: list[int]
    test: list[int]


def names_of_things(classes: Iterable[str] = ()) -> list[str]:
    """What things can be called where nobody says: the classes as they are spoken, and the bundled
    concepts, each once."""
    spoken = (name.replace("_", " ") for name in classes)
    words = [*spoken, *(concept.label for concept in EmojiStyles().concepts)]
    return list(dict.fromkeys(filter(None, words)))


def stratified(
    labels: Sequence[Any], seed: int = 0, share: float = 0.2
) -> tuple[list[int], list[int]]:
    """Positions (kept, held out): of each label about ``share``, at least one and never all; with
    share 0, none."""
    groups: dict[Any, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    generator = torch.Generator().manual_seed(seed)
    kept: list[int] = []
    held_out: list[int] = []
    for members in groups.values():
        n = len(members)
        order = torch.randperm(n, generator=generator).tolist()
        wanted = max(int(share > 0), round(share * n))
        cut = min(wanted, n - 1)
        held_out += [members[j] for j in order[:cut]]
        kept += [members[j] for j in order[cut:]]
    return sorted(kept), sorted(held_out)


def split(seed: int = 0, share: float = 0.2) -> Split:
    """A fifth of each subcategory's training concepts is for validation; the same in every
    style."""
    emoji = EmojiStyles()
    training = emoji.indices(classify30="train")
    kinds = [emoji.concepts[i].subcategory for i in training]
    kept, held_out = stratified(kinds, seed, share)
    return Split(
        fit=[training[i] for i in kept],
        validation=[training[i] for i in held_out],
        test=emoji.indices(classify30="test"),
    )


def classify30(styles: str | Sequence[str], concepts: Sequence[int]) -> ImageDataset:
    """Drawings of the concepts that the style, or each of the styles, has; classes: Classify-30's
    subcategories."""
    emoji = EmojiStyles()
    chosen = [styles] if isinstance(styles, str) else styles
    pairs: list[Drawing] = []
    for style in chosen:
        drawn = emoji.drawn(style)
        pairs += [(style, i) for i in concepts if drawn[i]]
    classes = sorted({concept.subcategory for concept in emoji.concepts if concept.classify30})
    return renamed(emoji.dataset(pairs, "subcategory"), classes)
