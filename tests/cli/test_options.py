"""Options come from the settings dataclasses: nothing is said twice, and one way of reading serves all."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

import clipsteer
from _command import run
from clipsteer.alignment.config import AlignmentConfig
from clipsteer.cli import main as cli
from clipsteer.cli.arguments import Options
from clipsteer.continual.config import CILConfig
from clipsteer.continual.strategies import strategy
from clipsteer.ensembles.config import FinetuneConfig
from clipsteer.reference.config import ContrastiveConfig
from clipsteer.sae.config import TrainConfig
from clipsteer.training.settings import (
    Count,
    SettingError,
    Share,
    alternatives,
    base_type,
    check_fields,
    read_value,
    settings_of,
    whole_number,
)

OF_COMMAND = {
    "sae train": TrainConfig, "finetune": FinetuneConfig, "train": ContrastiveConfig, "cil": CILConfig,
    "align": AlignmentConfig,
}  # fmt: skip
# what a command needs beside the option that is looked at
NEEDS = {
    "prove": ["m:fast", "m:plain", "--inputs", "m:cases"],
    "sae train": ["--out", "x"], "finetune": ["--data", "x", "--out", "x"], "train": ["--out", "x"],
    "cil": ["--data", "x", "--out", "x"], "sae eval": ["x"], "sae steer": ["x", "--feature", "1=1"],
    "sae browse": ["x"], "splice": ["x"],
    "conceptor fit": ["--out", "x"], "conceptor steer": ["x"], "sae convert": ["x", "y"],
    "align": ["x", "y", "--out", "z"],
    "wise-ft merge": ["x", "y", "--out", "z"],
    "wise-ft curve": ["x", "y", "--reference", "a", "--shifted", "b", "--out", "z"],
}  # fmt: skip
COUNTS = {
    "demo": ["--seed", "--max-images"], "validate": ["--cases", "--seed"], "prove": ["--cases", "--seed"],
    "bench": ["--repeats", "--rows", "--threads"],
    "sae eval": ["--name-features", "--features"], "sae steer": ["--top", "--count", "--pick"],
    "sae browse": ["--steer", "--seed", "--port"], "splice": ["--top"],
    "sae train": ["--workers"], "conceptor fit": ["--batch-size"], "conceptor steer": ["--top", "--count"],
    "finetune": ["--workers"], "train": ["--workers"], "wise-ft curve": ["--workers"],
    "cil": ["--tasks", "--init-cls", "--increment", "--seeds", "--jobs", "--workers"],
    "align": ["--max-images"],
}  # fmt: skip


def leaves(parser, words=()):
    """(words, parser) of every command, with its options."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from leaves(child, (*words, name))
    if parser.get_default("function"):
        parser.complete()
        yield " ".join(words), parser


LEAVES = dict(leaves(cli.build_parser()))


