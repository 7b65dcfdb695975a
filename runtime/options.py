"""Every option, with its name, type, default, help text and check in one place; command lines and recipes.

A field of `Args` is an option: the field `gen_batch` is the flag `--gen-batch`. A recipe is a file of flags, read with
`@FILE`. A script with more options defines a subclass of `Args`. Every error is a ValueError of one line.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import shlex
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lora
from runtime.evaluate import SHIPPED, metrics_with

ROOT = Path(__file__).resolve().parents[1]  # $SPIN in recipes
DEFAULT_RECIPES = {
    "spin": "pronounce.args", "family": "pronounce.args", "sft": "pronounce-sft.args", "seft": "pronounce-seft.args",
}  # fmt: skip
SCRIPTS = ("spin", "sft", "family", "seft")
SELF_PLAY = ("spin", "family")
GENERATING = (*SELF_PLAY, "seft")  # train on generated responses
RECIPE_USAGE = "%(prog)s [@RECIPE ...] [--flag VALUE ...]"
FAMILY_FLAGS = (
    "--pairs", "--loss", "--mu", "--order", "--adaptive-order", "--historical", "--nll-weight", "--reference",
    "--alpha", "--samples", "--history", "--scorer", "--min-win", "--reinforce",
)  # fmt: skip
SEFT_FLAGS = ("--reviser", "--revise-template")
# Options that --adapter brings with its files, and what a message calls them.
ADAPTER_SETS = {"rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_targets": "target layers"}

# Sanity bounds: a value beyond them is a typing error.
MAX_LR = 1e3  # AdamW moves a weight by about lr per step, so even 1 destroys a model; 1e38 would overflow fp32.
MAX_EPOCHS = 10**6  # The steps of an iteration are counted before the first.
MAX_RECIPE_BYTES, MAX_RECIPE_DEPTH, MAX_FLAGS = 2**16, 8, 1000
MAX_SHOWN = 100  # characters of a value in a message

DEFAULT_TEMPLATE = r"### Instruction: {prompt}\n\n### Response: "
FIELD_NAMES = ("prompt", "response", "system", "messages", "references", "generated", "wins")  # of --fields

# By the type of a field: type of one value, metavar in --help, and what a message expects.
KINDS: dict[Any, tuple[type, str, str]] = {
    bool: (bool, "", "True or False"),
    int: (int, "N", "an integer"),
    float: (float, "X", "a number"),
    str: (str, "TEXT", "text"),
    tuple[int, ...]: (int, "N,...", "comma-separated integers"),
    tuple[float, ...]: (float, "X,...", "comma-separated numbers"),
    tuple[str, ...]: (str, "NAME,...", "comma-separated names"),
}


def option(
    default: Any,
    help: str,
    *,
    check: Callable[[Any], object] | None = None,
    expected: str = "",
    choices: Sequence[str] | None = None,
    scripts: tuple[str, ...] = SCRIPTS,
    changeable: bool = False,
    repeated: str = "",
    group: str = "",
) -> Any:
    """A field of `Args`.

    Args:
        check, expected: test of a value (of each value of a tuple), and what the message says where it fails.
        choices: the allowed values, in place of a check.
        scripts: the scripts that offer the flag.
        changeable: a resumed run may have another value. It changes where or how fast the run computes, and results
            by rounding alone. Files may move: their contents are compared, not their paths.
        repeated: what --help calls a value of a tuple, to which every occurrence of the flag adds one.
        group: heading in --help of this option and of those after it, up to the next `group`.
    """
    if choices:
        check, expected = choices.__contains__, f"one of {', '.join(choices)}"
    facts = dict(help=help, check=check, expected=expected, choices=choices, scripts=scripts, repeated=repeated)
    return dataclasses.field(default=default, metadata=facts | dict(changeable=changeable, group=group))


def valid(check: Callable[[Any], object], expected: str) -> dict[str, Any]:
    return dict(check=check, expected=expected)


def at_least(low: int) -> dict[str, Any]:
    return valid(lambda value: low <= value < math.inf, f"{low} or more")


POSITIVE = valid(lambda value: 0 < value < math.inf, "a positive number")


@dataclass(frozen=True)
class Args:
    """The options of spin.py and sft.py, which Args(lr=1e-3) sets from Python.

    Raises: ValueError naming the option whose value is not allowed; TypeError naming one that does not exist.
    """

    # fmt: off
    model: str = option("", "Initial model: directory or hub id, owner/name or owner/name@revision.", changeable=True,
                        group="model")
    from_scratch: bool = option(False, "Start from random weights; --model needs config.json and a tokenizer only.",
                                scripts=("sft",))
    eos: str = option("", "End token of responses, as text or id; default: eos_token_id in config.json.",
                      **valid(lambda text: is_utf8(text), "text in UTF-8, or an id"))
    adapter: str = option("", "Initial LoRA adapter on top of --model, in PEFT's layout.", changeable=True)
    rank: int = option(16, "Rank of the LoRA adapters; 0: train all parameters.", **at_least(0))
    lora_alpha: float = option(32.0, "The output of an adapter is scaled by lora_alpha / rank.", **POSITIVE)
    lora_dropout: float = option(0.0, "Dropout on the input of adapters.", **valid(lambda p: 0 <= p < 1, "in [0, 1)"))
    lora_targets: tuple[str, ...] = option(lora.DEFAULT_TARGETS, "Names of the linear layers that get an adapter.",
                                           **valid(bool, "comma-separated names"))

    data: tuple[str, ...] = option((), "Training data: a file, a directory or a hub data set; repeated, it adds.",
                                   changeable=True, repeated="PATH", group="data", **valid(bool, "a path"))
    fields: tuple[str, ...] = option((), "Names of fields in the data: prompt=question,response=answer.", **valid(
        lambda pair: re.fullmatch(rf"({'|'.join(FIELD_NAMES)})=.+", pair),
        f"NAME=FIELD with NAME one of {', '.join(FIELD_NAMES)}"))
    eval_data: tuple[str, ...] = option((), "Held-out data. Without it, a share of --data is held out.",
                                        changeable=True, repeated="PATH", **valid(bool, "a path"))
    eval_share: float = option(0.05, "Share of --data to hold out, chosen by a hash of the prompt.",
                               **valid(lambda share: 0 < share < 1, "between 0 and 1"))
    eval_limit: int = option(1000, "Number of held-out examples to evaluate on, at most; 0: all.", **at_least(0))
    eval_temperatures: tuple[float, ...] = option(
        (0.7, 0.85, 1.2), "Temperatures at which the start is sampled, too, so that iterates are compared with it at "
        "equal entropy; 1: no others.", **valid(lambda x: 1e-3 <= x < math.inf, "at least 0.001"))
    metric: tuple[str, ...] = option((), "Adds a held-out metric: FILE.py:NAME of f(prompt, response, references) -> "
                                     f"number, larger is better; or {', '.join(SHIPPED)}.", changeable=True,
                                     repeated="NAME", **valid(
        lambda name: name in SHIPPED or re.fullmatch(r".+\.py:\w+", name),
        f"FILE.py:NAME or one of {', '.join(SHIPPED)}"))
    template: str = option("auto", r"Prompt template: text with {prompt}, in which \n is a line break, or chat, the "
                           "tokenizer's own; auto: chat for messages where there is one, else "
                           f"'{DEFAULT_TEMPLATE}'.", **valid(
        lambda text: text in ("auto", "chat") or ("{prompt}" in text and is_utf8(text)),
        "auto, chat, or text in UTF-8 with {prompt}"))
    special_tokens: bool = option(False, "Special tokens in the text of prompts count; otherwise they are plain text.")
    overlong: str = option("error", "Examples longer than the context: stop with an error, or leave them out.",
                           choices=("error", "skip"))

    iterations: int = option(3, "Rounds of self-play, or of training and evaluation in sft.py.", **at_least(1),
                             group="play")
    prompts: int = option(0, "Examples per iteration, drawn afresh for each; 0: all.", **at_least(0))
    mix_previous: bool = option(False, "Train on the pairs of the previous iteration too.", scripts=SELF_PLAY)
    beta: tuple[float, ...] = option((1.0,), "Beta in Eq. 4.7, the paper's lambda; one value, or one per iteration.",
                                     scripts=SELF_PLAY, **POSITIVE)
    max_new_tokens: int = option(256, "Length limit of generated responses, in tokens.", **at_least(1))
    temperature: float = option(1.0, "Temperature of responses to train on; 0: greedy.", scripts=GENERATING,
                                **valid(lambda x: x == 0 or 1e-3 <= x < math.inf, "0 or at least 0.001"))
    top_k: int = option(0, "Sample them from the k likeliest tokens; 0: all.", scripts=GENERATING,
                        **at_least(0))
    top_p: float = option(1.0, "Sample them from the likeliest tokens with this total probability; 1: all.",
                          scripts=GENERATING, **valid(lambda p: 0 < p <= 1, "in (0, 1]"))
    unfinished: str = option("keep", "Generated responses at the length limit; cut shortens the real response too.",
                             choices=("keep", "drop", "cut"), scripts=SELF_PLAY)
    gen_batch: int = option(64, "Responses to generate together.", changeable=True, **at_least(1))
    gen_tokens: int = option(131072, "Size of the generation cache in tokens; reduces --gen-batch to fit.",
                             changeable=True, **at_least(1))

    optimizer: str = option("adamw", "The optimizer; the paper uses rmsprop.", choices=("adamw", "rmsprop"),
                            group="optimisation")
    lr: tuple[float, ...] = option((5e-5,), "Peak learning rate; one value, or one per iteration.",
                                   **valid(lambda lr: 0 < lr <= MAX_LR, f"a positive number up to {MAX_LR:g}"))
    epochs: tuple[int, ...] = option((2,), "Passes over the pairs or examples; one value, or one per iteration.",
                                     **valid(lambda n: 1 <= n <= MAX_EPOCHS, f"1 to {MAX_EPOCHS:,}"))
    warmup: float = option(0.1, "Share of steps with a rising learning rate; then it falls linearly to 0.",
                           **valid(lambda share: 0 <= share <= 1, "in [0, 1]"))
    dropout: bool = option(False, "Keep the dropout of the model's config.json in training: margins then begin noisy.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.", **at_least(0))
    clip: float = option(1.0, "Largest norm of the gradient; inf: no limit.", **valid(lambda x: x > 0, "above 0"))
    batch: int = option(64, "Pairs or examples per step.", **at_least(1))
    micro_tokens: int = option(0, "Tokens per forward pass, to limit memory; 0: 8192 on a GPU, else 2048.",
                               changeable=True, **at_least(0))
    checkpoint: bool = option(False, "Recompute activations in the backward pass: less memory, more time.",
                              changeable=True)

    out: str = option("runs/spin", "Folder for all files of the run; a stopped run in it is resumed.", changeable=True,
                      **valid(lambda path: is_utf8(path) and path.isprintable(), "a printable path in UTF-8"),
                      group="run")
    seed: int = option(0, "Seed of all random numbers.")
    device: str = option("auto", "cpu, cuda, cuda:N or auto; auto: a GPU if there is one.", changeable=True, **valid(
        lambda name: re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?", name), "auto, cpu, cuda or cuda:N"))
    fsdp: bool = option(False, "Cut weights, gradients and optimizer state over the ranks of torchrun while training, "
                        "for models that outgrow a device; with --rank 0.", changeable=True)
    shard: int = option(0, "Prompts that a rank takes at a time, the most that a killed run repeats; 0: 1/32 of them, "
                        "but 4 to 64 batches.", **at_least(0))
    precision: str = option("auto", "bf16, fp32 or auto; auto: bf16 on a GPU, else fp32.",
                            choices=("auto", "bf16", "fp32"))
    best: str = option("nll", "Held-out metric that selects the best iterate; greedy_NAME or sampled_NAME where NAME "
                       "is a function of --metric.", changeable=True)
    log: tuple[str, ...] = option((), "Log to TensorBoard or W&B, too: both are optional packages.", changeable=True,
                                  choices=("tensorboard", "wandb"))
    save_minutes: float = option(10.0, "Minutes of training between two checkpoints; 0: every step.", changeable=True,
                                 **at_least(0))
    dry_run: bool = option(False, "Check all inputs, print what the run would do and need, and write nothing.",
                           changeable=True)
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        self.check_together()

    def check_together(self) -> None:
        """Checks of several options together; a subclass extends it."""
        for name in ("beta", "lr", "epochs"):
            fits = len(getattr(self, name)) in (1, self.iterations)
            self.require(name, fits, f"1 value, or one for each of {self.iterations} iterations")
        metrics = metrics_with(self.metric)
        self.require("best", self.best in metrics, f"one of {', '.join(metrics)}")
        scratch = self.from_scratch
        self.require("adapter", not self.adapter or (self.rank and not scratch), "no --rank 0 or --from-scratch")
        self.require("fsdp", not (self.fsdp and self.rank), "--rank 0 with it; adapters need no cut")
        self.require(
            "rank", not (scratch and self.rank), "0 with --from-scratch; adapters on random weights learn little"
        )

    def require(self, name: str, condition: object, expected: str) -> None:
        if not condition:
            raise ValueError(f"{as_typed(name, getattr(self, name))}: expected {expected}")

    # What the runtime has to know about a method. A subclass overrides it.

    responses_per_prompt = 1  # generated in an iteration
    items_per_prompt = 1  # to train on
    generated_in_pair = 1  # responses of a pair beside the real one
    scoring_passes = 1  # over the pairs of an iteration, for the log-probabilities of its reference
    keeps_responses = False  # on disk, for later iterations
    swaps_weights = False  # the player's weights wait on disk while others take their place
    models = 1  # in memory together while responses are generated

    @property
    def source(self) -> tuple[str, tuple[str, ...], str]:
        """(option, files, layout) of the training data; see `load_examples`."""
        return "data", self.data, "responses"

    def digests(self) -> dict[str, str]:
        """sha256 of further input files, by option."""
        return {}

    def prepare(self, model: Any, examples: list[Any], run: Any) -> None:
        """Further checks, before anything is written; may leave out examples. Raises: ValueError."""


AnyArgs = TypeVar("AnyArgs", bound=Args)


def value_at(values: Sequence[Any], t: int) -> Any:
    """The value of iteration t, of an option with one value or one per iteration."""
    return values[t] if len(values) > 1 else values[0]


def changeable(args_class: type[Args]) -> tuple[str, ...]:
    """Names of the options that a resumed run may change."""
    return tuple(field.name for field in dataclasses.fields(args_class) if field.metadata["changeable"])


def is_utf8(text: str) -> bool:
    """False for lone surrogates, which Python reads in place of command-line bytes that are not UTF-8."""
    return not re.search(r"[\ud800-\udfff]", text)


def shown(value: object) -> str:
    """A value for a message: control characters are escaped, and the middle of a long text is left out."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]}...{text[3 - MAX_SHOWN // 2 :]}"


