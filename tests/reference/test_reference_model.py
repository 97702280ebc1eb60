"""The loss with its memory, in one process and in several."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from _command import in_processes
from clipsteer import ops, testing
from clipsteer.reference.drrho import DRRhoLoss, gamma_schedule


def pairs(B: int = 9, d: int = 6, r: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Unit rows: image, text, ref_image, ref_text."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randn(B, n, generator=g, dtype=torch.float64) for n in (d, d, r, r)]
    return tuple(torch.nn.functional.normalize(x, dim=1).to(dtype) for x in rows)


def test_gamma_goes_from_one_to_its_least_value():
    values = [gamma_schedule(e, 4, 0.2) for e in range(6)]
    assert values[0] == 1
    assert values[2] == pytest.approx(0.6)
    assert values[4:] == [0.2, 0.2]
    assert values == sorted(values, reverse=True)
    # FastCLIP's γ = 0.2 over 30 epochs, by the cosine's own values at 0, π/6, π/3, π/2, 2π/3, 5π/6 and π
    root = math.sqrt(3)
    expected = [1, 0.6 + 0.2 * root, 0.8, 0.6, 0.4, 0.6 - 0.2 * root, 0.2]
    assert [gamma_schedule(e, 30, 0.2) for e in range(0, 31, 5)] == pytest.approx(expected, abs=1e-12)
    for bad in ((-1, 4, 0.2), (0, 0, 0.2), (0, 4, 0.0), (0, 4, 1.1)):
        with pytest.raises(ValueError, match="gamma_schedule"):
            gamma_schedule(*bad)


def test_u_is_remembered_by_sample_and_averaged():
    image, text, *reference = pairs()
    loss, ids = DRRhoLoss(30, temperature=0.1, eps=1e-3), torch.arange(9) * 3
    assert loss.u.isnan().all()
    assert loss(image, text, ids, *reference) == ops.drrho_loss(image, text, *reference, temperature=0.1, eps=1e-3)[0]
    first = ops.drrho_loss(image, text, *reference, temperature=0.1, eps=1e-3)[1]
    assert torch.equal(loss.u[:, ids], first)
    assert int(loss.u.isnan().sum()) == 2 * 21
    loss(text, image, ids, *reference, gamma=0.25)
    new = ops.drrho_loss(text, image, *reference, temperature=0.1, eps=1e-3)[1]
    torch.testing.assert_close(loss.u[:, ids].exp(), 0.75 * first.exp() + 0.25 * new.exp(), rtol=1e-5, atol=0)
    before = loss.u.clone()
    loss.eval()(image, text, ids, *reference, gamma=0.25)
    assert torch.equal(loss.u, before) or torch.equal(loss.u.nan_to_num(), before.nan_to_num())
    again = DRRhoLoss(30, temperature=0.1)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.u.nan_to_num(), loss.u.nan_to_num())


def test_of_a_sample_that_comes_twice_the_later_pair_is_remembered():
    image, text, *_ = pairs()
    loss, ids = DRRhoLoss(5, temperature=0.1), torch.tensor([0, 1, 2, 0, 1, 4, 4, 0, 3])
    loss(image, text, ids)
    u = ops.drrho_loss(image, text, temperature=0.1)[1]
    assert torch.equal(loss.u, u[:, [7, 4, 2, 8, 6]])


def test_a_learnt_temperature_has_its_gradient_and_its_rule():
    image, text, *reference = pairs()
    loss, ids = DRRhoLoss(9, temperature=0.07, learnable_temperature=True, rho=6.5), torch.arange(9)
    loss(image, text, ids, *reference).backward()
    tau = torch.tensor(0.07, requires_grad=True)
    (expected,) = torch.autograd.grad(ops.drrho_loss(image, text, *reference, temperature=tau, rho=6.5)[0], tau)
    torch.testing.assert_close(loss.logit_scale.grad, -0.07 * expected, rtol=1e-5, atol=0)
    for scale, kept in ((10.0, 0.01), (-1.0, 1.0), (math.log(1 / 0.02), 0.02)):
        loss.logit_scale.data.fill_(scale)
        loss.settle_temperature_()
        assert float(loss.temperature.detach()) == pytest.approx(kept, rel=1e-6)
    # a step counts a third from τ = 0.03 down, wherever it leads
    for tau, moved in ((0.05, 0.3), (0.031, 0.3), (0.029, 0.1), (0.02, 0.1)):
        before = torch.tensor(math.log(1 / tau))
        for sign in (1, -1):
            loss.logit_scale.data.copy_(before + sign * 0.3)
            loss.settle_temperature_(before)
            assert float(loss.logit_scale.detach() - before) == pytest.approx(sign * moved, abs=1e-6)
    fixed = DRRhoLoss(9)
    assert list(fixed.parameters()) == []
    assert fixed.temperature == 0.01


def test_mistakes_are_named():
    image, text, *reference = pairs()
    loss, ids = DRRhoLoss(9), torch.arange(9)
    for error, message, args in (
        (TypeError, "int64", (image, text, ids.int())),
        (ValueError, r"of shape \(B,\)", (image, text, ids[:3])),
        (ValueError, r"in \[0, 9\)", (image, text, ids + 1)),
        (ValueError, "text must be of shape", (image, text[:, :3], ids)),
        (ValueError, "ref_text must be given", (image, text, ids, reference[0])),
    ):
        with pytest.raises(error, match=message):
            loss(*args)
    learnt = {"num_samples": 3, "learnable_temperature": True}
    for bad in (
        {"num_samples": 0}, {"num_samples": 3, "temperature": 0.0}, {"num_samples": 3, "temperature": math.inf},
        {**learnt, "temperature": 0.001}, {**learnt, "temperature_min": 0}, {**learnt, "rho": math.nan},
        {"num_samples": 3, "eps": 1e-46}, {"num_samples": 3, "eps": -1e-14}, {"num_samples": 3, "eps": math.nan},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="DRRhoLoss"):
            DRRhoLoss(**bad)
    DRRhoLoss(3, temperature=0.001, eps=0)


# One linear tower a side, three batches of which the processes have uneven shares, the last of three sometimes none.
SPLITS = {2: ((13, 6), (1, 18), (10, 9)), 3: ((7, 12, 0), (0, 1, 18), (6, 6, 7))}
WORKER = """
import gc, json, os, sys
import torch
from torch.nn.functional import normalize
from clipsteer.training.world import World
from clipsteer.reference.drrho import DRRhoLoss, gamma_schedule

