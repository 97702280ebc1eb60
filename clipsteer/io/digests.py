"""What a thing is known by: digests of values, tensors and weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from clipsteer.io.files import tensor_bytes


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and elements, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """``tensors_digest`` of a module's state dict."""
    return tensors_digest(model.state_dict())


def described(part: Any) -> str:
    """What a part says of itself, without where it lies in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(part))


def parts_digest(part: Any) -> str:
    """Digest of tensors, modules and numbers in lists and dictionaries."""
    if isinstance(part, Tensor):
        part = part.detach().cpu().tolist()
    elif isinstance(part, nn.Module):
        part = weights_digest(part)
    elif isinstance(part, dict):
        part = {name: parts_digest(value) for name, value in part.items()}
    elif isinstance(part, list):
        part = [parts_digest(value) for value in part]
    return digest_of(part)
