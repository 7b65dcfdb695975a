"""Options: defaults and --help, values that are refused, recipes, and messages of one short line."""

import dataclasses
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime import options
from runtime.options import ROOT, changeable, combined, parse, settings
from sft import SftOptions
from spin import SpinOptions, option

MINE = ["--model", "m"]  # Without a model, the default recipe would be read.
DEFAULT = dict(spin="pronounce.args", sft="pronounce-sft.args", seft="pronounce-seft.args")


@dataclass(frozen=True)
class MoreOptions(SpinOptions):
    """A method with options of its own, one of which depends on another."""

    loss: str = option("logistic", "Loss of a pair.", choices=("logistic", "ipo"), changeable=True)
    alpha: float = option(0.0, "Share of the start, 100% at most.", within="[0, 1]")
    weights: tuple[float, ...] = option((1.0,), "Weights.", within="[0, inf)")
    seed: int = option(7, "Another seed.")  # This seed replaces that of RunOptions.

    def check_together(self):
        super().check_together()
        self.require(not self.alpha or self.loss == "ipo", "--alpha requires --loss ipo")


ALL = [combined(cls) for cls in (SpinOptions, SftOptions, MoreOptions)]
Spin, Sft, More = ALL


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, for recipes with short names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(argv, options_class=Spin) -> str:
    with pytest.raises(ValueError) as caught:
        parse(options_class, argv, "spin.py")
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400, message
    return message


# ---------------------------------------------------------------- definitions and --help


@pytest.mark.parametrize("options_class", ALL)
def test_every_option_has_a_help_text_and_every_number_an_interval(options_class):
    options_class()
    for field in dataclasses.fields(options_class):
        kind, _ = options.kind_of(field)
        assert field.metadata["help"].endswith(".") and kind in options.KINDS, field.name
        assert kind not in (int, float) or "within" in field.metadata or field.name == "seed", field.name
        assert ("check" in field.metadata) == ("expected" in field.metadata), field.name


@pytest.mark.parametrize("options_class, own", [(Spin, "spin"), (Sft, "sft"), (More, "more")])
def test_help_shows_every_option_once_in_its_group_with_its_default(options_class, own, capsys):
    with pytest.raises(SystemExit) as done:
        parse(options_class, ["--help"], "spin.py", "What it does.")
    text = capsys.readouterr().out
    assert done.value.code == 0 and text.startswith("usage: spin.py [@RECIPE ...]") and "What it does." in text
    groups = re.split(r"\n\n(\w+):\n  (?=-)", text)[1:]
    assert {"model", "data", "run", "machine", "training", own} <= set(groups[::2])
    entries = [" ".join(entry.split()) for some in groups[3::2] for entry in re.split(r"\n  (?=--)", some)]
    assert [e.split()[0].strip(",") for e in entries] == list(map(options.flag_of, options_class.__dataclass_fields__))
    assert all(re.search(r"\. \[.+\]$|default: .+\.$", entry) for entry in entries), "the default"
    assert not any("default:" in entry and "[none]" in entry for entry in entries)
    assert "--optimizer {adamw,rmsprop} The optimizer; the paper uses rmsprop. [adamw]" in entries
    assert "--dry-run" in text and "[off]" in text and "[none]" in text and "[5e-05]" in text
    assert own != "more" or "--alpha X Share of the start, 100% at most. [0.0]" in entries


def test_a_resumed_run_may_change_where_and_how_fast_it_computes_and_nothing_else():
    assert set(changeable(Spin)) == {
        "model", "adapter", "data", "eval_data", "out", "device", "gen_batch", "gen_tokens", "micro_tokens",
        "checkpoint", "best", "save_minutes", "dry_run", "fsdp", "metric", "log",
    }  # fmt: skip
    assert set(changeable(More)) == {*changeable(Spin), "loss"}


