"""The demo's images: groups of them, their names and classes, and what a CLIP model makes of
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer.clip.hooks import capture
from clipsteer.clip.model import CLIP
from clipsteer.clip.pixels import as_pixels
from clipsteer.data.dataset import ImageDataset, file_names, sample_names, spread
from clipsteer.data.emoji import EmojiStyles
from clipsteer.data.files import open_dataset

_MAX_TOKEN_BYTES = 2 << 30
# of own images, where the SAE is trained here
GROUPS = ("images the SAE learns from", "held-out images")


@dataclass(frozen=True)
class Pictures:
    """Images to explore.

    Attributes:
        dataset: N images.
        groups: name -> rows of it.
        train: the rows whose tokens the SAE learns from.
        names: (N,) what each image shows, for captions.
        classes: class names, or None where there are no classes.
        truth: (N,) the class of each image, or None.
        vocabulary: the texts among which predictions are made; begins with the classes.
        words: the texts in which features are named.
    """

    dataset: ImageDataset
    groups: dict[str, list[int]]
    train: list[int]
    names: list[str]
    classes: list[str] | None
    truth: Tensor | None
    vocabulary: list[str]
    words: list[str]

    @property
    def held_out(self) -> list[int]:
        """The group to show and to try things on: of the four cells known concepts in a new style,
        else the last."""
        groups = list(self.groups.values())
        return groups[2 if len(groups) == 4 else -1]

    def thumb(self, row: int, size: int = 128) -> Any:
        """A copy of a PIL image, of at most size × size pixels."""
        image = self.dataset[row][0].copy()
        image.thumbnail((size, size))
        return image

    def variant(self, rows: Sequence[int], change: Callable[[Any], Any]) -> Pictures:
        """The images of these rows, each changed when it is read; nothing else is kept."""
        rows = list(rows)
        dataset = ImageDataset(lambda i: change(self.dataset[rows[i]][0]), [0] * len(rows))
        names = [self.names[row] for row in rows]
        return Pictures(dataset, {}, [], names, None, None, self.vocabulary, self.words)


def emoji_pictures(
    max_images: int | None = None,
    emojiclip: bool = True,
    words: Sequence[str] | None = None,
) -> Pictures:
    """The bundled drawings in four cells: trained or held-out style × concepts that EmojiCLIP has
    seen or not.

    For another model (``emojiclip=False``) the cells are the same, and named by what they hold.
    """
    emoji = EmojiStyles()
    a_cell = None if max_images is None else max(1, max_images // 4)
    drawings: list[tuple[str, int]] = []
    groups = {}
    for (style, seen), pairs in emoji.cells().items():
        kept = spread(pairs, a_cell)
        if emojiclip:
            group = f"{style} style, {'seen' if seen else 'unseen'} concepts"
        else:
            drawn = "Noto and Fluent" if style == "trained" else "Twemoji"
            group = f"{drawn} drawings, {'first' if seen else 'other'} concepts"
        groups[group] = list(range(len(drawings), len(drawings) + len(kept)))
        drawings += kept
    labels = [concept.label for concept in emoji.concepts]
    return Pictures(
        dataset=emoji.dataset(drawings),
        groups=groups,
        train=next(iter(groups.values())),
        names=[f"{labels[concept]} ({style})" for style, concept in drawings],
        classes=labels,
        truth=torch.tensor([concept for _, concept in drawings]),
        vocabulary=labels,
        words=list(words or labels),
    )


def folder_pictures(
    path: str | Path,
    seed: int,
    max_images: int,
    open_images: Callable[[str | Path], ImageDataset] = open_dataset,
    words: Sequence[str] | None = None,
    called: tuple[str, str] = GROUPS,
) -> Pictures:
    """A user's images in two groups of these names, four fifths of them for the SAE.

    Predictions are among the classes where there are two or more, else among the words, by default
    bundled ones.

    Raises ValueError for fewer than 10 images.
    """
    dataset = open_images(path)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator).tolist()[:max_images]
    if len(order) < 10:
        raise ValueError(f"data must hold at least 10 images, got {len(order)} in {path}")
    cut = len(order) * 4 // 5
    chosen = dataset.subset(sorted(order[:cut]) + sorted(order[cut:]))
    train = list(range(cut))
    groups = dict(zip(called, (train, list(range(cut, len(order))))))
    # a full-size text tower takes a minute or two for all of them
    concepts = spread([concept.label for concept in EmojiStyles().concepts], 300)
    if dataset.classes is None:
        names = [name[:60] for name in sample_names(chosen)]
        named = list(words or concepts)
        return Pictures(chosen, groups, train, names, None, None, named, named)
    classes = [name.replace("_", " ") for name in dataset.classes]
    named = list(words or dict.fromkeys([*classes, *concepts]))
    several = len(classes) > 1
    shown = zip(chosen.targets, file_names(chosen))
    return Pictures(
        dataset=chosen,
        groups=groups,
        train=train,
        names=[f"{classes[target]} · {file[:60]}" for target, file in shown],
        classes=classes if several else None,
        truth=torch.tensor(chosen.targets) if several else None,
        vocabulary=classes if several else named,
        words=named,
    )


def augmented(image: Any, generator: torch.Generator) -> Any:
    """A slightly moved, scaled, turned and perhaps mirrored PIL image, on white: more tokens from
    few pictures."""
    from PIL import Image, ImageOps

    zoom, turn, dx, dy, mirror = torch.rand(5, generator=generator).tolist()
    if mirror < 0.5:
        image = ImageOps.mirror(image)
    w, h = image.size
    scale = 0.75 + 0.35 * zoom
    width = max(1, round(w * scale))
    height = max(1, round(h * scale))
    degrees = 20 * turn - 10
    small = image.resize((width, height))
    small = small.rotate(degrees, Image.Resampling.BICUBIC, fillcolor="white")
    canvas = Image.new("RGB", (w, h), "white")
    canvas.paste(small, (round((w - width) * dx), round((h - height) * dy)))
    return canvas


def pixels(clip: CLIP, pictures: Pictures, rows: Sequence[int]) -> Tensor:
    """Preprocessed images (B, 3, H, W), on the model's device and in its dtype."""
    images = [as_pixels(pictures.dataset[row][0], clip.preprocess) for row in rows]
    return torch.stack(images).to(clip.device, clip.dtype)


def batches(rows: Sequence[int], size: int, label: str) -> Iterator[Sequence[int]]:
    """The rows, so many at a time, under a progress bar of that label."""
    with tqdm(total=len(rows), desc=label, unit="image", disable=None) as bar:
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            yield batch
            bar.update(len(batch))


@torch.no_grad()
def look(
    clip: CLIP,
    pictures: Pictures,
    hook_point: str,
    *,
    batch: int = 64,
    label: str = "look at images",
) -> tuple[Tensor, Tensor]:
    """Tokens at the hook point (N, T, d) and unit image embeddings (N, e) of every image, on the
    CPU in float32.

    Raises ValueError where the tokens would take more than 2 GiB.
    """
    tokens: list[Tensor] = []
    embeddings: list[Tensor] = []
    for rows in batches(range(len(pictures.dataset)), batch, label):
        with capture(clip, hook_point, detach=True) as found:
            embedded = clip.embed(pixels(clip, pictures, rows))
        embeddings.append(embedded.float().cpu())
        tokens.append(found[hook_point].float().cpu())
        if len(tokens) * tokens[0].nbytes > _MAX_TOKEN_BYTES:
            raise ValueError(
                f"tokens of {len(pictures.dataset)} images take too much memory; pass --max-images"
            )
    return torch.cat(tokens), torch.cat(embeddings)
