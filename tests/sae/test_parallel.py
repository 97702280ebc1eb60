"""Several processes train one SAE: on exchanged codes, and each on its share of the features."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from _command import in_processes
from clipsteer import SAE, TrainConfig, train_sae
from clipsteer.sae.trainer import SAETrainer
from clipsteer.training.world import World

# double precision: the two differ in the order of sums of at most 10⁴ terms, amplified by 25 steps of Adam
RELATIVE = 1e-9
DEAD = {"dead_after": 200, "sync_every": 3}
PREFIXES = {"matryoshka": [7, 25, 60]}
CASES = {
    "topk": {"grad_clip": 0.3, **DEAD},
    "batch_topk": {"architecture": "batch_topk", "k": 2.5, "normalize": "constant_norm", **DEAD},
    "relu": {"architecture": "relu", "normalize": "layer_norm", "l1_coefficient": 0.01},
    "jumprelu": {"architecture": "jumprelu", "bandwidth": 0.5, **DEAD},
    "gated": {"architecture": "gated", **DEAD},
    "prefixes": {**PREFIXES, **DEAD},
    "prefixes of batch_topk": {"architecture": "batch_topk", **PREFIXES, **DEAD},
    "transcoder": {"skip": True, **DEAD},
}
SHARED = {"d_sae": 60, "k": 4, "batch_size": 48, "steps": 25, "warmup_steps": 4, "lr": 1e-3, "dtype": "float64",
          "log_every": 5, "checkpoint_every": 4}  # fmt: skip
METRICS = ("loss", "fvu", "l0", "dead", "auxk")

PRELUDE = """
import json, os, sys
from pathlib import Path
import pytest, torch
from clipsteer import SAE, TrainConfig, train_sae
from clipsteer.sae.trainer import SAETrainer
from clipsteer.training.world import World

torch.set_num_threads(1)
out = Path(sys.argv[1])
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
x, y = torch.load(out / "rows.pt", weights_only=True)
"""

TRAIN = (
    PRELUDE
    + """
cases, modes = json.loads(sys.argv[2]), json.loads(sys.argv[3])
for name, settings in cases.items():
    for mode in modes:
        config = TrainConfig(**settings, shard_features=mode == "features")
        target = {"target": y} if "skip" in settings else {}
        sae = train_sae(x, config, out=out / f"{name}-{mode}-{size}", device="cpu", **target)
        assert not sae.training and sae.d_sae == 60 and type(sae) is SAE
        torch.save(sae.state_dict(), out / f"{name}-{mode}-{size}-{rank}.pt")
"""
)


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 8, generator=generator).double() @ torch.randn(8, 16, generator=generator).double()
    return x, x @ torch.randn(16, 10, generator=generator).double()


def run(folder, worker, *args, size):
    torch.save(rows(), folder / "rows.pt")
    in_processes(worker, folder, *args, size=size)


def alone(settings, **options):
    x, y = rows()
    options |= {"target": y} if "skip" in settings else {}
    return train_sae(x, TrainConfig(**settings), device="cpu", **options)


def assert_close(found, wanted, what):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        error = (found[key] - value).abs().max() / value.abs().max().double().clamp_min(1e-300)
        assert float(error) <= RELATIVE, (what, key, float(error))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("names", [("topk", "batch_topk", "relu"), ("jumprelu", "gated"),
                                   ("prefixes", "prefixes of batch_topk", "transcoder")])  # fmt: skip
def test_processes_train_what_one_trains_on_the_joint_batch(tmp_path, size, names):
    cases = {name: {**SHARED, **CASES[name]} for name in names}
    run(tmp_path, TRAIN, json.dumps(cases), '["rows", "features"]', size=size)
    for name, settings in cases.items():
        log = []
        wanted = alone(settings, out=tmp_path / f"{name}-1", on_log=log.append)
        assert name == "relu" or log[-1]["dead"] > 0
        for mode in ("rows", "features"):
            what = f"{name}-{mode}-{size}"
            weights = [torch.load(tmp_path / f"{what}-{rank}.pt", weights_only=True) for rank in range(size)]
            for other in weights[1:]:
                assert all(torch.equal(other[key], value) for key, value in weights[0].items()), what
            assert_close(weights[0], wanted.state_dict(), what)
            # files: those of one process
            for file in ("cfg.json", "model.safetensors"):
                assert (tmp_path / what / file).stat().st_size == (tmp_path / f"{name}-1" / file).stat().st_size
            assert (tmp_path / what / "cfg.json").read_bytes() == (tmp_path / f"{name}-1" / "cfg.json").read_bytes()
            assert_close(SAE.from_pretrained(tmp_path / what).state_dict(), wanted.state_dict(), what)
            for step in (24, 25):
                state = f"checkpoints/step-{step:010d}.safetensors"
                found, kept = load_file(tmp_path / what / state), load_file(tmp_path / f"{name}-1" / state)
                # of the process that wrote it
                del found["rng.cpu"], kept["rng.cpu"]
                for key in ("dead", "tokens_since_fired", "position"):
                    assert torch.equal(found[key], kept[key])
                assert_close(found, kept, what)
            records = [json.loads(line) for line in (tmp_path / what / "log.jsonl").read_text().splitlines()]
            assert [record["step"] for record in records] == [record["step"] for record in log]
            for a, b in zip(records, log):
                assert a["bytes_sent"] > 0
                assert "bytes_sent" not in b
                for metric in METRICS:
                    assert a[metric] == pytest.approx(b[metric], rel=1e-5), (what, metric)


@pytest.mark.slow
def test_under_autocast_a_process_may_have_no_dead_features(tmp_path):
    settings = {**SHARED, **DEAD, "dtype": "float32", "autocast": "bfloat16"}
    run(tmp_path, TRAIN, json.dumps({"topk": settings}), '["rows", "features"]', size=2)
    for mode in ("rows", "features"):
        first, second = (torch.load(tmp_path / f"topk-{mode}-2-{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(first[key], value) for key, value in second.items())
        records = [json.loads(line) for line in (tmp_path / f"topk-{mode}-2" / "log.jsonl").read_text().splitlines()]
        # rounding to 8 bits may keep other codes than one process does; it trains all the same
        assert records[-1]["fvu"] < records[0]["fvu"]


STOP = """
from clipsteer.sae.activations import TensorSource

