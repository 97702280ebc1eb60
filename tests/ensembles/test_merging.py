from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import clipsteer
from clipsteer import wise_ft
from clipsteer.ensembles import merging
from clipsteer.ensembles.merging import RunningEnsemble
from clipsteer.io.files import FileFormatError, read_safetensors, read_safetensors_header, write_safetensors

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ULP = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
alphas = st.floats(0, 1)
seeds = st.integers(0, 2**31)


def weights(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "visual.conv.weight": (torch.randn(7, 3, 5, 5, generator=g) * scale).to(dtype),
        "visual.proj": (torch.randn(33, 65, generator=g) * scale).to(dtype).T,  # not contiguous
        "text.bias": (torch.randn(129, generator=g) * scale).to(dtype),
        "logit_scale": (torch.randn((), generator=g) * scale).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize]) if tensor.dtype != torch.bool else tensor


def assert_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(bits(a[name]), bits(b[name])), name


@pytest.fixture(params=[1 << 18, 37], ids=["whole", "pieces"])
def piece(request, monkeypatch):
    """Each tensor in one piece, and in pieces that no vector width divides."""
    monkeypatch.setattr(merging, "_PIECE", request.param)


def on_disk(folder, **models) -> list:
    paths = []
    for name, tensors in models.items():
        paths.append(folder / f"{name}.safetensors")
        write_safetensors(paths[-1], tensors)
    return paths


def sharded(folder, tensors: dict[str, torch.Tensor], shards: int = 3):
    folder.mkdir()
    names, places = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        places |= dict.fromkeys(names[i::shards], file)
        write_safetensors(folder / file, {name: tensors[name] for name in names[i::shards]})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@given(seed=seeds, alpha=alphas, dtype=st.sampled_from(FLOATS), scale=st.sampled_from([1e-30, 1.0, 1e4]))
def test_against_the_authors_loop(seed, alpha, dtype, scale):
    """(1-alpha)*theta_0 + alpha*theta_1 in a plain loop, as the paper's code has it, here in float64."""
    if dtype == torch.float16:
        scale = min(max(scale, 1e-2), 1e3)
    theta_0, theta_1 = weights(seed, dtype, scale), weights(seed + 1, dtype, scale)
    merged = wise_ft(theta_0, theta_1, alpha)
    wide = torch.float64
    for name in theta_0:
        a, b = theta_0[name].to(wide), theta_1[name].to(wide)
        theta = (1 - alpha) * a + alpha * b
        # in float32 (float64): the weight, the difference and the product are each rounded once, relative to |b-a|,
        # the sum once relative to itself; then once to the dtype. Subnormal results are off by one of their steps.
        inner = ULP[torch.float64] if dtype == torch.float64 else ULP[torch.float32]
        bound = 3.01 * inner * (b - a).abs() + inner * theta.abs()
        if dtype == torch.float64:
            bound = 2 * bound + 2 * inner * (a.abs() + b.abs())  # this loop rounds as often
        bound = bound + ULP[dtype] * (theta.abs() + bound) + torch.finfo(dtype).smallest_normal * 2 * ULP[dtype]
        assert (merged[name].dtype, merged[name].shape) == (dtype, theta_0[name].shape)
        assert bool(((merged[name].to(wide) - theta).abs() <= bound).all()), name


@given(seed=seeds, alpha=alphas, dtype=st.sampled_from(FLOATS), scale=st.sampled_from([1e-38, 1.0, 100.0]))
def test_every_value_lies_between_its_ends(seed, alpha, dtype, scale):
    theta_0, theta_1 = weights(seed, dtype, scale), weights(seed + 1, dtype, scale)
    for name, merged in wise_ft(theta_0, theta_1, alpha).items():
        low, high = torch.minimum(theta_0[name], theta_1[name]), torch.maximum(theta_0[name], theta_1[name])
        assert bool(((low <= merged) & (merged <= high)).all()), name


