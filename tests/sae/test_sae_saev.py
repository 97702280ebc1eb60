"""Files of saev: a line of JSON, whose form changed with its schemas, then what torch.save writes."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests._golden import VALUES, assert_computes, disturb

from clipsteer import SAE, FileFormatError

D, N = 6, 16


def saev_file(path: Path, header: object, weights: dict[str, torch.Tensor] | None = None) -> Path:
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(weights or saev_weights(), file)
    return path


def saev_weights(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | more


def activation(name: str, **params: object) -> dict[str, object]:
    return {"cls": name, "params": params}


OLD, NEW = {"d_vit": D, "exp_factor": 1}, {"d_model": D, "d_sae": N}
TOPK, BATCH = activation("TopK", top_k=4), activation("BatchTopK", key="batch-top-k", top_k=4, momentum=0.1)


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ({"schema": 1, "cls": "TopK", "cfg": {**NEW, "top_k": 4}}, "topk"),
        ({"schema": 1, "cls": "Relu", "cfg": NEW}, "relu"),
        ({"schema": 1, "cls": "SparseAutoencoderConfig", "cfg": NEW}, "relu"),
        ({"schema": 1, "cls": "SparseAutoencoderConfig", "cfg": {**NEW, "activation": TOPK}}, "topk"),
        ({"schema": 2, "cfg": {**NEW, "activation": activation("Relu")}}, "relu"),
        ({"schema": 3, "cfg": {**NEW, "activation": TOPK}, "lib": "0.2"}, "topk"),
        ({"schema": 4, "cfg": {**NEW, "activation": activation("BatchTopK")}}, "topk, 32"),
        ({"schema": 5, "cfg": {**NEW, "activation": BATCH}}, "batch_topk"),
    ],
    ids=str,
)
@pytest.mark.parametrize("subtracts", [True, False])
def test_the_schemas_of_saev(tmp_path, header, kind, subtracts):
    weights = saev_weights()
    if kind == "batch_topk":
        weights["activation.threshold"] = torch.tensor(0.75)
    if kind == "topk, 32":
        weights = {n: torch.cat([t] * 4, dim=t.dim() - 1 if n == "W_enc" else 0) for n, t in weights.items()}
        weights["b_dec"] = weights["b_dec"][:D]
        header = {**header, "cfg": {**header["cfg"], "d_sae": 4 * N}}
    config: dict[str, object] = {"apply_b_dec_to_input": subtracts} if header["schema"] == 1 else {}
    path = saev_file(tmp_path / "any.pt", header, weights)
    if kind.startswith("topk"):
        with pytest.raises(FileFormatError, match=r"the k largest values of a row even where they are negative"):
            SAE.from_pretrained(path, config=config)
        config["relu"] = True
    if header["schema"] == 1:
        with pytest.raises(FileFormatError, match="the file does not say; pass config="):
            SAE.from_pretrained(path, config={"relu": True})
    sae = SAE.from_pretrained(path, config=config)
    subtracted = subtracts and header["schema"] == 1
    assert (sae.architecture, sae.apply_b_dec_to_input) == (kind.split(",")[0], subtracted)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(2)) * 2 + 1
    pre = (x - weights["b_dec"] * subtracted) @ weights["W_enc"] + weights["b_enc"]
    acts = pre.relu()
    if kind.startswith("topk"):
        values, positions = acts.topk(32 if "32" in kind else 4, dim=-1)
        acts = torch.zeros_like(acts).scatter(-1, positions, values)
    elif kind == "batch_topk":
        acts = torch.where(pre > 0.75, pre, 0.0)
    assert_computes(sae, x, acts, acts @ weights["W_dec"] + weights["b_dec"])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"schema": 6, "cfg": NEW}, "schema 6 is not supported; supported are those up to 5"),
        ({"schema": 2, "cfg": NEW}, "activation None is not supported"),
        ({"schema": 2, "cfg": {**NEW, "activation": activation("Gated")}}, "activation 'Gated' is not supported"),
        ({"schema": 2}, "its first line has no cfg"),
        (OLD, r"shape \(6, 6\)"),
        ({"d_vit": D}, "exp_factor must be a positive integer"),
        ([1], "refused by weights-only loading"),
    ],
)
def test_first_lines_of_saev_that_are_refused(tmp_path, header, message):
    with pytest.raises(FileFormatError, match=message):
        SAE.from_pretrained(saev_file(tmp_path / "sae.pt", header))


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Evil.target),)


def test_nothing_behind_a_line_of_json_is_run(tmp_path):
    Evil.target = tmp_path / "ran"
    path = saev_file(tmp_path / "sae.pt", {"d_vit": D, "exp_factor": 1}, {"W_enc": Evil()})
    with pytest.raises(FileFormatError, match=f"{path}: refused by weights-only loading"):
        SAE.from_pretrained(tmp_path)
    assert not Evil.target.exists()
    path.write_bytes(b'{"d_vit": 6,}\n' + path.read_bytes())
    with pytest.raises(FileFormatError, match=f"{path}: not valid JSON"):
        SAE.from_pretrained(path)


@given(st.sampled_from([None, 1, 2, 5]), st.data())
def test_any_first_line_and_tensor_load_or_are_refused(tmp_path_factory, schema, data):
    cfg = {**NEW, "activation": data.draw(st.sampled_from([activation("Relu"), TOPK, BATCH]))}
    header = {"schema": schema, "cfg": cfg} if schema else dict(NEW)
    part = data.draw(st.sampled_from([header, cfg, cfg["activation"]]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(VALUES)
    weights = saev_weights(**{"activation.threshold": torch.tensor(0.5)} if schema == 5 else {})
    disturb(weights, data)
    path = saev_file(tmp_path_factory.mktemp("any") / "sae.pt", header, weights)
    with suppress(FileFormatError):
        assert SAE.from_pretrained(path, config={"relu": True, "apply_b_dec_to_input": True}).d_in == D
