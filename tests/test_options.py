"""Options: defaults and --help, values that are refused, recipes, and messages of one short line."""

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime import options
from runtime.options import ROOT, Args, changeable, option, parse, shown, value_at

GROUPS = ("model", "data", "play", "optimisation", "run")
NAMES = [field.name for field in dataclasses.fields(Args)]
MINE = ["--model", "m", "--data", "d"]  # keeps the default recipe out


@dataclass(frozen=True)
class MoreArgs(Args):
    """As family.py does: a script with options of its own."""

    loss: str = option("logistic", "Loss of a pair.", choices=("logistic", "ipo"), group="play", changeable=True)
    alpha: float = option(0.0, "Share of the start, 100% at most.", check=lambda x: 0 <= x <= 1, expected="in [0, 1]")

    def check_together(self):
        super().check_together()
        self.require("alpha", not self.alpha or self.loss == "ipo", "--loss ipo with it")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, for recipes with short names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(script, argv, args_class=Args) -> str:
    with pytest.raises(ValueError) as caught:
        parse(script, argv, args_class)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400, message
    return message


def help_of(script, capsys, args_class=Args) -> str:
    with pytest.raises(SystemExit) as done:
        parse(script, ["--help"], args_class, about="What it does.")
    assert done.value.code == 0
    return capsys.readouterr().out


def sections(text: str) -> dict[str, list[str]]:
    """The options in --help, each with its help text on one line, by the title of their group."""
    groups = re.split(r"\n\n(\w+):\n  (?=-)", text)
    return {
        title: [" ".join(entry.split()) for entry in re.split(r"\n  (?=--)", entries)]
        for title, entries in zip(groups[1::2], groups[2::2])
    }


# ---------------------------------------------------------------- definitions and --help


def test_every_option_has_a_help_text_a_script_and_a_default_that_passes_its_check():
    Args()
    for field in dataclasses.fields(Args):
        assert field.metadata["help"].endswith(".") and field.metadata["scripts"], field.name
        assert field.default is not dataclasses.MISSING and field.type in options.KINDS, field.name
        assert bool(field.metadata["check"]) == bool(field.metadata["expected"]), field.name
        assert options.checked(field, field.default) == field.default


@pytest.mark.parametrize("script", options.SCRIPTS)
def test_help_shows_the_options_of_the_script_in_their_groups_with_defaults(script, capsys):
    text = help_of(script, capsys)
    assert text.startswith(f"usage: {script}.py") and "What it does." in text
    found = sections(text)
    assert tuple(found) == ("options", *GROUPS)
    entries = [entry for title in GROUPS for entry in found[title]]
    assert all(entry.endswith("]") for entry in entries), "the default"
    offered = [f.name for f in dataclasses.fields(Args) if script in f.metadata["scripts"]]
    assert [entry.split()[0] for entry in entries] == [options.flag_of(name) for name in offered]
    for title, flag in zip(GROUPS, ("--rank N ", "--template TEXT ", "--iterations N ", "--lr X,... ", "--seed N ")):
        assert any(entry.startswith(flag) for entry in found[title])
    assert found["optimisation"][0] == "--optimizer {adamw,rmsprop} The optimizer; the paper uses rmsprop. [adamw]"
    defaults = {entry.split()[0]: entry.rpartition(". [")[2] for entry in entries}
    assert defaults["--lr"] == "5e-05]" and defaults["--dry-run"] == "off]" and defaults["--model"] == "none]"
    assert defaults["--template"] == "auto]" and defaults["--prompts"] == "0]" and defaults["--data"] == "none]"


def test_repeated_data_adds_and_commas_are_part_of_a_path():
    args = parse("spin", [*MINE, "--data", "a,b", "--data=c", "--eval-data", "e", "--fields", "prompt=q,response=a"])
    assert (args.data, args.eval_data, args.fields) == (("d", "a,b", "c"), ("e",), ("prompt=q", "response=a"))
    assert Args(data="a").data == Args(data=Path("a")).data == Args(data=["a"]).data == ("a",) and Args().data == ()


