"""``clipsteer wise-ft``: merge and curve."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import add_device, add_setup, add_workers, device_of, setup_options
from clipsteer.cli.images import add_skip_unreadable, lists_unreadable, open_images

DATA = (
    "emoji:STYLE:PART, a folder of class folders, captions .csv/.jsonl or .tar shards (captions "
    "are classes)"
)


def add_parser(commands: Any, add: Any) -> None:
    """Add ``wise-ft`` and its subcommands; ``add(parent, name, function, summary, examples,
    options)`` makes one."""
    wise = add(
        commands,
        "wise-ft",
        None,
        "average zero-shot and fine-tuned weights, and see what it does",
        """
examples:
  tune, average, and look at the whole curve on the same set and on a shifted one:
    clipsteer finetune --data emoji:noto:train --out runs/noto
    clipsteer wise-ft merge runs/noto/zeroshot runs/noto/finetuned --out runs/noto/half
    clipsteer wise-ft curve runs/noto/zeroshot runs/noto/finetuned --reference emoji:noto:test \\
        --shifted emoji:twemoji:test --out runs/noto/curve

each ACTION has --help with more
""",
    )
    actions = wise.add_subparsers(dest="action", metavar="ACTION", required=True)
    add(
        actions,
        "merge",
        _merge,
        "average two checkpoints in weight space",
        """
examples:
  two weight files:
    clipsteer wise-ft merge zeroshot.safetensors finetuned.safetensors --alpha 0.5 \\
        --out merged.safetensors
  the two ends of a clipsteer finetune run, head included, at three alphas in one pass:
    clipsteer wise-ft merge runs/b32/zeroshot runs/b32/finetuned --alpha 0.3 0.5 0.7 \\
        --out runs/b32/alpha-{alpha}
  by layer: all but the image tower's blocks stays zero-shot
    clipsteer wise-ft merge zs/ ft/ --layer 'visual.transformer.*=0.7' --layer '*=0' \\
        --out merged.safetensors
""",
        _merge_options,
    )
    add(
        actions,
        "curve",
        _curve,
        "measure accuracy along the line from zero-shot to fine-tuned",
        """
examples:
  clipsteer wise-ft curve runs/noto/zeroshot runs/noto/finetuned --reference emoji:noto:test \\
      --shifted emoji:fluent:test --shifted emoji:twemoji:test --out runs/noto/curve
  your own sets, every tenth, with the trend of ordinary models for effective robustness:
    clipsteer wise-ft curve runs/b32/zeroshot runs/b32/finetuned --reference photos/val \\
        --shifted sketches/ \\
        --alphas 0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 1 --baseline models.csv --out curve/
