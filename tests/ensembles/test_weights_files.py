"""The files in which others leave weights, as ``wise_ft`` takes them."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clipsteer import FileFormatError, wise_ft
from clipsteer.io.files import read_safetensors, write_json, write_safetensors


def ends() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"visual.a.weight": (6, 5), "b": (7,), "logit_scale": ()}
    return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def under(key: str, path: Path, weights: dict[str, Tensor]) -> Path:
    settings = argparse.Namespace(lr=1e-3, layers=[1, 2])  # beside the weights of many training scripts
    torch.save({key: weights, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3, "args": settings}, path)
    return path


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_checkpoints_with_weights_under_a_key(key, tmp_path):
    first, second = ends()
    paths = [under(key, tmp_path / f"{i}.pt", weights) for i, weights in enumerate((first, second))]
    assert same(wise_ft(*paths, 0.3), wise_ft(first, second, 0.3))


PREFIXES = ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "module.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_wrappers_put_in_front_of_names(prefix, suffix, tmp_path):
    first, second = ends()
    wrapped = {prefix + name: tensor for name, tensor in second.items()}
    path = tmp_path / f"w{suffix}"
    torch.save(wrapped, path) if suffix == ".pt" else write_safetensors(path, wrapped)
    assert same(wise_ft(first, path, 0.3), wise_ft(first, second, 0.3))


def test_a_part_that_was_compiled_alone(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[1] = torch.compile(model[1])
    assert "1._orig_mod.weight" in model.state_dict()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert same(wise_ft(plain, tmp_path / "w.pt", 0.5), plain)


def test_names_that_only_look_like_a_wrappers_are_kept(tmp_path):
    weights = {"module.a": torch.ones(2), "modules": torch.ones(3), "my_orig_mod.b": torch.ones(1)}
    torch.save(weights, tmp_path / "w.pt")
    assert same(wise_ft(tmp_path / "w.pt", tmp_path / "w.pt", 0.5), weights)
    both = {"_orig_mod.a": torch.ones(2), "a": torch.zeros(2)}
    torch.save(both, tmp_path / "w.pt")
    assert same(wise_ft(tmp_path / "w.pt", tmp_path / "w.pt", 0.5), both)


def sharded(folder: Path, weights: dict[str, Tensor]) -> Path:
    """As transformers leaves a large model in torch's format."""
    folder.mkdir()
    places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(weights)}
    for file in set(places.values()):
        torch.save({name: weights[name] for name in weights if places[name] == file}, folder / file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": 99}, "weight_map": places})
    return folder


def test_shards_of_torch_files(tmp_path):
    first, second = ends()
    folders = [sharded(tmp_path / str(i), weights) for i, weights in enumerate((first, second))]
    expected = wise_ft(first, second, 0.3)
    assert same(wise_ft(*folders, 0.3), expected)
    out = wise_ft(*(folder / "pytorch_model.bin.index.json" for folder in folders), 0.3, tmp_path / "o.safetensors")
    assert same(read_safetensors(out), expected)


@pytest.mark.parametrize(
    "name", ["../x.bin", "x.exe", "x\0.bin", "y" * 300 + ".bin", "/etc/passwd", ".", "pytorch_model.bin.index.json"]
)
def test_shards_that_are_none(name, tmp_path):
    folder = sharded(tmp_path / "a", ends()[0])
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {"b": name}})
    with pytest.raises(FileFormatError, match=r"index\.json: shard|no file can have this name"):
        wise_ft(folder, folder, 0.5)


def test_a_program_with_its_weights_is_called_one(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(FileFormatError, match="TorchScript archive"):
        wise_ft(tmp_path / "w.pt", tmp_path / "w.pt", 0.5)


def test_tensors_without_values_in_memory():
    with pytest.raises(TypeError, match="'a' is on meta"):
        wise_ft({"a": torch.ones(2, device="meta")}, {"a": torch.ones(2)}, 0.5)
