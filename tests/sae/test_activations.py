from __future__ import annotations

import itertools
import json
import random
import shutil
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipsteer import FileFormatError, clip
from clipsteer.clip.pixels import image_loader
from clipsteer.io.checked import write_checked
from clipsteer.io.locks import only_writer
from clipsteer.sae import shards
from clipsteer.sae.activations import (
    ActivationSource,
    ActivationStore,
    HarvestSource,
    IterableSource,
    Position,
    TensorSource,
    as_source,
    harvest_to_store,
)
from clipsteer.training.world import World

BLOCK = "visual.transformer.resblocks.0"


class Groups(ActivationSource):
    """Rows 0 … n - 1 in groups of given sizes, in a fixed order."""

    d_in = 1

    def __init__(self, sizes):
        self.sizes = list(sizes)
        self.loaded = 0

    def group_sizes(self, seed, epoch):
        return self.sizes

    def load_group(self, seed, epoch, group):
        self.loaded += 1
        first = sum(self.sizes[:group])
        return torch.arange(first, first + self.sizes[group], dtype=torch.float64)[:, None]


def take(source, count, batch_size, **kwargs):
    return list(itertools.islice(source.batches(batch_size, **kwargs), count))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 99))
def test_an_epoch_serves_every_row_once_and_any_position_can_be_resumed(sizes, batch_size, seed):
    total, source = sum(sizes), Groups(sizes)
    if batch_size > total:
        with pytest.raises(ValueError, match="batch_size"):
            take(source, 1, batch_size)
        return
    per_epoch = total // batch_size
    served = take(source, 2 * per_epoch + 1, batch_size, seed=seed)
    for epoch in range(2):
        rows = torch.cat([b.rows for b in served[epoch * per_epoch : (epoch + 1) * per_epoch]]).flatten().tolist()
        assert len(set(rows)) == len(rows) == per_epoch * batch_size
        assert set(rows) <= set(range(total))
    assert served[per_epoch - 1].next == Position(1, 0)
    for index in range(len(served) - 1):
        again = take(source, 1, batch_size, seed=seed, start=served[index].next)[0]
        assert torch.equal(again.rows, served[index + 1].rows)
        assert again.next == served[index + 1].next


def test_groups_before_the_position_are_not_read():
    source = Groups([10, 10, 10])
    take(source, 1, 5, start=Position(0, 20))
    assert source.loaded == 1


def test_epochs_and_seeds_shuffle_differently():
    rows = torch.arange(64.0)[:, None]
    orders = {tuple(take(TensorSource(rows), 2, 64, seed=s)[e].rows.flatten().tolist()) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(64)) for order in orders)


@pytest.mark.parametrize("make", [lambda x: TensorSource(x), lambda x: IterableSource(list(x.split(7)))])
def test_ranks_share_the_joint_batch(make):
    x = torch.randn(50, 3)
    joint = take(make(x), 6, 12, seed=3)
    parts = [take(make(x), 6, 12, seed=3, rank=rank, world=3) for rank in range(3)]
    for whole, *shares in zip(joint, *parts):
        assert torch.equal(whole.rows, torch.cat([s.rows for s in shares]))
        assert {s.next for s in shares} == {whole.next}
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        take(make(x), 1, 13, world=3)


def test_an_iterable_is_taken_in_order_and_resumed_by_reading():
    parts = [torch.arange(at, at + 5.0)[:, None] for at in range(0, 20, 5)]
    source = IterableSource(parts)
    served = take(source, 4, 6)
    # 24 rows of a pass of 20: the iterable starts again
    assert torch.cat([b.rows for b in served]).flatten().tolist() == [*range(20), 0, 1, 2, 3]
    again = take(IterableSource(parts), 2, 6, start=served[1].next)
    assert torch.equal(again[0].rows, served[2].rows)
    assert torch.equal(again[1].rows, served[3].rows)
    once = IterableSource(iter(parts))
    with pytest.raises(ValueError, match="ended before"):
        take(once, 4, 6)


def test_what_is_no_source_is_refused():
    assert isinstance(as_source(torch.zeros(4, 2)), TensorSource)
    assert as_source(torch.zeros(2, 3, 5)).rows.shape == (6, 5)
    for wrong in (None, 3, "rows", {"a": 1}):
        with pytest.raises(TypeError, match="activations"):
            as_source(wrong)
    for wrong in (torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64), []):
        with pytest.raises(ValueError, match="activations"):
            as_source(wrong)


