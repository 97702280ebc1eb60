"""Continual learning: towers that learn tasks in turn, and what keeps class prototypes and
statistics true."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.continual.backbone import Encoder as Encoder
    from clipsteer.continual.config import CILConfig as CILConfig
    from clipsteer.continual.covariance import ClassStatistics as ClassStatistics
    from clipsteer.continual.covariance import precision_factor as precision_factor
    from clipsteer.continual.covariance import shrink as shrink
    from clipsteer.continual.drift import DriftAccumulator as DriftAccumulator
    from clipsteer.continual.drift import learned_drift as learned_drift
    from clipsteer.continual.experiment import run_tasks as run_tasks
    from clipsteer.continual.learner import ClassIncrementalLearner as ClassIncrementalLearner
    from clipsteer.continual.lora import LoRA as LoRA
    from clipsteer.continual.metrics import Run as Run
    from clipsteer.continual.plasticity import Plasticity as Plasticity
    from clipsteer.continual.scenario import Scenario as Scenario
    from clipsteer.continual.scenario import emoji_scenario as emoji_scenario
    from clipsteer.continual.scenario import folder_scenario as folder_scenario
    from clipsteer.continual.strategies import strategy as strategy

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
