"""What a frozen reference model says about a data set: features, computed once and kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from clipsteer.clip.axes import first_of
from clipsteer.clip.hooks import evaluating
from clipsteer.clip.model import CLIP, load
from clipsteer.clip.pixels import pixel_batches
from clipsteer.clip.runs import read_run
from clipsteer.data.dataset import ImageDataset, captions_of, data_digest
from clipsteer.data.identity import identity_of
from clipsteer.io.checked import CHECKSUM, checksum_of
from clipsteer.io.digests import described, digest_of, tensors_digest, weights_digest
from clipsteer.io.doors import door
from clipsteer.io.files import (
    FileFormatError,
    read_safetensors,
    read_safetensors_header,
    refuse_nan,
    write_safetensors,
)
from clipsteer.io.names import spoken
from clipsteer.training.settings import other_data
from clipsteer.training.world import JointBatch, World

logger = logging.getLogger(__name__)

KIND = "clipsteer reference features"


class ReferenceFeatures(NamedTuple):
    """Unit features of every pair of a data set; row i belongs to sample i.

    data and weights are digests of what they came from, identity is what
    ``clipsteer.data.identity_of`` says of the data, as JSON; each empty where that is not known.
    """

    image: Tensor  # (N, d_ref)
    text: Tensor  # (N, d_ref)
    name: str  # of the model
    data: str
    weights: str
    identity: str = ""

    def digest(self) -> str:
        """That of the weights that they came from, or of the features themselves."""
        return self.weights or tensors_digest({"image": self.image, "text": self.text})

    def check_data(self, dataset: ImageDataset) -> None:
        """Raise ValueError unless these are features of the pairs of `dataset`."""
        reason = self._other_data(dataset)
        if reason is not None:
            raise ValueError(
                f"train: the reference features are of {len(self.image)} other pairs than "
                f"these {len(dataset)} ({reason})"
            )

    def _other_data(self, dataset: ImageDataset) -> str | None:
        if len(self.image) != len(dataset):
            return "their number"
        if self.data and self.data != data_digest(dataset):
            return "captions or images"
        if not self.identity:
            return None
        there = json.loads(self.identity)
        return other_data(there, json.loads(json.dumps(identity_of(dataset))))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that ``read`` takes."""
        tensors = {"image": self.image, "text": self.text}
        metadata = {"kind": KIND, "model": self.name, "data": self.data, "weights": self.weights}
        metadata["identity"] = self.identity
        metadata[CHECKSUM] = _checksum(tensors, metadata)
        write_safetensors(path, tensors, metadata)


def model_digest(clip: CLIP) -> str:
    """Of the weights, the modules that use them (activations have no weights), preprocessing and
    context length."""
    parts = [weights_digest(clip.model), described(clip.model), described(clip.preprocess)]
    return digest_of([*parts, getattr(clip.tokenizer, "context_length", None)])


def referred(
    reference: ReferenceFeatures | CLIP,
    ids: Tensor,  # (B,)
    theirs: list[Tensor],  # (B, 3, H, W) and (B, L), as a model takes them; else empty
) -> tuple[Tensor, Tensor]:  # (B, d_ref) twice
    """What the reference says of the pairs of a batch: kept features, or a model's."""
    if isinstance(reference, ReferenceFeatures):
        return reference.image[ids], reference.text[ids]
    with evaluating(reference.model):
        image = reference.embed(theirs[0])
        text = first_of(reference.model.encode_text(theirs[1].to(reference.device)))
    return image, F.normalize(text.float(), dim=-1)


def _divided(
    n: int, batch_size: int, world: World | None, encode: Callable[[Sequence[int]], Tensor]
) -> Tensor:
    """`encode` of the rows 0 … n-1 of something, (n, e).

    Of several processes each takes every size-th of the batches that one would have, and all get
    all.
    """
    if world is None or world.size == 1:
        return encode(range(n))
    rows = torch.arange(n).split(batch_size)
    shares = [torch.cat([rows[0][:0], *rows[rank :: world.size]]) for rank in range(world.size)]
    own = shares[world.rank].tolist()
    # without a batch of its own a process still has to know e
    part = encode(own or [0])[: len(own)]
    joined = JointBatch(world, len(own)).join(part)
    order = torch.cat(shares).argsort()
    return joined[order.to(part.device)]


def encode_texts(
    clip: CLIP, texts: Sequence[str], batch_size: int = 256, world: World | None = None
) -> Tensor:
    """Unit embeddings (N, e), at least float32, without gradients; equal texts are encoded once.

    With `world` the processes, which all have to call it with the same arguments, share the work.
    Raises ValueError for a model without text tower.
    """
    clip.need_text("encode_texts")
    distinct = list(dict.fromkeys(texts))
    model = clip.model

    def encode(rows: Sequence[int]) -> Tensor:
        parts = []
        for at in range(0, len(rows), batch_size):
            tokens = clip.tokenizer([spoken(distinct[row]) for row in rows[at : at + batch_size]])
            found = first_of(model.encode_text(tokens.to(clip.device)))
            wide = torch.promote_types(found.dtype, torch.float32)
            parts.append(F.normalize(found.to(wide), dim=-1))
        return torch.cat(parts)

    place = {text: i for i, text in enumerate(distinct)}
    with evaluating(clip):
        encoded = _divided(len(distinct), batch_size, world, encode)
    return encoded[[place[text] for text in texts]]


