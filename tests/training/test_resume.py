"""What a resumed run takes from a checkpoint that was changed and signed anew: nothing, and it says which entry."""

from __future__ import annotations

import json
import logging
import random
from itertools import product
from pathlib import Path

import pytest
import torch

import _tamper
from _night import day_and_night
from _tamper import KINDS, OTHERS, TENSORS, VALUES, Stopped, changed, filled, places, put, remove, stopped
from clipsteer import SAE, FileFormatError, TrainConfig, train_sae
from clipsteer.io import checkpoint
from clipsteer.io.checked import write_checked
from clipsteer.io.checkpoint import Checkpoint, load_latest, save_state
from clipsteer.sae.adam import UnitRowAdam
from clipsteer.training import resume as resuming
from clipsteer.training.resume import load_optimizer, optimizer_layout, optimizer_tensors


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """kind -> the run, made when it is first asked for."""
    found: dict[str, tuple[Stopped, Checkpoint]] = {}

    def run(kind: str) -> tuple[Stopped, Checkpoint]:
        if kind not in found:
            made = stopped(kind, tmp_path_factory.mktemp("stopped") / "run")
            found[kind] = made, load_latest(made.folder)
        return found[kind]

    return run


@pytest.fixture
def guard(monkeypatch, request):
    """guard(run, tampered): the run finds this checkpoint; nothing of it may be taken."""

    def no(*_):
        pytest.fail("taken in before it was checked")

    def resume(run: Stopped, tampered: Checkpoint):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "load_latest", lambda *_, **__: tampered)
            patch.setattr(resuming, "load_optimizer", no)
            patch.setattr(torch.nn.Module, "load_state_dict", no)
            patch.setattr(UnitRowAdam, "step", no)
            before = torch.get_rng_state()
            try:
                return run.resume()
            finally:
                assert torch.equal(torch.get_rng_state(), before)

    return resume


