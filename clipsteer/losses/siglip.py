"""The sigmoid loss, as open_clip's module."""

from __future__ import annotations

from torch import Tensor, nn

from clipsteer import ops
from clipsteer.losses.exchange import exchange
from clipsteer.ops._contrastive import contrast
from clipsteer.ops._dispatch import choose
from clipsteer.ops._pairs import checked_features, checked_number

IMPLEMENTATIONS = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(nn.Module):
    """`ops.siglip_loss`, over the processes of a joint batch too.

    In place of open_clip's `SigLipLoss`: the same values and gradients, in no B×B matrix. Each of
    several processes returns the loss of its images among the texts of all, over the number of its
    images.

    Args:
        cache_labels: means nothing, as there are no labels.
        rank, world_size: of the process group.
        dist_impl: how open_clip's module sends texts around ("bidir", "shift", "reduce", "gather");
            all four are the same loss, which this module gathers the texts for.
        backend: see `ops.siglip_loss`.

    Raises ValueError for another `dist_impl`.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in IMPLEMENTATIONS:
            expected = f"one of {IMPLEMENTATIONS}"
            raise ValueError(f"SigLipLoss: dist_impl must be {expected}, got {dist_impl!r}")
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,  # (B, d)
        text_features: Tensor,  # (B, d)
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch.

        Args:
            image_features, text_features: (B, d), as a rule of unit norm.
            logit_scale, logit_bias: numbers, or tensors with one element; no bias is 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            () float32 (float64 for float64 features).

        Raises:
            ValueError, TypeError: as `ops.siglip_loss`; processes with unlike numbers of pairs, or
                another process group than `rank` and `world_size` say.
            RuntimeError: no process group for `world_size` > 1.
        """
        op = "SigLipLoss"
        joint = exchange(op, self.rank, self.world_size, len(image_features))
        if joint is None:
            loss = ops.siglip_loss(
                image_features,
                text_features,
                logit_scale=logit_scale,
                logit_bias=logit_bias,
                backend=self.backend,
            )
        else:
            given = {"image_features": image_features, "text_features": text_features}
            named = checked_features(op, given)
            scale = checked_number(op, "logit_scale", logit_scale, named)
            bias = 0.0 if logit_bias is None else logit_bias
            bias = checked_number(op, "logit_bias", bias, named)
            backend = choose("siglip_loss", self.backend, named["image_features"])
            loss = contrast("siglip_loss", (*named.values(), scale, bias), backend, joint)[0]
        return {"contrastive_loss": loss} if output_dict else loss
