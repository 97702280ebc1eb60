"""Load EmojiCLIP and measure it: retrieval, N-way zero-shot and subcategories, by style and by seen or unseen concepts.

python -m benchmarks.emojiclip.build --work CACHE --train-set DIR
python -m benchmarks.emojiclip.evaluate --train-set DIR
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from clipsteer import assets
from clipsteer.clip.zero_shot import EMOJI_TEMPLATES as TEMPLATES

HERE = assets.EMOJI
TRAINED, HELD_OUT = ("noto", "fluent", "openmoji"), "twemoji"
VOCAB = 8192
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


def first_merges(count: int) -> list[str]:
    from open_clip.tokenizer import default_bpe

    return gzip.open(default_bpe()).read().decode().split("\n")[1 : count + 1]


def write_merges(path: Path) -> None:
    """CLIP's merges cut to VOCAB tokens: 512 bytes, the merges, two specials. No unknown words, and a small table."""
    text = "\n".join(["#version: 0.2", *first_merges(VOCAB - 514)])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


class TrainSet:
    def __init__(self, folder: Path):
        tensors = load_file(folder / "images.safetensors")
        self.rows = json.loads((folder / "concepts.json").read_text())
        self.images = {s: tensors[s] for s in (*TRAINED, HELD_OUT)}  # (n, 64, 64, 3) uint8
        self.drawn = {s: tensors[f"{s}.drawn"].bool() for s in self.images}
        self.seen = torch.tensor([r["seen"] for r in self.rows])
        self.country = torch.tensor([r["subcategory"] in ("country-flag", "subdivision-flag") for r in self.rows])
        directed = ("left", "right", "facing", "clockwise", "forward", "reverse", "o’clock", "thirty")
        fixed = ("symbols", "flags")
        self.flippable = torch.tensor(
            [r["category"] not in fixed and not any(w in r["label"] for w in directed) for r in self.rows]
        )


