"""``clipsteer sae steer``."""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

from clipsteer.cli.arguments import _text, add_shown, count, read_words, show_steering, whole
from clipsteer.cli.images import lists_unreadable
from clipsteer.cli.sae_given import add_sae, open_sae

_TIMES = 1.0


class Strength(NamedTuple):
    """What one --feature says."""

    feature: int
    value: float
    is_multiple: bool  # of the feature's peak, not an activation


def add_action(actions: Any, add: Any) -> None:
    """Add ``steer``."""
    add(
        actions,
        "steer",
        _steer,
        "show predictions before and after steering features",
        """
examples:
  feature 12 set to 50 on every token, eight drawings of the held-out style:
    clipsteer sae steer runs/small --feature 12=50
  to five times the largest activation that it has on these images:
    clipsteer sae steer runs/small --feature 12=5x
  the three features that at twice their peaks lead most towards a word:
    clipsteer sae steer runs/small --towards "dog face" --times 2
  one feature up, another suppressed, on the patches of your own images, among your own words:
    clipsteer sae steer runs/b32-9 --feature 12=50 --feature 7=0 --tokens patches \\
        --data photos/ --words words.txt
""",
        _options,
    )


def _options(p: argparse.ArgumentParser) -> None:
    add_sae(p)
    p.add_argument(
        "--feature",
        action="append",
        type=_strength,
        metavar="I=S",
        help="set feature I to the activation S, or with S such as 5x to so many times its largest "
        "activation on the images; repeatable",
    )
    p.add_argument(
        "--towards",
        metavar="TEXT",
        help="set the features that raise the probability of TEXT most, found by trying",
    )
    p.add_argument(
        "--times",
        type=float,
        default=_TIMES,
        metavar="X",
        help=f"with --towards, how many times their peaks (default: {_TIMES:g})",
    )
    p.add_argument(
        "--pick",
        type=count,
        default=3,
        metavar="N",
        help="with --towards, how many features at most (default: 3)",
    )
    add_shown(p)


def _strength(text: str) -> Strength:
    feature, _, strength = text.partition("=")
    number = strength.removesuffix("x")
    try:
        return Strength(whole(feature), float(number), number != strength)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"expected FEATURE=STRENGTH such as 12=50 or 12=5x, got {text!r}"
        ) from None


@lists_unreadable
def _steer(args: argparse.Namespace) -> int:
    from clipsteer.sae.steering import SAESteering

    if (args.feature is None) == (args.towards is None):
        raise ValueError("sae steer needs --feature or --towards, and not both")
    if args.towards is not None and not (math.isfinite(args.times) and args.times > 0):
        raise ValueError(f"--times must be above 0, got {args.times:g}")
    sae, clip, dataset = open_sae(args)
    hook_point = args.hook_point or sae.metadata.get("hook_point")
    if hook_point is None:
        raise ValueError(f"{args.sae} does not name its hook point; pass --hook-point")
    tokens = args.tokens or sae.metadata.get("tokens") or "all"
    # what is wrong with a feature is said before the images are looked at
    given = {one.feature: one.value for one in args.feature or []}
    if given:
        SAESteering(sae, given, tokens=tokens)
    multiples = {one.feature for one in args.feature or [] if one.is_multiple}
    if args.towards is not None or multiples:
        given = _activations(args, sae, clip, dataset, hook_point, tokens, given, multiples)
    return show_steering(args, clip, dataset, hook_point, SAESteering(sae, given, tokens=tokens))


def _activations(
    args: argparse.Namespace,
    sae: Any,
    clip: Any,
    dataset: Any,
    hook_point: str,
    tokens: str,
    given: dict[int, float],
    multiples: set[int],
) -> dict[int, float]:
    """Wanted activations, with multiples taken of the peaks over the images."""
    from clipsteer.sae.features import feature_statistics
    from clipsteer.sae.steering import SAESteering

    peaks = feature_statistics(sae, clip, dataset, hook_point=hook_point, tokens=tokens).maximum
    if args.towards is not None:
        given = _towards(args, sae, clip, dataset, hook_point, tokens, peaks)
        multiples = set(given)
    relative = {feature: given[feature] for feature in given if feature in multiples}
    found = SAESteering(sae, relative, tokens=tokens, relative=True, peaks=peaks).activations
    lines = [
        f"feature {i}: {relative[i]:g} × its peak of {float(peaks[i]):.4g} = {found[i]:.4g}"
        for i in found
    ]
    _text(*lines)
    return given | found


def _towards(
    args: argparse.Namespace,
    sae: Any,
    clip: Any,
    dataset: Any,
    hook_point: str,
    tokens: str,
    peaks: Any,
) -> dict[int, float]:
    from clipsteer.browse.explained import Explained
    from clipsteer.browse.towards import features_towards

    if sae.d_out is not None:
        raise ValueError("--towards is not for transcoders, which sae steer cannot steer with")
    explained = Explained.find(sae, clip, hook_point=hook_point, tokens=tokens)
    found = features_towards(
        explained,
        dataset,
        args.towards,
        peaks,
        words=read_words(args.words),
        multiple=args.times,
        count=args.pick,
    )
    for feature, change in found:
        _text(f"feature {feature} alone: {100 * change:+.1f} points for {args.towards!r}")
    return {feature: args.times for feature, _ in found}
