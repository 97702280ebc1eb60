"""An SAE at its place in a CLIP model: which module, which tokens, and passes that look at or
replace what is there."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipsteer.clip.hooks import captured, edited, hook_points
from clipsteer.clip.model import CLIP
from clipsteer.clip.module import module_of
from clipsteer.clip.shortcut import Shortcut
from clipsteer.clip.tokens import Layout, layout_at
from clipsteer.sae.model import SAE

logger = logging.getLogger(__name__)

LOGIT_SCALE = 100.0
# elements of a dense (rows, d_sae) block that are held at once: 128 MB in float32
BLOCK = 1 << 25


class Site(NamedTuple):
    """Where an SAE sits: one module, and which of its tokens."""

    hook_point: str
    tokens: str  # "all", "cls" or "patches"
    layout: Layout
    d_in: int | None = None  # the SAE's width; None takes any
    width: str = "d_in"  # what that is called: "d_out" where a transcoder's output belongs

    def select(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T', d), a view of the tokens that the SAE is for. Raises ValueError
        where there are none, and for activations of another width."""
        where = self.layout.where("tokens", self.tokens, x.shape[1])
        if self.d_in not in (None, x.shape[-1]):
            raise ValueError(
                f"hook_point: the SAE has {self.width} = {self.d_in}, but the activations at "
                f"{self.hook_point!r} are {tuple(x.shape)}"
            )
        return x[:, where]

    def put(
        self,
        x: Tensor,  # (B, T, d)
        new: Tensor,  # (B, T', d)
    ) -> Tensor:
        """x with the selected tokens replaced."""
        if self.tokens == "all":
            return new
        where = self.layout.where("tokens", self.tokens, x.shape[1])
        parts = [x[:, : where.start], new]
        if where.stop is not None:
            parts.append(x[:, where.stop :])
        return torch.cat(parts, dim=1)

    def patches(self, per_token: Tensor) -> Tensor:
        """Of values (..., T') at the selected tokens those of patches; empty where none is."""
        count = per_token.shape[-1]
        before = {"cls": count, "patches": 0, "all": self.layout.before_patches(count)}[self.tokens]
        return per_token[..., count if before is None else before :]


def find_site(sae: SAE, clip: CLIP, hook_point: str | None, tokens: str | None) -> Site:
    """Where an SAE sits: as asked for, else as its metadata say.

    Raises ValueError for a hook point that nobody names or that is not one module, and for tokens
    that the tower has not.
    """
    if hook_point is None:
        hook_point = sae.metadata.get("hook_point")
    if tokens is None:
        tokens = sae.metadata.get("tokens") or "all"
    if hook_point is None:
        raise ValueError("hook_point: the SAE's metadata do not name one; pass it")
    theirs = sae.metadata.get("setup")
    ours = clip.setup
    if theirs is not None and ours is not None and theirs != ours.to_json():
        logger.warning(
            "the SAE was trained on %s set up as %s; here it is %s",
            sae.metadata.get("clip_model"),
            theirs,
            ours.to_json(),
        )
    found = _site("hook_point", clip, hook_point, tokens)._replace(d_in=sae.d_in)
    tell_another_place(sae, found.hook_point)
    return found


def tell_another_place(sae: SAE, hook_point: str) -> None:
    """Warn where an SAE is put at another hook point than it was trained at."""
    trained_at = sae.metadata.get("hook_point")
    if trained_at not in (None, hook_point):
        logger.warning("the SAE was trained at %s; here it is at %s", trained_at, hook_point)


def find_target(sae: SAE, clip: CLIP, site: Site, hook_point: str | None) -> Site:
    """Where what an SAE gives belongs: of a transcoder as asked for, else as its metadata say; of
    an autoencoder where its input is, at ``site``. Raises as ``find_site`` does."""
    if sae.d_out is None:
        if hook_point is not None:
            raise ValueError(
                f"target_hook_point: this SAE is no transcoder, it gives what is at "
                f"{site.hook_point!r} again"
            )
        return site
    if hook_point is None:
        hook_point = sae.metadata.get("target_hook_point")
    if not isinstance(hook_point, str):
        raise ValueError("target_hook_point: the SAE's metadata do not name one; pass it")
    found = _site("target_hook_point", clip, hook_point, site.tokens)
    return found._replace(d_in=sae.d_out, width="d_out")


def _site(what: str, clip: CLIP, hook_point: str, tokens: str) -> Site:
    names = hook_points(clip, hook_point)
    if len(names) != 1:
        raise ValueError(
            f"{what}: {hook_point!r} must name one module of {clip.name}, it matches {len(names)}"
        )
    layout = layout_at(clip, names[0])
    layout.check("tokens", [tokens])
    return Site(names[0], tokens, layout)


