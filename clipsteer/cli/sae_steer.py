"""``clipsteer sae steer``."""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

from clipsteer.cli.arguments import _text, add_shown, count, read_words, show_steering, whole
from clipsteer.cli.images import lists_unreadable
from clipsteer.cli.sae_given import add_sae, open_sae

_TIMES = 1.0
_HARDLY = 0.005  # of probability, below which a feature leads nowhere


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


class _Place(NamedTuple):
    """An SAE at its place in a model, and images."""

    sae: Any
    clip: Any
    images: Any
    hook_point: str
    tokens: Any


@lists_unreadable
def _steer(args: argparse.Namespace) -> int:
    from clipsteer.sae.site import tell_another_place
    from clipsteer.sae.steering import SAESteering

    if (args.feature is None) == (args.towards is None):
        raise ValueError("sae steer needs --feature or --towards, and not both")
    if args.towards is not None and not (math.isfinite(args.times) and args.times > 0):
        raise ValueError(f"--times must be above 0, got {args.times:g}")
    sae, clip, images = open_sae(args)
    hook_point = args.hook_point or sae.metadata.get("hook_point")
    if hook_point is None:
        raise ValueError(f"{args.sae} does not name its hook point; pass --hook-point")
    tokens: Any = args.tokens or sae.metadata.get("tokens") or "all"
    place = _Place(sae, clip, images, hook_point, tokens)
    # of a feature that is named twice the last counts
    last = {one.feature: one for one in args.feature or []}
    given = {feature: one.value for feature, one in last.items()}
    if given:
        # what is wrong with a feature is said before the images are looked at
        SAESteering(sae, given, tokens=tokens)
    multiples = {feature: one.value for feature, one in last.items() if one.is_multiple}
    if args.towards is not None or multiples:
        given |= _activations(args, place, multiples)
    else:
        tell_another_place(sae, hook_point)
    return show_steering(args, clip, images, hook_point, SAESteering(sae, given, tokens=tokens))


def _activations(
    args: argparse.Namespace, place: _Place, multiples: dict[int, float]
) -> dict[int, float]:
    """Wanted activations of features that are given as multiples of their peaks over the images, or
    that are to be found."""
    from clipsteer.sae.features import feature_statistics
    from clipsteer.sae.steering import SAESteering

    sae, clip, images, hook_point, tokens = place
    peaks = feature_statistics(sae, clip, images, hook_point=hook_point, tokens=tokens).maximum
    if args.towards is not None:
        multiples = _towards(args, place, peaks)
    relative = SAESteering(sae, multiples, tokens=tokens, relative=True, peaks=peaks)
    found = relative.activations
    _text(
        *(
            f"feature {i}: {multiples[i]:g} × its peak of {float(peaks[i]):.4g} = {found[i]:.4g}"
            for i in found
        )
    )
    return found


def _towards(args: argparse.Namespace, place: _Place, peaks: Any) -> dict[int, float]:
    """The features that lead towards a text, with the multiple asked for."""
    from clipsteer.browse.explained import Explained
    from clipsteer.browse.towards import features_towards

    sae, clip, images, hook_point, tokens = place
    if sae.d_out is not None:
        raise ValueError("--towards is not for transcoders, which sae steer cannot steer with")
    found = features_towards(
        Explained.find(sae, clip, hook_point=hook_point, tokens=tokens),
        images,
        args.towards,
        peaks,
        words=read_words(args.words),
        multiple=args.times,
        count=args.pick,
    )
    for feature, change in found:
        _text(f"feature {feature} alone: {100 * change:+.2g} points for {args.towards!r}")
    if max(change for _, change in found) < _HARDLY:
        _text(f"no feature leads clearly to {args.towards!r}; try more --times, or another text")
    return {feature: args.times for feature, _ in found}