def test_help_of_a_script_with_more_options_shows_them_in_the_group_they_name(capsys):
    play = sections(help_of("family", capsys, MoreArgs))["play"]
    assert "--loss {logistic,ipo} Loss of a pair. [logistic]" in play
    assert "--alpha X Share of the start, 100% at most. [0.0]" in play and play[0].startswith("--iterations")


def test_each_script_offers_its_own_options():
    offered = {
        script: {f.name for f in dataclasses.fields(Args) if script in f.metadata["scripts"]}
        for script in options.SCRIPTS
    }
    assert offered["spin"] == offered["family"] == set(NAMES) - {"from_scratch"}
    self_play = {"beta", "mix_previous", "temperature", "top_k", "top_p", "unfinished"}
    assert offered["sft"] == set(NAMES) - self_play
    assert offered["seft"] == set(NAMES) - {"from_scratch", "beta", "mix_previous", "unfinished"}


def test_a_resumed_run_may_change_where_and_how_fast_it_computes_and_nothing_else():
    assert set(changeable(Args)) == {
        "model", "adapter", "data", "eval_data", "out", "device", "gen_batch", "gen_tokens", "micro_tokens",
        "checkpoint", "best", "save_minutes", "dry_run", "fsdp", "metric", "log",
    }  # fmt: skip
    assert set(changeable(MoreArgs)) == {*changeable(Args), "loss"}


def test_the_flags_of_family_are_those_that_its_message_is_given_for():
    import family

    own = {field.name for field in dataclasses.fields(family.FamilyArgs)} - set(NAMES)
    assert {options.flag_of(name) for name in own} == set(options.FAMILY_FLAGS)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"lr": 1e-3}, (1e-3,)), ({"lr": 1}, (1.0,)), ({"lr": [1e-3, 1e-4, 1e-5]}, (1e-3, 1e-4, 1e-5)),
        ({"lr": 1e3}, (1e3,)), ({"beta": 5}, (5.0,)), ({"epochs": 10**6}, (10**6,)), ({"clip": math.inf}, math.inf),
        ({"lora_targets": "c_fc"}, ("c_fc",)), ({"temperature": 0}, 0.0), ({"seed": -1}, -1), ({"clip": 1}, 1.0),
        ({"template": "a {prompt} {prompt}"}, "a {prompt} {prompt}"), ({"device": "cuda:99"}, "cuda:99"),
        ({"seed": 2**31 - 1}, 2**31 - 1),
    ],
)  # fmt: skip
def test_values_from_python_are_normalised(given, expected):
    ((name, _),) = given.items()
    value = getattr(Args(**given), name)
    assert value == expected and type(value) is type(expected)


WRONG = [
    # numbers that are none, or out of range
    *((name, text, "an integer") for name in ("rank", "batch", "seed") for text in ("x", "1.5", "", "1e3", "9" * 5000)),
    *((name, str(2**31), "less than 2^31") for name in ("rank", "batch", "seed", "top_k", "gen_batch", "prompts")),
    *((name, text, "a number") for name in ("clip", "warmup", "temperature") for text in ("x", "", "1,2", "0x1")),
    *((name, text, "comma-separated numbers") for name in ("lr", "beta") for text in ("x", "", "1,", "1;2", "[1]")),
    *(("epochs", text, "comma-separated integers") for text in ("x", "1.5", "1,,2")),
    *((name, "nan", "") for name, kind in Args.__annotations__.items() if kind in (float, tuple[float, ...])),
    *((name, "inf", "") for name in ("lr", "beta", "temperature", "weight_decay", "save_minutes", "lora_alpha")),
    *((name, "-1", "0 or more") for name in ("rank", "eval_limit", "prompts", "top_k", "micro_tokens", "weight_decay")),
    *((name, "0", "1 or more") for name in ("iterations", "max_new_tokens", "gen_batch", "gen_tokens", "batch")),
    *((name, "0", "positive") for name in ("lr", "beta", "lora_alpha")), ("clip", "0", "above 0"),
    *((name, "1", "") for name in ("eval_share", "lora_dropout")), ("eval_share", "0", "between 0 and 1"),
    ("lr", "1e38", "up to 1000"), ("lr", "1000.1", "up to 1000"), ("epochs", "1000001", "1 to 1,000,000"),
    ("temperature", "1e-9", "0 or at least 0.001"), ("top_p", "0", "in (0, 1]"), ("warmup", "2", "in [0, 1]"),
    # one value, or one per iteration
    *((name, "1,1", "1 value, or one for each of 3 iterations") for name in ("lr", "beta", "epochs")),
    # text
    *((name, text, "one of ") for name in ("overlong", "unfinished", "optimizer", "precision", "best")
      for text in ("", "x", "KEEP", "\0")),
    *(("device", text, "auto, cpu, cuda or cuda:N")
      for text in ("", "tpu", "cuda:", "cuda:100", "cuda:00", "cuda:\u0663", "cuda:999999", "CPU", "cpu\0", " cpu")),
    *(("template", text, "{prompt}") for text in ("", "no slot", "{prompt", "\udcff{prompt}")),
    *(("out", text, "a printable path in UTF-8") for text in ("\udcff", "a\0b")), ("lora_targets", "c_fc,", "names"),
]  # fmt: skip


