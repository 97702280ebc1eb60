"""The one door for data sets: every kind of name, every mistake, and images that have no classes."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipsteer import data
from clipsteer.data.dataset import captions_of, data_digest
from clipsteer.data.emoji import HELD_OUT_STYLE, PARTS, STYLES, TRAINED_STYLES
from clipsteer.data.files import class_folder, is_emoji

EMOJI = data.EmojiStyles()


def picture(path, colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)
    return path


# the bundled drawings


@pytest.mark.parametrize(
    ("spec", "styles", "conditions"),
    [
        ("emoji", EMOJI.styles, {}),
        ("emoji:all", EMOJI.styles, {}),
        ("emoji:trained", TRAINED_STYLES, {}),
        ("emoji:held-out:seen", (HELD_OUT_STYLE,), {"seen": True}),
        ("emoji:trained:unseen", TRAINED_STYLES, {"seen": False}),
        ("emoji:noto:train", ("noto",), {"classify30": "train"}),
        ("emoji:fluent:test", ("fluent",), {"classify30": "test"}),
        ("classify30:twemoji:test", ("twemoji",), {"classify30": "test"}),
    ],
)
def test_drawings_by_name(spec, styles, conditions):
    found = data.open_dataset(spec)
    pairs = [(style, i) for style in styles for i in EMOJI.indices(style, **conditions)]
    expected = EMOJI.dataset(pairs, "subcategory" if "classify30" in conditions else "label")
    assert found.sources == expected.sources
    assert found.targets == expected.targets
    assert found.classes == expected.classes
    assert np.array_equal(np.asarray(found[-1][0]), np.asarray(expected[-1][0]))


def test_every_style_and_part_opens_and_the_parts_divide_the_drawings():
    for style in STYLES:
        sizes = {part: len(data.open_dataset(f"emoji:{style}:{part}")) for part in PARTS}
        assert sizes["seen"] + sizes["unseen"] == len(data.open_dataset(f"emoji:{style}"))
        assert min(sizes.values()) > 0
    thirty = [data.open_dataset(f"emoji:all:{part}").classes for part in ("train", "test")]
    assert thirty[0] == thirty[1]
    assert len(thirty[0]) == 30


def test_what_a_bare_emoji_stands_for_and_what_drawings_are_named_by():
    seen = data.open_dataset("emoji", emoji="trained:seen")
    assert seen.sources == data.open_dataset("emoji:trained:seen").sources
    assert seen.sources == EMOJI.dataset(EMOJI.cells()["trained", True]).sources
    # a name that says more keeps its own
    assert len(data.open_dataset("emoji:noto", emoji="trained:seen")) == 857
    category = data.open_dataset("emoji:noto", targets="category")
    assert category.classes == sorted({c.category for c in EMOJI.concepts})
    caption = data.open_dataset("emoji:noto", targets="caption")
    assert caption.classes is None
    assert caption.targets == [c.label for c in EMOJI.concepts]
    everything = data.open_dataset("emoji:noto:seen", targets="captions")
    noisy = EMOJI.captioned(EMOJI.drawings("noto", "seen"), "noisy")
    assert everything.targets == noisy.targets
    assert everything.sources == noisy.sources


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("emoji:notto", r"style must be one of noto, fluent.*got 'notto'; did you mean 'noto'"),
        ("emoji:apple", "style must be one of noto"),
        ("emoji:noto:tests", "part must be one of train, test.*did you mean 'test'"),
        ("emoji:noto:seen:more", "expected emoji, emoji:STYLE or emoji:STYLE:PART"),
        ("classify30:noto", "expected classify30:STYLE:train or classify30:STYLE:test"),
        ("classify30:noto:seen", "expected classify30:STYLE:train or classify30:STYLE:test"),
    ],
)
def test_wrong_drawings(spec, message):
    with pytest.raises(ValueError, match=message):
        data.open_dataset(spec)


def test_emoji_is_the_drawings_and_a_path_of_that_name_a_folder(tmp_path, monkeypatch):
    picture(tmp_path / "emoji" / "own.png")
    monkeypatch.chdir(tmp_path)
    assert len(data.open_dataset("emoji")) == 3 * 857 - 8
    assert len(data.open_dataset("./emoji")) == 1
    assert is_emoji("emoji:noto")
    assert not is_emoji("emojis")
    assert not is_emoji(None)


# folders


def test_a_flat_folder_has_neither_classes_nor_captions(tmp_path):
    for name in ("b.png", "a.jpg"):
        picture(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    flat = data.open_dataset(tmp_path)
    assert flat.classes is None
    assert flat.targets == [None, None]
    assert flat.images_alone
    assert flat.subset([1]).images_alone
    assert flat[0][0].size == (6, 4)
    assert [image.size for image, _ in flat] == [(6, 4)] * 2
    assert data.sample_names(flat) == ["a.jpg", "b.png"]
    assert data.sample_names(flat.subset([1])) == ["b.png"]
    layout = r"FOLDER/CLASS/image\.jpg"
    with pytest.raises(ValueError, match=rf"--data: these images have no classes; expected .*{layout}"):
        data.labelled(flat, "--data")
    with pytest.raises(ValueError, match=f"neither captions nor classes.*{layout}"):
        captions_of(flat)
    with pytest.raises(ValueError, match=layout):
        data_digest(flat)
    with pytest.raises(ValueError, match=f"no classes.*{layout}"):
        data.renamed(flat, ["x"])
    with pytest.raises(ValueError, match=rf"cil: .*no classes.*{layout}"):
        class_folder(tmp_path, "cil")


def test_images_beside_class_folders_form_a_class_of_the_folders_name(tmp_path):
    root = tmp_path / "pets"
    picture(root / "cat" / "1.png")
    picture(root / "zebra" / "1.png")
    picture(root / "loose.png")
    found = data.open_dataset(root)
    assert found.classes == ["cat", "pets", "zebra"]
    assert data.sample_names(found) == ["cat", "pets", "zebra"]
    assert found.sources == [(root / "cat" / "1.png",), (root / "loose.png",), (root / "zebra" / "1.png",)]
    assert data.labelled(found, "x") is found


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    shown = [picture(tmp_path / ".hidden-root" / name) for name in ("cat/1.png", "dog/deep/2.png")]
    root = tmp_path / ".hidden-root"
    for hidden in (".ipynb_checkpoints/1-checkpoint.png", "cat/._1.png", "dog/.thumbs/2.png", ".a.png"):
        picture(root / hidden)
    (root / ".DS_Store").write_bytes(b"\0")
    (root / "cat" / ".DS_Store").write_bytes(b"\0")
    (root / "dog" / "folder.png").mkdir()  # the name of an image, and none
    found = data.open_dataset(root)
    assert found.classes == ["cat", "dog"]
    assert found.sources == [(path,) for path in shown]
    flat = data.open_dataset(root / "cat")
    assert flat.sources == [(shown[0],)]
    assert flat.images_alone
    picture(tmp_path / "only" / ".a.png")
    with pytest.raises(ValueError, match="no image"):
        data.open_dataset(tmp_path / "only")


def test_hidden_members_of_shards_are_passed_over(tmp_path):
    content = picture(tmp_path / "a.png").read_bytes()
    members = {
        "./0.png": content, "./0.txt": b"kept",
        "./._0.png": content, "./._0.txt": b"resource fork",
        "./.cache/1.png": content, "./.cache/1.txt": b"hidden folder",
    }  # fmt: skip
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    found = data.open_dataset(tmp_path / "s.tar")
    assert found.targets == ["kept"]
    assert data.sample_names(found) == ["kept"]


def test_captions_count_as_classes_where_classes_are_asked_for(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image,text\na.png,dog\na.png,cat\na.png,dog\n")
    found = data.labelled(data.open_dataset(tmp_path / "t.csv"), "--data")
    assert found.classes == ["cat", "dog"]
    assert found.targets == [1, 0, 1]


def test_what_is_no_data_set_is_named_with_the_kinds_and_what_is_near(tmp_path):
    picture(tmp_path / "photos" / "a.png")
    (tmp_path / "notes.md").write_text("x")
    kinds = r"a folder of class folders .*\.csv, \.tsv or \.jsonl.*\.tar shards.*emoji.*flat folder"
    with pytest.raises(ValueError, match=rf"photo' is not there; expected {kinds}.*did you mean photos"):
        data.open_dataset(tmp_path / "photo")
    with pytest.raises(ValueError, match=rf"notes\.md' is none of them; expected {kinds}"):
        data.open_dataset(tmp_path / "notes.md")
    with pytest.raises(ValueError, match="did you mean emoji"):
        data.open_dataset("emojii")
    with pytest.raises(ValueError, match="no such file"):
        data.open_dataset(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="no such file"):
        data.open_dataset(tmp_path / "absent.tar")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="no image"):
        data.open_dataset(tmp_path / "void")
