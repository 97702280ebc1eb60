"""Train EmojiCLIP from scratch on Noto, Fluent and OpenMoji drawings of the seen concepts; Twemoji is never shown.

    python -m benchmarks.emojiclip.build --work CACHE --train-set DIR
    python -m benchmarks.emojiclip.train --train-set DIR --state STATE --bf16 --teachers teachers.safetensors

A run killed at any time resumes from STATE. Finished weights, log and figures go to emoji/ beside this script.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.emojiclip.evaluate import (
    HERE,
    MEAN,
    STD,
    TEMPLATES,
    TRAINED,
    TrainSet,
    build,
    encode_text,
    evaluate,
    headline,
    write_merges,
)


def augment(x: torch.Tensor, flippable: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """(B, 3, 64, 64) in [0, 1] -> the same, distorted; every step leaves the white background white."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(len(x), *shape, generator=g) * (high - low) + low

    angle, zoom = uniform(-0.3, 0.3), uniform(0.8, 1.3)
    aspect, shear = uniform(0.88, 1.14), uniform(-0.15, 0.15)
    flip = torch.where(flippable & (uniform(0, 1) < 0.5), -1.0, 1.0)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    shift = uniform(-0.15, 0.15, 2)
    theta = torch.stack([cos * flip * aspect, shear - sin, shift[:, 0], sin * flip, cos / aspect, shift[:, 1]], 1)
    grid = F.affine_grid(theta.view(-1, 2, 3), list(x.shape), align_corners=False)
    x = 1 - F.grid_sample(1 - x, grid, align_corners=False)

    # Colour matrices whose rows add up to 1: saturation, hue and a little channel mixing.
    grey = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    saturation = torch.where(uniform(0, 1) < 0.1, 0.0, uniform(0.5, 1.6)).view(-1, 1, 1)
    turn = uniform(-0.35, 0.35)
    axis = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    hue = torch.matrix_exp(turn.view(-1, 1, 1) * axis)
    mix = torch.eye(3) * saturation + grey * (1 - saturation)
    x = torch.bmm(mix @ hue, x.flatten(2)).view_as(x).clamp_(1e-4, 1)
    x = x ** uniform(0.6, 1.7, 1, 1, 1)

    # From blurred to sharpened, then for some few grey levels: flat drawings, outlines and shaded ones grow alike.
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + (x - soft) * uniform(-1, 1.5, 1, 1, 1)
    levels = uniform(2, 7, 1, 1, 1).round()
    x = torch.where(uniform(0, 1, 1, 1, 1) < 0.2, (x * levels).round() / levels, x)
    return x.clamp_(0, 1)


class Captions:
    def __init__(self, rows: list[dict]):
        self.rows = rows

    def draw(self, i: int, g: torch.Generator) -> tuple[str, str]:
        """A caption of concept i, and the phrase it holds."""
        row = self.rows[i]
        kind, template, pick = torch.rand(3, generator=g).tolist()
        tags = row["tags"] or [row["label"]]
        tag = tags[int(pick * len(tags))]
        if kind < 0.6:
            text = row["label"]
        elif kind < 0.8:
            text = f"{row['label']}, {tag}"
        elif kind < 0.9:
            text = f"{row['label']}, {row['subcategory'].replace('-', ' ')}"
        else:
            text = tag
        return TEMPLATES[int(template * len(TEMPLATES))].format(text), text


