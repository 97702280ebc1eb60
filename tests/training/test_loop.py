"""The training loop under all who use it: SAEs, fine-tuning, contrastive training, tasks of classes."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from _command import run as command
from _training import ON_FILES, SMALL, STEPS, USERS, VARIANTS, picture_files, pictures
from clipsteer.io.checkpoint import load_latest
from clipsteer.training.schedule import seed_of
from clipsteer.training.settings import check_same_settings
from clipsteer.training.signals import StopSignal
from clipsteer.training.tracking import Reporter, trim_log

OTHERS = [name for name in VARIANTS if name not in USERS]


class Stop(Exception):
    pass


@pytest.fixture(params=USERS)
def user(request):
    return USERS[request.param]


@pytest.fixture
def at(monkeypatch):
    """at(step, call, user): `call` when the run, or its last part, has logged this step."""
    plain = Reporter.write

    def install(step, call, user):
        def write(self, record):
            plain(self, record)
            if record["step"] == step and user.name in self.name:
                call()

        monkeypatch.setattr(Reporter, "write", write)

    yield install
    monkeypatch.setattr(Reporter, "write", plain)


def stop():
    raise Stop


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].nan_to_num(9), b[name].nan_to_num(9)), name


def newest(out, user):
    found = load_latest(out / user.checkpoints)
    return None if found is None else found.step


def lines(out, user):
    """The log without what depends on the clock."""
    records = [json.loads(line) for line in (out / user.log).read_text().splitlines()]
    return [
        {k: v for k, v in record.items() if not k.endswith("per_second") and k != "loss_share"} for record in records
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """name -> (folder, weights) of a whole run."""
    found = {}

    def run(name):
        if name not in found:
            out = tmp_path_factory.mktemp("whole") / "run"
            torch.manual_seed(0)  # as it is when a test begins
            found[name] = out, {k: v.clone() for k, v in VARIANTS[name].train(out).items()}
        return found[name]

    return run


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("name", [*USERS, *(pytest.param(n, marks=pytest.mark.nightly) for n in OTHERS)])
@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_stopped_run_resumes_bitwise(tmp_path, at, undisturbed, name, step):
    user = VARIANTS[name]
    at(step, stop, user)
    with pytest.raises(Stop):
        user.train(tmp_path)
    assert newest(tmp_path, user) == {1: None, 3: 2, 7: 6}[step]
    log = tmp_path / user.log
    assert [line["step"] for line in lines(tmp_path, user)] == list(range(1, step + 1))
    log.write_text(log.read_text() + '{"step": 9')  # torn
    at(0, stop, user)
    if step > 1:
        torch.manual_seed(1)  # a process of its own: what a checkpoint keeps of the generator is restored
    state = torch.random.get_rng_state()
    resumed = user.train(tmp_path)
    assert "sae" in name or torch.equal(torch.random.get_rng_state(), state)
    whole, weights = undisturbed(name)
    assert_same(weights, resumed)
    assert [line["step"] for line in lines(tmp_path, user)] == list(range(1, STEPS + 1))
    assert lines(tmp_path, user) == lines(whole, user)
    if "tasks" not in name:  # theirs of steps are gone once a task is learned
        assert_same(*(load_latest(out / user.checkpoints).tensors for out in (whole, tmp_path)))


def test_a_finished_run_is_not_repeated(at, undisturbed, user):
    name = next(name for name in USERS if USERS[name] is user)
    out, weights = undisturbed(name)
    log = (out / user.log).read_bytes()
    for step in range(1, STEPS + 1):
        at(step, stop, user)
        assert_same(weights, user.train(out))
    assert (out / user.log).read_bytes() == log


def test_other_settings_are_refused_and_what_changes_nothing_is_not(tmp_path, at, user):
    at(3, stop, user)
    with pytest.raises(Stop):
        user.train(tmp_path)
    for changed in ({"lr": 0.5}, {"seed": 5}):
        (setting, value), *_ = changed.items()
        with pytest.raises(ValueError, match=rf"other settings \(.*{setting}: .* there, {value} asked for"):
            user.train(tmp_path, **changed)
    if user is not USERS["tasks"]:
        with pytest.raises(ValueError, match="holds a run"):
            user.train(tmp_path, resume=False)
    at(5, stop, user)
    with pytest.raises(Stop):
        user.train(tmp_path, log_every=5, checkpoint_every=3)
    assert newest(tmp_path, user) == 3


def test_the_settings_that_differ_are_named_wherever_they_stand(tmp_path):
    there = {"lr": 1.0, "model": {"width": 3, "depth": 2}, "old": 1, "log_every": 3}
    here = {"lr": 1.0, "model": {"width": 4, "depth": 2}, "new": "x", "log_every": 4, "unset": None}
    with pytest.raises(ValueError, match=r"\(model.width: 3 there, 4 asked for, old: 1 there, None asked for, new: "):
        check_same_settings("run", tmp_path, there, here, ("log_every",))
    check_same_settings("run", tmp_path, {**here, "log_every": 1}, here, ("log_every",))


def test_a_run_of_another_data_order_is_refused(tmp_path, at, monkeypatch, user):
    at(3, stop, user)
    with pytest.raises(Stop):
        user.train(tmp_path)
    for path in tmp_path.rglob("*.json"):  # as a version wrote them that had but one order
        found = json.loads(path.read_text())
        for new in ("checksum", "data"):
            found.pop(new, None)
        for settings in (found.get("settings"), found.get("meta", {}).get("settings")):
            if settings is not None:
                settings.pop("data order")
        path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"other data from a seed \(data order 1 there, 2 here\)"):
        user.train(tmp_path)


@pytest.mark.parametrize("name", USERS)
def test_other_data_are_refused_and_the_same_elsewhere_are_not(tmp_path, at, name):
    user = ON_FILES[name]
    shutil.copytree(picture_files(tmp_path / "made"), tmp_path / "photos")
    at(3, stop, user)
    with pytest.raises(Stop):
        user.train(tmp_path / "run", tmp_path / "photos")
    before = newest(tmp_path / "run", user)
    # one pixel of one file of 48, its size and time as they were
    path = sorted((tmp_path / "photos").rglob("*.bmp"))[5]
    content, stat = path.read_bytes(), path.stat()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    os.utime(path, (stat.st_atime, stat.st_mtime))
    with pytest.raises(ValueError, match=r"holds a run on other data \(.*contents"):
        user.train(tmp_path / "run", tmp_path / "photos")
    path.write_bytes(content)
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    at(5, stop, user)
    with pytest.raises(Stop):
        user.train(tmp_path / "run", tmp_path / "elsewhere")
    assert newest(tmp_path / "run", user) == 4 > before


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX")
def test_a_second_run_in_the_folder_is_told_who_writes_there(tmp_path, at, user):
    refused = []
    threads = []

    def second():
        try:
            user.train(tmp_path)
        except RuntimeError as error:
            refused.append(str(error))

    def start():
        if not threads:  # it comes to this step itself, where nobody stops it
            threads.append(threading.Thread(target=second))
            threads[0].start()
            threads[0].join()

    at(3, start, user)
    user.train(tmp_path)
    assert len(refused) == 1
    assert f"{tmp_path} is being written by another thread of this process ({os.getpid()}), since" in refused[0]
    assert not list(tmp_path.rglob(".clipsteer.lock"))


def test_seeds_are_unlike_for_unlike_parts_and_fit_torch():
    parts = [(1, 23), (12, 3), (123,), ("1", 23), (1, "23"), (-1,), (2**80,), (1, 2, 3), (), ("order", 0), (0, "order")]
    seeds = [seed_of(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "order", 1) == 125578804223736978


def test_a_full_disk_ends_the_run_and_costs_no_checkpoint(tmp_path, at, undisturbed, user):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard)), user)
    try:
        with pytest.raises(OSError, match=r"File too large|No space left"):
            user.train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert newest(tmp_path, user) == 2
    at(0, stop, user)
    name = next(name for name in USERS if USERS[name] is user)
    assert_same(undisturbed(name)[1], user.train(tmp_path))


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_kept(tmp_path, at, monkeypatch, user):
    from clipsteer.training.loop import TrainingRun

    def spoil():
        for run in runs:
            with torch.no_grad():
                next(iter(run.parameters.values())).fill_(float("nan"))

    runs, plain = [], TrainingRun._steps
    monkeypatch.setattr(TrainingRun, "_steps", lambda self, *a: (runs.append(self), plain(self, *a)))
    at(3, spoil, user)
    with pytest.raises(RuntimeError, match=r"(loss is nan|weights are not finite) at step 4.*the checkpoint of step 2"):
        user.train(tmp_path)
    assert newest(tmp_path, user) == 2


# ---------------------------------------------------------------- signals


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_at_hand(tmp_path, at, undisturbed, caplog, user, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    at(3, lambda: signal.raise_signal(number), user)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as left:
        user.train(tmp_path)
    if number == signal.SIGTERM:
        assert left.value.code == 143
    assert f"{number.name}: step 3 of 8 is saved in {tmp_path}" in caplog.text
    assert "to go on" in caplog.text
    assert newest(tmp_path, user) == 3
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    at(0, stop, user)
    name = next(name for name in USERS if USERS[name] is user)
    assert_same(undisturbed(name)[1], user.train(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_interrupt_ends_at_once(tmp_path, at, user, first):
    def twice():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)

    at(3, twice, user)
    with pytest.raises(KeyboardInterrupt):
        user.train(tmp_path)
    assert newest(tmp_path, user) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_without_a_folder_an_interrupt_is_as_ever(at, user):
    seen = []

    def interrupt():
        seen.append("asked")
        signal.raise_signal(signal.SIGINT)
        seen.append("still here")

    at(3, interrupt, user)
    with pytest.raises(KeyboardInterrupt):
        user.train(None)
    assert seen == ["asked"]


def test_only_the_main_thread_takes_signals(tmp_path, at, user):
    seen = []
    at(3, lambda: seen.append(signal.getsignal(signal.SIGINT)), user)
    thread = threading.Thread(target=user.train, args=(tmp_path,))
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal(True) as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.asked
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# a parent that has imported everything forks one child a run and reports its number, then its exit code
SERVER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from _training import VARIANTS
from clipsteer.training.tracking import Reporter

plain = Reporter.write

def train(name, out, pause):
    def write(self, record):
        plain(self, record)
        open(out + "/started", "w").close()
        time.sleep(float(pause))
    Reporter.write = write
    VARIANTS[name].train(Path(out))

# the first optimiser imports the compiler, which takes longer than a whole run
weight = torch.nn.Parameter(torch.zeros(1))
weight.grad = torch.zeros(1)
torch.optim.Adam([weight], fused=True).step()
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(*line.rstrip("\\n").split("\\t"))
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            # a run that was done before it was killed trains no step again
            open(line.split("\\t")[1] + "/started", "w").close()
            os._exit(code)
    print("number", child, flush=True)
    print("code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    def __init__(self):
        code = [sys.executable, "-c", SERVER, str(Path(__file__).parents[1])]
        self.server = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, name: str, out: Path, pause: float = 0) -> int:
        """Start a run; returns the process's number once it has trained a step."""
        out.mkdir(exist_ok=True)
        (out / "started").unlink(missing_ok=True)
        self.server.stdin.write(f"{name}\t{out}\t{pause}\n")
        self.server.stdin.flush()
        number = self._said("number")
        deadline = time.monotonic() + 600
        while not (out / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return number

    def exit_code(self) -> int:
        return self._said("code")

    def _said(self, what: str) -> int:
        """Never a code for a number: it is a process that is killed."""
        word, value = self.server.stdout.readline().split()
        assert word == what
        return int(value)


@pytest.fixture(scope="module")
def runs():
    runs = Runs()
    yield runs
    runs.server.stdin.close()
    assert runs.server.wait(600) == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("name", [*USERS, *(name for name in OTHERS if name.startswith("sae"))])
def test_runs_killed_at_random_moments_end_with_the_same_weights(tmp_path, runs, undisturbed, name):
    moments, kills, pause = random.Random(0), 0, 0.01
    parts = 3 if name == "tasks" else 1
    while not kills and pause < 10:  # on a busy machine a run may end before it is killed
        out, code = tmp_path / str(pause), None
        for _ in range(3):
            number = runs.start(name, out, pause)
            time.sleep(moments.uniform(0, 0.1 * parts))
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
            code = runs.exit_code()
            kills += code == -signal.SIGKILL
            if code == 0:
                break
        pause *= 4
    assert kills
    (out / "started").unlink()
    assert_same(undisturbed(name)[1], VARIANTS[name].train(out))


# ---------------------------------------------------------------- what is said


def test_figures_are_lines_of_the_log_where_there_is_no_terminal(tmp_path, caplog, capsys, user):
    caplog.set_level(logging.NOTSET, "clipsteer")  # as it is where no command has run
    user.train(tmp_path / "quiet", log_every=2)
    assert "step=" not in caplog.text + capsys.readouterr().err  # nobody asked
    with caplog.at_level(logging.INFO, "clipsteer"):
        user.train(tmp_path / "told", log_every=2)
    said = [record.getMessage() for record in caplog.records if record.name == "clipsteer.training.tracking"]
    mine = [line.split(": ", 1)[1] for line in said if user.name in line.split(": ")[0]]
    figures = [dict(word.split("=", 1) for word in line.removeprefix("done, ").split()) for line in mine]
    assert [int(line["step"]) for line in figures[:-1]] == [2, 4, 6, 8]
    assert all(float(line["loss"]) == float(line["loss"]) and "lr" in line for line in figures[:-1])
    assert mine[-1].startswith(f"done, steps={STEPS} ")
    assert figures[-1].keys() == {"steps", *user.quality}


def test_a_terminal_has_a_bar_and_the_last_line(caplog, monkeypatch, user):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with caplog.at_level(logging.INFO, "clipsteer"):
        user.train(None)
    assert f"{STEPS}/{STEPS}" in terminal.getvalue()
    assert "loss=" in terminal.getvalue()
    assert "step=" not in caplog.text.replace("steps=", "")
    assert f"done, steps={STEPS}" in caplog.text


def test_trackers_are_imported_when_asked_for(tmp_path, monkeypatch, user):
    seen = []
    log = lambda record, step: seen.append(step) if "loss" in record else None
    run = SimpleNamespace(log=log, finish=lambda: seen.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: seen.append(kwargs) or run))
    user.train(tmp_path / "wandb", log_every=4, track="wandb")
    began = max(i for i, entry in enumerate(seen) if isinstance(entry, dict))
    assert seen[began]["project"] == "clipsteer"
    assert seen[began]["config"]["log_every"] == 4
    assert seen[began + 1 : -1] == [4, 8]
    assert seen[-1] == "end"

    class Writer:
        def __init__(self, directory):
            assert directory.startswith(str(tmp_path / "board"))

        def add_scalar(self, name, value, step):
            seen.append((name, step))

        def close(self):
            seen.append("closed")

    board = SimpleNamespace(SummaryWriter=Writer)
    seen.clear()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    user.train(tmp_path / "board", log_every=4, track="tensorboard")
    assert [entry[1] for entry in seen if entry[0].endswith("/loss")][-2:] == [4, 8]
    assert seen[-1] == "closed"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match=r"pip install 'clipsteer\[track\]'"):
        user.train(None, track="wandb")
    with pytest.raises(ValueError, match="track"):
        user.train(None, track="pencil")


