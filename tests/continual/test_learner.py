"""The class-incremental learner: every strategy, what a task may touch, compensation, and resuming after SIGKILL."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _pytest.monkeypatch import MonkeyPatch

from _tiny import CLASSES, TASKS, encoder, images, scenario, seeded_run
from clipsteer import ops
from clipsteer.continual.covariance import precision_factor, shrink
from clipsteer.continual.drift import transport
from clipsteer.continual.experiment import run_all, run_tasks
from clipsteer.continual.learner import ClassIncrementalLearner
from clipsteer.continual.plasticity import Plasticity, fit_saes
from clipsteer.continual.strategies import ABLATION, STRATEGIES, CILConfig, strategy
from clipsteer.continual.task import TaskRun, patch_distillation

QUICK = {"first_epochs": 3, "epochs": 2, "batch_size": 8, "rank": 4, "projections": 64, "align_samples": 16}
# the tiny tower starts from random weights and learns little at the published rates
FAST = {**QUICK, "lr": 0.003}


def zero_shot() -> torch.Tensor:
    return F.normalize(torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(1)), dim=-1)


def plasticity() -> Plasticity:
    tower, x = encoder(), torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return Plasticity(fit_saes(tower.module, tower.blocks, [x], d_sae=32, k=4, steps=20))


def learn(spec: str, out: Path | None = None, tasks=TASKS, **settings) -> ClassIncrementalLearner:
    config = strategy(spec, **{**FAST, **settings})
    given = {"zero_shot": zero_shot(), "plasticity": plasticity() if config.plasticity else None}
    learner = ClassIncrementalLearner(encoder(), config, CLASSES, out=out, **given)
    if out is not None:
        learner.resume()
    where = scenario()
    for t, classes in enumerate(tasks):
        if t >= len(learner.tasks):
            learner.fit_task(where.train.subset(where.rows("train", t)), classes)
    return learner


def weights(learner: ClassIncrementalLearner) -> dict[str, torch.Tensor]:
    return {**learner.encoder.module.state_dict(), **(learner.heads.state_dict() if learner.heads else {})}


@pytest.mark.parametrize("spec", [*STRATEGIES, *(s for s in ABLATION if ":" in s), "finetune:softmax=seen"])
def test_every_strategy_learns_tasks_and_predicts_among_the_classes_seen(spec):
    where, last = scenario(), []
    given = {"zero_shot": zero_shot(), "plasticity": plasticity() if "plasticity" in spec else None}
    # heads that are neither aligned nor trained together forget more or less, as the seed has it: by a tenth
    config = strategy(spec, **FAST)
    seeds = (0, 1, 2) if config.classifier == "heads" and not (config.align or config.cumulative) else (config.seed,)
    for seed in seeds:
        run = run_tasks(where, encoder, strategy(spec, **FAST, seed=seed), **given)
        assert run.matrix.tril().isfinite().all()
        assert sorted(run.records) == [0, 1, 2]
        last.append(run.A_last)
    if spec != "zero_shot":  # its head is random here
        assert sum(last) / len(last) > 1 / 3, last  # twice chance


def test_a_frozen_tower_stays_as_it_is_and_training_changes_what_it_says_it_does():
    start = encoder().state_dict()
    for spec in ("ncm", "ranpac", "zero_shot"):
        after = learn(spec).encoder.state_dict()
        assert all(torch.equal(after[k], v) for k, v in start.items())
    lora = learn("finetune").encoder.module
    for name, value in start.items():
        if "in_proj_weight" not in name:
            assert torch.equal(dict(lora.named_parameters())[name.removeprefix("module.")], value), name
    full = learn("slca:slow=0.3").encoder.state_dict()
    assert sum(not torch.equal(full[k], v) for k, v in start.items()) > 20


def test_joint_training_uses_one_head_and_all_data():
    learner = learn("joint", tasks=[], first_epochs=12)
    learner.fit_task(images(0, 16), list(range(CLASSES)))
    assert learner.heads.sizes == [CLASSES]
    assert learner.evaluate(images(2, 8)) > 0.8


def test_compensation_is_semantic_drift_between_the_networks_around_the_task():
    where, learner = scenario(), learn("macil", tasks=TASKS[:1])
    rows = where.train.subset(where.rows("train", 1))
    old, means = learner.features(rows), learner.means.clone()
    learner.fit_task(rows, TASKS[1])
    new = learner.features(rows)
    assert not torch.equal(old, new)
    expected = ops.semantic_drift(old.double(), new.double(), means, "median", 1e-5)
    assert torch.equal(learner.means[:2], expected)
    assert torch.equal(learner.uncompensated[:2], means)
    truth = torch.stack([new[torch.tensor(rows.targets) == c].double().mean(0) for c in TASKS[1]])
    torch.testing.assert_close(learner.means[2:], truth, rtol=1e-12, atol=1e-12)


def test_drift_errors_are_those_of_the_means_and_zero_for_the_newest_task():
    where, learner = scenario(), learn("sdc")
    newest = learner.drift_errors(where.train.subset(where.rows("train", 2)))
    assert all(float(e.abs().max()) < 1e-6 for e in newest.values())
    old = where.train.subset(where.rows("train", 0))
    found, features = learner.drift_errors(old), F.normalize(learner.features(old), dim=-1).double()
    for row, c in enumerate(TASKS[0]):  # in the order of the tasks
        truth = features[torch.tensor(old.targets) == c].mean(0)
        assert found["compensated"][row] == pytest.approx(float((learner.means[row] - truth).norm() / truth.norm()))
        cosine = F.cosine_similarity(learner.uncompensated[row], truth, dim=0)
        assert found["cosine_uncompensated"][row] == pytest.approx(1 - float(cosine), abs=1e-12)
    assert learn("ncm").drift_errors(old) is None


def second_task(spec: str, **settings) -> tuple[ClassIncrementalLearner, TaskRun]:
    """A learner with the second task's parts, before its training, and the run that would train them."""
    learner, where = learn(spec, tasks=TASKS[:1], **settings), scenario()
    rows = where.train.subset(where.rows("train", 1))
    with MonkeyPatch.context() as patch:
        runs = []
        patch.setattr(TaskRun, "train", lambda self: runs.append(self))
        learner.fit_task(rows, TASKS[1])
    return learner, runs[0]


