"""Matryoshka SAEs against dense formulas in float64 (tests/_plain_sae.py)."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import _plain_sae as plain
from _command import run
from _tiny import drawings
from clipsteer import SAE, FileFormatError, SAESteering, TrainConfig, train_sae
from clipsteer.sae.trainer import SAETrainer
from clipsteer.training.settings import SettingError

D, N, K, PREFIXES = plain.D, plain.N, plain.K, plain.PREFIXES
NORMALIZATIONS = ("none", "layer_norm", "constant_norm")


@given(
    st.sampled_from(plain.ARCHITECTURES),
    st.sampled_from(NORMALIZATIONS),
    st.sets(st.integers(1, N - 1), max_size=5),
    st.booleans(),
    st.integers(0, 9),
)
def test_prefixes_and_all_their_gradients_are_the_dense_formula(architecture, normalize, sizes, sparse_grad, seed):
    sae = plain.make(architecture, seed, matryoshka=(*sorted(sizes), N), normalize=normalize)
    x = plain.rows(8, seed=seed).requires_grad_()
    weights = torch.randn(len(sae.matryoshka), 8, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    out = sae(x)
    codes = out.acts if out.indices is None else (out.acts, out.indices)
    x_hats = sae.decode_prefixes(codes, out.stats, sparse_grad=sparse_grad and out.indices is not None)
    (x_hats * weights).sum().backward()
    p = {name: value.detach().clone().requires_grad_() for name, value in sae.named_parameters()}
    again = x.detach().clone().requires_grad_()
    wanted = torch.stack(plain.outputs(sae, p, again)[0])
    torch.testing.assert_close(x_hats, wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(x_hats[-1], out.x_hat, rtol=1e-11, atol=1e-12)
    (wanted * weights).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-9, atol=1e-10)
    for name, value in sae.named_parameters():
        if name != "threshold":
            torch.testing.assert_close(value.grad.to_dense(), p[name].grad, rtol=1e-9, atol=1e-10)


def test_the_order_of_features_in_a_row_does_not_matter():
    """top-k codes come by size, and prefixes are of indices."""
    sae, x = plain.make(matryoshka=PREFIXES), plain.rows(8)
    acts, indices = sae.encode_topk(x)
    assert bool((indices.diff(dim=1) < 0).any())
    shuffled = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    once = sae.decode_prefixes((acts, indices))
    again = sae.decode_prefixes((acts[:, shuffled], indices[:, shuffled]))
    torch.testing.assert_close(once, again, rtol=1e-13, atol=1e-14)
    leading = sae.decode_prefixes((acts.reshape(2, 4, K), indices.reshape(2, 4, K)))
    assert torch.equal(leading, once.reshape(3, 2, 4, D))


@pytest.mark.parametrize("sparse", [True, False], ids=["row-sparse", "dense"])
@pytest.mark.parametrize("dead", [[], [0, 5, 6, 30, 35]], ids=["alive", "dead"])
@pytest.mark.parametrize("architecture", plain.ARCHITECTURES)
def test_a_steps_loss_and_gradients_are_the_dense_formula(architecture, dead, sparse, monkeypatch):
    if not sparse:
        monkeypatch.setenv("CLIPSTEER_BACKEND", "reference")
    sae, x = plain.make(architecture, matryoshka=PREFIXES), plain.rows(32)
    config = plain.config(dead_after=100, l0_coefficient=0.01, l1_coefficient=0.01)
    wanted, fvus, grads = plain.gradients(sae, x, x, config, dead)
    trainer = SAETrainer(sae, config, 12)
    assert trainer._sparse == sparse
    trainer.tokens_since_fired[dead] = 1000
    got, found = plain.stepped(trainer, x)
    assert got["loss"] == pytest.approx(wanted, rel=1e-6)
    assert [got["fvu_3"], got["fvu_11"], got["fvu"]] == pytest.approx(fvus, rel=1e-6)
    assert got["auxk"] > 0 or not dead
    for name in dict(sae.named_parameters()):
        torch.testing.assert_close(found[name], grads[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("architecture", plain.ARCHITECTURES)
def test_the_row_sparse_path_trains_as_dense_gradients_of_the_reference_do(architecture, monkeypatch):
    ends = []
    for backend in ("auto", "reference"):
        monkeypatch.setenv("CLIPSTEER_BACKEND", backend)
        sae = plain.make(architecture, matryoshka=PREFIXES)
        config = plain.config(dead_after=60, sync_every=2, grad_clip=0.3)
        trainer = SAETrainer(sae, config, 12)
        assert trainer._sparse == (backend == "auto")
        trainer.tokens_since_fired[25:] = 1000
        auxk = [trainer.step(plain.rows(32, seed=step))[trainer.metrics.index("auxk")] for step in range(8)]
        assert float(auxk[0]) > 0
        ends.append(sae.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("architecture", plain.ARCHITECTURES)
def test_a_stopped_run_resumes_bit_for_bit(architecture, tmp_path):
    config = plain.config(architecture=architecture, matryoshka=PREFIXES, dead_after=60, sync_every=3)

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 8:
            raise Stop

    whole = train_sae(plain.rows(100), config, device="cpu")
    with pytest.raises(Stop):
        train_sae(plain.rows(100), config, device="cpu", out=tmp_path, on_log=stop)
    resumed = train_sae(plain.rows(100), config, device="cpu", out=tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert all({"fvu", "fvu_3", "fvu_11"} <= record.keys() for record in records)
    loaded = SAE.from_pretrained(tmp_path)
    assert loaded.matryoshka == PREFIXES
    assert loaded.metadata["training"]["matryoshka"] == list(PREFIXES)
    # other sizes are another run
    with pytest.raises(ValueError, match="matryoshka"):
        train_sae(plain.rows(100), config, matryoshka=(4, N), device="cpu", out=tmp_path)


def test_the_sizes_name_the_number_of_features():
    sae = train_sae(plain.rows(100), matryoshka=(5, 20), k=4, batch_size=32, steps=2, warmup_steps=1, device="cpu")
    assert (sae.d_sae, sae.matryoshka) == (20, (5, 20))
    again = train_sae(plain.rows(100), sae, config=plain.config(d_sae=None, steps=2))
    assert again is sae
    assert sae.metadata["training"]["matryoshka"] == (5, 20)


@pytest.mark.parametrize("sizes", [(), (3, 3, N), (11, 3, N), (0, N), (-1, N), (3, 11), (3, N, N + 1)])
def test_sizes_that_are_none_are_refused(sizes):
    with pytest.raises(ValueError, match=f"matryoshka must ascend from above 0 to d_sae = {N}"):
        SAE(D, N, "topk", K, matryoshka=sizes)
    with pytest.raises(SettingError, match="matryoshka"):
        TrainConfig(d_sae=N, matryoshka=sizes)


@pytest.mark.parametrize("sizes", ["3,36", 36, (3.0, 36), (True, 36), [None, 36]])
def test_sizes_of_another_type_are_refused(sizes):
    with pytest.raises(TypeError, match="matryoshka must list the sizes of the prefixes as ints"):
        SAE(D, N, "topk", K, matryoshka=sizes)


def test_gated_has_no_prefixes():
    with pytest.raises(ValueError, match=r"matryoshka needs an architecture of .*'gated'"):
        SAE(D, N, "gated", matryoshka=PREFIXES)


@pytest.mark.parametrize("architecture", plain.ARCHITECTURES)
def test_files_keep_the_sizes_and_older_ones_have_none(architecture, tmp_path):
    nested, flat = (plain.make(architecture, matryoshka=sizes).eval() for sizes in (PREFIXES, None))
    if architecture == "batch_topk":
        nested.threshold.fill_(0.2)
        flat.threshold.fill_(0.2)
    nested.save_pretrained(tmp_path / "nested")
    flat.save_pretrained(tmp_path / "flat")
    loaded = SAE.from_pretrained(tmp_path / "nested")
    assert loaded.config == nested.config
    assert loaded.matryoshka == PREFIXES
    # what a version without prefixes writes, and reads
    cfg = json.loads((tmp_path / "flat" / "cfg.json").read_text())
    assert not {"matryoshka", "d_out", "skip"} & cfg.keys()
    assert SAE.from_pretrained(tmp_path / "flat").matryoshka is None
    x = plain.rows(9)
    assert torch.equal(loaded(x).x_hat, flat(x).x_hat)


@pytest.mark.parametrize("sizes", [[3, 11], [3, 2, N], "3,36", 36, [3, 36.0], [[3], 36], {"3": 36}])
def test_sizes_in_a_file_are_checked(sizes, tmp_path):
    plain.make(matryoshka=PREFIXES).save_pretrained(tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "matryoshka": sizes}))
    with pytest.raises(FileFormatError, match="matryoshka"):
        SAE.from_pretrained(tmp_path)


def test_steering_is_that_of_all_features():
    x = plain.rows(6).reshape(2, 3, D)
    nested, flat = (SAESteering(plain.make(matryoshka=sizes), {1: 3.0, 30: 0.0}) for sizes in (PREFIXES, None))
    assert torch.equal(nested.apply(x), flat.apply(x))


def test_the_command_line_trains_and_measures_every_prefix(tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--matryoshka", "24,96,384", "--k", "8", "--steps", "40", "--warmup-steps", "5", "--lr", "2e-3"]
    options += ["--batch-size", "512", "--log-every", "1"]
    data = ["--data", drawings(tmp_path / "drawings"), "--device", "cpu"]
    code, _, err = run(capsys, "sae", "train", "--out", out, *options, *data)
    assert code == 0, err
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    names = ("fvu_24", "fvu_96", "fvu")
    for name in names:
        assert records[-1][name] < 0.9 * records[0][name], name
    assert "fvu_24" in (out / "report.html").read_text(encoding="utf-8")
    figures = tmp_path / "figures.json"
    code, shown, err = run(capsys, "sae", "eval", out, "--out", figures, *data)
    assert code == 0, err
    found = json.loads(figures.read_text())
    assert 1 > found["fvu_24"] > found["fvu_96"] > found["fvu"] > 0
    assert all(f"{name:<16} {found[name]:.6g}" in shown for name in names)
    assert f"{found['ev']:.4f}" in figures.with_suffix(".html").read_text(encoding="utf-8")
    for wrong in ("96,24,384", "24,x", "24,,384", ""):
        code, _, err = run(capsys, "sae", "train", "--out", tmp_path / "no", "--matryoshka", wrong)
        assert code == 2
        assert "--matryoshka" in err
    code, _, err = run(capsys, "sae", "train", "--out", tmp_path / "no", "--matryoshka", "24,96", "--d-sae", "97")
    assert code == 2
    assert "--matryoshka must end in --d-sae = 97, got (24, 96)" in err
