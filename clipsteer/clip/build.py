"""open_clip's modules in the setup that is asked for: activation, image size, preprocessing."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipsteer.clip.hooks import evaluating
from clipsteer.clip.patches import check_whole
from clipsteer.clip.positions import ANTIALIAS, resampled, set_timm_size, square
from clipsteer.clip.published import Settled
from clipsteer.clip.setup import as_size, has_quick_gelu, read_setup, setup_of

_TABLE = "positional_embedding"  # of open_clip's towers


class SetupError(ValueError):
    """A setup that a model cannot have."""


def evaluation_transform(model: Any) -> Any:
    """PIL image -> (3, H, W), as the setup of a model of open_clip's says."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)


def build(
    open_clip: Any,
    known: str,
    weights: str | None,
    device: str | torch.device,
    settled: Settled,
) -> Any:
    """The module of a name that open_clip knows, with the weights of a tag or a file.

    Raises SetupError for a setup that the model cannot have, and whatever open_clip raises.
    """
    options: dict[str, Any] = {"device": device, "force_preprocess_cfg": settled.preprocess}
    if settled.quick_gelu is not None:
        # force_quick_gelu=False would leave the architecture's own
        options["quick_gelu"] = settled.quick_gelu
    size = None
    if settled.image_size is not None:
        size = _other_size(open_clip, known, settled.image_size)
    try:
        model = _create(open_clip, known, weights, size, options, settled.rule)
    except TypeError as error:
        if settled.quick_gelu:
            raise SetupError(f"load: {known} cannot be built with QuickGELU: {error}") from error
        raise
    if settled.quick_gelu and not has_quick_gelu(model):
        raise SetupError(
            f"load: force_quick_gelu changes nothing in {known}: its towers are of libraries that "
            "have activations of their own"
        )
    if size is not None:
        _check_size(known, model, size, settled.written)
    model.visual.position_interpolation = settled.rule
    if setup_of(model) is None:
        raise SetupError(f"load: {known}: open_clip gave it no preprocess_cfg")
    return model


def _other_size(
    open_clip: Any, known: str, size: int | tuple[int, int]
) -> int | tuple[int, int] | None:
    """The image size as open_clip takes it; None where it is the architecture's own."""
    wanted = as_size(size)
    # as open_clip looks a name up; one with a prefix holds a path
    key = known if ":" in known else known.replace("/", "-")
    vision = open_clip.get_model_config(key)["vision_cfg"]
    if wanted == as_size(vision.get("image_size", 224)):
        return None
    if wanted[0] == wanted[1]:
        return wanted[0]
    if isinstance(vision.get("layers"), list | tuple):
        raise SetupError(f"load: {known} is a ResNet and sees square images only, got {wanted}")
    return wanted


def _create(
    open_clip: Any,
    known: str,
    weights: str | None,
    size: int | tuple[int, int] | None,
    options: dict[str, Any],
    rule: str,
) -> Any:
    """A model for images of a size.

    open_clip's own ViTs take position embeddings of any size, and resample them by one rule. A
    tower of timm's takes those of its published size and is then set to another; a file whose
    embeddings have that size already needs it the other way round. A ResNet takes those of the
    model's size alone.
    """
    file = weights is not None and Path(weights).is_file()
    with _quiet():
        if size is None or rule == ANTIALIAS:
            try:
                return open_clip.create_model(known, weights, force_image_size=size, **options)
            except RuntimeError as error:
                if size is None or not _is_misfit(error):
                    raise
        try:
            model = open_clip.create_model(known, weights, **options)
        except RuntimeError as error:
            if not _is_misfit(error) or not file:
                raise
        else:
            if file and rule != ANTIALIAS and hasattr(model.visual, _TABLE):
                _own_table(open_clip, model.visual, weights)
            resize(model.visual, as_size(size), rule)
            return model
        options = {**options, "load_weights": False, "pretrained_text": False}
        model = open_clip.create_model(known, None, force_image_size=size, **options)
        open_clip.factory.load_checkpoint(model, weights)
        return model


