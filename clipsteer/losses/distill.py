"""CLIP's loss beside the distillation of a teacher's softmaxes, as open_clip's module."""

from __future__ import annotations

import torch
from torch import Tensor

from clipsteer import ops
from clipsteer.losses.clip import ClipLoss
from clipsteer.ops._contrastive import contrast
from clipsteer.ops._dispatch import choose
from clipsteer.ops._pairs import checked_features, checked_scale


class DistillClipLoss(ClipLoss):
    """`ops.distill_loss`, over the processes of a joint batch too.

    In place of open_clip's `DistillClipLoss`: the same values and gradients, in no B×B matrix. Its
    arguments are `ClipLoss`'s. The teacher's features get no gradient.
    """

    def forward(  # type: ignore[override]  # open_clip's signature
        self,
        image_features: Tensor,  # (B, d)
        text_features: Tensor,  # (B, d)
        logit_scale: float | Tensor,
        dist_image_features: Tensor,  # (B, e)
        dist_text_features: Tensor,  # (B, e)
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Both losses of a batch.

        Args:
            image_features, text_features: (B, d), as a rule of unit norm.
            logit_scale: s > 0, a number or a tensor with one element.
            dist_image_features, dist_text_features: (B, e), the teacher's of the same pairs.
            dist_logit_scale: the teacher's.
            output_dict: return {"contrastive_loss": …, "distill_loss": …}.

        Returns:
            Two () float32 (float64 for float64 features): CLIP's loss, and the cross-entropy to the
            teacher's softmaxes.

        Raises:
            ValueError, TypeError: as `ops.distill_loss`; processes with unlike numbers of pairs, or
                another process group than `rank` and `world_size` say.
            RuntimeError: no process group for `world_size` > 1, or another process was waited for
                in vain.
        """
        op = "DistillClipLoss"
        joint = self.joint(len(image_features), self.local_loss, self.gather_with_grad)
        # a teacher may run in another precision than its student
        wide = torch.promote_types(image_features.dtype, dist_image_features.dtype)
        features = [image_features, text_features, dist_image_features, dist_text_features]
        features = [x.to(wide) for x in features]
        if joint is None:
            losses = ops.distill_loss(
                *features,
                logit_scale=logit_scale,
                teacher_logit_scale=dist_logit_scale,
                backend=self.backend,
            )
        else:
            names = ("image_features", "text_features", "dist_image_features", "dist_text_features")
            named = checked_features(op, dict(zip(names, features)))
            scale = checked_scale(op, "logit_scale", logit_scale, named)
            theirs = checked_scale(op, "dist_logit_scale", dist_logit_scale, named).detach()
            for name in names[2:]:
                named[name] = named[name].detach()
            backend = choose("distill_loss", self.backend, named["image_features"])
            losses = contrast("distill_loss", (*named.values(), scale, theirs), backend, joint)
        contrastive, distill = losses
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill
