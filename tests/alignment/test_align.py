"""Concepts of whole models: rows at the same places, scores, the comparison, its files and its page."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import torch
from PIL import Image

import clipsteer
from _command import run
from clipsteer.alignment import clusters
from clipsteer.alignment.compare import Layer, align
from clipsteer.alignment.config import AlignmentConfig
from clipsteer.alignment.measure import neighbours_agree_most
from clipsteer.alignment.page import short_names, write_page
from clipsteer.alignment.rows import Places, every_block, harvest_rows, layers_of
from clipsteer.alignment.scores import of_classes, of_features, of_words
from clipsteer.clip.hooks import harvest
from clipsteer.clip.pixels import image_loader
from clipsteer.data.dataset import ImageDataset, spread
from clipsteer.data.emoji import EmojiStyles
from clipsteer.io.files import FileFormatError
from clipsteer.sae import shards
from clipsteer.sae.model import SAE
from clipsteer.splice.dictionary import ConceptDictionary

BLOCKS = [f"visual.transformer.resblocks.{i}" for i in range(6)]


@pytest.fixture(scope="module")
def clip():
    return clipsteer.load("emojiclip")


@pytest.fixture(scope="module")
def drawings():
    emoji = EmojiStyles()
    return emoji.dataset(spread(emoji.drawings("trained"), 150), "category")


def places(clip, config):
    return Places((clip.preprocess,), config.rows_per_image, config.seed)


def saes(width=192, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [SAE(width, 32, k=4, metadata={"hook_point": name}) for name in BLOCKS[2:4]]


# ---------------------------------------------------------------- rows


def test_rows_are_the_tokens_at_the_places_of_the_picture(clip, drawings, tmp_path):
    images = drawings.subset(range(6))
    config = AlignmentConfig(rows_per_image=3, batch_size=4)
    where = places(clip, config)
    found = harvest_rows(clip, images, BLOCKS[:2], config, where, tmp_path)
    assert found.images.tolist() == [i for i in range(6) for _ in range(3)]
    tokens = torch.cat(list(harvest(clip, image_loader(clip, images, 6), BLOCKS[1], "patches"))).unflatten(0, (6, -1))
    side = round(tokens.shape[1] ** 0.5)
    for i in range(6):
        points = where.of_picture(i, (64, 64))
        assert len(set(points)) == 3
        cells = [int(y * side) * side + int(x * side) for x, y in points]
        torch.testing.assert_close(found.layers[BLOCKS[1]][3 * i : 3 * i + 3], tokens[i, cells])


def test_places_lie_in_what_all_models_see():
    from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

    whole = Compose([Resize((32, 32)), ToTensor()])
    middle = Compose([Resize(64), CenterCrop(32), ToTensor()])
    both = Places((whole, middle), 40, 0)
    points = both.of_picture(3, (64, 64))
    assert all(0.25 <= c <= 0.75 for point in points for c in point)
    assert points == both.of_picture(3, (64, 64))
    assert points != both.of_picture(4, (64, 64))
    # a sequence that fills the room
    assert len({(int(4 * x), int(4 * y)) for x, y in Places((whole,), 40, 0).of_picture(3, (64, 64))}) == 16
    assert both.digest() != Places((whole,), 40, 0).digest()


def test_a_transform_that_is_not_known_is_told_of(caplog):
    from torchvision.transforms import Compose, Resize, ToTensor

    whole = Compose([Resize((32, 32)), ToTensor()])
    Places((whole, whole), 1, 0)
    assert not caplog.records
    Places((whole, lambda image: image), 1, 0)
    assert "taken for the whole" in caplog.text


def test_a_harvest_that_was_stopped_goes_on(clip, drawings, tmp_path, monkeypatch):
    monkeypatch.setattr("clipsteer.alignment.rows._PER_SHARD", 4)
    config = AlignmentConfig(tokens="mean")
    images = drawings.subset(range(10))
    read = []

    def counted(row):
        read.append(row)
        if row == 6 and shards.is_done(shards.shard_path(tmp_path / "a", 0)) and "stop" in read:
            raise KeyboardInterrupt
        return images[row][0]

    watched = ImageDataset(counted, images.targets, images.classes)
    arguments = (clip, watched, BLOCKS[:1], config, places(clip, config), tmp_path / "a")
    monkeypatch.setattr("clipsteer.alignment.rows.identity_of", lambda _: {})  # which reads images as well
    read.append("stop")
    with pytest.raises(KeyboardInterrupt):
        harvest_rows(*arguments)
    assert [shards.is_done(shards.shard_path(tmp_path / "a", i)) for i in range(3)] == [True, False, False]
    read.clear()
    found = harvest_rows(*arguments)
    assert read == [0, 4, 5, 6, 7, 8, 9]  # the first tells the widths
    whole = harvest_rows(clip, images, BLOCKS[:1], config, places(clip, config), tmp_path / "b")
    assert torch.equal(found.layers[BLOCKS[0]], whole.layers[BLOCKS[0]])
    # another model, other layers or places are another harvest
    tiny = clipsteer.load("emojiclip")
    with torch.no_grad():
        next(tiny.model.parameters()).add_(1e-3)
    for other in ((tiny, *arguments[1:]), (clip, images, BLOCKS[:2], *arguments[3:])):
        with pytest.raises(ValueError, match="holds another harvest"):
            harvest_rows(*other)
    shard = shards.shard_path(tmp_path / "a", 1)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(FileFormatError, match="damaged"):
        harvest_rows(*arguments)


def test_layers_and_tokens_that_are_not_there(clip, drawings, tmp_path):
    assert every_block(clip) == BLOCKS
    assert layers_of(clip, ["*resblocks.1", "visual.transformer.resblocks.[01]", "embedding"]) == [
        BLOCKS[1], BLOCKS[0], "embedding",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="near matches"):
        layers_of(clip, ["visual.transformer.resblock.1"])
    config = AlignmentConfig()
    with pytest.raises(ValueError, match="one embedding, not one a patch"):
        harvest_rows(clip, drawings, ["embedding"], config, places(clip, config), tmp_path)
    with pytest.raises(ValueError, match="empty"):
        harvest_rows(clip, drawings.subset([]), BLOCKS, config, places(clip, config), tmp_path)


# ---------------------------------------------------------------- scores


def test_scores_are_proximities(clip, drawings):
    x = torch.randn(80, 192, generator=torch.Generator().manual_seed(0))
    sae = saes()[0]
    found = of_features(sae, x)
    codes = sae.encode(x)
    alive = (codes > 0).any(0)
    torch.testing.assert_close(found.scores, (codes / codes.sum(1, keepdim=True))[:, alive])
    assert len(found.names) == int(alive.sum())
    labels = torch.arange(80) % 3
    shifted = x + 5 * torch.nn.functional.one_hot(labels, 192)
    energies = of_classes(shifted, labels, ["a", "b", "unused", "c"][:3])
    assert energies.names == ["a", "b", "unused"]
    h = (shifted - shifted.mean(0)).double()
    C = clipsteer.Conceptor.fit(shifted.double(), mean=shifted.double().mean(0), labels=labels).matrix
    expected = torch.stack([(h @ c).square().sum(1) for c in C], 1) / h.square().sum(1, keepdim=True)
    expected = expected / expected.sum(1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(energies.scores.double(), expected, rtol=1e-5, atol=1e-7)
    words = ConceptDictionary.from_clip(clip, ["cat", "dog", "car", "tree"], image_mean=torch.zeros(clip.embed(
        torch.zeros(1, 3, 64, 64)).shape[1]))  # fmt: skip
    weights = of_words(words, clip.encode_images(drawings.subset(range(9))), 0.05)
    assert weights.scores.shape == (9, len(weights.names))
    for proximity in (found, energies, weights):
        assert float(proximity.scores.min()) >= 0
        assert float(proximity.scores.sum(1).max()) <= 1 + 1e-6
        assert bool((proximity.scores > 0).any(0).all())
    with pytest.raises(ValueError, match=r"takes rows \(N, 192\)"):
        of_features(sae, x[:, :5])


def test_without_umap_the_error_says_what_to_do(clip, drawings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hdbscan", None)
    with pytest.raises(RuntimeError, match=r"clipsteer\[align\]"):
        align(clip, None, drawings, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()  # before anything is made


@pytest.mark.nightly  # UMAP compiles itself at its first call
def test_clusters_of_rows_are_concepts():
    pytest.importorskip("umap")
    pytest.importorskip("hdbscan")
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(240) % 3
    x = 6 * torch.nn.functional.one_hot(kinds, 20) + torch.randn(240, 20, generator=generator)
    config = AlignmentConfig(components=4, neighbors=15, min_cluster_size=30, min_samples=5)
    found = clusters.of_clusters(x, config)
    assert found.proximity.scores.shape == (240, 3)
    best = found.proximity.scores.argmax(1)
    for kind in range(3):
        assert (best[kinds == kind] == best[kinds == kind].mode().values).double().mean() > 0.95
    assert len({int(best[kinds == k].mode().values) for k in range(3)}) == 3
    assert float(found.proximity.scores.sum(1).max()) <= 1 + 1e-6
    assert found.noise == float((found.labels < 0).double().mean())
    again = clusters.of_clusters(x, config)
    assert torch.equal(again.proximity.scores, found.proximity.scores)
    with pytest.raises(ValueError, match="smaller min_cluster_size"):
        clusters.of_clusters(x, AlignmentConfig(components=4, neighbors=15, min_cluster_size=200))
    with pytest.raises(ValueError, match="at least 52 rows, got 9"):
        clusters.of_clusters(x[:9], AlignmentConfig())


# ---------------------------------------------------------------- the comparison


@pytest.fixture(scope="module")
def kinds(clip, drawings, tmp_path_factory):
    """Blocks of EmojiCLIP by the categories of the drawings."""
    out = tmp_path_factory.mktemp("align") / "kinds"
    config = AlignmentConfig(score="conceptor", tokens="mean")
    return align(clip, None, drawings, out=out, config=config), out


def test_neighbouring_blocks_of_emojiclip_agree_most(kinds):
    """The paper's sanity check."""
    compared, _ = kinds
    matrix = [[found.value for found in row] for row in compared.matrix()]
    assert neighbours_agree_most(matrix) >= 5 / 6
    assert [matrix[i][i] for i in range(6)] == [1.0] * 6
    assert all(matrix[i][j] == matrix[j][i] < 1 for i in range(6) for j in range(i))
    # the farther apart, the less: the last block's row falls towards the first
    assert matrix[5][0] == min(matrix[5])


