"""The demo's WiSE-FT curve: EmojiCLIP tuned to the one style it was not trained on, and averaged with what it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clipsteer import style_shift
from clipsteer.data import HELD_OUT_STYLE

# what style_shift.choose took on validation concepts for this style: benchmarks/results/wise_ft_emoji
HEAD, LR, EPOCHS = "labels", 1e-3, 5
ELSEWHERE = (
    "The demo does this for EmojiCLIP and the bundled drawings alone. For your own: clipsteer finetune tunes a model, "
    "and clipsteer wise-ft curve draws the curve from what that leaves; both have examples under --help."
)
ALPHAS = tuple(i / 10 for i in range(11))


def measure(
    seed: int,
    device: str = "cpu",
    *,
    parts: style_shift.Split | None = None,
    epochs: int = EPOCHS,
    alphas: Sequence[float] = ALPHAS,
) -> dict[str, Any]:
    """The rows of ``robustness.curve`` for one seed, and the settings; ``parts`` is by default Classify-30 whole."""
    parts = parts or style_shift.split()
    chosen = {"lr": LR, "epochs": epochs, "batch_size": style_shift.BATCH}
    tests = style_shift.evaluation_sets(HELD_OUT_STYLE, parts.test, device)
    rows = style_shift.tuned_curve(HELD_OUT_STYLE, parts, HEAD, chosen, tests, seed=seed, alphas=alphas, device=device)
    return {
        "style": HELD_OUT_STYLE, "seed": seed, "head": HEAD, **chosen,
        "training_concepts": len(parts.fit + parts.validation), "test_concepts": len(parts.test), "rows": rows,
    }  # fmt: skip