def encode_text(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """`model.encode_text` without the padding columns, which the causal mask hides anyway."""
    length = int((tokens != 0).sum(1).max())
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[torch.arange(len(x)), tokens.argmax(1)] @ model.text_projection


def build(weights: Path | None = None):
    import open_clip

    open_clip.add_model_config(HERE / "emojiclip.json")
    model = open_clip.create_model("emojiclip", pretrained=str(weights) if weights else None)
    return model, open_clip.get_tokenizer("emojiclip", bpe_path=str(HERE / "bpe_merges.txt.gz"))


@torch.no_grad()
def embed(model, tokenizer, data: TrainSet) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Unit image embeddings by style (n, e) and template-averaged unit label embeddings (n, e)."""
    model.eval()
    images = {}
    for style, pixels in data.images.items():
        parts = [(p.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD for p in pixels.split(256)]
        images[style] = torch.cat([F.normalize(model.encode_image(p).float(), dim=-1) for p in parts])
    text = torch.zeros(len(data.rows), images[HELD_OUT].shape[1])
    for template in TEMPLATES:
        tokens = tokenizer([template.format(r["label"]) for r in data.rows])
        text += torch.cat([F.normalize(encode_text(model, t).float(), dim=-1) for t in tokens.split(256)])
    return images, F.normalize(text, dim=-1)


def recall(images: torch.Tensor, text: torch.Tensor, pool: torch.Tensor, drawn: torch.Tensor) -> dict:
    """Image→text R@1 and R@5 with every text of the pool as a candidate."""
    candidates = pool.nonzero()[:, 0]
    rank = {int(c): r for r, c in enumerate(candidates)}
    queries = (pool & drawn).nonzero()[:, 0]
    scores = images[queries] @ text[candidates].T
    top = scores.topk(min(5, len(candidates))).indices
    truth = torch.tensor([rank[int(q)] for q in queries])[:, None]
    hit = top == truth
    share = lambda h: round(h.any(1).float().mean().item(), 4)
    return {"r1": share(hit[:, :1]), "r5": share(hit), "queries": len(queries), "candidates": len(candidates)}


def n_way(images: torch.Tensor, text: torch.Tensor, pool: torch.Tensor, ways: int, draws: int = 200) -> dict:
    """Mean accuracy (and its standard error) over draws of `ways` concepts; the draws are seeded 0."""
    g = torch.Generator().manual_seed(0)
    members = pool.nonzero()[:, 0]
    scores = images @ text.T
    hits = []
    for _ in range(draws):
        pick = members[torch.randperm(len(members), generator=g)[:ways]]
        hits.append((scores[pick][:, pick].argmax(1) == torch.arange(ways)).float().mean())
    hits = torch.stack(hits)
    mean, sem = hits.mean().item(), (hits.std() / math.sqrt(draws)).item()
    return {"accuracy": round(mean, 4), "sem": round(sem, 4), "draws": draws, "pool": len(members)}


def subcategory(images, model, tokenizer, data: TrainSet, pool: torch.Tensor, names: list[str]) -> dict:
    """Zero-shot accuracy over subcategory names."""
    with torch.no_grad():
        head = sum(
            F.normalize(encode_text(model, tokenizer([t.format(n.replace("-", " ")) for n in names])), dim=-1)
            for t in TEMPLATES
        )
    truth = torch.tensor([names.index(r["subcategory"]) if r["subcategory"] in names else -1 for r in data.rows])
    keep = pool & (truth >= 0)
    right = (images[keep] @ F.normalize(head, dim=-1).T).argmax(1) == truth[keep]
    recalls = [right[truth[keep] == c].float().mean() for c in truth[keep].unique()]
    return {
        "accuracy": round(right.float().mean().item(), 4),
        "balanced": round(torch.stack(recalls).mean().item(), 4),
        "ways": len(names),
        "queries": int(keep.sum()),
    }


def evaluate(model, tokenizer, data: TrainSet) -> dict:
    images, text = embed(model, tokenizer, data)
    seen, unseen = data.seen, ~data.seen
    trained_mark = "training images"
    every = sorted({r["subcategory"] for r in data.rows if r["subcategory"] != "country-flag"})
    classes = sorted({r["subcategory"] for r in data.rows if r["classify30"]})
    test = torch.tensor([r["classify30"] == "test" for r in data.rows])
    result: dict = {"templates": list(TEMPLATES), "styles": {}}
    for style, z in images.items():
        drawn = data.drawn[style]
        result["styles"][style] = {
            "shown_in_training": trained_mark if style in TRAINED else "never",
            "image_to_text_seen": recall(z, text, seen, drawn),
            "image_to_text_seen_without_country_flags": recall(z, text, seen & ~data.country, drawn),
            "image_to_text_unseen": recall(z, text, unseen, drawn),
            "n_way_seen": {n: n_way(z, text, seen & drawn, n) for n in (10, 50, 100)},
            "n_way_seen_without_country_flags": {
                n: n_way(z, text, seen & drawn & ~data.country, n) for n in (10, 50, 100)
            },
            "n_way_unseen": {n: n_way(z, text, unseen & drawn, n) for n in (10, 30)},
            "subcategory_seen": subcategory(z, model, tokenizer, data, seen & drawn, every),
            "subcategory_unseen": subcategory(z, model, tokenizer, data, unseen & drawn, every),
            "classify30_test": subcategory(z, model, tokenizer, data, test & drawn, classes),
        }
    return result


def headline(result: dict) -> dict:
    return {
        f"{style}_{key}": r[f"image_to_text_{key}"]["r1"]
        for style, r in result["styles"].items()
        for key in ("seen", "unseen")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-set", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=HERE / "emojiclip.safetensors")
    args = parser.parse_args()
    model, tokenizer = build(args.weights)
    print(json.dumps(evaluate(model, tokenizer, TrainSet(args.train_set)), indent=1))


if __name__ == "__main__":
    main()
