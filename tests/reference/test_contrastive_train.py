from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from _command import in_processes
from _night import day_and_night
from clipsteer import clip as clip_module
from clipsteer.data.files import captions, image_folder
from clipsteer.io.files import FileFormatError, read_safetensors, write_json
from clipsteer.reference import evaluate as contrastive_eval
from clipsteer.reference import features as reference_features
from clipsteer.reference import trainer
from clipsteer.reference.config import LOSSES
from clipsteer.reference.evaluate import evaluate
from clipsteer.reference.pairs import Pairs
from clipsteer.reference.train import ContrastiveConfig, train_contrastive
from clipsteer.training.world import World

COLOURS = {"red": (210, 30, 20), "blue": (20, 40, 200), "green": (30, 180, 40), "grey": (128, 128, 128)}
SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
# gamma_min: from the second epoch on denominators are averages
FAST = {"batch_size": 6, "epochs": 2, "lr": 1e-3, "log_every": 1, "temperature": 0.1, "gamma_min": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures of four colours, a table of them, a folder for each colour, and a small architecture."""
    root, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    lines = ["image,caption"]
    for name, colour in COLOURS.items():
        (root / "classes" / name).mkdir(parents=True)
        for i in range(3):
            place = f"classes/{name}/{i}.png"
            noise = 40 * random.standard_normal((40, 48, 1))
            pixels = np.clip(np.array(colour) + 9 * i + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / place)
            lines.append(f"{place},a {name} thing number {i}")
    (root / "pairs.csv").write_text("\n".join(lines))
    write_json(root / "clipsteer-test-small.json", SMALL)
    return root


@pytest.fixture
def data(folder):
    return captions(folder / "pairs.csv")


@pytest.fixture
def fresh(folder):
    def make(dtype=None, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return clip_module.load(str(folder / "clipsteer-test-small.json"), dtype=dtype)

    return make


def state(clip) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in clip.model.state_dict().items()}


def assert_same(a, b) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_and_leaves_a_model_that_loads(loss, fresh, data, folder, tmp_path):
    clip, reference, lines = fresh(), None, []
    if loss in ("drrho", "distill"):
        # a reference that knows every pair
        reference = reference_features.ReferenceFeatures(torch.eye(12), torch.eye(12), "knows", "", "")
    config = ContrastiveConfig(
        **{**FAST, "batch_size": 12, "epochs": 100, "lr": 2e-3, "crop": 1.0, "evaluate_every": 100}, loss=loss
    )
    start = evaluate(clip, data)
    images = image_folder(folder / "classes")
    train_contrastive(
        clip, data, config, reference=reference, out=tmp_path, validation={"pairs": data, "classes": images},
        templates=("a {} thing number 1",), on_log=lines.append,
    )  # fmt: skip
    assert start["image_to_text_r1"] < 0.5
    assert lines[-1]["pairs/image_to_text_r1"] == evaluate(clip, data)["image_to_text_r1"] > 0.9
    assert lines[-1]["pairs/text_to_image_r1"] > 0.9
    assert lines[-1]["classes/zero_shot"] > 0.9
    assert lines[-1]["samples"] == 100 * 12
    assert all(0 < line["loss_share"] < 1 for line in lines)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == lines
    again = reference_features.load_run(tmp_path)
    assert_same(state(again), state(clip))
    assert float(again.model.logit_scale.detach().exp()) == pytest.approx(1 / lines[-1]["temperature"])
    assert (lines[-1]["temperature"] == pytest.approx(0.1)) == (loss in ("drrho", "global"))
    # a model without a place for it: the bias is beside the weights
    kept = json.loads((tmp_path / "config.json").read_text()).get("logit_bias")
    assert kept == lines[-1].get("logit_bias")
    assert (kept is not None) == (loss == "siglip")


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_of_a_batch_give_the_step_of_the_whole(loss, fresh, data):
    """In double precision: two steps of 12 pairs, whole and in parts of 5, 5 and 2."""
    teacher = clip_module.load()
    reference = reference_features.compute(teacher, data) if loss in ("drrho", "distill") else None
    found = []
    for micro in (None, 5):
        clip, lines = fresh(torch.float64), []
        config = ContrastiveConfig(
            **{**FAST, "batch_size": 12},
            loss=loss,
            micro_batch=micro,
            learnable_temperature=True,
            rho=1.0,
            grad_clip=9.0,
        )
        train_contrastive(clip, data, config, reference=reference, on_log=lines.append)
        found.append((state(clip), lines))
    (whole, log), (parts, log_of_parts) = found
    assert log_of_parts[-1]["loss"] == pytest.approx(log[-1]["loss"], rel=1e-6)  # τ is kept in float32
    assert log[-1]["temperature"] != pytest.approx(0.1, rel=1e-6)
    start = state(fresh(torch.float64))
    moved = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert len(moved) > 20
    for name in whole:
        # Adam's first steps are near lr·sign(g): where |g| is at the level of rounding they may differ by 2·lr
        off = (whole[name] - parts[name]).abs() > 1e-6
        assert float(off.double().mean()) < 1e-3, name


def test_the_reference_sees_the_crops_that_the_model_sees(fresh, data):
    """The model as its own reference: s = r, so every d is 0 and the loss is τ·log(ε + (B-1)/B), whatever the crop."""
    lines = []
    config = ContrastiveConfig(**{**FAST, "epochs": 1}, crop=0.3)
    train_contrastive(fresh(), data, config, reference=fresh(), on_log=lines.append)
    assert lines[0]["loss"] == pytest.approx(0.1 * math.log(5 / 6), abs=1e-5)
    assert lines[1]["loss"] != pytest.approx(0.1 * math.log(5 / 6), abs=1e-5)
    # kept features are of whole images: the same without crops, another thing with them
    for crop, equal in ((1.0, True), (0.3, False)):
        lines.clear()
        kept = reference_features.compute(fresh(), data)
        config = ContrastiveConfig(**{**FAST, "epochs": 1}, crop=crop)
        train_contrastive(fresh(), data, config, reference=kept, on_log=lines.append)
        assert (lines[0]["loss"] == pytest.approx(0.1 * math.log(5 / 6), abs=1e-5)) == equal


def test_a_reference_that_knows_nothing_is_no_reference(fresh, data):
    constant = torch.ones(12, 3) / math.sqrt(3)
    nothing = reference_features.ReferenceFeatures(constant, constant, "nothing", "", "")
    # in double precision: Adam makes a step of a gradient that is rounding alone and not far below its eps
    one, two = fresh(torch.float64), fresh(torch.float64)
    train_contrastive(one, data, ContrastiveConfig(**FAST), reference=nothing)
    train_contrastive(two, data, ContrastiveConfig(**FAST, loss="global"))
    for a, b in zip(state(one).values(), state(two).values()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_siglip_learns_its_bias_and_goes_on_with_it(fresh, data, folder, tmp_path):
    """From open_clip's 1/τ = 10 and b = -10, without weight decay; a stopped run ends where one that was not does."""
    config = ContrastiveConfig(**{**FAST, "temperature": None}, loss="siglip", checkpoint_every=2)
    run = trainer.ContrastiveRun(fresh(), data, config, None, None, {}, None, 0, World("cpu"))
    assert [float(p.detach()) for p in run.loss.parameters()] == pytest.approx([math.log(10), -10])
    places = [[p is run.loss.logit_bias for p in group["params"]] for group in run.optimizer.param_groups]
    assert [any(group) for group in places] == [False, False, True]
    assert run.optimizer.param_groups[2]["weight_decay"] == 0
    write_json(folder / "clipsteer-test-sigmoid.json", {**SMALL, "init_logit_bias": -7.0})
    lines = []

    def start(**more):
        torch.manual_seed(0)
        clip = clip_module.load(str(folder / "clipsteer-test-sigmoid.json"))
        return train_contrastive(clip, data, config, **more)

    def stop(line):
        if line["step"] == 3:
            raise KeyError("stopped")

    whole = start(on_log=lines.append)
    biases = [line["logit_bias"] for line in lines]
    assert all(later > before for before, later in zip([-10.0, *biases], biases))
    with pytest.raises(KeyError, match="stopped"):
        start(out=tmp_path, on_log=stop)
    assert not (tmp_path / "model.safetensors").exists()
    kept = tmp_path / "checkpoints" / "step-0000000002.safetensors"
    assert float(read_safetensors(kept)["loss.logit_bias"]) == biases[1]
    assert_same(state(start(out=tmp_path)), state(whole))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["logit_bias"] for line in log] == biases
    loaded = reference_features.load_run(tmp_path)
    assert float(loaded.model.logit_bias.detach()) == biases[-1]


