"""SAEs of libraries that write files of torch.save: what is in a file decides whose it is, and it computes the same."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests._golden import GOLDEN, VALUES, assert_computes, disturb, folders, run_golden, write_golden_live

from clipsteer import SAE, FileFormatError
from clipsteer.io.files import read_json, read_safetensors, write_json
from clipsteer.sae import formats as sae_io

FOLDERS = folders(cfg=False)
D, N = 6, 16
# of the golden folder's name; else the architecture has the name's
KINDS = {
    "dictionary_learning-standard": "relu",
    "dictionary_learning-new": "relu",
    "dictionary_learning-batchtopk": "batch_topk",
    "dictionary_learning-matryoshka": "batch_topk",
    "visaebench-batchtopk": "batch_topk",
    "visaebench-overcomplete": "batch_topk",
    "overcomplete-topk-tied": "topk",
    "overcomplete-archetypal": "topk",
    "overcomplete-batchtopk": "jumprelu",
    "overcomplete-untied": "jumprelu",
}


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def state(folder: Path, name: str = "ae.pt") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)


def reconfigured(folder: Path, **change: object) -> Path:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **change})
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_files_of_other_libraries_compute_the_same_here(name):
    sae = run_golden(GOLDEN / name)
    library, kind = name.split("-", 1)
    assert sae.metadata["source"] == sae_io.detect(GOLDEN / name) == library
    assert sae.architecture == KINDS.get(name, kind)
    assert sae.matryoshka == ((2, 7, 16) if kind == "matryoshka" else None)


def test_all_golden_cases_are_there():
    assert len(FOLDERS) == 18


@pytest.mark.parametrize("function", ["dictionary_learning", "visaebench", "saev", "overcomplete"])
def test_what_the_libraries_write_now_computes_the_same_here(tmp_path, function):
    pytest.importorskip(function)
    write_golden_live(tmp_path, "make_golden_torch", function)
    for folder in tmp_path.iterdir():
        run_golden(folder)


# dictionary_learning


@pytest.mark.parametrize("block", ["trainer", "trainer_config", None])
@pytest.mark.parametrize("spelling", ["{}", "dictionary_learning.dictionary.{}", "<class 'dictionary.{}'>"])
def test_older_configurations_of_dictionary_learning(tmp_path, block, spelling):
    folder = copied("dictionary_learning-topk", tmp_path)
    trainer = read_json(folder / "config.json")["trainer"]
    trainer["dict_class"] = spelling.format(trainer["dict_class"])
    write_json(folder / "config.json", trainer if block is None else {block: trainer})
    run_golden(folder)
    # neither k nor a threshold was in the first files
    torch.save({n: t for n, t in state(folder).items() if n not in ("k", "threshold")}, folder / "ae.pt")
    assert run_golden(folder).k == 4


def test_a_checkpoint_below_its_configuration(tmp_path):
    folder = copied("dictionary_learning-gated", tmp_path)
    (folder / "checkpoints").mkdir()
    (folder / "ae.pt").rename(folder / "checkpoints" / "ae_500.pt")
    expected = SAE.from_pretrained(GOLDEN / "dictionary_learning-gated").state_dict()
    sae = SAE.from_pretrained(folder / "checkpoints" / "ae_500.pt")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sae.state_dict().items())


@pytest.mark.parametrize("name", ["standard", "gated", "jumprelu", "topk"])
def test_a_transcoder_of_dictionary_learning(tmp_path, name):
    folder = reconfigured(copied(f"dictionary_learning-{name}", tmp_path), buffer={"io": "in_and_out"})
    sae = SAE.from_pretrained(folder)
    assert sae.d_out == D
    assert not sae.apply_b_dec_to_input
    expected = read_safetensors(folder / "expected.safetensors")
    assert_computes(sae, expected["x"], expected["acts"], expected["x_hat"], folded=True)


@pytest.mark.parametrize(
    ("name", "trainer", "message"),
    [
        ("topk", {"dict_class": "CrossCoder"}, "dict_class 'CrossCoder' is not supported; supported: AutoEncoder"),
        ("topk", {"dict_class": ""}, "dict_class '' is not supported"),
        ("topk", {"k": 5}, "k is 4, its config.json says 5"),
        ("topk", {"activation_dim": 7}, "W_enc must be a floating tensor of shape"),
        ("topk", {"dict_class": "AutoEncoder"}, "'b_enc'|'b_dec'|'k'"),
        ("standard", {"dict_class": "GatedAutoEncoder"}, "no tensor 'b_dec'"),
        ("matryoshka", {"dict_size": 17}, "matryoshka must ascend"),
        ("jumprelu", {"dict_class": "BatchTopKSAE"}, "no matrix|k must be"),
    ],
)
def test_what_of_dictionary_learning_does_not_fit(tmp_path, name, trainer, message):
    folder = copied(f"dictionary_learning-{name}", tmp_path)
    reconfigured(folder, trainer=read_json(folder / "config.json")["trainer"] | trainer)
    with pytest.raises(FileFormatError, match=message):
        SAE.from_pretrained(folder)


def test_batch_topk_without_a_threshold_is_not_guessed(tmp_path):
    folder = copied("dictionary_learning-batchtopk", tmp_path)
    torch.save({n: t for n, t in state(folder).items() if n != "threshold"}, folder / "ae.pt")
    with pytest.raises(FileFormatError, match="no tensor 'threshold'"):
        SAE.from_pretrained(folder)


# ViSAEBench


def test_what_is_just_at_the_threshold_of_visaebench_is_kept():
    sae = SAE.from_pretrained(GOLDEN / "visaebench-batchtopk")
    acts = sae.encode(read_safetensors(GOLDEN / "visaebench-batchtopk" / "expected.safetensors")["x"])
    assert (acts[:, 0] == 1.25).all()
    assert sae.k == 3
    assert sae.metadata["backbone"] == "clip_vitb16"
    assert sae.metadata["input"] == "(x - mean) / std"


def test_visaebench_without_k_is_what_its_threshold_makes_it(tmp_path):
    folder = copied("visaebench-batchtopk", tmp_path)
    write_json(folder / "config.json", {"activation": "batchtopk", "threshold": 1.25})
    assert run_golden(folder).architecture == "jumprelu"


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_standardised_input_becomes_part_of_the_weights(name):
    folder = GOLDEN / f"visaebench-{name}"
    mean, std = torch.linspace(-2, 2, D), 1.7
    sae = SAE.from_pretrained(folder, config={"mean": mean.tolist(), "std": std})
    assert "input" not in sae.metadata
    expected = read_safetensors(folder / "expected.safetensors")
    x = expected["x"] * std + mean
    if name == "batchtopk":
        # what is just at the threshold may fall on either side
        sae.threshold.copy_(sae.threshold * (1 - 1e-5))
    bare = SAE.from_pretrained(folder)
    # both compute W (x - mean) / std on magnitudes of |W| (|x| + |mean|) / std
    size = ((x.abs() + mean.abs()) / std + 1) @ bare.W_enc.detach().abs().T + bare.b_enc.detach().abs()
    assert ((sae.encode(x) - expected["acts"]).abs() <= (D + 16) * 2.0**-23 * size).all()
    size = (size @ bare.W_dec.detach().abs() + bare.b_dec.detach().abs()) * std + mean.abs()
    error = (sae(x).x_hat - (expected["x_hat"] * std + mean)).abs()
    assert (error <= (D + N + 24) * 2.0**-23 * size).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("topk", {"activation": "relu"}, "activation 'relu' is not supported; supported: topk, batchtopk, jumprelu"),
        ("topk", {"k": None}, "k must be an int"),
        ("topk", {"hidden_dim": 17}, "shape"),
        ("batchtopk", {"threshold": "1"}, "threshold must be a number, got '1'"),
        ("topk", {"mean": [0.0] * D}, "mean must be 6 numbers and std a positive one, together"),
        ("topk", {"mean": [0.0] * D, "std": 0}, "mean must be 6 numbers and std a positive one, together"),
        ("topk", {"mean": [0.0], "std": 1}, "mean must be 6 numbers and std a positive one, together"),
    ],
)
def test_what_of_visaebench_does_not_fit(tmp_path, name, change, message):
    folder = reconfigured(copied(f"visaebench-{name}", tmp_path), **change)
    with pytest.raises(FileFormatError, match=message):
        SAE.from_pretrained(folder)


def test_thresholds_that_two_libraries_understand_otherwise(tmp_path):
    folder = copied("overcomplete-jumprelu", tmp_path)
    write_json(folder / "config.json", {"activation": "jumprelu"})
    with pytest.raises(FileFormatError, match="keeps their logarithms, where visaebench takes them as they are"):
        SAE.from_pretrained(folder)
    config = {"class": "JumpSAE", "dictionary_params": {"normalization": "identity"}}
    sae = SAE.from_pretrained(folder, config=config)
    expected = read_safetensors(folder / "expected.safetensors")
    assert_computes(sae, expected["x"], expected["acts"], expected["x_hat"])


def test_thresholds_of_visaebench_that_are_not_in_the_file(tmp_path, caplog):
    folder = copied("visaebench-jumprelu", tmp_path)
    weights = state(folder, "sae.pt")
    del weights["jump_thresholds"]
    torch.save(weights, folder / "sae.pt")
    assert (SAE.from_pretrained(folder).threshold == 0.01).all()
    assert "no thresholds; all are 0.01" in caplog.text


# overcomplete


def test_overcomplete_needs_what_its_constructor_was_given(tmp_path):
    folder = copied("overcomplete-topk", tmp_path)
    config = read_json(folder / "config.json")
    (folder / "config.json").unlink()
    with pytest.raises(FileFormatError, match=r"writes no configuration; pass config=.*TopKSAE"):
        SAE.from_pretrained(folder)
    with pytest.raises(FileFormatError, match="no top_k of the TopKSAE"):
        SAE.from_pretrained(folder, config={"class": "TopKSAE"})
    assert SAE.from_pretrained(folder, config={"class": "TopKSAE", "top_k": None}).k == 1
    write_json(tmp_path / "said.json", config)
    expected = read_safetensors(folder / "expected.safetensors")
    for said in (config, tmp_path / "said.json", str(tmp_path / "said.json")):
        sae = SAE.from_pretrained(folder / "sae.pt", config=said)
        assert_computes(sae, expected["x"], expected["acts"], expected["x_hat"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("topk", {"class": "MpSAE"}, "class 'MpSAE' is not supported; supported: TopKSAE"),
        ("topk", {"class": "RATopKSAE"}, "the dictionary is not that of a RATopKSAE"),
        ("archetypal", {"class": "TopKSAE"}, "the dictionary is not that of a TopKSAE"),
        ("topk", {"class": "JumpSAE"}, "no thresholds of the JumpSAE"),
        ("jumprelu", {"class": "TopKSAE", "top_k": 4}, "thresholds: of an encoder that is more than one linear layer"),
        ("topk", {"class": "BatchTopKSAE"}, "state dict lacks its threshold"),
        ("topk", {"dictionary_params": {"normalization": "max"}}, "normalization 'max' is not supported"),
        ("topk", {"top_k": 0}, "top_k must be a positive integer"),
        ("topk", {"input_shape": [6, 6]}, "input_shape must be a positive integer"),
        ("archetypal", {"delta": "x"}, "delta must be a number"),
    ],
)
def test_what_of_overcomplete_does_not_fit(tmp_path, name, change, message):
    folder = reconfigured(copied(f"overcomplete-{name}", tmp_path), **change)
    with pytest.raises(FileFormatError, match=message):
        SAE.from_pretrained(folder)


def test_a_deeper_encoder_of_overcomplete_is_refused(tmp_path):
    folder = copied("overcomplete-topk", tmp_path)
    norm = {f"encoder.final_block.1.{part}": torch.ones(N) for part in ("weight", "bias")}
    torch.save(state(folder, "sae.pt") | norm, folder / "sae.pt")
    with pytest.raises(FileFormatError, match=r"encoder.final_block.1.bias, encoder.final_block.1.weight: of an enc"):
        SAE.from_pretrained(folder)


# any content


@given(st.sampled_from([name for name in FOLDERS if not name.startswith("saev")]), st.data())
def test_any_configuration_and_tensor_load_or_are_refused(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("any") / name
    shutil.copytree(GOLDEN / name, folder)
    config = read_json(folder / "config.json")
    inner = config.get("trainer", config)
    inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(VALUES)
    (folder / "config.json").write_text(json.dumps(config))
    file = "ae.pt" if (folder / "ae.pt").is_file() else "sae.pt"
    weights = state(folder, file)
    disturb(weights, data)
    torch.save(weights, folder / file)
    with suppress(FileFormatError):
        assert SAE.from_pretrained(folder).d_in == D
