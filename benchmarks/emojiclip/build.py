"""Build the EmojiStyles bundle, and the larger training set, from pinned npm packages.

    python -m benchmarks.emojiclip.build --work CACHE                     # drawings and labels, to emoji/
    python -m benchmarks.emojiclip.build --work CACHE --train-set DIR     # all 1,906 concepts in four styles, to DIR

Needs npm, Pillow, NumPy, safetensors and resvg-py. Packages are downloaded to CACHE once and checked by SHA-512.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import subprocess
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from clipsteer import assets

PACKAGES = {
    "emojibase-data@17.0.0": "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "@iconify-json/noto@1.2.9": (
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="
    ),
    "@iconify-json/twemoji@1.2.5": (
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="
    ),
    "@lobehub/fluent-emoji-3d@1.1.0": (
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="
    ),
    "openmoji@17.0.0": "EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
}
BUNDLED = ("noto", "twemoji", "fluent")
STYLES = (*BUNDLED, "openmoji")
CONCRETE = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
SIZE, COLUMNS, SEED = 64, 32, 0
UNSEEN, CLASS_SIZE, CLASS_TEST = 283, 12, 0.30  # 283 of 1,906 concepts: 15 %


def fetch(work: Path) -> dict[str, Path]:
    """Download, verify and unpack every package; returns name -> package folder."""
    folders = {}
    for spec, digest in PACKAGES.items():
        name, version = spec.rsplit("@", 1)
        stem = name.lstrip("@").replace("/", "-")
        archive, folder = work / f"{stem}-{version}.tgz", work / f"{stem}-{version}"
        if not archive.exists():
            subprocess.run(["npm", "pack", spec, "--pack-destination", str(work)], check=True, capture_output=True)
        got = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if got != digest:
            raise SystemExit(f"{archive}: SHA-512 is {got}, expected {digest}; delete the file and try again")
        if not folder.exists():
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        folders[name] = folder / "package"
    return folders


def bare(code: str) -> str:
    """The code point sequence without variation selectors: vendors disagree about those alone."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def read_concepts(emojibase: Path) -> list[dict]:
    """The 1,906 concepts up to Emoji 16 without skin-tone and hair components, in emojibase's order."""
    meta = json.loads((emojibase / "meta/groups.json").read_text())
    rows = []
    for entry in json.loads((emojibase / "en/data.json").read_text()):
        group = meta["groups"].get(str(entry.get("group")))
        if group is None or group == "component" or entry["version"] > 16:
            continue
        rows.append(
            {
                "id": bare(entry["hexcode"]),
                "label": entry["label"],
                "tags": entry.get("tags", []),
                "category": group,
                "subcategory": meta["subgroups"][str(entry["subgroup"])],
                "order": entry["order"],
            }
        )
    return sorted(rows, key=lambda row: row["order"])


