"""The contrastive losses beside open_clip's."""
