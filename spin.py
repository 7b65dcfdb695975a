#!/usr/bin/env python3
"""SPIN: Self-Play Fine-Tuning (Chen et al., 2024, arXiv 2401.01335), from top to bottom.

    python spin.py                             recipes/pronounce.args: English spelling to pronunciation, on a CPU
    python spin.py --model DIR --data F.jsonl  self-play from your own fine-tuned model
    python spin.py --help                      every option

A language model was fine-tuned on human responses. To get better without new data it plays a game against itself. The
*opponent* p_t, the model as it stands, writes a response y' to every prompt x. The *player* p_theta, at first the same
model, learns to tell the human response y from y': it raises the probability of y against that of y'. Then it becomes
the next opponent. The game ends when y and y' cannot be told apart: the model writes like the data.

`spin_loss` is Eq. 4.7 of the paper and `play` is Algorithm 1; the rest is what these two need. An *iteration* is one
round of the game, an *epoch* a pass over its pairs, a *step* one update by the optimizer. The *iterate* theta_t is the
player after t iterations. log p(y|x), in nats, is summed over the tokens of y, including its end-of-sequence token.

Deviations from the paper and from the official code (uclaml/SPIN):
- The opponent is not a second model: it is the player before training, whose log-probabilities are stored once.
- Defaults: LoRA, AdamW, sampled responses. recipes/paper.args is the published recipe: all weights, RMSProp, greedy.
- Sampled ids are scored as they were sampled, never decoded and encoded again. The end-of-sequence token counts if it
  was sampled; the official code appends one to responses that were cut. Prompt and response are encoded apart.
- Pairs of equal responses are dropped: they have no gradient.
- --prompts draws a fresh random subset for each iteration; the paper uses the same 50,000 prompts every time.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW, Optimizer, RMSprop

from player import Player

Row = dict[str, Any]  # metrics or training signals by name


def spin_loss(real_ratios: Tensor, generated_ratios: Tensor, beta: float) -> Tensor:
    """Eq. 4.7 for each pair: l(beta * [log(p_theta(y|x) / p_t(y|x)) - log(p_theta(y'|x) / p_t(y'|x))]): (K, B).

    l(z) = log(1 + exp(-z)) is the logistic loss. While player and opponent are the same, the bracket is 0.

    Args:
        real_ratios: (B,) fp32, the first log-ratio, in nats. generated_ratios: (K, B), the second, for K generated
            responses to each prompt. beta: the paper's lambda; a larger one keeps the player nearer to the opponent.
    """
    return F.softplus(-beta * (real_ratios - generated_ratios))


def play(player: Player, examples: list, run: "Run", generate: Callable, score: Callable, train: Callable) -> None:
    """Algorithm 1, from its three phases: those of SPIN below, or those of another method (methods/).

    An example has `prompt_ids` and `real_ids`, the token ids of prompt x and human response y, and `asked`, the prompt
    for people to read. `run` hands out the work and keeps the results: the class `Run` below lists its calls.
    """
    for t in run.iterations(player):
        opponent = player  # theta_t; nothing is asked of it after `train` has changed the weights
        pairs, counts = generate(opponent, run.prompts(examples, t), t, run)
        pool = pairs + [Pair(**row) for row in run.previous_pairs(t)]  # none, unless --mix-previous asks for them
        score(opponent, pool, run)
        signals = train(player, pool, t, run)  # The player is theta_{t+1} from here on.
        run.finish_iterate(player, run.evaluate(player) | counts | signals, pairs)


@dataclass(slots=True)
class Pair:
    """A prompt x with its real response y, from the data, and the generated one y' (some methods have several)."""

    prompt_ids: list[int]
    real_ids: list[int]
    generated_ids: list[list[int]]  # one list of ids per generated response
    finished: bool  # whether the opponent ended its responses itself, within the length limit
    prompt: Any = ""  # the prompt as text or messages, for people who read the file of pairs
    opponent_real_logp: float | None = None  # log p_t(y|x), nats; `score` fills it in
    opponent_generated_logps: list[float] = field(default_factory=list)  # log p_t(y'|x) per generated response
    wins: tuple[float, float] = (1.0, 0.0)  # probability that each response is preferred; for SPPO in methods/

    @property
    def responses(self) -> list[list[int]]:
        return [self.real_ids, *self.generated_ids]

    @property
    def tokens(self) -> int:
        return sum(map(len, [self.prompt_ids, *self.responses]))


# ---------------------------------------------------------------- the three phases of an iteration


