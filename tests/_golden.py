"""Files of other libraries' SAEs and what those libraries compute with them, held against clipsteer's own."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from hypothesis import strategies as st

from clipsteer import SAE
from clipsteer.io.files import read_safetensors
from clipsteer.sae.normalization import normalize

# before sparsify is imported: on a CPU its Triton cannot run
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
GOLDEN = Path(__file__).parent / "sae" / "golden"
# whose b_dec was subtracted from the input and is in the encoder's bias here
FOLDED = ("sparsify-transcoder-only-skip",)


def folders(*, cfg: bool) -> list[str]:
    """Those with a cfg.json, or those with files of torch.save."""
    found = [path for path in GOLDEN.iterdir() if (path / "expected.safetensors").is_file()]
    return sorted(path.name for path in found if (path / "cfg.json").is_file() == cfg)


@torch.no_grad()
def assert_computes(
    sae: SAE, x: torch.Tensor, acts: torch.Tensor, x_hat: torch.Tensor, *, folded: bool = False
) -> None:
    """Another library's float32 results are ours, within the a priori error of both: every sum of m terms carries at
    most m·2⁻²⁴ of the sum of magnitudes, the encoder has d_in + 8 operations, the decoder d_sae + 4, two sides; a skip
    connection adds d_in. ``folded``: one side subtracts b_dec from its input, where the other has W_enc b_dec in its
    bias, which therefore is of the size of both."""
    out = sae(x)
    stats = normalize(x, sae.normalize, x.dtype)[1]
    mean = torch.zeros(()) if stats.mean is None else stats.mean.abs()
    scale = torch.ones(()) if stats.scale is None else stats.scale
    gain = sae.r_mag.exp() if sae.architecture == "gated" else torch.ones(())
    bias = sae.b_mag if sae.architecture == "gated" else sae.b_enc
    centre = sae.b_dec.abs() if sae.d_out is None or folded else torch.zeros(())
    size = ((x.abs() + mean) / scale + (2 if folded else 1) * centre) @ sae.W_enc.abs().T * gain + bias.abs()
    unit = 2.0**-23
    assert_within(sae.encode(x), acts, (sae.d_in + 8) * unit * size)
    size = size @ sae.W_dec.abs() + sae.b_dec.abs()
    if sae.d_out is None:
        size = size * scale + mean
    if sae.skip:
        size = size + x.abs() @ sae.W_skip.abs().T
    operations = sae.d_in + sae.d_sae + 12 + sae.d_in * sae.skip
    assert_within(out.x_hat, x_hat, operations * unit * size)


def assert_within(got: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert bool(((got - expected).abs() <= bound).all()), float(((got - expected).abs() / bound).max())


def run_golden(folder: Path) -> SAE:
    sae, expected = SAE.from_pretrained(folder), read_safetensors(folder / "expected.safetensors")
    assert not sae.training
    assert all(p.requires_grad and p.is_contiguous() for p in sae.parameters())
    assert expected["acts"].any()
    folded = folder.name in FOLDED
    assert_computes(sae, expected["x"], expected["acts"], expected["x_hat"], folded=folded)
    return sae


def write_golden_live(folder: Path, script: str, function: str) -> None:
    """Let the library that is installed write other files than those kept."""
    spec = importlib.util.spec_from_file_location(script, GOLDEN / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.HERE = folder
    getattr(module, function)(torch.Generator().manual_seed(99))


SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
VALUES = st.recursive(
    SIMPLE, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)


def disturb(weights: dict[str, torch.Tensor], data: st.DataObject) -> None:
    """Give one tensor another shape and dtype, or none."""
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(weights)))
        shape = data.draw(st.lists(st.sampled_from([0, 1, 6, 16]), max_size=3))
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
        weights[key] = torch.zeros(shape, dtype=dtype)
