"""``clipsteer cil``: class-incremental learning, strategies and seeds side by side, and the page
that compares them."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any, Literal

from clipsteer.cli.arguments import (
    Options,
    add_model,
    add_workers,
    count,
    device_of,
    setup_options,
)
from clipsteer.cli.cil_settings import BY_STRATEGY, EMOJI, configs_of
from clipsteer.cli.images import (
    add_skip_unreadable,
    lists_unreadable,
    open_images,
    unreadable_files,
)

logger = logging.getLogger(__name__)

PAPER_MODEL = "timm:vit_base_patch16_224.augreg_in21k"
SAE_STEPS = 1000


def add_parser(commands: Any, add: Any) -> None:
    """Add the command; ``add(parent, name, function, summary, examples, options)`` makes it."""
    add(
        commands,
        "cil",
        _cil,
        "learn classes task by task: MACIL, SLCA, SDC, LDC, RanPAC and baselines",
        """
examples:
  the bundled drawings and model, all strategies, three class orders:
    clipsteer cil --data emoji --tasks 5 --strategy all --seeds 3 --out cil-emoji
  what each part of MACIL does:
    clipsteer cil --data emoji --tasks 5 --strategy ablation --seeds 3 --out cil-ablation
  your own images in PILOT's layout (PATH/train/CLASS/…, PATH/test/CLASS/…), a CLIP of open_clip,
  20 classes at a time:
    clipsteer cil --model ViT-B-16 --pretrained openai --data imagenet-r --increment 20 \\
        --strategy macil slca ranpac --seeds 1 --out cil-inr
  the published protocol on the published backbone:
    clipsteer cil --recipe paper --data imagenet-r --increment 20 --strategy macil slca \\
        --seeds 3 --out macil-inr
  one setting changed, and a look at validation images instead of the test:
    clipsteer cil --data emoji --tasks 5 --strategy macil macil:sigma=1 --measure validation \\
        --out cil-sigma