def steps(folder, splits, dtype, backend, world, reference):
    torch.manual_seed(0)
    towers = torch.nn.ModuleList(torch.nn.Linear(8, 6, dtype=dtype) for _ in range(2))
    loss = DRRhoLoss(40, temperature=0.07, learnable_temperature=True, rho=1.5, backend=backend, world=world)
    if world is None or world.size == 1:
        together = towers
    else:
        class Both(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.towers = towers
            def forward(self, x, y):
                return self.towers[0](x), self.towers[1](y)
        together = torch.nn.parallel.DistributedDataParallel(Both())
    found = []
    for step, counts in enumerate(splits):
        g = torch.Generator().manual_seed(step)
        x, y = (torch.randn(19, 8, generator=g, dtype=dtype) for _ in range(2))
        refs = [normalize(torch.randn(19, 5, generator=g, dtype=dtype), dim=1) for _ in range(2)]
        ids = torch.randperm(40, generator=g)[:19]
        ids[3] = ids[11]
        if world is not None and world.size > 1:
            first = sum(counts[: world.rank])
            mine = slice(first, first + counts[world.rank])
            x, y, ids, refs = x[mine], y[mine], ids[mine], [r[mine] for r in refs]
            image, text = together(x, y)
        else:
            image, text = towers[0](x), towers[1](y)
        image, text = normalize(image, dim=1), normalize(text, dim=1)
        for t in (image, text):
            t.retain_grad()
        value = loss(image, text, ids, *(refs if reference else ()), gamma=gamma_schedule(step, 2, 0.3))
        value.backward()
        size = 1 if world is None else world.size
        found.append({
            "loss": value.item(), "d_temperature": loss.logit_scale.grad.item(),
            "d_towers": torch.cat([p.grad.flatten() for p in towers.parameters()]).tolist(),
            "d_image": (image.grad / size).tolist(), "d_text": (text.grad / size).tolist(),
            "u": loss.gather_u().nan_to_num(-999).tolist(),
        })
        loss.zero_grad()
        towers.zero_grad()
    return found

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, cases = sys.argv[1], json.loads(sys.argv[2])
    world = World("cpu")
    for name, (splits, dtype, backend, reference) in cases.items():
        found = steps(folder, splits, getattr(torch, dtype), backend, world, reference)
        with open(f"{folder}/{name}-{world.rank}.json", "w") as file:
            json.dump(found, file)
    # what DistributedDataParallel leaves in cycles holds on to the process group and its threads
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", SPLITS)
def test_processes_with_uneven_shares_equal_one_on_the_joint_batch(tmp_path, size):
    backends = ["reference"] + ["cpp"] * bool(testing.supported("cpp"))
    cases = {
        f"{b}-{d}-{r}": (SPLITS[size], d, b, r) for b in backends for d in ("float32", "float64") for r in (True, False)
    }
    in_processes(WORKER, tmp_path, json.dumps(cases), size=size)
    scope = {"__name__": "worker"}
    exec(compile(WORKER, "worker.py", "exec"), scope)
    for name, (splits, dtype, backend, reference) in cases.items():
        alone = scope["steps"](None, splits, getattr(torch, dtype), backend, None, reference)
        ranks = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(size)]
        for step, expected in enumerate(alone):
            parts = [found[step] for found in ranks]
            joint = {n: [row for p in parts for row in p[n]] for n in ("d_image", "d_text")}
            for key, value in expected.items():
                truth = torch.tensor(value, dtype=torch.float64)
                for got in [joint[key]] if key in joint else [p[key] for p in parts]:
                    error = (torch.tensor(got, dtype=torch.float64).view_as(truth) - truth).abs().max()
                    size_of = truth.abs().max().clamp(min=1.0 if dtype == "float32" else 0.0)
                    assert float(error) <= 1e-6 * float(size_of), (name, step, key, float(error))


