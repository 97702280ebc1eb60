"""Training under torchrun on gloo: equal to one process on the joint batch, and resumed after a killed rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from clipsteer import SAE, TrainConfig, train_sae

# double precision: the two differ in the order of sums of at most 10⁴ terms, amplified by 25 steps of Adam
RELATIVE = 1e-9
CASES = {
    "topk": {"dead_after": 200, "sync_every": 3, "resample_after": 0},
    "batch_topk": {"architecture": "batch_topk", "dead_after": 200, "sync_every": 3, "resample_after": 0},
    "relu": {"architecture": "relu", "normalize": "layer_norm", "l1_coefficient": 0.01},
}
SHARED = {"d_sae": 60, "k": 4, "batch_size": 48, "steps": 25, "warmup_steps": 4, "lr": 1e-3, "dtype": "float64",
          "log_every": 5, "checkpoint_every": 4}  # fmt: skip

WORKER = """
import atexit, json, os, signal, sys
from pathlib import Path
import torch
from clipsteer import TrainConfig, train_sae
from clipsteer.sae.activations import TensorSource

torch.set_num_threads(1)
cases, out, kill = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rank, attempt = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

def threads():
    names = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    Path(f"{out}/threads-{rank}").write_text("\\n".join(names))

atexit.register(threads)  # before the group is made, so it runs after the group is left

class Fatal(TensorSource):
    def batches(self, *args, **kwargs):
        for count, batch in enumerate(super().batches(*args, **kwargs)):
            if kill and attempt == 0 and rank == 1 and count == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

x = torch.load(out + "/rows.pt", weights_only=True)
for name, settings in cases.items():
    train_sae(Fatal(x), TrainConfig(**settings), out=out + "/" + name, device="cpu")
with open(f"{out}/attempts-{rank}", "a") as file:
    file.write(f"{attempt}\\n")
"""


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(500, 8, generator=generator, dtype=torch.float64) @ torch.randn(
        8, 16, generator=generator, dtype=torch.float64
    )


def torchrun(folder, cases, *, kill=0, restarts=0, worker=WORKER) -> subprocess.CompletedProcess:
    torch.save(rows(), folder / "rows.pt")
    (folder / "worker.py").write_text(worker)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", str(restarts), "--monitor-interval", "0.1",
        str(folder / "worker.py"), *([json.dumps(cases), str(folder), str(kill)] if cases else [str(folder)]),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    agent = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        errors = agent.communicate(timeout=600)[1]
    except subprocess.TimeoutExpired:
        # the agent takes its workers with it
        agent.terminate()
        errors = "timed out\n" + agent.communicate(timeout=60)[1]
    return subprocess.CompletedProcess(command, agent.returncode, stderr=errors)


def assert_equal_to_one_process(folder, name, settings):
    log = []
    alone = train_sae(rows(), TrainConfig(**settings), device="cpu", on_log=log.append)
    together = SAE.from_pretrained(folder / name)
    for key, value in alone.state_dict().items():
        other = together.state_dict()[key]
        error = (other - value).abs().max() / value.abs().max()
        assert float(error) <= RELATIVE, (name, key, float(error))
    records = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [r["step"] for r in log]
    for a, b in zip(records, log):
        for metric in ("loss", "fvu", "l0", "dead", "auxk"):
            assert a[metric] == pytest.approx(b[metric], rel=1e-5), (name, metric)
    return log


@pytest.mark.slow
def test_two_processes_equal_one_on_the_joint_batch(tmp_path):
    cases = {name: {**SHARED, **settings} for name, settings in CASES.items()}
    done = torchrun(tmp_path, cases)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, settings in cases.items():
        log = assert_equal_to_one_process(tmp_path, name, settings)
        # the auxiliary loss must have been at work for this to say anything about it
        assert name == "relu" or log[-1]["dead"] > 0
    # threads of the group that outlive it abort the process, now and then, while the interpreter ends
    for rank in range(2):
        left = (tmp_path / f"threads-{rank}").read_text().split("\n")
        assert not [name for name in left if "gloo" in name], left


STORE_WORKER = """
import json, os, sys
import torch
from clipsteer.cli import main as cli
from clipsteer.io.files import write_safetensors
import clipsteer.sae.activations as activations
import clipsteer.sae.shards as shards

torch.set_num_threads(1)
rank, written = os.environ["RANK"], []
def write(path, tensors):
    written.append(path.name)
    write_safetensors(path, tensors)
shards.write_safetensors = write
whole = activations.harvest_to_store
activations.harvest_to_store = lambda *a, **k: whole(*a, shard_rows=68, **k)
out = sys.argv[1]
paths = ["--data", out + "/images", "--store", out + "/store", "--out", out + "/run"]
size = ["--d-sae", "256", "--k", "4", "--batch-size", "16", "--steps", "6", "--warmup-steps", "2"]
code = cli.main(["sae", "train", "--device", "cpu", *paths, *size])
json.dump(written, open(f"{out}/written-{rank}.json", "w"))
sys.exit(code)
"""


@pytest.mark.slow
def test_the_command_line_under_torchrun_shares_the_harvest(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(22):
        Image.new("RGB", (64, 64), (11 * i, 255 - 7 * i, 90)).save(tmp_path / "images" / f"{i:02}.png")
    done = torchrun(tmp_path, {}, worker=STORE_WORKER)
    assert done.returncode == 0, done.stderr[-3000:]
    written = [json.loads((tmp_path / f"written-{rank}.json").read_text()) for rank in (0, 1)]
    # 17 tokens an image, so 4 images a shard
    assert written == [[f"shard-{i:06d}.safetensors" for i in range(first, 6, 2)] for first in (0, 1)]
    assert SAE.from_pretrained(tmp_path / "run").metadata["data"] == str(tmp_path / "images")


@pytest.mark.slow
@pytest.mark.parametrize("shard_features", [False, True])
def test_a_killed_rank_is_restarted_and_resumes(tmp_path, shard_features):
    cases = {"topk": {**SHARED, **CASES["topk"], "shard_features": shard_features}}
    done = torchrun(tmp_path, cases, kill=11, restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert (tmp_path / f"attempts-{rank}").read_text() == "1\n"
    assert_equal_to_one_process(tmp_path, "topk", cases["topk"])
