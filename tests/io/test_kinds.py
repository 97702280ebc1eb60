from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors
import torch

from clipsteer import SAE, ConceptDictionary, Conceptor
from clipsteer.continual.covariance import ClassStatistics
from clipsteer.io.files import FileFormatError, read_json, read_safetensors_header, write_json
from clipsteer.io.kinds import Kind, read_kind, write_kind

ONE = Kind("test-one", 3, "a test file")
TWO = Kind("test-two", 3, "a test folder", "t.safetensors", "t.json")
TENSORS = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor([True, False])}


def header(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("kind", [ONE, TWO], ids=["file", "folder"])
def test_what_is_written_comes_back(tmp_path, kind):
    path = tmp_path / "deep" / "er"
    assert write_kind(path, kind, TENSORS, {"n": [1, 0.1], "text": "x"}, texts={"note": "ü"}) == path
    found = read_kind(path, kind)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())
    if kind is ONE:
        written = {"note": "ü", "format": "test-one", "format_version": "3", "n": "[1, 0.1]", "text": "x"}
        assert found.values == header(path) == written
    else:
        assert found.values == {"format": "test-two", "format_version": 3, "n": [1, 0.1], "text": "x"}
        assert header(path / "t.safetensors") == {"note": "ü"}
        assert sorted(p.name for p in path.iterdir()) == ["t.json", "t.safetensors"]


@pytest.mark.parametrize("kind", [ONE, TWO], ids=["file", "folder"])
def test_others_are_refused(tmp_path, kind):
    path = tmp_path / "x"
    for other in (kind._replace(format="other"), kind._replace(version=4)):
        write_kind(path, other, TENSORS)
        with pytest.raises(FileFormatError, match=rf"{path}.*not {kind.what}.*format_version .?\d.?, this reads 3"):
            read_kind(path, kind)
    write_kind(path, kind, {"a": torch.tensor(math.nan)})
    assert read_kind(path, kind).tensors["a"].isnan()
    with pytest.raises(FileFormatError, match="'a' holds NaN"):
        read_kind(path, kind, allow_nan=False)
    with pytest.raises(FileNotFoundError):
        read_kind(tmp_path / "none", kind)


def test_an_index_that_is_no_object_is_refused(tmp_path):
    write_kind(tmp_path, TWO, TENSORS)
    write_json(tmp_path / "t.json", ["format"])
    with pytest.raises(FileFormatError, match=r"t\.json"):
        read_kind(tmp_path, TWO)


@pytest.mark.parametrize("kind", [ONE, TWO], ids=["file", "folder"])
def test_what_is_not_json_touches_no_file(tmp_path, kind):
    for value, error in ((math.inf, ValueError), (object(), TypeError)):
        with pytest.raises(error):
            write_kind(tmp_path / "a" / "b", kind, TENSORS, {"value": value})
    assert not list(tmp_path.iterdir())


def test_headers_are_what_they_have_always_been(tmp_path):
    """Formats on disk: what other programs and older releases look for, in its order."""
    C = Conceptor(torch.eye(2) / 2, aperture=0.37, mean=torch.zeros(2), metadata={"hook_point": "h"})
    head = read_safetensors_header(C.save(tmp_path / "c.safetensors"))
    assert list(head.metadata.items()) == [
        ("meta.hook_point", "h"),
        ("format", "clipsteer-conceptor"),
        ("format_version", "1"),
        ("rest", "0"),
        ("aperture", "0.37"),
    ]
    assert {entry.name for entry in head.entries} == {"U", "s", "mean"}
    head = read_safetensors_header(ClassStatistics(1, 2).save(tmp_path / "s.safetensors"))
    assert head.metadata == {"format": "clipsteer-class-statistics", "format_version": "1"}
    texts = torch.eye(2)
    folder = ConceptDictionary(["a", "b"], texts, torch.zeros(2), {"n": 1}).save(tmp_path / "concepts")
    assert list(read_json(folder / "concepts.json").items()) == [
        ("format", "clipsteer-concepts"),
        ("format_version", 1),
        ("metadata", {"n": 1}),
        ("concepts", ["a", "b"]),
    ]
    assert header(folder / "concepts.safetensors") is None
    sae = SAE(2, 4, k=1, architecture="topk", metadata={"hook_point": "h", "n": 1})
    cfg = read_json(sae.save_pretrained(tmp_path / "sae") / "cfg.json")
    assert list(cfg)[:2] == ["format", "format_version"]
    assert (cfg["format"], cfg["format_version"], cfg["dtype"]) == ("clipsteer-sae", 1, "float32")
    kept = header(tmp_path / "sae" / "model.safetensors")
    assert kept == {"hook_point": "h", "clipsteer_version": cfg["metadata"]["clipsteer_version"]}
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]["n"] == 1