def test_a_run_from_before_the_bias_was_a_setting_goes_on(fresh, data, tmp_path, monkeypatch):
    before = lambda config: {k: v for k, v in dataclasses.asdict(config).items() if k != "logit_bias"}
    config = ContrastiveConfig(**FAST, loss="clip", checkpoint_every=1)
    monkeypatch.setattr(trainer, "asdict", before)
    monkeypatch.setattr(ContrastiveConfig, "resolved_bias", None)
    whole = state(train_contrastive(fresh(), data, config, out=tmp_path))
    meta = tmp_path / "checkpoints" / "step-0000000004.json"
    found = json.loads(meta.read_text())
    assert found["meta"]["settings"].pop("logit_bias", "none") is None
    meta.write_text(json.dumps(found))
    monkeypatch.undo()
    assert_same(state(train_contrastive(fresh(), data, config, out=tmp_path)), whole)


@pytest.mark.parametrize(("loss", "tau", "share"), [("global", 0.1, 1 / 4), ("global", 0.02, 1 / 12), ("clip", 0.1, 1)])
def test_the_temperature_has_its_own_rate(loss, tau, share, fresh, data):
    """AdamW's first step is rate times sign: FastCLIP's for τ is a quarter of the model's, a twelfth from 0.03 on."""
    lines = []
    config = ContrastiveConfig(**{**FAST, "temperature": tau}, loss=loss, learnable_temperature=True, rho=9.0)
    train_contrastive(fresh(), data, config, on_log=lines.append)
    assert abs(math.log(lines[0]["temperature"] / tau)) == pytest.approx(share * 1e-3, abs=4 * 2**-22)  # of log τ


