"""Writes the folders beside it: tiny SAEs saved by SAELens and sparsify, and what those libraries compute with them.

    pip install sae-lens==6.54.12 eai-sparsify==1.3.3 && python tests/sae/golden/make_golden.py

clipsteer is not needed, and takes no part: expected.safetensors holds the peer's input x, dense acts and x_hat.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
D_IN, D_SAE, ROWS = 6, 16, 7
HERE = Path(__file__).parent


def randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values.abs() * 0.5 if name == "threshold" else values * (0.3 if name == "r_mag" else 1.0))


def draw(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(ROWS, D_IN, generator=generator) * 2 + 0.5


def tidy(folder: Path, x: torch.Tensor, acts: torch.Tensor, x_hat: torch.Tensor) -> None:
    save_file({"x": x, "acts": acts.contiguous(), "x_hat": x_hat.contiguous()}, folder / "expected.safetensors")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=1) + "\n")


@torch.no_grad()
def saelens(generator: torch.Generator) -> None:
    from sae_lens.saes import gated_sae, jumprelu_sae, standard_sae, topk_sae

    cases = {
        "standard": (standard_sae.StandardSAE, standard_sae.StandardSAEConfig, {}),
        "standard-constant-norm": (
            standard_sae.StandardSAE,
            standard_sae.StandardSAEConfig,
            {"normalize_activations": "constant_norm_rescale", "apply_b_dec_to_input": False},
        ),
        "topk": (topk_sae.TopKSAE, topk_sae.TopKSAEConfig, {"k": 4, "normalize_activations": "layer_norm"}),
        "topk-rescaled": (topk_sae.TopKSAE, topk_sae.TopKSAEConfig, {"k": 4, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": (jumprelu_sae.JumpReLUSAE, jumprelu_sae.JumpReLUSAEConfig, {}),
        "gated": (
            gated_sae.GatedSAE,
            gated_sae.GatedSAEConfig,
            {"normalize_activations": "layer_norm"},
        ),
    }
    for name, (kind, config, options) in cases.items():
        cfg = config(d_in=D_IN, d_sae=D_SAE, **options)
        cfg.metadata.model_name, cfg.metadata.hook_name = "open-clip:ViT-B-32", "blocks.9.hook_resid_post"
        sae, x = kind(cfg), draw(generator)
        randomize(sae, generator)
        folder = HERE / f"saelens-{name}"
        sae.save_model(folder)
        tidy(folder, x, sae.encode(x), sae(x))


def both_forms(sae: Any, name: str, generator: torch.Generator) -> None:
    """A trained SAE as its checkpoint and as its inference model; the latter says what both compute."""
    from sae_lens import SAE

    randomize(sae, generator)
    sae.topk_threshold.fill_(1.25)
    x = draw(generator)
    folders = [HERE / f"saelens-{name}-inference", HERE / f"saelens-{name}-checkpoint"]
    sae.save_inference_model(folders[0])
    sae.save_model(folders[1])
    inference = SAE.load_from_disk(folders[0])
    for folder in folders:
        tidy(folder, x, inference.encode(x), inference(x))


@torch.no_grad()
def saelens_batchtopk(generator: torch.Generator) -> None:
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3.0))
    both_forms(sae, "batchtopk", generator)


@torch.no_grad()
def sparsify(generator: torch.Generator) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    for name, options in {"topk": {"num_latents": D_SAE}, "topk-expansion": {"expansion_factor": 3}}.items():
        sae, x = SparseCoder(D_IN, SparseCoderConfig(k=4, **options)), draw(generator)
        randomize(sae, generator)
        folder = HERE / f"sparsify-{name}"
        sae.save_to_disk(folder)
        top = sae.encode(x)
        acts = torch.zeros(ROWS, sae.num_latents).scatter(-1, top.top_indices, top.top_acts)
        tidy(folder, x, acts, sae.decode(top.top_acts, top.top_indices))


@torch.no_grad()
def saelens_matryoshka(generator: torch.Generator) -> None:
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )

    cfg = MatryoshkaBatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3.0, matryoshka_widths=[2, 7, D_SAE])
    sae = MatryoshkaBatchTopKTrainingSAE(cfg)
    both_forms(sae, "matryoshka", generator)


@torch.no_grad()
def saelens_transcoders(generator: torch.Generator) -> None:
    from sae_lens.saes import transcoder as zoo

    cases = {
        "transcoder": (zoo.Transcoder, zoo.TranscoderConfig, {}),
        "transcoder-layer-norm": (zoo.Transcoder, zoo.TranscoderConfig, {"normalize_activations": "layer_norm"}),
        "transcoder-skip": (zoo.SkipTranscoder, zoo.SkipTranscoderConfig, {}),
        "transcoder-jumprelu": (zoo.JumpReLUTranscoder, zoo.JumpReLUTranscoderConfig, {}),
        "transcoder-jumprelu-skip": (zoo.JumpReLUSkipTranscoder, zoo.JumpReLUSkipTranscoderConfig, {}),
    }
    for name, (kind, config, options) in cases.items():
        cfg = config(d_in=D_IN, d_out=D_IN - 1, d_sae=D_SAE, apply_b_dec_to_input=False, **options)
        cfg.metadata.model_name, cfg.metadata.hook_name = "open-clip:ViT-B-32", "blocks.9.hook_resid_post"
        sae, x = kind(cfg), draw(generator)
        randomize(sae, generator)
        folder = HERE / f"saelens-{name}"
        sae.save_model(folder)
        tidy(folder, x, sae.encode(x), sae(x))


@torch.no_grad()
def sparsify_transcoders(generator: torch.Generator) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    cases = {
        "transcoder": {"transcode": True},
        "transcoder-skip": {"transcode": True, "skip_connection": True},
        # an autoencoder that adds W_skip x
        "transcoder-only-skip": {"skip_connection": True},
    }
    for name, options in cases.items():
        sae, x = SparseCoder(D_IN, SparseCoderConfig(k=4, num_latents=D_SAE, **options)), draw(generator)
        randomize(sae, generator)
        folder = HERE / f"sparsify-{name}"
        sae.save_to_disk(folder)
        top = sae.encode(x)
        acts = torch.zeros(ROWS, sae.num_latents).scatter(-1, top.top_indices, top.top_acts)
        tidy(folder, x, acts, sae(x).sae_out)


if __name__ == "__main__":
    makers = (saelens, saelens_batchtopk, sparsify, saelens_matryoshka, saelens_transcoders, sparsify_transcoders)
    for number, make in enumerate(makers):
        make(torch.Generator().manual_seed(number))