def test_rates_are_of_the_heads_the_tower_and_each_block():
    learner, run = second_task("slca:slow=0.25,lr=0.02")
    *tower, head = run.optimizer.param_groups
    assert set(run.peaks[:-1]) == {0.005}
    assert run.peaks[-1] == 0.02
    assert sum(len(group["params"]) for group in tower) == len(list(learner.encoder.parameters()))
    assert head["params"] == learner.heads.of_task(1)


@pytest.mark.parametrize("schedule", ["step", "epoch"])
def test_the_cosine_falls_every_step_or_once_an_epoch_as_torchs_does(schedule):
    """Per epoch: torch's CosineAnnealingLR with T_max epochs, stepped after each, as MACIL's authors have it."""
    _, run = second_task("finetune", schedule=schedule, epochs=4)
    per_epoch = run.order.per_epoch
    assert per_epoch > 1
    assert run.total == 4 * per_epoch
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    every = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=run.total if schedule == "step" else 4)
    for step in range(run.total):
        assert run.rate(step, 0.3) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9)
        sgd.step()
        if schedule == "step" or (step + 1) % per_epoch == 0:
            every.step()
    seen = []
    for batch in itertools.islice(run.batches(), 2 * per_epoch):
        run.train_step(batch)
        seen.append(run.sgd.param_groups[-1]["lr"])
        run.step += 1
    assert seen == [run.rate(step, run.peaks[-1]) for step in range(len(seen))]
    assert len(set(seen)) == (len(seen) if schedule == "step" else 2)


def test_a_run_of_before_the_schedule_had_a_name_goes_on():
    assert "schedule" not in CILConfig().outcome()
    assert CILConfig(schedule="epoch").outcome()["schedule"] == "epoch"


