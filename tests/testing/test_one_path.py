"""``prove``, ``validate`` and the generated tests of the ops run the same properties, screened and shrunk alike."""

import torch
import torch.nn.functional as F

from clipsteer import testing
from clipsteer.ops._bounds import fraction_of_bound
from clipsteer.testing.proof import subject, trial


def test_a_property_is_written_once(monkeypatch):
    monkeypatch.setitem(trial.PROPERTIES, "layouts", lambda one: {"x": trial.Finding(9.0, " is planted")})
    report = testing.prove(torch.relu, torch.relu, testing.Cases({"input": "d"}), cases=2)
    assert [row.prop for row in report.rows if not row.passed] == ["layouts"]
    (row,) = testing.validate(["sparse_decode"], ["reference"], [torch.float32], cases=5)
    assert row.verdict == "FAIL"
    assert "layouts: x is planted" in row.where


def test_the_last_rounding_covers_all_that_a_result_may_be_off_by():
    # what was computed is 1.004, as far as admissible results may be; it is stored as 1.0078125
    value = torch.tensor([1.004]).bfloat16()
    zero = torch.zeros(1, dtype=torch.float64)
    assert value.item() == 1.0078125
    assert fraction_of_bound(value, zero, zero, 1, absolute=torch.tensor([1.004], dtype=torch.float64)) <= 1
    assert fraction_of_bound(value, zero, zero, 1, absolute=torch.tensor([0.99], dtype=torch.float64)) > 1


def test_a_layer_s_transposed_weight_is_one_of_the_layouts():
    def misread(x, w):
        return x @ (w.mT.contiguous().view(w.shape) if w.mT.is_contiguous() and min(w.shape) > 1 else w).T

    report = testing.prove(misread, lambda x, w: x @ w.T, testing.Cases({"x": "B d", "w": "n d"}), cases=20)
    assert [row.prop for row in report.rows if not row.passed] == ["layouts"]


def test_a_failing_case_shrinks_beyond_those_that_were_run():
    def tail_dropped(x):
        return torch.cat([x[..., :4], x[..., 4:] * 0], -1)

    report = testing.prove(tail_dropped, lambda x: x * 1, testing.Cases({"x": "B d"}), cases=2, seed=3)
    row = report.rows[0]
    assert not row.passed
    drawn = [testing.Cases({"x": "B d"})(torch.Generator().manual_seed(s), 1.0, False)["x"].numel() for s in (3, 4)]
    assert row.sizes in ("x (1, 5)", "x (2, 5)")
    assert min(n for n in drawn if n) > 10  # of those that were run
    cases = testing.Cases({"x": "B d"})
    again = testing.replay(
        tail_dropped, lambda x: x * 1, cases, "values", torch.float32, seed=row.seed, scale=row.scale
    )
    assert again["output"].share == row.worst


WIDE = testing.Cases({"x": "B d"}, [{"B": 48, "d": 96}])


def test_a_shape_class_is_bounded_in_full_only_at_first(monkeypatch):
    calls = []

    def counted(*given, **named):
        calls.append(1)
        return real(*given, **named)

    real = subject.bound
    monkeypatch.setattr(subject, "bound", counted)
    product = testing.Cases({"x": "B d", "w": "n d"}, [{"B": 48, "d": 96, "n": 32}])
    report = testing.prove(F.linear, lambda input, weight: input @ weight.T, _renamed(product), cases=60)
    assert report, report
    # two kinds of inputs at three scales, each twice; the rest is a handful that came near their class's least bound
    assert len(calls) <= 12 + 20
    assert sum(row.cases for row in report.rows) == 300


def _renamed(cases):
    return lambda *given: dict(zip(("input", "weight"), cases(*given).values()))


def test_a_bug_of_a_late_case_is_seen_through_the_screen():
    calls = []

    def late(x):
        calls.append(1)
        out = x.softmax(-1)
        if len(calls) > 40:
            wrong = torch.ones_like(out)
            wrong[-1, -1] += 1e-4
            out = out * wrong
        return out

    report = testing.prove(late, lambda x: x.softmax(-1), WIDE, cases=60, properties=["values"])
    assert not report
    assert "[47, 95]" in report.rows[0].where


ONCE = """
import torch
import triton.runtime.interpreter as interpreter
from clipsteer import ops
from clipsteer.testing.proof.interpreted import patched_once

def patches(x, W):
    calls = []
    real = interpreter._patch_builtin
    interpreter._patch_builtin = lambda *given: (calls.append(1), real(*given))
    out = ops.siglip_loss(x, W, logit_scale=3.0, logit_bias=-1.0, backend="triton")
    interpreter._patch_builtin = real
    return len(calls), out

g = torch.Generator().manual_seed(0)
x, W = torch.randn(40, 24, generator=g), torch.randn(40, 24, generator=g)
before, first = patches(x, W)
original = interpreter._patch_lang
with patched_once():
    after, second = patches(x, W)
assert interpreter._patch_lang is original
assert torch.equal(first, second)
assert after * 3 < before, (after, before)
"""


def test_the_interpreter_patches_its_language_once_a_launch(interpret):
    interpret(ONCE)