UNREAD = """
import json, sys
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from clipsteer.ops import _check
from clipsteer.reference.drrho import DRRhoLoss
from clipsteer.reference.losses import ContrastiveLoss, SigmoidLoss
from clipsteer.training.world import World

class Unread(TorchDispatchMode):
    # what makes the host wait for a GPU: reading a value, or a shape that depends on values
    READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in self.READS:
            raise AssertionError(f"{name} reads values")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
                raise AssertionError(f"{name} by a mask reads values")
        return func(*args, **(kwargs or {}))

def refuse(*args):
    raise AssertionError("a tensor's values are read")

world = World("cpu")
# on a GPU values are not looked at
_check.has_values = lambda t: False
counts = World.counts
mode = Unread()
def outside(self, number):
    # the one exchange that is of the hosts'
    with torch.utils._python_dispatch._disable_current_modes():
        return counts(self, number)
World.counts = outside
torch.Tensor.tolist = torch.Tensor.numpy = refuse
losses = [
    DRRhoLoss(40, temperature=0.07, learnable_temperature=True, world=world),
    DRRhoLoss(1, world=world), ContrastiveLoss(world=world), ContrastiveLoss(distill=0.5, world=world),
    SigmoidLoss(world=world),
]
for step in range(3):
    B = 4 + 3 * ((world.rank + step) % 2)
    image, text, *refs = (normalize(torch.randn(B, 6), dim=1).requires_grad_() for _ in range(4))
    for loss in losses:
        ids = torch.randint(loss.num_samples if isinstance(loss, DRRhoLoss) else 40, (B,))
        with mode:
            loss(image, text, ids, *(r.detach() for r in refs)).backward()
            loss.settle_temperature_()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_no_value_is_read_in_a_step_of_several_processes(tmp_path):
    """So that a CUDA graph can hold a step, and the host runs ahead of the GPU."""
    in_processes(UNREAD)


COUNTED = """
import torch, torch.distributed as dist
from clipsteer.training import world as of_world
world = of_world.World("cpu")
assert of_world._serves_hosts(dist.distributed_c10d._get_default_group())
assert world.counts(7 + world.rank) == [7, 8]
own = world._host_group()
assert own is dist.distributed_c10d._get_default_group()
of_world._serves_hosts = lambda group: False  # as of nccl's
other = of_world.World("cpu")
with torch.device("meta"):
    assert [other.counts(world.rank), other.counts(3)] == [[0, 1], [3, 3]]
made = other._host_group()
assert made is not own and dist.get_backend(made) == "gloo" and other._host_group() is made
dist.barrier()
dist.destroy_process_group()
"""


def test_rows_are_counted_between_hosts(tmp_path):
    in_processes(COUNTED)