@pytest.mark.parametrize("train", ["lora", "full"])
def test_plasticity_sets_the_learning_rate_of_each_block(train):
    learner, run = second_task(f"finetune:plasticity=1,train={train},slow=0.5")
    assert learner.multipliers[0] == dict.fromkeys(learner.encoder.blocks, 1.0)
    expected = learner.plasticity.multipliers(learner.history[1], learner.history[:1])
    assert learner.multipliers[1] == expected
    assert set(expected.values()) != {1.0}
    lr = FAST["lr"]
    blocks = [lr * 0.5 * expected[block] for block in learner.encoder.blocks]
    # what is in no block learns slowly, the head does not
    others = [lr * 0.5 * learner.plasticity.floor] if train == "full" else []
    assert sorted(run.peaks) == pytest.approx(sorted([*blocks, *others, lr]))


@pytest.mark.parametrize("changes", ["", "consistent=1", "covariance=0", "distill=0", "covariance=0,distill=0"])
def test_the_loss_is_the_sum_of_its_parts(changes):
    learner, run = second_task(f"macil:{changes}")
    config = run.config
    with torch.no_grad():  # away from where the task began
        for p in [*learner.lora.parameters(), *learner.heads.of_task(1)]:
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    pixels = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([5, 1] * 5)
    before = run.before.network or learner.encoder
    new, old = learner.encoder.tokens(pixels), before.tokens(pixels)
    weight = F.normalize(learner.heads.weights[1], dim=-1)
    expected = F.cross_entropy(20 * F.normalize(new.features, dim=-1) @ weight.T, (targets == 1).long())
    if config.covariance:
        features = run.before.features
        scale = features.norm(dim=1).mean() if config.consistent else 1.0
        rows = F.normalize(features, dim=-1) if config.consistent else features
        labels = torch.tensor(run.images.targets)
        S = torch.stack([torch.cov(rows[labels == c].double().T) for c in (5, 1)])
        L = precision_factor(shrink(S)).L.float()
        expected = expected + ops.mahalanobis_covariance_loss(
            new.features, old.features.detach(), (targets == 1).long(), L, backend="reference"
        ) / scale  # fmt: skip
    if config.distill:
        expected = expected + 0.4 * patch_distillation(new.cls, new.patches, old.patches)
    torch.testing.assert_close(run.loss(pixels, targets), expected, rtol=1e-4, atol=1e-5)


def test_each_part_that_is_switched_off_changes_what_is_learned():
    whole = weights(learn("macil", tasks=TASKS[:2]))
    for change in ("covariance=0", "distill=0", "consistent=1", "slow=0.1"):
        part = weights(learn(f"macil:{change}", tasks=TASKS[:2]))
        assert any(not torch.equal(part[k], whole[k]) for k in whole), change


