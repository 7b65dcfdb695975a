"""The options of a script: a table of fields of which argparse makes flags, and recipes, which are files of flags.

A method declares its options in its own file, as spin.py does; `combined` adds `RunOptions`, those of the machinery.
The field `gen_batch` is the flag `--gen-batch`. Every error is a ValueError of one line.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import shown
from evaluate import SHIPPED, metrics_with

if TYPE_CHECKING:
    from runtime.run import Run

ROOT = Path(__file__).resolve().parents[1]
FIELD_NAMES = ("prompt", "response", "system", "messages", "references", "generated", "wins")
ADAPTER_SETTINGS = ("rank", "lora_alpha", "lora_dropout", "lora_targets")  # An adapter's files have their own.
METAVARS = {int: "N", float: "X", str: "TEXT"}
KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "text in UTF-8"}


def option(default: Any, help: str, **facts: Any) -> Any:
    """A field of a dataclass of options, whose type is bool, int, float, str, or a tuple of one of them.

    A value is checked by one of: `within`, an interval as text, "(0, 1]" or "0 or [1, inf)"; `choices`, the allowed
    texts; `check`, a function, with `expected`, what a message says it expects. Further `facts`, all of them optional:
        changeable: a resumed run may have another value. Such an option changes where or how fast a run computes, and
            results by rounding at most. Input files may move: their contents are compared, not their paths.
        group: the heading in --help of this option and of those below it.
        metavar: what stands for the value in --help.
        positional: it is no flag; it comes first on the command line.
    """
    return dataclasses.field(default=default, metadata={"help": help} | facts)


@dataclass(frozen=True)
class RunOptions:
    """The options that every method has: model, data, files and hardware of a run."""

    # fmt: off
    model: str = option("", "Initial model: a directory or a hub id, owner/name[@revision].", changeable=True,
                        group="model")
    eos: str = option("", "The token that ends a response, as text or id; default: eos_token_id of config.json.")
    adapter: str = option("", "Initial LoRA adapter on top of --model, in PEFT's layout.", changeable=True)
    rank: int = option(16, "Rank of the LoRA adapters; 0 trains all parameters.", within="[0, inf)")
    lora_alpha: float = option(32.0, "An adapter's output is scaled by lora_alpha / rank.", within="(0, inf)")
    lora_dropout: float = option(0.0, "Dropout on the input of the adapters.", within="[0, 1)")
    lora_targets: tuple[str, ...] = option((), "Linear layers that get an adapter; default: all.", metavar="NAME")
    dropout: bool = option(False, "Train with the dropout of the model's config.json, which makes margins noisy.")

    data: tuple[str, ...] = option((), "Training data: files, directories or hub data sets.", changeable=True,
                                   metavar="PATH", group="data")
    fields: tuple[str, ...] = option(
        (), "Names of the fields in the data, for example prompt=question response=answer.", metavar="NAME=FIELD",
        check=lambda pair: re.fullmatch(rf"({'|'.join(FIELD_NAMES)})=.+", pair),
        expected=f"NAME=FIELD with NAME one of {', '.join(FIELD_NAMES)}")
    eval_data: tuple[str, ...] = option((), "Held-out data; default: part of --data.", changeable=True, metavar="PATH")
    eval_share: float = option(0.05, "Share of --data to hold out, chosen by a hash of the prompt.", within="(0, 1)")
    eval_limit: int = option(1000, "Largest number of held-out examples to evaluate on; 0: all.", within="[0, inf)")
    eval_temperatures: tuple[float, ...] = option(
        (0.7, 0.85, 1.2), "Further temperatures at which the start is sampled, to compare iterates with it at equal "
        "entropy; give 1 to add none.", within="[0.001, inf)")
    metric: tuple[str, ...] = option(
        (), "Further held-out metrics: FILE.py:NAME of a function f(prompt, response, references) -> number, larger is "
        f"better; or one that ships: {', '.join(SHIPPED)}.", changeable=True, metavar="METRIC",
        check=lambda name: name in SHIPPED or re.fullmatch(r".+\.py:\w+", name),
        expected=f"FILE.py:NAME or one of {', '.join(SHIPPED)}")
    template: str = option(
        "auto", r"Prompt template: text with {prompt} in which \n is a line break, or chat, the tokenizer's own; auto: "
        r"chat for messages if the tokenizer has one, else '### Instruction: {prompt}\n\n### Response: '.",
        check=lambda text: text in ("auto", "chat") or "{prompt}" in text, expected="auto, chat, or text with {prompt}")
    special_tokens: bool = option(False, "Read special tokens in the text of a prompt as such, not as plain text.")
    overlong: str = option(
        "error", "Examples that do not fit the context: error stops the run at once, skip leaves them out.",
        choices=("error", "skip"))

    out: str = option("", "Folder for all files of the run; a stopped run in it is resumed; default: runs/ and the "
                      "name of the script.", changeable=True, check=str.isprintable, expected="a printable path",
                      metavar="PATH", group="run")
    iterations: int = option(3, "Rounds of training and evaluation.", within="[1, 1000000]")
    prompts: int = option(0, "Examples per iteration, drawn afresh for each; 0: all.", within="[0, inf)")
    max_new_tokens: int = option(256, "Length limit of generated responses, in tokens.", within="[1, inf)")
    seed: int = option(0, "Seed of all random numbers.")
    best: str = option("nll", "Held-out metric that selects the best iterate; greedy_NAME or sampled_NAME for a "
                       "function NAME of --metric.", changeable=True)
    log: tuple[str, ...] = option((), "Log to these packages, too.", changeable=True, choices=("tensorboard", "wandb"))
    save_minutes: float = option(10.0, "Minutes of training between checkpoints; 0: after every step.", changeable=True,
                                 within="[0, inf)")
    dry_run: bool = option(False, "Check all inputs, measure two batches, and write nothing.", changeable=True)

    device: str = option("auto", "cpu, cuda, cuda:N, or auto: a GPU if there is one.", changeable=True, group="machine",
                         check=lambda name: re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", name, re.ASCII),
                         expected="auto, cpu, cuda or cuda:N")
    precision: str = option("auto", "Number format; auto: bf16 on a GPU, else fp32.", choices=("auto", "bf16", "fp32"))
    gen_batch: int = option(64, "Responses that are generated together.", changeable=True, within="[1, inf)")
    gen_tokens: int = option(131072, "Size of the generation cache, in tokens.", changeable=True, within="[1, inf)")
    micro_tokens: int = option(0, "Tokens per forward pass of scoring and training, to limit their memory; 0: 8192 on "
                               "a GPU, else 2048.", changeable=True, within="[0, inf)")
    checkpoint: bool = option(False, "Recompute activations in training: less memory, more time.", changeable=True)
    fsdp: bool = option(False, "Shard weights, gradients and optimizer state across the ranks of torchrun, for models "
                        "that outgrow a device; requires --rank 0.", changeable=True)
    shard: int = option(0, "Prompts per shard, the unit of work and the most that is lost when the run is killed; 0: "
                        "1/32 of the prompts, within 4 to 64 batches.", within="[0, inf)")
    # fmt: on

    from_scratch = False  # Only sft.py has it as an option.

    def __post_init__(self) -> None:
        check_fields(self)
        for field in dataclasses.fields(self):
            if field.name not in RunOptions.__dataclass_fields__ and field.type in (tuple[int, ...], tuple[float, ...]):
                values, count = getattr(self, field.name), self.iterations
                several = f"{as_typed(field.name, values)}: expected 1 value, or one for each of {count} iterations"
                self.require(len(values) in (1, count), several)
                object.__setattr__(self, field.name, values if len(values) == count else values * count)
        self.check_together()

    def check_together(self) -> None:
        """Checks options against each other; a method's class may extend it."""
        metrics = metrics_with(self.metric)
        self.require(self.best in metrics, f"{as_typed('best', self.best)}: expected one of {', '.join(metrics)}")
        self.require(self.rank or not self.adapter, "--adapter requires a --rank above 0")
        self.require(not (self.fsdp and self.rank), "--fsdp requires --rank 0: adapters are too small to be sharded")

    def require(self, condition: object, message: str) -> None:
        if not condition:
            raise ValueError(message)

    # What the machinery asks of a method, whose class may override it.

    @property
    def source(self) -> tuple[str, tuple[str, ...], str]:
        """(option, files, layout) of the training data; see `load_examples`."""
        return "data", self.data, "responses"

    def digests(self) -> dict[str, str]:
        """Returns the sha256 of further input files by option."""
        return {}

    def prepare(self, model: Any, examples: list[Any], run: "Run") -> None:
        """Checks more before anything is written, and may remove examples. Raises: ValueError."""