def is_free(kind: str, name: str, value: float) -> bool:
    """Whether an element may be this: of u NaN says that a sample was not seen; a square may overflow."""
    return name == "loss.u" or ("exp_avg_sq." in name and value == float("inf"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_checked_before_it_reaches_anything(runs, guard, kind):
    run, whole = runs(kind)
    assert len(whole.tensors) > 3
    for name, change in product(whole.tensors, TENSORS):
        tampered = whole._replace(tensors=TENSORS[change](dict(whole.tensors), name))
        with pytest.raises(FileFormatError) as refused:
            guard(run, tampered)
        assert str(whole.tensors_path) in str(refused.value), (name, change)
        # of an optimizer's state that lacks a part the parameter is named
        assert name in str(refused.value) or name.split(".", 2)[-1] in str(refused.value), (change, refused.value)
    for (name, tensor), value in product(whole.tensors.items(), VALUES.values()):
        if tensor.is_floating_point() and tensor.numel() and not is_free(kind, name, value):
            with pytest.raises(FileFormatError, match=r"holds NaN|must be (finite|at least)"):
                guard(run, whole._replace(tensors=filled(whole.tensors, name, value)))


# settings that an older version did not write; without them a run is taken for one of it
LATER = ("auxk", "l0_coefficient", "l0_penalty", "bandwidth", "skip", "off", "resample_after", "encoder_scale")


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_of_the_index_is_checked(runs, guard, kind):
    run, whole = runs(kind)
    tried = 0
    for path in places(whole.meta):
        if path[0] == "data" and path[-1] in ("times", "contents"):
            continue  # of each other's
        if "setup" in path or path[-1] == "eps":
            continue  # of which an older version wrote nothing
        if path[0] == "tasks" and len(path) == 3 and "ranpac" in kind:
            continue  # it keeps nothing of each class; the run that it belongs to knows its tasks
        for change in (remove, *map(put, OTHERS)):
            meta = changed(whole.meta, path, change)
            if meta == whole.meta or (len(path) == 1 and path[0] in meta and meta[path[0]] is whole.meta[path[0]]):
                continue
            if change is remove and path[-1] in LATER:
                continue
            if path == ("off", 0) and meta["off"] and type(meta["off"][0]) in (int, float) and meta["off"][0] >= 0:
                continue  # an estimate can have been any number
            if unlike(meta, whole.meta):
                with pytest.raises((FileFormatError, ValueError)) as refused:
                    guard(run, whole._replace(meta=meta))
                said = str(refused.value)
                assert isinstance(refused.value, FileFormatError) or "holds a run" in said, (path, said)
                assert str(whole.meta_path) in said or str(whole.tensors_path) in said or "holds a run" in said, (
                    path,
                    said,
                )
                tried += 1
    assert tried > 100


def unlike(meta, whole) -> bool:
    """Whether a change is one: a setting that is None is as good as none, and some change no weights."""

    def plain(value):
        if isinstance(value, dict):
            cosmetic = {
                "checkpoint_every",
                "log_every",
                "track",
                "alpha",
                "micro_batch",
                "evaluate_every",
                "loss_backend",
            }
            found = {k: plain(v) for k, v in value.items() if k not in cosmetic}
            return {k: v for k, v in found.items() if v is not None and v != {}}
        return value

    # an older version noted no data and no parameters without state
    older = {key: value for key, value in whole.items() if key in meta or key not in ("data", "without state")}
    return json.dumps(plain(meta), sort_keys=True) != json.dumps(plain(older), sort_keys=True)


@pytest.mark.parametrize("kind", ["sae", "finetune", "contrastive", "task"])
def test_a_step_beyond_the_run_is_refused(runs, guard, kind):
    run, whole = runs(kind)
    with pytest.raises(FileFormatError, match="a checkpoint of step 999 in a run of"):
        guard(run, whole._replace(step=999))


def test_counts_and_generators_of_an_sae_are_what_they_can_be(runs, guard):
    run, whole = runs("sae")
    tensors = whole.tensors
    for name, value in (
        ("tokens_since_fired", -1), ("tokens_since_fired", 4 * 32 + 1), ("dead", 3), ("position", -1),
        ("position", 2**60), ("rng.cpu", 255),
    ):  # fmt: skip
        wrong = filled(tensors, name, value)
        if name == "rng.cpu":
            wrong = {**tensors, name: torch.full_like(tensors[name], 255)}
        with pytest.raises(FileFormatError, match=name):
            guard(run, whole._replace(tensors=wrong))
    # a GPU's generator is no use here, but it must be one
    gpu = {**tensors, "rng.cuda": torch.zeros(16, dtype=torch.uint8)}
    with pytest.raises(pytest.fail.Exception):
        guard(run, whole._replace(tensors=gpu))
    with pytest.raises(FileFormatError, match=r"'rng.cuda' must be uint8 \(16,\)"):
        guard(run, whole._replace(tensors={**tensors, "rng.cuda": torch.zeros(17, dtype=torch.uint8)}))


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1), {"step", "exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
        (lambda p: torch.optim.SGD(p, lr=0.1), set()),
    ],
)
def test_the_layout_of_an_optimizer_is_what_its_steps_keep(make, keys):
    parameters = {
        "a.b": torch.nn.Parameter(torch.ones(3, 4)),
        "half": torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16)),
        "idle": torch.nn.Parameter(torch.ones(2)),
    }
    optimizer = make(list(parameters.values()))
    layout = optimizer_layout(optimizer, parameters)
    assert not optimizer.state
    assert {name.split(".")[1] for name in layout} == keys
    for name in ("a.b", "half"):
        parameters[name].grad = torch.ones_like(parameters[name])
    optimizer.step()
    tensors, without = optimizer_tensors(optimizer, parameters)
    assert without == (["idle"] if keys else [*parameters])
    for name, tensor in tensors.items():
        assert (layout[name].dtype, layout[name].shape) == (tensor.dtype, tuple(tensor.shape))
    again = make(list(parameters.values()))
    load_optimizer(again, parameters, tensors)
    assert {k: {n: float(v.sum()) for n, v in s.items()} for k, s in again.state.items()} == {
        k: {n: float(v.sum()) for n, v in s.items() if v is not None} for k, s in optimizer.state.items() if any(
            v is not None for v in s.values())
    }  # fmt: skip


