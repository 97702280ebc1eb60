"""How fast each block may learn a new task, read from the features that its sparse autoencoder
finds in the task.

    usage_b(t) = mean activation of every feature of block b in task t, over its images and tokens
    overlap_b  = the largest cosine of usage_b(t) with usage_b(s) of an earlier task s
    lr_b       = lr · (floor + (1 − floor) · overlap_b)

A block that a new task uses as an earlier one did learns at the full rate, another slowly (as the
slow learner of Zhang et al. 2023, SLCA, arXiv 2303.05118). The idea is clipsteer's own and an
experiment; ``usage`` compares tasks only when it is read from one network, the one that the
autoencoders were trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer.clip.hooks import captured, evaluating
from clipsteer.clip.module import module_of
from clipsteer.io.files import FileFormatError
from clipsteer.sae.config import TrainConfig
from clipsteer.sae.model import SAE
from clipsteer.sae.site import chunks
from clipsteer.sae.train import train_sae

__all__ = ["Plasticity", "fit_saes", "load_saes", "pack_history", "save_saes", "unpack_history"]

Usage = dict[str, Tensor]  # block -> (d_sae,)


class Plasticity:
    """Learning-rate factors of blocks from the similarity of tasks.

    Args:
        saes: block name, relative to the tower -> an SAE of that block's output, as ``fit_saes``
            gives them.
        floor: the factor of a block whose features a new task shares with no earlier one, in [0,
            1].
        background: usage by images of all kinds, subtracted from both sides of every cosine
            (negative ones count as 0). Without it features that every image uses keep all cosines
            near 1, and with them all factors.
    """

    def __init__(
        self, saes: Mapping[str, SAE], floor: float = 0.1, background: Usage | None = None
    ) -> None:
        if not saes or not all(isinstance(sae, SAE) for sae in saes.values()):
            raise ValueError("Plasticity: saes must map block names to SAEs, one at least")
        if not 0 <= floor <= 1:
            raise ValueError(f"Plasticity: floor must be in [0, 1], got {floor}")
        self.saes = dict(saes)
        self.floor = floor
        if background is not None:
            self._check("background", [background])
        nothing = {block: torch.zeros(sae.d_sae) for block, sae in saes.items()}
        self.background = background or nothing

    def usage(self, module: Any, pixel_batches: Iterable[Any]) -> Usage:
        """Mean activation (d_sae,), float64 on the CPU, of every feature of every block.

        module: the tower, or what ``clipsteer.load`` returns.
        pixel_batches: (B, 3, H, W) tensors, or tuples that begin with one.
        """
        module = module_of(module)
        total: dict[str, Tensor] = {}
        rows = dict.fromkeys(self.saes, 0)
        with evaluating(*self.saes.values()):
            for found in _outputs(module, list(self.saes), pixel_batches):
                for block, x in found.items():
                    sae = self.saes[block]
                    if x.shape[-1] != sae.d_in:
                        raise ValueError(
                            f"Plasticity.usage: the SAE of {block!r} has d_in = {sae.d_in}, but "
                            f"the activations there have {x.shape[-1]}"
                        )
                    rows[block] += len(x)
                    for part in chunks(sae, x.to(sae.W_enc.device)):
                        acts = sae.encode(part)  # (rows, d_sae)
                        total[block] = total.get(block, 0) + acts.sum(0, dtype=torch.float64).cpu()
        return {block: total[block] / rows[block] for block in self.saes}

    def overlaps(self, usage: Usage, history: Sequence[Usage]) -> dict[str, float]:
        """Largest cosine, in [0, 1], with an earlier task at each block; 1 without any.

        Raises ValueError as ``multipliers`` does.
        """
        self._check("overlaps", [usage, *history])
        if not history:
            return dict.fromkeys(self.saes, 1.0)
        overlaps = {}
        for block in self.saes:
            overlaps[block] = max(self._cosine(block, usage, old) for old in history)
        return overlaps

    def multipliers(self, usage: Usage, history: Sequence[Usage]) -> dict[str, float]:
        """The factor of each block's learning rate for a task of this usage after tasks of those;
        all 1 for the first.

        Raises ValueError for usages of other blocks or widths, or that are not finite and
        non-negative.
        """
        multipliers = {}
        for block, overlap in self.overlaps(usage, history).items():
            multipliers[block] = self.floor + (1 - self.floor) * overlap
        return multipliers

    def _cosine(self, block: str, usage: Usage, old: Usage) -> float:
        background = self.background[block].double()
        a = usage[block].double() - background
        b = old[block].double() - background
        # that of a task which uses nothing is 0
        cosine = float(F.cosine_similarity(a, b, dim=0))
        return min(max(cosine, 0.0), 1.0)

    def _check(self, name: str, usages: Sequence[Usage]) -> None:
        for usage in usages:
            for block, sae in self.saes.items():
                wanted = f"finite usage >= 0 of shape ({sae.d_sae},) at {block!r}"
                got = usage.get(block)
                if got is None:
                    raise ValueError(f"Plasticity.{name}: expected {wanted}, got none")
                usable = got.isfinite() & (got >= 0)
                if got.shape != (sae.d_sae,) or not bool(usable.all()):
                    what = f"{tuple(got.shape)}, from {got.min()} to {got.max()}"
                    raise ValueError(f"Plasticity.{name}: expected {wanted}, got {what}")


def _outputs(
    module: nn.Module, blocks: Sequence[str], pixel_batches: Iterable[Any]
) -> Iterator[dict[str, Tensor]]:
    """Outputs of blocks, (B·T, d) each, batch by batch."""
    like = next(module.parameters())
    count = 0
    for batch in pixel_batches:
        pixels = batch[0] if isinstance(batch, tuple | list) else batch
        # opened for each batch: a consumer may train between two of them
        watch = captured("plasticity", module, blocks, detach=True)
        with evaluating(module), watch as found:
            module(pixels.to(like.device, like.dtype))
        count += len(pixels)
        yield {block: found[block].flatten(0, 1) for block in blocks}
    if not count:
        raise ValueError("plasticity: pixel_batches holds no image")


def fit_saes(
    module: Any,
    blocks: Sequence[str],
    pixel_batches: Iterable[Any],
    d_sae: int,
    k: int,
    steps: int,
    seed: int = 0,
    *,
    max_rows: int = 1 << 16,
    **settings: Any,
) -> dict[str, SAE]:
    """Train a top-k SAE on each block's output, all from one pass over the images.

    Args:
        module, pixel_batches: as for ``Plasticity.usage``. blocks: names relative to ``module``.
        d_sae, k, steps, seed: of each SAE; ``sae.config.TrainConfig``.
        max_rows: tokens kept of each block, a uniform sample; up to twice as many are held in
            memory, for all blocks.
        settings: other fields of ``TrainConfig``; by default rows are layer-normalised, a batch has
            at most 1,024 and a tenth of the steps are warm-up.

    torch's own generator is neither used nor moved.
    """
    if not blocks or max_rows < 2:
        raise ValueError(
            f"fit_saes: expected blocks and max_rows of at least 2, got {list(blocks)} and "
            f"{max_rows}"
        )
    module = module_of(module)
    rows = _sample(module, blocks, pixel_batches, max_rows, seed)
    count = len(rows[blocks[0]])
    defaults = {
        "normalize": "layer_norm",
        "batch_size": min(1024, count),
        "warmup_steps": steps // 10,
    }
    named = {"d_sae": d_sae, "k": k, "steps": steps, "seed": seed}
    config = TrainConfig(**{**defaults, **named, **settings})
    device = next(module.parameters()).device
    saes = {}
    for block in blocks:
        metadata = {"hook_point": block}
        x = rows.pop(block).float()
        saes[block] = train_sae(x, config, device=device, metadata=metadata)
    return saes


def _sample(
    module: nn.Module,
    blocks: Sequence[str],
    pixel_batches: Iterable[Any],
    max_rows: int,
    seed: int,
) -> dict[str, Tensor]:
    """The same (at most max_rows, d) rows of each block's output, drawn uniformly from all.

    Each row gets a random key; those with the largest keys are kept.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces: dict[str, list[Tensor]] = {block: [] for block in blocks}
    keys: list[Tensor] = []

    def prune() -> None:
        joined = torch.cat(keys)
        kept = joined.topk(min(max_rows, len(joined))).indices.sort().values
        keys[:] = [joined[kept]]
        for block in blocks:
            pieces[block] = [torch.cat(pieces[block])[kept]]

    for found in _outputs(module, blocks, pixel_batches):
        counts = {block: len(x) for block, x in found.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"fit_saes: expected blocks that give as many tokens each, got {counts}"
            )
        keys.append(torch.rand(counts[blocks[0]], generator=generator))
        for block, x in found.items():
            pieces[block].append(x.cpu())
        if sum(map(len, keys)) >= 2 * max_rows:
            prune()
    prune()
    return {block: pieces[block][0] for block in blocks}


