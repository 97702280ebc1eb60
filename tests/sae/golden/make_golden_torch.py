"""Writes the folders beside it that hold files of torch.save: tiny SAEs of dictionary_learning, ViSAEBench, saev and
overcomplete, and what those libraries compute with them.

    pip install dictionary-learning==0.1.0 visaebench==0.1.0 saev==0.1.0 overcomplete==0.3.0
    python tests/sae/golden/make_golden_torch.py

clipsteer is not needed, and takes no part: expected.safetensors holds the peer's input x, dense acts and x_hat.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

D_IN, D_SAE, ROWS = 6, 16, 7
HERE = Path(__file__).parent


def randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name == "threshold":
                values = values.abs() * 0.5
            parameter.copy_(values * 0.3 if name == "r_mag" else values)


def draw(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(ROWS, D_IN, generator=generator) * 2 + 0.5


def expect(folder: Path, x: torch.Tensor, acts: torch.Tensor, x_hat: torch.Tensor) -> None:
    save_file({"x": x, "acts": acts.contiguous(), "x_hat": x_hat.contiguous()}, folder / "expected.safetensors")


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


@torch.no_grad()
def dictionary_learning(generator: torch.Generator) -> None:
    """Written as ``trainSAE`` of the library writes, read by its own ``load_dictionary``."""
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    sizes = (D_IN, D_SAE)
    cases: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]] = {
        "standard": (lambda: dictionary.AutoEncoder(*sizes), {}),
        "new": (lambda: dictionary.AutoEncoderNew(*sizes), {}),
        "gated": (lambda: dictionary.GatedAutoEncoder(*sizes), {}),
        "jumprelu": (lambda: dictionary.JumpReluAutoEncoder(*sizes), {}),
        "topk": (lambda: AutoEncoderTopK(*sizes, 4), {"k": 4}),
        "batchtopk": (lambda: BatchTopKSAE(*sizes, 3), {"k": 3}),
        "matryoshka": (
            lambda: MatryoshkaBatchTopKSAE(*sizes, 3, [2, 5, 9]),
            {"k": 3, "group_fractions": [0.125, 0.3125, 0.5625], "group_sizes": [2, 5, 9]},
        ),
    }
    for name, (build, options) in cases.items():
        sae, x = build(), draw(generator)
        randomize(sae, generator)
        if name in ("topk", "batchtopk", "matryoshka"):
            sae.threshold.fill_(1.25)
        folder = HERE / f"dictionary_learning-{name}"
        folder.mkdir(exist_ok=True)
        torch.save(sae.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": type(sae).__name__, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 9}
        trainer |= {"lm_name": "ViT-B-32", "submodule_name": "visual.transformer.resblocks.9", **options}
        write_config(folder, {"trainer": trainer, "buffer": {"d_submodule": D_IN, "io": "out"}})
        loaded = load_dictionary(str(folder), "cpu")[0]
        expect(folder, x, loaded.encode(x), loaded(x))


@torch.no_grad()
def visaebench(generator: torch.Generator) -> None:
    from visaebench.hub import load_sae

    cases = {
        "topk": {"activation": "topk", "k": 4},
        "batchtopk": {"activation": "batchtopk", "k": 3, "threshold": 1.25, "backbone": "clip_vitb16"},
        "jumprelu": {"sae_type": "JumpReLU"},
        "overcomplete": {"architecture": "batchtopk", "k": 3},
    }
    for name, config in cases.items():
        weights = {
            "encoder.weight": torch.randn(D_SAE, D_IN, generator=generator),
            "encoder.bias": torch.randn(D_SAE, generator=generator),
            "decoder.weight": torch.randn(D_SAE, D_IN, generator=generator),
            "decoder.bias": torch.randn(D_IN, generator=generator),
        }
        x = draw(generator)
        if name == "batchtopk":
            # a bias of the decoder is optional
            del weights["decoder.bias"]
            # the first feature is just at its threshold for every row, and kept
            weights["encoder.weight"][0] = 0
            weights["encoder.bias"][0] = 1.25
        elif name == "jumprelu":
            weights["jump_thresholds"] = torch.rand(D_SAE, generator=generator)
        elif name == "overcomplete":
            # as ViSAEBench's own training saves it
            weights = {
                "encoder.final_block.0.weight": weights["encoder.weight"],
                "encoder.final_block.0.bias": weights["encoder.bias"],
                "dictionary._weights": weights["decoder.weight"],
                "dictionary.multiplier": torch.tensor(0.25),
                "_running_threshold": torch.tensor(0.75),
            }
        folder = HERE / f"visaebench-{name}"
        folder.mkdir(exist_ok=True)
        torch.save(weights, folder / "sae.pt")
        write_config(folder, config)
        codes, x_hat = load_sae(str(folder), device="cpu")(x)
        expect(folder, x, codes, x_hat)


@torch.no_grad()
def saev(generator: torch.Generator) -> None:
    from saev import config, nn

    sae, x = nn.SparseAutoencoder(config.SparseAutoencoder(d_vit=D_IN, exp_factor=3)), draw(generator)
    randomize(sae, generator)
    folder = HERE / "saev-relu"
    nn.dump(str(folder / "sae.pt"), sae)
    x_hat, acts, _ = nn.load(str(folder / "sae.pt"))(x)
    expect(folder, x, acts, x_hat)


@torch.no_grad()
def overcomplete(generator: torch.Generator) -> None:
    from overcomplete import sae as zoo

    points = torch.randn(5, D_IN, generator=generator)
    cases: dict[str, tuple[torch.nn.Module, dict[str, Any]]] = {
        "topk": (zoo.TopKSAE(D_IN, D_SAE, top_k=4), {"top_k": 4}),
        "topk-tied": (
            zoo.TopKSAE(D_IN, D_SAE, top_k=4, dictionary_params={"normalization": "max_l1", "use_multiplier": True}),
            {"top_k": 4, "dictionary_params": {"normalization": "max_l1", "use_multiplier": True}},
        ),
        "batchtopk": (zoo.BatchTopKSAE(D_IN, D_SAE, top_k=21), {"top_k": 21}),
        "jumprelu": (
            zoo.JumpSAE(D_IN, D_SAE, dictionary_params={"normalization": "identity"}),
            {"dictionary_params": {"normalization": "identity"}},
        ),
        "archetypal": (zoo.RATopKSAE(D_IN, D_SAE, points, top_k=4, delta=0.5), {"top_k": 4, "delta": 0.5}),
        "untied": (zoo.JumpSAE(D_IN, D_SAE).untied(bias=True), {}),
    }
    for name, (sae, options) in cases.items():
        if name == "topk-tied":
            sae.tied(bias=True)
        randomize(sae, generator)
        x = draw(generator)
        if name == "batchtopk":
            sae.train()
            sae(x)
            options = options | {"threshold": float(sae.running_threshold)}
        folder = HERE / f"overcomplete-{name}"
        folder.mkdir(exist_ok=True)
        torch.save(sae.state_dict(), folder / "sae.pt")
        write_config(folder, {"class": type(sae).__name__, "input_shape": D_IN, "nb_concepts": D_SAE, **options})
        # the dictionary is fused when it goes over to evaluation
        sae.train()
        sae.eval()
        _, codes, x_hat = sae(x)
        expect(folder, x, codes, x_hat)


if __name__ == "__main__":
    for number, make in enumerate((dictionary_learning, visaebench, saev, overcomplete)):
        make(torch.Generator().manual_seed(10 + number))