class Pictures:
    """A map-style data set of tensors, which counts what is asked for; `noise` draws from torch's generator."""

    def __init__(self, n=11, noise=False):
        self.images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(5))
        self.noise, self.asked = noise, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.asked += 1
        image = self.images[index]
        return (image + torch.randn_like(image) if self.noise else image), 0


@pytest.fixture(scope="module")
def model():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    module = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    return clip.CLIP(module, lambda image: image, lambda texts: None, "tiny", None)


def expected(model, dataset, tokens):
    return torch.cat(list(clip.harvest(model, [dataset.images], BLOCK, tokens=tokens)))


@pytest.mark.parametrize(("tokens", "per_image"), [("all", 5), ("cls", 1), ("patches", 4)])
def test_a_store_holds_what_harvest_gives(model, tmp_path, tokens, per_image):
    data = Pictures()
    settings = {"dtype": "float32", "shard_rows": 3 * per_image, "batch_size": 2}
    store = harvest_to_store(model, data, BLOCK, tmp_path, tokens=tokens, **settings)
    assert store.complete
    assert len(store.shards) == 4
    assert len(store) == 11 * per_image
    rows = torch.cat([store.read_shard(i) for i in range(4)])
    torch.testing.assert_close(rows, expected(model, data, tokens), rtol=1e-5, atol=1e-5)
    assert store.provenance == {"clip_model": "tiny", "pretrained": None, "hook_point": BLOCK, "tokens": tokens}
    for buffer in (1, 2, None):
        shuffled = ActivationStore(tmp_path, buffer_shards=buffer)
        batch = take(shuffled, 1, len(store), seed=1)[0].rows
        assert not torch.equal(batch, rows)
        assert torch.equal(batch[batch[:, 0].argsort()], rows[rows[:, 0].argsort()])


def test_a_harvest_is_resumed_shard_by_shard(model, tmp_path):
    class Interrupted(Pictures):
        def __getitem__(self, index):
            if index == 8:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    settings = {"dtype": "float16", "shard_rows": 15, "batch_size": 3}
    with pytest.raises(KeyboardInterrupt):
        harvest_to_store(model, Interrupted(), BLOCK, tmp_path, **settings)
    part = ActivationStore(tmp_path)
    assert (len(part.shards), part.complete, len(part)) == (2, False, 30)
    data = Pictures()
    whole = harvest_to_store(model, data, BLOCK, tmp_path, **settings)
    # one image to learn the shape, eight twice to know the data, then 6 … 10
    assert data.asked == 1 + 16 + 5
    assert whole.complete
    assert whole.read_shard(3).dtype == torch.float16
    alone = harvest_to_store(model, Pictures(), BLOCK, tmp_path / "alone", **settings)
    for index in range(4):
        assert torch.equal(whole.read_shard(index), alone.read_shard(index))
    truncated = whole.shards[1]
    truncated.write_bytes(truncated.read_bytes()[:-3])
    with pytest.raises(FileFormatError, match=r"shard-000001.safetensors: of \d+ bytes, its index tells of"):
        ActivationStore(tmp_path)
    mended = harvest_to_store(model, Pictures(), BLOCK, tmp_path, **settings)
    assert torch.equal(mended.read_shard(1), alone.read_shard(1))


def test_a_store_that_other_processes_write_elsewhere_is_refused(model, tmp_path, monkeypatch):
    class Second(World):
        def __init__(self, device):
            super().__init__(device)
            self.rank, self.size = 1, 2

        def any(self, flag):
            return flag

        def broadcast_json(self, value):
            return value

    settings = {"dtype": "float32", "shard_rows": 15}
    monkeypatch.setattr("clipsteer.sae.activations.World", Second)
    with pytest.raises(RuntimeError, match="shared directory"):
        harvest_to_store(model, Pictures(), BLOCK, tmp_path, **settings)
    assert [path.stem for path in ActivationStore(tmp_path).shards] == ["shard-000001", "shard-000003"]
    monkeypatch.undo()
    assert harvest_to_store(model, Pictures(), BLOCK, tmp_path, **settings).complete


