"""What a data set is known by: the same wherever it lies, another when anything in it is."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from clipsteer.data import identity
from clipsteer.data.dataset import ImageDataset
from clipsteer.data.files import captions, image_folder, open_dataset, shards
from clipsteer.data.identity import identity_of
from clipsteer.training.settings import other_data


@pytest.fixture
def folder(tmp_path):
    """Twenty pictures in two classes, uncompressed: all of one size."""
    root = tmp_path / "photos"
    for number in range(20):
        (root / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), (number, 0, 9)).save(root / "ab"[number % 2] / f"{number:02}.bmp")
    return root


@pytest.fixture(params=["contents", "times"])
def bounded(request, monkeypatch):
    """With all contents, as of few files, and without, as of many."""
    if request.param == "times":
        monkeypatch.setattr(identity, "MAX_FILES", 3)
    return request.param


def differ(there, folder):
    return other_data(json.loads(json.dumps(there)), identity_of(image_folder(folder)))


def test_a_moved_folder_is_the_same_and_a_changed_one_is_not(folder, tmp_path, bounded):
    there = identity_of(image_folder(folder))
    assert bool(there["contents"]) == (bounded == "contents")
    (tmp_path / "deep").mkdir()
    folder = folder.rename(tmp_path / "deep" / "pictures")
    assert differ(there, folder) is None
    shutil.copytree(folder, tmp_path / "copy")  # with times
    assert differ(there, tmp_path / "copy") is None
    # one file of the twenty, of which no sample need hold it
    path = folder / "b" / "13.bmp"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (before.st_atime, before.st_mtime + 5))
    assert path.stat().st_size == before.st_size
    assert bounded in differ(there, folder)
    path.write_bytes(content[:-1])
    assert "sizes" in differ(there, folder)
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    (folder / "a" / "00.bmp").rename(folder / "a" / "99.bmp")
    assert "names" in differ(there, folder)
    (folder / "a" / "99.bmp").unlink()
    assert differ(there, folder).startswith("samples: 20 there, 19 given")


def test_a_copy_with_new_times_is_the_same_where_contents_are_known(folder, bounded):
    there = identity_of(image_folder(folder))
    for path in folder.rglob("*.bmp"):
        os.utime(path, (1, 1))
    if bounded == "contents":
        assert differ(there, folder) is None
    else:
        assert "cp -a" in differ(there, folder)


def test_the_order_and_the_targets_count(folder):
    data = image_folder(folder)
    swapped = ImageDataset(data._read, [1 - target for target in data.targets], data.classes)
    assert "classes" in other_data(identity_of(data), identity_of(swapped))
    rows = list(range(len(data)))
    assert identity_of(data.subset(rows)) == identity_of(data)
    assert identity_of(data.subset(rows[::-1])) != identity_of(data)
    assert identity_of(data.subset(rows[:5])) != identity_of(data.subset(rows[1:6]))


def test_tables_shards_and_drawings(folder, tmp_path):
    import tarfile

    lines = ["image,caption", *(f"{'ab'[i % 2]}/{i:02}.bmp,thing {i}" for i in range(20))]
    (folder / "pairs.csv").write_text("\n".join(lines))
    there = identity_of(captions(folder / "pairs.csv"))
    moved = folder.rename(tmp_path / "moved")
    assert identity_of(captions(moved / "pairs.csv")) == there
    (moved / "pairs.csv").write_text("\n".join(lines).replace("thing 7", "think 7"))
    assert "captions" in other_data(there, identity_of(captions(moved / "pairs.csv")))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(3):
            (tmp_path / f"{i}.txt").write_text(f"thing {i}")
            tar.add(moved / "ab"[i % 2] / f"{i:02}.bmp", f"{i}.bmp")
            tar.add(tmp_path / f"{i}.txt", f"{i}.txt")
    there = identity_of(shards(tmp_path / "a.tar"))
    assert (there["kind"], there["samples"]) == ("files", 3)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[600] ^= 1  # a pixel
    (tmp_path / "a.tar").write_bytes(content)
    assert "contents" in other_data(there, identity_of(shards(tmp_path / "a.tar")))
    drawings = [identity_of(open_dataset(f"emoji:{style}:train")) for style in ("noto", "fluent", "noto")]
    assert drawings[0] == drawings[2] != drawings[1]
    assert drawings[0]["kind"] == "drawings"


def test_tensors_arrays_and_others_data_sets():
    x = torch.arange(24.0).reshape(6, 4)
    assert identity_of(x) == identity_of(x.T.contiguous().T) != identity_of(x + 1e-6)
    assert identity_of(x) != identity_of(x.reshape(4, 6))
    assert identity_of(x) != identity_of(x.double())
    assert identity_of(torch.tensor(1.0).expand(3)) == identity_of(torch.ones(3))
    data = TensorDataset(x, torch.arange(6))
    changed = x.clone()
    changed[3, 2] += 1
    assert identity_of(data) != identity_of(TensorDataset(changed, torch.arange(6)))
    assert identity_of(Subset(data, [1, 2])) != identity_of(Subset(data, [2, 1]))
    assert identity_of(ConcatDataset([data, data])) != identity_of(ConcatDataset([data]))

    class Digits(Dataset):  # as torchvision's
        def __init__(self, data, targets):
            self.data, self.targets = data, targets

    pixels = np.zeros((9, 4, 4, 3), np.uint8)
    assert identity_of(Digits(pixels, [1] * 9)) != identity_of(Digits(pixels, [1] * 8 + [2]))
    assert identity_of(Digits(pixels, [1] * 9)) != identity_of(Digits(pixels + 1, [1] * 9))


class Noisy(Dataset):
    """Items of which the picture is random, the label is not."""

    def __init__(self, shift=0):
        self.shift = shift

    def __len__(self):
        return 30

    def __getitem__(self, row):
        if row == 29:
            raise OSError("unreadable")
        plain = Image.new("L", (3, 3), row + self.shift)
        return plain if row % 2 else torch.rand(3) * random.random() + float(np.random.rand())


def test_random_items_do_not_count_and_no_generator_moves():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    there = identity_of(Noisy())
    assert there == identity_of(Noisy())
    assert there != identity_of(Noisy(shift=1))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_lists_of_paths_are_known_by_their_files(folder):
    paths = sorted(map(str, folder.rglob("*.bmp")))
    there = identity_of(paths)
    assert there["kind"] == "files"
    assert identity_of([(path, 0) for path in paths]) != there
    os.utime(paths[3], (7, 7))
    assert other_data(there, identity_of(paths)) is None


def test_names_that_are_no_text_and_no_files_are_taken(folder):
    odd = os.fsdecode(os.fsencode(folder / "a") + b"/\xff.bmp")
    shutil.copy(folder / "a" / "00.bmp", odd)
    there = identity_of(image_folder(folder))
    assert there["samples"] == 21
    json.dumps(there)
    os.unlink(odd)
    gone = identity_of([odd, str(folder / "a" / "00.bmp")])
    assert gone["samples"] == 2


def test_every_process_finds_the_same(folder):
    code = (
        "import json, sys; from clipsteer.data.files import image_folder\n"
        "from clipsteer.data.identity import identity_of\n"
        "print(json.dumps(identity_of(image_folder(sys.argv[1]))))"
    )
    said = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == identity_of(image_folder(folder))


def test_many_files_cost_microseconds_each(tmp_path):
    """20,000 files: above what is read, so that each costs one look."""
    (tmp_path / "a").mkdir()
    names = [f"{tmp_path}/a/{number}.png" for number in range(20_000)]
    for name in names:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
    began = time.process_time()
    assert identity_of(names)["contents"] is None
    # 7 µs a file were measured; a file that is opened and read costs some 25
    assert time.process_time() - began < 20_000 * 100e-6
