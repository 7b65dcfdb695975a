"""The options of a script: a table of fields of which argparse makes flags, and recipes, which are files of flags.

A method declares its options in its own file, as spin.py does; `combined` adds `RunOptions`, those of the machinery.
The field `gen_batch` is the flag `--gen-batch`. Every error is a ValueError of one line.
"""

import argparse
import dataclasses
import difflib
import functools
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import near_files, shown
from evaluate import SHIPPED, metrics_with

ROOT = Path(__file__).resolve().parents[1]
FIELD_NAMES = ("prompt", "response", "system", "messages", "references", "generated", "wins")
FUNCTION = r".+\.py:\w+"
ADAPTER_SETTINGS = ("rank", "lora_alpha", "lora_dropout", "lora_targets")  # An adapter's files have their own.
METAVARS = {int: "N", float: "X", str: "TEXT"}
KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "text in UTF-8"}


def option(default: Any, help: str, **facts: Any) -> Any:
    """A field of a dataclass of options.

    Its type is bool, int, float, str, or a tuple of one of them. `facts` may have:
        within: the interval of the allowed numbers, as text: "(0, 1]", or "0 or [1, inf)".
        choices: the allowed texts.
        check, expected: a test of a value, and what a message says it expects, if neither of those will do.
        changeable: a resumed run may have another value. Such an option changes where or how fast a run computes, and
            results by rounding at most. Input files may move: their contents are compared, not their paths.
        group: the heading in --help of this option and of those below it.
        metavar: what stands for the value in --help.
        positional: it is no flag; it comes first on the command line.
    """
    return dataclasses.field(default=default, metadata={"help": help} | facts)


@dataclass(frozen=True)
class RunOptions:
    """The options that every method has: model, data, files and hardware of a run.

    Raises: ValueError naming the option whose value is not allowed; TypeError naming an option that does not exist.
    """

    # fmt: off
    model: str = option("", "Initial model: a directory or a hub id, owner/name or owner/name@revision.",
                        changeable=True, group="model")
    eos: str = option("", "The token that ends a response, as text or id; default: eos_token_id of config.json.")
    adapter: str = option("", "Initial LoRA adapter on top of --model, in PEFT's layout.", changeable=True)
    rank: int = option(16, "Rank of the LoRA adapters; 0 trains all parameters.", within="[0, inf)")
    lora_alpha: float = option(32.0, "An adapter's output is scaled by lora_alpha / rank.", within="(0, inf)")
    lora_dropout: float = option(0.0, "Dropout on the input of the adapters.", within="[0, 1)")
    lora_targets: tuple[str, ...] = option((), "Names of the linear layers that get an adapter; default: all.",
                                           metavar="NAME")
    dropout: bool = option(False, "Train with the dropout of the model's config.json, which makes margins noisy.")

    data: tuple[str, ...] = option((), "Training data: files, directories or hub data sets.", changeable=True,
                                   metavar="PATH", group="data")
    fields: tuple[str, ...] = option(
        (), "Names of the fields in the data, for example prompt=question response=answer.", metavar="NAME=FIELD",
        check=lambda pair: re.fullmatch(rf"({'|'.join(FIELD_NAMES)})=.+", pair),
        expected=f"NAME=FIELD with NAME one of {', '.join(FIELD_NAMES)}")
    eval_data: tuple[str, ...] = option((), "Held-out data; default: a share of --data.", changeable=True,
                                        metavar="PATH")
    eval_share: float = option(0.05, "Share of --data to hold out, chosen by a hash of the prompt.", within="(0, 1)")
    eval_limit: int = option(1000, "Largest number of held-out examples to evaluate on; 0: all.", within="[0, inf)")
    eval_temperatures: tuple[float, ...] = option(
        (0.7, 0.85, 1.2), "Further temperatures at which the start is sampled, to compare iterates with it at equal "
        "entropy; 1 adds none.", within="[0.001, inf)")
    metric: tuple[str, ...] = option(
        (), "Further held-out metrics: FILE.py:NAME of a function f(prompt, response, references) -> number, larger is "
        f"better; or {', '.join(SHIPPED)}.", changeable=True, metavar="METRIC",
        check=lambda name: name in SHIPPED or re.fullmatch(FUNCTION, name),
        expected=f"FILE.py:NAME or one of {', '.join(SHIPPED)}")
    template: str = option(
        "auto", r"Prompt template: text with {prompt} in which \n is a line break, or chat, the tokenizer's own; auto: "
        r"chat for messages if the tokenizer has one, else '### Instruction: {prompt}\n\n### Response: '.",
        check=lambda text: text in ("auto", "chat") or "{prompt}" in text, expected="auto, chat, or text with {prompt}")
    special_tokens: bool = option(False, "Special tokens in the text of a prompt count; otherwise they are plain text.")
    overlong: str = option("error", "What to do with examples longer than the context: stop, or leave them out.",
                           choices=("error", "skip"))

    out: str = option("runs/spin", "Folder for all files of the run; a stopped run in it is resumed.", changeable=True,
                      check=lambda path: path and path.isprintable(), expected="a printable path", metavar="PATH",
                      group="run")
    iterations: int = option(3, "Rounds of training and evaluation.", within="[1, 1000000]")
    prompts: int = option(0, "Examples per iteration, drawn afresh for each; 0: all.", within="[0, inf)")
    max_new_tokens: int = option(256, "Length limit of generated responses, in tokens.", within="[1, inf)")
    seed: int = option(0, "Seed of all random numbers.")
    best: str = option("nll", "Held-out metric that selects the best iterate; greedy_NAME or sampled_NAME for a "
                       "function NAME of --metric.", changeable=True)
    log: tuple[str, ...] = option((), "Log to these optional packages, too.", changeable=True,
                                  choices=("tensorboard", "wandb"))
    save_minutes: float = option(10.0, "Minutes of training between two checkpoints; 0: one per step.",
                                 changeable=True, within="[0, inf)")
    dry_run: bool = option(False, "Check all inputs, measure two small batches, print the plan and write nothing.",
                           changeable=True)

    device: str = option("auto", "cpu, cuda, cuda:N, or auto: a GPU if there is one.", changeable=True, group="machine",
                         check=lambda name: re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", name, re.ASCII),
                         expected="auto, cpu, cuda or cuda:N")
    precision: str = option("auto", "Number format of the computation; auto: bf16 on a GPU, else fp32.",
                            choices=("auto", "bf16", "fp32"))
    gen_batch: int = option(64, "Responses that are generated together.", changeable=True, within="[1, inf)")
    gen_tokens: int = option(131072, "Size of the generation cache in tokens, which may lower --gen-batch.",
                             changeable=True, within="[1, inf)")
    micro_tokens: int = option(0, "Tokens per forward pass, to limit memory; 0: 8192 on a GPU, else 2048.",
                               changeable=True, within="[0, inf)")
    checkpoint: bool = option(False, "Recompute activations in the backward pass: less memory, more time.",
                              changeable=True)
    fsdp: bool = option(False, "Shard weights, gradients and optimizer state across the ranks of torchrun, for models "
                        "that outgrow a device; requires --rank 0.", changeable=True)
    shard: int = option(0, "Prompts per shard, the unit of work and the most that is lost when the run is killed; 0: "
                        "1/32 of the prompts, within 4 to 64 batches.", within="[0, inf)")
    # fmt: on

    from_scratch = False  # sft.py makes it an option.

    def __post_init__(self) -> None:
        check_fields(self)
        for field in dataclasses.fields(self):
            if field.name not in RunOptions.__dataclass_fields__ and field.type in (tuple[int, ...], tuple[float, ...]):
                values, count = getattr(self, field.name), self.iterations
                if len(values) not in (1, count):
                    typed = as_typed(field.name, values)
                    raise ValueError(f"{typed}: expected 1 value, or one for each of {count} iterations")
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

    def prepare(self, model: Any, examples: list[Any], run: Any) -> None:
        """Checks more before anything is written, and may remove examples. Raises: ValueError."""