def shares(sizes: dict[str, int], fraction: float, total: int) -> dict[str, int]:
    """Whole numbers near fraction * size that add up to total (largest remainder; ties by name)."""
    exact = {name: fraction * size for name, size in sizes.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def add_split(rows: list[dict]) -> None:
    """Mark `seen` and `classify30` in place: the one split, a function of SEED and the concept ids alone."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["subcategory"]].append(row)
    for group in groups.values():
        group.sort(key=lambda row: hashlib.sha256(f"{SEED}:{row['id']}".encode()).digest())

    classes = {n for n, g in groups.items() if len(g) >= CLASS_SIZE and g[0]["category"] in CONCRETE}
    in_classes = {name: len(groups[name]) for name in classes}
    test = shares(in_classes, CLASS_TEST, round(CLASS_TEST * sum(in_classes.values())))
    elsewhere = {name: len(group) for name, group in groups.items() if name not in classes}
    rest = UNSEEN - sum(test.values())
    unseen = test | shares(elsewhere, rest / sum(elsewhere.values()), rest)
    for name, group in groups.items():
        for i, row in enumerate(group):
            row["seen"] = i >= unseen[name]
            row["classify30"] = ("train" if row["seen"] else "test") if name in classes else None


def on_white(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.asarray(image)  # (64, 64, 3)


def render_svg(svg: str) -> np.ndarray:
    import resvg_py

    return on_white(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)))


def iconify_images(folder: Path) -> dict[str, np.ndarray | str]:
    """Concept id -> SVG source, from an Iconify JSON set."""
    icons = json.loads((folder / "icons.json").read_text())
    sources = {}
    for code, name in json.loads((folder / "chars.json").read_text()).items():
        while name in icons.get("aliases", {}):
            name = icons["aliases"][name]["parent"]
        icon = icons["icons"][name]
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        sources[bare(code)] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
        )
    return sources


def render(folders: dict[str, Path], rows: list[dict], style: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, 64, 64, 3) uint8 drawings of the rows and (n,) whether each exists; a missing drawing is white."""
    if style in ("noto", "twemoji"):
        sources = iconify_images(folders[f"@iconify-json/{style}"])
        draw = {code: (lambda svg=svg: render_svg(svg)) for code, svg in sources.items()}
    elif style == "fluent":
        files = (folders["@lobehub/fluent-emoji-3d"] / "assets").glob("*.webp")
        draw = {bare(f.stem): (lambda f=f: on_white(f.read_bytes())) for f in files}
    else:
        files = (folders["openmoji"] / "color/svg").glob("*.svg")
        draw = {bare(f.stem): (lambda f=f: render_svg(f.read_text())) for f in files}
    images = np.full((len(rows), SIZE, SIZE, 3), 255, np.uint8)
    drawn = np.array([row["id"] in draw for row in rows])
    for i in np.flatnonzero(drawn):
        images[i] = draw[rows[i]["id"]]()
    return images, drawn


def write_atlas(path: Path, images: np.ndarray) -> None:
    """Tiles row by row, COLUMNS a row, in one WebP."""
    n_rows = -(-len(images) // COLUMNS)
    sheet = np.full((n_rows * COLUMNS, SIZE, SIZE, 3), 255, np.uint8)
    sheet[: len(images)] = images
    sheet = sheet.reshape(n_rows, COLUMNS, SIZE, SIZE, 3).swapaxes(1, 2).reshape(n_rows * SIZE, COLUMNS * SIZE, 3)
    Image.fromarray(sheet).save(path, "WEBP", quality=90, method=6)


def write_bundle(out: Path, folders: dict[str, Path], rows: list[dict]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    bundled = [row for row in rows if row["category"] in CONCRETE]
    missing = {}
    for style in BUNDLED:
        images, drawn = render(folders, bundled, style)
        write_atlas(out / f"{style}.webp", images)
        missing[style] = [row["id"] for row, there in zip(bundled, drawn, strict=True) if not there]
    keys = ("id", "label", "tags", "category", "subcategory", "seen", "classify30")
    lines = {
        name: ",\n".join(json.dumps({k: row[k] for k in keys}, ensure_ascii=False) for row in part)
        for name, part in (("concepts", bundled), ("undrawn", [r for r in rows if r["category"] not in CONCRETE]))
    }
    head = json.dumps({"seed": SEED, "tile": SIZE, "columns": COLUMNS, "styles": BUNDLED, "missing": missing})
    body = ",\n".join(f'"{name}": [\n{text}\n]' for name, text in lines.items())
    (out / "labels.json").write_text(f"{head[:-1]},\n{body}}}\n")


def write_train_set(out: Path, folders: dict[str, Path], rows: list[dict]) -> None:
    from safetensors.numpy import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for style in STYLES:
        images, drawn = render(folders, rows, style)
        tensors[style], tensors[f"{style}.drawn"] = images, drawn.astype(np.uint8)
    save_file(tensors, out / "images.safetensors")
    (out / "concepts.json").write_text(json.dumps(rows, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloaded packages")
    parser.add_argument("--out", type=Path, default=assets.EMOJI, help="folder for the bundle")
    parser.add_argument("--train-set", type=Path, help="write the full training set there instead of the bundle")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    folders = fetch(args.work)
    rows = read_concepts(folders["emojibase-data"])
    add_split(rows)
    if args.train_set:
        write_train_set(args.train_set, folders, rows)
    else:
        write_bundle(args.out, folders, rows)


if __name__ == "__main__":
    main()