def _own_table(open_clip: Any, visual: Any, weights: Any) -> None:
    """Put a file's own position table in place of what open_clip resampled it to."""
    table = open_clip.factory.load_state_dict(weights).get(f"visual.{_TABLE}")
    if table is None:
        return
    grid = written_grid(weights, visual) or square(len(table) - 1)
    visual.positional_embedding = nn.Parameter(table.to(visual.positional_embedding))
    visual.grid_size = grid


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's words on the activation, which is decided, and on weights that are filled
    in afterwards."""

    def is_said(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No pretrained weights loaded")

    root = logging.getLogger()
    root.addFilter(is_said)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            yield
    finally:
        root.removeFilter(is_said)


def _is_misfit(error: RuntimeError) -> bool:
    return "size mismatch" in str(error)


def resize(visual: Any, size: tuple[int, int], rule: str) -> None:
    """Set a tower to another image size; its position embeddings are resampled by a rule."""
    if hasattr(visual, "set_input_size"):
        set_timm_size(visual.trunk, size, rule)
        visual.image_size = tuple(size)
    elif hasattr(visual, "attnpool"):
        pool = visual.attnpool
        own = visual.image_size
        own = own[0] if isinstance(own, list | tuple) else own
        table = pool.positional_embedding.data
        # the grid that the pool was made for tells by how much the tower shrinks images
        grid = square(len(table) - 1)
        new = (size[0] * grid[0] // own, size[1] * grid[0] // own)
        pool.positional_embedding = nn.Parameter(resampled(table, grid, new, 1, rule))
        visual.image_size = size[0] if size[0] == size[1] else size
    elif hasattr(visual, _TABLE):
        new = (size[0] // visual.patch_size[0], size[1] // visual.patch_size[1])
        table = visual.positional_embedding
        rows = resampled(table.data, visual.grid_size, new, 1, rule)
        visual.positional_embedding = nn.Parameter(rows, requires_grad=table.requires_grad)
        visual.grid_size = new
        visual.image_size = tuple(size)
    else:
        raise SetupError(f"load: a {type(visual).__name__} cannot be set to another image size")
    visual.preprocess_cfg = {**visual.preprocess_cfg, "size": visual.image_size}


def fits(model: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Whether `fill` can put weights in: all shapes agree, or may be resampled."""
    embedding = f"visual.{_TABLE}"
    own = {name: tensor.shape for name, tensor in model.state_dict().items() if name != embedding}
    return all(name not in own or own[name] == tensor.shape for name, tensor in tensors.items())


def written_grid(weights: str, visual: Any) -> tuple[int, int] | None:
    """Patches (h, w) of the images that a file's weights are for; None where it does not say."""
    setup = read_setup(weights)
    if setup is None:
        return None
    height, width = setup.image_size
    return height // visual.patch_size[0], width // visual.patch_size[1]


def fill(model: Any, tensors: Mapping[str, Tensor], weights: str, rule: str) -> None:
    """Put the tensors of a file into a model; position embeddings of another image size are
    resampled. Raises RuntimeError where they do not fit.
    """
    tensors = dict(tensors)
    visual = model.visual
    own = getattr(visual, _TABLE, None)
    table = tensors.get(f"visual.{_TABLE}")
    if own is not None and table is not None and hasattr(visual, "grid_size"):
        grid = written_grid(weights, visual)
        if grid is None:
            same = len(table) == len(own)
            grid = visual.grid_size if same else square(len(table) - 1)
        tensors[f"visual.{_TABLE}"] = resampled(table, grid, visual.grid_size, 1, rule)
    model.load_state_dict(tensors)


def _check_size(known: str, model: Any, size: int | tuple[int, int], written: Any) -> None:
    """Look at a blank image of the size. Raises SetupError where that fails, and for a size other
    than the written one that is not whole patches."""
    height, width = as_size(size)
    try:
        check_whole(known, model.visual, (height, width), written)
    except ValueError as error:
        raise SetupError(str(error)) from None
    weight = next(model.visual.parameters())
    blank = torch.zeros(1, 3, height, width, device=weight.device, dtype=weight.dtype)
    try:
        with evaluating(model):
            model.visual(blank)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise SetupError(f"load: {known} cannot see {height}x{width} images: {error}") from error