A command that was stopped, or killed, goes on where it was when it is given again.
""",
        _cil_options,
    )


def _cil_options(p: argparse.ArgumentParser) -> None:
    from clipsteer.continual.config import CILConfig
    from clipsteer.continual.strategies import PAPER

    p.add_argument(
        "--data", required=True, metavar="PATH", help="emoji, or a folder with train/ and test/"
    )
    p.add_argument(
        "--tasks",
        type=_tasks,
        metavar="N",
        help="equal tasks; for emoji also: categories (default: 5)",
    )
    p.add_argument(
        "--init-cls",
        type=count,
        metavar="N",
        help="classes of the first task (default: as --increment)",
    )
    p.add_argument("--increment", type=count, metavar="N", help="classes of each later task")
    p.add_argument(
        "--split",
        choices=("concepts", "styles"),
        default="concepts",
        help="emoji: test on new concepts in the same styles, or on the same in a new style",
    )
    p.add_argument(
        "--strategy",
        nargs="+",
        default=["macil", "slca", "finetune"],
        metavar="NAME",
        help="macil, slca, sdc and ldc (their compensation on cosine heads), finetune, ranpac "
        "(frozen), ncm, zero_shot, joint; all; ablation; or NAME:field=value,…, of CILConfig",
    )
    p.add_argument(
        "--seeds",
        type=count,
        default=3,
        metavar="N",
        help="of class order and training: 1993, 1994 …; the paper's 1993, 1996, 1997 (default: 3)",
    )
    add_model(p, None, "emojiclip, or the recipe's")
    p.add_argument(
        "--recipe",
        choices=("paper",),
        help=f"that of MACIL's authors: {PAPER_MODEL}, pixels in [0, 1], 20 and 10 epochs, no "
        "weight decay, a cosine that falls once an epoch, σ = 1",
    )
    p.add_argument(
        "--measure",
        choices=("test", "validation"),
        default="test",
        help="validation: learn without a fifth of the training images and measure on it",
    )
    p.add_argument(
        "--saes",
        type=Path,
        metavar="DIR",
        help="an SAE a block, for plasticity; trained if missing",
    )
    p.add_argument(
        "--sae-images",
        metavar="PATH",
        help="to train them on, of all kinds (emoji: EmojiCLIP's own)",
    )
    p.add_argument(
        "--jobs",
        type=count,
        default=1,
        metavar="N",
        help="runs at a time (CPU), each with some of the cores (default: 1)",
    )
    add_skip_unreadable(p)
    add_workers(p)
    unset = dict.fromkeys({"lr", *EMOJI, *PAPER} - {*BY_STRATEGY}, "that of the recipe")
    Options(CILConfig, leave=BY_STRATEGY, unset=unset).add(p)
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="runs/, table.csv, index.html, summary.md …",
    )


def _tasks(text: str) -> int | str:
    return text if text == "categories" else count(text)


def _names(parts: list[str]) -> list[str]:
    """Strategies, each once: words, lists with commas, and the two groups."""
    from clipsteer.continual.strategies import ABLATION, STRATEGIES

    groups = {"all": list(STRATEGIES), "ablation": list(ABLATION)}
    names: dict[str, None] = {}
    for part in parts:
        # what stands behind a colon has commas of its own
        words = [part] if ":" in part else part.split(",")
        for word in filter(None, words):
            names.update(dict.fromkeys(groups.get(word, [word])))
    return list(names)


def _scenario(
    data: str,
    tasks: int | Literal["categories"] | None,
    init_cls: int | None,
    increment: int | None,
    split: Literal["concepts", "styles"],
    measure: str,
    seed: int,
    leave_out: frozenset[Path] = frozenset(),
) -> Any:
    from clipsteer.continual.scenario import emoji_scenario, folder_scenario
    from clipsteer.data.emoji import STYLES
    from clipsteer.data.files import emoji_parts, is_emoji

    share = 0.2 if measure == "validation" else 0.0
    if is_emoji(data):
        if init_cls or increment:
            raise ValueError(
                "--init-cls and --increment are for folders; emoji takes --tasks N or categories"
            )
        style, part = emoji_parts(data)
        if part is not None or (split == "styles" and style != "all") or style not in STYLES:
            raise ValueError(
                "--data must be emoji or, with --split concepts, emoji:STYLE with a STYLE of "
                f"{', '.join(STYLES)}; got {data!r}"
            )
        found = emoji_scenario(
            5 if tasks is None else tasks, seed, STYLES[style], validation=share, split=split
        )
    else:
        if tasks == "categories":
            raise ValueError(
                "--tasks categories is for emoji; a folder takes --tasks N, or --init-cls and "
                "--increment"
            )
        if tasks is None and increment is None:
            tasks = 5
        found = folder_scenario(
            data,
            tasks,
            seed,
            init_cls=init_cls,
            increment=increment,
            validation=share,
            leave_out=leave_out,
        )
    return found.on_validation() if measure == "validation" else found


def _encoder(
    model: str, pretrained: str | None, unit_range: bool, device: str, setup: dict[str, Any]
) -> tuple[Any, Any]:
    from clipsteer.continual.backbone import Encoder

    return Encoder.open(model, pretrained, unit_range=unit_range, device=device, **setup)


def _runnable(names: list[str], asked: list[str], encoder: tuple[Any, ...]) -> list[str]:
    """The names without a zero-shot one that only a group named, where there is no text tower.

    Raises ValueError for one that was asked for by itself.
    """
    from clipsteer.clip.timm_models import no_text

    needing = [name for name in names if name.partition(":")[0] == "zero_shot"]
    if not needing or _encoder(*encoder)[1] is not None:
        return names
    given = {word for part in asked for word in [part, *part.split(",")]}
    if by_itself := [name for name in needing if name in given]:
        raise ValueError(no_text(f"--strategy {by_itself[0]}", encoder[0]))
    logger.warning("%s has no text tower: %s is left out", encoder[0], ", ".join(needing))
    return [name for name in names if name not in needing]


def _run(
    scenario: tuple[Any, ...],
    encoder: tuple[Any, ...],
    config: Any,
    saes: str,
    out: Path,
    workers: int,
) -> Any:
    """One run from plain data, so that another process can make it."""
    from clipsteer.clip.zero_shot import zero_shot_head
    from clipsteer.continual.experiment import run_tasks
    from clipsteer.continual.plasticity import Plasticity, load_saes

    found, zero_shot = _scenario(*scenario), None
    if config.classifier == "zero_shot":
        clip = _encoder(*encoder)[1]
        zero_shot = zero_shot_head(
            clip, [name.replace("_", " ").replace("-", " ") for name in found.classes]
        )
    plasticity = None
    if config.plasticity:
        loaded = load_saes(saes, device=encoder[3])
        plasticity = Plasticity(loaded, background=_background(Path(saes), loaded))
    return run_tasks(
        found,
        lambda: _encoder(*encoder)[0],
        config,
        zero_shot=zero_shot,
        plasticity=plasticity,
        out=out,
        workers=workers,
        asked=encoder[4],
    )


_BACKGROUND = "background.safetensors"


def _background(folder: Path, saes: Any) -> Any:
    from clipsteer.io.files import FileFormatError, read_safetensors

    usage = read_safetensors(folder / _BACKGROUND)
    if lost := [block for block in saes if block not in usage]:
        raise FileFormatError(f"{folder / _BACKGROUND}: no usage of {', '.join(lost)}")
    return {block: usage[block] for block in saes}


def _fit_saes(folder: Path, images: Any, encoder: tuple[Any, ...]) -> None:
    """SAEs of every block from images of all kinds, and the usage that these have on average."""
    from clipsteer.clip.pixels import pixel_batches
    from clipsteer.continual.plasticity import Plasticity, fit_saes, load_saes, save_saes
    from clipsteer.io.files import write_safetensors

    tower = _encoder(*encoder)[0]
    if any(folder.glob("*/cfg.json")):  # somebody's own: only what they have in common is lacking
        saes = load_saes(folder, device=encoder[3])
    else:
        size = {"d_sae": 4 * tower.width, "k": 16, "steps": SAE_STEPS}
        saes = fit_saes(tower.module, tower.blocks, pixel_batches(tower, images), **size)
        for block, sae in saes.items():
            sae.metadata.update(tower.origins[block])
        folder.mkdir(parents=True, exist_ok=True)
        save_saes(folder, saes)
    usage = Plasticity(saes).usage(tower.module, pixel_batches(tower, images))
    write_safetensors(folder / _BACKGROUND, usage)


@lists_unreadable
def _cil(args: argparse.Namespace) -> int:
    from clipsteer.training.claim import claimed

    with claimed(args.out, "cil"):
        return _learn(args)


def _learn(args: argparse.Namespace) -> int:
    from clipsteer.continual.experiment import folder_name, run_all
    from clipsteer.continual.report import write_results
    from clipsteer.data.files import is_emoji

    by_paper = args.recipe == "paper"
    model = args.model or (PAPER_MODEL if by_paper else "emojiclip")
    encoder = (model, args.pretrained, by_paper, device_of(args), setup_options(args))
    names = _runnable(_names(args.strategy), args.strategy, encoder)
    configs, settings = configs_of(args, names)
    place = (args.data, args.tasks, args.init_cls, args.increment, args.split, args.measure)
    parts = () if is_emoji(args.data) else ("train", "test")
    skipped = unreadable_files(args, [Path(args.data) / part for part in parts])
    saes = args.saes or args.out / "saes"
    if any(config.plasticity for config in configs) and not (saes / _BACKGROUND).exists():
        images = args.sae_images or ("emoji" if is_emoji(args.data) else None)
        if images is None:
            raise ValueError(
                "plasticity needs --sae-images, images of all kinds that SAEs of the blocks are "
                "trained on"
            )
        _fit_saes(saes, open_images(args, images, emoji="trained:seen"), encoder)
    jobs = []
    for config in configs:
        job = {
            "scenario": (*place, config.seed, skipped),
            "encoder": encoder,
            "config": config,
            "saes": str(saes),
            "out": args.out / "runs" / folder_name(config),
            "workers": args.workers,
        }
        jobs.append((_run, job))
    runs = run_all(jobs, workers=args.jobs, title="cil")
    notes = {
        "data": _data_note(args, _scenario(*place, configs[0].seed, skipped)),
        "model": model,
        **settings,
    }
    reference = "macil" if "macil" in names else names[0]
    written = write_results(args.out, runs, notes, reference=reference)
    sys.stdout.write((args.out / "summary.md").read_text(encoding="utf-8"))
    sys.stdout.writelines(f"{path}\n" for path in written)
    return 0


def _data_note(args: argparse.Namespace, found: Any) -> str:
    classes = f"{len(found.classes)} classes in {len(found.tasks)} tasks"
    images = f"{len(found.train)} images to learn from, {len(found.test)} to measure on"
    return f"{args.data}, {classes}, {images} ({args.measure}{_split_note(args)})"


def _split_note(args: argparse.Namespace) -> str:
    from clipsteer.data.files import is_emoji

    if not is_emoji(args.data):
        return ""
    return {"concepts": ": new concepts, all styles", "styles": ": a new style"}[args.split]