def test_what_a_comparison_is_written_as(kinds, drawings, tmp_path):
    compared, _ = kinds
    paths = compared.write(tmp_path)
    facts = json.loads(paths[0].read_text())
    assert facts["models"] == {"A": "emojiclip"}
    assert (facts["images"], facts["rows"], len(facts["agreements"]), len(facts["matchings"])) == (150, 150, 15, 5)
    rows = list(csv.DictReader(paths[1].open()))
    assert float(rows[0]["gri"]) == pytest.approx(compared.matrix()[0][1].value, abs=1e-6)
    assert rows[0]["low"] < rows[0]["gri"] < rows[0]["high"]
    rows = list(csv.DictReader(paths[2].open()))
    assert len(rows) == sum(len(m.matches) for m in compared.matchings.values())
    page = write_page(tmp_path / "page.html", compared, drawings).read_text()
    a, b = next(iter(compared.matchings))
    assert f"{a} and {b}" in page
    assert page.count("data:image/") > 5
    assert all(name in page for name in compared.proximity[a].names)
    assert short_names([a, b]) == ["0", "1"]
    # top pictures of a kind are of that kind, for the most part
    last = compared.layers[-1]
    names = compared.proximity[last].names
    top = compared.top_images(last, 0, 5)
    assert sum(drawings.classes[drawings.targets[i]] == names[0] for i in top) >= 3


