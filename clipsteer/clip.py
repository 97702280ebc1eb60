"""open_clip models: loading, hook points by module name, capturing and editing activations, zero-shot heads.

Every activation is shown as (B, T, d), whatever the block's own layout is: sequence-first blocks are transposed,
feature maps (B, C, H, W) flattened to (B, H*W, C), pooled outputs (B, d) given one token.
"""

from __future__ import annotations

import difflib
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer._files import FileFormatError, read_json
from clipsteer._tokens import class_tokens as class_tokens
from clipsteer._tokens import layout_at

logger = logging.getLogger(__name__)

EMOJICLIP = "emojiclip"
EMOJI_TINY = "emoji-tiny"
_ASSETS = Path(__file__).parent / "assets" / "emoji"
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")

SIMPLE_TEMPLATES = ("a photo of a {}.",)
# the seven prompts that OpenAI's CLIP authors chose out of eighty for ImageNet
CLIP_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
# those that EmojiCLIP was trained with
EMOJI_TEMPLATES = (
    "{}",
    "a picture of {}",
    "an emoji of {}",
    "a drawing of {}",
    "an icon of {}",
    "a small image of {}",
    "the {}",
)


@dataclass(frozen=True, eq=False)
class CLIP:
    """A loaded model with what belongs to it.

    Attributes:
        model: the open_clip module, in eval mode.
        preprocess: PIL image -> (3, H, W) float tensor.
        tokenizer: list of n strings -> (n, context) int64 tensor.
        name, pretrained: what `load` was given.
    """

    model: nn.Module
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[[Sequence[str]], Tensor]
    name: str
    pretrained: str | None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the image tower's weights."""
        return _float_dtype(self.model)

    def encode_images(self, images: Iterable[Any], batch_size: int = 128) -> Tensor:
        """PIL images -> (N, e) image embeddings with unit rows, without gradients."""
        pending, out = [], []
        with evaluating(self.model):
            for image in images:
                pending.append(self.preprocess(image))
                if len(pending) == batch_size:
                    out.append(self.embed(torch.stack(pending)))
                    pending = []
            if pending:
                out.append(self.embed(torch.stack(pending)))
        if not out:
            raise ValueError("encode_images: images is empty")
        return torch.cat(out).to(self.dtype)

    def embed(self, pixels: Tensor) -> Tensor:
        """Preprocessed images (B, 3, H, W) -> unit image embeddings (B, e), at least float32; with gradients."""
        features = _first(self.model.encode_image(pixels.to(self.device, self.dtype)))
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise RuntimeError(
            f"open_clip could not be imported ({error}); install it with: pip install open_clip_torch"
        ) from error
    except (RuntimeError, AttributeError, OSError) as error:
        raise RuntimeError(
            f"open_clip could not be imported: {error}. torch is {torch.__version__}; its torchvision was most likely "
            "built for another torch, so that its compiled operators do not load. Install the pair from one index, "
            "for example: pip install --upgrade torch torchvision --index-url https://download.pytorch.org/whl/cpu"
        ) from error
    return open_clip


