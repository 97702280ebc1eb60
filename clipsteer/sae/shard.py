"""A sparse autoencoder whose features lie over several processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.sae import formats
from clipsteer.sae.encoding import Codes
from clipsteer.sae.matryoshka import decode_prefixes
from clipsteer.sae.model import SAE
from clipsteer.sae.normalization import InputStats, denormalize
from clipsteer.sae.parallel import FeatureOps, SumGradient
from clipsteer.training.spread import Spread, give_all
from clipsteer.training.world import World

# of an SAE's tensors those that are not of its features
_SHARED = ("b_dec", "W_skip")


def is_spread(name: str, tensor: Tensor) -> bool:
    """Whether a parameter or buffer of an SAE, by its name, has a row for each feature."""
    return name not in _SHARED and tensor.dim() > 0


class Shard(SAE):
    """A process's part of an SAE: of ``d_sae`` features the P-th part, in rank order.

    It encodes rows that all processes have, and decodes what all of them encoded. ``d_sae`` is the
    number of features here, ``config`` says that of all.

    Raises ValueError where the features cannot be dealt out evenly.
    """

    def __init__(self, world: World, **config: Any) -> None:
        d_sae = config.pop("d_sae")
        if d_sae % world.size:
            raise ValueError(
                f"shard_features: {d_sae} features cannot be dealt out evenly to {world.size} "
                f"processes; choose a d_sae that is a multiple of {world.size}"
            )
        whole = SAE(**{**config, "d_sae": d_sae, "device": "meta"})
        here = d_sae // world.size
        # which are those of all features
        config.update(k=None if whole.k is None else min(whole.k, here), matryoshka=None)
        self._world = world
        super().__init__(d_sae=here, **config)
        self._d_sae = d_sae
        self.k = whole.k
        self.matryoshka = whole.matryoshka
        self._ops = FeatureOps(world)

    @classmethod
    def of(cls, sae: SAE, world: World) -> Shard:
        """The part of an SAE that all processes have, copied."""
        config = {**sae.config, "dtype": sae.W_enc.dtype, "metadata": sae.metadata}
        shard = cls(world, **config, device="meta").to_empty(device=sae.W_enc.device)
        shard.load_whole(sae.state_dict())
        return shard

    @torch.no_grad()
    def load_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """This process's part of the state dict of one process."""
        for name, mine in self.state_dict().items():
            whole = tensors[name]
            if is_spread(name, mine):
                whole = whole[self._world.rank * len(mine) : (self._world.rank + 1) * len(mine)]
            mine.copy_(whole)

    @torch.no_grad()
    def gather_into(self, sae: SAE) -> SAE:
        """The whole SAE, written into one of its size in every process."""
        mine = self.state_dict()
        for name, whole in sae.state_dict().items():
            part = mine[name]
            whole.copy_(self._world.gather(part) if is_spread(name, part) else part)
        return sae

    def whole(self) -> SAE:
        """The whole SAE, in every process."""
        like = SAE(**self.config, dtype=self.W_enc.dtype, device="meta", metadata=self.metadata)
        return self.gather_into(like.to_empty(device=self.W_enc.device))

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that rebuild the whole."""
        return {**super().config, "d_sae": self._d_sae}

    def _draw_(self, weight: Tensor, bound: float) -> None:
        # what one process draws, of which the others' rows are passed over
        for rank in range(self._world.size):
            drawn = weight if rank == 0 else torch.empty_like(weight)
            drawn.uniform_(-bound, bound)
            if rank == self._world.rank:
                mine = drawn.clone() if rank == 0 else drawn
        weight.copy_(mine)

    def _centred(self, x: Tensor) -> tuple[Tensor, InputStats]:
        x, stats = self.normalize_input(x)
        if self.apply_b_dec_to_input:
            x = x - SumGradient.apply(self.b_dec, self._world)
        return x, stats

    def _least(self, acts: Tensor) -> Tensor:
        return self._world.min_(super()._least(acts))

    def decode(
        self,
        acts: Codes,
        stats: InputStats | None = None,
        *,
        sparse_grad: bool = False,
        frozen: bool = False,
    ) -> Tensor:
        """As ``SAE.decode``, of the codes that each process has of its features."""
        if isinstance(acts, tuple):
            return super().decode(acts, stats, sparse_grad=sparse_grad, frozen=frozen)
        W_dec = self.W_dec.detach() if frozen else self.W_dec
        b_dec = self.b_dec.detach() if frozen else self.b_dec
        x_hat = self._ops.summed(F.linear(acts.to(W_dec.dtype), W_dec.T), b_dec)
        return x_hat if stats is None else denormalize(x_hat, stats)

    def decode_prefixes(
        self,
        acts: Codes,
        stats: InputStats | None = None,
        *,
        sparse_grad: bool = False,
    ) -> Tensor:
        """As ``SAE.decode_prefixes``, of the codes that each process has of its features."""
        if self.matryoshka is None:
            return super().decode_prefixes(acts, stats, sparse_grad=sparse_grad)
        first = self._world.rank * self.d_sae
        # how much of each prefix is here
        limits = [min(max(size - first, 0), self.d_sae) for size in self.matryoshka]
        there = sorted({limit for limit in limits if limit})
        none = torch.zeros_like(self.b_dec)
        parts = decode_prefixes(acts, self.W_dec, none, there, sparse_grad)
        parts = torch.cat([torch.zeros_like(parts[:1]), parts])
        x_hats = self._ops.summed(parts[[there.index(n) + 1 if n else 0 for n in limits]])
        x_hats = x_hats + self.b_dec
        return x_hats if stats is None else denormalize(x_hats, stats)

    def spread_state(self) -> dict[str, Tensor | Spread]:
        """The state dict of the whole, to be written."""
        return {
            name: Spread(value, self._world) if is_spread(name, value) else value
            for name, value in self.state_dict().items()
        }

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write the files of one process; to be called in all of them.

        Raises as ``SAE.save_pretrained``, in every process.
        """
        error = None
        try:
            found = formats.checked(self)
        except ValueError as caught:
            error = caught
        failed = self._world.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise ValueError("SAE: the part of another process holds NaN or infinities")
        weights = self.spread_state()
        if self._world.rank == 0:
            formats.write(found._replace(weights=weights), directory)
        else:
            give_all(weights)
        return Path(directory)