def embed(clip: CLIP, pixels: Tensor, site: Site, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Unit image embeddings (B, e), at least float32, with the activations at the site replaced by
    edit(x)."""
    with edited("hook_point", clip, {site.hook_point: edit}):
        return clip.embed(pixels)


class Looks:
    """Passes that end at sites, of which only the activations are wanted."""

    def __init__(self, clip: CLIP, *sites: Site) -> None:
        self.clip = clip
        self.names = [site.hook_point for site in sites]
        self._shortcut = Shortcut(module_of(clip))

    def __call__(
        self,
        pixels: Tensor,  # (B, 3, H, W)
    ) -> list[Tensor]:
        """The activations (B, T, d) at each site."""
        self._shortcut.next(pixels)
        with captured("hook_point", self.clip, self.names, shortcut=self._shortcut) as found:
            self.clip.embed(pixels)
        return [found[name] for name in self.names]


def clean_pass(clip: CLIP, pixels: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """Activations (B, T, d) at the site and unit embeddings, from one pass that is not edited."""
    x, _, embedded = clean_passes(clip, pixels, site, site)
    return x, embedded


def clean_passes(
    clip: CLIP, pixels: Tensor, site: Site, target: Site
) -> tuple[Tensor, Tensor, Tensor]:
    """``clean_pass`` with the activations at two sites."""
    kept: dict[str, Tensor] = {}

    def look_at(name: str) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            kept[name] = x
            return x

        return look

    names = (site.hook_point, target.hook_point)
    with edited("hook_point", clip, {name: look_at(name) for name in names}):
        embedded = clip.embed(pixels)
    for name in names:
        if name not in kept:
            raise ValueError(f"hook_point: the image tower never calls {name!r} as a module")
    return kept[names[0]], kept[names[1]], embedded


def from_site(
    clip: CLIP,
    pixels: Tensor,  # (B, 3, H, W)
    site: Site,
    x: Tensor,  # (B, T, d)
    embedded: Tensor,  # (B, e)
) -> Callable[[Tensor], Tensor]:
    """A function from activations (B, T, d) at the site to unit embeddings (B, e) of the same
    images.

    Where the site is one of a chain of blocks, it runs what follows and nothing before: a copy of
    the module tree (the weights are shared, the model is not touched) hands the activations past
    the blocks up to the site. That the blocks are such a chain is found out by trying: x must give
    `embedded` again, or the whole tower runs every time.
    """

    def whole(new: Tensor) -> Tensor:
        return embed(clip, pixels, site, lambda _: new)

    short = _without_blocks_up_to(clip.model, site.hook_point)
    if short is None:
        return whole
    tail = dataclasses.replace(clip, model=short)

    def rest(new: Tensor) -> Tensor:
        return embed(tail, pixels, site, lambda _: new)

    handed: list[Tensor] = []

    def hand(_: Tensor) -> Tensor:
        handed.append(x)
        return x

    # a tower that has its parts from elsewhere, as those of transformers, never calls the copies:
    # it gives `embedded` without being handed anything, or the hooks say so
    try:
        same = torch.allclose(embed(tail, pixels, site, hand), embedded, rtol=0, atol=1e-6)
    except ValueError:
        same = False
    return rest if same and handed else whole


def _without_blocks_up_to(model: nn.Module, hook_point: str) -> nn.Module | None:
    """A copy of the module tree where the block at the hook point and its elder siblings return
    their input."""
    *path, last = hook_point.split(".")
    if not last.isdecimal():
        return None
    root = here = copy.copy(model)
    for name in path:
        child = copy.copy(here.get_submodule(name))
        here._modules = {**here._modules, name: child}
        here = child
    here._modules = dict(here._modules)

    def hand_on(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x

    for index in range(int(last) + 1):
        block = copy.copy(here.get_submodule(str(index)))
        # the blocks' hooks have had their say in the activations that are handed on
        block._forward_hooks = OrderedDict()
        block._forward_pre_hooks = OrderedDict()
        block.forward = hand_on
        here._modules[str(index)] = block
    return root


def chunks(sae: SAE, rows: Tensor) -> Iterator[Tensor]:
    """Rows (N, d) in parts whose dense code (n, d_sae) fits into ``BLOCK`` elements."""
    return iter(rows.split(max(1, BLOCK // sae.d_sae)))


def grid_side(patches: int) -> int:
    """Side of the square patch grid, or 0 where the patches do not form one of at least 2 by 2."""
    side = math.isqrt(patches)
    return side if side > 1 and side * side == patches else 0


def set_features(
    x: Tensor,  # (..., d)
    acts: Tensor,  # (..., m)
    wanted: Tensor,  # (m,)
    directions: Tensor,  # (m, d)
    scale: Tensor,  # (..., 1)
) -> Tensor:
    """x (..., d) with m features moved from their activations to the wanted ones."""
    return (x + (wanted - acts) @ directions * scale).to(x.dtype)
