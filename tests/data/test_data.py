"""The bundled images and their split, and the readers of users' own data."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from PIL import Image

from benchmarks.emojiclip import build as build_emoji
from clipsteer import FileFormatError, data

EMOJI = data.EmojiStyles()


def png(colour: tuple[int, ...], size: tuple[int, int] = (6, 4), mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind)
    return file.getvalue()


# EmojiStyles


def test_the_set_is_as_described():
    assert len(EMOJI) == len(EMOJI.concepts) == 857
    assert len(EMOJI.undrawn) == 1906 - 857
    assert EMOJI.styles == ("noto", "fluent", "twemoji")
    assert len({c.id for c in EMOJI.concepts + EMOJI.undrawn}) == 1906
    assert len({c.subcategory for c in EMOJI.concepts + EMOJI.undrawn}) == 98
    assert Counter(c.category for c in EMOJI.concepts) == {
        "objects": 264, "travel-places": 218, "animals-nature": 159, "food-drink": 131, "activities": 85,
    }  # fmt: skip
    assert all(c.captions()[0] == c.label and len(c.captions()) == len(set(c.captions())) for c in EMOJI.concepts)


def test_the_split_is_as_described():
    everything = EMOJI.concepts + EMOJI.undrawn
    assert sum(not c.seen for c in everything) == 283
    parts = Counter(c.classify30 for c in EMOJI.concepts)
    assert (parts["train"], parts["test"]) == (507, 218)
    assert all(not c.seen for c in everything if c.classify30 == "test")
    assert all(c.seen for c in everything if c.classify30 == "train")
    assert all(c.classify30 is None for c in EMOJI.undrawn)
    sizes = Counter(c.subcategory for c in EMOJI.concepts)
    in_classes = {c.subcategory for c in EMOJI.concepts if c.classify30}
    assert in_classes == {name for name, size in sizes.items() if size >= 12}
    assert len(in_classes) == 30
    for name in in_classes:
        test = sum(c.classify30 == "test" for c in EMOJI.concepts if c.subcategory == name)
        assert abs(test - 0.3 * sizes[name]) < 1


def test_the_split_follows_from_the_seed_alone():
    stored = [vars(c) for c in EMOJI.concepts + EMOJI.undrawn]
    fresh = [{k: v for k, v in row.items() if k not in ("seen", "classify30")} for row in reversed(stored)]
    build_emoji.add_split(fresh)
    by_id = {row["id"]: row for row in fresh}
    assert all(by_id[row["id"]][k] == row[k] for row in stored for k in ("seen", "classify30"))


def test_drawings():
    for style in EMOJI.styles:
        tiles, drawn = EMOJI.array(style), EMOJI.drawn(style)
        assert tiles.shape == (857, 64, 64, 3)
        assert tiles.dtype == np.uint8
        assert drawn.sum() == (849 if style == "fluent" else 857)
        assert (tiles[~drawn] > 250).all()
        assert (tiles[drawn].reshape(drawn.sum(), -1).min(1) <= 215).all()  # fog is the palest
        assert np.median(tiles[:, 0, 0]) > 250  # on white
        with pytest.raises(ValueError, match="read-only"):
            tiles[0] = 0
    labels = {c.label: i for i, c in enumerate(EMOJI.concepts)}
    for style in EMOJI.styles:
        red = EMOJI.array(style)[labels["red apple"], 24:48, 20:44].reshape(-1, 3).mean(0)
        green = EMOJI.array(style)[labels["green apple"], 24:48, 20:44].reshape(-1, 3).mean(0)
        assert red[0] > 1.5 * red[1]
        assert green[1] > 1.2 * green[0]
        image = EMOJI.image(style, labels["red apple"])
        assert (image.mode, image.size) == ("RGB", (64, 64))
        assert np.array_equal(np.asarray(image), EMOJI.array(style)[labels["red apple"]])


def test_cells_and_conditions():
    cells = EMOJI.cells()
    seen = sum(c.seen for c in EMOJI.concepts)
    assert len(cells["held-out", True]) == seen
    assert len(cells["held-out", False]) == 857 - seen
    assert len(cells["trained", True]) + len(cells["trained", False]) == 857 + 849
    assert len(EMOJI.indices("twemoji", classify30="test")) == 218
    assert len(EMOJI.indices(category="activities", seen=True)) == sum(
        c.category == "activities" and c.seen for c in EMOJI.concepts
    )
    dataset = EMOJI.dataset(cells["held-out", False], "category")
    assert dataset.classes == sorted({c.category for c in EMOJI.concepts})
    image, target = dataset[-1]
    style, index = cells["held-out", False][-1]
    assert dataset.classes[target] == EMOJI.concepts[index].category
    assert np.array_equal(np.asarray(image), EMOJI.array(style)[index])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_captioned_drawings_say_all_that_is_said_of_them():
    drawings = EMOJI.cells()["held-out", False][:5]
    labels = EMOJI.captioned(drawings, "label")
    assert labels.classes is None
    assert labels.targets == [EMOJI.concepts[i].label for _, i in drawings]
    noisy = EMOJI.captioned(drawings, "noisy")
    at = 0
    for style, i in drawings:
        concept = EMOJI.concepts[i]
        tags = [tag for tag in concept.tags if tag != concept.label]
        said = noisy.targets[at : at + 1 + 2 * len(tags)]
        assert said == [concept.label, *(f"{concept.label}, {tag}" for tag in tags), *tags]
        assert all(noisy[at + k][0].tobytes() == EMOJI.image(style, i).tobytes() for k in range(len(said)))
        at += len(said)
    assert at == len(noisy)
    with pytest.raises(ValueError, match="captions must be"):
        EMOJI.captioned(drawings, "tags")


def test_emoji_errors():
    lacking = int(np.flatnonzero(~EMOJI.drawn("fluent"))[0])
    with pytest.raises(ValueError, match="no drawing of"):
        EMOJI.image("fluent", lacking)
    with pytest.raises(ValueError, match="no drawing of"):
        EMOJI.dataset([("noto", 0), ("fluent", lacking)])
    with pytest.raises(ValueError, match="style must be one of"):
        EMOJI.array("apple")
    with pytest.raises(ValueError, match="target must be"):
        EMOJI.dataset([("noto", 0)], "name")


# readers


def test_image_folder(tmp_path):
    for name, colour in {"cat": (200, 0, 0), "dog": (0, 200, 0)}.items():
        (tmp_path / name / "deeper").mkdir(parents=True)
        (tmp_path / name / "b.png").write_bytes(png(colour))
        (tmp_path / name / "deeper" / "a.PNG").write_bytes(png(colour))
        (tmp_path / name / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    dataset = data.image_folder(tmp_path)
    assert dataset.classes == ["cat", "dog"]
    assert dataset.targets == [0, 0, 1, 1]
    assert [dataset[i][0].getpixel((0, 0)) for i in (0, 3)] == [(200, 0, 0), (0, 200, 0)]
    assert data.open_dataset(tmp_path).targets == dataset.targets
    with pytest.raises(ValueError, match="must be a folder"):
        data.image_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="no image"):
        data.image_folder(tmp_path / "empty")


def test_images_become_upright_rgb_on_white(tmp_path):
    assert data.read_image(png((10, 20, 30, 0), mode="RGBA")).getpixel((0, 0)) == (255, 255, 255)
    assert data.read_image(png((10, 20, 30, 255), mode="RGBA")).getpixel((0, 0)) == (10, 20, 30)
    assert data.read_image(png((90, 0), mode="LA")).getpixel((0, 0)) == (255, 255, 255)
    assert data.read_image(png((90,), mode="L")).getpixel((0, 0)) == (90, 90, 90)
    palette = Image.new("P", (3, 3), 0)
    palette.putpalette([0, 0, 255])
    palette.save(tmp_path / "p.png", transparency=0)
    assert data.read_image(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "t.jpg", exif=exif)
    assert data.read_image(tmp_path / "t.jpg").size == (4, 6)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(png((1, 2, 3), (300, 300))[:60])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.png", "text.png"):
        with pytest.raises(FileFormatError, match=name):
            data.read_image(tmp_path / name)
    for size in ((9500, 9500), (14000, 14000)):  # beyond Pillow's warning, and beyond its error
        bomb = png((0,), size, "1")
        with pytest.raises(FileFormatError, match="pixels"):
            data.read_image(bomb, "bomb.png")
    with pytest.raises(FileNotFoundError):
        data.read_image(tmp_path / "absent.png")


def write_table(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
        return
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_captions(tmp_path, suffix):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png((9, 8, 7)))
    (tmp_path / "pictures" / "b.png").write_bytes(png((7, 8, 9)))
    texts = ["a dog, “running”\nfast", "naïve"]
    table = tmp_path / f"table{suffix}"
    write_table(
        table, [{"filepath": f"pictures/{n}.png", "title": t, "id": "1"} for n, t in zip("ab", texts, strict=True)]
    )
    dataset = data.captions(table)
    assert dataset.targets == texts
    assert dataset.classes is None
    assert dataset[1][0].getpixel((0, 0)) == (7, 8, 9)
    assert data.open_dataset(table).targets == texts
    write_table(table, [{"x": "a.png", "y": "one"}])
    chosen = data.captions(table, image_root=tmp_path / "pictures", image_key="x", caption_key="y")
    assert chosen[0][0].getpixel((0, 0)) == (9, 8, 7)
    with pytest.raises(FileFormatError, match="expected a column image"):
        data.captions(table)
    with pytest.raises(FileFormatError, match="expected a column z"):
        data.captions(table, image_key="x", caption_key="z")


def test_bad_tables_are_named_with_the_line(tmp_path):
    table = tmp_path / "t.jsonl"
    table.write_text('{"image": "a.png", "text": "one"}\n{"image": "b.png", "text": 5}\n')
    with pytest.raises(FileFormatError, match=r"t\.jsonl, line 2"):
        data.captions(table)
    table.write_text('{"image": "a.png", "text": "one"}\n\n{"image"')
    with pytest.raises(FileFormatError, match=r"t\.jsonl, line 3: not JSON"):
        data.captions(table)
    table.write_text("[1]\n")
    with pytest.raises(FileFormatError, match="line 1: expected an object"):
        data.captions(table)
    (tmp_path / "t.csv").write_text("image,text\na.png,one\nb.png\n")
    with pytest.raises(FileFormatError, match=r"t\.csv, line 3"):
        data.captions(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("image,text\n")
    with pytest.raises(FileFormatError, match="no rows"):
        data.captions(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(b"image,text\na.png,\xff\xfe\n")
    with pytest.raises(FileFormatError, match=r"t\.csv"):
        data.captions(tmp_path / "t.csv")
    (tmp_path / "t.parquet").write_text("x")
    with pytest.raises(ValueError, match=r"\.csv, \.tsv or \.jsonl"):
        data.captions(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="no such file"):
        data.captions(tmp_path / "absent.csv")


def write_shard(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_shards(tmp_path):
    write_shard(tmp_path / "d-00.tar", {
        "x/000.png": png((1, 1, 1)), "x/000.txt": b" first \n",
        "x/001.json": b'{"caption": "second", "id": 4}', "x/001.jpg": png((250, 250, 250), kind="JPEG"),
        "x/002.png": png((3, 3, 3)),
        "x/003.seg.png": png((4, 4, 4)), "x/003.txt": b"no image of its own",
    })  # fmt: skip
    write_shard(tmp_path / "d-01.tar", {"000.webp": png((255, 0, 0), kind="WEBP"), "000.txt": "drÏtte".encode()})
    for pattern in ("d-{00..01}.tar", "d-*.tar"):
        dataset = data.shards(tmp_path / pattern)
        assert dataset.targets == ["first", "second", "drÏtte"]
    reds = [dataset[i][0].getpixel((0, 0))[0] for i in (0, 1, 2)]
    assert reds[0] == 1
    assert abs(reds[1] - 250) <= 3
    assert reds[2] > 240
    assert data.open_dataset(tmp_path / "d-01.tar").targets == ["drÏtte"]


def test_bad_shards_are_named(tmp_path):
    write_shard(tmp_path / "z.tar", {"0.png": png((1, 1, 1)), "0.txt": b"text"}, "w:gz")
    with pytest.raises(FileFormatError, match=r"z\.tar"):
        data.shards(tmp_path / "z.tar")
    write_shard(tmp_path / "n.tar", {"0.png": png((1, 1, 1))})
    with pytest.raises(FileFormatError, match="no image with a caption"):
        data.shards(tmp_path / "n.tar")
    write_shard(tmp_path / "j.tar", {"0.png": png((1, 1, 1)), "0.json": b"[1"})
    with pytest.raises(FileFormatError, match=r"j\.tar"):
        data.shards(tmp_path / "j.tar")
    write_shard(tmp_path / "b.tar", {"0.png": b"junk", "0.txt": b"text"})
    with pytest.raises(FileFormatError, match=r"b\.tar:0\.png"):
        data.shards(tmp_path / "b.tar")[0]
    with pytest.raises(ValueError, match=r"no such file: .*q-1\.tar"):
        data.shards(tmp_path / "q-{1..2}.tar")


def test_data_sets_travel_to_loader_processes(tmp_path):
    (tmp_path / "a.png").write_bytes(png((1, 2, 3)))
    for dataset in (data.image_folder(tmp_path), EMOJI.dataset([("noto", 5)])):
        copy = ForkingPickler.loads(ForkingPickler.dumps(dataset))
        assert np.array_equal(np.asarray(copy[0][0]), np.asarray(dataset[0][0]))