@pytest.mark.parametrize("name, text, expected", WRONG)
def test_wrong_values_are_refused_with_flag_value_and_what_is_expected(name, text, expected):
    flag = options.flag_of(name)
    message = refusal("spin", [*MINE, f"{flag}={text}"])
    assert message.startswith(f"{flag} ") and ": expected " in message and expected in message


@pytest.mark.parametrize(
    "given",
    [
        {"lr": "x"}, {"lr": ()}, {"lr": None}, {"lr": (1e-3, "x")}, {"lr": 10**400}, {"rank": "8"}, {"rank": 8.0},
        {"rank": True}, {"rank": (8,)}, {"checkpoint": 1}, {"model": None}, {"model": b"x"}, {"epochs": 1.0},
        {"clip": True}, {"lora_targets": 3}, {"seed": -(2**31)}, {"lr": (1e-3, 1e-4)},
    ],
)  # fmt: skip
def test_wrong_values_from_python_are_refused_by_the_name_of_the_option(given):
    ((name, _),) = given.items()
    with pytest.raises(ValueError, match=f"^{options.flag_of(name)} .*: expected "):
        Args(**given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"adapter": "a", "rank": 0}, "--adapter a: expected no --rank 0 or --from-scratch"),
        ({"adapter": "a", "from_scratch": True}, "--adapter a: expected no --rank 0 or --from-scratch"),
        ({"from_scratch": True}, "--rank 16: expected 0 with --from-scratch"),
        ({"alpha": 0.5}, "--alpha 0.5: expected --loss ipo with it"),
        ({"alpha": 2.0}, "--alpha 2.0: expected in [0, 1]"),
        ({"loss": "x"}, "--loss x: expected one of logistic, ipo"),
        ({"lr": (1.0, 2.0)}, "--lr 1.0,2.0: expected 1 value, or one for each of 3 iterations"),
    ],
)
def test_a_script_with_more_options_keeps_the_checks_of_several_options_and_adds_its_own(given, message):
    with pytest.raises(ValueError) as caught:
        MoreArgs(**given)
    assert str(caught.value).startswith(message)


def test_value_at_gives_the_one_value_or_that_of_the_iteration():
    assert [value_at((7,), t) for t in range(3)] == [7, 7, 7]
    assert [value_at((7, 8, 9), t) for t in range(3)] == [7, 8, 9]


@pytest.mark.parametrize("value", ["x" * 10**5, "\0" * 10**4, 10**4000, ["\n"] * 1000])
def test_shown_values_are_short_and_printable(value):
    assert len(shown(value)) <= 100 and shown(value).isprintable() and "..." in shown(value)


def test_shown_values_keep_their_beginning_and_end():
    assert shown("a\n\x1b[2J\u202e\udcffb") == r"a\n\x1b[2J\u202e\udcffb"
    assert shown("x" * 100) == "x" * 100
    assert shown("/begin/" + "x" * 200 + "/end").startswith("/begin/xx") and shown("x" * 200 + "/end").endswith("x/end")


# ---------------------------------------------------------------- the command line