def test_gamma_falls_over_the_epochs(fresh, data):
    """30 epochs: DRRho-CLIP's least γ is 4.177·30^-0.7265 = 0.352968, reached at the end; FastCLIP's 0.2 half way."""
    values = []
    for more in ({}, {"gamma_min": 0.2, "gamma_epochs": 15}, {"gamma_min": 1.0}):
        settings = {**FAST, "epochs": 30, "gamma_min": None, **more}
        config = ContrastiveConfig(**settings, loss="global")
        run = trainer.ContrastiveRun(fresh(), data, config, None, None, {}, None, 0, World("cpu"))
        assert (run.total, run.order.per_epoch) == (60, 2)
        values.append([run._gamma(epoch) for epoch in (0, 5, 10, 15, 20, 29)])
    # by the cosines of 0, π/6, π/3, π/2, 2π/3 and 29π/30
    assert values[0] == pytest.approx([1, 0.956657, 0.838242, 0.676484, 0.514726, 0.354741], abs=1e-6)
    assert values[1] == pytest.approx([1, 0.8, 0.4, 0.2, 0.2, 0.2])
    assert values[2] == [1.0] * 6


def test_an_architecture_from_a_file_comes_with_the_run(fresh, data, folder, tmp_path, monkeypatch):
    """The file is named from where the run starts; the result is read, and another run resumed, from elsewhere."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "clipsteer-test-here.json").write_text(json.dumps(SMALL))
    config = ContrastiveConfig(**{**FAST, "epochs": 1}, loss="clip")
    monkeypatch.chdir(tmp_path / "start")
    torch.manual_seed(0)
    trained = train_contrastive(clip_module.load("clipsteer-test-here.json"), data, config, out=tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert_same(state(reference_features.load_run("moved")), state(trained))
    assert json.loads((tmp_path / "moved" / "architecture.json").read_text()) == SMALL
    torch.manual_seed(0)
    again = clip_module.load(str(tmp_path / "start" / "clipsteer-test-here.json"))
    train_contrastive(again, data, config, out=tmp_path / "moved")
    (tmp_path / "start" / "clipsteer-test-here.json").write_text(json.dumps({**SMALL, "quick_gelu": True}))
    torch.manual_seed(0)
    other = clip_module.load(str(tmp_path / "start" / "clipsteer-test-here.json"))
    with pytest.raises(ValueError, match=r"other settings \(model"):
        train_contrastive(other, data, config, out=tmp_path / "moved")


def test_bfloat16_computes_nearly_the_same(fresh, data):
    lines = []
    for bf16 in (False, True):
        config = ContrastiveConfig(**FAST, loss="global", bf16=bf16, micro_batch=4)
        train_contrastive(fresh(), data, config, on_log=lines.append)
    full, half = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert [a["loss"] for a in full] != [b["loss"] for b in half]
    # features are off by some 2⁻⁸, similarities too, and the loss is a mean of their differences
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(full, half)) < 4 * 2**-8


@pytest.mark.parametrize("loss", ["drrho", "clip"])
def test_a_folder_never_mixes_two_runs_and_workers_change_nothing(loss, fresh, data, tmp_path):
    reference = reference_features.compute(clip_module.load(), data)
    config = ContrastiveConfig(**FAST, loss=loss, checkpoint_every=2, select=0.5, micro_batch=4)
    whole = train_contrastive(fresh(), data, config, reference=reference, out=tmp_path)
    assert_same(state(whole), state(train_contrastive(fresh(), data, config, reference=reference, workers=2)))
    last = read_safetensors(tmp_path / "checkpoints" / "step-0000000004.safetensors")
    assert (last.get("loss.u") is not None) == (loss == "drrho")
    if loss == "drrho":
        # half of every batch was trained on, so some are remembered and some may not be
        assert 3 <= int((~last["loss.u"][0].isnan()).sum()) <= 12
    with pytest.raises(ValueError, match=r"other settings \(weights"):
        train_contrastive(fresh(seed=1), data, config, reference=reference, out=tmp_path)
    for other in (
        reference._replace(weights="another"),
        reference._replace(weights=""),
        reference._replace(weights="", text=reference.text.roll(1, 0)),
    ):
        with pytest.raises(ValueError, match=r"other settings \(reference"):
            train_contrastive(fresh(), data, config, reference=other, out=tmp_path)


WORKER = """
import gc, json, sys, torch
torch.set_num_threads(1)
from clipsteer import clip, contrastive_train, reference_features
from clipsteer.training.world import World
from clipsteer.io.files import write_safetensors
from clipsteer.data import captions, image_folder
root, out, settings = sys.argv[1:]
data, world = captions(root + "/pairs.csv"), World("cpu")
for name, more in json.loads(settings).items():
    torch.manual_seed(0)
    model = clip.load(f"{root}/clipsteer-test-{more.pop('architecture')}.json", dtype=torch.float64)
    reference = reference_features.read(out + "/reference.safetensors", data)
    config = contrastive_train.ContrastiveConfig(**more)
    contrastive_train.train_contrastive(
        model, data, config, reference=reference, out=f"{out}/{name}", templates=("a {} thing",),
        validation={"pairs": data, "classes": image_folder(root + "/classes")},
    )
