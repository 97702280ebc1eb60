"""CLIP's loss, as open_clip's module."""

from __future__ import annotations

from torch import Tensor

from clipsteer import ops
from clipsteer.losses.exchange import JointLoss, refuse_horovod
from clipsteer.ops._contrastive import contrast
from clipsteer.ops._dispatch import choose
from clipsteer.ops._pairs import checked_features, checked_scale


class ClipLoss(JointLoss):
    """`ops.clip_loss`, over the processes of a joint batch too.

    In place of open_clip's `ClipLoss`: the same values and gradients, in no B×B matrix. Of several
    processes each has its images against the texts of all in one product, from which both
    directions' sums are taken, and keeps O(B·d).

    Args:
        local_loss: each process returns the loss of its own pairs, among those of all, whose mean
            over the processes is the joint one; else every process returns the joint one.
        gather_with_grad: features have the gradients of what all processes return; else only those
            of their own process's loss. With it, or with neither of both, gradients averaged over
            the processes, as `DistributedDataParallel` does, are those of the joint batch, in the
            latter case over the number of processes.
        cache_labels: means nothing, as there are no labels.
        rank, world_size: of the process group.
        use_horovod: refused.
        equal_rows: every process has as many pairs in every batch, as `drop_last` gives: they are
            counted at the first batch alone, else at each.
        backend: see `ops.clip_loss`.

    Raises RuntimeError for Horovod.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        equal_rows: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(rank, world_size, equal_rows, backend)
        refuse_horovod(type(self).__name__, use_horovod)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,  # (B, d)
        text_features: Tensor,  # (B, d)
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch.

        Args:
            image_features, text_features: (B, d), as a rule of unit norm.
            logit_scale: s > 0, a number or a tensor with one element.
            logit_bias: moves no softmax; its gradient is 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            () float32 (float64 for float64 features).

        Raises:
            ValueError, TypeError: as `ops.clip_loss`; processes with unlike numbers of pairs, or
                another process group than `rank` and `world_size` say.
            RuntimeError: no process group for `world_size` > 1, or another process was waited for
                in vain.
        """
        joint = self.joint(len(image_features), self.local_loss, self.gather_with_grad)
        if joint is None:
            loss = ops.clip_loss(
                image_features, text_features, logit_scale=logit_scale, backend=self.backend
            )
        else:
            op = "ClipLoss"
            given = {"image_features": image_features, "text_features": text_features}
            named = checked_features(op, given)
            scale = checked_scale(op, "logit_scale", logit_scale, named)
            backend = choose("clip_loss", self.backend, named["image_features"])
            loss = contrast("clip_loss", (*named.values(), scale, None, 0.0), backend, joint)[0]
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            loss = loss + 0 * logit_bias.sum()  # data-parallel training wants to see it used
        return {"contrastive_loss": loss} if output_dict else loss
