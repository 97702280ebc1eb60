"""What training runs share: the loop, schedules, signals, processes, tracking."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.training.loop import TrainingRun as TrainingRun
    from clipsteer.training.schedule import DATA_ORDER as DATA_ORDER
    from clipsteer.training.schedule import Keys as Keys
    from clipsteer.training.schedule import Order as Order
    from clipsteer.training.schedule import cosine_lr as cosine_lr
    from clipsteer.training.schedule import seed_of as seed_of
    from clipsteer.training.settings import SettingError as SettingError
    from clipsteer.training.settings import check_fields as check_fields
    from clipsteer.training.settings import check_same_settings as check_same_settings
    from clipsteer.training.settings import read_value as read_value
    from clipsteer.training.settings import settings_of as settings_of
    from clipsteer.training.signals import EXIT_TERMINATED as EXIT_TERMINATED
    from clipsteer.training.signals import StopSignal as StopSignal
    from clipsteer.training.tracking import Reporter as Reporter
    from clipsteer.training.tracking import trim_log as trim_log
    from clipsteer.training.world import JointBatch as JointBatch
    from clipsteer.training.world import World as World
    from clipsteer.training.world import training_world as training_world

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
