"""SAEs as ONNX models: the same sets of features in onnxruntime, from torch's two exporters."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipsteer import SAE, ops
from clipsteer.sae.architectures import ARCHITECTURES

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore")


class Part(nn.Module):
    """One method of an SAE, its tensors alone."""

    def __init__(self, sae: nn.Module, what: str) -> None:
        super().__init__()
        self.sae, self.what = sae, what

    def forward(self, x: Tensor) -> Any:
        result = getattr(self.sae, self.what)(x)
        return result if isinstance(result, Tensor) else tuple(t for t in tuple(result)[:3] if t is not None)


def exported(module: nn.Module, x: Tensor, dynamo: bool) -> Any:
    """An onnxruntime session of a module, whose batch may have any size."""
    if dynamo:
        pytest.importorskip("onnxscript")
        program = torch.onnx.export(
            module, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False
        )
        model = program.model_proto
    else:
        file = io.BytesIO()
        torch.onnx.export(
            module, (x,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "rows"}}, opset_version=18
        )
        model = onnx.load_from_string(file.getvalue())
    assert {opset.domain for opset in model.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
    if getattr(module, "sae", module).architecture == "topk":
        assert "TopK" in {node.op_type for node in model.graph.node}
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session: Any, x: Tensor) -> list[Tensor]:
    return [torch.from_numpy(t) for t in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("what", ["forward", "encode"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_sae_in_onnxruntime(architecture: str, what: str, dynamo: bool) -> None:
    torch.manual_seed(0)
    sae = SAE(16, 64, architecture, 4, normalize="layer_norm").eval()
    module = Part(sae, what).eval()
    session = exported(module, torch.randn(6, 16), dynamo)
    for rows in (1, 33):
        x = torch.randn(rows, 16)
        with torch.no_grad():
            expected = module(x)
        expected = [expected] if isinstance(expected, Tensor) else list(expected)
        found = run(session, x)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        if architecture == "topk" and what == "forward":
            assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("dynamo", [True, False])
def test_ties_and_nan_in_onnxruntime(dynamo: bool) -> None:
    class Encode(nn.Module):
        architecture = "topk"

        def __init__(self) -> None:
            super().__init__()
            # of every row 8 copies, and so of every pre-activation
            self.W = nn.Parameter(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).repeat(8, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return ops.topk_encode(x, self.W, k=10)

    module = Encode().eval()
    session = exported(module, torch.randn(3, 5), dynamo)
    x = torch.randn(20, 5)
    acts, indices = run(session, x)
    expected = ops.topk_encode(x, module.W.detach(), k=10, backend="reference")
    torch.testing.assert_close(acts, expected[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(indices, expected[1])
    x[3] = 0  # every pre-activation is 0
    x[4, 1] = float("nan")
    acts, indices = run(session, x)
    assert indices[3].tolist() == list(range(10))
    assert bool(acts[4].isnan().all())