def test_the_command_line_tells_figures_and_exits_with_130(tmp_path, at, capsys, caplog):
    for number in range(12):
        pixels, target = pictures()[number]
        (tmp_path / "images" / str(target)).mkdir(parents=True, exist_ok=True)
        pixels.save(tmp_path / "images" / str(target) / f"{number}.png")
    (tmp_path / "clipsteer-test-cli.json").write_text(json.dumps(SMALL))
    arguments = ["train", "--data", tmp_path / "images", "--model", tmp_path / "clipsteer-test-cli.json"]
    arguments += ["--loss", "clip", "--batch-size", 6, "--epochs", 4, "--log-every", 1, "--out", tmp_path / "run"]
    user = USERS["contrastive"]
    at(3, lambda: signal.raise_signal(signal.SIGINT), user)
    assert command(capsys, *arguments)[0] == 130
    assert "train: step=3 loss=" in caplog.text
    assert "SIGINT: step 3 of 8 is saved" in caplog.text
    at(0, stop, user)
    assert command(capsys, *arguments)[0] == 0
    assert "goes on at step 3 of 8" in caplog.text
    assert "train: done, steps=8 loss=" in caplog.text


def test_a_log_keeps_what_the_checkpoint_has_seen(tmp_path):
    log = tmp_path / "log.jsonl"
    trim_log(log, 3)
    assert not log.exists()
    log.write_text('{"step": 1}\nnoise\n{"loss": 2}\n{"step": 3}\n{"step": 4}\n{"st')
    trim_log(log, 3)
    assert log.read_text() == '{"step": 1}\n{"step": 3}\n'
