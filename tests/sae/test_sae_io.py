from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import sys
import types
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import clipsteer
from clipsteer import SAE, FileFormatError
from clipsteer.io.files import read_json, read_safetensors, write_json, write_safetensors
from clipsteer.sae import ARCHITECTURES, NORMALIZATIONS
from clipsteer.sae import formats as sae_io

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name != "__pycache__")
D, N = 6, 16


def make(architecture="topk", normalize="none", *, seed=0, dtype=torch.float32, apply_b_dec=True, k=4, **more) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(D, N, architecture, k, normalize=normalize, apply_b_dec_to_input=apply_b_dec, dtype=dtype, **more)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            values = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(values.abs() * 0.5 if name == "threshold" else values)
    return sae.eval()


def same(a: SAE, b: SAE) -> bool:
    """Equal configuration, and every bit of every tensor."""
    x, y = a.state_dict(), b.state_dict()
    return (
        a.config == b.config
        and x.keys() == y.keys()
        and all(torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x)
    )


@torch.no_grad()
def assert_computes(sae: SAE, x: torch.Tensor, acts: torch.Tensor, x_hat: torch.Tensor) -> None:
    """Another library's float32 results are ours, within the a priori error of both: every sum of m terms carries at
    most m·2⁻²⁴ of the sum of magnitudes, the encoder has d_in + 8 operations, the decoder d_sae + 4, two sides."""
    out = sae(x)
    mean = torch.zeros(()) if out.stats.mean is None else out.stats.mean.abs()
    scale = torch.ones(()) if out.stats.scale is None else out.stats.scale
    gain = sae.r_mag.exp() if sae.architecture == "gated" else torch.ones(())
    bias = sae.b_mag if sae.architecture == "gated" else sae.b_enc
    size = ((x.abs() + mean) / scale + sae.b_dec.abs()) @ sae.W_enc.abs().T * gain + bias.abs()
    unit = 2.0**-23
    assert_within(sae.encode(x), acts, (sae.d_in + 8) * unit * size)
    size = (size @ sae.W_dec.abs() + sae.b_dec.abs()) * scale + mean
    assert_within(out.x_hat, x_hat, (sae.d_in + sae.d_sae + 12) * unit * size)


