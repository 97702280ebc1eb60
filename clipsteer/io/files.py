"""Files in and out: JSON and safetensors written atomically, readers that distrust what they read.

A reader of this module returns, or raises ``FileFormatError`` (``FileNotFoundError`` where nothing
is there); what it allocates is bounded by the size of the file. Format:
https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipsteer.io.doors import door
from clipsteer.io.locks import open_temporary, remove_abandoned
from clipsteer.io.messages import FileFormatError as FileFormatError
from clipsteer.io.messages import naming
from clipsteer.io.names import escaped, unescaped, utf8_path
from clipsteer.io.pieces import InPieces as InPieces

MAX_JSON_BYTES = 16 << 20
# of JSON: what is read takes memory in proportion, and can be copied, compared and written again
_MAX_VALUES = 1 << 20
_MAX_DEPTH = 200
_MAX_LINE = 1 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_DIMS = 32
_MAX_SIZE = 1 << 62  # of a dimension


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace ``path`` by what ``write`` puts into the open file: all of it, or none of it when
    anything fails.

    Raises OSError (a full disk, no permission); then the old file is as it was and no temporary
    file stays behind. What a killed process left is removed by the next write of the same file,
    where the system has file locks.
    """
    path = Path(path)
    remove_abandoned(path)
    temporary, file = open_temporary(path)
    try:
        with naming(path), file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        # the rename itself is on disk only once the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, in a folder that is made where there is none. Raises
    ValueError for NaN and infinity, TypeError for what JSON has not.

    Names that are not UTF-8, which Python holds with halves of pairs (surrogateescape), come back
    as they were: JSON's way to write such a half is Python's.
    """
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    data = text.encode("utf-8", "backslashreplace") + b"\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(data))


def safetensors_layout(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, list[str]]:
    """The opening bytes of a file that holds tensors of these dtypes and shapes, and the order of
    their data.

    Raises TypeError for a dtype that the format lacks, ValueError for a header above 16 MiB.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {str(key): escaped(str(value)) for key, value in metadata.items()}
    # widest elements first, then by name: every tensor is aligned and the bytes do not depend on
    # the order given
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        if dtype not in _NAMES or name == "__metadata__":
            raise TypeError(f"write_safetensors: {name!r} is {dtype}, which the format lacks")
        begin = end
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(
            f"write_safetensors: a header of {len(text)} bytes, at most {MAX_JSON_BYTES} can be "
            f"read back"
        )
    return len(text).to_bytes(8, "little") + text, order


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor of any device and layout, as they stand in a file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor | InPieces],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write dense tensors of any device and layout; they are streamed, one on the CPU at a time, or
    a piece of one.

    Raises TypeError for what the format lacks, OSError where the file cannot be written.
    """
    # safetensors 0.8 writes metadata in an order that changes from process to process, needs all
    # tensors on the CPU at once, leaves the file unsynced and readable to its owner alone
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise TypeError(
                f"write_safetensors: {name!r} is {tensor.layout} {tensor.dtype}, which the format "
                f"lacks"
            )
    head, order = safetensors_layout(
        {name: (t.dtype, t.shape) for name, t in tensors.items()}, metadata
    )

    def write(file: BinaryIO) -> None:
        file.write(head)
        for name in order:
            tensor = tensors[name]
            for piece in (tensor,) if isinstance(tensor, Tensor) else tensor.pieces():
                file.write(tensor_bytes(piece))

    write_atomically(path, write)


@door
def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """An open regular file and its size in bytes.

    Raises FileFormatError for anything else (a folder, a pipe that would block).
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise FileFormatError(f"{path}: not a regular file")
    file = path.open("rb")
    return file, os.fstat(file.fileno()).st_size


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _parse(path: Path, data: bytes) -> Any:
    # three characters of an empty list take 64 bytes of memory
    if sum(map(data.count, (b"[", b"{", b","))) > _MAX_VALUES:
        raise FileFormatError(f"{path}: more than {_MAX_VALUES} values are not read as JSON")
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not valid JSON: {error}") from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [part for whole in level for part in _parts(whole)]
    if level:
        raise FileFormatError(f"{path}: more than {_MAX_DEPTH - 1} lists and objects, nested")
    return value


def _parts(value: Any) -> Iterable[Any]:
    """What a list or an object holds."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


@door
def read_text(path: str | Path, *, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The text in a UTF-8 file of at most ``max_bytes``, without a byte order mark.

    Raises FileFormatError.
    """
    path = Path(path)
    try:
        return _content(path, max_bytes, "text").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: not text in UTF-8: {error}") from None


def _content(path: Path, max_bytes: int, what: str) -> bytes:
    file, size = open_regular(path)
    with file, naming(path):
        if size > max_bytes:
            raise FileFormatError(f"{path}: {size} bytes, at most {max_bytes} are read as {what}")
        return file.read(max_bytes)


