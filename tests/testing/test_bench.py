"""Micro-benchmarks: intervals of ratios, and what counts as a change."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

from _command import run
from clipsteer import FileFormatError
from clipsteer.ops import REGISTRY, _dispatch
from clipsteer.testing import bench
from clipsteer.testing.table import BEGIN, END, markdown, put

ROOT = Path(__file__).resolve().parents[2]


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


def test_the_table_takes_the_best_rival_and_the_later_file(tmp_path, capsys):
    def file(name, *records, threads=1):
        machine = {"chip": "Abacus", "threads": threads, "torch": "2.14.1+cpu"}
        (tmp_path / name).write_text(json.dumps({"machine": machine, "records": records}))
        return tmp_path / name

    def timed(contender, seconds, **more):
        return record(1.0, contender=contender) | {"seconds": seconds} | more

    old = file("old.json", timed("cpp", 9.0), timed("eager", 9.0))
    new = file("new.json", timed("cpp", 0.01, floor_share=0.5), timed("eager", 0.04), timed("torch.compile", 0.03))
    assert markdown([old, new]) == (
        "Abacus, 1 thread, torch 2.14.1:\n\n"
        "| op, shape | pass | ours | best baseline | ratio | floor | of floor |\n|---|---|---|---|---|---|---|\n"
        "| **topk_encode** |  |  |  |  |  |  |\n"
        "| s | forward | 10 ms | 30 ms (torch.compile) | 3.00× | 5 ms | 50% |\n"
    )
    two = file("two.json", timed("clipsteer", 0.5), timed("clipsteer, lazy Adam", 0.25), timed("torch", 1.0),
               timed("Peer", 2.0, version="3.1"), threads=2)  # fmt: skip
    both = markdown([new, two]).partition("\nAbacus, 2 threads, torch 2.14.1:\n")[2]
    assert "| 500 ms (clipsteer) | 1,000 ms (torch) | 2.00× |  |  |\n" in both
    assert "| 250 ms (clipsteer, lazy Adam) | 1,000 ms (torch) | 4.00× |  |  |\n" in both
    assert both.endswith(
        "\n| topk_encode | s |\n|---|---|\n| clipsteer | 500 ms (1.00×) |\n| clipsteer, lazy Adam | 250 ms (0.50×) |\n"
        "| torch | 1,000 ms (2.00×) |\n| Peer 3.1 | 2,000 ms (4.00×) |\n"
    )

    page = tmp_path / "page.md"
    page.write_text("# A\n" + BEGIN + "gone\n" + END + "after\n")
    assert run(capsys, "bench", "--markdown", new, "--into", page)[0] == 0
    table = markdown([new])
    assert page.read_text() == "# A\n" + BEGIN + table + END + "after\n"
    page.write_text("# A\n")
    with pytest.raises(ValueError, match="has no lines"):
        put(page, table)
    page.write_text("[]")
    with pytest.raises(FileFormatError, match="not a file of clipsteer bench"):
        markdown([page])


def test_the_tables_of_the_benchmarks_are_those_of_the_kept_files():
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    command = re.search(r"clipsteer bench --markdown (.*?) --into benchmarks/README\.md", page, re.DOTALL)
    files = command[1].replace("\\", "").split()
    shown = page.partition(BEGIN)[2].partition(END)[0]
    assert shown == markdown([ROOT / file for file in files])


def test_what_is_written_about_measurements_can_be_read():
    """Lines of prose and of tables keep to 120 characters; what is linked or named as a file of benchmarks is there."""
    for path in (ROOT / "benchmarks/README.md", ROOT / "benchmarks/NOTES.md"):
        text = path.read_text(encoding="utf-8")
        assert [line for line in text.splitlines() if len(line) > 120] == []
        linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
        assert [name for name in linked if not (path.parent / name).exists()] == []
        scripts = re.findall(r"benchmarks/\w+\.(?:py|sh)", text)
        assert [name for name in scripts if not (ROOT / name).is_file()] == []
        modules = re.findall(r"python -m (benchmarks[.\w]*)", text)
        places = [ROOT / name.replace(".", "/") for name in modules]
        assert [p for p in places if not p.with_suffix(".py").is_file() and not (p / "__main__.py").is_file()] == []


def test_what_cannot_run_is_left_out_and_leaves_no_gradient():
    class Halfway(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError

    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    calls = {
        "whole": bench.backward(lambda: a * b, torch.ones(2), [a, b]),
        "halfway": bench.backward(lambda: Halfway.apply(b) + a.exp().exp(), torch.ones(2), [a, b]),
    }
    with pytest.warns(UserWarning, match="here: halfway is left out: NotImplementedError"):
        assert list(bench.runnable(calls, "here")) == ["whole"]
    assert a.grad is None
    assert b.grad is None


@pytest.mark.parametrize("B", [40, 20])
def test_the_check_cuts_large_sizes_in_a_case_of_its_own(monkeypatch, B):
    if _dispatch.missing("cpp"):
        pytest.skip("the C++ library is not built")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    seen, spec = [], REGISTRY["drrho_loss"]
    check = lambda few, host: seen.append(tuple(host["u"].shape)) or spec.check(few, host)
    monkeypatch.setitem(REGISTRY, "drrho_loss", dataclasses.replace(spec, gate_sizes={"B": 32}, check=check))
    records = bench.run(["drrho_loss"], ["cpp"], shape={"B": B, "d": 8, "past": 1}, repeats=1, device="cpu")
    assert seen == [(2, min(B, 32))]
    assert {r["B"] for r in records} == {B}
    assert "cpp" in {r["contender"] for r in records}