def assert_within(got: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert bool(((got - expected).abs() <= bound).all()), float(((got - expected).abs() / bound).max())


def run_golden(folder: Path) -> SAE:
    sae, expected = SAE.from_pretrained(folder), read_safetensors(folder / "expected.safetensors")
    assert not sae.training
    assert all(p.requires_grad and p.is_contiguous() for p in sae.parameters())
    assert expected["acts"].any()
    assert_computes(sae, expected["x"], expected["acts"], expected["x_hat"])
    return sae


# what other libraries wrote


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_files_of_other_libraries_compute_the_same_here(name):
    sae = run_golden(GOLDEN / name)
    kind = {"standard": "relu", "batchtopk": "jumprelu"}.get(name.split("-")[1], name.split("-")[1])
    assert sae.architecture == ("batch_topk" if name == "saelens-batchtopk-checkpoint" else kind)
    assert sae.metadata["source"] == sae_io.detect(GOLDEN / name) == name.split("-")[0]
    if "hook_name" in read_json(GOLDEN / name / "cfg.json").get("metadata", {}):
        assert sae.metadata["hook_point"] == "visual.transformer.resblocks.9"
        assert sae.metadata["source_hook"] == "blocks.9.hook_resid_post"
        assert sae.metadata["clip_model"] == "ViT-B-32"


def test_all_golden_cases_are_there():
    assert len(FOLDERS) == 10


def write_golden_live(tmp_path: Path, function: str) -> None:
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.HERE = tmp_path
    getattr(module, function)(torch.Generator().manual_seed(99))


@pytest.mark.parametrize("function", ["saelens", "saelens_batchtopk"])
def test_what_sae_lens_writes_now_computes_the_same_here(tmp_path, function):
    pytest.importorskip("sae_lens")
    write_golden_live(tmp_path, function)
    for folder in tmp_path.iterdir():
        run_golden(folder)


def test_what_sparsify_writes_now_computes_the_same_here(tmp_path):
    pytest.importorskip("sparsify")
    write_golden_live(tmp_path, "sparsify")
    for folder in tmp_path.iterdir():
        run_golden(folder)


def test_saelens_before_version_6(tmp_path):
    sae = make("topk", seed=3)
    weights = {n: t.detach() for n, t in sae.state_dict().items()}
    cfg = {
        "d_in": D,
        "d_sae": N,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
        "normalize_activations": False,
        "model_name": "open-clip:x",
        "hook_name": "blocks.3.hook_mlp_out",
        "dtype": "torch.float32",
    }
    write_safetensors(
        tmp_path / "sae_weights.safetensors", {**weights, "W_enc": weights["W_enc"].T, "scaling_factor": torch.ones(N)}
    )
    write_json(tmp_path / "cfg.json", cfg)
    loaded = SAE.from_pretrained(tmp_path)
    assert same(loaded, sae)
    assert loaded.metadata["hook_point"] == "visual.transformer.resblocks.3.mlp"


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        ("saelens-standard", {"architecture": "temporal"}, "'temporal' is not supported; supported: standard"),
        ("saelens-standard", {"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ("saelens-standard", {"activation_fn": "tanh-relu"}, "tanh-relu"),
        ("saelens-standard", {"d_sae": 17}, r"shape \(17, 6\), got torch.float32 \(16, 6\)"),
        ("saelens-standard", {"d_in": 10**15}, "shape"),
        ("saelens-standard", {"d_sae": 10**30}, "saelens-standard"),
        ("saelens-standard", {"d_in": None}, "d_in must be a positive integer, got None"),
        ("saelens-standard", {"architecture": ["topk"]}, "not supported"),
        ("saelens-topk", {"k": 17}, "k must be in"),
        ("saelens-topk", {"k": "4"}, "k must be an int"),
        ("saelens-standard", {"architecture": "gated"}, "no tensor 'b_gate'"),
        ("saelens-standard", {"reshape_activations": "hook_z"}, "reshape_activations 'hook_z' is not supported"),
        ("sparsify-topk", {"transcode": True}, "transcode = True is not supported"),
        ("sparsify-topk", {"skip_connection": True}, "skip_connection"),
        ("sparsify-topk", {"signed": True}, "signed"),
        ("sparsify-topk", {"activation": "groupmax"}, "groupmax"),
        ("sparsify-topk", {"num_latents": 15}, "shape"),
        ("sparsify-topk", {"num_latents": "x"}, "d_sae must be an int"),
        ("sparsify-topk", {"k": None}, "k must be an int"),
    ],
)
def test_configurations_that_cannot_be_run(tmp_path, folder, change, message):
    target = tmp_path / folder
    shutil.copytree(GOLDEN / folder, target)
    write_json(target / "cfg.json", {**read_json(target / "cfg.json"), **change})
    with pytest.raises(FileFormatError, match=message):
        SAE.from_pretrained(target)


# ViT-Prisma: written here as its documentation and source describe; the package on PyPI has no SAE


def prisma_config(**change):
    cfg = {
        "d_in": D,
        "d_sae": N,
        "expansion_factor": 99,
        "architecture": "standard",
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "normalize_activations": "layer_norm",
        "hook_point_layer": 9,
        "layer_subtype": "hook_resid_post",
        "model_name": "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
        "cls_token_only": False,
        "use_patches_only": False,
        "vit_model_cfg": None,
        "device": {"__type__": "torch.device", "value": "cuda"},
        "dtype": {"__type__": "torch.dtype", "value": "torch.float32"},
    }
    return {**cfg, **change}


def prisma_weights(seed=0, gated=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,)}
    shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag"), (N,)) if gated else {}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def prisma_computes(w, x, cfg):
    """The authors' encode and decode, from their description."""
    if cfg["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        scale = (x - mean).std(-1, keepdim=True)
        seen = (x - mean) / (scale + 1e-5)
    elif cfg["normalize_activations"] == "constant_norm_rescale":
        coefficient = D**0.5 / x.norm(dim=-1, keepdim=True)
        mean, scale, seen = 0, 1 / coefficient, x * coefficient
    else:
        mean, scale, seen = 0, 1, x
    seen = seen - w["b_dec"]
    if cfg["architecture"] == "gated":
        acts = (seen @ w["W_enc"] + w["b_gate"] > 0) * torch.relu(seen @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"])
    else:
        acts = torch.relu(seen @ w["W_enc"] + w["b_enc"])
        if cfg["activation_fn_str"] == "topk":
            values, positions = acts.topk(cfg["activation_fn_kwargs"]["k"], dim=-1)
            acts = torch.zeros_like(acts).scatter(-1, positions, values)
    return acts, (acts @ w["W_dec"] + w["b_dec"]) * scale + mean


@pytest.fixture
def prisma_class():
    """A stand-in for the authors' configuration class, there while a file is written and gone when it is read."""
    names = ("vit_prisma", "vit_prisma.sae", "vit_prisma.sae.config")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    kind = type("VisionModelSAERunnerConfig", (), {"__module__": names[-1]})
    sys.modules[names[-1]].VisionModelSAERunnerConfig = kind

    def build(values):
        cfg = kind()
        vars(cfg).update(values, dtype=torch.float32, device=torch.device("cpu"), hook_point="blocks.9.hook_resid_post")
        return cfg

    yield build
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"normalize_activations": "constant_norm_rescale", "cls_token_only": True},
        {"normalize_activations": "none", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}},
        {"architecture": "gated", "hook_point_layer": [9], "use_patches_only": True},
        {"d_sae": None, "expansion_factor": 3},
    ],
)
def test_prisma(tmp_path, prisma_class, change, embedded):
    cfg = prisma_config(**change)
    weights = prisma_weights(gated=cfg["architecture"] == "gated")
    if cfg["d_sae"] is None:
        weights = {n: torch.cat([t, t[..., :2]], -1) if n in ("W_enc", "b_enc") else t for n, t in weights.items()}
        weights["W_dec"] = torch.cat([weights["W_dec"], weights["W_dec"][:2]])
    if embedded:
        torch.save({"cfg": prisma_class(cfg), "state_dict": weights}, tmp_path / "n_images_2600058.pt")
        torch.save(torch.zeros(3), tmp_path / "n_images_2600058_log_feature_sparsity.pt")
        torch.save({"cfg": None, "state_dict": {}}, tmp_path / "n_images_130.pt")
    else:
        torch.save(weights, tmp_path / "weights.pt")
        (tmp_path / "config.json").write_text(json.dumps(cfg))
    for name in ("vit_prisma.sae.config", "vit_prisma.sae", "vit_prisma"):
        del sys.modules[name]
    sae = SAE.from_pretrained(tmp_path)
    assert "vit_prisma" not in sys.modules
    assert sae.metadata == {
        "source": "prisma",
        "clip_model": "hf-hub:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
        "hook_point": "visual.transformer.resblocks.9",
        "source_hook": "blocks.9.hook_resid_post",
        "tokens": "cls" if change.get("cls_token_only") else "patches" if change.get("use_patches_only") else "all",
    }
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(5)) * 3 + 1
    assert_computes(sae, x, *prisma_computes(weights, x, cfg))
    file = next(p for p in tmp_path.iterdir() if p.name in ("weights.pt", "n_images_2600058.pt"))
    assert same(SAE.from_pretrained(file), sae)
    sae.save_pretrained(tmp_path / "own")
    assert same(SAE.from_pretrained(tmp_path / "own"), sae)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "jumprelu"}, "jumprelu relu"),
        ({"is_transcoder": True}, "transcoder"),
        ({"normalize_activations": "batch"}, "normalize_activations 'batch'"),
        ({"d_in": "6"}, "d_in must be a positive integer"),
        ({"d_sae": 15}, "shape"),
        ({"d_sae": None, "expansion_factor": 0}, "expansion_factor"),
        ({"activation_fn_str": "topk"}, "k must be an int"),
    ],
)
def test_prisma_configurations_that_cannot_be_run(tmp_path, change, message):
    torch.save(prisma_weights(), tmp_path / "weights.pt")
    write_json(tmp_path / "config.json", prisma_config(**change))
    with pytest.raises(FileFormatError, match=message):
        SAE.from_pretrained(tmp_path)


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Evil.target),)