@door
def read_json(path: str | Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file of at most ``max_bytes``.

    Raises FileFormatError, also where a name occurs twice in an object.
    """
    path = Path(path)
    return _parse(path, _content(path, max_bytes, "JSON"))


@door
def read_json_line(path: str | Path) -> tuple[Any, int] | None:
    """The value in the first line of a file that begins with "{", and where the next line begins;
    None for a file that begins otherwise, or has no end of line in its first MiB.

    Raises FileFormatError for such a line that is not JSON.
    """
    path = Path(path)
    file, _ = open_regular(path)
    with file, naming(path):
        line = file.readline(_MAX_LINE)
    if not line.startswith(b"{") or not line.endswith(b"\n"):
        return None
    return _parse(path, line), len(line)


class StoredTensor(NamedTuple):
    """Where a tensor lies in a safetensors file: bytes [begin, end) of its data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a safetensors file says about itself, checked against its size."""

    entries: tuple[StoredTensor, ...]  # in the order of their data
    metadata: dict[str, str]
    start: int  # offset of the first data byte


def _described(path: Path) -> tuple[Any, int]:
    """The header as JSON, of a bounded size and with every name once, and where the data start."""
    file, size = open_regular(path)
    with file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise FileFormatError(
                f"{path}: a header of {length} bytes in a file of {size} (limit {MAX_JSON_BYTES})"
            )
        return _parse(path, file.read(length)), 8 + length


def _stored(path: Path, name: str, entry: dict[str, Any]) -> StoredTensor:
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(
            f"{path}: tensor {name!r} needs exactly dtype, shape and data_offsets"
        )
    dtype = entry["dtype"]
    shape = entry["shape"]
    if dtype not in _DTYPES:
        raise FileFormatError(f"{path}: tensor {name!r} has unsupported dtype {dtype!r:.40}")
    if len(shape) > _MAX_DIMS or max(shape, default=0) >= _MAX_SIZE:
        raise FileFormatError(f"{path}: tensor {name!r} has an impossible shape {shape}")
    return StoredTensor(name, _DTYPES[dtype], tuple(shape), *entry["data_offsets"])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[safe_open, Header]]:
    """The file as the library opens it, and its header.

    The library checks that the offsets tile the data and fit the shapes. It takes the last of
    several equal names, keys that the format has not, and any byte as a boolean: that is refused
    here and in ``_read_tensor``.
    """
    described, start = _described(path)
    try:
        # not mapped: a file that is cut off while it is read raises, and does not kill the process
        with (
            utf8_path(path) as opened,
            safe_open(opened, framework="pt", backend="pread") as file,
        ):
            texts = described.pop("__metadata__", None) or {}
            metadata = {key: unescaped(text) for key, text in texts.items()}
            stored = [_stored(path, name, entry) for name, entry in described.items()]
            stored.sort(key=lambda tensor: (tensor.begin, tensor.end))
            yield file, Header(tuple(stored), metadata, start)
    except (SafetensorError, AttributeError, TypeError, KeyError) as error:
        # the last three where another process replaced the file between the two looks at it
        raise FileFormatError(f"{path}: {error}") from None


@door
def read_safetensors_header(path: str | Path) -> Header:
    """Names, dtypes, shapes and metadata, without the data. Raises FileFormatError."""
    with _opened(Path(path)) as (_, header):
        return header


def _read_tensor(path: Path, file: safe_open, stored: StoredTensor) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(stored.name)
    except (RuntimeError, MemoryError) as error:
        raise FileFormatError(
            f"{path}: cannot hold {stored.name!r} of shape {stored.shape}: {error}"
        ) from None
    if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise FileFormatError(
            f"{path}: {stored.name!r} is boolean but holds a byte other than 0 and 1"
        )
    return tensor


def refuse_nan(path: str | Path, tensors: Mapping[str, Tensor], *, infinity: bool = False) -> None:
    """Raise FileFormatError where a tensor of ``path`` holds NaN, and with ``infinity`` also where
    one holds that."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # unlike isnan and isfinite these take no memory
        ends = torch.stack(tensor.detach().aminmax())
        if bool(ends.isnan().any()):
            raise FileFormatError(f"{path}: {name!r} holds NaN")
        if infinity and bool(ends.isinf().any()):
            raise FileFormatError(f"{path}: {name!r} holds infinities")


@door
def read_safetensors(path: str | Path, *, allow_nan: bool = True) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, bit for bit, NaN payloads included.

    Args:
        path: the file. Its header may take 16 MiB; offsets must tile the data exactly.
        allow_nan: False refuses a file with NaN anywhere: what model weights want, and checkpoints
            do not.

    Raises FileFormatError, FileNotFoundError.
    """
    path = Path(path)
    with _opened(path) as (file, header):
        tensors = {stored.name: _read_tensor(path, file, stored) for stored in header.entries}
    if not allow_nan:
        refuse_nan(path, tensors)
    return tensors


def json_object(path: Path, value: Any) -> dict[str, Any]:
    """``value``, read from ``path``, where it is an object. Raises FileFormatError."""
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: must be a JSON object")
    return value
