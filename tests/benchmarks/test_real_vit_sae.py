"""``benchmarks.real_vit.sae`` from a file of tokens to a table and charts; the peers where they are installed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.real_vit import sae as benchmark
from benchmarks.real_vit.sae_cell import batches_of, dead, fvu, run, split
from benchmarks.real_vit.sae_libraries import LIBRARIES, Job, started
from clipsteer.sae.model import SAE

GROUP, D, N, K = 5, 8, 16, 2
JOB = Job("clipsteer", 1e-2, "linear", 30, 0, 32, D, N, K)


def tokens(pictures=100):
    """Two of sixteen directions each, and a mean."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(N, D, generator=generator)
    which = torch.rand(pictures * GROUP, N, generator=generator).argsort(1)[:, :2]
    sizes = 1 + torch.rand(pictures * GROUP, 2, generator=generator)
    return (sizes[:, :, None] * directions[which]).sum(1) + 3


@pytest.fixture
def file(tmp_path):
    save_file({"tokens": tokens()}, tmp_path / "tokens.safetensors")
    return tmp_path / "tokens.safetensors"


def test_no_picture_is_on_two_sides():
    x = torch.arange(40.0).repeat_interleave(GROUP)[:, None]
    rows = split(x, GROUP, most=7)
    sides = [set(part.flatten().tolist()) for part in rows]
    assert [len(part) for part in rows] == [32 * GROUP, 7, 7]
    assert set.union(*sides) == set(x.flatten().tolist())
    assert sum(map(len, sides)) == 40
    assert all(torch.equal(a, b) for a, b in zip(rows, split(x, GROUP, most=7)))


def test_what_is_unexplained_and_who_never_fires():
    sae = SAE(D, N, "topk", K).eval()
    x = tokens(30)
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
        sae.W_enc[3:] = 0
        sae.b_enc[3:] = -1
        values, chosen = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).topk(K)
        x_hat = sae.b_dec + (values[..., None] * sae.W_dec[chosen]).sum(1)
        expected = float((x_hat - x).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu(sae, x) == pytest.approx(expected, rel=1e-5)
    share, l0 = dead(sae, x)
    assert share == 13 / N
    assert l0 == pytest.approx(float((values > 0).sum()) / len(x))


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_library_learns_and_comes_back_as_an_sae_of_ours(library):
    pytest.importorskip(LIBRARIES[library][0])
    rows = split(tokens(), GROUP)
    job = JOB._replace(library=library)
    batches = list(batches_of(rows.train, job))
    assert len(batches) == 30
    trained = started(job, batches[0])
    before = fvu(trained.learned(), rows.test)
    trained.train(batches)
    sae = trained.learned()
    assert fvu(sae, rows.test) < 0.8 * before
    out = sae(rows.test)
    assert int((out.acts > 0).sum(1).max()) <= K


def test_a_run_that_is_kept_is_read_and_not_repeated(tmp_path, monkeypatch):
    rows = split(tokens(), GROUP)
    first = run(JOB, rows, tmp_path)
    assert [mark["steps"] for mark in first["curve"]] == [30]
    monkeypatch.setattr("benchmarks.real_vit.sae_cell.started", lambda *_: pytest.fail("run again"))
    assert run(JOB, rows, tmp_path) == first
    monkeypatch.undo()
    again = run(JOB, rows, tmp_path / "elsewhere")
    times = ("curve", "processor_seconds")
    assert {n: v for n, v in again.items() if n not in times} == {n: v for n, v in first.items() if n not in times}


def test_from_tokens_to_a_table(file, tmp_path, capsys):
    out = tmp_path / "sae.json"
    sizes = ["--group", "5", "--batch", "32", "--n", "16", "--k", "2"]
    common = ["--tokens", str(file), "--out", str(out), *sizes, "--libraries", "clipsteer", "--lr", "1e-4", "1e-2"]
    benchmark.main([*common, "--steps", "20", "--seeds", "0", "1"])
    first = json.loads(out.read_text())
    assert [(row["lr"], row["steps"], row["seeds"]) for row in first["results"]] == [(1e-2, 20, 2), (None, 20, 2)]
    kept = [json.loads(path.read_text()) for path in (tmp_path / "sae").glob("clipsteer-0.*")]
    chosen = min((r for r in kept if r["seed"] == 0), key=lambda record: record["validation"])
    assert (chosen["lr"], chosen["schedule"]) == (1e-2, first["results"][0]["schedule"])
    values = [r["test"] for r in kept if r["lr"] == 1e-2 and r["schedule"] == chosen["schedule"]]
    assert first["results"][0]["test"]["mean"] == pytest.approx(sum(values) / len(values))
    assert len(values) == 2
    # another length joins the file, the same one is read
    benchmark.main([*common, "--steps", "20", "25", "--seeds", "0", "1"])
    second = json.loads(out.read_text())
    assert second["results"][:2] == first["results"]
    assert [row["steps"] for row in second["results"]] == [20, 20, 25, 25]
    for steps in (20, 25):
        for x in ("steps", "processor_seconds"):
            assert "clipsteer, defaults" in (tmp_path / f"sae_16_{steps}_{x}.svg").read_text()
    assert "clipsteer (its default, default), 25 steps: FVU 0." in capsys.readouterr().out