class Stopped(TensorSource):
    def batches(self, *args, start, **kwargs):
        stream = super().batches(*args, start=start, **kwargs)
        for count, batch in enumerate(stream):
            if count == stop:
                raise KeyError("stop")
            yield batch

def part(x, settings, out, stop_after):
    global stop
    stop = stop_after
    try:
        return train_sae(Stopped(x), TrainConfig(**settings), out=out, device="cpu")
    except KeyError:
        pass
"""
RESUME = (
    PRELUDE
    + STOP
    + """
for name, settings in json.loads(sys.argv[2]).items():
    part(x, {**settings, "shard_features": bool(int(sys.argv[3]))}, out / name, int(sys.argv[4]))
"""
)


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes(tmp_path):
    cases = {name: {**SHARED, **CASES[name]} for name in ("topk", "batch_topk", "prefixes")}
    scope = {**globals()}
    exec(STOP, scope)
    for name, settings in cases.items():
        scope["part"](rows()[0], settings, tmp_path / name, 6)  # to step 4
    # to steps 8, 16, 20 and the end
    for size, features, stop in ((2, 1, 5), (3, 0, 9), (2, 0, 5), (3, 1, 99)):
        run(tmp_path, RESUME, json.dumps(cases), features, stop, size=size)
    for name, settings in cases.items():
        assert_close(SAE.from_pretrained(tmp_path / name).state_dict(), alone(settings).state_dict(), name)
    # and one process goes on with what several wrote
    shutil.copytree(tmp_path / "topk", tmp_path / "again")
    for file in (tmp_path / "again" / "checkpoints").glob("*25.*"):
        file.unlink()
    again = train_sae(rows()[0], TrainConfig(**cases["topk"]), out=tmp_path / "again", device="cpu")
    assert_close(again.state_dict(), SAE.from_pretrained(tmp_path / "topk").state_dict(), "again")


BYTES = (
    PRELUDE
    + """
found = {}
for mode in ("rows", "features"):
    for n in (60, 240):
        settings = {**json.loads(sys.argv[2]), "d_sae": n, "shard_features": mode == "features"}
        log = []
        train_sae(x, TrainConfig(**settings), device="cpu", on_log=log.append)
        found[f"{mode}-{n}"] = [record["bytes_sent"] for record in log]
if rank == 0:
    (out / "bytes.json").write_text(json.dumps(found))
"""
)


@pytest.mark.slow
def test_what_is_exchanged_does_not_grow_with_the_dictionary(tmp_path):
    run(tmp_path, BYTES, json.dumps({**SHARED, "log_every": 1, "steps": 4}), size=2)
    found = json.loads((tmp_path / "bytes.json").read_text())
    rows_bytes, joint = 24 * 16 * 8, 48
    codes = 24 * 4 * (8 + 4)
    number = 8  # of rows
    # a dictionary's gradient is 60 · 16 · 8 = 7680 bytes
    assert found["rows-60"][1] == rows_bytes + codes + number
    # candidates' values, the sum of decoded parts, b_dec's gradient, the norm's square, L0
    decoded, candidates = joint * 16 * 8, joint * 4 * 8
    assert found["features-60"][1] == rows_bytes + number + candidates + decoded + 16 * 8 + 8 + 8
    for mode in ("rows", "features"):
        # the others look for dead features, as every tenth step does
        assert found[f"{mode}-60"][1:3] == found[f"{mode}-240"][1:3] == [found[f"{mode}-60"][1]] * 2


UNEVEN = (
    PRELUDE
    + """