def load(
    model: str = EMOJICLIP,
    pretrained: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> CLIP:
    """Load a model through open_clip.

    Args:
        model: "emojiclip" (the small model that comes with clipsteer, for 64 px drawings), "emoji-tiny" (a fifth of
            its size, without weights), an open_clip architecture ("ViT-B-32") or a .json file that describes one,
            "hf-hub:org/repo" or "local-dir:path".
        pretrained: for an architecture, one of its open_clip tags or a local weights file; None means random weights.
            For "emojiclip", other weights than the bundled ones. Not for hf-hub: and local-dir: names.
        device, dtype: where and as what the weights are kept; None keeps open_clip's float32.

    Raises:
        ValueError: unknown architecture or tag, or a weights file that is not there.
        FileFormatError: a weights file that is damaged or of another architecture.
        RuntimeError: open_clip or torchvision cannot be imported; weights could not be downloaded.
    """
    open_clip = _open_clip()
    pretrained = str(pretrained) if pretrained is not None else None
    weights, tokenizer_args, known = pretrained, {}, model
    if model in (EMOJICLIP, EMOJI_TINY):
        if model not in open_clip.list_models():
            open_clip.add_model_config(_ASSETS / f"{model}.json")
        if model == EMOJICLIP:
            weights = weights or str(_ASSETS / "emojiclip.safetensors")
        tokenizer_args = {"bpe_path": str(_ASSETS / "bpe_merges.txt.gz")}
    elif model.endswith(".json"):
        known = _add_architecture(open_clip, Path(model))
    _check_names(open_clip, known, weights)
    if weights is None and ":" not in model:
        logger.warning("%s: no pretrained weights were asked for, so the weights are random", model)
    try:
        module, _, preprocess = open_clip.create_model_and_transforms(known, pretrained=weights, device=device)
    except Exception as error:
        if weights is not None and Path(weights).is_file():
            raise FileFormatError(f"{weights}: cannot be loaded as weights of {model}: {error}") from error
        raise
    tokenizer = open_clip.get_tokenizer(known, **tokenizer_args)
    module = module.to(device=device, dtype=dtype).eval()
    return CLIP(module, preprocess, tokenizer, model, pretrained)


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


def _check_names(open_clip: Any, model: str, pretrained: str | None) -> None:
    if model.startswith(("hf-hub:", "local-dir:")):
        if pretrained is not None:
            raise ValueError(f"load: {model!r} brings its own weights; pretrained must be None, got {pretrained!r}")
        return
    known = open_clip.list_models()
    if model.replace("/", "-") not in known:
        near = difflib.get_close_matches(model, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see open_clip.list_models()"
        raise ValueError(f"load: model must be 'emojiclip' or a name that open_clip knows, got {model!r}{hint}")
    if pretrained is None or Path(pretrained).is_file():
        return
    if Path(pretrained).suffix in _WEIGHT_SUFFIXES or len(Path(pretrained).parts) > 1:
        raise ValueError(f"load: pretrained names a file that does not exist: {pretrained}")
    tags = open_clip.list_pretrained_tags_by_model(model.replace("/", "-"))
    if pretrained.lower().replace("-", "_") not in tags:
        raise ValueError(f"load: pretrained must be a file or one of {model}'s tags {tags}, got {pretrained!r}")


def hook_points(model: nn.Module, pattern: str = "*") -> list[str]:
    """Names of the model's modules that match an fnmatch pattern, in the model's order ("*" also crosses dots)."""
    return [name for name, _ in model.named_modules() if name and fnmatchcase(name, pattern)]


def _match(where: str, model: nn.Module, pattern: str) -> list[str]:
    names = hook_points(model, pattern)
    if not names:
        near = difflib.get_close_matches(pattern, hook_points(model), n=3)
        hint = f"; near matches: {', '.join(near)}" if near else ""
        raise ValueError(f"{where}: no module of the model matches hook point {pattern!r}{hint}")
    return names


_REMEDY = (
    "steer the model that is not compiled, or set torch._dynamo.config.skip_nnmodule_hook_guards = False before it is "
    "compiled"
)


def _hook_points(where: str, model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """The modules that patterns match, each once. Raises where a compiled module would run without their hooks."""
    names = list(dict.fromkeys(name for pattern in patterns for name in _match(where, model, pattern)))
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not dynamo.config.skip_nnmodule_hook_guards:
        return names
    for name in names:
        parts = name.split(".")
        for end in range(len(parts) + 1):
            module = model.get_submodule(".".join(parts[:end]))
            # hooks on the wrapper itself run outside of the compiled code
            wrapper = isinstance(module, dynamo.eval_frame.OptimizedModule) and end < len(parts)
            if wrapper or getattr(module, "_compiled_call_impl", None) is not None:
                compiled = f"{'.'.join(parts[:end])!r}" if end else "the model"
                raise RuntimeError(
                    f"{where}: {compiled} is compiled, and torch.compile takes no notice of hooks such as the one at "
                    f"{name!r}; {_REMEDY}"
                )
    if dynamo.utils.counters["frames"]["ok"]:
        _warn_of_compilation(where)
    return names


@functools.cache
def _warn_of_compilation(where: str) -> None:
    # a module does not know what was compiled around it, so this cannot be an error
    logger.warning("%s: code that was compiled and calls this model leaves hooks out: %s", where, _REMEDY)


def _batch_first(model: nn.Module, name: str) -> bool:
    """Layout of a module's output: the innermost enclosing module that has a `batch_first` says it."""
    module, innermost = model, True
    for part in name.split("."):
        innermost = getattr(module, "batch_first", innermost)
        module = getattr(module, part)
    # a transformer transposes back on its way out; attention alone keeps its own layout to the end
    return bool(module.batch_first) if isinstance(module, nn.MultiheadAttention) else bool(innermost)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _channels_last(module: nn.Module) -> bool:
    # timm's patch embeddings for images of any size give (B, H, W, C)
    return "NHWC" in str(getattr(module, "output_fmt", ""))


def _as_tokens(name: str, output: Any, batch_first: bool, channels_last: bool) -> Tensor:
    """A module's output as (B, T, d); of several outputs the first counts. A view where the layout allows it."""
    x = _first(output)
    if not isinstance(x, Tensor) or x.ndim not in (2, 3, 4):
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"hook point {name!r}: expected an output with 2, 3 or 4 dimensions, got {got}")
    if x.ndim == 2:
        return x[:, None]
    if x.ndim == 4:
        return x.flatten(1, 2) if channels_last else x.flatten(2).transpose(1, 2)
    return x if batch_first else x.transpose(0, 1)


def _from_tokens(x: Tensor, output: Any, batch_first: bool, channels_last: bool) -> Any:
    """Undo `_as_tokens`."""
    old = _first(output)
    if old.ndim == 2:
        x = x[:, 0]
    elif old.ndim == 4:
        x = (x if channels_last else x.transpose(1, 2)).reshape(old.shape)
    elif not batch_first:
        x = x.transpose(0, 1)
    if not isinstance(output, tuple | list):
        return x
    rest = (x, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


@contextmanager
def apply_at(model: nn.Module, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[nn.Module]:
    """Replace activations x by fn(x) at hook points while the block runs.

    Args:
        model: any module tree.
        functions: fnmatch pattern of module names -> fn, (B, T, d) -> (B, T, d). Where several patterns match a
            module, theirs are applied in the order given.

    Yields the model. The hooks are gone afterwards, also after an error; weights are never touched, and an fn that
    returns its argument leaves every output bit-identical.

    Raises:
        ValueError: a pattern without a match; in the forward pass, an fn that changes the shape.
        RuntimeError: the module, or one that it is part of, is compiled: torch.compile leaves hooks out.
    """
    with ExitStack() as stack:
        for pattern, fn in functions.items():
            for name in _hook_points("apply_at", model, [pattern]):
                handle = model.get_submodule(name).register_forward_hook(
                    _edit_hook(name, _batch_first(model, name), fn)
                )
                stack.callback(handle.remove)
        yield model


def _edit_hook(name: str, batch_first: bool, fn: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = _as_tokens(name, output, batch_first, _channels_last(module))
        y = fn(x)
        if y is x:
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"apply_at: at {name!r} the function must return shape {tuple(x.shape)}, got {got}")
        return _from_tokens(y, output, batch_first, _channels_last(module))

    return hook


@contextmanager
def capture(model: nn.Module, patterns: str | Iterable[str], *, detach: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collect activations while the block runs: yields a dict, module name -> (B, T, d) of its latest call.

    Args:
        patterns: one fnmatch pattern of module names or several.
        detach: cut the tensors from the graph; without it gradients flow through them.

    A module that the forward pass does not call stays absent. Raises ValueError for a pattern without a match, and
    RuntimeError for a module that is compiled or part of one.
    """
    found: dict[str, Tensor] = {}

    def record(name: str, batch_first: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = _as_tokens(name, output, batch_first, _channels_last(module))
            found[name] = x.detach() if detach else x

        return hook

    names = _hook_points("capture", model, [patterns] if isinstance(patterns, str) else patterns)
    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(record(name, _batch_first(model, name)))
            stack.callback(handle.remove)
        yield found


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """No gradients and evaluation mode; the modes come back afterwards, also on error."""
    modes = [(module, module.training) for root in modules for module in root.modules()]
    for root in modules:
        root.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _float_dtype(model: nn.Module) -> torch.dtype:
    tower = getattr(model, "visual", model)
    return next((p.dtype for p in tower.parameters() if p.is_floating_point() and p.ndim > 1), torch.float32)


def harvest(model: nn.Module, loader: Iterable[Any], hook_point: str, tokens: str = "all") -> Iterator[Tensor]:
    """Activations of one hook point over a loader, batch by batch, without gradients and in eval mode.

    Args:
        loader: batches (B, 3, H, W) of preprocessed images, or (B, context) of token ids for the text tower; of a
            tuple or list the first item counts.
        hook_point: one module name, or a pattern that matches exactly one.
        tokens: "all", "cls" (the class token) or "patches" (what follows the class and register tokens).

    Yields (N, d) tensors on the model's device, N = B times the tokens kept, image by image.

    Raises:
        ValueError: unknown `tokens`, a hook point that is not one module, that the forward pass does not reach, or
            that has no such tokens.
    """
    names = _match("harvest", model, hook_point)
    if len(names) != 1:
        raise ValueError(f"harvest: hook_point must name one module, got {hook_point!r}, which matches {len(names)}")
    name, layout = names[0], layout_at(model, names[0])
    layout.check("harvest", [tokens])
    device, dtype = next(model.parameters()).device, _float_dtype(model)
    for batch in loader:
        x = _first(batch).to(device)
        # the guards are opened per batch: a consumer may stop, or train, between two of them
        with evaluating(model), capture(model, name, detach=True) as found:
            if x.is_floating_point():
                model.encode_image(x.to(dtype))
            else:
                model.encode_text(x)
        if name not in found:
            raise ValueError(f"harvest: the forward pass never calls {name!r} as a module; choose another hook point")
        acts = found[name]  # (B, T, d)
        kept = acts[:, layout.where("harvest", tokens, acts.shape[1])]
        yield kept.reshape(-1, kept.shape[-1])


def zero_shot_head(
    clip: CLIP, classnames: Sequence[str], templates: Sequence[str] | None = None, batch_size: int = 256
) -> Tensor:
    """Classifier weights from class names: (C, e), unit rows; logits are `logit_scale.exp() * image_features @ head.T`.

    head_c = normalize(mean over templates of normalize(encode_text(template.format(name_c)))): the prompt ensemble of
    Radford et al. 2021 (arXiv 2103.00020, section 3.1.4).

    Args:
        classnames: C names.
        templates: strings with one "{}"; by default EMOJI_TEMPLATES for "emojiclip", CLIP_TEMPLATES otherwise.

    Raises:
        ValueError: no class name, no template, or a template without "{}".
    """
    if templates is None:
        templates = EMOJI_TEMPLATES if clip.name == EMOJICLIP else CLIP_TEMPLATES
    if isinstance(classnames, str) or not classnames:
        raise ValueError(f"zero_shot_head: classnames must be a non-empty list of strings, got {classnames!r}")
    if isinstance(templates, str) or not templates or any("{}" not in t for t in templates):
        raise ValueError(f"zero_shot_head: templates must be a list of strings with '{{}}', got {templates!r}")
    texts = [template.format(name) for name in classnames for template in templates]
    with evaluating(clip.model):
        parts = [
            clip.model.encode_text(clip.tokenizer(texts[at : at + batch_size]).to(clip.device))
            for at in range(0, len(texts), batch_size)
        ]
    features = F.normalize(torch.cat(parts), dim=-1).unflatten(0, (len(classnames), len(templates)))  # (C, n, e)
    return F.normalize(features.mean(1), dim=-1)