@pytest.mark.parametrize(
    ("item", "label"),
    [
        ((3,), 3),
        ((torch.tensor(4),), 4),
        (("a cat",), -1),
        ((None,), -1),
        ((torch.zeros(4),), -1),
        ((), -1),
        (None, -1),
    ],
)
def test_only_whole_numbers_are_labels(model, item, label):
    image = torch.randn(3, 32, 32)
    (pixels, labels), *_ = image_loader(model, [image if item is None else (image, *item)], 1)
    assert torch.equal(pixels[0], image)
    assert labels.tolist() == [label]


def test_another_harvest_is_not_mixed_in(model, tmp_path):
    harvest_to_store(model, Pictures(), BLOCK, tmp_path, shard_rows=30)
    with pytest.raises(ValueError, match="tokens: 'all' there, 'cls' asked for"):
        harvest_to_store(model, Pictures(), BLOCK, tmp_path, shard_rows=30, tokens="cls")
    with pytest.raises(ValueError, match="images: 11 there, 12 asked for"):
        harvest_to_store(model, Pictures(12), BLOCK, tmp_path, shard_rows=30)
    with pytest.raises(ValueError, match="dtype"):
        harvest_to_store(model, Pictures(), BLOCK, tmp_path, dtype="int8")


def test_damaged_stores_are_format_errors(model, tmp_path):
    store = harvest_to_store(model, Pictures(), BLOCK, tmp_path, shard_rows=30)
    index = store.shards[0].with_suffix(".json")
    lying = json.loads(index.read_text())
    index.write_text(json.dumps({**lying, "rows": lying["rows"] + 1}))
    with pytest.raises(FileFormatError, match="its checksum is of other contents"):
        ActivationStore(tmp_path)
    del lying["checksum"]
    write_checked(index, {**lying, "rows": lying["rows"] + 1})
    with pytest.raises(FileFormatError, match=r"'activations' must be float16 \(31, 16\), got float16 \(30, 16\)"):
        ActivationStore(tmp_path).read_shard(0)
    for path in tmp_path.glob("shard-*.json"):
        path.write_text("{")
    with pytest.raises(FileFormatError, match="not valid JSON"):
        ActivationStore(tmp_path)
    for path in tmp_path.glob("shard-*.json"):
        path.unlink()
    with pytest.raises(FileFormatError, match="no complete shard"):
        ActivationStore(tmp_path)
    for text in ("{", "[1]", "{}", '{"shards": "x", "d_in": 3}', '{"shards": 100000000000, "d_in": 3}'):
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(FileFormatError):
            ActivationStore(tmp_path)


