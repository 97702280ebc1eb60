"""EmojiStyles as activations: every block's output for every drawing, correlations of any subset, and the way on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from clipsteer.clip.hooks import capture
from clipsteer.clip.model import CLIP
from clipsteer.clip.zero_shot import zero_shot_head
from clipsteer.conceptors.conceptor import Conceptor
from clipsteer.conceptors.fit import correlation
from clipsteer.data.emoji import HELD_OUT_STYLE, TRAINED_STYLES, EmojiStyles

STYLES = (*TRAINED_STYLES, HELD_OUT_STYLE)


@dataclass
class Drawings:
    """Every drawing's activations: ``blocks[b]`` (n, T, d), and what it shows."""

    blocks: list[Tensor]
    style: Tensor  # (n,) index into STYLES
    concept: Tensor  # (n,)
    category: Tensor  # (n,) index into categories
    categories: list[str]
    seen: Tensor  # (concepts,) whether EmojiCLIP was trained on it
    of_concept: Tensor  # (concepts,) its category
    head: Tensor  # (concepts, e) unit text embeddings of the labels

    def rows(self, concepts: Tensor, *styles: str, category: int | None = None) -> Tensor:
        chosen = torch.isin(self.concept, concepts) & torch.isin(
            self.style, torch.tensor([STYLES.index(s) for s in styles or STYLES])
        )
        return (chosen if category is None else chosen & (self.category == category)).nonzero()[:, 0]


@torch.no_grad()
def harvest_drawings(clip: CLIP, emoji: EmojiStyles | None = None, batch_size: int = 256) -> Drawings:
    """Run the image tower once over all drawings. Raises RuntimeError for towers that are no open_clip ViT."""
    if not hasattr(getattr(clip.model.visual, "transformer", None), "resblocks"):
        raise RuntimeError(f"{clip.name}: needs an open_clip vision transformer (visual.transformer.resblocks)")
    emoji = emoji or EmojiStyles()
    pairs = [(s, i) for s in STYLES for i in emoji.indices(s)]
    parts: list[list[Tensor]] = []
    for at in tqdm(range(0, len(pairs), batch_size), desc="drawings", unit="batch", disable=None):
        pixels = torch.stack([clip.preprocess(emoji.image(*p)) for p in pairs[at : at + batch_size]])
        with capture(clip, "visual.transformer.resblocks.?*") as found:
            clip.embed(pixels)
        blocks = [name for name in found if name.rpartition(".")[2].isdecimal()]
        parts.append([found[name].cpu() for name in sorted(blocks, key=lambda n: int(n.rpartition(".")[2]))])
    categories = sorted({c.category for c in emoji.concepts})
    of_concept = torch.tensor([categories.index(c.category) for c in emoji.concepts])
    concept = torch.tensor([i for _, i in pairs])
    return Drawings(
        [torch.cat(p) for p in zip(*parts)], torch.tensor([STYLES.index(s) for s, _ in pairs]), concept,
        of_concept[concept], categories, torch.tensor([c.seen for c in emoji.concepts]), of_concept,
        zero_shot_head(clip, [c.label for c in emoji.concepts]).cpu(),
    )  # fmt: skip


@torch.no_grad()
def finish(clip: CLIP, x: Tensor, block: int) -> Tensor:
    """Unit image embeddings (n, e) from the output (n, T, d) of a block: the rest of an open_clip ViT."""
    visual = clip.model.visual
    x = x.to(clip.device, clip.dtype)
    for layer in visual.transformer.resblocks[block + 1 :]:
        x = layer(x)
    pooled, _ = visual._pool(x)
    return F.normalize(pooled if visual.proj is None else pooled @ visual.proj, dim=-1).cpu()


def splits(data: Drawings, seed: int) -> dict[str, Tensor]:
    """Seen concepts that every style draws: half to fit on, a quarter to choose by, a quarter to report."""
    drawn = torch.bincount(data.concept, minlength=len(data.seen))
    pool = (data.seen & (drawn == len(STYLES))).nonzero()[:, 0]
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    half, quarter = len(pool) // 2, len(pool) // 4
    return {"fit": pool[:half], "validation": pool[half : half + quarter], "test": pool[half + quarter :]}


@dataclass
class Fitted:
    """Correlations at one block, uncentred and about the background, by what they were taken over."""

    mean: Tensor  # (d,) the background: all fit drawings of all three styles, unlabelled
    means: dict[str, Tensor]
    plain: dict[str, Tensor]
    centred: dict[str, Tensor]

    def conceptors(self, a: float, centred: bool) -> dict[str, Conceptor]:
        R = self.centred if centred else self.plain
        alpha = a / float(torch.diagonal(R["all"]).mean().sqrt())
        mean = self.mean if centred else None
        return {name: Conceptor.from_correlation(matrix, alpha, mean=mean) for name, matrix in R.items()}


def fit_block(data: Drawings, block: int, concepts: Tensor, sets: dict[str, Tensor] | None = None) -> Fitted:
    """Correlations of styles, categories and the style difference; ``sets`` adds others, name -> rows."""
    x = data.blocks[block]
    groups = {s: data.rows(concepts, s) for s in STYLES}
    groups |= {c: data.rows(concepts, category=k) for k, c in enumerate(data.categories)}
    groups |= {"all": data.rows(concepts), "trained": data.rows(concepts, *TRAINED_STYLES)} | (sets or {})
    mean = x[groups["all"]].double().mean((0, 1))
    fitted = Fitted(mean, {}, {}, {})
    for name, rows in groups.items():
        chosen = x[rows].double()
        fitted.means[name] = chosen.mean((0, 1))
        fitted.plain[name], fitted.centred[name] = correlation(chosen), correlation(chosen, mean=mean)
    a, b = (x[data.rows(concepts, s)][data.concept[data.rows(concepts, s)].argsort()] for s in TRAINED_STYLES)
    fitted.plain["style"] = fitted.centred["style"] = correlation((a.double() - b.double()) / 2)
    return fitted
