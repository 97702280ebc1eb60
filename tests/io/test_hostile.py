"""Files that ask for more than they hold, and messages that are safe to print."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import clipsteer
from clipsteer import SAE, FileFormatError, wise_ft
from clipsteer.conceptors import Conceptor
from clipsteer.io import read_json, read_safetensors, read_text, read_torch_weights_only, write_json
from clipsteer.io.files import write_atomically
from clipsteer.io.messages import PrintableFormatter, printable
from clipsteer.io.weights import check_weights_file
from clipsteer.splice import ConceptDictionary


def repack(path: Path, change, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def saved(path: Path, value: object, **options: object) -> Path:
    torch.save(value, path, **options)
    return path


def one_value_for_many(folder: Path) -> Path:
    return saved(folder / "w.pt", {"a": torch.zeros(1).expand(1 << 28)})


def many_names_for_one_storage(folder: Path) -> Path:
    tensor = torch.zeros(1 << 18)
    return saved(folder / "w.pt", {f"a{i}": tensor for i in range(2000)})


def many_copies_nested_in_lists(folder: Path) -> Path:
    tensor = torch.zeros(1 << 18)
    return saved(folder / "w.pt", {"state_dict": [[tensor[:]] for _ in range(2000)]})


def unfolding(folder: Path) -> Path:
    path = saved(folder / "w.pt", {"a": torch.zeros(1 << 24)})
    repack(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    return path


def a_number_of_bytes(folder: Path) -> Path:
    """A program that makes a bytearray of any length; this one asks for a few bytes."""
    path = saved(folder / "w.pt", {"a": bytearray(b"xyz")})
    return path


def unfolding_numpy(folder: Path) -> Path:
    np.savez_compressed(folder / "w.npz", a=np.zeros(1 << 24, dtype=np.float32))
    return folder / "w.npz"


def before_archives(folder: Path) -> Path:
    value = {"a": torch.zeros(1).expand(1 << 28)}
    return saved(folder / "w.pt", value, _use_new_zipfile_serialization=False)


GROWING = [
    one_value_for_many, many_names_for_one_storage, many_copies_nested_in_lists, unfolding, a_number_of_bytes,
    unfolding_numpy, before_archives,
]  # fmt: skip


def readers(path: Path) -> list:
    found = [check_weights_file]
    if path.suffix == ".pt":
        found += [read_torch_weights_only, SAE.from_pretrained, lambda p: wise_ft(p, p)]
    return found


@pytest.mark.parametrize("make", GROWING, ids=lambda make: make.__name__)
def test_files_that_would_become_many_times_their_size(make, tmp_path):
    path = make(tmp_path)
    write_json(tmp_path / "config.json", {"d_in": 6, "d_sae": 16})
    assert path.stat().st_size < 8 << 20
    for read in readers(path):
        with pytest.raises(FileFormatError, match=path.name):
            read(path)


ODD = {
    "sparse": torch.eye(3).to_sparse(),
    "complex": torch.zeros(3, dtype=torch.complex64),
    "fp8": torch.zeros(3).to(torch.float8_e4m3fn),
    "meta": torch.empty(3, device="meta"),
    "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_no_weights(kind, tmp_path):
    path = saved(tmp_path / "w.pt", {"state_dict": {"a": ODD[kind]}})
    for read in readers(path)[:2]:
        with pytest.raises(FileFormatError, match=r"w\.pt"):
            read(path)
    with pytest.raises(FileFormatError, match=r"w\.pt"):
        wise_ft(path, path)


def test_tied_weights_and_a_checkpoint_with_its_optimiser_are_read(tmp_path):
    tied = torch.randn(50, 50)
    state = {"a": tied, "b": tied, "c": tied.T, "steps": torch.tensor(3)}
    found = read_torch_weights_only(saved(tmp_path / "w.pt", {"state_dict": state, "rng": torch.get_rng_state()}))
    assert torch.equal(found["state_dict"]["c"], tied.T)


def test_the_format_before_archives_is_read_where_it_may_be(tmp_path):
    path = saved(tmp_path / "w.pth", {"a": torch.arange(5.0)}, _use_new_zipfile_serialization=False)
    assert torch.equal(read_torch_weights_only(path, before_archives=True)["a"], torch.arange(5.0))
    with pytest.raises(FileFormatError, match="not an archive"):
        read_torch_weights_only(path)


def test_a_torchscript_archive_is_called_one(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    for read in readers(path):
        with pytest.raises(FileFormatError, match=r"TorchScript.*torch\.jit\.load\('ViT-B-32\.pt'\)\.state_dict\(\)"):
            read(path)


# JSON


@pytest.mark.parametrize(
    "text", [b"[" + b"[]," * 2_000_000 + b"0]", b"[" * 300 + b"]" * 300, b'{"a":' * 250 + b"1" + b"}" * 250]
)
def test_json_that_would_take_the_memory_or_the_stack(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(FileFormatError, match=r"a\.json: more than \d+"):
        read_json(tmp_path / "a.json")


def test_json_of_a_hundred_levels_is_read(tmp_path):
    value = 1
    for _ in range(100):
        value = [value]
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


# names


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "y/" + "x" * 5000])
@pytest.mark.parametrize("read", [read_json, read_text, read_safetensors, read_torch_weights_only])
def test_names_that_no_file_can_have(name, read, tmp_path):
    with pytest.raises(FileFormatError, match="no file can have this name"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["x" * 300, "y/" + "x" * 5000, "x" * 300 + ".safetensors"])
def test_every_door_refuses_names_that_no_file_can_have(name, tmp_path):
    doors = [clipsteer.load, lambda n: clipsteer.load("emoji-tiny", n), SAE.from_pretrained, Conceptor.load]
    doors += [ConceptDictionary.load, lambda n: wise_ft(n, n), clipsteer.clip.load_classifier]
    for door in doors:
        with pytest.raises(FileFormatError, match="no file can have this name"):
            door(str(tmp_path / name))


def test_a_text_that_is_none_names_its_file(tmp_path):
    (tmp_path / "words.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(FileFormatError, match=r"words\.txt: not text in UTF-8"):
        read_text(tmp_path / "words.txt")
    (tmp_path / "words.txt").write_bytes("\ufeffüber\n".encode())
    assert read_text(tmp_path / "words.txt") == "über\n"


def test_a_full_disk_says_which_file(tmp_path):
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.json") as caught:
        write_atomically(tmp_path / "metrics.json", full)
    assert caught.value.errno == errno.ENOSPC


# messages


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\x07b\x08c\rd", r"a\x07b\x08c\rd"),
        ("\x9b2J", r"\x9b2J"),
        ("exe\u202egpj", r"exe\u202egpj"),
        ("a\u200bb\u2028c", r"a\u200bb\u2028c"),
        ("caf\udce9", r"caf\udce9"),
        ("two\nlines\tand ü 猫 🐈", "two\nlines\tand ü 猫 🐈"),
    ],
)
def test_what_a_terminal_would_act_on_is_written_out(text, shown):
    assert printable(text) == shown
    assert str(FileFormatError(text)) == shown
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s", (text,), None)
    assert PrintableFormatter("%(message)s").format(record) == shown


def test_names_in_a_file_reach_no_terminal(tmp_path):
    bad = "\x1b]0;owned\x07"
    (tmp_path / "cfg.json").write_text(json.dumps({"format": "clipsteer-sae", "format_version": bad}))
    torch.save({bad: 1}, tmp_path / "w.pt")
    safe = {"__metadata__": {}, bad: {"dtype": bad, "shape": [1], "data_offsets": [0, 4]}}
    header = json.dumps(safe).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    calls = [
        lambda: SAE.from_pretrained(tmp_path),
        lambda: wise_ft(tmp_path / "w.pt", tmp_path / "w.pt"),
        lambda: read_safetensors(tmp_path / "w.safetensors"),
        lambda: read_json(tmp_path / bad),
    ]
    for call in calls:
        with pytest.raises((FileFormatError, FileNotFoundError)) as caught:
            call()
        assert str(caught.value).isprintable()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_files_are_checked_within_little_memory(tmp_path):
    """In a process that may take 600 MiB more than it has: the guards come before the memory."""
    lines = []
    for number, make in enumerate(GROWING):
        (tmp_path / str(number)).mkdir()
        lines.append(str(make(tmp_path / str(number))))
    code = f"""
import resource
from clipsteer import FileFormatError
from clipsteer.io.weights import check_weights_file
from clipsteer.splice import ConceptDictionary
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + (600 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in {lines!r}:
    try:
        check_weights_file(path)
    except FileFormatError as error:
        assert "alloc" not in str(error).lower(), error
    else:
        raise AssertionError(path)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
