"""Tensors and settings of other libraries' SAEs that change what comes out: applied, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipsteer import SAE, FileFormatError
from clipsteer.io.files import write_json, write_safetensors

D, N = 6, 16


def saelens5(
    folder: Path, extra: dict[str, Tensor], *, architecture: str = "standard", **cfg: object
) -> dict[str, Tensor]:
    """The folder that SAELens 5 writes; returns its weights."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,)}
    if architecture == "gated":
        del shapes["b_enc"]
        shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag"), (N,))
    elif architecture == "jumprelu":
        shapes["threshold"] = (N,)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    write_safetensors(folder / "sae_weights.safetensors", {**weights, **extra})
    known = {
        "architecture": architecture, "d_in": D, "d_sae": N, "activation_fn_str": "relu", "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True, "normalize_activations": "none", "finetuning_scaling_factor": False,
        "model_name": "gpt2-small", "hook_name": "blocks.2.hook_resid_post", "sae_lens_training_version": "5.11.0",
    }  # fmt: skip
    write_json(folder / "cfg.json", {**known, **cfg})
    return weights


def factors() -> Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(9)) * 3 + 0.2


def decoded(weights: dict[str, Tensor], x: Tensor, factor: Tensor, architecture: str) -> Tensor:
    """SAELens 5's encode and decode of this architecture, in float64: the factors scale what is decoded."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    pre = (x.double() - w["b_dec"]) @ w["W_enc"]
    if architecture == "gated":
        acts = (pre + w["b_gate"] > 0) * (pre * w["r_mag"].exp() + w["b_mag"]).relu()
    else:
        pre = pre + w["b_enc"]
        acts = pre.relu() * (pre > w["threshold"]) if architecture == "jumprelu" else pre.relu()
    return (acts * factor.double()) @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("name", ["finetuning_scaling_factor", "scaling_factor"])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_factors_of_a_fine_tuned_sae_are_applied(name, architecture, tmp_path):
    factor = factors()
    weights = saelens5(tmp_path, {name: factor}, architecture=architecture, finetuning_scaling_factor=True)
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    sae = SAE.from_pretrained(tmp_path)
    expected = decoded(weights, x, factor, architecture)
    torch.testing.assert_close(sae(x).x_hat.double(), expected, rtol=1e-4, atol=1e-4)
    assert (decoded(weights, x, torch.ones(N), architecture) - expected).abs().max() > 1
    # the activations are those of the encoder
    assert torch.equal(sae.encode(x), SAE.from_pretrained(without(tmp_path, name)).encode(x))


def without(folder: Path, name: str) -> Path:
    from clipsteer.io.files import read_safetensors

    tensors = read_safetensors(folder / "sae_weights.safetensors")
    del tensors[name]
    write_safetensors(folder / "sae_weights.safetensors", tensors)
    return folder


@pytest.mark.parametrize(
    ("extra", "cfg", "message"),
    [
        ({"finetuning_scaling_factor": factors()}, {}, "does not say finetuning_scaling_factor"),
        ({"scaling_factor": factors()}, {}, "does not say finetuning_scaling_factor"),
        ({"scaling_factor": factors()[:5]}, {"finetuning_scaling_factor": True}, "one factor a feature"),
        ({"scaling_factor": torch.ones(N).long()}, {"finetuning_scaling_factor": True}, "one factor a feature"),
        (
            {"scaling_factor": factors(), "finetuning_scaling_factor": factors()},
            {},
            "and finetuning_scaling_factor must be",
        ),
        ({"scaling_factor": factors() * float("nan")}, {"finetuning_scaling_factor": True}, "W_dec' holds NaN"),
        ({"scaling_factor": factors()}, {"finetuning_scaling_factor": "yes"}, "must be true or false, got 'yes'"),
        ({}, {"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input must be true or false, got 'false'"),
        ({"b_dec_out": torch.ones(D)}, {}, r"no 'b_dec_out'; it has W_enc, W_dec, b_dec, b_enc"),
        ({"threshold": torch.ones(N)}, {}, "no 'threshold'"),
        ({"W_skip": torch.ones(D, D), "log_threshold": torch.ones(N)}, {}, "no 'W_skip', 'log_threshold'"),
        ({"b_gate": torch.ones(N), "r_mag": torch.ones(N)}, {}, "no 'b_gate', 'r_mag'"),
    ],
)
def test_tensors_that_would_change_the_result_are_refused(extra, cfg, message, tmp_path):
    saelens5(tmp_path, extra, **cfg)
    with pytest.raises(FileFormatError, match=message):
        SAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["finetuning_scaling_factor", "scaling_factor"])
def test_factors_of_one_change_nothing(name, tmp_path):
    weights = saelens5(tmp_path, {name: torch.ones(N)})
    assert torch.equal(SAE.from_pretrained(tmp_path).W_dec, weights["W_dec"])


@pytest.mark.parametrize("suffix", ["clipsteer", "sparsify", "prisma"])
def test_every_format_refuses_a_tensor_that_it_does_not_know(suffix, tmp_path):
    sae = SAE(D, N, "topk", 4)
    if suffix == "clipsteer":
        sae.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    elif suffix == "sparsify":
        from clipsteer.sae.formats import export

        export(sae, tmp_path, "sparsify")
        path = tmp_path / "sae.safetensors"
    if suffix == "prisma":
        weights = {
            "W_enc": sae.W_enc.T,
            "W_dec": sae.W_dec,
            "b_enc": sae.b_enc,
            "b_dec": sae.b_dec,
            "gain": torch.ones(N),
        }
        cfg = {"d_in": D, "d_sae": N, "activation_fn_str": "relu"}
        torch.save({"cfg": cfg, "state_dict": {n: t.detach() for n, t in weights.items()}}, tmp_path / "w.pt")
    else:
        from clipsteer.io.files import read_safetensors

        write_safetensors(path, {**read_safetensors(path), "gain": torch.ones(N)})
    with pytest.raises(FileFormatError, match="no 'gain'"):
        SAE.from_pretrained(tmp_path)


def prisma(folder: Path, extra: dict[str, Tensor], **cfg: object) -> dict[str, Tensor]:
    weights = {"W_enc": torch.randn(D, N), "W_dec": torch.randn(N, D), "b_enc": torch.randn(N), "b_dec": torch.randn(D)}
    known = {"d_in": D, "d_sae": N, "architecture": "standard", "activation_fn_str": "relu", **cfg}
    torch.save({"cfg": known, "state_dict": {**weights, **extra}}, folder / "w.pt")
    return weights


def test_prisma_makes_an_encoder_bias_for_gated_that_it_does_not_use(tmp_path):
    more = {name: torch.randn(N) for name in ("b_gate", "b_mag", "r_mag")}
    prisma(tmp_path, more, architecture="gated")
    assert torch.equal(SAE.from_pretrained(tmp_path).b_mag, more["b_mag"])
    prisma(tmp_path, more)
    with pytest.raises(FileFormatError, match="no 'b_gate', 'b_mag', 'r_mag'"):
        SAE.from_pretrained(tmp_path)


def test_two_tensors_of_one_storage_become_two(tmp_path):
    weights = prisma(tmp_path, {})
    weights["W_enc"] = weights["W_dec"].T
    torch.save({"cfg": {"d_in": D, "d_sae": N}, "state_dict": weights}, tmp_path / "w.pt")
    sae = SAE.from_pretrained(tmp_path)
    with torch.no_grad():
        sae.W_enc.zero_()
    assert torch.equal(sae.W_dec, weights["W_dec"])


@pytest.mark.parametrize(
    "cfg",
    [
        {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
        {"architecture": "topk", "activation_fn_kwargs": {"k": 4}},
        {"architecture": "topk", "k": 4, "activation_fn_kwargs": {}},
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
        {
            "architecture": "topk",
            "activation_fn": "topk",
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": 4},
            "k": None,
        },
    ],
    ids=str,
)
def test_topk_of_before_version_6(cfg, tmp_path):
    saelens5(tmp_path, {}, **cfg)
    sae = SAE.from_pretrained(tmp_path)
    assert (sae.architecture, sae.k) == ("topk", 4)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_dec"])
def test_infinite_matrices_are_neither_read_nor_written(name, tmp_path):
    sae = SAE(D, N, "topk", 4)
    sae.save_pretrained(tmp_path)
    with torch.no_grad():
        getattr(sae, name).view(-1)[3] = float("inf")
    with pytest.raises(ValueError, match=f"{name} hold NaN or infinities"):
        sae.save_pretrained(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", sae.state_dict())
    with pytest.raises(FileFormatError, match=f"'{name}' holds infinities"):
        SAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["clip_model", "pretrained", "hook_point", "tokens"])
def test_metadata_that_is_no_text(key, tmp_path):
    SAE(D, N, "topk", 4, metadata={"clip_model": "x"}).save_pretrained(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg["metadata"][key] = ["visual"]
    write_json(tmp_path / "cfg.json", cfg)
    with pytest.raises(FileFormatError, match=f"{key} of the metadata must be text"):
        SAE.from_pretrained(tmp_path)


def test_a_configuration_in_a_checkpoint_is_read_as_plain_values(tmp_path):
    deep: list[object] = [0]
    for _ in range(40):
        deep = [deep, deep]  # 2^40 values, were they written out
    prisma(tmp_path, {}, activation_fn_kwargs={"k": deep}, device=10**600)
    assert SAE.from_pretrained(tmp_path).normalize == "none"
    prisma(tmp_path, {}, normalize_activations=deep)
    with pytest.raises(FileFormatError, match="normalize_activations"):
        SAE.from_pretrained(tmp_path)
    prisma(tmp_path, {}, d_in=10**600)
    with pytest.raises(FileFormatError, match="d_in must be a positive integer, got None"):
        SAE.from_pretrained(tmp_path)
