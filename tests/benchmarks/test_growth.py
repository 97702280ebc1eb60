"""Growth: exponents, and a small run that goes on where it was."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import growth


def rows_of(power, sizes=(1, 2, 4, 8), rounds=3, noise=0.01):
    """Times that grow with a power, every other round a little steeper."""
    made = []
    for number in range(rounds):
        slope = power + noise * (number % 2)
        made += [{"size": n, "round": number, "seconds": 0.1 * n**slope, "bytes": 100 + n} for n in sizes]
    return made


def test_exponents_and_jumps():
    found = growth.exponents(rows_of(1.0), "seconds")
    assert found["all"]["mean"] == pytest.approx(1.0 + 0.01 / 3)
    assert found["all"]["low"] < 1.0 < found["all"]["high"]
    assert found["jumps"] == []
    rows = rows_of(1.0)
    for row in rows:
        row["seconds"] *= 3 if row["size"] == 8 else 1
    found = growth.exponents(rows, "seconds")
    ((steep, low, high),) = found["jumps"]
    assert (low, high) == (4, 8)
    assert steep == pytest.approx(1 + torch.log2(torch.tensor(3.0)).item(), abs=0.02)
    assert found["upper"]["mean"] == pytest.approx(steep, abs=0.02)
    # a size that was left out in some round counts in none of the slopes that need it
    rows += [{"size": 16, "round": 0, "left_out": "needs 9 GiB"}]
    assert growth.exponents(rows, "seconds")["all"] == found["all"]


def test_what_grows_too_fast_is_named():
    rows = [{**row, "along": "B", "what": "decode", "data": "real"} for row in rows_of(1.2, noise=0.0)]
    said = list(growth.too_steep(rows))
    assert said[0].startswith("Above 1.05: decode, real, time over B, all sizes: 1.20")
    assert len(said) == 2
    for row in rows:
        row["seconds"] = row["size"] ** 0.9 * (2 if row["size"] > 2 else 1)
    assert "A jump: decode, real, time over B, 2 → 4: 1.90." in list(growth.too_steep(rows))
    assert not list(growth.too_steep([{**row, "seconds": row["size"] ** 0.5} for row in rows]))


@pytest.mark.parametrize("tokens", [None, torch.randn(500, growth.D) * torch.arange(1, growth.D + 1)])
def test_dictionaries_have_unit_rows_and_begin_alike(tokens):
    source = growth.Source(tokens)
    W = source.dictionary(300)
    assert torch.allclose(torch.linalg.vector_norm(W, dim=1), torch.ones(300), atol=1e-5)
    assert torch.equal(source.rows(8), source.rows(8))
    assert not torch.equal(W[0], W[1])


def test_a_small_run_and_its_continuation(tmp_path, monkeypatch, capsys):
    call = ["--features", "64", "128", "256", "512", "--rows", "1", "2", "4", "8", "--rounds", "2", "--out",
            str(tmp_path)]  # fmt: skip
    monkeypatch.setattr(growth, "FIXED", {"n": {"B": 4}, "B": {"n": 64}})
    monkeypatch.setattr(growth, "processor_time", lambda call: call() is None or 0.5)
    whole = growth.available
    monkeypatch.setattr(growth, "needed", lambda what, n, B: 2 * whole() if n == 512 else 0)
    growth.main([*call, "--whats", "decode", "step"])
    capsys.readouterr()
    found = json.loads((tmp_path / "growth.json").read_text())
    assert len(found["rows"]) == 2 * 2 * 2 * 4
    assert all(("left_out" in row) == (row["along"] == "n" and row["size"] == 512) for row in found["rows"])
    assert all(row["bytes"] > 0 for row in found["rows"] if "seconds" in row)
    growth.main([*call, "--whats", "decode", "encode"])
    more = json.loads((tmp_path / "growth.json").read_text())
    assert more["rows"][: len(found["rows"])] == found["rows"]
    assert {row["what"] for row in more["rows"][len(found["rows"]) :]} == {"encode"}
    text = (tmp_path / "growth.md").read_text()
    assert "| decode | Gaussian | B, 1 – 8 | 0.00" in text
    assert "Left out: step at n = 512, which needs" in text
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        f"{figure}_{along}.svg" for figure in ("seconds", "bytes") for along in "nB"
    }


def test_threads_are_compared_by_wall_time(monkeypatch):
    seen = []
    row = growth.thread_row(lambda: seen.append(torch.get_num_threads()) or torch.randn(30_000), 2)
    assert set(seen) == {1, 2}
    assert row["low"] <= row["faster"] <= row["high"]
    torch.set_num_threads(1)
