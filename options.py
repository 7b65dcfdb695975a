"""Every option of spin.py, once: its name, type, default, help text and what values it takes.

Flags are made from the fields of `Args`; a recipe, `@FILE`, is a file of flags.
"""

import argparse
import dataclasses
import functools
import inspect
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import lora

HERE = Path(__file__).resolve().parent
LOSSES = ("logistic", "hinge", "ipo", "sppo")
METRICS = {"nll": -1, "greedy": 1, "sampled": 1, "greedy_error": -1, "sampled_error": -1}  # 1: more is better
# A run may go on with other values of these: they change where and how fast it runs, and results by rounding alone.
# What --model, --data and the like name may move; their contents are compared instead.
CHANGEABLE = (
    "model", "adapter", "data", "pairs", "eval_data", "scorer", "out", "device", "gen_batch", "gen_tokens",
    "micro_tokens", "checkpoint", "compile", "best", "save_minutes", "dry_run",
)  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Every option; a field's comment is its help. Options of self-play alone are marked (spin)."""

    model: str = ""  # directory or hub id (owner/name or owner/name@revision) of the start; without: the embedded task
    data: str = ""  # JSON Lines of {"prompt", "response"} or of the official {"real": [...]}; .gz is fine
    pairs: str = ""  # (spin) given pairs in place of --data and of responses: each record has a "generated" one (DPO)
    eval_data: str = ""  # held-out data; without it, a share of --data
    eval_share: float = 0.05  # share of --data held out, chosen by a hash of the prompt
    eval_limit: int = 1000  # at most so many held-out examples are used (0: all)
    out: str = "runs/spin"  # directory for everything the run writes; a run that was stopped in it goes on
    template: str = r"### Instruction: {prompt}\n\n### Response: "  # prompt template; \n is a line break
    overlong: str = "error"  # examples that do not fit the context: error | skip (and count)
    iterations: int = 3  # rounds of self-play (of sft: rounds of training and evaluation)
    prompts: int = 0  # examples an iteration, drawn afresh for each (0: all)
    mix_previous: bool = False  # (spin) train on the pairs of iteration t - 1 too
    loss: str = "logistic"  # (spin) of a pair: logistic (Eq. 4.7) | hinge | ipo | sppo
    alpha: float = 0.0  # (spin) alpha-SPIN: share of the base policy in the opponent's log-probabilities
    history: str = "1"  # (spin) opponents, the newest and those before it, that responses are drawn from: number | all
    scorer: str = ""  # (spin) FILE.py:NAME of f(prompt, responses) -> probabilities to beat the opponent, for sppo
    min_win: float = 0.0  # (spin) pairs whose better response has a smaller probability to win are left out
    reinforce: bool = False  # (spin) self-reinforcement: responses with --adapter against responses without; no answers
    beta: tuple[float, ...] = (0.1,)  # (spin) beta of Eq. 4.7, the paper's lambda; one value or one an iteration
    max_new_tokens: int = 256  # length limit of generated responses, in tokens
    temperature: float = 1.0  # (spin) of the opponent's sampling; 0: greedy
    top_k: int = 0  # (spin) of the opponent's sampling; 0: off
    top_p: float = 1.0  # (spin) of the opponent's sampling; 1: off
    unfinished: str = "keep"  # (spin) responses cut at the length limit: keep | drop | cut (the real one alike)
    gen_batch: int = 64  # rows generated together
    gen_tokens: int = 131072  # tokens that the cache of generation has room for; reduces --gen-batch to fit
    adapter: str = ""  # adapter in PEFT's layout, the start on top of --model; its rank, alpha and dropout hold
    rank: int = 16  # LoRA rank; 0: train all parameters
    lora_alpha: float = 32.0  # LoRA scaling is lora_alpha / rank
    lora_dropout: float = 0.0  # dropout on the adapters' input
    lora_targets: tuple[str, ...] = lora.DEFAULT_TARGETS  # names of the linear layers that get an adapter
    optimizer: str = "adamw"  # adamw | rmsprop (the paper's)
    lr: tuple[float, ...] = (5e-5,)  # peak learning rate; one value or one an iteration
    epochs: tuple[int, ...] = (2,)  # passes over the pairs; one value or one an iteration
    warmup: float = 0.1  # share of an iteration's steps in which the rate rises; it then falls linearly to 0
    weight_decay: float = 0.0  # of AdamW
    clip: float = 1.0  # largest norm of the gradient
    batch: int = 64  # examples (pairs) a step
    micro_tokens: int = 0  # tokens a forward pass, padding included; less needs less memory (0: 2048, on a GPU 8192)
    checkpoint: bool = False  # keep only a block's input for its backward pass: less memory, one more forward pass
    compile: bool = False  # torch.compile the blocks for training: a minute at first; its gain is not measured yet
    precision: str = "auto"  # bf16 | fp32 | auto (bf16 on a GPU, fp32 on CPU)
    device: str = "auto"  # cpu | cuda | cuda:N | auto (a GPU where there is one)
    seed: int = 0  # of everything random
    best: str = "nll"  # metric that tells the best iterate: nll | greedy | sampled | greedy_error | sampled_error
    save_minutes: float = 10.0  # of training between two saved states; 0: every step
    dry_run: bool = False  # check everything, print what the run would do, need and take, and write nothing
    from_scratch: bool = False  # (sft) --model holds config.json and a tokenizer; weights start at random

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("eval_share", 0 < self.eval_share < 1, "between 0 and 1"),
            ("eval_limit", self.eval_limit >= 0, "0 or more"),
            ("template", "{prompt}" in self.template, "text with {prompt} in it"),
            ("template", not re.search(r"[\ud800-\udfff]", self.template), "text in UTF-8"),
            ("out", not re.search(r"[\0\ud800-\udfff]", self.out), "a path in UTF-8"),
            ("overlong", self.overlong in ("error", "skip"), "error or skip"),
            ("iterations", self.iterations >= 1, "1 or more"),
            ("prompts", self.prompts >= 0, "0 or more"),
            ("beta", all(0 < b < math.inf for b in self.beta), "positive numbers"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature == 0 or 1e-3 <= self.temperature < math.inf, "0 or at least 0.001"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("unfinished", self.unfinished in ("keep", "drop", "cut"), "keep, drop or cut"),
            ("gen_batch", self.gen_batch >= 1, "1 or more"),
            ("gen_tokens", self.gen_tokens >= 1, "1 or more"),
            ("rank", self.rank >= 0, "0 or more"),
            ("lora_alpha", 0 < self.lora_alpha < math.inf, "positive"),
            ("loss", self.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
            ("alpha", 0 <= self.alpha <= 1, "in [0, 1]"),
            ("history", re.fullmatch("all|[1-9][0-9]{0,8}", self.history), "all, or 1 or more"),
            ("min_win", 0 <= self.min_win <= 1, "in [0, 1]"),
            ("scorer", not self.scorer or re.fullmatch(r".+\.py:\w+", self.scorer), "FILE.py:NAME"),
            ("min_win", not self.min_win or self.scorer or self.pairs, "--scorer or --pairs with it"),
            ("reinforce", not self.reinforce or (self.adapter and self.rank), "--adapter, and no --rank 0, with it"),
            ("reinforce", not self.reinforce or self.eval_data, "--eval-data, which has answers, with it"),
            ("reinforce", not (self.reinforce and self.pairs), "no --pairs with it"),
            ("reinforce", not self.reinforce or self.unfinished != "cut", "no --unfinished cut with it"),
            ("pairs", not (self.pairs and self.data), "no --data with it: it takes its place"),
            ("history", self.history == "1" or not (self.pairs or self.reinforce), "no --pairs or --reinforce with it"),
            ("adapter", not self.adapter or (self.rank and not self.from_scratch), "no --rank 0 or --from-scratch"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
            ("optimizer", self.optimizer in ("adamw", "rmsprop"), "adamw or rmsprop"),
            ("lr", all(0 < x < math.inf for x in self.lr), "positive numbers"),
            ("epochs", all(e >= 1 for e in self.epochs), "1 or more"),
            ("warmup", 0 <= self.warmup <= 1, "in [0, 1]"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("clip", self.clip > 0, "positive"),
            ("batch", self.batch >= 1, "1 or more"),
            ("micro_tokens", self.micro_tokens >= 0, "0 or more"),
            ("precision", self.precision in ("auto", "bf16", "fp32"), "auto, bf16 or fp32"),
            ("best", self.best in METRICS, f"one of {', '.join(METRICS)}"),
            ("save_minutes", 0 <= self.save_minutes < math.inf, "0 or more"),
            ("device", re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?", self.device), "auto, cpu, cuda or cuda:N"),
        ):
            if not ok:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)!r}: expected {expected}")
        for name, value in vars(self).items():
            if isinstance(value, int) and abs(value) >= 2**31:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected less than 2^31")
        for name in ("beta", "lr", "epochs"):
            if len(getattr(self, name)) not in (1, self.iterations):
                raise ValueError(f"--{name} has {len(getattr(self, name))} values: expected 1 or {self.iterations}")


def parse(argv: list[str], about: str = "") -> tuple[str, Args]:
    """Command line to (command, Args). `@FILE` reads flags from a recipe, in which $SPIN is the folder of spin.py."""
    command = argv[0] if argv and argv[0] in ("spin", "sft") else "spin"
    argv = argv[1:] if argv and argv[0] == command else argv
    if not any(flag.startswith(("--model", "--data", "--pairs", "@", "-h", "--help")) for flag in argv):
        argv = [f"@{HERE / 'recipes' / ('pronounce.args' if command == 'spin' else 'pronounce-sft.args')}", *argv]
    parser = argparse.ArgumentParser(
        prog=f"spin.py {command}",
        fromfile_prefix_chars="@",
        description=about + "\n\n@FILE reads flags from a recipe; defaults are in [].",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # or --mod would not be seen as --model above
    )
    parser.convert_arg_line_to_args = recipe_words
    parser.error = bad_flag
    other = {"spin": "(sft)", "sft": "(spin)"}[command]
    for field, text in zip(dataclasses.fields(Args), field_comments(Args)):
        if not text.startswith(other):
            add_flag(parser, field, text)
    try:
        options = vars(parser.parse_args(argv))
    except RecursionError:
        recipes = " ".join(flag for flag in argv if flag.startswith("@"))
        raise ValueError(f"{recipes}: a recipe that reads itself, straight or through another") from None
    return command, Args(**options)


def recipe_words(line: str) -> list[str]:
    try:
        return [word.replace("$SPIN", str(HERE)) for word in shlex.split(line, comments=True)]
    except ValueError as error:
        raise ValueError(f"recipe line {line!r}: {error}") from None


def bad_flag(message: str) -> NoReturn:
    """Argparse would print the usage of all flags first; `main` prints one line."""
    raise ValueError(message)


@functools.cache
def field_comments(cls: type) -> list[str]:
    return re.findall(r"^    \w+: .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE)


def add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, text: str) -> None:
    flag, default = "--" + field.name.replace("_", "-"), field.default
    text = re.sub(r"^\((spin|sft)\) ", "", text).replace("%", "%%")
    if field.type is bool:
        parser.add_argument(flag, action="store_true", help=text)
    elif isinstance(default, tuple):
        text += f" [{','.join(map(str, default))}]"
        kind = comma_separated(field.type.__args__[0])
        parser.add_argument(flag, type=kind, default=default, metavar="X,...", help=text)
    else:
        text += f" [{default}]" if default != "" else ""
        parser.add_argument(flag, type=field.type, default=default, metavar="X", help=text)


def comma_separated(item: type) -> Callable[[str], tuple]:
    def convert(text: str) -> tuple:
        return tuple(item(part) for part in text.split(","))

    convert.__name__ = f"comma-separated {item.__name__}"  # argparse names it in its message
    return convert