def test_settings_are_those_that_decide_the_results_and_differ_from_the_defaults():
    args = Spin(model="m", out="x", rank=0, lr=1e-3, beta=1, mix_previous=True, template="a {prompt}", iterations=2)
    text = "--rank 0 --template 'a {prompt}' --iterations 2 --lr 0.001 0.001 --mix-previous"
    assert settings(args) == text and parse(Spin, [*MINE, "--out=x", *shlex.split(text)], "spin.py") == args


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"lr": 1e-3}, (1e-3,) * 3), ({"lr": 1}, (1.0,) * 3), ({"lr": [1e-3, 1e-4, 1e-5]}, (1e-3, 1e-4, 1e-5)),
        ({"lr": "1e3"}, (1e3,) * 3), ({"epochs": 10**6}, (10**6,) * 3), ({"weights": (1, 2, 3)}, (1.0, 2.0, 3.0)),
        ({"eval_temperatures": 1}, (1.0,)), ({"clip": math.inf}, math.inf), ({"temperature": 0}, 0.0),
        ({"lora_targets": "c_fc"}, ("c_fc",)), ({"seed": -1}, -1), ({"device": "cuda:99"}, "cuda:99"),
        ({"data": Path("a")}, ("a",)), ({"data": ["a", "b,c"]}, ("a", "b,c")), ({"data": ()}, ()),
    ],
)  # fmt: skip
def test_values_from_python_are_normalised_and_options_of_the_method_have_one_per_iteration(given, expected):
    ((name, _),) = given.items()
    value = getattr(More(**given), name)
    assert value == expected and list(map(type, [value])) == list(map(type, [expected]))
    again = dataclasses.replace(More(**given), seed=7)
    assert getattr(again, name) == (7 if name == "seed" else expected)


WRONG = [
    *((name, text, "an integer") for name in ("rank", "batch", "seed") for text in ("x", "1.5", "", "1e3", "9" * 5000)),
    *((name, text, "a number") for name in ("clip", "warmup", "lr", "beta") for text in ("x", "", "1,2", "0x1", "nan")),
    *((name, "inf", "inf)") for name in ("lr", "temperature", "weight_decay", "save_minutes") if name != "lr"),
    *((name, "-1", "[0, inf)") for name in ("rank", "eval_limit", "prompts", "top_k", "micro_tokens", "weight_decay")),
    *((name, "0", "[1, ") for name in ("iterations", "max_new_tokens", "gen_batch", "gen_tokens", "batch", "epochs")),
    *((name, "0", "(0, ") for name in ("lr", "beta", "lora_alpha", "clip", "eval_share", "top_p")),
    ("lr", "1000.1", "a number in (0, 1000]"), ("lora_dropout", "1", "[0, 1)"), ("warmup", "2", "[0, 1]"),
    ("temperature", "1e-9", "0 or a number in [0.001, inf)"),
    *((name, "1 1", "1 value, or one for each of 3 iterations") for name in ("lr", "beta", "epochs")),
    *((name, text, "one of ") for name in ("overlong", "unfinished", "best") for text in ("", "x", "KEEP")),
    *(("device", text, "cuda:N") for text in ("", "tpu", "cuda:", "cuda:100", "cuda:\u0663", "CPU", " cpu")),
    *(("template", text, "{prompt}") for text in ("", "no slot", "{prompt", "\udcff{prompt}")),
    ("out", "\udcff", "a printable path"), ("out", "a\nb", "a printable path"), ("eos", "\udcff", "text in UTF-8"),
    ("fields", "prompt=q x=y", "NAME=FIELD with NAME one of prompt, response"), ("metric", "exact len", "FILE.py:NAME"),
]  # fmt: skip


@pytest.mark.parametrize("name, text, expected", WRONG)
def test_wrong_values_are_refused_with_flag_value_and_what_is_expected(name, text, expected):
    flag = options.flag_of(name)
    several = name in ("lr", "beta", "epochs", "fields", "metric") and " " in text
    message = refusal([*MINE, flag, *text.split()] if several else [*MINE, f"{flag}={text}"])
    assert message.startswith(f"{flag} ") and ": expected " in message and expected in message


@pytest.mark.parametrize(
    "options_class, given, message",
    [
        (Spin, {"adapter": "a", "rank": 0}, "--adapter requires a --rank above 0"),
        (Spin, {"fsdp": True}, "--fsdp requires --rank 0: "),
        (Sft, {"from_scratch": True}, "--from-scratch requires --rank 0: "),
        (More, {"alpha": 0.5}, "--alpha requires --loss ipo"),
        (More, {"alpha": 2}, "--alpha 2: expected a number in [0, 1]"),
        (More, {"best": "greedy_f"}, "--best greedy_f: expected one of greedy, sampled, "),
    ],
)
def test_options_are_checked_against_each_other_by_the_machinery_and_by_the_method(options_class, given, message):
    with pytest.raises(ValueError) as caught:
        options_class(**given)
    assert str(caught.value).startswith(message)
    assert More(best="greedy_f", metric="a.py:f", alpha=1, loss="ipo").best == "greedy_f"


# ---------------------------------------------------------------- the command line