""",
        _curve_options,
    )


def _merge_options(p: argparse.ArgumentParser) -> None:
    _ends(p, "a weights file, an index of shards, or a folder")
    how = p.add_mutually_exclusive_group()
    how.add_argument(
        "--alpha",
        type=float,
        nargs="+",
        default=[0.5],
        metavar="A",
        help="0 zero-shot, 1 fine-tuned (default: 0.5)",
    )
    how.add_argument(
        "--layer",
        type=_layer,
        action="append",
        metavar="PATTERN=A",
        help="alpha of the tensors that match; the first match counts",
    )
    p.add_argument(
        "--out", required=True, metavar="PATH", help="with {alpha} in it for several alphas"
    )


def _curve_options(p: argparse.ArgumentParser) -> None:
    _ends(p, "the folder zeroshot/ of a clipsteer finetune run, or one like it")
    p.add_argument("--reference", action="append", required=True, metavar="PATH", help=DATA)
    p.add_argument(
        "--shifted",
        action="append",
        required=True,
        metavar="PATH",
        help="repeatable; the same kinds",
    )
    p.add_argument("--alphas", type=float, nargs="+", metavar="A", help="(default: 0, 0.05 … 1)")
    p.add_argument(
        "--baseline",
        type=Path,
        metavar="CSV",
        help="of models trained on the reference alone: the columns reference, reference_n, "
        "shifted, shifted_n",
    )
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for curve.html, .csv, .svg and .png"
    )
    add_skip_unreadable(p)
    add_setup(p)
    add_device(p)
    add_workers(p)


def _ends(p: argparse.ArgumentParser, kind: str) -> None:
    p.add_argument("zeroshot", metavar="ZEROSHOT", help=f"before fine-tuning: {kind}")
    p.add_argument("finetuned", metavar="FINETUNED", help="after fine-tuning")


def _layer(text: str) -> tuple[str, float]:
    pattern, sign, alpha = text.rpartition("=")
    try:
        if not pattern:
            raise ValueError
        return pattern, float(alpha)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected PATTERN=ALPHA such as visual.*=0.5, got {text!r}"
        ) from None


def _is_classifier(path: str | Path) -> bool:
    return all(
        (Path(path) / name).is_file()
        for name in ("config.json", "model.safetensors", "head.safetensors")
    )


def _merge(args: argparse.Namespace) -> int:
    from clipsteer.ensembles.merging import wise_ft

    alpha: Any = (
        dict(args.layer) if args.layer else args.alpha if len(args.alpha) > 1 else args.alpha[0]
    )
    if not (_is_classifier(args.zeroshot) and _is_classifier(args.finetuned)):
        written = wise_ft(args.zeroshot, args.finetuned, alpha, args.out)
        written = written if isinstance(written, list) else [written]
    else:
        if isinstance(alpha, list) and "{alpha}" not in args.out:
            raise ValueError(f"for several alphas --out needs {{alpha}} in it, got {args.out}")
        alphas = alpha if isinstance(alpha, list) else [alpha]
        written = [
            Path(args.out if args.layer else args.out.replace("{alpha}", f"{a:g}")) for a in alphas
        ]
        _merge_classifiers(Path(args.zeroshot), Path(args.finetuned), alphas, written)
    sys.stdout.writelines(f"{path}\n" for path in written)
    return 0


def _merge_classifiers(
    zeroshot: Path, finetuned: Path, alphas: list[Any], folders: list[Path]
) -> None:
    """Average model and head of two run folders; no folder changes before every file of all of them
    is written.

    A process that is killed outright leaves a hidden folder, .NAME.….tmp, beside the one it was
    writing; the next merge into that one removes it.
    """
    from contextlib import ExitStack

    from clipsteer.clip.classifier import HEAD
    from clipsteer.clip.runs import ARCHITECTURE, CONFIG, WEIGHTS
    from clipsteer.ensembles.merging import deciding, wise_ft
    from clipsteer.io.files import json_object, read_json, read_safetensors_header, write_json
    from clipsteer.io.locks import temporary_folder

    config, other = (
        json_object(folder / CONFIG, read_json(folder / CONFIG)) for folder in (zeroshot, finetuned)
    )
    if config.get("classes") != other.get("classes"):
        raise ValueError(f"{zeroshot} and {finetuned} are classifiers of different classes")
    heads = models = alphas
    if isinstance(alphas[0], Mapping):
        # patterns see one model, whose head is head.weight and head.bias; in a file of its own it
        # has no prefix
        layers = alphas[0]
        names = {
            part: [
                e.name for e in read_safetensors_header(zeroshot / f"{part}.safetensors").entries
            ]
            for part in ("head", "model")
        }
        chosen = deciding(layers, [*(f"head.{name}" for name in names["head"]), *names["model"]])
        heads = [{name: layers[chosen[f"head.{name}"]] for name in names["head"]}]
        of_model = {chosen[name] for name in names["model"]}
        models = [{pattern: a for pattern, a in layers.items() if pattern in of_model}]
    with ExitStack() as stack:
        resolved = [folder.resolve() for folder in folders]
        unfinished = [stack.enter_context(temporary_folder(folder)) for folder in resolved]
        for part, values in (("head", heads), ("model", models)):
            file = f"{part}.safetensors"
            wise_ft(
                zeroshot / file,
                finetuned / file,
                values,
                [temporary / file for temporary in unfinished],
            )
        architecture = zeroshot / ARCHITECTURE
        for temporary, a in zip(unfinished, alphas):
            if architecture.is_file():
                write_json(temporary / ARCHITECTURE, read_json(architecture))
            write_json(temporary / CONFIG, {**config, "wise_ft_alpha": a})
        for temporary, folder in zip(unfinished, folders):
            if folder.exists():  # it may hold other things too
                for name in (HEAD, WEIGHTS, ARCHITECTURE, CONFIG):
                    if (temporary / name).is_file():
                        (temporary / name).replace(folder / name)
            else:
                temporary.rename(folder)


@lists_unreadable
def _curve(args: argparse.Namespace) -> int:
    import torch

    from clipsteer.clip.classifier import load_classifier
    from clipsteer.data.dataset import labelled, renamed
    from clipsteer.ensembles import page as robustness_page
    from clipsteer.ensembles import robustness
    from clipsteer.ensembles.merging import same_setup
    from clipsteer.report.page import write_csv

    models = _models(args.baseline) if args.baseline is not None else []
    baseline = robustness.fit_baseline(models) if models else None
    where = {"device": device_of(args), **setup_options(args)}
    clip, classifier, classes = load_classifier(args.finetuned, **where)
    first, start, same = load_classifier(args.zeroshot, **where)
    same_setup(args.zeroshot, first.setup, args.finetuned, clip.setup)
    if same != classes:
        raise ValueError(
            f"{args.zeroshot} and {args.finetuned} are classifiers of different classes"
        )
    sets = []
    for role in ("reference", "shifted"):
        for spec in getattr(args, role):
            images = renamed(labelled(open_images(args, spec), f"--{role}"), classes)
            sets.append(
                robustness.EvalSet(
                    spec, role, _kept(clip, images, args.workers), torch.tensor(images.targets)
                )
            )
    zeroshot = {name: tensor.detach() for name, tensor in start.state_dict().items()}
    rows = robustness.curve(zeroshot, classifier, sets, args.alphas or robustness.ALPHAS)
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "curve.csv", rows)
    subtitle = f"{clip.name}: from {args.zeroshot} to {args.finetuned}, {len(classes)} classes"
    robustness_page.write_page(
        args.out / "curve.html", rows, subtitle=subtitle, baseline=baseline, models=models
    )
    chart, _ = robustness_page.curve_charts(rows, baseline, models)
    drawn = chart.write(args.out / "curve.svg")
    show(robustness.summary(rows, baseline))
    sys.stdout.write(
        "".join(f"{path}\n" for path in (args.out / "curve.html", *drawn, args.out / "curve.csv"))
    )
    return 0


def _kept(clip: Any, images: Any, workers: int) -> Any:
    """Batches of a set for every alpha: read once while they fit into 1 GiB, read anew
    otherwise."""
    from clipsteer.clip.pixels import pixel_batches

    first = next(iter(pixel_batches(clip, images, 1)))
    if first.nbytes * len(images) > 1 << 30:
        return lambda: pixel_batches(clip, images, workers=workers)
    batches = list(pixel_batches(clip, images, workers=workers))
    return lambda: batches


def _models(path: Path) -> list[tuple[float, int, float, int]]:
    import csv
    import io

    from clipsteer.io.files import FileFormatError, read_text

    columns = ("reference", "reference_n", "shifted", "shifted_n")
    file = io.StringIO(read_text(path), newline="")
    try:
        rows = [tuple(float(row[c]) for c in columns) for row in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise FileFormatError(
            f"{path}: expected numbers in the columns {', '.join(columns)}: {error}"
        ) from None
    if bad := [
        row
        for row in rows
        if not (0 <= row[0] <= 1 and 0 <= row[2] <= 1)
        or not all(1 <= row[place] <= 1 << 53 for place in (1, 3))
    ]:
        raise FileFormatError(
            f"{path}: accuracies must be in [0, 1] and counts at least 1, got {bad[0]}"
        )
    return [(a, int(n), b, int(m)) for a, n, b, m in rows]


def show(found: Mapping[str, Any]) -> None:
    """Print the curve of each way to average."""
    from clipsteer.ensembles.page import ENDS
    from clipsteer.report.page import percent

    sys.stdout.write(f"{'':<30} {'reference':>9} {'shifted':>9}\n")
    for method in ("weight", "output"):
        for end, title in ENDS.items():
            if end in found[method]:
                row = found[method][end]
                name = f"{method}-space, {title}" + (
                    f" = {row['alpha']:g}" if end == "oracle" else ""
                )
                extra = (
                    f"  effective robustness {100 * row['effective_robustness']:+.1f}"
                    if "effective_robustness" in row
                    else ""
                )
                sys.stdout.write(
                    f"{name:<30} {percent(row['reference']):>8}% "
                    f"{percent(row['shifted']):>8}%{extra}\n"
                )
