"""SAEs written for other libraries: they come back, and the libraries compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests._golden import assert_computes

from clipsteer import SAE, train_sae
from clipsteer.io.files import read_json
from clipsteer.sae import ARCHITECTURES
from clipsteer.sae import formats as sae_io

D, N, PREFIXES = 6, 16, (2, 7, 16)
METADATA = {"clip_model": "ViT-B-32", "hook_point": "visual.transformer.resblocks.9"}
X = torch.randn(9, D, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


def make(architecture: str, **more: object) -> SAE:
    sae = SAE(D, N, architecture, 4, metadata=METADATA, **more)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            values = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(values.abs() * 0.5 if name == "threshold" else values)
        # as training keeps them, and as dictionary_learning makes them when it loads
        sae.renormalize_decoder_()
    return sae.eval()


CASES = [(a, b, p) for a in ARCHITECTURES for b in (True, False) for p in (None, PREFIXES)]
CASES = [(a, b, p) for a, b, p in CASES if p is None or a != "gated"]


def name_of(architecture: str, apply_b_dec: bool, prefixes: object) -> str:
    if architecture == "batch_topk":
        return "BatchTopKSAE" if prefixes is None else "MatryoshkaBatchTopKSAE"
    if architecture == "relu":
        return "AutoEncoder" if apply_b_dec else "AutoEncoderNew"
    return {"topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder", "gated": "GatedAutoEncoder"}[architecture]


@pytest.mark.parametrize(("architecture", "apply_b_dec", "prefixes"), CASES)
def test_what_is_written_for_dictionary_learning_comes_back(tmp_path, architecture, apply_b_dec, prefixes):
    sae = make(architecture, apply_b_dec_to_input=apply_b_dec, matryoshka=prefixes)
    sae_io.export(sae, tmp_path, "dictionary_learning")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ae.pt", "config.json"]
    trainer = read_json(tmp_path / "config.json")["trainer"]
    assert trainer["dict_class"] == name_of(architecture, apply_b_dec, prefixes)
    back = SAE.from_pretrained(tmp_path)
    assert {key: back.metadata[key] for key in METADATA} == METADATA
    assert back.architecture == architecture
    assert back.matryoshka == (prefixes if architecture == "batch_topk" else None)
    folded = back.apply_b_dec_to_input != apply_b_dec
    assert folded == (apply_b_dec if architecture == "jumprelu" else architecture != "relu" and not apply_b_dec)
    if not folded:
        assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in sae.state_dict().items())
    with torch.no_grad():
        # of the two the one that subtracts has the larger magnitudes
        one, other = (sae, back) if sae.apply_b_dec_to_input else (back, sae)
        assert_computes(one, X, other.encode(X), other(X).x_hat, folded=folded)


@pytest.mark.parametrize(("architecture", "apply_b_dec", "prefixes"), CASES)
def test_dictionary_learning_loads_and_computes_the_same(tmp_path, architecture, apply_b_dec, prefixes):
    pytest.importorskip("dictionary_learning")
    from dictionary_learning.utils import load_dictionary

    sae = make(architecture, apply_b_dec_to_input=apply_b_dec, matryoshka=prefixes)
    sae_io.export(sae, tmp_path, "dictionary_learning")
    theirs, config = load_dictionary(str(tmp_path), "cpu")
    assert type(theirs).__name__ == name_of(architecture, apply_b_dec, prefixes)
    assert config["trainer"]["submodule_name"] == METADATA["hook_point"]
    folded = apply_b_dec != (type(theirs).__name__ not in ("AutoEncoderNew", "JumpReluAutoEncoder"))
    with torch.no_grad():
        assert_computes(sae, X, theirs.encode(X), theirs(X), folded=folded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "layer_norm"}, "normalize='layer_norm'"),
        ({"d_out": 5}, "a transcoder"),
        ({"d_out": 6, "skip": True}, "a transcoder and a skip connection"),
    ],
)
def test_what_dictionary_learning_has_no_class_for(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"dictionary_learning has no class for {message}; use format='saelens'"):
        sae_io.export(make("relu", **options), tmp_path / "a", "dictionary_learning")
    sae = SAE(D, N, "batch_topk", 2.5)
    with pytest.raises(ValueError, match=r"no class for k=2.5, which is not whole"):
        sae_io.export(sae, tmp_path / "a", "dictionary_learning")
    assert not (tmp_path / "a").exists()


TRANSCODERS = [
    (a, n, s, p)
    for a in ("relu", "jumprelu", "batch_topk")
    for n in ("none", "layer_norm", "constant_norm")
    for s in (False, True)
    for p in (None, PREFIXES)
]


def transcoder(architecture: str, normalize: str, skip: bool, prefixes: object = None, d_out: int = 5) -> SAE:
    return make(architecture, normalize=normalize, skip=skip, matryoshka=prefixes, d_out=d_out)


@pytest.mark.parametrize(("architecture", "normalize", "skip", "prefixes"), TRANSCODERS)
def test_transcoders_written_for_saelens(tmp_path, architecture, normalize, skip, prefixes):
    sae = transcoder(architecture, normalize, skip, prefixes)
    back = SAE.from_pretrained(sae_io.export(sae, tmp_path, "saelens"))
    assert back.config == sae.config | ({"architecture": "jumprelu", "k": None} if architecture == "batch_topk" else {})
    with torch.no_grad():
        assert torch.equal(back(X).x_hat, sae(X).x_hat)
        assert torch.equal(back.encode(X), sae.encode(X))


@pytest.mark.parametrize(("architecture", "normalize", "skip", "prefixes"), TRANSCODERS)
def test_saelens_loads_our_transcoders_and_computes_the_same(tmp_path, architecture, normalize, skip, prefixes):
    sae_lens = pytest.importorskip("sae_lens")
    sae = transcoder(architecture, normalize, skip, prefixes)
    theirs = sae_lens.SAE.load_from_disk(sae_io.export(sae, tmp_path, "saelens"))
    with torch.no_grad():
        assert_computes(sae, X, theirs.encode(X), theirs(X))


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "relu", "jumprelu"])
def test_saelens_loads_what_was_matryoshka(tmp_path, architecture):
    sae_lens = pytest.importorskip("sae_lens")
    sae = make(architecture, matryoshka=PREFIXES)
    theirs = sae_lens.SAE.load_from_disk(sae_io.export(sae, tmp_path, "saelens"))
    assert SAE.from_pretrained(tmp_path).matryoshka == PREFIXES
    with torch.no_grad():
        assert_computes(sae, X, theirs.encode(X), theirs(X))


@pytest.mark.parametrize("architecture", ["topk", "gated"])
def test_transcoders_that_saelens_has_not(tmp_path, architecture):
    with pytest.raises(ValueError, match=f"transcoders of relu and jumprelu alone, this is {architecture}"):
        sae_io.export(transcoder(architecture, "none", False), tmp_path / "a", "saelens")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_written_for_sparsify(tmp_path, skip):
    sae = transcoder("topk", "none", skip, d_out=D)
    back = SAE.from_pretrained(sae_io.export(sae, tmp_path, "sparsify"))
    assert back.config == sae.config
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in sae.state_dict().items())
    with pytest.raises(ValueError, match="gives what is as wide as its input, this one 5 from 6"):
        sae_io.export(transcoder("topk", "none", skip), tmp_path, "sparsify")


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_loads_our_transcoders_and_computes_the_same(tmp_path, skip):
    sparsify = pytest.importorskip("sparsify")
    sae = transcoder("topk", "none", skip, d_out=D)
    theirs = sparsify.SparseCoder.load_from_disk(sae_io.export(sae, tmp_path, "sparsify"))
    with torch.no_grad():
        out = theirs(X)
        acts = torch.zeros(len(X), N).scatter(-1, out.latent_indices, out.latent_acts)
        assert_computes(sae, X, acts, out.sae_out)


TRAINED = [
    *((architecture, {}) for architecture in ("topk", "batch_topk", "jumprelu", "relu", "gated")),
    *((architecture, {"matryoshka": PREFIXES}) for architecture in ("topk", "batch_topk", "jumprelu")),
]


@pytest.mark.parametrize(("architecture", "options"), TRAINED, ids=str)
@pytest.mark.parametrize("library", ["sae_lens", "dictionary_learning"])
def test_what_was_trained_computes_the_same_in_other_libraries(tmp_path, library, architecture, options):
    peer = pytest.importorskip(library)
    generator = torch.Generator().manual_seed(3)
    codes = torch.rand(640, 20, generator=generator) * (torch.rand(640, 20, generator=generator) < 0.15)
    rows = codes @ torch.randn(20, D, generator=generator) + 0.5
    options = options | {"architecture": architecture, "d_sae": N, "k": 3, "batch_size": 64, "steps": 40, "lr": 1e-2}
    sae = train_sae(rows, warmup_steps=2, seed=1, device="cpu", **options).eval()
    sae_io.export(sae, tmp_path, library.replace("sae_lens", "saelens"))
    if library == "sae_lens":
        theirs = peer.SAE.load_from_disk(tmp_path)
    else:
        from dictionary_learning.utils import load_dictionary

        theirs = load_dictionary(str(tmp_path), "cpu")[0]
    x = rows[:100]
    with torch.no_grad():
        active = (sae.encode(x) > 0).sum(-1).float().mean()
        assert 0 < active < N
        assert (sae(x).x_hat - x).norm() < 0.7 * (x - x.mean(0)).norm()
        folded = library == "dictionary_learning" and architecture == "jumprelu"
        assert_computes(sae, x, theirs.encode(x), theirs(x), folded=folded)


def test_a_written_file_holds_no_more_than_its_tensors(tmp_path: Path):
    """A transposed view of a dictionary is written once, in its own order."""
    sae = SAE(64, 256, "jumprelu")
    sae_io.export(sae, tmp_path, "dictionary_learning")
    tensors = sum(tensor.numel() * 4 for tensor in sae.state_dict().values())
    assert (tmp_path / "ae.pt").stat().st_size < tensors + 4096