def damage(draw, path):
    """A few other bytes, fewer bytes, or none."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(["byte", "byte", "byte", "bytes", "cut", "gone"])
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        for _ in range(1 if kind == "byte" else 8):
            at = draw.randrange(len(content))
            content[at] ^= draw.randint(1, 255)
        path.write_bytes(content)


def test_a_damaged_store_does_not_load_as_another(model, tmp_path, caplog):
    whole = harvest_to_store(model, Pictures(), BLOCK, tmp_path / "whole", shard_rows=15)
    rows = [whole.read_shard(i) for i in range(4)]
    draw, refused, fewer = random.Random(0), 0, 0
    for _ in range(300):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "store")
        damage(draw, draw.choice(sorted((tmp_path / "store").iterdir())))
        caplog.clear()
        try:
            store = ActivationStore(tmp_path / "store")
            found = {path.name: store.read_shard(i) for i, path in enumerate(store.shards)}
        except (FileFormatError, FileNotFoundError) as error:
            assert str(tmp_path / "store") in str(error)  # noqa: PT017
            refused += 1
            continue
        # an index that is gone is a shard that is not done, which is said
        fewer += len(found) < 4
        assert (len(found) == 4) == ("of 4 shards are there" not in caplog.text)
        assert all(torch.equal(rows[int(name[6:12])], shard) for name, shard in found.items())
    assert refused > 250
    assert refused + fewer > 290  # another blank in a description is no damage


def test_a_shard_is_held_against_its_checksum_once(model, tmp_path, monkeypatch):
    store = harvest_to_store(model, Pictures(), BLOCK, tmp_path, shard_rows=30)
    looked_at = []
    plain = shards.check_file
    monkeypatch.setattr(shards, "check_file", lambda path, facts: (looked_at.append(path.name), plain(path, facts)))
    take(store, 3 * len(store), 1)
    assert sorted(looked_at) == [path.name for path in store.shards]
    content = bytearray(store.shards[1].read_bytes())
    content[-1] ^= 1
    store.shards[1].write_bytes(content)
    with pytest.raises(FileFormatError, match=r"remove it and shard-000001\.json, and harvest again"):
        ActivationStore(tmp_path).read_shard(1)
    store.shards[1].unlink()
    store.shards[1].with_suffix(".json").unlink()
    assert harvest_to_store(model, Pictures(), BLOCK, tmp_path, shard_rows=30).complete


def test_a_store_of_an_older_version_is_read_and_gone_on_with(model, tmp_path, caplog):
    whole = harvest_to_store(model, Pictures(), BLOCK, tmp_path, shard_rows=15)
    rows = [whole.read_shard(i) for i in range(4)]
    for path in tmp_path.glob("*.json"):
        found = json.loads(path.read_text())
        for new in ("checksum", "sha256", "data", "weights", "preprocess"):
            found.pop(new, None)
        path.write_text(json.dumps(found))
    (tmp_path / "shard-000003.json").unlink()
    store = harvest_to_store(model, Pictures(), BLOCK, tmp_path, shard_rows=15)
    assert "that noted no data, preprocess, weights" in caplog.text
    assert "3 shards of a version that kept no checksums" in caplog.text
    for i in range(4):
        assert torch.equal(store.read_shard(i), rows[i])


def test_a_harvest_goes_on_with_the_same_images_and_model_alone(model, tmp_path):
    harvest_to_store(model, Pictures(), BLOCK, tmp_path, shard_rows=30)
    other = Pictures()
    other.images[3, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="holds another harvest"):
        harvest_to_store(model, other, BLOCK, tmp_path, shard_rows=30)
    weight = model.model.visual.transformer.resblocks[0].mlp.c_proj.bias
    with torch.no_grad():
        weight.add_(1)
    try:
        with pytest.raises(ValueError, match=r"holds another harvest \(weights"):
            harvest_to_store(model, Pictures(), BLOCK, tmp_path, shard_rows=30)
    finally:
        with torch.no_grad():
            weight.sub_(1)


def test_a_harvest_is_one_processs_and_a_whole_store_is_everybodys(model, tmp_path):
    class Meanwhile(Pictures):
        def __getitem__(self, index):
            if self.asked > 20 and not refused:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()
            return super().__getitem__(index)

    def second():
        try:
            harvest_to_store(model, Pictures(), BLOCK, tmp_path, shard_rows=15)
        except RuntimeError as error:
            refused.append(str(error))

    refused = []
    store = harvest_to_store(model, Meanwhile(), BLOCK, tmp_path, shard_rows=15)
    assert store.complete
    assert "is being written by another thread" in refused[0]
    with only_writer(tmp_path, "somebody"):
        second()
    assert len(refused) == 1


def test_half_precision_that_overflows_is_refused(model, tmp_path):
    huge = Pictures(3)
    weight = model.model.visual.transformer.resblocks[0].mlp.c_proj.bias
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(1e5)
        with pytest.raises(ValueError, match="float32"):
            harvest_to_store(model, huge, BLOCK, tmp_path)
        assert not list(tmp_path.glob("shard-*"))
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_harvest_on_the_fly_covers_the_images_and_repeats_its_noise(model, monkeypatch):
    plain = HarvestSource(model, Pictures(), BLOCK, images_per_group=4, batch_size=3)
    assert plain.rows_per_epoch() == 55
    rows = take(plain, 1, 55, seed=2)[0].rows
    truth = expected(model, Pictures(), "all")
    torch.testing.assert_close(rows[rows[:, 0].argsort()], truth[truth[:, 0].argsort()], rtol=1e-5, atol=1e-5)
    noisy = HarvestSource(model, Pictures(noise=True), BLOCK, images_per_group=4, batch_size=4)
    generator, seeded = torch.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    served = take(noisy, 8, 8, seed=2)
    assert torch.equal(torch.get_rng_state(), generator)
    assert seeded == []
    again = take(noisy, 3, 8, seed=2, start=served[4].next)
    for a, b in zip(served[5:], again):
        assert torch.equal(a.rows, b.rows)
    assert len({float(b.rows[0, 0]) for b in served}) == 8
