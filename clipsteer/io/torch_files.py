"""Files of torch.save, read through weights-only loading alone."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clipsteer.io.files import FileFormatError, open_regular


def _check_archive(path: Path) -> None:
    """torch.save archives are stored, not compressed; a compressed one could unfold to any size."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise FileFormatError(f"{path}: not an archive written by torch.save: {error}") from None
    if (
        any(m.compress_type != zipfile.ZIP_STORED for m in members)
        or sum(m.file_size for m in members) > size
    ):
        raise FileFormatError(
            f"{path}: a compressed or inconsistent archive, not one written by torch.save"
        )


def _stand_in(qualified_name: str) -> type:
    """A class that takes whatever it is given, keeps the attributes and does nothing."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self: Any, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({k: v for k, v in state.items() if isinstance(k, str)})

    module, _, name = qualified_name.rpartition(".")
    return type(
        name, (), {"__init__": __init__, "__setstate__": __setstate__, "__module__": module}
    )


def read_torch_weights_only(path: str | Path, *, stand_in_modules: Sequence[str] = ()) -> Any:
    """A foreign file of torch.save, through weights-only loading alone.

    Args:
        path: the file; only the archive format (torch ≥ 1.6), whose tensors are mapped rather than
            copied.
        stand_in_modules: packages whose classes may occur in it. Each becomes an inert stand-in
            that holds attributes; nothing of the package is imported and none of its code runs.
            Every other class is refused.
    """
    path = Path(path)
    open_regular(path)[0].close()
    _check_archive(path)
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        allowed = [n for n in unknown if n.split(".")[0] in stand_in_modules]
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in allowed]):
            # mapped: a storage that lies about its size is cut off at the end of the file
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileFormatError(f"{path}: refused by weights-only loading: {reason[0]}") from error
