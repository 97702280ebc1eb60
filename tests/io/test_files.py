from __future__ import annotations

import errno
import json
import os
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipsteer.io import files
from clipsteer.io.files import (
    FileFormatError,
    read_json,
    read_safetensors,
    read_safetensors_header,
    write_atomically,
    write_json,
    write_safetensors,
)
from clipsteer.io.torch_files import read_torch_weights_only

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_tensors(seed: int, shapes: list[list[int]]) -> dict[str, torch.Tensor]:
    """Random bits, so NaNs of every payload are among the floats."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, shape in enumerate(shapes):
        dtype = DTYPES[(seed + number) % len(DTYPES)]
        size = torch.Size(shape).numel()
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size * dtype.itemsize,), generator=generator)
        tensors[f"t{number}"] = raw.to(torch.uint8).view(dtype).reshape(shape)
    return tensors


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6)


@given(st.integers(0, 2**31), SHAPES, st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
def test_safetensors_round_trip_bit_for_bit_and_as_the_library_does(folder, seed, shapes, metadata):
    metadata.pop("__metadata__", None)
    tensors, path = random_tensors(seed, shapes), folder / "a.safetensors"
    write_safetensors(path, tensors, metadata)
    assert read_safetensors_header(path).metadata == metadata
    for loaded in (read_safetensors(path), safetensors.torch.load_file(path)):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape
            assert bits(loaded[name]) == bits(tensor)
    safetensors.torch.save_file(tensors, folder / "b.safetensors")
    theirs = read_safetensors(folder / "b.safetensors")
    assert {n: bits(t) for n, t in theirs.items()} == {n: bits(t) for n, t in tensors.items()}


def test_views_shared_storage_and_parameters_are_written(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.T, "row": base[1], "step": base[:, ::2], "wide": base[:1].expand(3, 6), "same": base}
    tensors["parameter"] = torch.nn.Parameter(base)
    write_safetensors(tmp_path / "a", tensors)
    loaded = read_safetensors(tmp_path / "a")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    write_safetensors(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@given(st.integers(0, 2**31), SHAPES, st.floats(0, 1), st.integers(0, 255))
def test_a_damaged_file_is_read_or_refused(folder, seed, shapes, where, byte):
    path = folder / "damaged.safetensors"
    write_safetensors(path, random_tensors(seed, shapes), {"k": "v"})
    whole = path.read_bytes()
    cut = int(where * len(whole))
    if cut < len(whole):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileFormatError):
            read_safetensors(path)
    path.write_bytes(whole + bytes([byte]))
    with pytest.raises(FileFormatError):
        read_safetensors(path)
    place = min(cut, len(whole) - 1)
    path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
    with suppress(FileFormatError):
        read_safetensors(path)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(folder, data):
    path = folder / "random"
    path.write_bytes(data)
    for header in (data, struct.pack("<Q", len(data)) + data):
        path.write_bytes(header)
        with suppress(FileFormatError):
            assert isinstance(read_safetensors(path), dict)
    with pytest.raises(FileFormatError):
        read_torch_weights_only(path)


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "overlap": {"a": entry([2], [0, 8]), "b": entry([2], [4, 12])},
    "same bytes": {"a": entry([3], [0, 12]), "b": entry([3], [0, 12])},
    "gap": {"a": entry([1], [0, 4]), "b": entry([1], [8, 12])},
    "late start": {"a": entry([2], [4, 12])},
    "shape too large": {"a": entry([1000], [0, 12])},
    "huge shape": {"a": entry([2**40, 2**40], [0, 12])},
    "overflowing shape": {"a": entry([2**61, 8, 3], [0, 12])},
    "beyond the end": {"a": entry([2**30], [0, 2**32])},
    "negative": {"a": entry([-3], [0, 12])},
    "reversed": {"a": entry([3], [12, 0])},
    "text shape": {"a": entry("3", [0, 12])},
    "boolean shape": {"a": entry([True, 3], [0, 12])},
    "float shape": {"a": entry([3.0], [0, 12])},
    "three offsets": {"a": entry([3], [0, 4, 12])},
    "many dimensions": {"a": entry([1] * 33 + [3], [0, 12])},
    "unknown dtype": {"a": entry([3], [0, 12], "F99")},
    "list dtype": {"a": entry([3], [0, 12], ["F32"])},
    "extra key": {"a": {**entry([3], [0, 12]), "more": 1}},
    "missing key": {"a": {"dtype": "F32", "shape": [3]}},
    "not an object": [1, 2],
    "not an entry": {"a": 7},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry([3], [0, 12])},
    "metadata of text": {"__metadata__": "x", "a": entry([3], [0, 12])},
    "nothing described": {},
    "duplicate": b'{"__metadata__":{"k":"v","k":"w"},"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}',
    "tensor twice": b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},'
    b'"a":{"dtype":"I32","shape":[3],"data_offsets":[0,12]}}',
    "zero and huge": {"a": entry([3], [0, 12]), "b": entry([0, 2**63], [12, 12])},
    "deep": b"[" * 100_000,
    "long number": b'{"a":' + b"9" * 10_000 + b"}",
    "not utf-8": b'{"\xff\xfe": 1}',
    "not json": b"{",
    "empty": b"",
}


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_lying_headers(tmp_path, lie):
    path = raw_file(tmp_path / "lie", LIES[lie], b"\0" * 12)
    for read in (read_safetensors, read_safetensors_header):
        with pytest.raises(FileFormatError, match=str(path)):
            read(path)


@pytest.mark.parametrize("length", [13, 100, 1 << 24, (1 << 24) + 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_huge_header_lengths(tmp_path, length):
    with pytest.raises(FileFormatError, match="header of"):
        read_safetensors(raw_file(tmp_path / "long", {}, b"\0" * 10, length))


def test_zero_sized_tensors_with_impossible_dimensions(tmp_path):
    path = raw_file(tmp_path / "zero", {"a": entry([0, 2**61, 2**61], [0, 0])})
    with pytest.raises(FileFormatError, match="cannot hold"):
        read_safetensors(path)


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path, monkeypatch):
    path, read = tmp_path / "cut", files._read_tensor
    write_safetensors(path, {"a": torch.ones(1000), "b": torch.ones(1000)})

    def cut_before_the_last(path, file, stored):
        if stored.name == "b":
            os.truncate(path, path.stat().st_size - 2000)
        return read(path, file, stored)

    monkeypatch.setattr(files, "_read_tensor", cut_before_the_last)
    with pytest.raises(FileFormatError, match=str(path)):
        read_safetensors(path)


def test_nan_policy(tmp_path):
    payload = torch.tensor([0x7FC00001, 0x7F800001, 0x3F800000], dtype=torch.int32).view(torch.float32)
    write_safetensors(tmp_path / "nan", {"w": payload, "inf": torch.tensor(float("inf"))})
    assert bits(read_safetensors(tmp_path / "nan")["w"]) == bits(payload)
    with pytest.raises(FileFormatError, match="'w' holds NaN"):
        read_safetensors(tmp_path / "nan", allow_nan=False)
    write_safetensors(tmp_path / "inf", {"inf": torch.tensor(float("inf"))})
    assert read_safetensors(tmp_path / "inf", allow_nan=False)["inf"] == float("inf")
    raw_file(tmp_path / "bool", {"b": entry([2], [0, 2], "BOOL")}, b"\x01\x02")
    with pytest.raises(FileFormatError, match="boolean"):
        read_safetensors(tmp_path / "bool")


READERS = [read_json, read_safetensors, read_safetensors_header, read_torch_weights_only]


@pytest.mark.parametrize("read", READERS)
def test_missing_files_and_what_is_no_file(tmp_path, read):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing")
    with pytest.raises(FileFormatError, match="not a regular file"):
        read(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FileFormatError, match="not a regular file"):
            read(tmp_path / "pipe")


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b'{"a": 1, "a": 2}', b"\xff", b"1" * 10_000])
def test_json_that_is_none(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(FileFormatError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_json(tmp_path):
    value = {"ü": [1, 2.5, None, True], "x": {"y": "z"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    with pytest.raises(FileFormatError, match="at most 4"):
        read_json(tmp_path / "a.json", max_bytes=4)
    for bad, error in ((float("nan"), ValueError), (object(), TypeError)):
        with pytest.raises(error):
            write_json(tmp_path / "a.json", bad)
    assert read_json(tmp_path / "a.json") == value


def test_a_folder_for_figures_is_made(tmp_path):
    """What was measured for an hour is not lost for want of one."""
    write_json(tmp_path / "no" / "such" / "a.json", {"a": 1})
    assert json.loads((tmp_path / "no" / "such" / "a.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("failure", ["in write", "at fsync", "at rename"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure):
    write_json(tmp_path / "a.json", 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(file) -> None:
        file.write(b"half")
        if failure == "in write":
            full()

    if failure != "in write":
        monkeypatch.setattr(os, "fsync" if failure == "at fsync" else "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a.json", write)
    monkeypatch.undo()
    assert read_json(tmp_path / "a.json") == 1
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX")
def test_only_what_nobody_writes_any_more_is_removed(tmp_path):
    target, other = tmp_path / "w[1].bin", "0123456789ab"
    left = tmp_path / f".{target.name}.{other}.tmp"
    strangers = [tmp_path / f".{target.name}.more.{other}.tmp", tmp_path / f".{target.name}.mine.tmp"]
    for file in (left, *strangers):
        file.write_bytes(b"half")

    def write(outer):
        outer.write(b"outer")
        # a second writer of the same file at the same time leaves the first one's alone
        write_atomically(target, lambda inner: inner.write(b"inner"))
        assert target.read_bytes() == b"inner"

    write_atomically(target, write)
    assert target.read_bytes() == b"outer"
    assert sorted(tmp_path.iterdir()) == sorted([target, *strangers])


def test_what_cannot_be_written(tmp_path):
    for tensor in (torch.zeros(2, dtype=torch.complex64), torch.zeros(2, 2).to_sparse()):
        with pytest.raises(TypeError, match="'a' is"):
            write_safetensors(tmp_path / "a", {"a": tensor})
    with pytest.raises(TypeError):
        write_safetensors(tmp_path / "a", {"__metadata__": torch.zeros(2)})
    assert not os.listdir(tmp_path)