def awkward(dtype: torch.dtype) -> torch.Tensor:
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -3.0, 65504.0], dtype=dtype)
    payload = bits(special).clone()
    payload[4] += 1  # another NaN
    return torch.cat([special, payload.view(dtype)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("alpha", [0.01, 0.25, 0.5, 0.75, 0.99])
def test_ends_whose_difference_overflows(dtype, alpha):
    top = torch.finfo(dtype).max
    a = torch.tensor([top, -top, 0.75 * top, 1.0, math.inf, math.nan], dtype=dtype)
    b = torch.tensor([-top, top, -0.5 * top, 3.0, math.inf, math.nan], dtype=dtype)
    got = wise_ft({"w": a}, {"w": b}, alpha)["w"]
    low, high = torch.minimum(a, b)[:4], torch.maximum(a, b)[:4]
    assert bool(((low <= got[:4]) & (got[:4] <= high)).all())
    expected = (1 - alpha) * (a[:4].double() / top) + alpha * (b[:4].double() / top)
    torch.testing.assert_close(got[:4].double() / top, expected, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert got[4] == math.inf
    assert got[5].isnan()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_identities_are_bitwise(dtype, piece, tmp_path):
    theta_0 = weights(0, dtype) | {"awkward": awkward(dtype), "count": torch.tensor(3), "mask": torch.tensor([True])}
    theta_1 = weights(1, dtype) | {
        "awkward": awkward(dtype).flip(0),
        "count": torch.tensor(5),
        "mask": ~torch.ones(1).bool(),
    }
    files = on_disk(tmp_path, a=theta_0, b=theta_1)
    for pair in ((theta_0, theta_1), files):
        assert_bits(wise_ft(*pair, 0), theta_0)
        assert_bits(wise_ft(*pair, 1), theta_1)
        assert_bits(wise_ft(*pair, 0.0), theta_0)
    for alpha in (0.1, 0.5, 0.9, 1e-30):
        assert_bits(wise_ft(theta_0, copy.deepcopy(theta_0), alpha), theta_0)
        assert_bits(wise_ft(files[0], theta_0, alpha), theta_0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_files_shards_lists_and_memory_agree_bitwise(dtype, piece, tmp_path):
    theta_0, theta_1 = weights(2, dtype), weights(3, dtype)
    a, b = on_disk(tmp_path, a=theta_0, b=theta_1)
    grid = [0, 0.05, 0.5, 0.7, 1]
    single = [wise_ft(a, b, alpha, tmp_path / f"one-{i}.safetensors") for i, alpha in enumerate(grid)]
    together = wise_ft(str(a), b, grid, str(tmp_path / "many-{alpha}.safetensors"))
    assert [path.name for path in together] == [f"many-{alpha:g}.safetensors" for alpha in grid]
    for alpha, one, many in zip(grid, single, together):
        assert one.read_bytes() == many.read_bytes()
        assert_bits(read_safetensors(one), wise_ft(theta_0, theta_1, alpha))
        assert json.loads(read_safetensors_header(one).metadata["wise_ft_alpha"]) == alpha
    assert_bits(wise_ft(theta_0, theta_1, grid)[2], wise_ft(theta_0, theta_1, 0.5))
    pieces = wise_ft(sharded(tmp_path / "s0", theta_0), sharded(tmp_path / "s1", theta_1, 2), 0.05,
                     tmp_path / "pieces.safetensors")  # fmt: skip
    assert pieces.read_bytes() == single[1].read_bytes()
    assert wise_ft(tmp_path / "s0" / "model.safetensors.index.json", b, 0.5)["text.bias"].dtype == dtype


def test_threads_do_not_change_a_bit():
    a, b = torch.randn(300_001), torch.randn(300_001)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(wise_ft({"w": a}, {"w": b}, 0.3))
    finally:
        torch.set_num_threads(before)
    assert_bits(*results)
    parts = torch.cat([wise_ft({"w": x}, {"w": y}, 0.3)["w"] for x, y in zip(a.split(1013), b.split(1013))])
    assert_bits({"w": parts}, results[0])


@given(seed=seeds, alpha=alphas, beta=alphas)
def test_alpha_by_pattern(seed, alpha, beta):
    theta_0, theta_1 = weights(seed), weights(seed + 1)
    merged = wise_ft(theta_0, theta_1, {"visual.*": alpha, "logit_scale": 0, "*": beta})
    for pattern, value in (("visual.", alpha), ("text.", beta), ("logit_scale", 0)):
        names = [name for name in theta_0 if name.startswith(pattern)]
        expected = wise_ft(theta_0, theta_1, value)
        assert_bits({n: merged[n] for n in names}, {n: expected[n] for n in names})


def test_the_first_pattern_counts_and_all_are_needed(tmp_path):
    theta = weights(0)
    assert_bits(
        wise_ft(theta, weights(1), {"visual.proj": 1, "visual.*": 0, "*": 0}) | {},
        theta | {"visual.proj": weights(1)["visual.proj"]},
    )
    with pytest.raises(ValueError, match=r"no pattern in alpha matches .*text.bias.*add '\*'"):
        wise_ft(theta, weights(1), {"visual.*": 0.5})
    with pytest.raises(ValueError, match=r"decide no tensor: viusal"):
        wise_ft(theta, weights(1), {"viusal.*": 0.5, "*": 0})
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 2 for 'text.\*'"):
        wise_ft(theta, weights(1), {"text.*": 2, "*": 0})
    a, b = on_disk(tmp_path, a=theta, b=weights(1))
    by_layer = {"visual.*": 0.25, "*": 0.75}
    out = wise_ft(a, b, [by_layer, 0.5], [tmp_path / "x.safetensors", tmp_path / "y.safetensors"])
    assert_bits(read_safetensors(out[0]), wise_ft(theta, weights(1), by_layer))


def test_integers_are_the_zero_shots_and_a_warning_names_them(caplog):
    theta_0 = weights(0) | {"bn.num_batches_tracked": torch.tensor(4), "ids": torch.arange(3)}
    theta_1 = weights(1) | {"bn.num_batches_tracked": torch.tensor(9), "ids": torch.arange(3)}
    merged = wise_ft(theta_0, theta_1, 0.5)
    assert merged["bn.num_batches_tracked"] == 4
    assert "bn.num_batches_tracked" in caplog.text
    assert "ids" not in caplog.text
    caplog.clear()
    assert wise_ft(theta_0, theta_1, 1)["bn.num_batches_tracked"] == 9
    assert not caplog.records


def test_unsigned_integers_are_copied_and_float8_is_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    ids = {f"ids{w}": torch.tensor([1, 2**w - 1]).to(getattr(torch, f"uint{w}")) for w in (16, 32)}
    a, b = on_disk(tmp_path, a={**ids, "w": torch.zeros(2)}, b={**ids, "w": torch.ones(2)})
    merged = read_safetensors(wise_ft(a, b, 0.5, tmp_path / "m.safetensors"))
    assert_bits(merged, {**ids, "w": torch.full((2,), 0.5)})
    narrow = {"small": torch.zeros(2).to(torch.float8_e4m3fn)}
    with pytest.raises(TypeError, match=r"'small' is torch\.float8_e4m3fn"):
        wise_ft(narrow, narrow, 0.5)
    save_file(narrow, a)
    with pytest.raises(FileFormatError, match=r"'small' has unsupported dtype 'F8_E4M3'"):
        wise_ft(a, a, 0.5)


def test_what_does_not_match_is_listed(tmp_path):
    theta_0, theta_1 = weights(0), weights(0)
    theta_1["logit_scale"] = theta_1["logit_scale"].half()
    theta_1["text.bias"] = torch.zeros(30)
    theta_1["head.weight"] = theta_1.pop("empty")
    a, b = on_disk(tmp_path, a=theta_0, b=theta_1)
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="do not match") as error:
        wise_ft(a, b, 0.5, out)
    assert str(error.value).splitlines()[1:] == [
        "  only in the first (1): empty",
        "  only in the second (1): head.weight",
        "  shapes differ (1): text.bias (129,) and (30,)",
        "  dtypes differ (1): logit_scale torch.float32 and torch.float16",
    ]
    assert "a.safetensors" in str(error.value)
    assert not out.exists()
    many = {f"layer.{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(ValueError, match=r"only in the second \(20\): layer.0, .* and 12 more"):
        wise_ft({}, many)


def test_mistakes_in_the_call(tmp_path):
    a, b = on_disk(tmp_path, a=weights(0), b=weights(1))
    for alpha in (-0.1, 1.1, math.nan, "0.5"):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            wise_ft(a, b, alpha)
    with pytest.raises(ValueError, match="list of files"):
        wise_ft(a, b, [0, 1], tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="2 different"):
        wise_ft(a, b, [0.1, 0.1], str(tmp_path / "{alpha}.safetensors"))
    with pytest.raises(ValueError, match=r"end in \.safetensors"):
        wise_ft(a, b, 0.5, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"must be \.safetensors"):
        wise_ft(tmp_path / "x.npz", b)
    with pytest.raises(TypeError, match="finetuned must be a path"):
        wise_ft(a, 3)
    with pytest.raises(TypeError, match="dense real tensor"):
        wise_ft({"a": 3}, {"a": 3})
    with pytest.raises(FileNotFoundError):
        wise_ft(tmp_path / "none.safetensors", b)
    with pytest.raises(FileNotFoundError, match="no weights in it"):
        wise_ft(tmp_path, b)


def test_damaged_files_are_refused_and_leave_nothing(tmp_path):
    a, b = on_disk(tmp_path, a=weights(0), b=weights(1))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(a.read_bytes()[:-5])
    with pytest.raises(FileFormatError, match="broken"):
        wise_ft(broken, b, 0.5, tmp_path / "out.safetensors")
    folder = sharded(tmp_path / "shards", weights(0))
    index = folder / "model.safetensors.index.json"
    for change in ({"weight_map": {"x": "../a.safetensors"}}, {"weight_map": {}}, [], {"weight_map": {"x": 3}},
                   {"weight_map": {"x": "model-00001-of-00003.safetensors"}}):  # fmt: skip
        index.write_text(json.dumps(change))
        with pytest.raises(FileFormatError, match=r"index\.json"):
            wise_ft(folder, b)
    torch.save({"state_dict": {"a": 3}}, tmp_path / "odd.pt")
    with pytest.raises(FileFormatError, match="not a state dict"):
        wise_ft(tmp_path / "odd.pt", b)
    torch.save({"a": subprocess.Popen}, tmp_path / "evil.pt")
    with pytest.raises(FileFormatError, match="weights-only"):
        wise_ft(tmp_path / "evil.pt", b)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out") or p.suffix == ".tmp"]


def test_torch_files_and_open_clip_folders(tmp_path):
    theta_0, theta_1 = weights(0), weights(1)
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in theta_1.items()}}, tmp_path / "epoch_3.pt")
    folder = tmp_path / "local"
    folder.mkdir()
    write_safetensors(folder / "open_clip_model.safetensors", theta_0)
    assert_bits(wise_ft(folder, tmp_path / "epoch_3.pt", 0.3), wise_ft(theta_0, theta_1, 0.3))


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.norm, self.head = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def test_modules_give_a_module():
    a, b = Net(0).eval(), Net(1).eval()
    before = copy.deepcopy(a.state_dict())
    merged = wise_ft(a, b, 0.25)
    assert isinstance(merged, Net)
    assert not merged.training
    assert_bits(merged.state_dict(), wise_ft(a.state_dict(), b.state_dict(), 0.25))
    assert_bits(a.state_dict(), before)
    assert len(wise_ft(a, b, [0.1, 0.9])) == 2
    x = torch.randn(3, 8)
    assert not torch.equal(merged(x), a(x))
    with torch.no_grad():
        merged.head.weight.zero_()
    assert a.head.weight.abs().sum() > 0


@given(seed=seeds, alpha=alphas, rows=st.integers(1, 9), width=st.sampled_from([1, 31, 256]))
def test_of_linear_heads_the_average_weights_give_the_average_output(seed, alpha, rows, width):
    """Features fixed, only the head tuned: f(x, (1-a)W_0 + a W_1) = (1-a) f(x, W_0) + a f(x, W_1) up to rounding."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g)
    w_0, w_1 = (torch.randn(7, width, generator=g) for _ in range(2))
    one = x @ wise_ft({"w": w_0}, {"w": w_1}, alpha)["w"].T
    two = (1 - alpha) * (x @ w_0.T) + alpha * (x @ w_1.T)
    # a dot product of n terms is off by at most g(n) Σ|x||w|, g(n) = n u/(1-n u); three such products, the merge's own
    # error (3 u |w_1-w_0| + u |w|) under the same sum, and four roundings of the outputs' average
    u = 2.0**-24
    m = x.abs().double() @ (w_0.abs() + w_1.abs()).double().T
    bound = (2 * width * u / (1 - width * u) + 4 * u + 4 * u) * 1.01 * m
    assert bool(((one - two).abs() <= bound).all())


def test_running_ensemble_is_wise_ft_of_start_and_end():
    model = Net(3)
    start = copy.deepcopy(model.state_dict())
    ensemble = RunningEnsemble(model, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    means = copy.deepcopy(start)
    smooth = RunningEnsemble(model, 1.0, decay=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(6, 8)).square().sum().backward()
        optimizer.step()
        ensemble.update(model)
        smooth.update(model)
        for name, tensor in model.state_dict().items():
            means[name] = 0.5 * means[name] + 0.5 * tensor if tensor.is_floating_point() else tensor.clone()
    end = copy.deepcopy(model.state_dict())
    assert not torch.equal(end["head.weight"], start["head.weight"])
    assert_bits(ensemble.state_dict(), wise_ft(start, end, 0.3))
    for name, tensor in smooth.state_dict().items():
        torch.testing.assert_close(tensor, means[name])
    with ensemble.applied(model) as inside:
        assert_bits(inside.state_dict(), wise_ft(start, end, 0.3))
    assert_bits(model.state_dict(), end)
    with pytest.raises(ValueError, match="decay"):
        RunningEnsemble(model, decay=1)


def test_running_mean_of_half_precision_weights_moves():
    model = nn.Linear(4, 4).bfloat16()
    ensemble = RunningEnsemble(model, 1.0, decay=0.999)
    with torch.no_grad():
        model.weight += 1
    before = ensemble.state_dict()["weight"].float()
    for _ in range(1000):
        ensemble.update(model)
    assert 0.5 < float((ensemble.state_dict()["weight"].float() - before).mean()) < 0.75  # 1 - 0.999**1000 = 0.632


def program(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
def test_memory_stays_below_two_of_the_largest_tensor(tmp_path):
    """Peak resident memory beyond what the imports take, with 24 MiB tensors and three outputs."""
    big = {f"layer.{i}": torch.randn(6 << 20) for i in range(4)}
    a, b = on_disk(tmp_path, a=big, b={name: t + 1 for name, t in big.items()})
    del big
    code = f"""
        import torch
        from clipsteer import wise_ft
        small = torch.randn(1 << 18)
        wise_ft({{"w": small}}, {{"w": small + 1}}, 0.5, {str(tmp_path / "warm.safetensors")!r})
        # ru_maxrss would start at what this test run itself has held
        peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        before = peak()
        wise_ft({str(a)!r}, {str(b)!r}, [0.1, 0.5, 0.9], {str(tmp_path / "m-{alpha}.safetensors")!r})
        out = peak() - before
        wise_ft({str(a)!r}, {str(b)!r}, 0.5)
        import sys; sys.stdout.write(f"{{out}} {{peak() - before}}")
    """
    done = subprocess.run(program(code), capture_output=True, text=True, check=True)
    streamed, in_memory = map(int, done.stdout.split())
    assert streamed < 2 * 24 * 1024
    assert in_memory > 4 * 24 * 1024  # so the measurement can see memory at all


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_run_leaves_the_old_file(tmp_path):
    theta = {f"layer.{i}": torch.randn(1 << 20) for i in range(4)}
    a, b = on_disk(tmp_path, a=theta, b={name: t + 1 for name, t in theta.items()})
    out, fresh = tmp_path / "old.safetensors", tmp_path / "fresh.safetensors"
    out.write_bytes(b"what was there")
    code = f"""
        import time
        from clipsteer.ensembles import merging
        blend, blended = merging.blend, []
        def stops(*args):
            blended.append(args)
            if len(blended) == 6:  # of eight: it waits to be killed
                time.sleep(600)
            return blend(*args)
        merging.blend = stops
        merging.wise_ft({str(a)!r}, {str(b)!r}, [0.4, 0.5], [{str(out)!r}, {str(fresh)!r}])
    """
    running = subprocess.Popen(program(code))
    deadline = time.monotonic() + 600
    while not any(p.suffix == ".tmp" and p.stat().st_size > 1 << 20 for p in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert out.read_bytes() == b"what was there"
    assert not fresh.exists()
    clipsteer.wise_ft(a, b, [0.4, 0.5], [out, fresh])
    assert_bits(read_safetensors(out), wise_ft(a, b, 0.4))
    assert not [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"]  # what the killed run left is gone


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    a, b = on_disk(tmp_path, a=weights(0), b=weights(1))
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return blend(*args)

    blend = merging.blend
    monkeypatch.setattr(merging, "blend", full)
    with pytest.raises(OSError, match="No space"):
        wise_ft(a, b, [0.2, 0.4], str(tmp_path / "out-{alpha}.safetensors"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_mergekit_agrees_on_the_same_files(tmp_path):
    """mergekit's linear method on the same two files, whose products and sum are rounded once each, in the dtype."""
    raw = pytest.importorskip("mergekit.scripts.merge_raw_pytorch", reason="mergekit is not installed")
    import mergekit.merge_methods  # noqa: F401  (registers the methods)
    from mergekit.graph import Executor
    from mergekit.options import MergeOptions

    a, b = on_disk(tmp_path, a=weights(0), b=weights(1))
    models = [{"model": str(p), "parameters": {"weight": w}} for p, w in ((a, 0.7), (b, 0.3))]
    config = raw.RawPyTorchMergeConfig(merge_method="linear", models=models, parameters={"normalize": False})
    plan = raw.plan_flat_merge(config, str(tmp_path / "kit"), False, False, MergeOptions(safe_serialization=True))
    Executor(plan).execute()
    (written,) = (tmp_path / "kit").glob("*.safetensors")
    theirs, ours = read_safetensors(written), wise_ft(a, b, 0.3)
    assert theirs.keys() == ours.keys()
    for name, x in weights(0).items():
        y, u = weights(1)[name], 2.0**-24
        # theirs: two weights, two products and a sum; ours: at most 3 u |y-x| + u |result|
        bound = 1.01 * u * (3 * (0.7 * x.abs() + 0.3 * y.abs()) + 3 * (y - x).abs() + x.abs() + y.abs())
        assert bool(((theirs[name] - ours[name]).abs() <= bound).all()), name
