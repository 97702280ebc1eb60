"""What a command says when something goes wrong: one line, which names the file, and the exit code."""

from __future__ import annotations

import errno
import logging
import re

import pytest
import torch
from tests._command import run

from clipsteer import SAE, FileFormatError
from clipsteer.cli import main as cli
from clipsteer.cli import ops as commands
from clipsteer.conceptors import Conceptor
from clipsteer.io.files import write_atomically
from clipsteer.ops import REGISTRY
from clipsteer.testing import bench


class Strange(Exception):
    def __str__(self) -> str:
        return "\x1b[2Jstrange\r\n\x07"


ERRORS = [
    (KeyError("x"), 1, "KeyError: 'x'"),
    (IndexError(), 1, "IndexError"),
    (AttributeError("'NoneType' object has no attribute 'x'"), 1, "AttributeError: 'NoneType'"),
    (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    (OverflowError("too large"), 1, "OverflowError: too large"),
    (RecursionError("maximum recursion depth exceeded"), 1, "maximum recursion depth exceeded"),
    (MemoryError(), 1, "MemoryError"),
    (AssertionError(), 1, "AssertionError"),
    (ImportError("No module named 'x'"), 1, "ImportError: No module named 'x'"),
    (StopIteration(), 1, "StopIteration"),
    (Strange(), 1, r"Strange: \x1b[2Jstrange \x07"),
    (FileFormatError("f.json: no\x1b[31m"), 1, r"f.json: no\x1b[31m"),
    (RuntimeError("no\nhub"), 1, "no hub"),
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "No space left on device: 'a/b'"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a"), 2, "No such file: 'a'"),
    (ValueError("k\u202e"), 2, r"k\u202e"),
    (TypeError(""), 2, "TypeError"),
]


@pytest.mark.parametrize(("error", "expected", "message"), ERRORS, ids=lambda part: type(part).__name__)
def test_no_traceback_leaves_a_command(error, expected, message, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(commands, "_env", fail)
    code, out, err = run(capsys, "env")
    assert (code, out) == (expected, "")
    assert err == f"clipsteer: error: {message} (--debug shows where)\n" or message in err
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()
    with pytest.raises(type(error)):
        cli.main(["env", "--debug"])


def test_words_of_the_call_are_written_out(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["env", "\x1b[31m"])
    assert ended.value.code == 2
    assert r"\x1b[31m" in capsys.readouterr().err


def test_log_lines_are_written_out(monkeypatch, capsys):
    def speak(args):
        logging.getLogger("clipsteer.x").warning("class %s", "\x1b]0;owned\x07")
        return 0

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(commands, "_env", speak)
    assert run(capsys, "env")[2] == "clipsteer: class \\x1b]0;owned\\x07\n"


def test_a_full_disk_names_the_file(monkeypatch, capsys, tmp_path):
    def fail(args):
        def full(_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        write_atomically(tmp_path / "metrics.json", full)

    monkeypatch.setattr(commands, "_env", fail)
    code, _, err = run(capsys, "env")
    assert code == 1
    assert "No space left on device: '" in err
    assert "metrics.json'" in err


@pytest.mark.parametrize("option", ["--markdown", "--into"])
def test_files_that_are_no_text_are_named(option, capsys, tmp_path):
    (tmp_path / "a.json").write_text('{"machine": {"chip": "c", "threads": 1}, "records": []}')
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    call = ["--markdown", tmp_path / "latin"]
    if option == "--into":
        call = ["--markdown", tmp_path / "a.json", "--into", tmp_path / "latin"]
    code, _, err = run(capsys, "bench", *call)
    assert code == 1
    assert "latin: not " in err


def test_words_that_are_no_text_are_named(capsys, tmp_path):
    SAE(192, 8, k=2, metadata={"clip_model": "emojiclip", "hook_point": "visual.ln_pre"}).save_pretrained(tmp_path)
    (tmp_path / "words.txt").write_bytes(b"caf\xe9")
    code, _, err = run(capsys, "sae", "steer", tmp_path, "--feature", "1=2", "--words", tmp_path / "words.txt")
    assert code == 1
    assert "words.txt: not text in UTF-8" in err


def test_names_that_are_shown_are_written_out(capsys, tmp_path):
    SAE(192, 8, k=2, metadata={"clip_model": "emojiclip", "hook_point": "visual.ln_pre"}).save_pretrained(tmp_path)
    (tmp_path / "words.txt").write_text("c\x1b[31mat\ndog\n")
    call = ["sae", "steer", tmp_path, "--feature", "1=2", "--words", tmp_path / "words.txt", "--count", 2]
    code, out, _ = run(capsys, *call)
    assert code == 0
    assert r"c\x1b[31mat" in out
    assert out.replace("\n", "").isprintable()


# weights that nobody named


@pytest.mark.parametrize("more", [[], ["--model", "ViT-B-32"]], ids=["as it says", "named again"])
@pytest.mark.parametrize(
    "call", [["sae", "eval"], ["sae", "steer", "--feature", "1=2"], ["conceptor", "steer"]], ids=str
)
def test_what_belongs_to_a_model_is_not_tried_on_random_weights(call, more, capsys, monkeypatch, tmp_path):
    known = {"clip_model": "ViT-B-32", "hook_point": "visual.transformer.resblocks.9"}
    SAE(8, 16, k=2, metadata=known).save_pretrained(tmp_path / "sae")
    Conceptor.fit(torch.randn(9, 8), 3.0, metadata=known).save(tmp_path / "c.safetensors")

    def load(*args, **kwargs):
        raise AssertionError("a model was made")

    monkeypatch.setattr("clipsteer.clip.model.load_origin", load)
    path = tmp_path / ("sae" if call[0] == "sae" else "c.safetensors")
    code, _, err = run(capsys, *call[:2], path, *call[2:], *more)
    assert code == 2
    assert "belongs to ViT-B-32, of which no weights are named" in err
    assert "pass --pretrained" in err


@pytest.mark.parametrize("more", [[], ["--model", "ViT-B-32"]], ids=["as it says", "named again"])
def test_the_weights_that_it_was_made_from_are_taken(more, capsys, monkeypatch, tmp_path):
    known = {"clip_model": "ViT-B-32", "pretrained": "openai", "hook_point": "visual.ln_pre"}
    SAE(8, 16, k=2, metadata=known).save_pretrained(tmp_path)
    seen = []

    def load(*args, **kwargs):
        seen.append((kwargs["model"] or "ViT-B-32", kwargs["pretrained"]))
        raise ValueError("enough")

    monkeypatch.setattr("clipsteer.clip.model.load_origin", load)
    assert run(capsys, "sae", "eval", tmp_path, *more)[0] == 2
    assert seen == [("ViT-B-32", "openai")]


# shapes of a benchmark


@pytest.mark.parametrize(
    ("op", "shape", "message"),
    [
        ("topk_encode", "B=4,d=8,n=16", r"the shape lacks k; topk_encode has the sizes B, d, n, k.*such as B="),
        ("semantic_drift", "B=4,d=8,n=16,k=2", "lacks N, C and has B, n, k; semantic_drift has the sizes N, C, d"),
        ("sparse_decode", "B=4,d=8,n=16,k=2,x=1", "has x; sparse_decode has the sizes B, d, n, k"),
        ("sparse_decode", "B=0,d=8,n=16,k=2", "sizes must be at least 1, got B=0"),
        ("sparse_decode", "B=4,d=-8,n=16,k=2", "sizes must be at least 1, got d=-8"),
    ],
)
def test_a_shape_of_other_sizes_says_which_an_op_has(op, shape, message, capsys):
    code, out, err = run(capsys, "bench", "--ops", op, "--shape", shape)
    assert (code, out) == (2, "")
    assert re.search(message, err), err


def test_a_shape_is_held_against_every_op_before_any_is_timed(monkeypatch):
    monkeypatch.setattr(bench, "ceilings", lambda *args: pytest.fail("timed"))
    with pytest.raises(ValueError, match="conceptor_project has the sizes"):
        bench.run(["topk_encode", "conceptor_project"], shape={"B": 4, "d": 8, "n": 16, "k": 2})


def test_every_shape_that_a_record_names_is_one_of_its_op():
    for spec in REGISTRY.values():
        shapes = [*spec.shapes, *spec.device_shapes, spec.small_shape, spec.repeat_shape]
        for shape in [*shapes, *spec.bench_shapes.values(), *spec.gpu_bench_shapes.values()]:
            if min(shape.values()) > 0:
                bench.check_shape(spec, shape)