counts = json.loads(sys.argv[2])
first = sum(counts[:rank])
for name, settings in json.loads(sys.argv[3]).items():
    config = TrainConfig(**{**settings, "autocast": "none"})
    torch.manual_seed(5)
    sae = SAE(16, 60, config.architecture, config.k, dtype=torch.float64)
    trainer = SAETrainer(sae, config, 25, World("cpu"))
    for step in range(6):
        batch = x[step * 48 : step * 48 + 48][first : first + counts[rank]]
        trainer.step(batch)
    shard = trainer.sae
    whole = shard.whole() if config.shard_features else shard
    torch.save(whole.state_dict(), out / f"{name}-{rank}.pt")
"""
)


@pytest.mark.slow
def test_processes_may_have_unequal_shares_of_a_batch(tmp_path):
    cases = {}
    for architecture in ("topk", "batch_topk", "relu"):
        for features in (False, True):
            settings = {**SHARED, "architecture": architecture, "shard_features": features, **DEAD}
            cases[f"{architecture}-{features}"] = settings
    counts = [17, 30, 1]
    run(tmp_path, UNEVEN, json.dumps(counts), json.dumps(cases), size=3)
    for name, settings in cases.items():
        config = TrainConfig(**settings)
        torch.manual_seed(5)
        sae = SAE(16, 60, config.architecture, config.k, dtype=torch.float64)
        trainer = SAETrainer(sae, config, 25, World("cpu"))
        for step in range(6):
            trainer.step(rows()[0][step * 48 : step * 48 + 48])
        for rank in range(3):
            found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert_close(found, sae.state_dict(), name)


MESH = (
    PRELUDE
    + """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

settings = json.loads(sys.argv[2])
with pytest.raises(ValueError, match=r"61 features cannot be dealt out evenly to 3"):
    train_sae(x, TrainConfig(**{**settings, "d_sae": 61}, shard_features=True), device="cpu")
with pytest.raises(ValueError, match=r"batch_size must be a multiple of the 3 processes, got 49"):
    train_sae(x, TrainConfig(**{**settings, "batch_size": 49}), device="cpu")
mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("a", "b"))
with pytest.raises(ValueError, match="one dimension"):
    train_sae(x, TrainConfig(**settings), mesh=mesh)
given = SAE(16, 60, k=4, dtype=torch.float64)
given.load_state_dict(torch.load(out / "given.pt", weights_only=True))
sae = train_sae(x, given, config=TrainConfig(**settings, shard_features=True), mesh=mesh["b"])
assert sae is given
torch.save(sae.state_dict(), out / f"mesh-{rank}.pt")
# two of the three
pair = dist.new_group([0, 2])
if rank != 1:
    sae = train_sae(x, TrainConfig(**settings), device="cpu", mesh=pair)
    torch.save(sae.state_dict(), out / f"pair-{rank}.pt")
else:
    with pytest.raises(ValueError, match="among which"):
        train_sae(x, TrainConfig(**settings), device="cpu", mesh=pair)
dist.barrier()
"""
)


@pytest.mark.slow
def test_meshes_groups_and_what_cannot_be_dealt_out(tmp_path):
    torch.manual_seed(3)
    given = SAE(16, 60, k=4, dtype=torch.float64)
    torch.save(given.state_dict(), tmp_path / "given.pt")
    run(tmp_path, MESH, json.dumps({**SHARED, "steps": 8}), size=3)
    settings = {**SHARED, "steps": 8}
    train_sae(rows()[0], given, config=TrainConfig(**settings))
    for rank in range(3):
        assert_close(torch.load(tmp_path / f"mesh-{rank}.pt", weights_only=True), given.state_dict(), "mesh")
    wanted = alone(settings)
    for rank in (0, 2):
        assert_close(torch.load(tmp_path / f"pair-{rank}.pt", weights_only=True), wanted.state_dict(), "pair")


MEMORY = """
import os, re, sys
import torch
from clipsteer import SAE, TrainConfig
from clipsteer.sae.train import _new_sae
from clipsteer.sae.trainer import SAETrainer
from clipsteer.training.world import World

torch.set_num_threads(1)

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def train(n, steps):
    config = TrainConfig(d_sae=n, k=8, shard_features=True, batch_size=64, steps=9)
    sae = _new_sae(256, None, config, world if world.size > 1 else None)
    trainer = SAETrainer(sae, config, 9, world)
    for step in range(steps):
        trainer.step(torch.randn(64 // world.size, 256))

world = World("cpu")
train(64, 2)
before = status("VmRSS")
train(65536, 4)
with open(f"{sys.argv[1]}/peak-{world.size}-{world.rank}", "w") as file:
    file.write(str(status("VmHWM") - before))
"""


@pytest.mark.slow
def test_the_memory_of_a_dictionary_is_divided(tmp_path):
    for size in (1, 2):
        in_processes(MEMORY, tmp_path, size=size)
    alone, *parts = (int((tmp_path / name).read_text()) for name in ("peak-1-0", "peak-2-0", "peak-2-1"))
    # weights and both moments of both dictionaries are 393,216 KiB
    assert alone > 393_216
    assert max(parts) <= 0.55 * alone, (alone, parts)