def test_flags_are_read_in_both_forms_and_lists_are_separated_by_spaces():
    argv = shlex.split(
        "--model=a=b --data d 'e,f' --lr 1e-3 1e-4 --iterations=2 --checkpoint --no-dropout --seed -1 "
        "--template '--x {prompt}' --fields prompt=q response=a --lora-targets=c_fc"
    )
    given = dict(model="a=b", data=("d", "e,f"), lr=(1e-3, 1e-4), iterations=2, checkpoint=True, seed=-1)
    more = dict(template="--x {prompt}", fields=("prompt=q", "response=a"), lora_targets="c_fc")
    assert parse(Spin, argv, "spin.py") == Spin(**given, **more)


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--temprature 1", "--temprature: no such option; did you mean --temperature?"),
        ("--gen_batch=1", "--gen_batch: no such option; did you mean --gen-batch?"),
        ("--mod m", "--mod: no such option; did you mean --model?"),
        ("--xyz", "--xyz: no such option; --help lists all"),
        ("'--a\nb'", r"--a\nb: no such option; --help lists all"),
        ("--from-scratch", "--from-scratch: no such option"),
        ("sft", "'sft': expected flags that begin with --, or @RECIPE"),
        ("--mix-previous yes", "'yes': expected flags that begin with --, or @RECIPE"),
        ("-x", "'-x': expected flags that begin with --, or @RECIPE"),
        ("--lr", "--lr: expected at least one argument"),
        ("--seed --lr 1", "--seed: expected one argument"),
        ("--adapter a --rank 8", "--rank: --adapter has settings of its own; give only one of the two"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused(argv, message):
    assert refusal(MINE + shlex.split(argv)).startswith(message)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", [recipe.name for recipe in (ROOT / "recipes").glob("*.args")])
def test_every_recipe_is_valid_and_names_the_files_of_this_project(name):
    path = ROOT / "recipes" / name
    words = shlex.split(path.read_text(), comments=True)
    assert words and all(len(line) <= 120 for line in path.read_text().splitlines())
    if "--revise-template" not in words:  # an option of examples/seft.py
        options_class = Sft if "--from-scratch" in words or "continue" in name else Spin
        args = parse(options_class, [f"@{path}"], "spin.py")
        hub = args.model in ("alignment-handbook/zephyr-7b-sft-full", "Qwen/Qwen3-0.6B")
        assert all(Path(file).is_file() for file in args.data) and (not args.model or hub or Path(args.model).is_dir())


@pytest.mark.parametrize("options_class, script", [(Spin, "spin"), (Sft, "sft")])
def test_without_model_data_or_recipe_the_default_recipe_is_read_and_flags_override_it(options_class, script):
    recipe = DEFAULT[script]
    read = parse(options_class, [f"@{ROOT / 'recipes' / recipe}"], "spin.py")
    assert parse(options_class, [], "spin.py", recipe=recipe) == read
    assert parse(options_class, ["--seed=3"], "spin.py", recipe=recipe) == dataclasses.replace(read, seed=3)
    for argv in (["--model", "m"], ["--model=m"], ["--data", "d"]):
        assert parse(options_class, argv, "spin.py", recipe=recipe).max_new_tokens == 256


def test_the_paper_has_its_values_per_iteration():
    args = parse(Spin, [f"@{ROOT / 'recipes/paper.args'}"], "spin.py")
    assert args.lr == (5e-7, 5e-7, 1e-7, 1e-7) and args.beta == (0.1, 0.1, 0.1, 5.0) and args.epochs == (2,) * 4
    assert (args.rank, args.optimizer, args.mix_previous, args.precision) == (0, "rmsprop", True, "bf16")
    assert args.temperature == 0 and args.max_new_tokens == 256


def test_a_flag_wins_over_recipes_wherever_it_stands_and_a_later_recipe_over_an_earlier_one(folder):
    Path("inner").write_text("--seed 1 --batch 1 --warmup 0.5 --checkpoint\n")
    Path("outer").write_text("@inner --seed 2 # a comment\n--out 'a b'\n--data $SPIN/x")
    Path("later").write_text("--batch 3")
    args = parse(Spin, ["--warmup", "1", "@outer", "@later", "--no-checkpoint"], "spin.py")
    assert (args.seed, args.batch, args.warmup, args.checkpoint) == (2, 3, 1.0, False)
    assert (args.out, args.data) == ("a b", (f"{ROOT}/x",))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"--sed 1", "--sed: no such option; did you mean --seed?"),
        (b"--template 'x", "@r: No closing quotation"),
        (b"--out \xff", "@r: 'utf-8' codec"),
        (b"--lr \\", "@r: No escaped character"),
        (b"@paper", "@paper: No such file or directory; expected a recipe"),
        (b"--seed 1 @r", "@r: this recipe reads itself"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(content, message, folder):
    Path("r").write_bytes(content)
    assert refusal(["@r"]).startswith(message)
