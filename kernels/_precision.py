"""Whether float32 products may round their operands to TF32; imports no triton, so that the bounds can ask too."""

from __future__ import annotations

import torch


def tf32_allowed() -> bool:
    """What torch's settings say for matrix products on a GPU, the old one or the newer ``fp32_precision``."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch refuses to answer once the newer setting has been used
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
