"""Small valid files of every kind that the package reads, and who reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tests._golden import GOLDEN

import clipsteer
from clipsteer import SAE, FileFormatError, wise_ft
from clipsteer.conceptors import Conceptor
from clipsteer.continual.covariance import ClassStatistics
from clipsteer.continual.lora import LoRA
from clipsteer.continual.metrics import Run
from clipsteer.continual.report import FORMAT, read_results
from clipsteer.io.files import read_json, read_safetensors, read_text, write_json, write_safetensors
from clipsteer.io.torch_files import read_torch_weights_only
from clipsteer.reference import features
from clipsteer.sae import formats
from clipsteer.splice import ConceptDictionary
from clipsteer.testing import records
from clipsteer.testing.table import markdown

Weights = dict[str, torch.Tensor]
Save = Callable[[Weights, Path], object]


class Reader(NamedTuple):
    make: Callable[[Path], object]  # valid files in a folder
    read: Callable[[Path], object]  # what is in them
    full: int  # cases of the whole run
    documented: tuple[type[Exception], ...] = ()  # beside FileFormatError


def sae(folder: Path, architecture: str = "topk", normalize: str = "none") -> SAE:
    made = SAE(6, 16, architecture, 4, normalize=normalize, metadata={"clip_model": "ViT-B-32", "tokens": "all"})
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape))
    return made


def golden(name: str) -> Callable[[Path], object]:
    """Files that the library itself wrote, without what it computes with them."""
    ignore = shutil.ignore_patterns("expected.safetensors")
    return lambda folder: shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True, ignore=ignore)


def prisma(folder: Path, inside: bool) -> None:
    weights = {
        "W_enc": torch.randn(6, 16),
        "W_dec": torch.randn(16, 6),
        "b_enc": torch.randn(16),
        "b_dec": torch.randn(6),
    }
    cfg = {
        "d_in": 6, "d_sae": 16, "architecture": "standard",
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4},
        "normalize_activations": "layer_norm", "hook_point_layer": 9, "layer_subtype": "hook_resid_post",
        "model_name": "open-clip:x/y", "cls_token_only": False, "use_patches_only": False,
    }  # fmt: skip
    if inside:
        torch.save({"cfg": cfg, "state_dict": weights}, folder / "n_images_12.pt")
    else:
        torch.save(weights, folder / "weights.pt")
        write_json(folder / "config.json", cfg)


ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


def clip_weights() -> Weights:
    open_clip = pytest.importorskip("open_clip")
    return open_clip.CLIP(**json.loads(json.dumps(ARCHITECTURE))).state_dict()


def clip(folder: Path, save: Save, name: str) -> None:
    write_json(folder / "fuzzed-clip.json", ARCHITECTURE)
    save(clip_weights(), folder / name)


def in_safetensors(weights: Weights, path: Path) -> None:
    write_safetensors(path, weights, {"format": "pt"})


def saved_as_numpy(weights: Weights, path: Path) -> None:
    np.savez(path, **{name: tensor.numpy() for name, tensor in weights.items()})


def saved_before_archives(weights: Weights, path: Path) -> None:
    torch.save(weights, path, _use_new_zipfile_serialization=False)


def run_folder(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", clip_weights())
    write_json(folder / "architecture.json", ARCHITECTURE)
    write_json(
        folder / "config.json", {"model": "architecture.json", "classes": ["cat", "dog"], "settings": {"lr": 1e-3}}
    )
    write_safetensors(folder / "head.safetensors", {"weight": torch.randn(2, 16), "bias": torch.zeros(2)})


def local_dir(folder: Path) -> None:
    write_safetensors(folder / "open_clip_model.safetensors", clip_weights())
    write_json(
        folder / "open_clip_config.json", {"model_cfg": ARCHITECTURE, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    )


def ends() -> list[Weights]:
    return [{"a.weight": torch.randn(6, 5), "b": torch.randn(7), "steps": torch.tensor(3)} for _ in range(2)]


def two(folder: Path, save: Save, suffix: str) -> None:
    for name, weights in zip("ab", ends()):
        save(weights, folder / f"{name}{suffix}")


def sharded(folder: Path, save: Save, stem: str, suffix: str) -> None:
    for name, weights in zip("ab", ends()):
        (folder / name).mkdir()
        files = {"a.weight": f"{stem}-1{suffix}", "b": f"{stem}-2{suffix}", "steps": f"{stem}-2{suffix}"}
        for file in set(files.values()):
            save({n: weights[n] for n in weights if files[n] == file}, folder / name / file)
        write_json(folder / name / f"{stem}{suffix}.index.json", {"metadata": {"total_size": 9}, "weight_map": files})


def checkpoint(weights: Weights, path: Path) -> None:
    torch.save({"model": {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}, "epoch": 3}, path)


def merged(folder: Path, suffix: str = "") -> None:
    wise_ft(folder / f"a{suffix}", folder / f"b{suffix}", [0.0, 0.3, 1.0])
    wise_ft(folder / f"a{suffix}", folder / f"b{suffix}", 0.5, folder / "out.safetensors")


def tower() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2), torch.nn.Linear(8, 8))


def lora(folder: Path) -> None:
    made = LoRA(tower(), rank=2)
    made.begin_task()
    made.save(folder / "lora.safetensors")


class Pairs:
    """What ``features.read`` asks of a data set."""

    def __len__(self) -> int:
        return 5


def reference(folder: Path) -> None:
    image, text = torch.randn(5, 4), torch.randn(5, 4)
    features.ReferenceFeatures(image, text, "name", "", "w").save(folder / "f.safetensors")


def results(folder: Path) -> None:
    run = Run("one", 0, [[0], [1]], {"lr": 1.0})
    record = {"correct": [3], "count": [4], "seconds": 1.5, "peak_mb": None, "drift": None}
    data = run.to_json() | {"records": {"0": record}}
    write_json(folder / "runs.json", {"format": FORMAT, "notes": {"note": "x"}, "runs": [data]})


def bench(folder: Path) -> None:
    row = {"op": "topk_encode", "shape": "s", "pass": "forward", "contender": "cpp", "baseline": "torch"}
    row |= {"seconds": 1e-3, "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1, "floor_share": 0.5}
    machine = {"chip": "c", "threads": 1, "torch": "2"}
    rows = [row, row | {"contender": "torch", "speedup": 1.0}]
    write_json(folder / "bench.json", {"machine": machine, "records": rows})


def compared(folder: Path) -> None:
    now = {"op": "topk_encode", "shape": "s", "pass": "forward", "contender": "cpp", "baseline": "torch"}
    records.compare(folder / "bench.json", [now | {"seconds": 1e-3, "speedup": 2.0}])
    markdown([folder / "bench.json"])


def dictionary(folder: Path) -> None:
    ConceptDictionary(["a", "b", "c"], torch.randn(3, 5), torch.randn(5), {"clip_model": "x"}).save(folder / "d")


def statistics(folder: Path) -> None:
    made = ClassStatistics(2, 3)
    made.update(torch.randn(9, 3), torch.arange(9) % 2)
    made.save(folder / "s.safetensors")


def plain_files(folder: Path) -> None:
    write_safetensors(folder / "a.safetensors", {"a": torch.ones(3), "b": torch.ones(2, 2).bool()}, {"k": "v"})
    torch.save({"a": torch.ones(3), "t": [torch.ones(2), {"x": 3}]}, folder / "b.pt")
    write_json(folder / "c.json", {"a": [1, 2.5, None, {"b": "ü"}]})
    (folder / "d.txt").write_text("wörter\n" * 20, encoding="utf-8")


def each_plain(folder: Path) -> None:
    wrong = []
    ways = {"a.safetensors": read_safetensors, "b.pt": read_torch_weights_only, "c.json": read_json, "d.txt": read_text}
    for name, read in ways.items():
        try:
            read(folder / name)
        except FileFormatError as error:
            wrong.append(error)
    for error in wrong:
        raise error


def timm_tower(folder: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    write_safetensors(folder / "w.safetensors", timm.create_model("test_vit", num_classes=0).state_dict())


def loaded(folder: Path, name: str) -> None:
    clipsteer.load(folder / "fuzzed-clip.json", folder / name)


# what load and wise_ft say of a name that a file gives, or of two models that do not match
NAMES = (ValueError, FileNotFoundError)
READERS = {
    "plain files": Reader(plain_files, each_plain, 1300),
    "SAE": Reader(lambda f: sae(f).save_pretrained(f), SAE.from_pretrained, 950),
    "SAE, jumprelu": Reader(lambda f: sae(f, "jumprelu", "layer_norm").save_pretrained(f), SAE.from_pretrained, 300),
    "SAE of SAELens": Reader(lambda f: formats.export(sae(f, "gated"), f, "saelens"), SAE.from_pretrained, 950),
    "SAE of sparsify": Reader(lambda f: formats.export(sae(f), f, "sparsify"), SAE.from_pretrained, 650),
    "SAE of Prisma": Reader(lambda f: prisma(f, inside=True), SAE.from_pretrained, 1300),
    "SAE of Prisma, two files": Reader(lambda f: prisma(f, inside=False), SAE.from_pretrained, 650),
    "SAE of SAELens, transcoder": Reader(golden("saelens-transcoder-jumprelu-skip"), SAE.from_pretrained, 450),
    "SAE of SAELens, matryoshka": Reader(golden("saelens-matryoshka-checkpoint"), SAE.from_pretrained, 450),
    "SAE of dictionary_learning": Reader(golden("dictionary_learning-matryoshka"), SAE.from_pretrained, 950),
    "SAE of dictionary_learning, linear": Reader(golden("dictionary_learning-standard"), SAE.from_pretrained, 450),
    "SAE of ViSAEBench": Reader(golden("visaebench-batchtopk"), SAE.from_pretrained, 950),
    "SAE of saev": Reader(golden("saev-relu"), SAE.from_pretrained, 1300),
    "SAE of overcomplete": Reader(golden("overcomplete-archetypal"), SAE.from_pretrained, 950),
    "conceptor": Reader(
        lambda f: Conceptor.fit(torch.randn(20, 5), 3.0, mean=torch.zeros(5)).save(f / "c.safetensors"),
        lambda f: Conceptor.load(f / "c.safetensors"), 950,
    ),
    "concept dictionary": Reader(dictionary, lambda f: ConceptDictionary.load(f / "d"), 750),
    "class statistics": Reader(statistics, lambda f: ClassStatistics.load(f / "s.safetensors"), 650),
    "LoRA": Reader(lora, lambda f: LoRA.load(tower(), f / "lora.safetensors"), 650, (ValueError,)),
    "reference features": Reader(reference, lambda f: features.read(f / "f.safetensors", Pairs()), 650, (ValueError,)),
    "results of runs": Reader(results, lambda f: read_results(f / "runs.json"), 500),
    "benchmark": Reader(bench, compared, 500),
    "merged safetensors": Reader(
        lambda f: two(f, in_safetensors, ".safetensors"), lambda f: merged(f, ".safetensors"), 750, NAMES
    ),
    "merged torch files": Reader(lambda f: two(f, checkpoint, ".pt"), lambda f: merged(f, ".pt"), 800, NAMES),
    "merged shards": Reader(lambda f: sharded(f, in_safetensors, "model", ".safetensors"), merged, 650, NAMES),
    "merged torch shards": Reader(lambda f: sharded(f, torch.save, "pytorch_model", ".bin"), merged, 650, NAMES),
    "run": Reader(run_folder, clipsteer.load, 300, NAMES),
    "classifier": Reader(run_folder, clipsteer.clip.load_classifier, 250, NAMES),
    "local-dir": Reader(local_dir, lambda f: clipsteer.load(f"local-dir:{f}"), 250, NAMES),
    "weights in safetensors": Reader(
        lambda f: clip(f, in_safetensors, "w.safetensors"), lambda f: loaded(f, "w.safetensors"), 300, NAMES
    ),
    "weights in a torch file": Reader(lambda f: clip(f, torch.save, "w.pt"), lambda f: loaded(f, "w.pt"), 300, NAMES),
    "weights before archives": Reader(
        lambda f: clip(f, saved_before_archives, "w.pt"), lambda f: loaded(f, "w.pt"), 250, NAMES
    ),
    "weights in numpy's": Reader(lambda f: clip(f, saved_as_numpy, "w.npz"), lambda f: loaded(f, "w.npz"), 150, NAMES),
    "weights of timm": Reader(timm_tower, lambda f: clipsteer.load("timm:test_vit", f / "w.safetensors"), 150),
}  # fmt: skip
# whose valid files open_clip does not take for this architecture
NEVER = ("weights in numpy's",)