teacher, kept = clip.load(dtype=torch.float64), out + "/cached.safetensors"
found = {}
for size in (1, 5, 128):  # twelve batches, three (5, 5, 2), one
    found[f"image {size}"] = reference_features.encode_dataset(teacher, data, batch_size=size, world=world)
    found[f"text {size}"] = reference_features.encode_texts(teacher, data.targets, size, world)
first = reference_features.cached(kept, teacher, data, world=world)
world.any(False)  # the file is there
reference_features.compute = None
again = reference_features.cached(kept, teacher, data, world=world)
assert torch.equal(first.image, again.image) and torch.equal(first.text, again.text)
write_safetensors(f"{out}/features-{world.rank}.safetensors", found | {"kept": first.image})
gc.collect()
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("sizes", day_and_night((1, 2), (1, 2, 3)), ids=str)
def test_two_and_three_processes_equal_one(folder, data, tmp_path, sizes):
    common = {**FAST, "checkpoint_every": 2, "architecture": "small"}
    cases = {loss: {**common, "loss": loss} for loss in LOSSES}
    for loss in ("distill", "drrho"):
        cases[f"{loss} in parts"] = {**cases[loss], "micro_batch": 2, "learnable_temperature": True, "rho": 1.0}
        # of three processes with two pairs each, some have none of the three pairs that are picked
        cases[f"{loss} selected"] = {**cases[loss], "select": 0.5}
    cases["clip selected in parts"] = {**cases["clip"], "select": 0.5, "micro_batch": 1}
    # batch norms see the pairs of their own process: these are not equal
    cases["batch norms"] = {**common, "loss": "clip", "architecture": "resnet", "lr": 0.02}
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": 16}
    write_json(folder / "clipsteer-test-resnet.json", {**SMALL, "vision_cfg": vision})
    reference_features.compute(clip_module.load(), data).save(tmp_path / "reference.safetensors")
    logs = {}
    for size in sizes:
        out = tmp_path / str(size)
        out.mkdir()
        (out / "reference.safetensors").write_bytes((tmp_path / "reference.safetensors").read_bytes())
        in_processes(WORKER, folder, out, json.dumps(cases), size=size)
        for name in cases:
            logs[size, name] = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
    features = {
        (size, rank): read_safetensors(tmp_path / str(size) / f"features-{rank}.safetensors")
        for size in sizes
        for rank in range(size)
    }
    for (size, _), found in features.items():
        # every process has what all have together
        assert_same(found, features[size, 0])
        for name, alone in reference_features_alone(data).items():
            # In double precision, so that what torch's products round, however they are divided, would have to grow
            # 2^29-fold to be seen beside float32: "kept" is rounded to it (2^-24), divided by its norm (as much again,
            # and what its sum and the quotient round) and the features are at most 1. Rows are further apart.
            torch.testing.assert_close(found[name].double(), alone.double(), rtol=0, atol=2.0**-21)
            apart = torch.pdist(alone.double())
            assert float(apart.min()) > 2.0**-12
    for size in sizes:
        clip = reference_features.load_run(tmp_path / str(size) / "batch norms")
        found, last = evaluate(clip, data), logs[size, "batch norms"][-1]
        assert found == {key: pytest.approx(last[f"pairs/{key}"], abs=1e-6) for key in found}
    assert cases.pop("batch norms")
    for size, name in ((size, name) for size in sizes[1:] for name in cases):
        assert [r["step"] for r in logs[size, name]] == [1, 2, 3, 4]
        for one, more in zip(logs[1, name], logs[size, name]):
            assert one.keys() == more.keys()
            measured = [key for key in one if "/" in key]
            assert len(measured) == (4 if one["step"] in (2, 4) else 0)
            for key in ("loss", "grad_norm", "temperature", *measured):
                assert more[key] == pytest.approx(one[key], rel=1e-6), (size, name, one["step"], key)
        ends = [
            read_safetensors(tmp_path / str(n) / name / "checkpoints/step-0000000004.safetensors") for n in (1, size)
        ]
        assert ends[0].keys() == ends[1].keys()
        assert ("loss.u" in ends[0]) == ("drrho" in name or name == "global")
        if "loss.u" in ends[0]:
            # of the selected some are not visited
            assert bool(ends[0]["loss.u"].isnan().any()) == ("selected" in name)
            torch.testing.assert_close(ends[1]["loss.u"], ends[0]["loss.u"], rtol=1e-6, atol=1e-6, equal_nan=True)


