"""``clipsteer sae browse``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import _text, device_of, load_known, read_words, whole
from clipsteer.cli.images import lists_unreadable
from clipsteer.cli.sae_given import add_sae, open_sae

_PORT = 8000


def add_action(actions: Any, add: Any) -> None:
    """Add ``browse``."""
    add(
        actions,
        "browse",
        _browse,
        "build a site to look into an SAE: every feature, every picture, what steering does",
        """
examples:
  a site that opens from disk; a build that was stopped goes on where it was:
    clipsteer sae browse runs/small --out small-site
  of a published SAE over your own photos, with your own words for its features:
    clipsteer sae browse hf-hub:org/repo/subfolder --model ViT-B-32 --pretrained openai \\
        --hook-point visual.transformer.resblocks.11 --data photos/ --words words.txt
  with the model behind it, for any strength and pictures of your own:
    clipsteer sae browse runs/small --out small-site --serve
  beside another SAE, or the same one on a model that was fine-tuned:
    clipsteer sae browse runs/small --compare runs/seed1 --out two-site
    clipsteer sae browse runs/small --compare runs/finetuned --out moved-site
""",
        _options,
    )


def _options(p: argparse.ArgumentParser) -> None:
    add_sae(p, "images to look at (default: all bundled drawings)")
    p.add_argument("--target-hook-point", help="of a transcoder (default: what it was trained on)")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("clipsteer-site"),
        metavar="DIR",
        help="a new folder, or that of the same site (default: clipsteer-site)",
    )
    p.add_argument(
        "--words",
        type=Path,
        metavar="FILE",
        help="what features can be called, one a line (default: the classes, and the bundled "
        "concepts)",
    )
    p.add_argument(
        "--compare",
        metavar="SAE|RUN",
        help="another SAE, or the folder of a model that this one is also looked at on",
    )
    p.add_argument(
        "--steer",
        type=whole,
        metavar="N",
        help="store predictions over nine strengths for the N most steerable features (default: as "
        "many as take about a minute on two cores)",
    )
    p.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="of drawn pictures (default: 0)"
    )
    p.add_argument(
        "--serve", action="store_true", help="then serve it to this machine, with live steering"
    )
    p.add_argument(
        "--port",
        type=whole,
        default=_PORT,
        metavar="N",
        help=f"with --serve (default: {_PORT})",
    )


@lists_unreadable
def _browse(args: argparse.Namespace) -> int:
    from clipsteer.browse.build import build_site
    from clipsteer.browse.explained import Explained

    args.data = args.data or "emoji:all"
    sae, clip, dataset = open_sae(args)
    place = {"hook_point": args.hook_point, "tokens": args.tokens}
    place["target_hook_point"] = args.target_hook_point
    # a mistake about the place is said before anything is built
    explained = Explained.find(sae, clip, **place)
    compare = None if args.compare is None else _other(args, explained)
    page = build_site(
        sae,
        clip,
        dataset,
        args.out,
        words=None if args.words is None else read_words(args.words),
        name=_name(args.sae),
        data_name=_name(args.data),
        steer=args.steer,
        compare=compare,
        compare_name=None if args.compare is None else _name(args.compare),
        seed=args.seed,
        **place,
    )
    _text(f"page  {page}")
    if args.serve:
        from clipsteer.browse.server import serve

        serve(args.out, explained, dataset, port=args.port)
    return 0


def _name(path: str | Path) -> str:
    """What a path is called on a page: its last part."""
    text = str(path)
    return text if ":" in text else Path(text).resolve().name


def _other(args: argparse.Namespace, explained: Any) -> Any:
    """The SAE of --compare at its place, or this one on the model of --compare."""
    import clipsteer
    from clipsteer.browse.explained import Explained
    from clipsteer.clip.runs import CONFIG

    folder = Path(args.compare)
    place = {"hook_point": explained.site.hook_point, "tokens": explained.site.tokens}
    if (folder / CONFIG).is_file() and not (folder / "cfg.json").is_file():
        clip = clipsteer.load(folder, device=device_of(args))
        if explained.sae.d_out is not None:
            place["target_hook_point"] = explained.target.hook_point
        return Explained.find(explained.sae, clip, **place)
    sae = clipsteer.SAE.from_pretrained(args.compare, device=device_of(args))
    known = sae.metadata
    place = {name: known.get(name) or value for name, value in place.items()}
    names = ("clip_model", "pretrained", "setup")
    mine = explained.sae.metadata
    same = known.get("clip_model") is None or all(known.get(n) == mine.get(n) for n in names)
    clip = explained.clip
    if not same and args.model is None:
        clip = load_known(args, known, args.compare)
    return Explained.find(sae, clip, **place)