def test_alignment_begins_with_the_second_task_and_from_heads_as_they_were_trained():
    first, second, third = (learn("macil", tasks=TASKS[:n]) for n in (1, 2, 3))
    assert first.aligned is None
    plain = learn("macil:align=0", tasks=TASKS)
    # alignment reaches no head that is trained on
    assert all(torch.equal(a, b) for a, b in zip(third.heads.parameters(), plain.heads.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(second.aligned.parameters(), second.heads.parameters()))
    features = third.features(images(2, 8))
    assert torch.equal(third.scores(features), third.aligned(features))


def test_a_run_depends_on_its_seed_alone():
    a, b, c = (weights(learn("macil", tasks=TASKS[:2], seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_patch_distillation_is_the_formula_patch_by_patch():
    generator = torch.Generator().manual_seed(0)
    cls, new, old = (torch.randn(*s, 8, dtype=torch.float64, generator=generator) for s in ((3,), (3, 5), (3, 5)))
    new.requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(3):
        for p in range(5):
            angle = F.cosine_similarity(cls[b], new[b, p].detach(), dim=0).acos() / torch.pi
            expected = expected + angle * (F.normalize(new[b, p], dim=0) - F.normalize(old[b, p], dim=0)).norm() / 15
    value = patch_distillation(cls, new, old)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    wanted, got = (torch.autograd.grad(x, new)[0] for x in (expected, value))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    # when a task begins nothing has moved
    same = old.clone().requires_grad_()
    patch_distillation(cls, same, old).backward()
    assert same.grad.isfinite().all()


def test_transport_follows_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    old, A = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((4000, 6), (6, 6)))
    S = torch.cov(old[:50].T)[None]
    moved = transport(S, old, old @ A.T + 3)
    torch.testing.assert_close(moved, A @ S @ A.T, rtol=1e-2, atol=1e-2)  # the ridge is a thousandth
    assert torch.equal(transport(S, old, old), S)  # nothing moved


@pytest.fixture
def in_step(monkeypatch):
    """in_step(n, call): `call` before the loss of the n-th step, counted over the tasks."""
    plain = TaskRun.loss

    def install(number, call):
        steps = iter(range(1, 1000))
        monkeypatch.setattr(TaskRun, "loss", lambda *args: (next(steps) == number and call(), plain(*args))[1])

    return install


@pytest.mark.nightly
def test_joint_training_stopped_in_the_middle_of_a_task_ends_in_the_same_numbers(tmp_path, in_step):
    config = strategy("joint", **FAST, checkpoint_every=3)
    whole = run_tasks(scenario(), encoder, config, out=tmp_path / "whole")
    # 12, 24 and 36 steps: within the second task, after a checkpoint
    in_step(17, lambda: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        run_tasks(scenario(), encoder, config, out=tmp_path / "cut")
    assert list((tmp_path / "cut").rglob("steps/*/step-*.safetensors"))
    in_step(0, None)
    again = run_tasks(scenario(), encoder, config, out=tmp_path / "cut")
    assert torch.equal(again.matrix.nan_to_num(), whole.matrix.nan_to_num())
    there = {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("tasks/*.safetensors")}
    assert len(there) == 3
    assert all((tmp_path / "cut" / p).read_bytes() == (tmp_path / "whole" / p).read_bytes() for p in there)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_step_of_a_task_ends_the_run_after_it(tmp_path, in_step, number):
    in_step(12, lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt, match=r"143|task 1 is saved"):
        run_tasks(scenario(), encoder, strategy("finetune", **FAST, checkpoint_every=3), out=tmp_path)
    assert [p.stem for p in tmp_path.rglob("tasks/*.json")] == ["step-0000000001"]
    assert not list(tmp_path.rglob("steps/*"))


@pytest.mark.parametrize("spec", ["finetune", "sdc", "ranpac", "finetune:softmax=seen"])
def test_a_damaged_checkpoint_costs_a_task_and_changes_nothing(tmp_path, monkeypatch, spec):
    config = strategy(spec, **FAST)
    whole = run_tasks(scenario(), encoder, config)
    with monkeypatch.context() as patch:
        patch.setattr(ClassIncrementalLearner, "fit_task", _two_tasks(ClassIncrementalLearner.fit_task))
        with pytest.raises(KeyboardInterrupt):
            run_tasks(scenario(), encoder, config, out=tmp_path)
    newest = max(tmp_path.rglob("tasks/*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-8])
    again = run_tasks(scenario(), encoder, config, out=tmp_path)
    assert torch.equal(again.matrix.nan_to_num(), whole.matrix.nan_to_num())
    # figures of tasks and checkpoints that do not belong together
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="do not belong together"):
        run_tasks(scenario(), encoder, config, out=tmp_path)


def _two_tasks(fit_task):
    def fit(self, *args):
        if len(self.tasks) == 2:
            raise KeyboardInterrupt
        return fit_task(self, *args)

    return fit


def test_a_folder_of_another_run_is_refused(tmp_path):
    learn("finetune", tmp_path, tasks=TASKS[:1])
    for change in ({"lr": 0.05}, {"seed": 5}):
        with pytest.raises(ValueError, match="other settings"):
            learn("finetune", tmp_path, tasks=TASKS[:1], **change)
    config = strategy("finetune", **FAST)
    with pytest.raises(ValueError, match="weights"):
        ClassIncrementalLearner(encoder(1), config, CLASSES, out=tmp_path).resume()
    run_tasks(scenario(), encoder, strategy("ncm"), out=tmp_path / "run")
    with pytest.raises(ValueError, match="other settings"):
        run_tasks(scenario(), encoder, strategy("ncm", seed=2), out=tmp_path / "run")


def test_what_does_not_fit_is_refused():
    where, learner = scenario(), learn("finetune", tasks=TASKS[:1])
    rows = where.train.subset(where.rows("train", 1))
    for bad in ([], TASKS[0], [1], [1, 5, 2], [5, 5]):
        with pytest.raises(ValueError, match="fit_task"):
            learner.fit_task(rows, bad)
    assert learner.tasks == TASKS[:1]
    with pytest.raises(ValueError, match="no task"):
        learn("ncm", tasks=[]).predict(rows)
    with pytest.raises(ValueError, match="zero_shot"):
        ClassIncrementalLearner(encoder(), strategy("zero_shot"), CLASSES)
    with pytest.raises(ValueError, match="plasticity"):
        ClassIncrementalLearner(encoder(), strategy("finetune:plasticity=1"), CLASSES)
    with pytest.raises(ValueError, match="out"):
        learner.save()


@pytest.mark.parametrize(
    "spec", ["nothing", "macil:", "macil:x=1", "macil:lr", "macil:lr=fast", "macil:align=yes", "macil:train=half",
             "macil:rank=0", "macil:lr=0", "macil:sigma=-1", "macil:compensation=none,transport=1", "ncm:align=1",
             "ncm:distill=1", "ncm:classifier=heads", "finetune:classifier=ridge"],
)  # fmt: skip
def test_a_strategy_that_makes_no_sense_is_refused(spec):
    if spec == "macil:":
        assert strategy(spec).covariance == 1.0
        return
    with pytest.raises(ValueError, match=r"strategy|CILConfig"):
        strategy(spec)


def test_a_spec_goes_before_general_settings_and_names_the_run():
    config = strategy("slca:epochs=7,sigma=0.5", epochs=3, batch_size=9)
    assert (config.epochs, config.batch_size, config.slow) == (7, 9, 0.01)
    assert (config.sigma, config.name) == (0.5, "slca:epochs=7,sigma=0.5")
    assert strategy("macil:sigma=median") == CILConfig(
        name="macil:sigma=median", covariance=1.0, distill=0.4, compensation="mean_shift", align=True
    )


def test_runs_in_several_processes_are_those_of_one():
    jobs = [(seeded_run, {"seed": s}) for s in (1, 2, 3)]
    alone, together = run_all(jobs), run_all(jobs, workers=2)
    assert [r.seed for r in together] == [1, 2, 3]
    assert all(torch.equal(a.seen, b.seen) for a, b in zip(alone, together))


def _linger(file: Path) -> None:
    file.write_text(str(os.getpid()))
    time.sleep(1200)  # longer than is waited for its end


PARENT = """
import sys
import time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/continual"]
from pathlib import Path
from test_learner import _linger
from clipsteer.continual.covariance import precision_factor, shrink
from clipsteer.continual.experiment import run_all
run_all([(_linger, {"file": Path(sys.argv[2]) / str(i)}) for i in range(2)], workers=2)
"""


def _waits_for(condition) -> bool:
    end = time.monotonic() + 600
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
    return condition()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(Path(__file__).parents[1]), str(tmp_path)])
    assert _waits_for(lambda: len([p for p in tmp_path.iterdir() if p.read_text()]) == 2)
    workers = [Path("/proc") / p.read_text() for p in tmp_path.iterdir()]
    assert all(w.exists() for w in workers)
    parent.kill()
    parent.wait()
    assert _waits_for(lambda: not any(w.exists() for w in workers))