def generate(opponent: Player, examples: list, t: int, run: "Run") -> tuple[list[Pair], Row]:
    """The opponent writes one response to every prompt. Returns the pairs worth training on, and counts of all."""
    responses = run.sample(opponent, examples, t, "generate")
    pairs = [Pair(e.prompt_ids, e.real_ids, [ids], ended, e.asked) for e, (ids, ended) in zip(examples, responses)]
    return select(pairs, run.args.unfinished)


def select(pairs: list[Pair], unfinished: str, drop_identical: bool = True) -> tuple[list[Pair], Row]:
    """Leaves out pairs without gradient, and does what --unfinished says. Returns the pairs to train on, and counts."""
    if unfinished == "cut":  # The real response is cut, too: otherwise the missing end alone would give y' away.
        for pair in pairs:
            if not pair.finished:
                pair.real_ids = pair.real_ids[: len(pair.generated_ids[0])]
    # For equal responses the bracket of Eq. 4.7 is always 0. Losses that see more than the bracket keep such pairs.
    different = [pair for pair in pairs if any(ids != pair.real_ids for ids in pair.generated_ids)]
    wanted = different if drop_identical else pairs
    wanted = [pair for pair in wanted if pair.finished or unfinished != "drop"]
    return wanted, {
        "pairs": len(wanted),
        "generated": len(pairs),
        "identical": len(pairs) - len(different),
        "truncated": fmean(not pair.finished for pair in pairs),
        "real_length": fmean(len(pair.real_ids) for pair in pairs),
        "generated_length": fmean(len(ids) for pair in pairs for ids in pair.generated_ids),
    }


def score(opponent: Player, pairs: list[Pair], run: "Run") -> None:
    """Stores log p_t of each response with its pair. Pairs of the previous iteration get it anew, under theta_t."""
    logps = run.logps(opponent, [(pair.prompt_ids, *pair.responses) for pair in pairs], "score")
    for pair, (real_logp, *generated_logps) in zip(pairs, logps):
        pair.opponent_real_logp, pair.opponent_generated_logps = real_logp, generated_logps


def train(player: Player, pairs: list[Pair], t: int, run: "Run") -> Row:
    """Minimises Eq. 4.7 over the pairs. Returns training signals: means over the last tenth of the steps."""
    beta = run.args.beta[t]
    return optimize(player, pairs, lambda batch: pair_loss(player, batch, beta), t, run)