def lr_at(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def atomic(path: Path, write) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.chmod(0o644)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class Trainer:
    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        self.args, self.data = args, TrainSet(args.train_set)
        self.model, self.tokenizer = build()
        self.model.visual.patch_dropout = open_clip_patch_dropout(args.patch_dropout)
        self.captions = Captions(self.data.rows)
        self.seen = self.data.seen.nonzero()[:, 0]
        self.column = torch.full((len(self.data.rows),), -1).index_put((self.seen,), torch.arange(len(self.seen)))
        self.weights = torch.where(self.data.country, args.flag_weight, 1.0)[self.seen]
        self.teach = args.teachers is not None
        width = self.model.visual.output_dim
        if self.teach:
            self._load_teachers(args.teachers)
        self.heads = torch.nn.ModuleDict(
            {
                "text": torch.nn.Linear(width, 384),
                "image": torch.nn.Linear(self.model.visual.ln_post.weight.numel(), 256),
            }
        )
        self.pooled: torch.Tensor | None = None
        self.model.visual.ln_post.register_forward_hook(lambda m, i, out: setattr(self, "pooled", out[:, 0]))
        self.params = {
            **dict(self.model.named_parameters()),
            **{f"heads.{k}": v for k, v in self.heads.named_parameters()},
        }
        decay = [p for p in self.params.values() if p.ndim >= 2]
        rest = [p for p in self.params.values() if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
        self.ema = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.step, self.spent = 0, 0.0

    def _load_teachers(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            texts = json.loads(file.metadata()["texts"])
            self.text_target, self.image_target = file.get_tensor("text").float(), file.get_tensor("image").float()
        self.text_row = {text: i for i, text in enumerate(texts)}
        self.phrases = texts

    # State is safetensors alone: each step seeds its own generator, so no generator state is kept.
    def save(self) -> None:
        state = {f"param.{k}": v.detach() for k, v in self.params.items()}
        state |= {f"ema.{k}": v for k, v in self.ema.items()}
        for name, p in self.params.items():
            for key, value in self.optimizer.state[p].items():
                state[f"adam.{key}.{name}"] = value
        meta = {"step": str(self.step), "spent": str(self.spent)}
        atomic(self.args.state / "state.safetensors", lambda p: save_file(state, p, metadata=meta))

    def load(self) -> None:
        from safetensors import safe_open

        with safe_open(self.args.state / "state.safetensors", "pt") as file:
            self.step, self.spent = int(file.metadata()["step"]), float(file.metadata()["spent"])
            for name, p in self.params.items():
                p.data.copy_(file.get_tensor(f"param.{name}"))
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[p] = {k: file.get_tensor(f"adam.{k}.{name}") for k in keys}
            self.ema = {k: file.get_tensor(f"ema.{k}") for k in self.ema}

    def batch(self, g: torch.Generator):
        pick = torch.multinomial(self.weights, self.args.concepts, generator=g)
        concepts = self.seen[pick]
        images, owner, styles = [], [], []
        for s, style in enumerate(TRAINED):
            kept = torch.rand(len(concepts), generator=g) < self.args.keep_style
            there = (self.data.drawn[style][concepts] & kept).nonzero()[:, 0]
            images.append(self.data.images[style][concepts[there]])
            owner.append(there)
            styles.append(torch.full_like(there, s))
        x = torch.cat(images).permute(0, 3, 1, 2).float() / 255
        owner, styles = torch.cat(owner), torch.cat(styles)
        # Now and then a blend of two styles of one concept, which belongs to neither.
        order = torch.argsort(owner, stable=True)
        partner = torch.empty_like(order).index_put((order,), order.roll(1))
        blend = torch.rand(len(x), generator=g) * 0.5 * (torch.rand(len(x), generator=g) < 0.2)
        blend = (blend * (owner == owner[partner])).view(-1, 1, 1, 1)
        x = x * (1 - blend) + x[partner] * blend
        x = augment(x, self.data.flippable[concepts[owner]], g)
        drawn = [self.captions.draw(int(i), g) for i in concepts]
        return (x - MEAN) / STD, owner, styles, concepts, self.tokenizer([d[0] for d in drawn]), [d[1] for d in drawn]

    def losses(self, g: torch.Generator) -> dict[str, torch.Tensor]:
        args = self.args
        x, owner, styles, concepts, tokens, phrases = self.batch(g)
        extra: list[int] = []
        if self.teach:
            extra = torch.randint(len(self.phrases), (args.words,), generator=g).tolist()
            templates = torch.randint(2 * len(TEMPLATES), (args.words,), generator=g).tolist()
            # half of them bare, half in a template
            phrase = [
                (*TEMPLATES, *["{}"] * len(TEMPLATES))[t].format(self.phrases[e]) for e, t in zip(extra, templates)
            ]
            tokens = torch.cat([tokens, self.tokenizer(phrase)])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            z = self.model.encode_image(x).float()
            t = encode_text(self.model, tokens).float()
        z = F.normalize(z, dim=-1)  # (B, e)
        t_all = F.normalize(t, dim=-1)
        t = t_all[: len(concepts)]
        scale = self.model.logit_scale.exp()
        logits = scale * z @ t.T  # (images, concepts)
        loss = {"i2t": F.cross_entropy(logits, owner, label_smoothing=args.smoothing)}
        positive = (torch.arange(len(t))[:, None] == owner).float()
        loss["t2i"] = -((logits.T.log_softmax(1) * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()
        if self.teach:
            rows = [self.text_row.get(p, -1) for p in phrases] + extra
            known = torch.tensor([r >= 0 for r in rows])
            target = self.text_target[[r for r in rows if r >= 0]]
            loss["words"] = 1 - F.cosine_similarity(self.heads["text"](t_all[known]), target).mean()
            target = self.image_target[styles, concepts[owner]]
            loss["vision"] = 1 - F.cosine_similarity(self.heads["image"](self.pooled.float()), target).mean()
        return loss

    def train_step(self) -> dict[str, float]:
        args = self.args
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + self.step)
        torch.manual_seed(args.seed * 1_000_003 + self.step)  # patch dropout draws from the global generator
        self.model.train()
        # Fewer patches early on: cheaper steps while the features are still coarse (as in FLIP).
        early = self.step < 0.75 * args.steps
        self.model.visual.patch_dropout.prob = args.patch_dropout if early else 0.0
        # 17 tokens a sequence: the plain attention beats the flash kernel's backward twice over on a CPU.
        with sdpa_kernel(SDPBackend.MATH):
            parts = self.losses(g)
        weight = {"i2t": 1.0, "t2i": 0.5, "words": args.words_weight, "vision": args.vision_weight}
        total = sum(weight[k] * v for k, v in parts.items())
        lr = lr_at(self.step, args.steps, args.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))
            keep = min(args.ema, (self.step + 1) / (self.step + 10))
            for k, v in self.model.state_dict().items():
                self.ema[k].lerp_(v.detach().float(), 1 - keep)
        self.step += 1
        return {**{k: round(v.item(), 4) for k, v in parts.items()}, "grad": round(norm.item(), 3), "lr": lr}

    def averaged(self):
        model, _ = build()
        model.load_state_dict(self.ema)
        return model.eval()

    def export(self, folder: Path) -> None:
        half = {k: v.half().contiguous() for k, v in self.ema.items() if k != "attn_mask"}
        meta = {"name": "emojiclip", "step": str(self.step), "steps": str(self.args.steps), "seed": str(self.args.seed)}
        atomic(folder / "emojiclip.safetensors", lambda p: save_file(half, p, metadata=meta))

    def run(self) -> None:
        args = self.args
        args.state.mkdir(parents=True, exist_ok=True)
        if (args.state / "state.safetensors").exists():
            self.load()
        log_path = args.state / "log.jsonl"
        lines = log_path.read_text().splitlines() if log_path.exists() else []
        lines = [line for line in lines if json.loads(line)["step"] <= self.step]
        atomic(log_path, lambda p: p.write_text("".join(f"{line}\n" for line in lines)))
        begun = time.monotonic() - self.spent
        with open(log_path, "a", buffering=1) as log:
            while self.step < args.steps:
                record = {"step": self.step + 1, **self.train_step()}
                self.spent = time.monotonic() - begun
                if self.step % args.eval_every == 0 or self.step == args.steps:
                    record["r1"] = headline(evaluate(self.averaged(), self.tokenizer, self.data))
                if self.step % 10 == 0 or "r1" in record:
                    log.write(json.dumps({**record, "seconds": round(self.spent, 1)}) + "\n")
                if self.step % args.save_every == 0 or self.step == args.steps:
                    self.save()
                    if args.preview:
                        self.export(HERE)


def open_clip_patch_dropout(prob: float):
    from open_clip.transformer import PatchDropout

    return PatchDropout(prob)


def finish(trainer: Trainer) -> None:
    """Export, and measure what was exported."""
    args = trainer.args
    trainer.export(HERE)
    atomic(HERE / "train_log.jsonl", lambda p: p.write_bytes((args.state / "log.jsonl").read_bytes()))
    model, tokenizer = build(HERE / "emojiclip.safetensors")
    settings = {k: v for k, v in vars(args).items() if k not in ("train_set", "state", "preview")}
    settings["teachers"] = args.teachers is not None
    result = {"training": settings, **evaluate(model, tokenizer, trainer.data)}
    atomic(HERE / "figures.json", lambda p: p.write_text(json.dumps(result, indent=1) + "\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-set", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder for resumable state, outside the repository")
    parser.add_argument("--teachers", type=Path, help="output of teachers.py")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concepts", type=int, default=192, help="concepts a batch, each in up to three styles")
    parser.add_argument("--keep-style", type=float, default=0.67, help="share of a concept's drawings in its batch")
    parser.add_argument("--words", type=int, default=96, help="phrases a batch for the text teacher alone")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--smoothing", type=float, default=0.05)
    parser.add_argument("--patch-dropout", type=float, default=0.25)
    parser.add_argument("--flag-weight", type=float, default=0.35)
    parser.add_argument("--words-weight", type=float, default=2.0)
    parser.add_argument("--vision-weight", type=float, default=2.0)
    parser.add_argument("--ema", type=float, default=0.996)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--preview", action="store_true", help="also export unfinished averaged weights while training")
    args = parser.parse_args()
    if not (HERE / "bpe_merges.txt.gz").exists():
        write_merges(HERE / "bpe_merges.txt.gz")
    trainer = Trainer(args)
    trainer.run()
    finish(trainer)


if __name__ == "__main__":
    main()
