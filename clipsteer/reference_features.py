"""What a frozen reference model says about a data set: features computed once and kept, or as they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from clipsteer._files import FileFormatError, read_json, read_safetensors, read_safetensors_header, write_safetensors
from clipsteer._training import described, digest_of, weights_digest
from clipsteer.classifier import pixel_batches
from clipsteer.clip import CLIP, evaluating, load
from clipsteer.contrastive_data import captions_of, data_digest
from clipsteer.data import ImageDataset

KIND = "clipsteer reference features"


class ReferenceFeatures(NamedTuple):
    """Unit features of every pair of a data set; row i belongs to sample i.

    image (N, d_ref), text (N, d_ref); name says whose they are; data and weights are digests of what they came from.
    """

    image: Tensor
    text: Tensor
    name: str
    data: str
    weights: str

    def save(self, path: str | Path) -> None:
        metadata = {"kind": KIND, "model": self.name, "data": self.data, "weights": self.weights}
        write_safetensors(path, {"image": self.image, "text": self.text}, metadata)


def model_digest(clip: CLIP) -> str:
    """Of the weights, the modules that use them (activations have no weights), preprocessing and context length."""
    parts = [weights_digest(clip.model), described(clip.model), described(clip.preprocess)]
    return digest_of([*parts, getattr(clip.tokenizer, "context_length", None)])


def encode_texts(clip: CLIP, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Unit embeddings (N, e), at least float32, without gradients; equal texts are encoded once."""
    distinct = list(dict.fromkeys(texts))
    parts = []
    with evaluating(clip.model):
        for at in range(0, len(distinct), batch_size):
            found = clip.model.encode_text(clip.tokenizer(distinct[at : at + batch_size]).to(clip.device))
            parts.append(F.normalize(found.to(torch.promote_types(found.dtype, torch.float32)), dim=-1))
    place = {text: i for i, text in enumerate(distinct)}
    return torch.cat(parts)[[place[text] for text in texts]]


def encode_dataset(clip: CLIP, dataset: ImageDataset, *, batch_size: int = 128, workers: int = 0) -> Tensor:
    """Unit image embeddings (N, e), at least float32, without gradients."""
    batches = pixel_batches(clip, dataset, batch_size, workers)
    total = -(-len(dataset) // batch_size)
    with evaluating(clip.model):
        return torch.cat([clip.embed(x) for x in tqdm(batches, "encode", total, leave=False, disable=None)])


def compute(clip: CLIP, dataset: ImageDataset, *, batch_size: int = 128, workers: int = 0) -> ReferenceFeatures:
    """Features of whole images, without crops, and of their captions, on the CPU in float32."""
    image = encode_dataset(clip, dataset, batch_size=batch_size, workers=workers)
    text = encode_texts(clip, captions_of(dataset))
    return ReferenceFeatures(
        image.float().cpu(), text.float().cpu(), clip.name, data_digest(dataset), model_digest(clip)
    )


def read(path: str | Path, dataset: ImageDataset) -> ReferenceFeatures:
    """Features that `compute` or another tool left in a safetensors file.

    The file holds "image" and "text", (N, d_ref) each, and the metadata of `ReferenceFeatures.save`; without a digest
    of the data in it the number of samples alone is checked.

    Raises:
        ValueError: the features of another data set. FileFormatError: no features of pairs. FileNotFoundError.
    """
    tensors, metadata = read_safetensors(path, allow_nan=False), read_safetensors_header(path).metadata
    image, text = tensors.get("image"), tensors.get("text")
    if (
        image is None or text is None or image.ndim != 2 or image.shape != text.shape
        or not (image.is_floating_point() and text.is_floating_point())
    ):  # fmt: skip
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise FileFormatError(f'{path}: expected features "image" and "text" of one shape (N, d), got {shapes}')
    data = metadata.get("data", "")
    if len(image) != len(dataset) or (data and data != data_digest(dataset)):
        raise ValueError(
            f"{path}: reference features of {len(image)} other pairs; this data set has {len(dataset)}. Compute them "
            "anew, on the same captions and images in the same order"
        )
    image, text = (F.normalize(x.float(), dim=-1) for x in (image, text))
    return ReferenceFeatures(image, text, metadata.get("model", str(path)), data, metadata.get("weights", ""))


def cached(path: str | Path, clip: CLIP, dataset: ImageDataset, *, workers: int = 0) -> ReferenceFeatures:
    """The features in `path` where they are this model's of this data set; otherwise computed and written there.

    The data set is known by its captions and 16 of its images (`data_digest`).
    """
    path = Path(path)
    if path.exists():
        found = read(path, dataset)
        if found.weights != model_digest(clip):
            raise ValueError(
                f"{path}: features of {found.name} with other weights, activations or preprocessing; remove the file "
                "to compute them anew"
            )
        return found
    features = compute(clip, dataset, workers=workers)
    features.save(path)
    return features


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> CLIP:
    """The model that `clipsteer train --out folder` left there."""
    config: Any = read_json(Path(folder) / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model"), str):
        raise FileFormatError(f"{Path(folder) / 'config.json'}: expected the name of a model")
    return load(config["model"], Path(folder) / "model.safetensors", device=device)
