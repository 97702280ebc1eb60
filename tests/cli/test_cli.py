from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tests._golden import GOLDEN

from _command import run
from clipsteer import SAE, testing
from clipsteer.cli import main as cli
from clipsteer.cli import ops as cli_ops
from clipsteer.testing import bench

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
HOOK = "visual.transformer.resblocks.0"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("model")
    (folder / "ViT-cli-test.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "ViT-cli-test.json")
    torch.manual_seed(0)
    weights = {k: v.contiguous() for k, v in open_clip.create_model("ViT-cli-test").state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    return ["--model", "ViT-cli-test", "--pretrained", str(folder / "weights.safetensors")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name, colour in (("red thing", (200, 0, 0)), ("blue thing", (0, 0, 200))):
        (root / name).mkdir()
        for i in range(6):
            Image.new("RGB", (20, 20), tuple(max(0, c - 9 * i) for c in colour)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def sae(tmp_path_factory, model, images):
    out = tmp_path_factory.mktemp("sae") / "run"
    args = ["sae", "train", *model, "--data", images, "--hook-point", HOOK, "--out", out, "--d-sae", 48, "--k", 4,
            "--batch-size", 16, "--steps", 30, "--warmup-steps", 5, "--lr", 1e-3]  # fmt: skip
    assert cli.main([str(a) for a in args]) == 0
    return out


def commands(parser, prefix=()):
    """Every (words, parser) of the tree."""
    yield prefix, parser
    for action in parser._actions:
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            for name, child in action.choices.items():
                yield from commands(child, (*prefix, name))


def test_every_command_has_help_with_an_example(capsys):
    leaves = [(words, p) for words, p in commands(cli.build_parser()) if p.get_default("function")]
    assert {" ".join(words) for words, _ in leaves} == {
        "demo", "guide", "env", "validate", "bench", "prove", "sae train", "sae eval", "sae convert", "sae steer",
        "sae browse", "splice",
        "conceptor fit", "conceptor steer", "finetune", "wise-ft merge", "wise-ft curve",
        "cil", "train", "align",
    }  # fmt: skip
    groups = [(words, p) for words, p in commands(cli.build_parser()) if words and not p.get_default("function")]
    assert [words for words, _ in groups] == [("sae",), ("conceptor",), ("wise-ft",)]
    for words, parser in leaves + groups:
        assert parser.description
        code, out, _ = run(capsys, *words, "--help")
        assert code == 0
        assert f"clipsteer {' '.join(words)}" in parser.epilog, words
        assert "examples:" in out


def test_the_examples_in_the_help_parse():
    """Every example line that the help shows is accepted by the parser."""
    parser, seen = cli.build_parser(), 0
    for _, p in commands(parser):
        for line in (p.epilog or "").replace("\\\n", " ").splitlines():
            words = line.split("   ")[0].strip() if p is parser else line.strip()
            text = words.strip().split(" > ")[0]
            words = shlex.split(text) if text.startswith(("clipsteer ", "torchrun ")) else []
            if not words or "..." in words:
                continue
            start = words.index("clipsteer") + 1
            if "--help" not in words:
                parser.parse_args(words[start:])
                seen += 1
    assert seen >= 10


@pytest.mark.parametrize(
    "args",
    [
        [], ["nonsense"], ["demo", "--minutes", "soon"], ["bench", "--shape", "B:3"],
        ["sae", "steer", "x", "--feature", "3"], ["sae", "train"],
        ["sae", "train", "--out", "x", "--steps", "0"], ["validate", "--backends", "fortran"],
        ["demo", "--minutes", "0"], ["conceptor", "fit"], ["conceptor", "fit", "--out", "x", "--aperture", "-1"],
        ["conceptor", "fit", "--out", "x", "--category", "nonsense"], ["conceptor", "eval", "--seeds", "3"],
        ["conceptor", "fit", "--out", "x", "--style", "noto", "--data", "x"],
        ["validate", "--ops", "nonsense", "--backends", "reference"],
        ["demo", "--model", "ViT-B-33"], ["sae", "eval", "--tokens", "some", "x"],
    ],
)  # fmt: skip
def test_mistakes_in_the_call_are_exit_2_and_one_line(capsys, args):
    code, out, err = run(capsys, *args)
    assert code == 2
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if "error:" in line]) == 1


def test_what_is_not_there_is_exit_2_and_what_cannot_be_read_exit_1(capsys, tmp_path):
    for path, text, wanted in ((tmp_path / "missing", None, 2), (tmp_path / "broken", "{", 1)):
        if text is not None:
            path.mkdir()
            (path / "cfg.json").write_text(text)
        code, _, err = run(capsys, "sae", "eval", path)
        assert (code, len(err.splitlines())) == (wanted, 1)
        assert str(path) in err
    with pytest.raises(FileNotFoundError):
        cli.main(["sae", "eval", str(tmp_path / "missing"), "--debug"])
    with pytest.raises(FileNotFoundError):
        cli.main(["--debug", "sae", "eval", str(tmp_path / "missing")])


@pytest.mark.parametrize(
    ("words", "module"),
    [(("conceptor", "eval"), "benchmarks.conceptors.run"), (("wise-ft", "emoji"), "benchmarks.wise_ft")],
)
def test_commands_that_became_experiments_say_where_they_are(capsys, words, module):
    code, out, err = run(capsys, *words, "--out", "x")
    assert (code, out) == (2, "")
    assert f"python -m {module}" in err
    assert importlib.util.find_spec(module) is not None


def test_interrupt_is_exit_130(capsys, monkeypatch):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_ops, "environment", lambda: stop(None))
    assert run(capsys, "env")[0] == 130


def test_env_names_every_backend_and_why_not(capsys):
    code, out, _ = run(capsys, "env")
    assert code == 0
    assert torch.__version__ in out
    facts = json.loads(run(capsys, "env", "--json")[1])
    assert [row["backend"] for row in facts["backends"]] == ["reference", "cpp", "triton", "cuda"]
    assert facts["backends"][0]["usable"]
    for row in facts["backends"]:
        assert row["usable"] or row["reason"]
        assert row["reason"] in out


def test_validate_is_green_and_red(capsys, monkeypatch):
    args = ["validate", "--ops", "sparse_decode", "--backends", "reference", "--dtypes", "float64", "--cases", 5]
    code, out, _ = run(capsys, *args)
    assert (code, out.count("pass")) == (0, 1)
    red = testing.Row("sparse_decode", "cpp", "float32", 5, 2.0, "here", "FAIL")
    monkeypatch.setattr(testing, "validate", lambda *a, **k: [red])
    code, out, _ = run(capsys, *args)
    assert code == 1
    assert "FAIL" in out
    monkeypatch.setattr(testing, "validate", lambda *a, **k: [testing.Row("x", "cuda", "-", verdict="skipped: no GPU")])
    assert run(capsys, *args)[0] == 1


def test_bench_passes_its_arguments_on(capsys, monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(bench, "run", lambda *a, **k: seen.update(a=a, **k) or [])
    code, _, _ = run(capsys, "bench", "--ops", "topk_encode", "--shape", "B=8,d=4,n=9,k=2", "--out", tmp_path / "b.csv")
    assert code == 0
    assert seen["a"] == (["topk_encode"], None)
    assert seen["shape"] == {"B": 8, "d": 4, "n": 9, "k": 2}
    assert (seen["dtype"], seen["out"]) == (torch.float32, tmp_path / "b.csv")


def test_sae_train_eval_convert_steer(capsys, sae, model, images, tmp_path):
    trained = SAE.from_pretrained(sae)
    assert (trained.d_sae, trained.k, trained.metadata["hook_point"]) == (48, 4, HOOK)
    assert len((sae / "log.jsonl").read_text().splitlines()) >= 1

    (tmp_path / "words.txt").write_text("red\nblue\ngrey\n")
    args = ["sae", "eval", sae, "--data", images, "--steer", 40, "--features", 5, "--out", tmp_path / "m.json",
            "--name-features", 3, "--words", tmp_path / "words.txt"]  # fmt: skip
    code, out, _ = run(capsys, *args)
    assert code == 0
    figures = json.loads((tmp_path / "m.json").read_text())
    assert figures["images"] == 12
    assert f"{figures['ev']:.6g}" in out
    assert len(figures["steerability"]["best"]) == 5
    assert 1 <= len(figures["names"]) <= 3
    for row in figures["names"]:
        assert 0 < row["frequency"] <= 0.15
        assert {name for name, _ in row["names"]} <= {"red", "blue", "grey"}
        assert f"feature {row['feature']}" in out

    for format in ("saelens", "dictionary_learning"):
        assert run(capsys, "sae", "convert", sae, tmp_path / format, "--format", format)[0] == 0
        assert run(capsys, "sae", "convert", tmp_path / format, tmp_path / "back")[0] == 0
        back, x = SAE.from_pretrained(tmp_path / "back"), torch.randn(5, 32)
        torch.testing.assert_close(back(x).x_hat, trained(x).x_hat)

    args = ["sae", "steer", sae, "--data", images, "--count", 2, "--top", 1]
    code, out, _ = run(capsys, *args, "--feature", "3=500", "--feature", "4=0")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")][:4] == ["before", "after", "before", "after"]
    code, _, err = run(capsys, *args, "--feature", "48=1")
    assert code == 2
    assert "[0, 48)" in err


def test_sae_convert_takes_what_a_file_leaves_open(capsys, tmp_path):
    file = GOLDEN / "overcomplete-topk" / "sae.pt"
    shutil.copy(file, tmp_path / "sae.pt")
    code, _, err = run(capsys, "sae", "convert", tmp_path / "sae.pt", tmp_path / "mine")
    assert code == 1
    assert "overcomplete writes no configuration" in err
    config = file.with_name("config.json")
    assert run(capsys, "sae", "convert", tmp_path / "sae.pt", tmp_path / "mine", "--config", config)[0] == 0
    assert SAE.from_pretrained(tmp_path / "mine").k == 4


def test_hook_points_that_are_never_called(capsys, sae, model, images, tmp_path):
    file, never = tmp_path / "c.safetensors", f"{HOOK}.attn.out_proj"
    fit = ["conceptor", "fit", *model, "--data", images, "--hook-point"]
    assert run(capsys, *fit, HOOK, "--out", file)[0] == 0
    train = ["sae", "train", *model, "--data", images, "--out", tmp_path / "run", "--d-sae", 8, "--k", 2, "--steps", 1]
    for args in (
        [*train, "--hook-point", never],
        [*train, "--hook-point", never, "--store", tmp_path / "store"],
        ["sae", "eval", sae, "--data", images, "--hook-point", never],
        ["sae", "eval", sae, "--data", images, "--hook-point", never, "--steer", 4, "--features", 2],
        ["sae", "steer", sae, "--data", images, "--feature", "3=9", "--hook-point", never],
        [*fit, never, "--out", tmp_path / "other.safetensors"],
        ["conceptor", "steer", file, "--data", images, "--hook-point", never],
    ):
        code, out, err = run(capsys, *args)
        assert (code, len(err.splitlines())) == (2, 1), (args, err)
        assert f"never calls '{never}' as a module; choose '{HOOK}.attn'" in err, args
        assert "after" not in out


class Stop(BaseException):  # of others the command line makes a message
    pass


def test_sae_train_puts_each_process_on_its_own_gpu(capsys, monkeypatch, tmp_path):
    seen = []

    def load(*args, device):
        seen.append(device)
        raise Stop

    monkeypatch.setattr("clipsteer.clip.model.load", load)
    with pytest.raises(Stop):
        cli.main(["sae", "train", "--out", str(tmp_path)])
    assert seen == [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr("clipsteer.training.world._join", lambda backend: seen.append(backend))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    for device in ([], ["--device", "cuda"]):
        with pytest.raises(Stop):
            cli.main(["sae", "train", "--out", str(tmp_path), *device])
    own = torch.device("cuda:3")
    assert seen[1:] == [own, "nccl", own] * 2


def test_sae_train_without_a_length_goes_past_the_warm_up(capsys, monkeypatch, model, images, tmp_path):
    seen = []
    monkeypatch.setattr("clipsteer.train_sae", lambda source, config, **k: seen.append((config, k)) or SAE(8, 16, k=2))
    args = ["sae", "train", *model, "--data", images, "--hook-point", HOOK, "--out", tmp_path / "run"]
    assert run(capsys, *args)[0] == 0
    assert run(capsys, *args, "--steps", 3)[0] == 0
    assert run(capsys, *args, "--train-tokens", 50_000)[0] == 0
    (default, options), (short, _), (asked, _) = seen
    assert (default.tokens, default.steps) == (2_000_000, None)
    total = default.total_steps(None)
    assert total > default.fitted(total).warmup_steps > 0
    assert (short.tokens, short.steps, asked.tokens) == (None, 3, 50_000)
    assert options["metadata"] == {"data": str(images)}


def test_sae_train_with_a_store_resumes(capsys, model, images, tmp_path):
    args = ["sae", "train", *model, "--data", images, "--hook-point", HOOK, "--d-sae", 40, "--k", 4, "--batch-size", 16,
            "--steps", 6, "--out", tmp_path / "run", "--store", tmp_path / "store"]  # fmt: skip
    assert run(capsys, *args)[0] == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert run(capsys, *args)[0] == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    hook = HOOK.replace("0", "1")
    other = tmp_path / "other"
    for change, word in (
        (["--k", 5], "k: 4 there, 5"),
        (["--hook-point", hook, "--store", other], f"metadata.hook_point: '{HOOK}' there, '{hook}'"),
        (["--tokens", "cls", "--store", tmp_path / "cls"], "metadata.tokens: 'all' there, 'cls'"),
    ):
        code, _, err = run(capsys, *args, *change)
        assert code == 2
        assert "other settings" in err
        assert word in err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    # a run knows its data, however they are called
    assert run(capsys, *args, "--data", f"{images}/")[0] == 0


def test_a_complete_store_needs_neither_model_nor_images(capsys, monkeypatch, model, images, tmp_path):
    store, settings = tmp_path / "store", ["--d-sae", 40, "--k", 4, "--batch-size", 16, "--steps", 6]
    harvest = ["sae", "train", *model, "--data", images, "--hook-point", HOOK, "--tokens", "patches", "--store", store]
    assert run(capsys, *harvest, *settings, "--out", tmp_path / "first")[0] == 0

    def no_door(*args, **kwargs):
        raise AssertionError("opened")

    monkeypatch.setattr("clipsteer.clip.model.load", no_door)
    monkeypatch.setattr("clipsteer.data.files.open_dataset", no_door)
    alone = ["sae", "train", "--store", store, *settings]
    code, out, _ = run(capsys, *alone, "--out", tmp_path / "second")
    assert code == 0
    assert HOOK in out
    first, second = (SAE.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert torch.equal(first.W_dec, second.W_dec)
    for name in ("clip_model", "pretrained", "hook_point", "tokens", "setup"):
        assert second.metadata[name] == first.metadata[name]
    assert first.metadata["data"] == str(images)
    assert "data" not in second.metadata
    # what is asked for must be what is there
    for option, word in ((["--hook-point", "visual.ln_post"], "hook_point"), (["--tokens", "cls"], "tokens")):
        code, _, err = run(capsys, *alone, *option, "--out", tmp_path / "third")
        assert code == 2
        assert f"holds another harvest ({word}" in err
    assert run(capsys, *alone, "--hook-point", HOOK, "--tokens", "patches", "--out", tmp_path / "second")[0] == 0
    # a model or images that are named are opened, and held against the store
    for named in (["--data", images], model):
        assert "AssertionError: opened" in run(capsys, *alone, *named, "--out", tmp_path / "fourth")[2]
    # and so where a shard is missing
    next(store.glob("shard-*.json")).unlink()
    assert "AssertionError: opened" in run(capsys, *alone, "--out", tmp_path / "fifth")[2]


def test_a_complete_store_of_pairs_needs_no_model(capsys, monkeypatch, model, images, tmp_path):
    at = ["--hook-point", f"{HOOK}.ln_2", "--target-hook-point", f"{HOOK}.mlp", "--store", tmp_path / "store"]
    settings = ["--d-sae", 40, "--k", 4, "--batch-size", 16, "--steps", 3]
    assert run(capsys, "sae", "train", *model, "--data", images, *at, *settings, "--out", tmp_path / "first")[0] == 0
    monkeypatch.setattr("clipsteer.clip.model.load", None)
    assert run(capsys, "sae", "train", *at, *settings, "--out", tmp_path / "second")[0] == 0
    first, second = (SAE.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert torch.equal(first.W_dec, second.W_dec)
    assert second.metadata["target_hook_point"] == f"{HOOK}.mlp"


def test_module_runs_as_a_program():
    def call(*args: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONSAFEPATH": "1"}
        return subprocess.run([sys.executable, "-m", "clipsteer", *args], capture_output=True, text=True, env=env)

    done = call("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("clipsteer 0.")
    done = call("sae", "eval", "/no/such")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_conceptor_fit_and_steer(capsys, model, images, tmp_path):
    from clipsteer import Conceptor
    from clipsteer.clip.hooks import capture
    from clipsteer.clip.model import load
    from clipsteer.data.files import open_dataset
    from clipsteer.sae.activations import harvest_to_store

    fit = ["conceptor", "fit", *model, "--hook-point", HOOK, "--batch-size", 5]
    code, out, _ = run(capsys, *fit, "--data", images, "--aperture", 0.5, "--out", tmp_path / "all.safetensors")
    assert code == 0
    assert out.count("<- this one") == 1
    fitted = Conceptor.load(tmp_path / "all.safetensors")
    clip, dataset = load(model[1], model[3]), open_dataset(images)
    with capture(clip, HOOK, detach=True) as found:
        clip.encode_images(dataset[i][0] for i in range(12))
    wanted = Conceptor.fit(found[HOOK], 0.5)
    assert float((fitted.matrix - wanted.matrix).norm()) < 1e-4
    assert (fitted.aperture, fitted.metadata["hook_point"], fitted.metadata["tokens"]) == (0.5, HOOK, "all")

    args = [*fit, "--data", images, "--per-class", "--centre", images, "--tokens", "cls", "--quota", 0.05]
    assert run(capsys, *args, "--out", tmp_path / "classes.safetensors")[0] == 0
    classes = Conceptor.load(tmp_path / "classes.safetensors")
    assert json.loads(classes.metadata["classes"]) == ["blue thing", "red thing"]
    cls = found[HOOK][:, :1]
    mean = cls.double().mean((0, 1))
    torch.testing.assert_close(classes.mean, mean, rtol=1e-4, atol=1e-5)
    wanted = Conceptor.fit(cls[:6], classes.aperture, mean=mean)  # the blue ones come first
    assert float((classes[0].matrix - wanted.matrix).norm()) < 1e-2
    assert abs(float(classes.quota.mean()) - 0.05) < 1e-4

    harvest_to_store(clip, dataset, HOOK, tmp_path / "store", dtype="float32")
    args = ["conceptor", "fit", "--store", tmp_path / "store", "--aperture", 0.5, "--low-rank", 0.1]
    code, out, _ = run(capsys, *args, "--out", tmp_path / "low.safetensors")
    assert code == 0
    assert "off by at most" in out
    low = Conceptor.load(tmp_path / "low.safetensors")
    assert low.rank < fitted.rank
    assert float(torch.linalg.matrix_norm(low.matrix - fitted.matrix, 2)) < 0.1 + 1e-4

    steer = ["conceptor", "steer", tmp_path / "all.safetensors", "--data", images, "--count", 2, "--top", 1]
    code, out, _ = run(capsys, *steer, "--not", "--or", tmp_path / "low.safetensors", "--beta", 2)
    assert code == 0
    expected = (~fitted | low).quota
    assert f"quota={float(expected):.4g}" in out.splitlines()[0]
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")][:2] == ["before", "after"]
    # terms apply from left to right
    code, out, _ = run(capsys, *steer, "--or", tmp_path / "low.safetensors", "--and-not", tmp_path / "all.safetensors")
    assert f"quota={float(((fitted | low) & ~fitted).quota):.4g}" in out.splitlines()[0]

    shown = {form: run(capsys, *steer, "--beta", 0, "--form", form) for form in ("project", "residual")}
    assert {code for code, _, _ in shown.values()} == {0}
    same = {
        form: [line[10:] for line in out.splitlines() if line.startswith("  before")]
        == [line[10:] for line in out.splitlines() if line.startswith("  after")]
        for form, (_, out, _) in shown.items()
    }  # fmt: skip
    assert same == {"project": False, "residual": True}  # nothing added, and all taken away
    code, _, err = run(capsys, "conceptor", "steer", tmp_path / "classes.safetensors", "--data", images)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "red thing" in err
    code, out, _ = run(capsys, "conceptor", "steer", tmp_path / "classes.safetensors", "--class", "red thing",
                       "--data", images, "--count", 1)  # fmt: skip
    assert code == 0
    # conceptors of another origin do not combine; one of no stated origin does
    for change, name in (({"tokens": "cls"}, "tokens"), ({"hook_point": "x"}, "hook_point"),
                         ({"clip_model": "y"}, "clip_model"), ({"pretrained": "z"}, "pretrained")):  # fmt: skip
        Conceptor(fitted.matrix, metadata={**fitted.metadata, **change}).save(tmp_path / "other.safetensors")
        code, out, err = run(capsys, *steer, "--and", tmp_path / "other.safetensors")
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert f"of one {name}" in err
    Conceptor(fitted.matrix).save(tmp_path / "other.safetensors")
    assert run(capsys, *steer, "--and", tmp_path / "other.safetensors")[0] == 0
    Conceptor(fitted.matrix, mean=mean).save(tmp_path / "other.safetensors")
    code, _, err = run(capsys, *steer, "--and", tmp_path / "other.safetensors")
    assert code == 2
    assert "centred" in err
    (tmp_path / "broken").write_text("{")
    for path, expected in ((tmp_path / "none", 2), (tmp_path / "broken", 1)):
        code, _, err = run(capsys, "conceptor", "steer", path)
        assert (code, len(err.splitlines())) == (expected, 1)
        assert str(path) in err


def test_the_demo_sets_the_wait_policy_before_torch_is_loaded():
    """OpenMP reads it when torch brings it in."""
    code = (
        "import os, sys; from clipsteer.cli import main as cli\n"
        "cli.build_parser(); assert 'torch' not in sys.modules\n"
        "assert cli.main(['demo', '--minutes', '-1']) == 2 and os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