def test_flags_are_read_in_both_forms():
    argv = ["--model=a=b", "--data", "d", "--lr", "1e-3,1e-4", "--iterations=2", "--checkpoint", "--seed", "-1"]
    args = parse("spin", [*argv, "--lora-targets=c_fc,c_proj", "--template", "{prompt} --x"])
    expected = dict(model="a=b", data="d", lr=(1e-3, 1e-4), iterations=2, checkpoint=True, seed=-1)
    assert args == Args(**expected, lora_targets=("c_fc", "c_proj"), template="{prompt} --x")
    assert parse("family", [*MINE, "--loss", "ipo"], MoreArgs) == MoreArgs(model="m", data="d", loss="ipo")


@pytest.mark.parametrize(
    "script, argv, message",
    [
        ("spin", ["--temprature", "1"], "--temprature: no such option; did you mean --temperature?"),
        ("spin", ["--gen_batch=1"], "--gen_batch: no such option; did you mean --gen-batch?"),
        ("spin", ["--LR=1"], "--LR: no such option; did you mean --lr?"),
        ("spin", ["--x"], "--x: no such option; --help lists all"),
        ("spin", ["--mod", "m"], "--mod: no such option; did you mean --model?"),
        ("spin", ["--", "--lr", "1"], "--: no such option; --help lists all"),
        ("spin", ["--a\nb"], r"--a\nb: no such option; --help lists all"),
        ("sft", ["--beta", "1"], "--beta: an option of self-play only (spin.py, family.py)"),
        ("sft", ["--mix-previous"], "--mix-previous: an option of self-play only (spin.py, family.py)"),
        ("spin", ["--from-scratch"], "--from-scratch: an option of sft.py only"),
        ("family", ["--from-scratch"], "--from-scratch: an option of sft.py only"),
        *(("spin", [flag], f"{flag}: an option of family.py") for flag in options.FAMILY_FLAGS),
        ("sft", ["--temperature", "1"], "--temperature: an option of spin.py, family.py, seft.py only"),
        ("seft", ["--beta", "1"], "--beta: an option of self-play only (spin.py, family.py)"),
        ("sft", ["--loss=ipo"], "--loss: an option of family.py"),
        ("spin", ["sft"], "sft: supervised fine-tuning is a script of its own, python sft.py"),
        ("spin", ["spin"], "word 'spin': expected flags that begin with --, or @RECIPE"),
        ("spin", ["a=b"], "word 'a=b': expected flags that begin with --, or @RECIPE"),
        ("spin", ["-x"], "word '-x': expected flags that begin with --, or @RECIPE"),
        ("spin", [""], "word '': expected flags that begin with --, or @RECIPE"),
        ("spin", ["--lr", "1", "2"], "word '2': expected flags that begin with --, or @RECIPE"),
        ("spin", ["--mix-previous", "yes"], "word 'yes': expected flags that begin with --, or @RECIPE"),
        ("spin", ["--checkpoint=1"], "--checkpoint 1: expected no value"),
        ("spin", ["--lr"], "--lr: expected a value"),
        ("spin", ["--lr", "--rank", "1"], "--lr: expected a value"),
        ("spin", ["--out", "@x"], "--out: expected a value"),
        ("spin", ["--model", "a"], "--model is given twice: expected one value"),
        ("spin", ["--fields", "x=y"], "--fields x=y: expected NAME=FIELD with NAME one of "
         "prompt, response, system, messages, references, generated, wins"),
        ("spin", ["--checkpoint", "--checkpoint"], "--checkpoint is given twice: expected one value"),
        ("spin", ["--adapter", "a", "--rank", "8"], "--rank 8: --adapter brings its own rank; give one of the two"),
        ("spin", ["--lora-alpha=1", "--adapter=a"],
         "--lora-alpha 1.0: --adapter brings its own alpha; give one of the two"),
        ("sft", ["--adapter=a", "--lora-targets=x,y"],
         "--lora-targets x,y: --adapter brings its own target layers; give one of the two"),
        ("sft", ["--adapter=a", "--lora-dropout=0"],
         "--lora-dropout 0.0: --adapter brings its own dropout; give one of the two"),
    ],
)  # fmt: skip
def test_command_lines_that_are_refused(script, argv, message):
    assert refusal(script, [*MINE, *argv]) == message


