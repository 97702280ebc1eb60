"""Matryoshka SAEs and transcoders under torchrun on gloo are those of one process on the joint batch."""

from __future__ import annotations

import json

import pytest
import torch

import _plain_sae as plain
from _command import in_processes
from clipsteer import SAE, TrainConfig, train_sae

# double precision: the two differ in the order of sums of at most 10⁴ terms, amplified by 20 steps of Adam
RELATIVE = 1e-9
CASES = {
    "nested topk": {"matryoshka": plain.PREFIXES},
    "nested batch_topk": {"matryoshka": plain.PREFIXES, "architecture": "batch_topk"},
    "nested relu": {"matryoshka": plain.PREFIXES, "architecture": "relu", "normalize": "layer_norm"},
    "nested jumprelu": {"matryoshka": plain.PREFIXES, "architecture": "jumprelu"},
    "transcoder": {"architecture": "batch_topk", "skip": True},
    "nested transcoder": {"architecture": "relu", "matryoshka": plain.PREFIXES, "l1_coefficient": 0.01},
}
SHARED = {
    "d_sae": plain.N, "k": 2, "batch_size": 48, "steps": 20, "warmup_steps": 4, "lr": 1e-3, "dtype": "float64",
    "log_every": 5, "checkpoint_every": 8, "dead_after": 0, "sync_every": 2, "auxk_coefficient": 1 / 32,
}  # fmt: skip

WORKER = """
import json, sys
import torch
from clipsteer import TrainConfig, train_sae

torch.set_num_threads(1)
cases, out = json.loads(sys.argv[1]), sys.argv[2]
x, y = torch.load(out + "/rows.pt", weights_only=True)
for name, settings in cases.items():
    target = y if "transcoder" in name else None
    train_sae(x, TrainConfig(**settings), target=target, out=out + "/" + name, device="cpu")
"""


@pytest.mark.slow
def test_two_processes_equal_one_on_the_joint_batch(tmp_path):
    x = plain.rows(400)
    y = plain.targets(x)
    torch.save([x, y], tmp_path / "rows.pt")
    cases = {name: {**SHARED, **settings} for name, settings in CASES.items()}
    in_processes(WORKER, json.dumps(cases), tmp_path)
    for name, settings in cases.items():
        target = y if "transcoder" in name else None
        log = []
        alone = train_sae(x, TrainConfig(**settings), target=target, device="cpu", on_log=log.append)
        together = SAE.from_pretrained(tmp_path / name)
        assert together.config == alone.config
        for key, value in alone.state_dict().items():
            other = together.state_dict()[key]
            error = (other - value).abs().max() / value.abs().max()
            assert float(error) <= RELATIVE, (name, key, float(error))
        records = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [record["step"] for record in log]
        for a, b in zip(records, log):
            for metric in ("loss", "fvu", "l0", "dead", "auxk", *(["fvu_3", "fvu_11"] if "nested" in name else [])):
                assert a[metric] == pytest.approx(b[metric], rel=1e-5), (name, metric)
        # the auxiliary loss must have been at work for this to say anything about it
        assert name == "nested relu" or max(record["auxk"] for record in log) > 0
