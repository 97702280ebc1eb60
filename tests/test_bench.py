"""Micro-benchmarks: intervals of ratios, and what counts as a change."""

from __future__ import annotations

import json
import math

import pytest
from _command import run

from clipsteer import FileFormatError, bench


@pytest.mark.parametrize("n", [1, 3, 5, 6, 7, 12, 31])
def test_the_interval_of_a_median_covers_what_it_says(n):
    low, high = bench.median_interval([float(v) for v in range(n)])
    cut = int(low)
    assert (low, high) == (cut, n - 1 - cut)
    # P(the median lies outside of the order statistics cut … n-1-cut) = 2 P(Binomial(n, 1/2) <= cut)
    outside = lambda c: 2 * sum(math.comb(n, i) for i in range(c + 1)) / 2**n
    assert cut == 0 or outside(cut) <= 0.05
    assert outside(cut + 1) > 0.05


def record(speedup, low=None, high=None, contender="cpp", op="topk_encode"):
    found = {"op": op, "shape": "s", "pass": "forward", "contender": contender, "baseline": "torch",
             "seconds": 1.0, "speedup": speedup}  # fmt: skip
    return found if low is None else {**found, "speedup_low": low, "speedup_high": high}


def kept(folder, *records):
    (folder / "old.json").write_text(json.dumps({"machine": bench.machine(), "records": records}))
    return folder / "old.json"


def test_a_change_is_one_that_intervals_tell_apart(tmp_path):
    old = kept(tmp_path, record(2.0, 1.9, 2.1), record(1.0, 1.0, 1.0, "torch"), record(3.0, 2.8, 3.2, op="gone"))
    for now, word in (
        (record(2.05, 2.0, 2.2), None),
        (record(2.5, 2.2, 2.6), "faster"),
        (record(1.5, 1.4, 1.8), "slower"),
    ):
        text, slower = bench.compare(old, [now, record(1.0, 1.0, 1.0, "torch"), record(9.0, 8.9, 9.1, op="new")])
        assert slower == (word == "slower")
        assert text.endswith(f"1 figures compared, {int(word is not None)} changed beyond noise")
        assert word is None or text.startswith(f"{word}: topk_encode s forward cpp: 2.00× [1.90, 2.10] then")


def test_files_without_intervals_and_of_other_machines(tmp_path):
    old = kept(tmp_path, record(2.0))
    assert bench.compare(old, [record(1.8)]) == ("1 figures compared, 0 changed beyond noise", False)
    assert bench.compare(old, [record(1.4)])[1]
    data = json.loads(old.read_text())
    data["machine"]["chip"] = "another"
    old.write_text(json.dumps(data))
    assert bench.compare(old, [record(2.0)])[0].startswith("measured on {'chip': 'another'")
    old.write_text("[]")
    with pytest.raises(FileFormatError, match="not a file of clipsteer bench"):
        bench.compare(old, [])


def test_the_command_compares_a_run_with_itself(tmp_path, capsys):
    call = ["bench", "--ops", "sparse_decode", "--shape", "B=8,d=16,n=64,k=4", "--repeats", 6]
    assert run(capsys, *call, "--out", tmp_path / "old.json")[0] == 0
    found = json.loads((tmp_path / "old.json").read_text())["records"]
    for r in found:
        assert r["speedup_low"] <= r["speedup_high"]
        if r["contender"] == r["baseline"]:
            assert r["speedup_low"] == r["speedup_high"] == r["speedup"] == 1
    # as fast as ever, and a hundred times as fast
    for r in found:
        r["speedup_low"], r["speedup_high"] = (0.0, 1e9) if r["pass"] == "forward" else (100 * r["speedup_high"],) * 2
    (tmp_path / "old.json").write_text(json.dumps({"machine": bench.machine(), "records": found}))
    code, out, _ = run(capsys, *call, "--compare", tmp_path / "old.json")
    assert code == 1
    assert "slower: sparse_decode given forward+backward" in out
    assert "given forward cpp" not in out.partition("contender")[2].partition("\n\n")[2]