def test_scores_are_kept_and_made_again_where_they_are_others(kinds, clip, drawings, monkeypatch):
    compared, out = kinds
    config = AlignmentConfig(score="conceptor", tokens="mean", matched=2)
    with monkeypatch.context() as patch:
        patch.setattr("clipsteer.alignment.scores.of_classes", None)  # not called
        again = align(clip, None, drawings, out=out, config=config)
    assert again.matrix() == compared.matrix()
    assert all(len(found.matches) == 2 for found in again.matchings.values())
    names = [name + "!" for name in drawings.classes]
    other = ImageDataset(drawings._read, [len(names) - 1 - t for t in drawings.targets], names)
    with pytest.raises(ValueError, match="another harvest"):
        align(clip, None, other, out=out, config=config)


def test_two_models_by_the_features_of_saes(clip, drawings, tmp_path):
    moved = clipsteer.load("emojiclip")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in moved.model.visual.transformer.resblocks[3:]:
            for parameter in block.parameters():
                parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    config = AlignmentConfig(score="sae", matched=8)
    images = drawings.subset(range(60))
    found = align(clip, moved, images, out=tmp_path, config=config, saes=saes())
    assert found.layers == [Layer(m, name) for m in "AB" for name in BLOCKS[2:4]]
    # the third block comes before what was changed
    matrix = [[e.value for e in row] for row in found.matrix("A", "B")]
    assert matrix[0][0] == 1.0
    assert matrix[1][1] < 0.999
    assert list(found.matchings) == [(Layer("A", name), Layer("B", name)) for name in BLOCKS[2:4]]
    first, second = found.matchings.values()
    assert [m.distance.value for m in first.matches] == [0.0] * 8
    assert max(m.relative.value for m in second.matches) > 0.05
    assert "B visual" in write_page(tmp_path / "page.html", found, images).read_text()