def pair_loss(player: Player, batch: list[Pair], beta: float, loss: Callable = spin_loss) -> dict[str, Tensor]:
    """The loss of each pair, and what is worth watching: (B,) tensors by name."""

    def columns(rows: list[list[float]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32, device=player.device).T  # (1 + K, B)

    logps = player.response_logps([(pair.prompt_ids, *pair.responses) for pair in batch])  # (1 + K, B), of p_theta
    ratios = logps - columns([[pair.opponent_real_logp, *pair.opponent_generated_logps] for pair in batch])
    margins = beta * (ratios[0] - ratios[1:].mean(0)).detach()  # l's argument; above 0 once the player tells y from y'
    per_token = logps / columns([[len(ids) for ids in pair.responses] for pair in batch])  # nats per token
    return {
        "loss": loss(ratios[0], ratios[1:], beta).mean(0),
        "margin": margins,
        "accuracy": (margins > 0).float(),  # a margin of 0, as at the first step, counts as wrong
        "real_logp": per_token[0],
        "generated_logp": per_token[1:].mean(0),
    }


def optimize(player: Player, items: list, loss_of: Callable, t: int, run: "Run") -> Row:
    """Minimises the mean of loss_of(items)["loss"] over items with a length in `tokens`, by an optimizer made anew."""
    args = run.args
    with run.training(player, items, t) as training:
        weights, rmsprop = training.parameters, args.optimizer == "rmsprop"  # The paper's RMSProp has no weight decay.
        fused = weights[0].is_cuda  # A GPU then updates all weights by a few kernels.
        optimizer = RMSprop(weights) if rmsprop else AdamW(weights, weight_decay=args.weight_decay, fused=fused)
        for step, batch in training.batches(optimizer):
            optimizer.param_groups[0]["lr"] = args.lr[t] * schedule(step, training.steps, args.warmup)
            for micro_batch, weight in training.micro_batches(batch):
                values = loss_of(micro_batch)
                (weight * values["loss"].sum() / len(batch)).backward()  # gradients add up to those of the mean
                training.add(values, weight)
            training.step(optimizer, args.clip)
        return training.signals()


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: linear rise over the first `warmup` share of the steps, then linear fall to 0."""
    rise = math.ceil(warmup * steps)
    return (step + 1) / rise if step < rise else (steps - step) / max(steps - rise, 1)


# ---------------------------------------------------------------- what the method asks of its surroundings


class Run(Protocol):
    """Hands out work and keeps results: on disk in runtime/run.py, in memory in examples/minimal.py."""

    args: "SpinOptions"

    def iterations(self, player: Player) -> Iterator[int]: ...  # yields t with the player as theta_t
    def prompts(self, examples: list, t: int) -> list: ...  # the examples of iteration t, in random order
    # Per example: (ids of a response, whether it ended by itself). Each `purpose` has random numbers of its own.
    def sample(self, player: Player, examples: list, t: int, purpose: str) -> list[tuple[list[int], bool]]: ...
    # Per item (prompt ids, response ids, ...): log p of each of its responses, as in training but without gradient.
    def logps(self, player: Player, items: list[tuple], purpose: str) -> list[list[float]]: ...
    def previous_pairs(self, t: int) -> list[Row]: ...  # fields of the pairs of iteration t - 1, or []
    def training(self, player: Player, items: list, t: int) -> AbstractContextManager["Training"]: ...
    def evaluate(self, player: Player) -> Row: ...  # held-out metrics
    def finish_iterate(self, player: Player, row: Row, pairs: list[Pair]) -> None: ...  # keeps weights, row and pairs


class Training(Protocol):
    """The optimizer steps of one iteration: shuffled, divided among GPUs if there are several, logged, resumable."""

    parameters: list[Tensor]  # the trained ones
    steps: int

    def batches(self, optimizer: Optimizer) -> Iterator[tuple[int, list]]: ...  # (step, items of its batch)
    def micro_batches(self, batch: list) -> Iterator[tuple[list, float]]: ...  # (part, weight), 0 for a repeated part
    def add(self, values: dict[str, Tensor], weight: float) -> None: ...  # adds to the step's row of the log
    def step(self, optimizer: Optimizer, clip: float) -> None: ...  # skipped if the loss is not finite
    def signals(self) -> Row: ...  # what the values were at the end of training


def option(default: Any, help: str, **facts: Any) -> Any:
    """A field of a dataclass of options, of which runtime/options.py makes a flag."""
    return field(default=default, metadata={"help": help} | facts)


@dataclass(frozen=True)
class TrainingOptions:
    """Options of `optimize`. A tuple has a value per iteration; on a command line one value serves for all."""

    optimizer: str = option("adamw", "The optimizer; the paper uses rmsprop.", choices=("adamw", "rmsprop"))
    lr: tuple[float, ...] = option((5e-5,), "Peak learning rate.", within="(0, 1000]")
    epochs: tuple[int, ...] = option((2,), "Passes over the pairs or examples of an iteration.", within="[1, 1000000]")
    batch: int = option(64, "Pairs or examples per step.", within="[1, inf)")
    warmup: float = option(0.1, "Share of the steps in which the learning rate rises.", within="[0, 1]")
    weight_decay: float = option(0.0, "Weight decay of AdamW.", within="[0, inf)")
    clip: float = option(1.0, "Largest norm of the gradient; inf: no limit.", within="(0, inf]")


@dataclass(frozen=True)
class SpinOptions(TrainingOptions):
    """Options of self-play. runtime/options.py adds those of every run, such as --iterations and --prompts."""

    beta: tuple[float, ...] = option((1.0,), "Beta in Eq. 4.7, the paper's lambda.", within="(0, inf)")
    temperature: float = option(1.0, "Temperature of generated responses; 0: greedy.", within="0 or [0.001, inf)")
    top_k: int = option(0, "Sample only from the k likeliest tokens; 0: from all.", within="[0, inf)")
    top_p: float = option(1.0, "Sample only from the likeliest tokens with this total probability.", within="(0, 1]")
    unfinished: str = option(
        "keep", "Pairs with a cut response: keep, drop, or cut the real one as well.", choices=("keep", "drop", "cut")
    )
    mix_previous: bool = option(False, "Train on the pairs of the previous iteration too.")


def main(argv: list[str] | None = None) -> int:
    from runtime import cli  # the method itself needs nothing of runtime/

    return cli.main("spin", lambda *game: play(*game, generate, score, train), Player, SpinOptions, argv, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
