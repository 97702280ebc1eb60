"""Names for embeddings: sparse, non-negative sums of text concepts.

    z = norm(norm(image) - μ),   rows of C = norm(norm(text) - mean of the texts)
    w* = argmin over w >= 0 of ‖wC - z‖² + λ Σ w

Images and texts are each centred on their own mean, which closes the gap between the two. The
solver is in ``clipsteer.splice.lasso``.

Source: SpLiCE, Bhalla et al. 2024 (arXiv 2402.10376).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.clip.model import CLIP
from clipsteer.clip.pixels import image_embeddings
from clipsteer.clip.zero_shot import zero_shot_head
from clipsteer.data.emoji import EmojiStyles
from clipsteer.io.doors import door
from clipsteer.io.files import FileFormatError
from clipsteer.io.kinds import Kind, read_kind, write_kind
from clipsteer.splice.lasso import Decomposition, nonnegative_lasso

__all__ = ["ConceptDictionary", "Decomposition", "mean_embedding", "nonnegative_lasso"]

# decomposed at a time
_ROWS = 1024
_TENSORS = "concepts.safetensors"
_INDEX = "concepts.json"
_KIND = Kind("clipsteer-concepts", 1, "a concept dictionary", _TENSORS, _INDEX)


def mean_embedding(clip: CLIP, dataset: Any, batch_size: int = 64) -> Tensor:
    """μ (e,), on the CPU: the mean of the unit embeddings of a data set's images.

    The data set is map-style, of images or (image, target) pairs. Summed in float64, one batch at a
    time. Raises ValueError where it is empty.
    """
    total = torch.zeros((), dtype=torch.float64)
    for part in image_embeddings(clip, dataset, batch_size, "mean embedding"):
        total = total + part.sum(0, dtype=torch.float64).cpu()
    return (total / len(dataset)).float()


class ConceptDictionary:
    """n concepts in the embedding space of a CLIP model, to decompose its image embeddings into.

        dictionary = ConceptDictionary.from_clip(clip, image_mean=photos)
        embeddings = clip.encode_images(images)
        dictionary.decompose(embeddings).weights  # (B, n), a few above 0 in each row
        dictionary.name(embeddings, count=3)  # [[("cat", 0.31), …], …]

    Args:
        concepts: n >= 2 texts.
        text_embeddings: (n, e), one a concept, of any length; they are normalised here.
        image_mean: μ (e,), the mean of the unit embeddings of images of the kind that will be
            decomposed.
        metadata: JSON-able facts to keep with it.

    Attributes:
        concepts: list of n texts.
        matrix: C (n, e), unit rows, float32 or float64.
        image_mean: μ (e,).
        metadata: as given.

    Raises:
        ValueError: shapes, values that are not finite, fewer than two concepts, texts that all
            embed alike.
    """

    def __init__(
        self,
        concepts: Sequence[str],
        text_embeddings: Tensor,  # (n, e)
        image_mean: Tensor,  # (e,)
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        concepts = list(concepts)
        texts = torch.as_tensor(text_embeddings).detach()
        mean = torch.as_tensor(image_mean).detach()
        shapes = (
            f"{len(concepts)} concepts, text_embeddings {tuple(texts.shape)}, "
            f"image_mean {tuple(mean.shape)}"
        )
        is_matrix = texts.ndim == 2 and mean.shape == texts.shape[1:]
        if not is_matrix or len(texts) < 2 or len(concepts) != len(texts):
            raise ValueError(
                f"ConceptDictionary: expected n >= 2 concepts, (n, e) and (e,); got {shapes}"
            )
        if not bool(texts.isfinite().all() & mean.isfinite().all()):
            raise ValueError(
                f"ConceptDictionary: text_embeddings and image_mean must be finite; {shapes}"
            )
        unit = F.normalize(texts.double(), dim=1)
        centred = unit - unit.mean(0)
        if float(centred.norm(dim=1).max()) < 1e-6:
            raise ValueError(
                "ConceptDictionary: the texts all embed alike, so that nothing tells them apart"
            )
        dtype = torch.promote_types(texts.dtype, torch.float32)
        matrix = F.normalize(centred, dim=1).to(dtype)
        self._set(concepts, matrix, mean.to(matrix), dict(metadata or {}))

    def _set(
        self,
        concepts: list[str],
        matrix: Tensor,  # (n, e)
        image_mean: Tensor,  # (e,)
        metadata: dict[str, Any],
    ) -> None:
        self.concepts = concepts
        self.matrix = matrix
        self.image_mean = image_mean
        self.metadata = metadata

    @classmethod
    def from_clip(
        cls,
        clip: CLIP,
        concepts: Sequence[str] | None = None,
        *,
        image_mean: Any,
        templates: Sequence[str] = ("{}",),
    ) -> ConceptDictionary:
        """A dictionary of the model's own text embeddings.

        Args:
            clip: the model, as ``load`` gives it.
            concepts: texts; by default the names of the 857 bundled drawings.
            image_mean: μ (e,), or a data set of images to take it from (see `mean_embedding`).
            templates: prompts with one "{}" that each concept's embedding is averaged over; by
                default it stands alone.
        """
        if concepts is None:
            concepts = [concept.label for concept in EmojiStyles().concepts]
        concepts = list(concepts)
        texts = zero_shot_head(clip, concepts, templates)
        texts = texts.to(torch.promote_types(texts.dtype, torch.float32))
        if not isinstance(image_mean, Tensor):
            image_mean = mean_embedding(clip, image_mean)
        metadata: dict[str, Any] = {
            "clip_model": clip.name,
            "pretrained": clip.pretrained,
            "templates": list(templates),
        }
        if (setup := clip.setup) is not None:
            metadata["setup"] = setup.to_json()
        return cls(concepts, texts, image_mean, metadata)

    def __len__(self) -> int:
        return len(self.concepts)

    def __repr__(self) -> str:
        e = self.matrix.shape[1]
        return f"ConceptDictionary({len(self)} concepts, e = {e}, {self.matrix.dtype})"

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ConceptDictionary:
        """A copy elsewhere, or in float32 or float64."""
        if dtype not in (None, torch.float32, torch.float64):
            raise TypeError(f"ConceptDictionary.to: dtype must be float32 or float64, got {dtype}")
        matrix = self.matrix.to(device=device, dtype=dtype)
        moved = object.__new__(type(self))
        moved._set(list(self.concepts), matrix, self.image_mean.to(matrix), dict(self.metadata))
        return moved

    def _rows(
        self,
        x: Tensor,  # (width,) or (B, width)
        width: int,
        what: str,
    ) -> Tensor:
        """(B, width), beside the matrix and in its dtype."""
        if x.ndim not in (1, 2) or x.shape[-1] != width:
            raise ValueError(
                f"ConceptDictionary: {what} must be ({width},) or (B, {width}), got "
                f"{tuple(x.shape)}"
            )
        return torch.atleast_2d(x.detach()).to(self.matrix)

    def align(
        self,
        embeddings: Tensor,  # (B, e), of any length
    ) -> Tensor:
        """z (B, e): norm(norm(embedding) - μ). A row equal to μ becomes 0."""
        rows = self._rows(embeddings, self.matrix.shape[1], "embeddings")
        centred = F.normalize(rows, dim=1) - self.image_mean
        return F.normalize(centred, dim=1)

    def decompose(
        self,
        embeddings: Tensor,  # (B, e) or (e,)
        l1: float | Tensor = 0.25,  # () or (B,)
        *,
        relative: bool = False,
        direction: bool = False,
        tol: float = 1e-6,
        max_iterations: int = 200,
    ) -> Decomposition:
        """Image embeddings (B, e), or one (e,), as non-negative sums of concepts.

        Args:
            embeddings: of any length.
            l1: λ, one for all or one a row.
            relative: l1 is a share in (0, 1) of 2·max_i ⟨C_i, z⟩, the λ from which on a row has no
                concept left: then every row has one at least, whatever its size. (A row that is 0,
                or orthogonal to all, has none.)
            direction: the rows are directions in embedding space (a difference of embeddings, an
                axis of a conceptor, the effect of steering), from which no mean is taken off.
            tol, max_iterations: as in `nonnegative_lasso`; see `Decomposition.converged`.

        Raises ValueError: embeddings of another width, an l1 out of range.
        """
        rows = self._rows(embeddings, self.matrix.shape[1], "embeddings")
        z = F.normalize(rows, dim=1) if direction else self.align(rows)
        if relative:
            share = torch.as_tensor(l1, dtype=z.dtype, device=z.device)
            if not bool(((share > 0) & (share < 1)).all()):
                raise ValueError(f"ConceptDictionary: a relative l1 must lie in (0, 1), got {l1!r}")
            closest = [(part @ self.matrix.T).amax(1) for part in z.split(_ROWS)]
            l1 = share * (2 * torch.cat(closest).clamp_min(0))
        return nonnegative_lasso(z, self.matrix, l1, tol=tol, max_iterations=max_iterations)

    def reconstruct(
        self,
        weights: Tensor,  # (B, n)
    ) -> Tensor:
        """Unit embeddings (B, e) of weights (B, n): where the unit sphere is met from μ in the
        direction of wC.

        It undoes `align`: where wC = z, the embedding itself comes back. The paper's code goes one
        unit from μ along norm(wC) and normalises, which gives another embedding even then. How far
        the sphere is depends on the direction: sqrt(1 - |μ|² + a²) - a, with a = norm(wC)·μ, so
        that it is more than a unit where a < -|μ|²/2. A wrong direction costs more the further one
        goes along it, and at a large l1 directions are coarse: there the paper's shorter step ends
        nearer to the image. On EmojiCLIP and the Twemoji drawings (|μ| = .33) that is 14 % of the
        rows at l1 = .25, 30 % at .5 and 36 % at 1, nearly all of them (98 %) those of more than a
        unit, and the mean cosine to the image is .854 (the paper's .853), .783 (.782) and .616
        (.615); where most directions point away from μ, the paper's mean is the higher.
        """
        summed = self._rows(weights, len(self), "weights") @ self.matrix
        ray = F.normalize(summed, dim=1)  # (B, e)
        along = ray @ self.image_mean  # (B,)
        inside = along.square() + 1 - self.image_mean.square().sum()
        length = inside.clamp_min(0).sqrt() - along
        return F.normalize(self.image_mean + length[:, None] * ray, dim=1)

    def name(
        self,
        embeddings: Tensor,  # (B, e) or (e,)
        count: int = 5,
        *,
        l1: float = 0.5,
        relative: bool = True,
        direction: bool = False,
    ) -> list[list[tuple[str, float]]]:
        """The heaviest concepts of each row's decomposition, as in `heaviest`; the arguments are
        `decompose`'s."""
        found = []
        for part in torch.atleast_2d(embeddings).split(_ROWS):
            decomposed = self.decompose(part, l1, relative=relative, direction=direction)
            found += self.heaviest(decomposed.weights, count)
        return found

    def heaviest(
        self,
        weights: Tensor,  # (B, n) or (n,)
        count: int = 5,
    ) -> list[list[tuple[str, float]]]:
        """The at most `count` heaviest concepts of each row, as (text, weight), heaviest first.

        Weights may be means over several images: what these have in common adds up.
        """
        if count < 1:
            raise ValueError(f"ConceptDictionary: count must be at least 1, got {count}")
        rows = self._rows(weights, len(self), "weights")
        values, places = rows.sort(dim=1, descending=True, stable=True)
        found = []
        for row, at in zip(values[:, :count].tolist(), places[:, :count].tolist()):
            found.append([(self.concepts[i], value) for value, i in zip(row, at) if value > 0])
        return found

    def name_groups(
        self,
        embeddings: Tensor,  # (N, e)
        groups: Sequence[Sequence[int]],
        count: int = 5,
        *,
        l1: float = 0.3,
    ) -> list[list[tuple[str, float]]]:
        """What groups of images have in common: `heaviest` of the mean weights of each, [] for an
        empty group.

        Args:
            embeddings: of images.
            groups: rows of them, such as the top images of each SAE feature.
            count: as in `heaviest`.
            l1: relative, as in `decompose`. Every row that occurs is decomposed once.
        """
        used = sorted({row for group in groups for row in group})
        place = {row: i for i, row in enumerate(used)}
        weights = self.decompose(embeddings[used], l1, relative=True).weights
        found = []
        for group in groups:
            members = weights[[place[row] for row in group]]
            # the mean of nothing is NaN, and no NaN is above 0
            found += self.heaviest(members.mean(0), count)
        return found

    def save(self, folder: str | Path) -> Path:
        """Write concepts.safetensors and concepts.json into a folder (made if missing), each in one
        atomic step."""
        tensors = {"matrix": self.matrix, "image_mean": self.image_mean}
        values = {"metadata": self.metadata, "concepts": self.concepts}
        return write_kind(folder, _KIND, tensors, values)

    @classmethod
    @door
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> ConceptDictionary:
        """Read what `save` wrote. Raises FileNotFoundError, or FileFormatError where the files do
        not fit together."""
        folder = Path(folder)
        tensors, index = read_kind(folder, _KIND, allow_nan=False)
        concepts = index.get("concepts")
        metadata = index.get("metadata")
        if not isinstance(concepts, list) or not all(isinstance(c, str) for c in concepts):
            raise FileFormatError(f"{folder / _INDEX}: concepts must be a list of texts")
        if not isinstance(metadata, dict):
            raise FileFormatError(f"{folder / _INDEX}: metadata must be an object")
        if not {"matrix", "image_mean"} <= tensors.keys():
            raise FileFormatError(f"{folder / _TENSORS}: expected matrix and image_mean")
        matrix = tensors["matrix"]
        mean = tensors["image_mean"]
        if matrix.ndim != 2 or 0 in matrix.shape or mean.shape != matrix.shape[1:]:
            raise FileFormatError(
                f"{folder / _TENSORS}: expected matrix (n, e) and image_mean (e,)"
            )
        if len(matrix) != len(concepts) or matrix.dtype not in (torch.float32, torch.float64):
            raise FileFormatError(
                f"{folder}: {len(concepts)} concepts, matrix {tuple(matrix.shape)} {matrix.dtype}"
            )
        if not bool(matrix.isfinite().all() & mean.isfinite().all()):
            raise FileFormatError(f"{folder / _TENSORS}: holds infinities")
        loaded = object.__new__(cls)
        loaded._set(concepts, matrix.to(device), mean.to(device, matrix.dtype), metadata)
        return loaded