def test_moments_of_strided_weights_are_resumed_in_their_order(tmp_path):
    """A fused optimiser walks through weights and moments in the order of memory."""

    def strided() -> SAE:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sae = SAE(6, 10, "relu")
        sae.W_enc = torch.nn.Parameter(sae.W_enc.detach().T.contiguous().T)
        return sae

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 5:
            raise Stop

    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(batch_size=32, steps=8, warmup_steps=2, checkpoint_every=2, log_every=1)
    whole = train_sae(x, strided(), config=config)
    with pytest.raises(Stop):
        train_sae(x, strided(), config=config, out=tmp_path, on_log=stop)
    resumed = train_sae(x, strided(), config=config, out=tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_checkpoint_of_an_older_version_goes_on_with_a_warning(tmp_path, caplog):
    run = stopped("finetune", tmp_path / "run")
    found = load_latest(run.folder)
    index = json.loads(found.meta_path.read_text())
    for new in ("checksum", "data", "without state"):
        index.pop(new, None)
        index["meta"].pop(new, None)
    for path in run.folder.glob("*.json"):
        if path != found.meta_path:
            path.unlink()
    found.meta_path.write_text(json.dumps(index))
    with caplog.at_level(logging.WARNING, "clipsteer"):
        assert run.resume() is True
    assert "a version that kept no checksum" in caplog.text
    assert "a version that did not note its data" in caplog.text


# ---------------------------------------------------------------- drawn files


def tampered_files(draw: random.Random, whole: Checkpoint, folder: Path) -> None:
    """One changed checkpoint of the step, with the right checksums but for damage to the bytes of the index."""
    kind = draw.choice(["tensors", "meta", "both", "bytes", "index"])
    for path in folder.glob("step-*"):
        path.unlink()
    tensors, meta = whole.tensors, whole.meta
    if kind in ("tensors", "both"):
        tensors = _tamper.drawn_tensors(draw, dict(tensors))
    if kind in ("meta", "both"):
        meta = _tamper.drawn_meta(draw, meta)
    index = save_state(folder, whole.step, tensors, meta)
    if kind == "bytes":
        data = index.with_suffix(".safetensors")
        content = bytearray(data.read_bytes())
        for _ in range(draw.randint(1, 3)):
            # the header as often as the rest
            at = draw.randrange(min(len(content), 4096) if draw.random() < 0.5 else len(content))
            content[at] = draw.randrange(256)
        if draw.random() < 0.2:
            del content[draw.randrange(len(content)) :]
        data.write_bytes(content)
        facts = checkpoint.file_facts(data)
        write_checked(index, {"step": whole.step, **facts, "meta": meta})
    elif kind == "index":
        content = bytearray(index.read_bytes())
        content[draw.randrange(len(content))] = draw.randrange(256)
        index.write_bytes(content)


def try_files(run: Stopped, whole: Checkpoint, seed: int, count: int) -> dict[str, int]:
    """What became of so many changed checkpoints; anything but the ends named here is let out."""
    draw = random.Random(seed)
    ends = {"refused": 0, "another run": 0, "taken or passed over": 0}
    for _ in range(count):
        tampered_files(draw, whole, run.folder)
        end, said = "taken or passed over", str(run.folder)
        try:
            run.resume()
        except FileFormatError as error:
            end, said = "refused", str(error)
        except ValueError as error:
            end, said = "another run", str(error).replace(" holds a run ", f" {run.folder} ")
        assert str(run.folder) in said, said
        ends[end] += 1
    return ends


@pytest.mark.parametrize("count", day_and_night(30, 300))
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_that_were_changed_and_signed_anew(tmp_path, caplog, monkeypatch, kind, count):
    caplog.set_level(logging.ERROR, "clipsteer")
    # the many files are of no value
    monkeypatch.setattr("os.fsync", lambda _: None)
    run = stopped(kind, tmp_path / "run")
    ends = try_files(run, load_latest(run.folder), seed=len(kind), count=count)
    assert sum(ends.values()) == count
    assert min(ends.values()) > 0, ends
