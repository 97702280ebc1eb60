"""Continual learning: towers that learn tasks in turn, and what keeps class prototypes and
statistics true."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "CILConfig": "config",
    "ClassIncrementalLearner": "learner",
    "ClassStatistics": "covariance",
    "DriftAccumulator": "drift",
    "Encoder": "backbone",
    "LoRA": "lora",
    "Plasticity": "plasticity",
    "Run": "metrics",
    "Scenario": "scenario",
    "emoji_scenario": "scenario",
    "folder_scenario": "scenario",
    "precision_factor": "covariance",
    "run_tasks": "experiment",
    "shrink": "covariance",
    "strategy": "strategies",
}

__all__ = [*_LAZY]

if TYPE_CHECKING:
    from clipsteer.continual.backbone import Encoder as Encoder
    from clipsteer.continual.config import CILConfig as CILConfig
    from clipsteer.continual.covariance import ClassStatistics as ClassStatistics
    from clipsteer.continual.covariance import precision_factor as precision_factor
    from clipsteer.continual.covariance import shrink as shrink
    from clipsteer.continual.drift import DriftAccumulator as DriftAccumulator
    from clipsteer.continual.experiment import run_tasks as run_tasks
    from clipsteer.continual.learner import ClassIncrementalLearner as ClassIncrementalLearner
    from clipsteer.continual.lora import LoRA as LoRA
    from clipsteer.continual.metrics import Run as Run
    from clipsteer.continual.plasticity import Plasticity as Plasticity
    from clipsteer.continual.scenario import Scenario as Scenario
    from clipsteer.continual.scenario import emoji_scenario as emoji_scenario
    from clipsteer.continual.scenario import folder_scenario as folder_scenario
    from clipsteer.continual.strategies import strategy as strategy


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"clipsteer.continual.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'clipsteer.continual' has no attribute {name!r}")
