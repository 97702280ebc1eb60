"""A default device of the caller's does not reach what is read: a test for each public reader, which are found by
name, so that a new one needs a line here."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests import _readers as made
from torch import Tensor, nn

import clipsteer
from clipsteer import SAE
from clipsteer.continual import Encoder
from clipsteer.io import Kind, checkpoint, read_kind, write_kind
from clipsteer.reference import features

# what a public function or class method that reads tensors may be called
VERBS = ("load", "open", "read", "from_pretrained", "wise_ft", "cached")
# readers of other things than tensors: JSON, text, images, headers, figures
WITHOUT_TENSORS = {
    "clipsteer.clip.loader", "clipsteer.data.open_dataset", "clipsteer.data.read_image", "clipsteer.io.read_json",
    "clipsteer.io.open_image", "clipsteer.io.read_checked", "clipsteer.io.read_image",
    "clipsteer.io.read_safetensors_header", "clipsteer.io.read_text", "clipsteer.ops.load",
    "clipsteer.training.read_value",
}  # fmt: skip


def public_readers() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    wings = [name for _, name, is_wing in pkgutil.iter_modules(clipsteer.__path__, "clipsteer.") if is_wing]
    wings.remove("clipsteer.integrations")  # which imports the libraries that it is for
    for wing in map(importlib.import_module, ["clipsteer", *wings]):
        for name in dir(wing):
            thing = getattr(wing, name)
            if name.startswith("_") or not str(getattr(thing, "__module__", "")).startswith("clipsteer"):
                continue
            if inspect.isclass(thing):
                for method, value in vars(thing).items():
                    if method.startswith(VERBS) and isinstance(value, classmethod):
                        found[f"{wing.__name__}.{name}.{method}"] = getattr(thing, method)
            elif name.startswith(VERBS) and callable(thing):
                found[f"{wing.__name__}.{name}"] = thing
    return {name: thing for name, thing in found.items() if name not in WITHOUT_TENSORS}


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in what a reader gave."""
    seen: set[int] = set()
    left = [value]
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, nn.Module):
            left += [*part.parameters(), *part.buffers()]
        elif isinstance(part, Mapping):
            left += part.values()
        elif isinstance(part, (list, tuple)):
            left += part
        elif hasattr(part, "__dict__") and type(part).__module__.startswith("clipsteer"):
            left += vars(part).values()


class Case(NamedTuple):
    make: Callable[[Path], object]
    read: Callable[[Path], Any]


def of(reader: str) -> Case:
    return Case(made.READERS[reader].make, made.READERS[reader].read)


def of_sae(read: Callable[[Path], Any]) -> Case:
    return of("SAE of Prisma")._replace(read=read)


def cached(folder: Path) -> features.ReferenceFeatures:
    clip = type("Clip", (), {"name": "name"})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "model_digest", lambda clip: "w")
        return features.cached(folder / "f.safetensors", clip, made.Pairs())


def entries(folder: Path) -> list[Tensor]:
    with ExitStack() as stack:
        found = clipsteer.io.open_weights("x", folder / "a.pt", stack).entries
        return [entry.read(0, math.prod(entry.shape)) for entry in found.values()]


def ends(folder: Path) -> Any:
    return clipsteer.wise_ft(folder / "a.safetensors", folder / "b.safetensors", 0.5)


KIND = Kind("x", 1, "an x")
RUN, FEATURES, TWO = of("run"), of("reference features"), of("merged safetensors")
CASES = {
    "clipsteer.load": RUN,
    "clipsteer.clip.load": of("weights of timm"),
    "clipsteer.clip.load_origin": RUN._replace(read=lambda f: clipsteer.clip.load_origin({"clip_model": str(f)})),
    "clipsteer.clip.load_classifier": of("classifier"),
    "clipsteer.reference.load_run": RUN._replace(read=features.load_run),
    "clipsteer.reference.read": FEATURES,
    "clipsteer.reference.cached": FEATURES._replace(read=cached),
    "clipsteer.wise_ft": TWO._replace(read=ends),
    "clipsteer.ensembles.wise_ft": TWO._replace(read=ends),
    "clipsteer.io.open_weights": Case(of("merged torch files").make, entries),
    "clipsteer.io.load_latest": Case(
        lambda f: checkpoint.save_state(f, 1, {"a": torch.ones(3)}, {}), checkpoint.load_latest
    ),
    "clipsteer.io.read_kind": Case(
        lambda f: write_kind(f / "k", KIND, {"a": torch.ones(3)}), lambda f: read_kind(f / "k", KIND)
    ),
    "clipsteer.io.read_safetensors": Case(
        made.plain_files, lambda f: clipsteer.io.read_safetensors(f / "a.safetensors")
    ),
    "clipsteer.io.read_torch_weights_only": Case(
        made.plain_files, lambda f: clipsteer.io.read_torch_weights_only(f / "b.pt")
    ),
    "clipsteer.SAE.from_pretrained": of("SAE"),
    "clipsteer.sae.SAE.from_pretrained": of_sae(SAE.from_pretrained),
    "clipsteer.sae.read": of_sae(clipsteer.sae.read),
    "clipsteer.conceptors.load": of("conceptor"),
    "clipsteer.conceptors.Conceptor.load": of("conceptor"),
    "clipsteer.Conceptor.load": of("conceptor"),
    "clipsteer.splice.ConceptDictionary.load": of("concept dictionary"),
    "clipsteer.ConceptDictionary.load": of("concept dictionary"),
    "clipsteer.continual.ClassStatistics.load": of("class statistics"),
    "clipsteer.continual.LoRA.load": of("LoRA"),
    "clipsteer.continual.Encoder.open": RUN._replace(read=lambda f: Encoder.open(str(f))),
}


def test_every_public_reader_has_a_case_here():
    assert sorted(public_readers()) == sorted(CASES)


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.fixture(params=["context", "global"])
def on_meta(request):
    """Runs a function with "meta" as the default device."""

    def run(function: Callable[[], Any]) -> Any:
        if request.param == "context":
            with torch.device("meta"):
                return function()
        torch.set_default_device("meta")
        try:
            return function()
        finally:
            torch.set_default_device(None)

    return run


@pytest.mark.parametrize("name", CASES)
def test_the_default_device_does_not_reach_a_reader(name, on_meta, tmp_path):
    case = CASES[name]
    case.make(tmp_path)
    module = made.tower()  # that of LoRA; the same before both reads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "tower", lambda: copy.deepcopy(module))
        expected = list(tensors_of(case.read(tmp_path)))
        found = list(tensors_of(on_meta(lambda: case.read(tmp_path))))
    assert expected
    assert {tensor.device.type for tensor in found} == {"cpu"}
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_device_that_is_asked_for_is_given(tmp_path):
    SAE(4, 8, k=2).save_pretrained(tmp_path)
    with torch.device("cpu"):
        assert SAE.from_pretrained(tmp_path, device="meta").W_enc.is_meta
