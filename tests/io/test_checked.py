"""Files that tell whether they are whole: JSON with its checksum, and layouts of tensors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from clipsteer.io.checked import check_file, file_facts, read_checked, write_checked
from clipsteer.io.checkpoint import load_latest, save_state
from clipsteer.io.files import FileFormatError
from clipsteer.io.layout import Spec, check_layout, layout_of

VALUES = {"step": 3, "rate": 0.1, "names": ["é", "\udc80x", ""], "deep": {"1": [None, True, -0.0, 1e300, 2**70]}}


def test_what_is_written_is_read_and_its_layout_does_not_matter(tmp_path):
    path = tmp_path / "a.json"
    write_checked(path, {**VALUES, "names": ["é"]})
    values, is_checked = read_checked(path, ())
    assert (values, is_checked) == ({**VALUES, "names": ["é"]}, True)
    again = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(dict(reversed(again.items()))))
    assert read_checked(path, ())[0] == values


def test_any_byte_that_changes_the_meaning_is_seen(tmp_path):
    path = tmp_path / "a.json"
    write_checked(path, {"step": 10, "bytes": 123, "sha256": "ab" * 32, "meta": {"tasks": [[1, 2]], "rate": 0.25}})
    whole = path.read_bytes()
    values = read_checked(path, ())[0]
    draw = random.Random(0)
    refused = 0
    for at in range(len(whole)):
        for byte in {draw.randrange(256) for _ in range(6)} | {whole[at] ^ 1}:
            path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            try:
                # another blank between two values is no damage
                assert read_checked(path, ("step", "bytes", "sha256", "meta"))[0] == values
            except FileFormatError as error:
                assert str(path) in str(error)  # noqa: PT017
                refused += 1
    assert refused > 4 * len(whole)


def test_one_changed_digit_of_a_checkpoints_index_falls_back_to_the_one_before(tmp_path, caplog):
    save_state(tmp_path, 1, {"x": torch.ones(2)}, {"rate": 0.5})
    index = save_state(tmp_path, 2, {"x": torch.zeros(2)}, {"rate": 0.25})
    index.write_text(index.read_text().replace("0.25", "0.75"))
    assert load_latest(tmp_path).step == 1
    assert "its checksum is of other contents" in caplog.text


def test_an_older_file_has_exactly_its_names(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1, "b": 2}')
    assert read_checked(path, ("b", "a")) == ({"a": 1, "b": 2}, False)
    for older in (("a",), ("a", "b", "c")):
        with pytest.raises(FileFormatError, match="neither a checksum nor exactly"):
            read_checked(path, older)
    for text in ("[]", "1", '{"checksum": 1}', '{"checksum": null, "a": 1}', '{"checksum": [], "a": NaN}'):
        path.write_text(text)
        with pytest.raises(FileFormatError):
            read_checked(path, ("a",))


def test_a_file_is_known_by_size_and_digest(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    facts = file_facts(path)
    check_file(path, facts)
    for other in (b"1234", b"12346", b""):
        path.write_bytes(other)
        with pytest.raises(FileFormatError, match="truncated or damaged"):
            check_file(path, facts)


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("x", torch.zeros(2, 3), None),
        ("x", torch.zeros(3, 2), r"'x' must be float32 \(2, 3\), got float32 \(3, 2\)"),
        ("x", torch.zeros(2, 3).half(), "got float16"),
        ("x", torch.full((2, 3), float("nan")), "'x' holds NaN"),
        ("x", torch.full((2, 3), float("inf")), "must be finite"),
        ("n", torch.tensor([0, 7]), None),
        ("n", torch.tensor([0, 8]), "at least 0 and at most 7, got elements from 0 to 8"),
        ("n", torch.tensor([-1, 7]), "from -1 to 7"),
        ("n", torch.tensor([0, 2**63 - 1]), "at most 7"),
        ("any", torch.full((1,), float("nan")), None),
        ("any", torch.zeros(2), r"float32 \(1,\)"),
        ("flag", torch.tensor([True, False]), None),
        ("nothing", torch.zeros(0, 4), None),
        ("more", torch.zeros(1), "'more', which belongs to nothing"),
    ],
)
def test_tensors_are_held_against_a_layout(tmp_path, name, tensor, says):
    right = {
        "x": torch.ones(2, 3), "n": torch.tensor([1, 2]), "any": torch.tensor([float("nan")]),
        "flag": torch.tensor([True, True]), "nothing": torch.zeros(0, 4),
    }  # fmt: skip
    layout = layout_of(right) | {"n": Spec(torch.int64, (2,), least=0, most=7)}
    layout["may be"] = Spec(torch.float32, (1,), optional=True)
    check_layout(tmp_path, right, layout)
    if says is None:
        check_layout(tmp_path, {**right, name: tensor}, layout)
        return
    with pytest.raises(FileFormatError, match=says) as refused:
        check_layout(tmp_path, {**right, name: tensor}, layout)
    assert str(tmp_path) in str(refused.value)


def test_what_is_missing_is_named():
    with pytest.raises(FileFormatError, match=r"where: lacks the tensor 'x', float32 \(2, 3\)"):
        check_layout(Path("where"), {}, layout_of({"x": torch.ones(2, 3)}))