def test_an_adapter_is_fine_where_no_flag_contradicts_it():
    assert parse("spin", [*MINE, "--adapter", "a"]).rank == 16
    assert parse("spin", [*MINE, "--adapter=", "--rank", "8"]).rank == 8


@pytest.mark.parametrize(
    "argv",
    [["--" + "x" * 10**5], ["x" * 10**5], ["--lr", "x" * 10**5], ["--best", "\x1b" * 10**4], ["@" + "x" * 10**5],
     ["--lora-targets", "a," * 10**5], ["--template", "\u202e" * 10**4]],
)  # fmt: skip
def test_messages_do_not_grow_with_the_input(argv):
    refusal("spin", [*MINE, *argv])


# ---------------------------------------------------------------- recipes


def test_scripts_without_flags_read_their_default_recipe():
    recipes = ROOT / "recipes"
    assert parse("spin", []) == parse("family", []) == parse("spin", [f"@{recipes}/pronounce.args"])
    assert parse("sft", []) == parse("sft", [f"@{recipes}/pronounce-sft.args"])
    assert parse("family", [], MoreArgs).model == parse("spin", []).model == str(ROOT / "pronounce/start")
    assert parse("spin", ["--seed", "1"]) == dataclasses.replace(parse("spin", []), seed=1)


@pytest.mark.parametrize("argv", [["--model", "m"], ["--data=d"], ["@empty.args"]])
def test_a_model_data_or_recipe_replaces_the_default_recipe(argv, folder):
    (folder / "empty.args").write_text("")
    assert parse("spin", argv).max_new_tokens == Args().max_new_tokens


def test_published_recipe_has_the_published_values():
    args = parse("spin", [f"@{ROOT}/recipes/paper.args", *MINE])
    assert args.lr == (5e-7, 5e-7, 1e-7, 1e-7) and args.beta == (0.1, 0.1, 0.1, 5.0) and args.epochs == (2,)
    assert args.optimizer == "rmsprop" and args.rank == 0 and args.batch == 64 and args.mix_previous
    assert args.iterations == 4 and args.warmup == 0.1 and args.weight_decay == 0 and args.precision == "bf16"
    assert args.prompts == 50000 and args.max_new_tokens == 256 and args.model == "m"


def test_the_recipes_of_the_embedded_task_hold_out_the_same_words():
    """The start, the default run and its supervised rival are then all evaluated on words that none was trained on."""
    scripts = {"pronounce-sft": "sft", "pronounce": "spin", "pronounce-continue": "sft"}
    parsed = [parse(script, [f"@{ROOT}/recipes/{name}.args"]) for name, script in scripts.items()]
    assert len({(a.eval_share, a.data, a.template, a.eval_data) for a in parsed}) == 1


def test_recipes_work_in_a_folder_with_a_space(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "ROOT", tmp_path / "a b")
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/recipes").symlink_to(ROOT / "recipes")
    assert parse("spin", []).model == f"{tmp_path}/a b/pronounce/start"


def test_flags_override_recipes_and_later_recipes_earlier_ones(folder):
    (folder / "a").write_text("--seed 1 --rank 1 --batch 1 # a comment\n\n--template '# {prompt}'\r\n")
    (folder / "b").write_text("--rank 2 @a --batch\n2")
    assert parse("spin", ["@a", "--seed", "9"]).seed == parse("spin", ["--seed", "9", "@a"]).seed == 9
    nested = parse("spin", ["@b"])
    assert (nested.seed, nested.rank, nested.batch, nested.template) == (1, 2, 2, "# {prompt}")
    assert parse("spin", ["@b", "@a"]).rank == 1 and parse("spin", ["@a", "@b"]).rank == 2
    args = parse("spin", [f"@{ROOT}/recipes/pronounce.args", "--seed", "1", "--rank", "8"])
    assert args.seed == 1 and args.rank == 8 and args.beta == (2.0,)


