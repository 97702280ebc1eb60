"""The grid of all ops: what is timed, what is not, and what its tables and its page say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re

import pytest
import torch

from _command import run
from clipsteer import FileFormatError
from clipsteer.cli.bench import grid_page
from clipsteer.ops import REGISTRY, _dispatch
from clipsteer.testing import bench, grid, grid_table
from clipsteer.testing.grid_cases import shape_at

NEEDS_CPP = pytest.mark.skipif(_dispatch.missing("cpp") is not None, reason="the C++ library is not built")
OP = "sparse_decode"


@pytest.fixture
def small(monkeypatch):
    """small(op, **changes): the op at the sizes of its smallest shape, with a spec changed in parts."""

    def change(op=OP, **changes):
        spec = dataclasses.replace(REGISTRY[op], bench_shapes={"s": REGISTRY[op].small_shape}, **changes)
        monkeypatch.setitem(REGISTRY, op, spec)
        return spec

    return change


def timed(ops=(OP,), dtypes=("float32",), rows=(2,), threads=(1,), **more):
    return grid.run(ops, dtypes, rows=rows, threads=threads, seconds=0.001, **{"compiled": False, **more})


def test_all_is_asked_for_by_default_and_sizes_fit_many_rows():
    every = grid.cells()
    assert len(every) == len(set(every)) == len(REGISTRY) * 4 * 5 * 2
    assert grid.cells([OP], ["float16"], [8, 1], [2]) == [(OP, "float16", 1, 2), (OP, "float16", 8, 2)]
    for spec in REGISTRY.values():
        for dtype, rows in itertools.product(grid.DTYPES, grid.ROWS):
            shape = shape_at(spec, rows, dtype)
            bench.check_shape(spec, shape)
            assert shape["B" if "B" in shape else "N"] == rows
            assert rows * shape.get("n", 1) <= 2**24
    # the case has all features
    assert shape_at(REGISTRY["topk_encode"], 256, "bfloat16")["n"] == 49152
    assert shape_at(REGISTRY["topk_encode"], 4096, "float16")["n"] == 1024


@pytest.mark.parametrize(
    "wrong",
    [{"ops": ["decode"]}, {"dtypes": ["int8"]}, {"rows": [0]}, {"threads": [-1]}],
)
def test_what_is_no_cell_is_refused(wrong):
    with pytest.raises(ValueError, match=r"bench: \w+ must be"):
        grid.cells(**wrong)


def test_a_record_has_the_fastest_rival_and_a_hopeless_one_ends_early(small):
    """The slow rival, in this process's time, is called at the first batch and not at larger ones."""
    fast = REGISTRY[OP].baselines["embedding_bag"]
    called = []

    def slow(**inputs):
        called.append(len(inputs["acts"]))
        for _ in range(100):
            torch.randn(10_000)
        return fast(**inputs)

    def lacks(**inputs):
        raise NotImplementedError("no such dtype")

    small(baselines={"slow": slow, "fast": fast, "lacks": lacks})
    records = timed(rows=(2, 4))
    assert [(r["rows"], r["pass"]) for r in records] == list(itertools.product((2, 4), grid.PASSES))
    for r in records:
        assert r["baseline"] == "fast"
        assert r["speedup"] == pytest.approx(r["rivals"]["fast"] / r["seconds"])
        assert r["speedup_low"] <= r["speedup_high"]
        assert r["left_out"]["lacks"] == "NotImplementedError: no such dtype"
        assert ("slow" in r["rivals"]) == (r["rows"] == 2)
        assert r["rows"] == 2 or r["left_out"]["slow"].endswith("fastest rival's time at this or fewer rows")
    assert set(called) == {2}


