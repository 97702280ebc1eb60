"""Zero-shot and fine-tuned weights, averaged (WiSE-FT), and how robust that makes a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.ensembles.config import FinetuneConfig as FinetuneConfig
    from clipsteer.ensembles.finetuning import finetune as finetune
    from clipsteer.ensembles.merging import Alpha as Alpha
    from clipsteer.ensembles.merging import RunningEnsemble as RunningEnsemble
    from clipsteer.ensembles.merging import deciding as deciding
    from clipsteer.ensembles.merging import wise_ft as wise_ft
    from clipsteer.ensembles.page import ENDS as ENDS
    from clipsteer.ensembles.page import NAMES as NAMES
    from clipsteer.ensembles.page import curve_charts as curve_charts
    from clipsteer.ensembles.page import logit_chart as logit_chart
    from clipsteer.ensembles.page import summary_table as summary_table
    from clipsteer.ensembles.page import write_page as write_page
    from clipsteer.ensembles.robustness import ALPHAS as ALPHAS
    from clipsteer.ensembles.robustness import DEFAULT_ALPHA as DEFAULT_ALPHA
    from clipsteer.ensembles.robustness import Baseline as Baseline
    from clipsteer.ensembles.robustness import EvalSet as EvalSet
    from clipsteer.ensembles.robustness import averages as averages
    from clipsteer.ensembles.robustness import curve as curve
    from clipsteer.ensembles.robustness import fit_baseline as fit_baseline
    from clipsteer.ensembles.robustness import logit as logit
    from clipsteer.ensembles.robustness import summary as summary

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