@pytest.mark.parametrize(
    "content, message",
    [
        ("--seed 1\n\n--lerning-rate 1", "x.args:3: --lerning-rate: no such option; "),
        ("# comment\n--lr x", "x.args:2: --lr x: expected comma-separated numbers"),
        ("--seed 1\n--top-p 2", "x.args:2: --top-p 2.0: expected in (0, 1]"),
        ("--seed 1\n--model \"x", "x.args:2: no closing quotation"),
        ("--lr \\", "x.args:1: no escaped character"),
        ("--seed 1\n--batch 2 --seed 2", "x.args:2: --seed is given twice: expected one value"),
        ("--from-scratch", "x.args:1: --from-scratch: an option of sft.py only"),
        ("--loss ipo", "x.args:1: --loss: an option of family.py"),
        ("\nsft", "x.args:2: sft: supervised fine-tuning is a script of its own, python sft.py"),
        ("--lr", "x.args:1: --lr: expected a value"),
        ("\ufeff--lr 1", r"x.args:1: word '\ufeff--lr': expected flags"),
        ("--help", "x.args:1: --help: no such option"),
        ("--adapter a\n--rank 8", "x.args:2: --rank 8: --adapter brings its own rank; give one of the two"),
        ("@nope", "x.args:1: @nope: no such recipe; there are "),
        (b"\xff\xfe", "@x.args: not readable as UTF-8"),
        (b"\0", r"x.args:1: word '\x00': expected flags"),
    ],
)  # fmt: skip
def test_problems_in_recipes_are_told_with_file_and_line(content, message, folder):
    (folder / "x.args").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal("spin", ["@x.args"]).startswith(message)


def test_a_flag_of_the_command_line_may_contradict_an_adapter_of_a_recipe(folder):
    (folder / "x.args").write_text("--adapter a")
    assert refusal("spin", ["@x.args", "--rank=8"]) == "--rank 8: --adapter brings its own rank; give one of the two"
    assert refusal("spin", ["--adapter=a"]).endswith("--rank 0: --adapter brings its own rank; give one of the two")


def test_a_missing_recipe_is_answered_with_those_there_are(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = ("paper", "pronounce-continue", "pronounce-seft", "pronounce-sft", "pronounce")
    there = ", ".join(f"recipes/{name}.args" for name in names)
    for path in ("nope.args", "", "recipes/paper.args/x"):
        assert refusal("spin", [f"@{path}"]) == f"@{path}: no such recipe; there are {there}"
    for path in ("pronunce", "recipe/pronounce.arg", "/x/pronounce"):
        assert refusal("spin", [f"@{path}"]) == f"@{path}: no such recipe; did you mean @recipes/pronounce.args?"


def test_recipes_are_small_regular_files(folder):
    os.mkfifo(folder / "pipe")  # opening it would wait for ever
    for path in ("pipe", "/dev/zero", "."):
        assert refusal("spin", [f"@{path}"]) == f"@{path}: expected a regular file"
    with (folder / "huge").open("wb") as file:
        file.truncate(2**40)
    assert refusal("spin", ["@huge"]) == "@huge: expected a recipe of at most 64 KiB"
    assert refusal("spin", ["@a\0b"]) == r"@a\x00b: embedded null byte"


@pytest.mark.parametrize("loop", [["a"], ["a", "b"], ["a", "a a"], ["a", "b", "c"]])
def test_a_recipe_that_reads_itself_is_refused(loop, folder):
    for name, following in zip(loop, loop[1:] + loop[:1]):
        (folder / name[0]).write_text("\n".join(f"@./{other}" for other in following.split()))
    assert refusal("spin", ["@a"]).endswith("@./a: a recipe that reads itself, directly or through another")


def test_recipes_nest_eight_deep_and_no_deeper(folder):
    for i in range(9):
        (folder / f"r{i}").write_text(f"@r{i + 1}")
    (folder / "r9").write_text("--seed 5")
    assert parse("spin", ["@r2"]).seed == 5
    assert refusal("spin", ["@r1"]).endswith("r8:1: @r9: recipes nest deeper than 8")


def test_recipes_that_multiply_are_refused_soon(folder):
    """Eight files, each of which reads the next one a hundred times."""
    for i in range(8):
        (folder / f"r{i}").write_text(f"@r{i + 1} " * 100)
    (folder / "r8").write_text("--seed 1")
    assert refusal("spin", ["@r1"]).endswith("more than 1,000 flags and recipes")
