"""The sigmoid loss, as open_clip's module."""

from __future__ import annotations

from torch import Tensor

from clipsteer import ops
from clipsteer.losses.exchange import Exchange, JointLoss
from clipsteer.losses.ring import KIND, Ring
from clipsteer.ops._contrastive import contrast
from clipsteer.ops._dispatch import choose
from clipsteer.ops._pairs import checked_features, checked_number

IMPLEMENTATIONS = ("bidir", "shift", "reduce", "gather")
# those of them that send to neighbours
RINGS = IMPLEMENTATIONS[:2]


class SigLipLoss(JointLoss):
    """`ops.siglip_loss`, over the processes of a joint batch too.

    In place of open_clip's `SigLipLoss`: the same values and gradients, in no B×B matrix. Each of
    several processes returns the loss of its images among the texts of all, over the number of its
    images.

    Args:
        cache_labels: means nothing, as there are no labels.
        rank, world_size: of the process group.
        dist_impl: how open_clip's module sends texts around ("bidir", "shift", "reduce", "gather");
            all four are the same loss, which this module gathers the texts for.
        ring: texts and their gradients go from neighbour to neighbour, so that no process has those
            of all at once: in halves both ways, or with "shift" one way. Gradients are added in
            another order than without.
        equal_rows: every process has as many pairs in every batch, as `drop_last` gives: they are
            counted at the first batch alone, else at each.
        backend: see `ops.siglip_loss`.

    Raises ValueError for another `dist_impl`, or one that is no ring.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        ring: bool = False,
        equal_rows: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(rank, world_size, equal_rows, backend)
        self.cache_labels = cache_labels
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in IMPLEMENTATIONS:
            expected = f"one of {IMPLEMENTATIONS}"
            raise ValueError(f"SigLipLoss: dist_impl must be {expected}, got {dist_impl!r}")
        if ring and self.dist_impl not in RINGS:
            raise ValueError(
                f"SigLipLoss: ring=True goes with dist_impl of {RINGS}, got {dist_impl!r}"
            )
        self.ring = ring

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
            RuntimeError: no process group for `world_size` > 1, or another process was waited for
                in vain.
        """
        op = "SigLipLoss"
        joint = self.joint(len(image_features), of=Ring if self.ring else Exchange)
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
            kind = "siglip_loss"
            if isinstance(joint, Ring):
                kind = KIND
                joint.both_ways = self.dist_impl == "bidir"
            loss = contrast(kind, (*named.values(), scale, bias), backend, joint)[0]
        return {"contrastive_loss": loss} if output_dict else loss
