"""sparsify's own trainer over a small language model, with its own functions and with ours: 50 steps, then files."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
import torch

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernel is for GPUs
sparsify = pytest.importorskip("sparsify")
transformers = pytest.importorskip("transformers")

from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer, sparse_coder  # noqa: E402

from clipsteer import integrations  # noqa: E402
from clipsteer.integrations._codes import Preactivations  # noqa: E402
from clipsteer.integrations._on_demand import waits  # noqa: E402

D, N, STEPS = 32, 256, 50
WAYS = (integrations.sparsify, contextlib.nullcontext)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it comes": ({}, {}),
    "adam": ({}, {"optimizer": "adam"}),
    "AuxK": ({}, {"optimizer": "adam", "auxk_alpha": 1 / 32, "dead_feature_threshold": 100}),
    "multi top-k": ({"multi_topk": True}, {"optimizer": "adam"}),
    "transcoder": ({"transcode": True, "skip_connection": True}, {"optimizer": "adam"}),
    "groupmax": ({"activation": "groupmax"}, {"optimizer": "adam"}),
    "micro-batches": ({}, {"optimizer": "adam", "micro_acc_steps": 2}),
}


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def trained(case: str, monkeypatch: pytest.MonkeyPatch, folder: Any) -> tuple[SparseCoder, list[list[float]]]:
    sae, options = CASES[case]
    losses: list[list[float]] = []
    forward = SparseCoder.forward

    def recorded(self, *args, **named):
        out = forward(self, *args, **named)
        losses.append([float(out.fvu), float(out.auxk_loss), float(out.multi_topk_fvu)])
        return out

    draw = torch.Generator().manual_seed(1)
    tokens = [{"input_ids": torch.randint(0, 64, (16,), generator=draw)} for _ in range(4 * STEPS)]
    settings = TrainConfig(
        SparseCoderConfig(num_latents=N, k=8, **sae), batch_size=4, hookpoints=["layers.0.mlp"], lr=1e-3,
        lr_warmup_steps=0, log_to_wandb=False, save_dir=str(folder), run_name="run", **options,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(SparseCoder, "forward", recorded)
        trainer = Trainer(settings, tokens, model())
        trainer.fit()
    torch.set_float32_matmul_precision("highest")
    return trainer.saes["layers.0.mlp"], losses


@pytest.mark.parametrize("case", CASES)
def test_fifty_steps(case, monkeypatch, tmp_path):
    runs = []
    for number, way in enumerate(WAYS):
        with way():
            runs.append(trained(case, monkeypatch, tmp_path / str(number)))
    a, b = (torch.tensor(losses) for _, losses in runs)
    assert len(a) == STEPS * CASES[case][1].get("micro_acc_steps", 1)
    assert len(set(b[:, 0].tolist())) > STEPS / 2
    assert float(((a - b).abs() / b[:, :1]).max()) <= 1e-6
    assert (float(b[:, 1].max()) > 0) == (case == "AuxK")
    assert (float(b[:, 2].max()) > 0) == (case == "multi top-k")
    if case != "as it comes":  # signum moves what has a gradient of rounding as far as the rest
        for name, tensor in runs[1][0].state_dict().items():
            assert float((runs[0][0].state_dict()[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()), name
    # files are sparsify's, whoever wrote them, and read the same inside and outside
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(5))
    for number in (0, 1):
        path = tmp_path / str(number) / "run" / "layers.0.mlp"
        outputs = []
        for way in WAYS:
            with way():
                outputs.append(SparseCoder.load_from_disk(path)(x).sae_out)
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_pre_acts_are_built_when_they_are_looked_at():
    torch.manual_seed(0)
    coder = SparseCoder(D, SparseCoderConfig(num_latents=N, k=8))
    x = torch.randn(7, D)
    theirs = coder.encode(x)
    with integrations.sparsify():
        ours = coder.encode(x)
        assert waits(ours.pre_acts, Preactivations)
        assert not ours.pre_acts.requires_grad
        torch.testing.assert_close(ours.top_acts.sort(-1).values, theirs.top_acts.sort(-1).values)
        torch.testing.assert_close(ours.pre_acts.clone(), theirs.pre_acts)
    assert not theirs.pre_acts.is_sparse


def test_everything_is_as_it_was_afterwards():
    places = [(sparse_coder, "fused_encoder"), (sparse_coder, "decoder_impl"), (sparsify.sign_sgd.SignSGD, "step")]
    before = [getattr(*place) for place in places]

    def fails() -> None:
        with integrations.sparsify():
            assert all(getattr(*place) is not old for place, old in zip(places, before))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert all(getattr(*place) is old for place, old in zip(places, before))