@functools.cache
def combined(method_options: type) -> type:
    """The options of a script: those of its method and of the machinery, in one frozen dataclass.

    In Python they are given by name, combined(SpinOptions)(lr=1e-3). A single value stands for a tuple of one. An
    option of the method that is a tuple of numbers has one value for all iterations or one for each; the instance has
    one for each.
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
        object.__setattr__(options, field.name, checked(field, getattr(options, field.name)))


def checked(field: dataclasses.Field, value: Any) -> Any:
    kind, several = kind_of(field)
    allows, expected = rule_of(field)
    values = tuple(value) if several and isinstance(value, list | tuple) else (value,)
    try:
        values = tuple(converted(kind, one) for one in values)
        good = all(map(allows, values)) and (values or field.default == ())
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise ValueError(f"{as_typed(field.name, value)}: expected {expected}")
    return values if several else values[0]


def kind_of(field: dataclasses.Field) -> tuple[type, bool]:
    """(type of one value, whether the option is a tuple of them)."""
    several = field.type not in KINDS
    return (field.type.__args__[0] if several else field.type), several


def converted(kind: type, value: Any) -> Any:
    """Raises: TypeError, ValueError, OverflowError."""
    right = isinstance(value, str | os.PathLike) if kind is str else isinstance(value, bool) == (kind is bool)
    if not right or (kind is int and isinstance(value, float)):  # int() and float() would accept a bool, int() a 1.5.
        raise TypeError
    value = kind(value)
    if kind is str:
        value.encode()  # This fails if a command line was not UTF-8.
    return value


def rule_of(field: dataclasses.Field) -> tuple[Callable[[Any], object], str]:
    """(test of one value, what a message says that the option expects)."""
    facts, words = field.metadata, KINDS[kind_of(field)[0]]
    if "choices" in facts:
        return facts["choices"].__contains__, f"one of {', '.join(facts['choices'])}"
    if "within" not in facts:
        return facts.get("check", lambda value: True), facts.get("expected", words)
    alone, _, interval = facts["within"].rpartition(" or ")
    low, high = map(float, interval[1:-1].split(","))

    def inside(value: float) -> bool:
        above = value > low if interval.startswith("(") else value >= low
        below = value < high if interval.endswith(")") else value <= high
        return (above and below) or (alone != "" and value == float(alone))

    return inside, (f"{alone}, or " if alone else "") + f"{words} in {interval}"


def as_typed(name: str, value: Any) -> str:
    """An option as people type it in a shell: `--lr 0.1 0.2`."""
    values = value if isinstance(value, list | tuple) else (value,)
    return f"{flag_of(name)} {shown(' '.join(shlex.quote(str(one)) for one in values))}"


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------- command lines and recipes


def parse(options_class: type, argv: Sequence[str], prog: str, about: str = "", recipe: str = "") -> Any:
    """The options on a command line, as an instance of `options_class`.

    A flag overrides the flags of recipes, a later recipe an earlier one, and a recipe's own flag those of the recipes
    that it names.

    Args:
        prog, about: name of the script and description, for --help.
        recipe: a file in recipes/, read if the command line has no @RECIPE, --model, --data or --pairs.

    Raises: ValueError; SystemExit after --help.
    """
    parser, given = parser_of(options_class, prog, about), argparse.Namespace()
    if recipe and not any(re.match(r"@|--(model|data|pairs)(=|$)", word) for word in argv):
        argv = [f"@{ROOT / 'recipes' / recipe}", *argv]
    read(argv, parser, given)
    for name in ADAPTER_SETTINGS if getattr(given, "adapter", "") else ():
        if name in given:
            typed = as_typed(name, getattr(given, name))
            raise ValueError(f"{typed}: --adapter brings its own; give only one of the two")
    return options_class(**vars(given))


def read(words: Sequence[str], parser: "Parser", given: argparse.Namespace) -> None:
    """Reads recipes before flags, so that a flag wins wherever it stands."""
    for word in words:
        if word.startswith("@"):
            path = Path(word[1:])
            try:
                read(recipe_words(path), parser, given)
            except ValueError as error:
                raise ValueError(f"@{path}: {error}") from None
    _, unknown = parser.parse_known_args([word for word in words if not word.startswith("@")], given)
    if unknown and not unknown[0].startswith("--"):
        raise ValueError(f"'{shown(unknown[0])}': expected flags that begin with --, or @RECIPE")
    if unknown:
        flag = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(flag.lower(), parser.flags, n=1)
        raise ValueError(f"{shown(flag)}: no such option; {f'did you mean {near[0]}?' if near else '--help lists all'}")


def recipe_words(path: Path) -> list[str]:
    if not path.is_file():
        there = ", ".join(sorted(recipe.stem for recipe in (ROOT / "recipes").glob("*.args")))
        raise ValueError(f"no such recipe{near_files(path) or f'; recipes/ has {there}'}")
    return [word.replace("$SPIN", str(ROOT)) for word in shlex.split(path.read_text("utf-8"), comments=True)]


class Parser(argparse.ArgumentParser):
    flags: list[str]

    def error(self, message: str) -> None:
        raise ValueError(message.removeprefix("argument "))

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse would not say that nobody reads it


def parser_of(options_class: type, prog: str, about: str) -> Parser:
    fields = dataclasses.fields(options_class)
    places = [field.name for field in fields if field.metadata.get("positional")]
    first = " ".join(places).upper() or "[@RECIPE ...]"
    notes = "Lists are separated by spaces. Defaults are in []."
    if not places:
        notes = "@RECIPE reads flags from a file; other flags override them. " + notes
    parser = Parser(
        prog,
        f"%(prog)s {first} [--flag VALUE ...]",
        f"{about}\n\n{notes}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.flags = [flag_of(field.name) for field in fields]
    for title, some in groups(options_class).items():
        group = parser.add_argument_group(title)
        for field in some:
            kind, several = kind_of(field)
            facts: dict[str, Any] = {"help": help_text(field).replace("%", "%%")}
            if kind is bool:
                facts |= {"action": argparse.BooleanOptionalAction}
            else:
                choices = field.metadata.get("choices")
                metavar = f"{{{','.join(choices)}}}" if choices else field.metadata.get("metavar", METAVARS[kind])
                facts |= {"metavar": metavar, "nargs": "+" if several else None}
            group.add_argument(field.name if field.name in places else flag_of(field.name), **facts)
    return parser


def groups(options_class: type) -> dict[str, list[dataclasses.Field]]:
    """The options by their headings in --help; without a `group` it is the name of the class: SpinOptions -> spin."""
    found: dict[str, list[dataclasses.Field]] = {}
    for base in reversed(options_class.__mro__):
        title = base.__name__.removesuffix("Options").lower()
        for name in vars(base).get("__annotations__", ()):
            field = options_class.__dataclass_fields__[name]
            title = field.metadata.get("group", title)
            if not any(field in fields for fields in found.values()):  # A method's class may replace an option.
                found.setdefault(title, []).append(field)
    return found


def help_text(field: dataclasses.Field) -> str:
    default = field.default
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f"{field.metadata['help']} [{'none' if default == '' else default}]"