def encode_dataset(
    clip: CLIP,
    dataset: ImageDataset,
    *,
    batch_size: int = 128,
    workers: int = 0,
    world: World | None = None,
) -> Tensor:
    """Unit image embeddings (N, e), at least float32, without gradients; `world` as in
    `encode_texts`."""

    def encode(rows: Sequence[int]) -> Tensor:
        batches = pixel_batches(clip, dataset.subset(rows), batch_size, workers)
        quiet = None if world is None or world.rank == 0 else True
        bar = tqdm(batches, "encode", -(-len(rows) // batch_size), leave=False, disable=quiet)
        return torch.cat([clip.embed(x) for x in bar])

    with evaluating(clip):
        return _divided(len(dataset), batch_size, world, encode)


def compute(
    clip: CLIP,
    dataset: ImageDataset,
    *,
    batch_size: int = 128,
    workers: int = 0,
    world: World | None = None,
) -> ReferenceFeatures:
    """Features of whole images, without crops, and of their captions, on the CPU in float32;
    `world` as in `encode_texts`."""
    image = encode_dataset(clip, dataset, batch_size=batch_size, workers=workers, world=world)
    text = encode_texts(clip, captions_of(dataset), world=world)
    return ReferenceFeatures(
        image.float().cpu(),
        text.float().cpu(),
        name=clip.name,
        data=data_digest(dataset),
        weights=model_digest(clip),
        identity=json.dumps(identity_of(dataset)),
    )


@door
def read(path: str | Path, dataset: ImageDataset) -> ReferenceFeatures:
    """Features that `compute` or another tool left in a safetensors file.

    The file holds "image" and "text", (N, d_ref) each, and the metadata of
    `ReferenceFeatures.save`; without a digest of the data in it the number of samples alone is
    checked.

    Raises:
        ValueError: the features of another data set. FileFormatError: no features of pairs, or
            damaged ones. FileNotFoundError.
    """
    path = Path(path)
    tensors = read_safetensors(path)
    refuse_nan(path, tensors, infinity=True)
    metadata = read_safetensors_header(path).metadata
    if not _are_features(tensors):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise FileFormatError(
            f'{path}: expected features "image" and "text" of one shape (N, d), got {shapes}'
        )
    _check_whole(path, tensors, metadata)
    name = metadata.get("model", str(path))
    facts = (metadata.get(key, "") for key in ("data", "weights", "identity"))
    found = ReferenceFeatures(tensors["image"], tensors["text"], name, *facts)
    reason = found._other_data(dataset)
    if reason is not None:
        raise ValueError(
            f"{path}: reference features of {len(found.image)} other pairs ({reason}); this data "
            f"set has {len(dataset)}. Compute them anew, on the same captions and images in the "
            f"same order"
        )
    return _unit(found)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of the features and of all that is said of them."""
    said = {name: text for name, text in metadata.items() if name != CHECKSUM}
    return checksum_of({**said, "tensors": tensors_digest(dict(sorted(tensors.items())))})


def _check_whole(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise FileFormatError for damaged features of ours; those of other tools have no checksum."""
    stated = metadata.get(CHECKSUM)
    if stated is not None:
        if stated != _checksum(tensors, metadata):
            raise FileFormatError(f"{path}: damaged: its checksum is of other features")
        try:
            is_object = isinstance(json.loads(metadata.get("identity") or "{}"), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise FileFormatError(f"{path}: 'identity' must be a JSON object")
    elif "identity" in metadata:
        raise FileFormatError(f"{path}: damaged: lacks its checksum")
    elif metadata.get("kind") == KIND:
        logger.warning("%s: of a version that kept no checksum; taken as it is", path)


def _are_features(tensors: dict[str, Tensor]) -> bool:
    if not {"image", "text"} <= tensors.keys():
        return False
    image = tensors["image"]
    text = tensors["text"]
    is_floating = image.is_floating_point() and text.is_floating_point()
    return is_floating and image.ndim == 2 and image.shape == text.shape


def _unit(features: ReferenceFeatures) -> ReferenceFeatures:
    image, text = (F.normalize(x.float(), dim=-1) for x in features[:2])
    return features._replace(image=image, text=text)


@door
def cached(
    path: str | Path,
    clip: CLIP,
    dataset: ImageDataset,
    *,
    workers: int = 0,
    world: World | None = None,
) -> ReferenceFeatures:
    """The features in `path` where they are this model's of this data set; otherwise computed and
    written there.

    The data set is known by its captions and its files (`clipsteer.data.identity_of`). With `world`
    the processes compute them together and the first one writes; the file must be where all see it.
    """
    path = Path(path)
    is_lead = world is None or world.rank == 0
    is_there = path.exists()
    if world is not None:
        is_there = world.any(is_there and is_lead)
    if is_there:
        found = read(path, dataset)
        if found.weights != model_digest(clip):
            raise ValueError(
                f"{path}: features of {found.name} with other weights, activations or "
                f"preprocessing; remove the file to compute them anew"
            )
        return found
    features = compute(clip, dataset, workers=workers, world=world)
    if is_lead:
        path.parent.mkdir(parents=True, exist_ok=True)
        features.save(path)
    return _unit(features)  # as `read` gives them, to the last bit


@door
def load_run(folder: str | Path, device: str | torch.device = "cpu") -> CLIP:
    """The model that `clipsteer train --out folder` left there: ``load(folder)``, which says more
    where there is none."""
    run = read_run(folder)
    return load(run.model, run.weights, device=device)