@pytest.mark.parametrize(
    "content",
    [
        Evil(),
        {"cfg": Evil(), "state_dict": {}},
        [1, 2],
        {"state_dict": {"W_enc": 1, "W_dec": 2}},
        {"W_enc": torch.zeros(3), "W_dec": torch.zeros(3)},
        {"W_enc": torch.zeros(1).expand(D, N), "W_dec": torch.zeros(N, D)},
        {
            "W_enc": torch.eye(D, N).to_sparse(),
            "W_dec": torch.zeros(N, D),
            "b_enc": torch.zeros(N),
            "b_dec": torch.zeros(D),
        },
        {**prisma_weights(), "b_enc": torch.full((N,), float("nan"))},
        {**prisma_weights(), "b_enc": torch.zeros(N, dtype=torch.int64)},
        {**prisma_weights(), "b_dec": torch.zeros(D, dtype=torch.complex64)},
        {**prisma_weights(), "cfg": 7},
        {**prisma_weights(), "cfg": {"d_in": torch.zeros(3), "is_transcoder": torch.zeros(3)}},
    ],
)
def test_pt_files_that_are_refused(tmp_path, content):
    Evil.target = tmp_path / "ran"
    torch.save(content, tmp_path / "weights.pt")
    write_json(tmp_path / "config.json", prisma_config())
    with pytest.raises(FileFormatError, match=str(tmp_path)):
        SAE.from_pretrained(tmp_path)
    assert not Evil.target.exists()


