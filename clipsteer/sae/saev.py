"""The layout of saev, to be read: a line of JSON, then what torch.save writes, in one file.

Checked against saev 0.1.0, the one release on PyPI, whose files have no "schema" and which wrote
the golden file of the tests. The later schemas are read as https://github.com/OSU-NLP-Group/saev
writes them up to schema 5.
"""

from __future__ import annotations

from typing import Any

from clipsteer.io.files import FileFormatError
from clipsteer.sae.foreign import Described, lookup, matrix, metadata_of, positive
from clipsteer.sae.found import Found

_SCHEMAS = (None, 1, 2, 3, 4, 5)
_ACTIVATIONS = {"Relu": "relu", "TopK": "topk", "BatchTopK": "batch_topk"}
_THRESHOLD = "activation.threshold"


def missing(found: Found) -> str | None:
    """What makes this not the library's, None where it is."""
    if found.file is None:
        return "no *.pt"
    if found.line is None:
        return f"{found.file.name} does not begin with a line of JSON"
    return found.lacks("W_enc", "W_dec")


def read(found: Found) -> Described:
    """What ``saev.nn.load`` of the release that wrote the file makes of it."""
    path = found.file or found.path
    header = {} if found.line is None else found.line[0]
    schema = header.get("schema")
    if schema not in _SCHEMAS or isinstance(schema, bool):
        raise FileFormatError(
            f"{path}: schema {schema!r:.60} is not supported; supported are those up to 5"
        )
    cfg = header if schema is None else header.get("cfg")
    if not isinstance(cfg, dict):
        raise FileFormatError(f"{path}: its first line has no cfg")
    activation, k = _activation(found, header, cfg, schema)
    weights = found.copies()
    for name in ("W_enc", "W_dec"):
        matrix(path, weights, name)
    weights["W_enc"] = weights["W_enc"].T
    if activation == "batch_topk" and _THRESHOLD in weights:
        weights["threshold"] = weights.pop(_THRESHOLD)
    elif activation != "relu":
        # before it had a threshold, BatchTopK of saev was a top-k a row, too
        activation = "topk"
        _need_relu(found)
    width = "d_model" if "d_model" in cfg else "d_vit"
    d_in = positive(path, cfg, width)
    has_size = "d_sae" in cfg
    d_sae = positive(path, cfg, "d_sae") if has_size else d_in * positive(path, cfg, "exp_factor")
    config = {
        "d_in": d_in,
        "d_sae": d_sae,
        "architecture": activation,
        "k": k,
        "apply_b_dec_to_input": _subtracts(found, schema),
    }
    return Described(config, weights, metadata_of("saev", None, None))


def _activation(
    found: Found, header: dict[str, Any], cfg: dict[str, Any], schema: int | None
) -> tuple[str, Any]:
    """What the activation is called here, and its k."""
    if schema is None:
        return "relu", None
    part = cfg.get("activation")
    if isinstance(part, dict):
        name = part.get("cls")
        params = part.get("params")
    elif schema == 1 and header.get("cls") != "SparseAutoencoderConfig":
        # of the first files of schema 1, whose class is the activation's
        name = header.get("cls")
        params = cfg
    elif schema == 1:
        name = "Relu"
        params = cfg
    else:
        name = None
        params = None
    ours = lookup(found.file or found.path, "activation", name, _ACTIVATIONS)
    k = params.get("top_k", 32) if isinstance(params, dict) else 32
    return ours, None if ours == "relu" else k


def _need_relu(found: Found) -> None:
    if found.given.get("relu") is not True:
        raise FileFormatError(
            f"{found.file}: saev's top-k keeps the k largest values of a row even where they are "
            f"negative, and here those are 0; if no row has fewer than k above 0, config={{'relu': "
            f"True}} reads it"
        )


def _subtracts(found: Found, schema: int | None) -> bool:
    """Whether b_dec is subtracted from the input: it was until somewhere within schema 1."""
    if schema != 1:
        return schema is None
    given = found.given.get("apply_b_dec_to_input")
    if not isinstance(given, bool):
        raise FileFormatError(
            f"{found.file}: of schema 1, under which saev at first subtracted b_dec from its input "
            f"and later did not, and the file does not say; pass config={{'apply_b_dec_to_input': "
            f"True}} or False"
        )
    return given
