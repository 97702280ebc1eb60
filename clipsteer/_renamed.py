"""Modules under the names that they had before the package was put in order."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# old name -> where its public names are now
RENAMED = {
    "activations": ("sae.activations", "sae.sources", "clip.pixels"),
    "bench": (
        "testing.bench",
        "testing.records",
        "testing.stages",
        "testing.timing",
        "testing.machine",
    ),
    "bench_table": ("testing.table",),
    "checkpoint": ("io.checkpoint",),
    "classifier": ("clip.classifier", "clip.pixels", "data.dataset"),
    "conceptor": ("conceptors.conceptor",),
    "conceptor_fit": ("conceptors.fit",),
    "conceptor_io": ("conceptors.conceptor",),
    "contrastive_config": ("reference.config",),
    "contrastive_data": ("reference.pairs", "data.dataset"),
    "contrastive_eval": ("reference.evaluate",),
    "contrastive_loss": ("reference.losses",),
    "contrastive_train": ("reference.train",),
    "explore": ("demo.explore", "demo.pictures", "clip.model", "data.dataset"),
    "finetuning": ("ensembles.finetuning", "clip.pixels"),
    "merging": ("ensembles.merging",),
    "reference_features": ("reference.features",),
    "reference_model": ("reference.drrho", "training.world"),
    "robustness": ("ensembles.robustness", "report.axes"),
    "robustness_page": ("ensembles.page", "report.charts"),
    "sae_eval": ("sae.evaluate",),
    "sae_features": ("sae.features",),
    "sae_io": ("sae.formats", "sae.foreign"),
    "sae_loss": ("sae.losses",),
    "sae_train": ("sae.train", "sae.trainer"),
    "style_shift": ("data.emoji", "demo.wise_ft"),
    "continual.alignment": ("continual.heads",),
    "continual.cil_page": ("continual.report",),
    "continual.cil_tables": ("continual.tables",),
}


class _Finder:  # importlib.abc, its base's home, brings in a third of all that --help loads
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        known = fullname.removeprefix("clipsteer.") in RENAMED
        if not known or not fullname.startswith("clipsteer."):
            return None
        return ModuleSpec(fullname, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual kind of module."""

    def exec_module(self, module: ModuleType) -> None:
        places = [
            f"clipsteer.{name}" for name in RENAMED[module.__name__.removeprefix("clipsteer.")]
        ]
        where = " and ".join(places)
        warnings.warn(f"{module.__name__} is now {where}", DeprecationWarning, stacklevel=2)

        def get(name: str) -> Any:
            for place in places:
                if not name.startswith("_") and hasattr(import_module(place), name):
                    return getattr(import_module(place), name)
            raise AttributeError(
                f"module {module.__name__!r}, now {where}, has no attribute {name!r}"
            )

        module.__getattr__ = get  # type: ignore[method-assign]


def install() -> None:
    """Let old module names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