def save_saes(folder: str | Path, saes: Mapping[str, SAE]) -> None:
    """Write each SAE to its own folder, named after its block.

    Raises ValueError, before anything is written, for a block that is no module's name.
    """
    for block in saes:
        if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", block):
            raise ValueError(f"save_saes: not a module's name: {block!r}")
    for block, sae in saes.items():
        sae.save_pretrained(Path(folder) / block)


def load_saes(folder: str | Path, *, device: torch.device | str = "cpu") -> dict[str, SAE]:
    """What ``save_saes`` wrote, in the order of the blocks' numbers.

    Raises FileFormatError where there is nothing.
    """
    found = [path for path in Path(folder).iterdir() if (path / "cfg.json").is_file()]
    if not found:
        raise FileFormatError(f"{folder}: no folder of an SAE in here")
    found.sort(key=_by_number)
    return {path.name: SAE.from_pretrained(path, device=device) for path in found}


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sorts blocks.10 behind blocks.9, and names before numbers."""
    parts = path.name.split(".")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def pack_history(history: Sequence[Usage]) -> dict[str, Tensor]:
    """Usages of past tasks as tensors "<task>/<block>", for a checkpoint."""
    tensors = {}
    for task, usage in enumerate(history):
        for block, mean in usage.items():
            tensors[f"{task}/{block}"] = mean
    return tensors


def unpack_history(tensors: Mapping[str, Tensor]) -> list[Usage]:
    """Undo ``pack_history``. Raises ValueError for other names or a missing task."""
    history: dict[int, Usage] = {}
    for name, usage in tensors.items():
        task, _, block = name.partition("/")
        if not task.isdecimal() or not block:
            raise ValueError(f"unpack_history: expected names '<task>/<block>', got {name!r}")
        history.setdefault(int(task), {})[block] = usage
    if sorted(history) != list(range(len(history))):
        raise ValueError(
            f"unpack_history: expected tasks 0 … {len(history) - 1}, got {sorted(history)}"
        )
    return [history[task] for task in range(len(history))]
