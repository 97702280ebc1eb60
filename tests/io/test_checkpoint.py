from __future__ import annotations

import errno
import resource

import pytest
import torch

from clipsteer.io import checkpoint
from clipsteer.io.checkpoint import load_latest, save_state


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    nan = torch.tensor([0x7FC12345, 0x7F800000], dtype=torch.int32).view(torch.float32)
    return {
        "weights": torch.randn(16, 33, generator=generator),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "payload": nan,
        "counts": torch.arange(4) + seed,
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.zeros(0, 7),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }


def assert_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert tensor.shape == b[name].shape
        flat, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, b[name]))
        assert torch.equal(flat, other), name


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_is_bitwise(tmp_path):
    save_state(tmp_path / "deep" / "er", 7, state(), {"position": [1, 2], "name": "é"})
    found = load_latest(tmp_path / "deep" / "er")
    assert found.step == 7
    assert found.meta == {"position": [1, 2], "name": "é"}
    assert_bits(found.tensors, state())


def test_an_empty_place_has_no_checkpoint(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "absent") is None


def test_the_newest_two_are_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for step in (3, 10, 200, 1000):
        save_state(tmp_path, step, state(step), {})
    kept = [f"step-{s:010d}.{kind}" for s in (200, 1000) for kind in ("json", "safetensors")]
    assert names(tmp_path) == ["notes.txt", *kept]
    save_state(tmp_path, 1001, state(), {}, keep=1)
    assert load_latest(tmp_path).step == 1001
    assert len(names(tmp_path)) == 3


def test_saving_an_earlier_step_leaves_the_later_branch(tmp_path):
    for step in (10, 20, 30):
        save_state(tmp_path, step, state(step), {})
    save_state(tmp_path, 21, state(21), {})
    assert load_latest(tmp_path).step == 21
    save_state(tmp_path, 21, state(5), {"again": True})
    assert load_latest(tmp_path).meta == {"again": True}
    assert {name[:15] for name in names(tmp_path)} == {"step-0000000020", "step-0000000021"}


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "tensors cut in the header": lambda data, index: truncate(data, 11),
    "tensors cut in the data": lambda data, index: truncate(data, data.stat().st_size - 1),
    "tensors empty": lambda data, index: truncate(data, 0),
    "one bit of the data": lambda data, index: flip(data, -1),
    "one bit of the header length": lambda data, index: flip(data, 1),
    "tensors gone": lambda data, index: data.unlink(),
    "index cut": lambda data, index: truncate(index, index.stat().st_size // 2),
    "index empty": lambda data, index: truncate(index, 0),
    "index gone": lambda data, index: index.unlink(),
    "index of another kind": lambda data, index: index.write_text('{"step": 20}'),
    "index a list": lambda data, index: index.write_text("[]"),
    "tensors a folder": lambda data, index: (data.unlink(), data.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    save_state(tmp_path, 10, state(1), {"which": "old"})
    index = save_state(tmp_path, 20, state(2), {"which": "new"})
    DAMAGE[damage](index.with_suffix(".safetensors"), index)
    found = load_latest(tmp_path)
    assert (found.step, found.meta) == (10, {"which": "old"})
    assert_bits(found.tensors, state(1))
    for path in tmp_path.glob("step-0000000010.*"):
        truncate(path, 5)
    assert load_latest(tmp_path) is None


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    save_state(tmp_path, 10, state(1), {})
    before = names(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as caught:
            save_state(tmp_path, 20, state(2), {}, keep=1)
        with pytest.raises(OSError):
            save_state(tmp_path, 10, state(2), {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert names(tmp_path) == before
    assert_bits(load_latest(tmp_path).tensors, state(1))


@pytest.mark.parametrize("failing", ["write_safetensors", "write_checked"])
def test_a_save_that_breaks_off_leaves_the_old_checkpoint(tmp_path, monkeypatch, failing):
    save_state(tmp_path, 10, state(1), {})

    def broken(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, broken)
        with pytest.raises(OSError, match="No space"):
            save_state(tmp_path, 20, state(2), {}, keep=1)
    assert load_latest(tmp_path).step == 10
    assert_bits(load_latest(tmp_path).tensors, state(1))
    # the debris goes with the next save that succeeds
    save_state(tmp_path, 30, state(3), {})
    assert load_latest(tmp_path).step == 30
    assert not list(tmp_path.glob("step-0000000020.*"))


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        save_state(tmp_path, 1, state(), {}, keep=0)
    with pytest.raises(ValueError, match="step"):
        save_state(tmp_path, -1, state(), {})