@functools.cache
def combined(method_options: type) -> type:
    """The options of a script: those of its method and of the machinery, in one frozen dataclass.

    A single value stands for a tuple of one; a method's tuple of numbers gets a value for each iteration.
    """
    return dataclasses.make_dataclass(method_options.__name__, [], bases=(method_options, RunOptions), frozen=True)


def changeable(options_class: type) -> tuple[str, ...]:
    """Returns the names of the options that a resumed run may change."""
    return tuple(field.name for field in dataclasses.fields(options_class) if field.metadata.get("changeable"))


def settings(options: Any) -> str:
    """Returns the options that decide a run's results and differ from the defaults, as people type them."""
    words = []
    for field in dataclasses.fields(options):
        value, default = getattr(options, field.name), field.default
        if isinstance(default, tuple) and len(default) == 1:
            default *= len(value)  # one value per iteration
        if value != default and not field.metadata.get("changeable"):
            words.append(flag_of(field.name) if value is True else as_typed(field.name, value))
    return " ".join(words)


# ---------------------------------------------------------------- values


def check_fields(options: Any) -> None:
    """Brings every option into the type of its field, text into numbers too. Raises: ValueError."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        kind, several = kind_of(field)
        allows, expected = rule_of(field)
        values = value if several and isinstance(value, list | tuple) else [value]
        try:
            values = tuple(converted(kind, one) for one in values)
            good = all(map(allows, values)) and (values or field.default == ())
        except (AttributeError, TypeError, ValueError, OverflowError):
            good = False
        if not good:
            raise ValueError(f"{as_typed(field.name, value)}: expected {expected}")
        object.__setattr__(options, field.name, values if several else values[0])


def kind_of(field: dataclasses.Field) -> tuple[type, bool]:
    """(type of one value, whether the option is a tuple of them)."""
    return (field.type, False) if field.type in KINDS else (field.type.__args__[0], True)


def converted(kind: type, value: Any) -> Any:
    if kind is str:
        os.fspath(value).encode()  # This fails if a command line was not UTF-8.
    elif isinstance(value, bool) != (kind is bool) or (kind is int and isinstance(value, float)):
        raise TypeError  # int() and float() would accept a bool, int() a 1.5.
    return kind(value)


def rule_of(field: dataclasses.Field) -> tuple[Callable[[Any], object], str]:
    """(test of one value, what a message says that the option expects)."""
    facts, words = field.metadata, KINDS[kind_of(field)[0]]
    if "choices" in facts:
        return facts["choices"].__contains__, f"one of {', '.join(facts['choices'])}"
    if "within" not in facts:
        return facts.get("check", lambda value: True), facts.get("expected", words)
    *alone, interval = facts["within"].split(" or ")
    low, high = map(float, interval[1:-1].split(","))
    ends = [low] * (interval[0] == "[") + [high] * (interval[-1] == "]") + [float(one) for one in alone]
    return lambda value: low < value < high or value in ends, " or ".join([*alone, f"{words} in {interval}"])


def as_typed(name: str, value: Any) -> str:
    """An option as people type it in a shell: `--lr 0.1 0.2`."""
    values = value if isinstance(value, list | tuple) else (value,)
    return f"{flag_of(name)} {shown(' '.join(shlex.quote(str(one)) for one in values))}"


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------- command lines and recipes


def parse(options_class: type, argv: Sequence[str], prog: str, about: str = "", recipe: str = "") -> Any:
    """The options on a command line, as an instance of `options_class`. Raises: ValueError; SystemExit after --help.

    `prog` and `about` are for --help. `recipe` is a file in recipes/, read if the command line has no @RECIPE, --model,
    --data or --pairs. A later flag overrides an earlier one, and a flag of the command line those of all recipes.
    """
    if recipe and not any(re.match(r"@|--(model|data|pairs)(=|$)", word) for word in argv):
        argv = [f"@{ROOT / 'recipes' / recipe}", *argv]
    recipes_first = sorted(argv, key=lambda word: not word.startswith("@"))
    given, unknown = parser_of(options_class, prog, about).parse_known_args(list(with_recipes(recipes_first)))
    if unknown and not unknown[0].startswith("--"):
        raise ValueError(f"'{shown(unknown[0])}': expected flags that begin with --, or @RECIPE")
    if unknown:
        flag, flags = unknown[0].partition("=")[0], map(flag_of, options_class.__dataclass_fields__)
        near = difflib.get_close_matches(flag.lower(), flags, n=1)
        raise ValueError(f"{shown(flag)}: no such option; {f'did you mean {near[0]}?' if near else '--help lists all'}")
    own = [name for name in ADAPTER_SETTINGS if name in given]
    if own and getattr(given, "adapter", ""):
        raise ValueError(f"{flag_of(own[0])}: --adapter has settings of its own; give only one of the two")
    return options_class(**vars(given))


def with_recipes(words: Sequence[str], opened: tuple[str, ...] = ()) -> Iterator[str]:
    """Puts the words of a recipe in the place of its @RECIPE. In a recipe, $SPIN is this project's folder.

    `opened` are the recipes that these words stand in.
    """
    for word in words:
        if not word.startswith("@"):
            yield word
            continue
        try:
            split = shlex.split(Path(word[1:]).read_text("utf-8"), comments=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{shown(word)}: {reason}; expected a recipe, which is a file of flags") from None
        if word in opened:
            raise ValueError(f"{shown(word)}: this recipe reads itself")
        yield from with_recipes([one.replace("$SPIN", str(ROOT)) for one in split], (*opened, word))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message.removeprefix("argument "))

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse would hide the error of a closed pipe.


def parser_of(options_class: type, prog: str, about: str) -> Parser:
    """A parser whose --help groups options by the `group` of their field, or else by the name of their class."""
    fields = options_class.__dataclass_fields__
    places = [name.upper() for name, field in fields.items() if field.metadata.get("positional")]
    notes = "@RECIPE reads flags from a file; other flags override them. Lists are separated by spaces."
    parser = Parser(
        prog,
        " ".join(["%(prog)s [@RECIPE ...]", *places, "[--flag VALUE ...]"]),
        f"{about}\n\n{notes} Defaults are in [].".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    left = dict(fields)
    for base in reversed(options_class.__mro__):
        title = base.__name__.removesuffix("Options").lower()
        for name in filter(left.__contains__, inspect.get_annotations(base)):
            field = left.pop(name)  # A method's class may replace an option, which stays in its place.
            title = field.metadata.get("group") or title
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            add_argument(groups[title], field)
    return parser


def add_argument(group: Any, field: dataclasses.Field) -> None:
    kind, several = kind_of(field)
    facts, default = field.metadata, field.default
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    elif kind is bool:
        default = "on" if default else "off"
    shape: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    if kind is not bool:
        choices = f"{{{','.join(facts['choices'])}}}" if "choices" in facts else METAVARS[kind]
        shape = {"metavar": facts.get("metavar", choices), "nargs": "+" if several else None}
    told = "default:" in facts["help"] or facts.get("positional")  # The text says it, or the option has none.
    ending = "" if told else f" [{'none' if default == '' else default}]"
    help = f"{facts['help']}{ending}".replace("%", "%%")
    group.add_argument(field.name if facts.get("positional") else flag_of(field.name), help=help, **shape)
