"""What lies at a path, read as far as the formats that it is held against ask for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from clipsteer.io.files import FileFormatError, json_object, read_json, read_safetensors
from clipsteer.io.torch_files import read_torch_after_json, read_torch_weights_only

# packages whose configuration classes occur inside ViT-Prisma's checkpoints; they are replaced by
# inert stand-ins
_STAND_INS = ("vit_prisma", "sae", "sae_lens", "sae_training")
_SUFFIXES = (".pt", ".pth", ".safetensors")
# by which libraries name the one file of weights; else the checkpoint with the most images seen
_NAMES = ("ae.pt", "sae.pt", "weights.pt", "model.safetensors", "model.pt")


class Found:
    """A folder, or a file of weights with what is beside it.

    Each property is read once, when it is first asked for, by the guarded readers of
    ``clipsteer.io``; what is damaged raises FileFormatError there.
    """

    def __init__(self, path: Path, given: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.given = dict(given or {})  # what the user says of the file

    @cached_property
    def cfg(self) -> dict[str, Any] | None:
        """cfg.json of a folder, None where there is none."""
        path = self.path / "cfg.json"
        return json_object(path, read_json(path)) if path.is_file() else None

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """config.json beside the weights (of a folder ``checkpoints``: above it), and over it what
        the user says; None where there is neither."""
        folders = [self.folder]
        if self.folder.name == "checkpoints":
            folders.append(self.folder.parent)
        for folder in folders:
            path = folder / "config.json"
            if path.is_file():
                return json_object(path, read_json(path)) | self.given
        return self.given or None

    @cached_property
    def file(self) -> Path | None:
        """The file of weights, None where there is none."""
        if not self.path.is_dir():
            return self.path if self.path.suffix in _SUFFIXES else None
        for name in _NAMES:
            if (self.path / name).is_file():
                return self.path / name
        files = [p for p in self.path.glob("*.pt") if "log_feature_sparsity" not in p.name]
        return max(files, key=_images, default=None)

    @cached_property
    def line(self) -> tuple[dict[str, Any], Any] | None:
        """A line of JSON at the beginning of the file, and what torch.save wrote behind it."""
        if self.file is None or self.file.suffix == ".safetensors":
            return None
        found = read_torch_after_json(self.file)
        return None if found is None else (json_object(self.file, found[0]), found[1])

    @cached_property
    def value(self) -> Any:
        """What the file holds: a dictionary of tensors, or something around it."""
        if self.file is None:
            return None
        if self.file.suffix == ".safetensors":
            return read_safetensors(self.file)
        if self.line is not None:
            return self.line[1]
        return read_torch_weights_only(self.file, stand_in_modules=_STAND_INS)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file as they lie there, by name; a mapped file is not copied."""
        state = _state(self.value)
        return {n: t for n, t in state.items() if isinstance(n, str) and isinstance(t, Tensor)}

    def copies(self, *, strict: bool = True) -> dict[str, Tensor]:
        """Copies of the tensors: a file is only mapped, and two names may share one storage.

        Raises FileFormatError where other things are among them, unless it is not to be strict.
        """
        others = [name for name in _state(self.value) if name not in self.tensors]
        if strict and others:
            raise FileFormatError(f"{self.file}: {others[0]!r:.60} is no tensor")
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def lacks(self, *names: str) -> str | None:
        """Which of these tensors the file does not hold, in words; None where it holds them."""
        if self.file is None:
            return "no *.pt" if self.path.is_dir() else f"none of {', '.join(_SUFFIXES)}"
        missing = [name for name in names if name not in self.tensors]
        return f"{self.file.name} has no {' and no '.join(missing)}" if missing else None


def _state(value: Any) -> dict[Any, Any]:
    """The state dict in what a file holds."""
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    return value if isinstance(value, dict) else {}


def _images(path: Path) -> tuple[int, str]:
    number = re.search(r"n_images_(\d+)", path.name)
    return int(number[1]) if number else -1, path.name