def repack(path: Path, change, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def test_pt_archives_that_unfold_or_lie(tmp_path):
    path = tmp_path / "weights.pt"
    write_json(tmp_path / "config.json", prisma_config())
    torch.save({**prisma_weights(), "W_dec": torch.zeros(1_000_000, D)}, path)
    repack(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    with pytest.raises(FileFormatError, match="compressed"):
        SAE.from_pretrained(tmp_path)
    torch.save({**prisma_weights(), "W_dec": torch.zeros(1_000_000, D)}, path)
    # storages that are not as long as the header of the tensor says
    repack(path, lambda name, data: data[:8] if "/data/" in name else data)
    with pytest.raises(FileFormatError):
        SAE.from_pretrained(tmp_path)
    # the format before archives
    torch.save(prisma_weights(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(FileFormatError, match="not an archive"):
        SAE.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@given(
    st.floats(0, 1, exclude_max=True),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_pt_files(scratch, where, changes):
    buffer = io.BytesIO()
    torch.save(prisma_weights(), buffer)
    whole = bytearray(buffer.getvalue())
    write_json(scratch / "config.json", prisma_config())
    path = scratch / "weights.pt"
    path.write_bytes(whole[: int(where * len(whole))])
    with pytest.raises(FileFormatError):
        SAE.from_pretrained(scratch)
    for place, byte in changes:
        whole[int(place * len(whole))] = byte
    path.write_bytes(whole)
    with suppress(FileFormatError):
        SAE.from_pretrained(scratch)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blocks.9.hook_resid_post", "visual.transformer.resblocks.9"),
        ("blocks.9.hook_resid_pre", "visual.transformer.resblocks.8"),
        ("blocks.0.hook_resid_pre", "visual.ln_pre"),
        ("blocks.11.hook_mlp_out", "visual.transformer.resblocks.11.mlp"),
        ("blocks.2.hook_attn_out", "visual.transformer.resblocks.2.attn"),
        ("blocks.2.mlp.hook_post", "visual.transformer.resblocks.2.mlp.gelu"),
        ("blocks.2.mlp.hook_pre", "visual.transformer.resblocks.2.mlp.c_fc"),
        ("visual.transformer.resblocks.4", "visual.transformer.resblocks.4"),
        ("blocks.2.hook_resid_mid", None),
        ("hook_embed", None),
    ],
)
def test_hook_names(theirs, ours):
    assert sae_io.open_clip_name(theirs) == ours


def test_hook_names_are_modules_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    vision = {"width": 32, "layers": 2, "patch_size": 16, "image_size": 32, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    names = dict(model.named_modules())
    sites = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "mlp.hook_pre", "mlp.hook_post")
    for layer in (0, 1):
        for site in sites:
            assert sae_io.open_clip_name(f"blocks.{layer}.{site}") in names


# our own files


@given(
    st.integers(0, 2**31),
    st.sampled_from(ARCHITECTURES),
    st.sampled_from(NORMALIZATIONS),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_round_trip_is_bitwise(scratch, seed, architecture, normalize, apply_b_dec, dtype):
    metadata = {"clip_model": "ViT-B-32", "pretrained": "openai", "tokens": "cls", "steps": 3}
    metadata["hook_point"] = "visual.transformer.resblocks.9"
    sae = make(architecture, normalize, seed=seed, dtype=dtype, apply_b_dec=apply_b_dec, metadata=metadata)
    folder = sae.save_pretrained(scratch / "deep" / "er")
    loaded = SAE.from_pretrained(str(folder))
    assert same(loaded, sae)
    assert loaded.metadata == {**metadata, "clipsteer_version": clipsteer.__version__}
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert torch.equal(loaded(x).x_hat, sae(x).x_hat)
    assert SAE.from_pretrained(folder, dtype=torch.float64).W_enc.dtype == torch.float64
    assert sorted(os.listdir(folder)) == ["cfg.json", "model.safetensors"]
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata()["hook_point"] == metadata["hook_point"]
        assert file.metadata()["clipsteer_version"] == clipsteer.__version__
    assert sae.metadata == metadata


def test_fractional_k_and_infinite_thresholds_survive(tmp_path):
    sae = make("batch_topk", k=2.5)
    assert same(SAE.from_pretrained(sae.save_pretrained(tmp_path)), sae)
    sae = make("jumprelu")
    with torch.no_grad():
        sae.threshold[3] = float("inf")
    assert same(SAE.from_pretrained(sae.save_pretrained(tmp_path)), sae)


def test_what_cannot_be_saved_touches_nothing(tmp_path):
    sae = make(metadata={"model": object()})
    with pytest.raises(TypeError):
        sae.save_pretrained(tmp_path / "a")
    sae = make()
    with torch.no_grad():
        sae.W_dec[0, 0] = float("nan")
    for save in (sae.save_pretrained, lambda path: sae_io.export(sae, path, "saelens")):
        with pytest.raises(ValueError, match="W_dec hold NaN"):
            save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2, this reads 1"),
        ({"k": None}, "k must be an int"),
        ({"normalize": "x"}, "normalize must be one of"),
        ({"architecture": {}}, "architecture must be one of"),
        ({"d_in": 7}, "shape"),
        ({"d_in": True}, "d_in must be an int"),
        ({"d_sae": 2**62}, "clipsteer"),
        ({"apply_b_dec_to_input": 1}, "true or false"),
        ({"metadata": 3}, "JSON object"),
        ({"format": "x"}, "no SAE in here; looked for"),
    ],
)
def test_own_configurations_that_are_wrong(tmp_path, change, message):
    folder = make().save_pretrained(tmp_path / "clipsteer")
    write_json(folder / "cfg.json", {**read_json(folder / "cfg.json"), **change})
    with pytest.raises(FileFormatError, match=message):
        SAE.from_pretrained(folder)


def test_keys_that_are_missing(tmp_path):
    folder = make().save_pretrained(tmp_path)
    cfg = read_json(folder / "cfg.json")
    for name in ("k", "d_in", "normalize", "apply_b_dec_to_input", "format_version"):
        write_json(folder / "cfg.json", {key: value for key, value in cfg.items() if key != name})
        with pytest.raises(FileFormatError, match=name):
            SAE.from_pretrained(folder)
    write_json(folder / "cfg.json", cfg)
    weights = read_safetensors(folder / "model.safetensors")
    for name in weights:
        write_safetensors(folder / "model.safetensors", {key: value for key, value in weights.items() if key != name})
        with pytest.raises(FileFormatError, match=f"no tensor '{name}'"):
            SAE.from_pretrained(folder)
    write_safetensors(folder / "model.safetensors", {**weights, "b_enc": weights["b_enc"] * float("nan")})
    with pytest.raises(FileFormatError, match="'b_enc' holds NaN"):
        SAE.from_pretrained(folder)


TEXT = st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([*FOLDERS, "own", "prisma"]), st.data())
def test_any_configuration_loads_or_is_refused(scratch, name, data):
    target = scratch / "any"
    shutil.rmtree(target, ignore_errors=True)
    if name == "own":
        make().save_pretrained(target)
    elif name == "prisma":
        target.mkdir()
        torch.save(prisma_weights(), target / "weights.pt")
        write_json(target / "config.json", prisma_config())
    else:
        shutil.copytree(GOLDEN / name, target)
    file = target / ("config.json" if name == "prisma" else "cfg.json")
    cfg = json.loads(file.read_text())
    keys = data.draw(st.lists(st.sampled_from(sorted(cfg)), min_size=1, max_size=2))
    file.write_text(json.dumps({**cfg, **{key: data.draw(JSON) for key in keys}}))
    with suppress(FileFormatError):
        sae = SAE.from_pretrained(target)
        assert sae.W_enc.shape[1] == sae.d_in == D


@given(
    st.sampled_from(["saelens-standard", "saelens-topk-rescaled", "saelens-batchtopk-checkpoint", "sparsify-topk"]),
    st.data(),
)
def test_any_tensors_load_or_are_refused(scratch, name, data):
    target = scratch / "tensors"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(GOLDEN / name, target)
    file = next(target.glob("sae*.safetensors"))
    weights = read_safetensors(file)
    key = data.draw(st.sampled_from(sorted(weights)))
    shape = data.draw(st.lists(st.sampled_from([0, 1, D, N]), max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
    write_safetensors(file, {**weights, key: torch.zeros(shape, dtype=dtype)})
    with suppress(FileFormatError):
        SAE.from_pretrained(target)


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="for the hub write 'hf-hub:org/repo'"):
        SAE.from_pretrained("org/repo")
    with pytest.raises(FileFormatError, match="looked for"):
        SAE.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileFormatError, match="looked for"):
        SAE.from_pretrained(tmp_path / "file")
    folder = make().save_pretrained(tmp_path / "a")
    with pytest.raises(TypeError, match="floating"):
        SAE.from_pretrained(folder, dtype=torch.int8)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        SAE.from_pretrained(folder)


# the hub


def test_hub_paths():
    assert sae_io.parse_hub("hf-hub:org/repo") == ("org/repo", "")
    assert sae_io.parse_hub("hf-hub:org/repo/layers/9") == ("org/repo", "layers/9")
    for bad in ("hf-hub:org", "hf-hub:", "hf-hub:org//x", "hf-hub:org/repo/", "hf-hub:org/repo/../x", "hf-hub:../x"):
        with pytest.raises(ValueError, match="hf-hub:org/repo"):
            sae_io.parse_hub(bad)


@pytest.mark.parametrize("subfolder", ["", "layers/9"])
def test_hub_download(tmp_path, monkeypatch, subfolder):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    sae = make()
    sae.save_pretrained(tmp_path / subfolder)
    (tmp_path / subfolder / "other.py").write_text("raise SystemExit")
    calls = []

    def snapshot_download(repo, *, allow_patterns):
        calls.append(repo)
        listing = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
        chosen = sorted(huggingface_hub.utils.filter_repo_objects(listing, allow_patterns=allow_patterns))
        assert chosen == [os.path.join(subfolder, name) for name in ("cfg.json", "model.safetensors")]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert same(SAE.from_pretrained("/".join(["hf-hub:org/repo", *filter(None, [subfolder])])), sae)
    assert calls == ["org/repo"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no SAE in 'nothing'"):
        SAE.from_pretrained("hf-hub:org/repo/nothing")


def test_hub_out_of_reach(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(RuntimeError, match=r"no route.*download the folder by hand and pass its path"):
        SAE.from_pretrained("hf-hub:org/repo/x")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match="install it, or download the folder by hand"):
        SAE.from_pretrained("hf-hub:org/repo/x")


# for other libraries


EXPORTS = [(a, n, b) for a in ARCHITECTURES for n in NORMALIZATIONS for b in (True, False)]


@pytest.mark.parametrize(("architecture", "normalize", "apply_b_dec"), EXPORTS)
def test_saelens_export_comes_back_bit_for_bit(tmp_path, architecture, normalize, apply_b_dec):
    metadata = {"clip_model": "ViT-B-32", "hook_point": "visual.transformer.resblocks.9"}
    sae = make(architecture, normalize, apply_b_dec=apply_b_dec, metadata=metadata)
    back = SAE.from_pretrained(sae_io.export(sae, tmp_path, "saelens"))
    assert sae_io.detect(tmp_path) == "saelens"
    assert back.metadata == {**metadata, "clipsteer_version": clipsteer.__version__}
    if architecture != "batch_topk":
        assert same(back, sae)
    else:
        assert back.architecture == "jumprelu"
        x = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
        assert torch.equal(back.encode(x), sae.encode(x))


@pytest.mark.parametrize(("architecture", "normalize", "apply_b_dec"), EXPORTS)
def test_saelens_loads_our_export_and_computes_the_same(tmp_path, architecture, normalize, apply_b_dec):
    sae_lens = pytest.importorskip("sae_lens")
    sae = make(
        architecture, normalize, apply_b_dec=apply_b_dec, metadata={"hook_point": "visual.transformer.resblocks.9"}
    )
    sae_io.export(sae, tmp_path, "saelens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(1)) * 2 + 0.5
    with torch.no_grad():
        assert_computes(sae, x, theirs.encode(x), theirs(x))
    assert theirs.cfg.metadata.hook_name == "visual.transformer.resblocks.9"


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_sparsify_export(tmp_path, apply_b_dec):
    sae = make("topk", apply_b_dec=apply_b_dec, metadata={"tokens": "all"})
    back = SAE.from_pretrained(sae_io.export(sae, tmp_path, "sparsify"))
    assert back.metadata["tokens"] == "all"
    if apply_b_dec:
        assert same(back, sae)
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_computes(back, x, sae.encode(x), sae(x).x_hat)


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_sparsify_loads_our_export_and_computes_the_same(tmp_path, apply_b_dec):
    sparsify = pytest.importorskip("sparsify")
    sae = make("topk", apply_b_dec=apply_b_dec)
    theirs = sparsify.SparseCoder.load_from_disk(sae_io.export(sae, tmp_path, "sparsify"))
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        top = theirs.encode(x)
        acts = torch.zeros(9, N).scatter(-1, top.top_indices, top.top_acts)
        # b_enc + W_enc b_dec - W_enc b_dec, when folded, is sized by the folded SAE
        assert_computes(SAE.from_pretrained(tmp_path), x, acts, theirs.decode(top.top_acts, top.top_indices))
        assert_computes(SAE.from_pretrained(tmp_path), x, sae.encode(x), sae(x).x_hat)


def test_exports_that_cannot_be(tmp_path):
    for sae in (make("relu"), make("topk", "layer_norm")):
        with pytest.raises(ValueError, match="use format='saelens'"):
            sae_io.export(sae, tmp_path / "a", "sparsify")
    with pytest.raises(ValueError, match="format must be one of"):
        sae_io.export(make(), tmp_path / "a", "prisma")
    assert not (tmp_path / "a").exists()
