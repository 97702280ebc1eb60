"""How the torture benchmark reads other people's outputs, and how it words verdicts."""

import pytest
import torch

from benchmarks.proof import torture as bench
from clipsteer.testing import torture


def dense(x, k, more=0):
    values, indices = torch.topk(x, min(k + more, x.shape[1]))
    return bench.from_dense(torch.zeros_like(x).scatter(-1, indices, values.relu()), k)


def test_dense_outputs_are_judged_as_what_they_hold():
    options = {"relu": True, "cases": ["random", "small integers", "rows of zeros", "NaN", "k = n"]}
    assert torture.topk(dense, **options, sizes=torture.SIZES[:3])
    report = torture.topk(lambda x, k: dense(x, k, more=1), **options, sizes=torture.SIZES[1:3])
    assert {row.prop for row in report.rows if not row.passed} >= {"random"}  # one too many
    lost = torture.topk(lambda x, k: dense(x, max(k - 1, 1)), **options, sizes=torture.SIZES[1:3])
    assert not lost


@pytest.mark.parametrize(
    ("verdicts", "word"),
    [
        (["kept", "kept"], "kept"),
        (["kept", "NOT KEPT"], "**not kept**"),
        (["not promised, kept"], "(holds)"),
        (["not promised, kept", "not promised, not kept"], "–"),
        ([], ""),
    ],
)
def test_words(verdicts, word):
    assert bench._word([{"verdict": verdict} for verdict in verdicts]) == word


def test_a_report_is_cut_to_what_says_something(monkeypatch):
    subject = bench.Subject(lambda: torch.topk, promises=bench.DOCUMENTED, sizes=((2, 65, 7),))
    monkeypatch.setitem(bench.SUBJECTS, "torch.topk", subject)
    found = bench.measure("torch.topk")
    verdicts = {row["prop"]: row for row in found["rows"]}
    assert verdicts[bench.DESCEND] == {
        "prop": bench.DESCEND, "dtype": "float32", "cases": verdicts[bench.DESCEND]["cases"], "worst": 0.0,
        "passed": True, "verdict": "kept",
    }  # fmt: skip
    assert "where" in verdicts[bench.ROW]
    text = bench.table([found, {"fast": "absent", "left_out": "it is not installed"}])
    assert f"| torch.topk | {found['version']} |" in text
    assert "| kept |" in text
    assert "- absent: left out, it is not installed." in text