def reference_features_alone(data) -> dict[str, torch.Tensor]:
    teacher = clip_module.load(dtype=torch.float64)
    found = {"kept": reference_features._unit(reference_features.compute(teacher, data)).image}
    for size in (1, 5, 128):
        found[f"image {size}"] = reference_features.encode_dataset(teacher, data, batch_size=size)
        found[f"text {size}"] = reference_features.encode_texts(teacher, data.targets, size)
    return found


@pytest.mark.parametrize("select", [None, 0.75])
def test_a_part_draws_the_same_masks_when_it_is_seen_again(folder, data, monkeypatch, select):
    """With patch dropout the gradient is exact only where both passes over a part drop the same patches."""
    dropping = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "patch_size": 8, "patch_dropout": 0.5}}
    write_json(folder / "clipsteer-test-dropping.json", dropping)
    clip, seen, plain = (
        clip_module.load(str(folder / "clipsteer-test-dropping.json")),
        [],
        trainer.ContrastiveRun._features,
    )

    def features(self, *args):
        found = plain(self, *args)
        seen.append((torch.is_grad_enabled(), found[0].detach().clone()))
        return found

    monkeypatch.setattr(trainer.ContrastiveRun, "_features", features)
    reference = reference_features.ReferenceFeatures(torch.eye(12), torch.eye(12), "knows", "", "")
    config = ContrastiveConfig(**{**FAST, "batch_size": 12, "epochs": 1}, micro_batch=5, select=select)
    train_contrastive(clip, data, config, reference=reference)
    graphs = [x for graph, x in seen if graph]
    assert [len(x) for x in graphs] == ([5, 5, 2] if select is None else [5, 4])
    before = [x for graph, x in seen if not graph][-len(graphs) :]
    assert all(torch.equal(a, b) for a, b in zip(before, graphs))


