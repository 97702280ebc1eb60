"""Transcoders against dense formulas in float64 (tests/_plain_sae.py), and rows of an input and a target in pairs."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import _plain_sae as plain
from _command import run
from _tiny import drawings
from clipsteer import SAE, FileFormatError, SAESteering, clip, train_sae
from clipsteer.clip.hooks import apply_at, capture
from clipsteer.sae.activations import ActivationStore, HarvestSource, TensorSource, harvest_to_store
from clipsteer.sae.evaluate import evaluate_sae, feature_statistics, steerability, top_images
from clipsteer.sae.pairs import PairSource, paired
from clipsteer.sae.trainer import SAETrainer

D, D_OUT, N, K, PREFIXES = plain.D, plain.D_OUT, plain.N, plain.K, plain.PREFIXES
SKIPS = [False, True]


def make(architecture="topk", seed=0, **more):
    return plain.make(architecture, seed, **{"d_out": D_OUT, **more})


@given(
    st.sampled_from(plain.ARCHITECTURES),
    st.sampled_from(["none", "layer_norm", "constant_norm"]),
    st.sampled_from([None, PREFIXES]),
    st.booleans(),
    st.sampled_from([1, D_OUT, D]),
    st.integers(0, 9),
)
def test_outputs_and_all_gradients_are_the_dense_formula(architecture, normalize, sizes, skip, d_out, seed):
    sae = make(architecture, seed, normalize=normalize, matryoshka=sizes, skip=skip, d_out=d_out)
    x = plain.rows(8, seed=seed).requires_grad_()
    weights = torch.randn(8, d_out, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    out = sae(x)
    assert (out.stats.mean, out.stats.scale) == (None, None)
    (out.x_hat * weights).sum().backward()
    p = {name: value.detach().clone().requires_grad_() for name, value in sae.named_parameters()}
    again = x.detach().clone().requires_grad_()
    wanted = plain.outputs(sae, p, again)[0][-1]
    torch.testing.assert_close(out.x_hat, wanted, rtol=1e-11, atol=1e-12)
    (wanted * weights).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-9, atol=1e-10)
    for name, value in sae.named_parameters():
        if name != "threshold":
            torch.testing.assert_close(value.grad, p[name].grad, rtol=1e-9, atol=1e-10)
    # decode is the part without the skip connection
    codes = out.acts if out.indices is None else (out.acts, out.indices)
    beside = x @ sae.W_skip.T if skip else 0
    torch.testing.assert_close(sae.decode(codes, out.stats) + beside, out.x_hat, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sparse", [True, False], ids=["row-sparse", "dense"])
@pytest.mark.parametrize("dead", [[], [0, 5, 30]], ids=["alive", "dead"])
@pytest.mark.parametrize("penalty", ["step", "tanh"])
@pytest.mark.parametrize("architecture", plain.ARCHITECTURES)
def test_a_steps_loss_and_gradients_are_the_dense_formula(architecture, penalty, dead, sparse, monkeypatch):
    if not sparse:
        monkeypatch.setenv("CLIPSTEER_BACKEND", "reference")
    sae, x = make(architecture, matryoshka=PREFIXES, skip=True), plain.rows(32)
    y = plain.targets(x)
    config = plain.config(dead_after=100, l0_coefficient=0.01, l1_coefficient=0.01, l0_penalty=penalty)
    wanted, fvus, grads = plain.gradients(sae, x, y, config, dead)
    trainer = SAETrainer(sae, config, 12)
    assert trainer._sparse == sparse
    trainer.tokens_since_fired[dead] = 1000
    got, found = plain.stepped(trainer, x, y)
    assert got["loss"] == pytest.approx(wanted, rel=1e-6)
    assert [got["fvu_3"], got["fvu_11"], got["fvu"]] == pytest.approx(fvus, rel=1e-6)
    assert got["auxk"] > 0 or not dead
    for name in dict(sae.named_parameters()):
        torch.testing.assert_close(found[name], grads[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("architecture", [*plain.ARCHITECTURES, "gated"])
def test_the_row_sparse_path_trains_as_dense_gradients_of_the_reference_do(architecture, skip, monkeypatch):
    ends = []
    for backend in ("auto", "reference"):
        monkeypatch.setenv("CLIPSTEER_BACKEND", backend)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sae = SAE(D, N, architecture, K, d_out=D_OUT, skip=skip, dtype=torch.float64)
        x = plain.rows(32)
        sae.init_threshold_(x, K)
        config = plain.config(dead_after=60, sync_every=2, grad_clip=0.3, l1_coefficient=0.01)
        trainer = SAETrainer(sae, config, 12)
        trainer.tokens_since_fired[25:] = 1000
        for step in range(8):
            x = plain.rows(32, seed=step)
            trainer.step(x, plain.targets(x))
        ends.append(sae.state_dict())
        # rows of the decoder are free
        assert float((sae.W_dec.detach().norm(dim=1) - 1).abs().min()) > 1e-3
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("architecture", [*plain.ARCHITECTURES, "gated"])
def test_training_lowers_the_fvu_of_the_target_and_resumes_bit_for_bit(architecture, skip, tmp_path):
    x = plain.rows(200)
    y = plain.targets(x)
    config = plain.config(
        architecture=architecture, skip=skip, steps=60, dead_after=60, sync_every=3, lr=1e-2, checkpoint_every=20,
    )  # fmt: skip
    log = []
    whole = train_sae(x, config, target=y, device="cpu", on_log=log.append)
    assert (whole.d_in, whole.d_out, whole.apply_b_dec_to_input) == (D, D_OUT, False)
    assert log[-1]["fvu"] < 0.7 * log[0]["fvu"]

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 30:
            raise Stop

    with pytest.raises(Stop):
        train_sae(x, config, target=y, device="cpu", out=tmp_path, on_log=stop)
    resumed = train_sae(x, config, target=y, device="cpu", out=tmp_path)
    loaded = SAE.from_pretrained(tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert loaded.config == whole.config
    # another target is another run
    with pytest.raises(ValueError, match="other"):
        train_sae(x, config, target=y + 1, device="cpu", out=tmp_path)
    # and so is none
    with pytest.raises(ValueError, match="d_out"):
        train_sae(x, config, skip=False, device="cpu", out=tmp_path)


def test_a_transcoder_starts_at_the_median_of_its_target():
    """Paulo et al. 2025: decoder and skip connection are 0 at first."""
    x = plain.rows(200)
    y = plain.targets(x)
    sae = train_sae(x, plain.config(lr=0.0, skip=True, steps=1), target=y, device="cpu")
    assert not bool(sae.W_dec.any())
    assert not bool(sae.W_skip.any())
    batch = next(paired(x, y).batches(32)).rows[:, D:]
    distance = (batch - sae.b_dec).norm(dim=1, keepdim=True)
    # the sum of unit vectors vanishes at the geometric median
    assert float(((batch - sae.b_dec) / distance).sum(0).norm().detach()) < 1e-4
    assert float(sae.W_enc.abs().max()) <= D**-0.5


def test_a_transcoder_is_trained_on_in_place():
    x = plain.rows(100)
    sae = make(skip=True)
    before = sae.W_skip.detach().clone()
    assert train_sae(x, sae, target=plain.targets(x), config=plain.config(d_sae=None, steps=3)) is sae
    assert not torch.equal(before, sae.W_skip)
    for target, given_sae, message in (
        (None, make(), r"d_out = 7, the target has None"),
        (plain.targets(x, 3), make(), r"d_out = 7, the target has 3"),
        (plain.targets(x), plain.make(), r"d_out = None, the target has 7"),
    ):
        with pytest.raises(ValueError, match=message):
            train_sae(x, given_sae, target=target, config=plain.config(d_sae=None, steps=3))
    with pytest.raises(ValueError, match="a target is needed"):
        SAETrainer(make(), plain.config(), 3).step(x)
    with pytest.raises(ValueError, match="skip needs d_out"):
        train_sae(x, plain.config(skip=True), device="cpu")


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"d_out": 0}, ValueError, "d_out must be at least 1"),
        ({"d_out": 2.0}, TypeError, "d_out must be an int or None"),
        ({"d_out": True}, TypeError, "d_out must be an int or None"),
        ({"skip": True}, ValueError, "skip needs d_out"),
        ({"d_out": 3, "skip": 1}, TypeError, "skip must be a bool"),
        ({"d_out": 3, "apply_b_dec_to_input": True}, ValueError, "apply_b_dec_to_input must be False with d_out"),
        ({"apply_b_dec_to_input": "no"}, TypeError, "apply_b_dec_to_input must be a bool or None"),
    ],
)
def test_what_is_no_transcoder_is_refused(more, error, message, tmp_path):
    with pytest.raises(error, match=message):
        SAE(D, N, "topk", K, **more)
    (make() if "d_out" in more else plain.make()).save_pretrained(tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    with pytest.raises(FileFormatError):
        SAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("architecture", [*plain.ARCHITECTURES, "gated"])
def test_files_keep_a_transcoder(architecture, tmp_path):
    with torch.random.fork_rng():
        sae = SAE(D, N, architecture, K, d_out=D_OUT, skip=True, dtype=torch.float64).eval()
        for parameter in sae.parameters():
            torch.nn.init.normal_(parameter)
    sae.save_pretrained(tmp_path)
    loaded = SAE.from_pretrained(tmp_path)
    assert (loaded.d_out, loaded.skip, loaded.config) == (D_OUT, True, sae.config)
    assert torch.equal(loaded(plain.rows()).x_hat, sae(plain.rows()).x_hat)
    path = tmp_path / "cfg.json"
    cfg = json.loads(path.read_text())
    for change, message in (({"d_out": 3}, "W_dec must be"), ({"skip": False}, "this architecture has no 'W_skip'")):
        path.write_text(json.dumps({**cfg, **change}))
        with pytest.raises(FileFormatError, match=message):
            SAE.from_pretrained(tmp_path)


# ---------------------------------------------------------------- pairs


def numbered(count=50, first=0):
    """Rows that tell which they are, and targets that do."""
    number = torch.arange(first, first + count, dtype=torch.float64)[:, None]
    return number * torch.ones(3, dtype=torch.float64), -number * torch.ones(2, dtype=torch.float64)


def assert_paired(source, batches, size=8, **more):
    assert (source.d_in, source.d_out) == (3, 2)
    seen = []
    for batch in itertools.islice(source.batches(size, **more), batches):
        x, y = batch.rows[:, :3], batch.rows[:, 3:]
        assert torch.equal(x[:, :2], -y)
        seen += x[:, 0].tolist()
    return seen


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_rows_and_targets_stay_together(rank, world):
    x, y = numbered()
    seen = assert_paired(paired(x, y), 12, seed=3, rank=rank, world=world)
    assert seen[: 48 // world] != sorted(seen[: 48 // world])
    # in another dtype, and from any position
    source = paired(x.half(), y)
    assert assert_paired(source, 4, seed=3) == assert_paired(paired(x, y), 6, seed=3)[:32]
    later = next(itertools.islice(paired(x, y).batches(8, seed=3), 3, None))
    again = next(paired(x, y).batches(8, seed=3, start=later.next))
    assert torch.equal(again.rows, next(itertools.islice(paired(x, y).batches(8, seed=3), 4, None)).rows)


def test_iterables_of_pairs_and_pairs_of_iterables():
    x, y = numbered()
    parts, targets = list(x.split(7)), list(y.split(7))
    in_order = assert_paired(paired(parts, targets), 9)
    assert in_order == [i % 50 for i in range(72)]
    pairs = list(zip(parts, targets))
    assert assert_paired(paired(pairs, None), 9) == in_order
    assert assert_paired(paired((pair for pair in pairs), None), 6) == in_order[:48]
    assert assert_paired(paired(iter(parts), targets), 6) == in_order[:48]
    assert paired(parts, targets).identity() == paired(pairs, None).identity()
    assert paired(parts, targets).identity() != paired(parts, [-part for part in targets]).identity()
    log = []
    config = {"d_sae": 6, "k": 2, "batch_size": 8, "steps": 2, "warmup_steps": 1, "device": "cpu"}
    for activations, target in ((parts, targets), (pairs, None)):
        log.append(train_sae([*activations], target=target, **config).state_dict())
    assert all(torch.equal(value, log[1][name]) for name, value in log[0].items())


def test_what_does_not_go_together_is_refused(tmp_path):
    x, y = numbered()
    parts = list(x.split(7))
    for activations, target, error, message in (
        (x, y[:-1], ValueError, "same rows in the same order: rows: 50 there, 49 given"),
        (x, parts, ValueError, "TensorSource and IterableSource have each an order of their own"),
        (parts, [y[:6], *y[7:].split(7)], ValueError, r"of the same rows, got \(7, 3\) and \(6, 2\)"),
        (parts, list(y.split(7))[:-1], ValueError, "target ends before the other does"),
        (parts[:-1], list(y.split(7)), ValueError, "activations ends before the other does"),
        (paired(x, y), y, ValueError, "pairs already"),
        ([(x, y, y)], None, TypeError, "or of pairs"),
        ([(x, torch.arange(50))], None, TypeError, "or of pairs"),
        ([[x]], None, TypeError, "or of pairs"),
        ([(x, y[:, 0])], None, ValueError, "must be of the same rows"),
        (x, 3, TypeError, "expected a tensor"),
    ):
        with pytest.raises(error, match=message):
            next(itertools.islice(paired(activations, target).batches(50), 1, None))
    for later in (x[:, :2], (x, y)):
        with pytest.raises(ValueError, match=r"had width \[3\], a later one"):
            next(paired([x[:4], later], None).batches(50))


class Pictures:
    classes = ["cat", "dog", "owl"]

    def __init__(self, n=11):
        self.images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index % 3


def tokenize(texts):
    return torch.tensor([[1 + ord(c) % 60 for c in text[:7].ljust(7)] + [63] for text in texts])


@pytest.fixture(scope="module")
def model():
    open_clip = pytest.importorskip("open_clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {"image_size": 32, "layers": 3, "width": 24, "head_width": 12, "patch_size": 8}
        text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
        module = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).double().eval()
    return clip.CLIP(module, lambda image: image, tokenize, "tiny", None)


IN, OUT = "visual.transformer.resblocks.1.ln_2", "visual.transformer.resblocks.1.mlp"


@torch.no_grad()
def tokens_at(model, images):
    with capture(model, [IN, OUT]) as found:
        model.model.encode_image(images)
    return found[IN], found[OUT]


@pytest.mark.parametrize("tokens", ["all", "patches"])
def test_a_harvest_of_two_hook_points_is_one_pass_and_two_stores_the_same_rows(model, tokens, tmp_path):
    data = Pictures()
    seen = []
    handle = model.model.visual.register_forward_hook(lambda *_: seen.append(1))
    source = HarvestSource(
        model, data, IN, target_hook_point=OUT, tokens=tokens, images_per_group=4, batch_size=16,
    )  # fmt: skip
    passes = len(seen)
    rows = source.load_group(0, 0, 0)
    assert len(seen) == passes + 1
    handle.remove()
    apart = [HarvestSource(model, data, name, tokens=tokens, images_per_group=4) for name in (IN, OUT)]
    both = PairSource(*apart)
    assert torch.equal(rows, torch.cat([one.load_group(0, 0, 0) for one in apart], 1))
    assert source.provenance == both.provenance
    assert (source.provenance["hook_point"], source.provenance["target_hook_point"]) == (IN, OUT)
    for one, other in zip(source.batches(9, seed=1), itertools.islice(both.batches(9, seed=1), 30)):
        assert torch.equal(one.rows, other.rows)
        assert one.next == other.next
    stores = [
        harvest_to_store(model, data, name, tmp_path / name, tokens=tokens, dtype="float32", shard_rows=40)
        for name in (IN, OUT)
    ]
    x, y = tokens_at(model, data.images)
    where = slice(1, None) if tokens == "patches" else slice(None)
    wanted = {
        tuple(a.float().tolist()): b.float() for a, b in zip(x[:, where].flatten(0, 1), y[:, where].flatten(0, 1))
    }
    source = paired(*stores)
    per_epoch = len(stores[0])
    served = torch.cat([b.rows for b in itertools.islice(source.batches(1, seed=1), per_epoch)])
    assert len({tuple(row.tolist()) for row in served[:, :24]}) == per_epoch
    for row in served:
        torch.testing.assert_close(row[24:], wanted[tuple(row[:24].tolist())], rtol=1e-5, atol=1e-6)
    assert served[:, 0].tolist() != torch.cat([stores[0].read_shard(i) for i in range(3)])[:, 0].tolist()


def test_stores_of_other_rows_are_refused(model, tmp_path):
    data = Pictures()

    def store(name, hook_point=OUT, images=data, buffer_shards=4, **more):
        more = {"shard_rows": 40, "dtype": "float32", **more}
        harvest_to_store(model, images, hook_point, tmp_path / name, **more)
        return ActivationStore(tmp_path / name, buffer_shards=buffer_shards)

    source = store("source", IN)
    assert paired(source, store("target")).d_out == 24
    other = Pictures()
    other.images = other.images + 1
    for target, message in (
        (store("other", images=other), "images of the target are others"),
        (store("fewer", images=Pictures(10)), "rows"),
        (store("larger", shard_rows=80), "shards|shard-000000"),
        (store("target", buffer_shards=1), "buffer_shards: 4 there, 1 given"),
        (store("patches", tokens="patches"), "rows|tokens"),
        (TensorSource(torch.zeros(len(source), 4)), "ActivationStore and TensorSource"),
    ):
        with pytest.raises(ValueError, match=message):
            paired(source, target)


# ---------------------------------------------------------------- at its place in a model


@pytest.fixture(scope="module")
def fitted(model):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sae = SAE(24, 50, "topk", 5, d_out=24, skip=True, matryoshka=(10, 50), dtype=torch.float64)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.normal_(0, 0.1)
    sae.metadata.update(hook_point=IN, target_hook_point=OUT)
    return sae.eval()


@torch.no_grad()
def predict(model, images, edit=None):
    if edit is None:
        features = model.model.encode_image(images)
    else:
        with apply_at(model, {OUT: edit}):
            features = model.model.encode_image(images)
    return (features / features.norm(dim=-1, keepdim=True)).numpy()


@pytest.mark.parametrize("tokens", ["all", "patches"])
def test_evaluation_replaces_what_the_transcoder_stands_for(model, fitted, tokens):
    data = Pictures()
    got = evaluate_sae(fitted, model, data, tokens=tokens, templates=["a {}"], batch_size=3)
    x, y = tokens_at(model, data.images)
    where = slice(1, None) if tokens == "patches" else slice(None)
    p = dict(fitted.named_parameters())
    kept, target = x[:, where].flatten(0, 1), y[:, where].flatten(0, 1)
    # top-k by the tests' own constants: 5 features a row
    pre = kept @ p["W_enc"].T + p["b_enc"]
    acts = torch.relu(pre) * (pre >= pre.topk(5, 1).values[:, -1:])
    beside = p["b_dec"] + kept @ p["W_skip"].T
    short, whole = (acts[:, :n] @ p["W_dec"][:n] + beside for n in (10, 50))
    variance = (target - target.mean(0)).square().sum()
    for name, y_hat in (("fvu_10", short), ("fvu", whole)):
        assert got[name] == pytest.approx(float(((y_hat - target).square().sum() / variance).detach()), rel=1e-9)
    assert (got["hook_point"], got["target_hook_point"]) == (IN, OUT)
    assert got["l0"] == pytest.approx(float((acts > 0).sum()) / len(kept))
    head = clip.zero_shot_head(model, data.classes, ["a {}"]).numpy()
    y_hat = whole.detach().reshape(len(data), -1, 24)
    rest = y[:, :1] if tokens == "patches" else y[:, :0]
    new = {"clean": None, "sae": torch.cat([rest, y_hat], 1), "zero": torch.cat([rest, torch.zeros_like(y_hat)], 1)}
    for name, output in new.items():
        logits = 100 * predict(model, data.images, None if output is None else lambda _, o=output: o) @ head.T
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        ce = -np.mean([log_p[i, i % 3] for i in range(len(data))])
        assert got[f"ce_{name}"] == pytest.approx(ce, rel=1e-6), name


def test_features_are_of_the_input_and_steer_at_the_target(model, fitted):
    data = Pictures()
    frequency = feature_statistics(fitted, model, data).frequency
    x, y = tokens_at(model, data.images)
    acts = fitted.encode(x.flatten(0, 1))
    np.testing.assert_allclose(frequency, (acts > 0).double().mean(0).numpy(), rtol=1e-12)
    feature = int(frequency.argmax())
    top = top_images(fitted, model, data, [feature], count=2)
    per_image = acts[:, feature].reshape(len(data), -1).amax(1)
    torch.testing.assert_close(top.activations[0], per_image.topk(2).values)
    got = steerability(fitted, model, data, data.classes, strength=4.0, features=[feature], templates=["a {}"])
    head = clip.zero_shot_head(model, data.classes, ["a {}"]).numpy()
    moved = y + (4.0 - acts[:, feature].reshape(len(data), -1, 1)) * fitted.W_dec[feature].detach()

    def softmax(logits):
        e = np.exp(logits - logits.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    after, before = (softmax(100 * predict(model, data.images, edit) @ head.T) for edit in (lambda _: moved, None))
    np.testing.assert_allclose(got.change[0].numpy(), (after - before).mean(0), rtol=0, atol=1e-9)
    assert float(got.change.abs().max()) > 1e-6


def test_what_a_transcoder_cannot_do_is_said(model, fitted, tmp_path):
    with pytest.raises(ValueError, match="a transcoder reads at one hook point and writes at another"):
        SAESteering(fitted, {1: 2.0})
    data = Pictures()
    with pytest.raises(ValueError, match=r"target_hook_point: 'visual\.\*' must name one module"):
        evaluate_sae(fitted, model, data, target_hook_point="visual.*")
    with pytest.raises(ValueError, match="the SAE has d_out = 24, but the activations at"):
        evaluate_sae(fitted, model, data, target_hook_point=OUT + ".c_fc")
    with pytest.raises(ValueError, match="no transcoder"):
        evaluate_sae(SAE(24, 50, k=5).double(), model, data, hook_point=IN, target_hook_point=OUT)
    without = SAE(24, 50, k=5, d_out=24, dtype=torch.float64)
    with pytest.raises(ValueError, match="target_hook_point: the SAE's metadata do not name one"):
        evaluate_sae(without, model, data, hook_point=IN)


def test_the_command_line_trains_and_measures_a_transcoder(tmp_path, capsys):
    sites = [f"visual.transformer.resblocks.3.{name}" for name in ("ln_2", "mlp")]
    options = ["--hook-point", sites[0], "--target-hook-point", sites[1], "--skip", "--expansion", "2", "--k", "16"]
    options += ["--steps", "60", "--warmup-steps", "5", "--lr", "3e-3", "--batch-size", "512", "--log-every", "1"]
    options += ["--data", drawings(tmp_path / "drawings"), "--device", "cpu"]
    ends = []
    for name, more in (("run", []), ("stored", ["--store", tmp_path / "acts"])):
        code, _, err = run(capsys, "sae", "train", "--out", tmp_path / name, *options, *more)
        assert code == 0, err
        records = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert records[-1]["fvu"] < 0.5 * records[0]["fvu"]
        ends.append(SAE.from_pretrained(tmp_path / name))
    assert (tmp_path / "acts" / "target" / "store.json").is_file()
    for sae in ends:
        assert (sae.d_out, sae.skip) == (192, True)
        assert [sae.metadata[name] for name in ("hook_point", "target_hook_point")] == sites
    figures = tmp_path / "figures.json"
    call = ("sae", "eval", tmp_path / "run", "--data", tmp_path / "drawings", "--out", figures, "--device", "cpu")
    code, shown, err = run(capsys, *call)
    assert code == 0, err
    found = json.loads(figures.read_text())
    assert found["target_hook_point"] == sites[1]
    assert f"{'fvu':<16} {found['fvu']:.6g}" in shown
    assert 0 < found["fvu"] < 0.5
    # the model hardly misses the module that was replaced
    assert abs(found["ce_sae"] - found["ce_clean"]) < abs(found["ce_zero"] - found["ce_clean"])
    code, _, err = run(capsys, "sae", "steer", tmp_path / "run", "--feature", "1=5", "--device", "cpu")
    assert code != 0
    assert "a transcoder reads at one hook point" in err
    code, _, err = run(capsys, "sae", "train", "--out", tmp_path / "no", "--skip", *options[-2:], *options[-4:-2])
    assert code != 0
    assert "skip needs d_out" in err
