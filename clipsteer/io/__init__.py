"""Files: safetensors and JSON, written whole or not at all; checkpoints; digests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.io.checked import read_checked as read_checked
    from clipsteer.io.checked import write_checked as write_checked
    from clipsteer.io.checkpoint import Checkpoint as Checkpoint
    from clipsteer.io.checkpoint import load_latest as load_latest
    from clipsteer.io.checkpoint import save_state as save_state
    from clipsteer.io.digests import described as described
    from clipsteer.io.digests import digest_of as digest_of
    from clipsteer.io.digests import tensors_digest as tensors_digest
    from clipsteer.io.digests import weights_digest as weights_digest
    from clipsteer.io.files import MAX_JSON_BYTES as MAX_JSON_BYTES
    from clipsteer.io.files import FileFormatError as FileFormatError
    from clipsteer.io.files import Header as Header
    from clipsteer.io.files import json_object as json_object
    from clipsteer.io.files import read_json as read_json
    from clipsteer.io.files import read_safetensors as read_safetensors
    from clipsteer.io.files import read_safetensors_header as read_safetensors_header
    from clipsteer.io.files import read_text as read_text
    from clipsteer.io.files import refuse_nan as refuse_nan
    from clipsteer.io.files import safetensors_layout as safetensors_layout
    from clipsteer.io.files import tensor_bytes as tensor_bytes
    from clipsteer.io.files import write_atomically as write_atomically
    from clipsteer.io.files import write_json as write_json
    from clipsteer.io.files import write_safetensors as write_safetensors
    from clipsteer.io.images import as_rgb as as_rgb
    from clipsteer.io.images import open_image as open_image
    from clipsteer.io.images import read_image as read_image
    from clipsteer.io.kinds import Kind as Kind
    from clipsteer.io.kinds import read_kind as read_kind
    from clipsteer.io.kinds import write_kind as write_kind
    from clipsteer.io.layout import Layout as Layout
    from clipsteer.io.layout import Spec as Spec
    from clipsteer.io.layout import check_layout as check_layout
    from clipsteer.io.layout import layout_of as layout_of
    from clipsteer.io.locks import only_writer as only_writer
    from clipsteer.io.messages import printable as printable
    from clipsteer.io.torch_files import read_torch_weights_only as read_torch_weights_only
    from clipsteer.io.weights import Entry as Entry
    from clipsteer.io.weights import Source as Source
    from clipsteer.io.weights import Weights as Weights
    from clipsteer.io.weights import check_weights_file as check_weights_file
    from clipsteer.io.weights import open_weights as open_weights
    from clipsteer.io.weights import some as some

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
