"""The long proof benchmarks go on where an earlier run ended."""

import json
import sys

import pytest

from benchmarks.proof import __main__ as mutations
from benchmarks.proof import bounds
from benchmarks.proof.kernels import gelu


def test_bounds_keep_what_was_measured(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bounds.json"
    monkeypatch.setattr(bounds, "REGISTRY", {"semantic_drift": bounds.REGISTRY["semantic_drift"]})
    monkeypatch.setattr(sys, "argv", ["bounds", "--cases", "3", "--out", str(out)])
    bounds.main()
    first = json.loads(out.read_text())["ops"]
    assert first["semantic_drift"]["cases"] == 3
    calls = []
    measured = bounds.one
    monkeypatch.setattr(bounds, "one", lambda *given: (calls.append(given), measured(*given)))
    bounds.main()
    assert json.loads(out.read_text())["ops"] == first
    assert calls == []
    monkeypatch.setattr(sys, "argv", ["bounds", "--cases", "2", "--out", str(out)])
    bounds.main()
    assert len(calls) == 2  # of another number of cases nothing is kept


def test_mutations_keep_their_verdicts(tmp_path, monkeypatch, capsys):
    out = tmp_path / "mutations.json"
    seen = []

    def judge(kernel, fast, seed):
        seen.append((kernel.name, seed))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return len(seen) != 2

    monkeypatch.setattr(mutations, "KERNELS", (gelu,))
    monkeypatch.setattr(mutations, "JUDGES", {"prove": judge})
    monkeypatch.setattr(sys, "argv", ["mutations", "--rights", "2", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        mutations.main()
    assert not out.exists()
    mutations.main()
    results = json.loads(out.read_text())
    total = len(results["bugs"]) + 2
    assert len(seen) == total + 1  # the one that ended it was judged again
    assert results["found"]["prove"] == [results["bugs"][1]]  # as the first run said
    assert results["false_alarms"]["prove"] == []
    assert not out.with_suffix(".part").exists()