def test_a_stopped_grid_goes_on_where_it_was(small, tmp_path, monkeypatch):
    small()
    records = grid._records
    calls = []

    def stop_at_the_second(race, cell, seconds):
        calls.append(cell)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return records(race, cell, seconds)

    monkeypatch.setattr(grid, "_records", stop_at_the_second)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        timed(rows=(2, 3), out=tmp_path)
    assert torch.get_num_threads() == threads
    kept = json.loads((tmp_path / "grid.json").read_text())["records"]
    assert {r["rows"] for r in kept} == {2}
    found = timed(rows=(2, 3), out=tmp_path)
    assert [cell.rows for cell in calls] == [2, 3, 3]
    assert found[:2] == kept
    # what is there already is not timed again, nor lost when others are
    assert timed(rows=(3,), out=tmp_path) == found[2:]
    assert len(calls) == 3
    # however it came about, the file is in one order
    timed(rows=(1,), out=tmp_path)
    kept = json.loads((tmp_path / "grid.json").read_text())["records"]
    assert [r["rows"] for r in kept] == [1, 1, 2, 2, 3, 3]
    (tmp_path / "grid.json").write_text("[]")
    with pytest.raises(FileFormatError):
        timed(out=tmp_path)


@pytest.mark.parametrize("which", ["check", "check_grads"])
def test_no_time_is_told_of_what_is_wrong(small, tmp_path, capsys, which):
    real = getattr(REGISTRY[OP], which)
    small(**{which: lambda *args: dict.fromkeys(real(*args), 3.0)})
    call = ["bench", "--grid", "--ops", OP, "--rows", 2, "--threads", 1, "--dtypes", "float32", "--no-compile"]
    code, out, _ = run(capsys, *call, "--out", tmp_path)
    assert code == 1
    found = json.loads((tmp_path / "grid.json").read_text())["records"]
    assert len(found) == 2
    for r in found:
        assert "seconds" not in r
        assert "speedup" not in r
        assert "off by" in r["wrong"]
    assert "no cell has a ratio" in out
    assert out.count("of their bound") == 2
    page = (tmp_path / "grid.html").read_text(encoding="utf-8")
    assert page.count("of their bound") == 2


def test_one_call_that_fails_does_not_end_the_grid(small):
    def fails(**inputs):
        raise RuntimeError("broken\nhere")

    small(function=fails)
    small("ragged_decode")
    records = timed((OP, "ragged_decode"))
    assert [r.get("wrong") for r in records] == ["RuntimeError: broken", "RuntimeError: broken", None, None]