def near_files(path: Path, directories: bool = False) -> str:
    """A remark on the file (or directory) beside `path` whose name is nearest; "" where there is none."""
    try:
        siblings = [sibling.name for sibling in path.parent.iterdir() if sibling.is_dir() or not directories]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def check_file(path: str | Path, most: int = 0) -> None:
    """Called before a file is opened, since opening a FIFO waits for a writer.

    Raises: ValueError unless it is a regular file, of at most `most` bytes where that is not 0; OSError.
    """
    try:
        status = os.stat(path)
    except ValueError as error:  # a null character
        raise ValueError(f"{path}: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a FIFO or a device"
        raise ValueError(f"{path}: {kind}, expected a regular file")
    if most and status.st_size > most:
        raise ValueError(f"{path}: {status.st_size:,} bytes, expected at most {most:,}")


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_typed(name: str, value: Any) -> str:
    """An option as one types it in a shell: `--lr 0.1,0.2`."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"{flag_of(name)} {shown(shlex.quote(text))}"


def converted(field: dataclasses.Field, text: str) -> Any:
    """The value of a flag from its text."""
    item, _, expected = KINDS[field.type]
    try:
        one = item is field.type or field.metadata["repeated"]
        value = item(text) if one else [item(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{as_typed(field.name, text)}: expected {expected}") from None
    return checked(field, value)


def checked(field: dataclasses.Field, value: Any) -> Any:
    """The value in its field's type; one value becomes a tuple where the field is one."""
    item, _, expected = KINDS[field.type]
    several = item is not field.type
    values = tuple(value) if several and isinstance(value, list | tuple) else (value,)
    if item is str:
        values = tuple(os.fspath(one) if isinstance(one, os.PathLike) else one for one in values)
    accepted = (int, float) if item is float else item
    if values == field.default == ():
        return values
    for one in values or (None,):  # an empty tuple is refused like a wrong type
        if not isinstance(one, accepted) or isinstance(one, bool) != (item is bool):  # bool is a subclass of int
            raise ValueError(f"{flag_of(field.name)} {shown(repr(value))}: expected {expected}")
        if isinstance(one, int) and abs(one) >= 2**31:
            raise ValueError(f"{flag_of(field.name)} {shown(one)}: expected less than 2^31")
    values, check = tuple(map(item, values)), field.metadata["check"]
    if check and not all(map(check, values)):
        raise ValueError(f"{as_typed(field.name, values)}: expected {field.metadata['expected']}")
    return values if several else values[0]


def parse(script: str, argv: Sequence[str], args_class: type[AnyArgs] = Args, about: str = "") -> AnyArgs:
    """The options on a command line. `script` is one of SCRIPTS, `about` the first lines of --help.

    A flag on the command line overrides those of recipes, a later recipe an earlier one, and a recipe's own flag those
    of the recipes that it names. Without --model, --data, --pairs and @RECIPE, the script's default recipe is read.
    Raises: ValueError, and SystemExit after --help.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(script, args_class, about), end="")
        raise SystemExit(0)
    given = command_line(script, argv, args_class)[0]
    for name, word in ADAPTER_SETS.items():
        value, origin = given.get(name, (None, ""))
        if value is not None and given.get("adapter", ("", ""))[0]:
            raise ValueError(f"{origin}{as_typed(name, value)}: --adapter brings its own {word}; give one of the two")
    return args_class(**{name: value for name, (value, _) in given.items()})


def overridden(script: str, argv: Sequence[str], args_class: type[Args]) -> list[str]:
    """What the command line says otherwise than its recipes, option by option: "--lr 0.0001 (recipe: 5e-05)"."""
    given, replaced = command_line(script, argv, args_class)
    lines = []
    for name, old in replaced.items():
        new, _ = given[name]
        if isinstance(new, bool):
            lines.append(f"{_switch(name, new)} (recipe: {_switch(name, old)})")
        else:
            lines.append(f"{as_typed(name, new)} (recipe: {as_typed(name, old).partition(' ')[2]})")
    return lines


def _switch(name: str, on: bool) -> str:
    return flag_of(name) if on else f"--no-{flag_of(name)[2:]}"


def command_line(script: str, argv: Sequence[str], args_class: type[Args]) -> tuple["Given", dict[str, Any]]:
    """What is given, and the values of recipes in place of which the command line has others."""
    if not any(word.startswith("@") or word.partition("=")[0] in ("--model", "--data", "--pairs") for word in argv):
        argv = [f"@{ROOT / 'recipes' / DEFAULT_RECIPES[script]}", *argv]
    reader = CommandLine(script, args_class)
    return reader.read([(word, "") for word in argv]), reader.replaced


def help_text(script: str, args_class: type, about: str, usage: str = RECIPE_USAGE) -> str:
    recipes = "@RECIPE reads flags from a file, --no-FLAG undoes a switch of it. " if usage == RECIPE_USAGE else ""
    parser = argparse.ArgumentParser(
        prog=f"{script}.py",
        usage=usage,
        description=f"{about}\n\n{recipes}Defaults are in [].".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups: dict[str, Any] = {}
    title = ""
    for field in dataclasses.fields(args_class):
        facts, default = field.metadata, field.default
        title = facts["group"] or title
        if script not in facts["scripts"]:
            continue
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{facts['help']} [{'off' if default is False else default if default != '' else 'none'}]"
        metavar = f"{{{','.join(facts['choices'])}}}" if facts["choices"] else KINDS[field.type][1]
        metavar = facts["repeated"] or metavar
        value = {"action": "store_true"} if field.type is bool else {"metavar": metavar}
        groups[title].add_argument(flag_of(field.name), help=text.replace("%", "%%"), **value)
    return parser.format_help()


# (value, "FILE:LINE: " for a flag in a recipe or ""), by the name of the option
Given = dict[str, tuple[Any, str]]


class CommandLine:
    """Reads flags and the recipes among them."""

    def __init__(self, script: str, args_class: type) -> None:
        self.script, self.count = script, 0
        self.replaced: dict[str, Any] = {}  # values of recipes, where the command line has others
        self.fields = {flag_of(field.name): field for field in dataclasses.fields(args_class)}

    def read(self, words: list[tuple[str, str]], recipes: tuple[str, ...] = ()) -> Given:
        """Reads (word, origin) pairs. `recipes`: paths of the recipes that are being read, the innermost last."""
        own: Given = {}
        included: Given = {}
        rest = words[::-1]
        while rest:
            word, origin = rest.pop()
            try:
                self.count += 1
                if self.count > MAX_FLAGS:
                    raise ValueError(f"more than {MAX_FLAGS:,} flags and recipes")
                if word.startswith("@"):
                    included |= self.read_recipe(word[1:], recipes)
                    continue
                field, value = self.read_flag(word, rest)
                if field.metadata["repeated"]:
                    value = (*own.get(field.name, ((), ""))[0], *value)
                elif field.name in own:
                    raise ValueError(f"{flag_of(field.name)} is given twice: expected one value")
                own[field.name] = value, origin
            except ValueError as error:
                raise ValueError(f"{origin}{error}") from None
        if not recipes:
            both = {name: value for name, (value, _) in included.items() if name in own}
            self.replaced = {name: value for name, value in both.items() if value != own[name][0]}
        return included | own

    def read_recipe(self, path: str, recipes: tuple[str, ...]) -> Given:
        words = recipe_words(path)
        real = os.path.realpath(path)
        if real in recipes:
            raise ValueError(f"@{shown(path)}: a recipe that reads itself, directly or through another")
        if len(recipes) == MAX_RECIPE_DEPTH:
            raise ValueError(f"@{shown(path)}: recipes nest deeper than {MAX_RECIPE_DEPTH}")
        return self.read(words, (*recipes, real))

    def read_flag(self, word: str, rest: list[tuple[str, str]]) -> tuple[dataclasses.Field, Any]:
        """An option and its value: from `word` if it is --flag=VALUE, else the next word, removed from `rest`."""
        flag, equals, text = word.partition("=")
        field, on = self.fields.get(flag), True
        if field is None and flag.startswith("--no-"):
            field, on = self.fields.get(f"--{flag[5:]}"), False
            field = field if field and field.type is bool else None
        if field is None or self.script not in field.metadata["scripts"]:
            raise ValueError(self.why_not(word, flag, field))
        if field.type is bool:
            if equals:
                raise ValueError(f"{as_typed(field.name, text)}: expected no value")
            return field, on
        if not equals:
            if not rest or rest[-1][0].startswith(("--", "@")):
                raise ValueError(f"{flag}: expected a value")
            text, _ = rest.pop()
        return field, converted(field, text)

    def why_not(self, word: str, flag: str, field: dataclasses.Field | None) -> str:
        if word == "sft":
            return "sft: supervised fine-tuning is a script of its own, python sft.py"
        if not word.startswith("--"):
            return f"word '{shown(word)}': expected flags that begin with --, or @RECIPE"
        if flag in FAMILY_FLAGS:
            return f"{flag}: an option of family.py"
        if flag in SEFT_FLAGS:
            return f"{flag}: an option of seft.py"
        if field and field.metadata["scripts"] == SELF_PLAY:
            return f"{flag}: an option of self-play only (spin.py, family.py)"
        if field:
            return f"{flag}: an option of {', '.join(f'{script}.py' for script in field.metadata['scripts'])} only"
        offered = [name[2:] for name, other in self.fields.items() if self.script in other.metadata["scripts"]]
        near = difflib.get_close_matches(flag[2:MAX_SHOWN].lower(), offered, n=1)
        return f"{shown(flag)}: no such option; {f'did you mean --{near[0]}?' if near else '--help lists all'}"


def recipe_words(path: str) -> list[tuple[str, str]]:
    """The words of a recipe, each with its origin, "FILE:LINE: "."""
    name = shown(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for a writer
            raise ValueError("expected a regular file")
        with open(path, "rb") as file:
            content = file.read(MAX_RECIPE_BYTES + 1)
        if len(content) > MAX_RECIPE_BYTES:
            raise ValueError(f"expected a recipe of at most {MAX_RECIPE_BYTES >> 10} KiB")
        lines = content.decode().split("\n")
    except (FileNotFoundError, NotADirectoryError):
        recipes = {recipe.stem: os.path.relpath(recipe) for recipe in sorted((ROOT / "recipes").glob("*.args"))}
        near = difflib.get_close_matches(Path(path).name.removesuffix(".args"), recipes, n=1)
        there = f"there are {', '.join(recipes)} in {os.path.relpath(ROOT / 'recipes')}"
        there = f"did you mean @{recipes[near[0]]}?" if near else there
        raise ValueError(f"@{name}: no such recipe; {there}") from None
    except UnicodeDecodeError:
        raise ValueError(f"@{name}: not readable as UTF-8") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"@{name}: {getattr(error, 'strerror', None) or error}") from None
    words = []
    for number, line in enumerate(lines, start=1):
        origin = f"{name}:{number}: "
        try:
            words += [(word.replace("$SPIN", str(ROOT)), origin) for word in shlex.split(line, comments=True)]
        except ValueError as error:
            raise ValueError(f"{origin}{str(error).lower()}") from None
    return words