def test_every_caption_of_an_image_is_right(folder, monkeypatch):
    """A perfect model on three captions an image, one that says the same of everything, and one that is broken."""
    rows = [f"classes/{name}/0.png,{name} {i}" for name in ("red", "blue", "grey") for i in range(3)]
    (folder / "three.csv").write_text("\n".join(["image,caption", *rows]))
    data = captions(folder / "three.csv")
    for table in (data, data.subset(range(9))):
        monkeypatch.setattr(contrastive_eval, "encode_dataset", lambda *_, **__: torch.eye(3).repeat_interleave(3, 0))
        monkeypatch.setattr(contrastive_eval, "encode_texts", lambda *_, **__: torch.eye(3).repeat_interleave(3, 0))
        assert evaluate(None, table) == dict.fromkeys(
            ("image_to_text_mrr", "image_to_text_r1", "text_to_image_r1"), 1.0
        )
    monkeypatch.setattr(contrastive_eval, "encode_dataset", lambda *_, **__: torch.ones(9, 3))
    monkeypatch.setattr(contrastive_eval, "encode_texts", lambda *_, **__: torch.ones(9, 3))
    # six others are as good
    assert evaluate(None, data)["image_to_text_mrr"] == pytest.approx(1 / 4)
    monkeypatch.setattr(contrastive_eval, "encode_dataset", lambda *_, **__: torch.full((9, 3), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        evaluate(None, data)


def test_evaluation_counts_equal_captions_as_right(fresh, folder, tmp_path):
    rows = [("classes/red/0.png", "a"), ("classes/red/0.png", "a"), ("classes/blue/0.png", "b")]
    table = folder / "twice.csv"
    table.write_text("\n".join(["image,caption", *(",".join(row) for row in rows)]))
    clip, data = fresh(), captions(table)
    found = evaluate(clip, data)
    images = clip.encode_images([data[i][0] for i in range(3)])
    with torch.no_grad():
        texts = torch.nn.functional.normalize(clip.model.encode_text(clip.tokenizer(["a", "b"])), dim=1)
    scores = (images @ texts.T).detach()[1:]  # the first image stands in two rows
    truth = torch.tensor([0, 1])
    assert found["image_to_text_r1"] == pytest.approx(float((scores.argmax(1) == truth).float().mean()))
    assert found["text_to_image_r1"] == pytest.approx(
        float((truth[scores.argmax(0)] == torch.arange(2)).float().mean())
    )


def test_crops_are_squares_of_the_image(data):
    seen = []
    model = clip_module.CLIP(None, lambda image: seen.append(image.size), lambda texts: texts, "none", None)
    pairs = Pairs(data, 0.3, model)
    assert pairs[4, 7][0] == 4
    assert pairs[4, 7][2] == "a blue thing number 1"
    for seed in range(20):
        pairs[0, seed]
    assert seen[0] == seen[1]
    assert len(set(seen)) > 5
    assert all(w == h <= 40 and (w + 0.5) ** 2 >= 0.3 * 40 * 40 for w, h in seen)


def test_mistakes(fresh, data):
    learnt = {"temperature": 0.005, "learnable_temperature": True}
    for bad in (
        {"loss": "all"}, {"epochs": 0}, {"lr": -1.0}, {"crop": 0.0}, {"select": 2.0}, {"micro_batch": 0},
        {"temperature": 0.0}, {"temperature": math.nan}, learnt, {"temperature": 0.005, "loss": "clip"}, {"rho": -1.0},
        {"gamma_min": 0.0}, {"gamma_min": 1.5}, {"weight_decay": -0.1}, {"grad_clip": 0.0}, {"grad_clip": math.inf},
        {"warmup_steps": -1}, {"distill": 1.5}, {"log_every": 0}, {"logit_bias": -10.0},
        {"logit_bias": math.nan, "loss": "siglip"}, {"temperature": 0.005, "loss": "siglip"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"ContrastiveConfig: {next(iter(bad))} must be"):
            ContrastiveConfig(**bad)
    # only a learnt temperature has a floor
    for loss in ("global", "clip"):
        config = ContrastiveConfig(loss=loss, temperature=0.005, learnable_temperature=False)
        assert config.make_loss(3, World("cpu")).temperature == pytest.approx(0.005)
    for loss, more in (("drrho", {}), ("distill", {}), ("clip", {"select": 0.5})):
        with pytest.raises(ValueError, match="need a reference"):
            train_contrastive(fresh(), data, ContrastiveConfig(**FAST, loss=loss, **more))
    few = reference_features.ReferenceFeatures(torch.eye(3), torch.eye(3), "few", "", "")
    other = reference_features.compute(fresh(), data)._replace(data="another data set's")
    for features, count in ((few, 3), (other, 12)):
        with pytest.raises(ValueError, match=f"are of {count} other pairs than these 12"):
            train_contrastive(fresh(), data, ContrastiveConfig(**FAST), reference=features)
    with pytest.raises(ValueError, match="at most the 12 pairs"):
        train_contrastive(fresh(), data, ContrastiveConfig(loss="clip", batch_size=13))
    broken = fresh()
    with torch.no_grad():
        broken.model.visual.proj.fill_(math.nan)
    with pytest.raises(RuntimeError, match="the loss is nan"):
        train_contrastive(broken, data, ContrastiveConfig(**FAST, loss="clip"), world=World("cpu"))
    assert not Path("checkpoints").exists()


def test_architectures_from_files(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        clip_module.load(str(tmp_path / "none.json"))
    (tmp_path / "other.json").write_text('{"width": 3}')
    with pytest.raises(FileFormatError, match="embed_dim"):
        clip_module.load(str(tmp_path / "other.json"))
    assert clip_module.load("emoji-tiny").model.visual.output_dim == 128