def config_classes():
    """Every dataclass in clipsteer/ that is called a config, by its source."""
    root = Path(clipsteer.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                module = ".".join(("clipsteer", *path.relative_to(root).with_suffix("").parts))
                yield getattr(importlib.import_module(module), node.name)


CONFIGS = list(config_classes())


def test_all_config_dataclasses_are_looked_at():
    assert {config.__name__ for config in CONFIGS} == {
        "TrainConfig", "FinetuneConfig", "ContrastiveConfig", "CILConfig", "AlignConfig", "AlignmentConfig",
    }  # fmt: skip
    assert {words: p.get_default("options").config for words, p in LEAVES.items() if p.get_default("options")} == (
        OF_COMMAND
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_says_what_it_is(config):
    fields = settings_of(config)
    assert list(fields) == [field.name for field in dataclasses.fields(config)]
    for name, field in fields.items():
        assert len(field.doc) > 5, f"{config.__name__}.{name} has no docstring"
        assert not field.doc.endswith("."), field.doc
        assert field.default is getattr(config, name)


@pytest.mark.parametrize("words", OF_COMMAND)
def test_options_are_the_fields(words):
    parser, config = LEAVES[words], OF_COMMAND[words]
    options, fields = parser.get_default("options"), settings_of(config)
    actions = {option: action for action in parser._actions for option in action.option_strings}
    assert set(options.fields) <= set(fields)
    assert set(fields) - set(options.fields) == (set() if words != "cil" else set(cli_left_out()))
    for name, field in options.fields.items():
        action = actions[options.spelling[name]]
        assert field.doc.partition(" (default: ")[0] in action.help.replace("%%", "%"), name
        assert action.default == (None if name in options.unset else field.default), name
        kind = base_type(alternatives(field.kind)[0])
        if get_origin(kind) is Literal:
            assert tuple(action.choices) == get_args(kind)
        assert isinstance(action, argparse.BooleanOptionalAction) == (kind is bool)
    # the whole way: what the parser says without any option is the config without any argument
    args = cli.build_parser().parse_args([*words.split(), *NEEDS[words]])
    assert args.options.read(args) == config()


def cli_left_out():
    from clipsteer.cli.cil_settings import BY_STRATEGY

    return BY_STRATEGY


@pytest.mark.parametrize("words", LEAVES)
def test_every_option_has_help_and_tells_its_default(words):
    for action in LEAVES[words]._actions:
        assert action.help, f"{words} {action.option_strings or action.dest}"
        assert "%(default)" not in action.help
        if isinstance(action.default, (int, float)) and not isinstance(action.default, bool):
            told = {f"default: {action.default}", f"default: {action.default:g}"}
            assert any(text in action.help for text in told), (words, action.dest)


@pytest.mark.parametrize("words", LEAVES)
def test_a_count_is_read_one_way_everywhere(words, capsys):
    parser = LEAVES[words]
    options = parser.get_default("options")
    counts = [] if options is None else [
        options.spelling[name] for name, field in options.fields.items()
        if base_type(alternatives(field.kind)[0]) is int
    ]  # fmt: skip
    counts += COUNTS.get(words, [])
    reading_numbers = {
        action.option_strings[0] for action in parser._actions
        if action.option_strings and action.type is not None and _reads_counts(action.type)
    }  # fmt: skip
    assert set(counts) == reading_numbers
    for option in counts:
        for text, value in (("2e3", 2000), ("1_000", 1000), ("200", 200), ("2.0", 2)):
            args = parser.parse_args([*NEEDS.get(words, []), option, text])
            read = vars(args).values()
            assert value in read or [value] in read, (words, option)
        for text in ("2.5", "many", "inf", "nan", ""):
            with pytest.raises(SystemExit):
                parser.parse_args([*NEEDS.get(words, []), option, text])
            assert f"got {text!r}" in capsys.readouterr().err


def _reads_counts(read) -> bool:
    """Whether an option's type gives whole numbers for them, and for nothing else."""
    try:
        if type(read("3e2")) is not int:
            return False
        read("2.5")
    except (argparse.ArgumentTypeError, ValueError):
        return _takes(read, "3e2")
    return False


def _takes(read, text: str) -> bool:
    try:
        return bool(read(text))
    except (argparse.ArgumentTypeError, ValueError):
        return False


def test_a_count_in_a_strategy_a_shape_and_a_feature_is_read_the_same_way():
    assert strategy("ranpac:projections=2e3").projections == 2000
    args = LEAVES["bench"].parse_args(["--shape", "B=1e3,d=1_000"])
    assert args.shape == {"B": 1000, "d": 1000}
    assert LEAVES["sae steer"].parse_args(["x", "--feature", "1e2=5"]).feature == [(100, 5.0, False)]
    for wrong in (["bench", "--shape", "B=2.5"], ["sae", "steer", "x", "--feature", "2.5=1"]):
        with pytest.raises(SystemExit):
            cli.build_parser().parse_args(wrong)


def test_what_a_whole_number_is():
    assert [whole_number(t) for t in ("200", "-3", "2e6", "1_000", "1e0", "9007199254740993")] == [
        200, -3, 2_000_000, 1000, 1, 9007199254740993,
    ]  # fmt: skip
    for text in ("2.5", "1e-3", "inf", "", "two", "2e400"):
        with pytest.raises(ValueError, match="whole number"):
            whole_number(text)


def test_values_of_every_kind_of_field():
    assert read_value(Count | None, "2e2") == 200
    assert read_value(Share, "0.5") == 0.5
    assert read_value(float | Literal["median"], "median") == "median"
    assert read_value(float | Literal["median"], "2") == 2.0
    assert [read_value(bool, t) for t in ("1", "on", "0", "off")] == [True, True, False, False]
    assert read_value(str, "2") == "2"
    for kind, text in ((bool, "yes"), (Literal["a", "b"], "c"), (float | Literal["median"], "x"), (float, "x")):
        with pytest.raises(ValueError, match="expected"):
            read_value(kind, text)


@dataclasses.dataclass(frozen=True)
class Parent:
    loud: bool = True
    """say all"""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Child(Parent):
    rows: Count | None = 3
    """100 % of them (default: three)"""
    rate: Share | Literal["auto"] = "auto"
    bare: int = 0


def test_a_config_of_ones_own_with_a_parent_becomes_options():
    fields = settings_of(Child)
    assert {name: field.doc for name, field in fields.items()} == {
        "loud": "say all", "rows": "100 % of them (default: three)", "rate": "", "bare": "",
    }  # fmt: skip
    parser = argparse.ArgumentParser()
    Options(Child, names={"rows": "how-many"}, leave=("bare",)).add(parser)
    args = parser.parse_args(["--no-loud", "--how-many", "7", "--rate", "0.5"])
    assert args.options.read(args) == Child(False, 7, 0.5)
    assert "100 % of them (default: three)" in parser.format_help()
    for wrong, says in (
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"rate": 2.0}, "rate must be in (0, 1] or one of ('auto',), got 2.0"),
        ({"rate": float("nan")}, "got nan"),
        ({"rate": "slow"}, "got 'slow'"),
    ):
        with pytest.raises(SettingError) as found:
            Child(**wrong)
        assert says in str(found.value)
        assert str(found.value).startswith("Child: ")
    assert Child(rows=None).rows is None


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["sae", "train", "--out", "x", "--l1", "-1"], "--l1 must be finite and at least 0, got -1.0"),
        (["sae", "train", "--out", "x", "--train-tokens", "0"], "--train-tokens must be at least 1, got 0"),
        (["sae", "train", "--out", "x", "--batch-size", "1"], "--batch-size must be at least 2"),
        (["finetune", "--data", "x", "--out", "x", "--crop", "0"], "--crop must be in (0, 1], got 0.0"),
        (["finetune", "--data", "x", "--out", "x", "--lr", "-1"], "--lr must be positive and finite, got -1.0"),
        (["train", "--out", "x", "--loss", "clip", "--learn-temperature", "--temperature", "0.001"],
         "--temperature must be at least 0.01 where it is learnt, got 0.001"),
        (["cil", "--data", "emoji", "--out", "x", "--rank", "0"], "--rank must be at least 1, got 0"),
        (["cil", "--data", "emoji", "--out", "x", "--strategy", "macil:sigma=-1"],
         "sigma must be positive and finite or one of ('median',), got -1.0"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_named_as_it_was_typed(args, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *args)
    assert code == 2
    assert f"clipsteer: error: {says}" in err
    assert "Config" not in err
    assert not list(tmp_path.iterdir())


def test_what_the_user_of_cil_gives_goes_before_the_recipe_and_after_the_strategy():
    from clipsteer.cli.cil_settings import EMOJI, EMOJI_RATES, configs_of

    def configs(*more):
        args = cli.build_parser().parse_args(["cil", "--data", "emoji", "--out", "x", "--seeds", "1", *more])
        return configs_of(args, ["macil", "slca:lr=0.5,rank=2"])

    (macil, slca), notes = configs()
    assert (macil.lr, slca.lr, slca.rank) == (EMOJI_RATES["macil"], 0.5, 2)
    assert {name: getattr(macil, name) for name in EMOJI} == EMOJI
    assert notes == {"settings": EMOJI, "learning rates": EMOJI_RATES}
    (macil, slca), notes = configs("--lr", "0.2", "--epochs", "10", "--rank", "4", "--momentum", "0.5")
    assert (macil.lr, slca.lr, macil.epochs, macil.rank, slca.rank) == (0.2, 0.5, 10, 4, 2)
    assert notes == {"settings": {**EMOJI, "epochs": 10, "lr": 0.2, "rank": 4, "momentum": 0.5}}


def test_the_papers_recipe_is_that_of_its_authors():
    from clipsteer.cli.cil_settings import configs_of
    from clipsteer.continual.strategies import PAPER, PAPER_SEEDS

    def configs(*more):
        args = cli.build_parser().parse_args(["cil", "--data", "photos", "--out", "x", *more])
        return configs_of(args, ["macil"])[0]

    published = {"weight_decay": 0.0, "schedule": "epoch", "sigma": 1.0, "first_epochs": 20, "epochs": 10,
                 "batch_size": 48, "rank": 32, "lr": 0.01, "momentum": 0.9, "align_epochs": 5, "align_samples": 256,
                 "align_lr": 0.01, "distill": 0.4, "covariance": 1.0}  # fmt: skip
    found = configs("--recipe", "paper")
    assert [config.seed for config in found] == [1993, 1996, 1997] == list(PAPER_SEEDS)
    for config in found:
        assert {name: getattr(config, name) for name in published} == published
        assert PAPER.items() <= vars(config).items()
    assert [config.seed for config in configs("--recipe", "paper", "--seeds", "5")] == [1993, 1996, 1997, 1998, 1999]
    assert configs("--recipe", "paper", "--weight-decay", "0.1", "--schedule", "step")[0].weight_decay == 0.1
    # without it a folder keeps what it had
    plain = configs()
    assert [config.seed for config in plain] == [1993, 1994, 1995]
    assert (plain[0].weight_decay, plain[0].schedule, plain[0].sigma, plain[0].epochs) == (5e-4, "step", "median", 10)


def test_help_of_every_command_is_free_of_torch():
    code = f"""
import io, sys
from contextlib import redirect_stdout
from clipsteer.cli.main import main
for words in {[words.split() for words in LEAVES] + [[]]!r}:
    with redirect_stdout(io.StringIO()) as out:
        try:
            main([*words, "--help"])
        except SystemExit as stop:
            assert stop.code == 0
    assert "usage: clipsteer" in out.getvalue()
    heavy = {{"torch", "numpy", "open_clip", "PIL", "triton"}} & set(sys.modules)
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
