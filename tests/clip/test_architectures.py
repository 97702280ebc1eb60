"""Descriptions and weights that ``load`` is given, checked before a model of their sizes is made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests._readers import ARCHITECTURE, clip_weights, local_dir, run_folder, saved_as_numpy, timm_tower

import clipsteer
from clipsteer import FileFormatError
from clipsteer.clip.architectures import check_architecture
from clipsteer.io.files import write_json, write_safetensors

open_clip = pytest.importorskip("open_clip")


def changed(part: str | None, **values: object) -> dict[str, object]:
    config = json.loads(json.dumps(ARCHITECTURE))
    (config if part is None else config[part]).update(values)
    return config


HUGE = [
    changed("vision_cfg", layers=10**6),
    changed("vision_cfg", layers=[10**6, 1, 1, 1]),
    changed("vision_cfg", width=10**6),
    changed("vision_cfg", width=1 << 14, layers=500),
    changed("vision_cfg", image_size=10**6),
    changed("vision_cfg", image_size=8000, patch_size=1),
    changed("vision_cfg", mlp_ratio=1e300),
    changed("vision_cfg", mlp_ratio=float("nan")),
    changed("vision_cfg", layers=-1),
    changed("vision_cfg", layers="12"),
    changed("vision_cfg", width=[8, 8]),
    changed("text_cfg", layers=10**6),
    changed("text_cfg", vocab_size=10**9),
    changed("text_cfg", context_length=10**6),
    changed("text_cfg", width=10**400),
    changed(None, embed_dim=10**9),
    changed(None, embed_dim=None),
    changed(None, vision_cfg=[]),
    changed(None, text_cfg=None),
    changed(None, multimodal_cfg={"layers": 10**6}),
    [],
]


@pytest.mark.parametrize("config", HUGE, ids=lambda config: f"{json.dumps(config)[:150]}"[-60:])
def test_descriptions_of_impossible_sizes(config, tmp_path):
    path = tmp_path / "clipsteer-huge.json"
    path.write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match=r"clipsteer-huge\.json"):
        clipsteer.load(path)
    write_safetensors(tmp_path / "open_clip_model.safetensors", {"a": torch.ones(1)})
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(FileFormatError, match=r"open_clip_config\.json"):
        clipsteer.load(f"local-dir:{tmp_path}")


def test_a_description_of_more_parameters_than_the_file_has_bytes(tmp_path):
    """A folder of a few kilobytes that says ViT-L."""
    run_folder(tmp_path)
    large = {"layers": 24, "width": 1024, "patch_size": 14, "image_size": 224}
    write_json(tmp_path / "architecture.json", changed("vision_cfg", **large))
    with pytest.raises(FileFormatError, match=r"describes 3\.\d+e\+08 parameters; .*model\.safetensors has \d+ bytes"):
        clipsteer.load(tmp_path)


def test_every_architecture_of_open_clip_is_within_the_limits():
    """With the number of parameters as it is, to a few percent; for those of open_clip's own modules."""
    for name in open_clip.list_models():
        check_architecture(name, open_clip.get_model_config(name))


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "RN50x4", "ViT-S-16-alt", "coca_base"])
def test_the_count_of_parameters_is_that_of_the_model(name, tmp_path):
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    small, large = tmp_path / "small", tmp_path / "large"
    for path, size in ((small, 0.5 * count), (large, 1.5 * count)):
        with path.open("wb") as file:
            file.truncate(int(size))  # a hole
    check_architecture(name, config, large)
    with pytest.raises(FileFormatError, match="parameters"):
        check_architecture(name, config, small)


# values that are no weights


def poisoned(weights: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    weights["visual.conv1.weight"].view(-1)[5] = value
    return weights


def in_safetensors(weights: dict[str, torch.Tensor], path: Path) -> None:
    write_safetensors(path.with_suffix(".safetensors"), weights)


def in_torch_file(weights: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({"state_dict": weights}, path.with_suffix(".pt"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("save", [in_safetensors, in_torch_file])
def test_weights_that_are_not_finite_are_refused(save, value, tmp_path):
    write_json(tmp_path / "clipsteer-finite.json", ARCHITECTURE)
    save(poisoned(clip_weights(), value), tmp_path / "w")
    (path,) = tmp_path.glob("w.*")
    with pytest.raises(FileFormatError, match=r"w\.\w+: 'visual\.conv1\.weight' holds (NaN|infinities)"):
        clipsteer.load(tmp_path / "clipsteer-finite.json", path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_folders_and_image_towers_are_held_to_the_same(value, tmp_path):
    for make, name in ((run_folder, tmp_path), (local_dir, f"local-dir:{tmp_path}")):
        make(tmp_path)
        for path in tmp_path.glob("*model.safetensors"):
            write_safetensors(path, poisoned(clip_weights(), value))
        with pytest.raises(FileFormatError, match="holds"):
            clipsteer.load(name)
    timm_tower(tmp_path)
    from clipsteer.io.files import read_safetensors

    tensors = read_safetensors(tmp_path / "w.safetensors")
    next(iter(tensors.values())).view(-1)[0] = value
    write_safetensors(tmp_path / "w.safetensors", tensors)
    with pytest.raises(FileFormatError, match="holds"):
        clipsteer.load("timm:test_vit", tmp_path / "w.safetensors")


def test_a_head_that_is_not_finite(tmp_path):
    run_folder(tmp_path)
    head = {"weight": torch.full((2, 16), float("inf")), "bias": torch.zeros(2)}
    write_safetensors(tmp_path / "head.safetensors", head)
    with pytest.raises(FileFormatError, match="'weight' holds infinities"):
        clipsteer.clip.load_classifier(tmp_path)


def test_a_numpy_archive_that_unfolds(tmp_path):
    write_json(tmp_path / "clipsteer-npz.json", ARCHITECTURE)
    np.savez_compressed(tmp_path / "w.npz", a=np.zeros(1 << 24, dtype=np.float32))
    with pytest.raises(FileFormatError, match=r"w\.npz: its members claim \d+ bytes"):
        clipsteer.load(tmp_path / "clipsteer-npz.json", tmp_path / "w.npz")
    saved_as_numpy(clip_weights(), tmp_path / "w.npz")
    with pytest.raises(FileFormatError, match="cannot be loaded as weights"):
        clipsteer.load(tmp_path / "clipsteer-npz.json", tmp_path / "w.npz")


@pytest.mark.parametrize("archive", [True, False])
def test_checkpoints_of_torch_are_read_through_open_clip(archive, tmp_path):
    write_json(tmp_path / "clipsteer-pt.json", ARCHITECTURE)
    weights = clip_weights()
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "w.pt", _use_new_zipfile_serialization=archive)
    found = clipsteer.load(tmp_path / "clipsteer-pt.json", tmp_path / "w.pt").model.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