@NEEDS_CPP
@pytest.mark.parametrize("op", ["threshold_encode", "jumprelu_encode", "batch_topk_encode", "distill_loss"])
def test_rivals_whose_result_is_of_another_shape_go_back_as_well(small, op, monkeypatch):
    """Codes that a rival has as a matrix, and losses of which there are two."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    small(op)
    records = timed((op,), rows=(4,))
    assert [r["pass"] for r in records] == list(grid.PASSES)
    for r in records:
        assert set(r["rivals"]) == set(REGISTRY[op].baselines) - set(r["left_out"])
        assert not [reason for reason in r["left_out"].values() if "open_clip" not in reason]
    found = bench.run([op], ["cpp"], shape=REGISTRY[op].small_shape, repeats=1, device="cpu")
    assert {r["pass"] for r in found} == set(grid.PASSES)


def test_all_losses_and_else_the_first_output_are_gone_back_from():
    x = torch.ones(3, requires_grad=True)
    two = x.sum(), (2 * x).sum(), x.detach()
    assert bench.heads(two) == list(two[:2])
    assert bench.heads((2 * x, x.sum().detach()))[0].shape == (3,)
    assert len(bench.heads(x * 2)) == 1


def record(ratio, op="a", rows=1, **more):
    found = {"op": op, "shape": f"B{rows}", "dtype": "float32", "rows": rows, "threads": 1, "pass": "forward",
             "contender": "clipsteer", "baseline": "eager", "seconds": 0.5, "speedup": ratio,
             "speedup_low": 0.9 * ratio, "speedup_high": 1.1 * ratio}  # fmt: skip
    return found | more


WRONG = {"op": "c", "shape": "B1", "dtype": "float32", "rows": 1, "threads": 1, "pass": "forward",
         "contender": "clipsteer", "wrong": "values are off"}  # fmt: skip
ALONE = {**WRONG, "op": "d", "seconds": 1.0}
del ALONE["wrong"]
FACTS = {"chip": "Abacus <1>", "torch": "2.14.1", "date": "2026-11-30", "threads": 1}


def test_the_summary_of_a_grid():
    records = [record(4.0), record(0.95, rows=8), record(0.5, op="b"), record(2.0, op="b", rows=8), WRONG, ALONE]
    found = grid_table.summary(records)
    assert (found.ratios, found.smallest, found.certain, found.alone) == (4, 0.5, 1, 1)
    assert found.mean == pytest.approx((4 * 0.95 * 0.5 * 2) ** 0.25)
    assert [r["speedup"] for r in found.red] == [0.5, 0.95]
    assert found.wrong == (WRONG,)
    (matrix,) = grid_table.matrices(records)
    assert matrix.title == "float32, forward, 1 thread"
    assert matrix.ops == ("a", "b", "c", "d")
    assert matrix.values[:2] == ((4.0, 0.95), (0.5, 2.0))
    assert all(map(math.isnan, itertools.chain(*matrix.values[2:])))
    text = grid_table.markdown(FACTS, records)
    assert "4 ratios: smallest 0.50×, geometric mean 1.40×; 2 below 1, 1 of them with their whole interval" in text
    assert "| a | 4.00 | **0.95** |\n| b | **0.50** | 2.00 |\n" in text
    assert "| b | B1 | float32 | forward | 1 | 0.50 | 0.45 – 0.55 | 500 ms | 250 ms (eager) |" in text
    assert "| c | B1 | float32 | forward | 1 | values are off |" in text
    assert str(grid_table.summary([WRONG])) == "no cell has a ratio"


def test_the_page_of_a_grid():
    records = [record(4.0), record(0.5, rows=8), record(1.0, op="b", dtype="float64"), WRONG]
    markup = grid_page(FACTS, records).html()
    assert "Abacus &lt;1&gt;" in markup
    assert re.findall(r"stroke:(var\(--\w+\))\" fill-opacity=\"([\d.]+)\"><title>([^<]+)<", markup) == [
        ("var(--line)", "0.5", "a, 1: 4.00"),
        ("var(--fg)", "0.25", "a, 8: 0.50"),
        ("var(--line)", "0.0", "b, 1: 1.00"),
    ]
    assert grid_page(FACTS, []).html()


def test_grids_compare(tmp_path):
    """Cells of one shape in another dtype or at another number of threads are others."""
    old = [record(2.0), record(1.0, dtype="bfloat16"), record(1.0, threads=2)]
    machine = {"chip": bench.machine()["chip"], "threads": bench.machine()["threads"]}
    (tmp_path / "old.json").write_text(json.dumps({"machine": machine, "records": [*old, WRONG]}))
    now = [record(2.0), record(3.0, dtype="bfloat16"), record(0.5, threads=2)]
    text, slower = bench.compare(tmp_path / "old.json", now)
    assert slower
    assert [line.partition(":")[0] for line in text.splitlines()[:2]] == ["faster", "slower"]
    assert text.endswith("3 figures compared, 2 changed beyond noise")


@pytest.mark.parametrize(
    ("call", "said"),
    [(["--grid", "--shape", "B=8"], "--shape is not for --grid"), (["--rows", "8"], "--rows is for --grid"),
     (["--grid", "--ops", "decode"], "op must be one of"), (["--no-compile"], "--compile is for --grid")],
)  # fmt: skip
def test_options_of_the_other_kind_of_run_are_refused(capsys, call, said):
    code, _, err = run(capsys, "bench", *call)
    assert code != 0
    assert said in err
