"""Files of torch.save: read through weights-only loading alone, and written with tensors alone."""

from __future__ import annotations

import contextlib
import mmap
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer.io.doors import door
from clipsteer.io.files import FileFormatError, open_regular, read_json_line, write_atomically

# bytes of all tensors, tied ones counted each time, for each byte of their file
_MOST = 4
_SLACK = 1 << 20
_ARCHIVE = b"PK\x03\x04"


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive. Whatever zipfile raises of a damaged one (it has no error of its own for all that
    can be wrong) becomes FileFormatError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (FileFormatError, FileNotFoundError):
        raise
    except Exception as error:
        raise FileFormatError(f"{path}: not an archive written by torch.save: {error}") from None


def _check_claims(path: Path, archive: zipfile.ZipFile, most: int) -> None:
    claimed = sum(member.file_size for member in archive.infolist())
    if claimed > most:
        raise FileFormatError(
            f"{path}: its members claim {claimed} bytes, the file has {path.stat().st_size}"
        )


def check_npz(path: str | Path) -> None:
    """Raise FileFormatError for a numpy archive that would unfold to many times its size."""
    path = Path(path)
    open_regular(path)[0].close()
    with _archive(path) as archive:
        _check_claims(path, archive, _MOST * path.stat().st_size + _SLACK)


def _check_archive(path: Path) -> None:
    """torch.save archives are stored, not compressed; a compressed one could unfold to any size."""
    with _archive(path) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        if "constants.pkl" in names:
            raise FileFormatError(
                f"{path}: a TorchScript archive, a program with its weights; write these alone: "
                f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pt')"
            )
        if any(m.compress_type != zipfile.ZIP_STORED for m in archive.infolist()):
            raise FileFormatError(f"{path}: a compressed archive, not one written by torch.save")
        _check_claims(path, archive, path.stat().st_size)
        if "data.pkl" in names:
            _check_program(path, archive.read(names["data.pkl"]))


def _check_program(path: Path, program: bytes | mmap.mmap) -> None:
    # weights-only loading makes one of any length, out of a number
    if program.find(b"\nbytearray\n") >= 0:
        raise FileFormatError(f"{path}: refused, as it holds a bytearray")


def _check_tensors(path: Path, value: Any) -> None:
    """Raise FileFormatError where a tensor in a value is not dense, has no values of its own, or
    where all take much more memory than the file has bytes."""
    size = path.stat().st_size
    total = 0
    seen: set[int] = set()
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, Tensor):
            total += _bytes_of(path, part)
            continue
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, dict):
            left += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set, frozenset)):
            left += part
        elif hasattr(part, "__dict__") and not isinstance(part, type):
            left.append(vars(part))
    if total > _MOST * size + _SLACK:
        raise FileFormatError(
            f"{path}: its tensors take {total} bytes, the file has {size}: many share one storage"
        )


def _bytes_of(path: Path, tensor: Tensor) -> int:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        what = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
        raise FileFormatError(
            f"{path}: holds a tensor {tuple(tensor.shape)} {tensor.dtype} that is {what}, where "
            "dense ones can be read"
        )
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype.itemsize < 2):
        raise FileFormatError(
            f"{path}: holds a tensor {tuple(tensor.shape)} {tensor.dtype}; weights are read in "
            "float16, bfloat16, float32 and float64"
        )
    wanted = tensor.numel() * tensor.element_size()
    there = tensor.untyped_storage().nbytes()
    if wanted > there:
        raise FileFormatError(
            f"{path}: a storage of {there} bytes under a tensor {tuple(tensor.shape)} "
            f"{tensor.dtype}, which takes {wanted}"
        )
    return wanted


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


def _starts(path: Path, sign: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(sign)) == sign


@door
def read_torch_weights_only(
    path: str | Path, *, stand_in_modules: Sequence[str] = (), before_archives: bool = False
) -> Any:
    """A foreign file of torch.save, through weights-only loading alone.

    Args:
        path: the file; the archive format (torch ≥ 1.6), whose tensors are mapped rather than
            copied.
        stand_in_modules: packages whose classes may occur in it. Each becomes an inert stand-in
            that holds attributes; nothing of the package is imported and none of its code runs.
            Every other class is refused.
        before_archives: take the format before archives, too.

    Raises:
        FileNotFoundError. FileFormatError: anything else than tensors, numbers and texts; tensors
            that are sparse, quantized or without values, or that take much more memory than the
            file; a TorchScript archive.
    """
    path = Path(path)
    open_regular(path)[0].close()
    archive = not before_archives or _starts(path, _ARCHIVE)
    if archive:
        _check_archive(path)
    elif path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            _check_program(path, whole)
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if archive else []
        allowed = [n for n in unknown if n.split(".")[0] in stand_in_modules]
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in allowed]):
            # mapped: a storage that lies about its size is cut off at the end of the file
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileFormatError(f"{path}: refused by weights-only loading: {reason[0]}") from error
    _check_tensors(path, value)
    return value


@door
def read_torch_after_json(path: str | Path) -> tuple[Any, Any] | None:
    """The line of JSON at the beginning of a file and what ``torch.save`` wrote behind it, or None
    for a file that begins otherwise. The tensors are copies.

    Raises FileNotFoundError, FileFormatError: as ``read_json`` and ``read_torch_weights_only``.
    """
    path = Path(path)
    found = read_json_line(path)
    if found is None:
        return None
    value, start = found
    # an archive is mapped from its first byte on, and only a mapped one cannot lie about its sizes
    with tempfile.TemporaryDirectory() as folder:
        rest = Path(folder) / path.name
        with path.open("rb") as source, rest.open("wb") as target:
            source.seek(start)
            shutil.copyfileobj(source, target)
        try:
            behind = read_torch_weights_only(rest)
        except FileFormatError as error:
            raise FileFormatError(str(error).replace(str(rest), str(path))) from error
        if not isinstance(behind, dict):
            raise FileFormatError(f"{path}: holds a {type(behind).__name__}, not a dictionary")
        copies = {n: t.clone() if isinstance(t, Tensor) else t for n, t in behind.items()}
        del behind
    return value, copies


def write_torch(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name as torch.save does, for libraries that read nothing else; each alone,
    not the whole storage that it may be a view of. Raises OSError."""
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    write_atomically(path, lambda file: torch.save(copies, file))