@pytest.mark.parametrize(
    ("config", "more", "says"),
    [
        ({"score": "sae"}, {}, "needs an SAE of every layer"),
        ({"score": "sae"}, {"saes": [*saes(), *saes()]}, "hook point of its own"),
        ({"score": "sae"}, {"saes": saes(), "hook_points": BLOCKS[:1]}, "none of visual.transformer.resblocks.0"),
        ({"score": "splice", "tokens": "cls"}, {}, "needs a dictionary"),
        ({"score": "conceptor"}, {"hook_points": ["nothing"]}, "no module of the model matches"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(clip, drawings, tmp_path, config, more, says):
    with pytest.raises(ValueError, match=says):
        align(clip, None, drawings, out=tmp_path, config=AlignmentConfig(**config), **more)


def test_pictures_without_classes_have_no_conceptors_of_them(clip, tmp_path):
    flat = ImageDataset(lambda row: Image.new("RGB", (64, 64), (row, 0, 0)), [None] * 4)
    with pytest.raises(ValueError, match="no classes"):
        align(clip, None, flat, out=tmp_path, config=AlignmentConfig(score="conceptor"))


# ---------------------------------------------------------------- the command


def test_the_command(capsys, tmp_path):
    words = ("align", "emojiclip", "--data", "emoji:noto", "--max-images", 40, "--device", "cpu")
    words = (*words, "--hook-points", "*resblocks.[45]", "--score", "conceptor")
    code, out, err = run(capsys, *words, "--out", tmp_path / "run")
    assert code == 0, err
    assert "A visual.transformer.resblocks.4 – A visual.transformer.resblocks.5: 0." in out
    names = {"index.html", "alignment.json", "layers.csv", "concepts.csv"}
    assert names <= {path.name for path in (tmp_path / "run").iterdir()}
    code, _, err = run(capsys, *words, "--seed", 1, "--out", tmp_path / "run")
    assert code == 2
    assert "holds another harvest" in err
    code, _, err = run(capsys, *words, "--sae", "x", "--out", tmp_path / "run")
    assert (code, "--sae goes with --score sae" in err) == (2, True)


def test_the_command_in_words(capsys, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("cat\ndog\ncar\ntree\nhouse\nfish\n")
    code, out, err = run(
        capsys, "align", "emojiclip", "emojiclip", "--data", "emoji:noto", "--max-images", 20, "--score", "splice",
        "--tokens", "cls", "--words", words, "--l1", 0.05, "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    assert "A embedding – B embedding: 1.000" in out
