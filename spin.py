#!/usr/bin/env python3
"""SPIN: Self-Play Fine-Tuning (Chen et al., 2024, arXiv 2401.01335), from top to bottom.

    python spin.py                             self-play on the embedded task (spelling to pronunciation), on a CPU
    python spin.py --model DIR --data F.jsonl  self-play from your own fine-tuned GPT-Neo
    python spin.py --help                      every option

A language model was fine-tuned on human responses. To get better without new data it plays a game against itself. The
*opponent* p_t, a frozen copy of the model, writes a response to every prompt. The *player* p_theta learns to tell the
human responses from those, by making the human ones likelier and the opponent's less likely. Then the player becomes
the next opponent. The game ends when the two kinds of response cannot be told apart: the model writes like the data.

Words: a prompt x has a *real* response y from the data and a *generated* one y' from the opponent, together a *pair*.
An *iteration* is one round of the game, an *epoch* a pass over the pairs of an iteration, a *step* one update by the
optimizer. The *iterate* theta_t is the player after t iterations. log p(y|x) is summed over the tokens of y, with its
end-of-sequence token, in nats.

Deviations from the paper and from the official code (uclaml/SPIN):
- The opponent is not a second model: it is the player before training, whose log-probabilities are stored once.
- LoRA is the default of --rank; 0 trains all parameters, as the paper and the run without flags do. AdamW is the
  default optimizer; --optimizer rmsprop is the paper's. recipes/paper.args is the published recipe.
- Sampled ids are scored as they were sampled, never decoded and encoded again. The end-of-sequence token counts where
  it was sampled; the official code appends one to responses that were cut.
- Prompt and response are encoded apart. Pairs of equal responses are dropped: they have no gradient.
- Examples that do not fit the context are an error or left out and counted, never cut silently.
- The prompts of an iteration may be a fresh random subset (--prompts); the paper uses the same 50,000 every time.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from player import Player
from runtime import cli, parallel
from runtime.data import Example, Pair
from runtime.evaluate import Row, mean
from runtime.options import Args, value_at
from runtime.run import Run
from runtime.stopping import Stopped


def spin_loss(real_ratios: Tensor, generated_ratios: Tensor, beta: float) -> Tensor:
    """Eq. 4.7 for each pair: l(beta * margin) with the logistic loss l(z) = log(1 + exp(-z)).

    margin = log [p_theta(y|x) / p_t(y|x)] - log [p_theta(y'|x) / p_t(y'|x)]

    Args:
        real_ratios, generated_ratios: (B,) fp32, the two log-ratios of the margin, in nats.
        beta: the paper's lambda. A larger one asks for smaller steps away from the opponent.

    Returns: (B,), ln 2 where player and opponent are the same.
    """
    return F.softplus(-beta * (real_ratios - generated_ratios))


def play(
    player: Player, examples: list[Example], run: Run, generate: Callable, score: Callable, train: Callable
) -> None:
    """Algorithm 1, from its three phases: those of SPIN below, or those of another method (family.py).

    `run` counts the iterations, evaluates every iterate, theta_0 included, and resumes where a killed run stopped.
    """
    for t in run.iterations(player):
        opponent = player  # theta_t: its weights stay as they are until `train`
        pairs, counts = generate(opponent, run.prompts(examples, t), t, run)
        pool = pairs + run.previous_pairs(t)  # none, unless --mix-previous asks for those of iteration t - 1
        score(opponent, pool, run)
        signals = train(player, pool, t, run)
        run.finish_iterate(player, run.evaluate(player) | counts | signals, pairs)


# ---------------------------------------------------------------- the three phases of an iteration


def generate(opponent: Player, examples: list[Example], t: int, run: Run) -> tuple[list[Pair], Row]:
    """The opponent writes one response to every prompt. Returns the pairs worth training on, and counts of all."""
    args = run.args
    responses = run.respond(
        opponent, examples, "generate", run.seed(t, "generate"), args.temperature, args.top_k, args.top_p
    )
    pairs = [
        Pair(e.prompt_ids, e.real_ids, ids, finished, prompt=e.asked) for e, (ids, finished) in zip(examples, responses)
    ]
    return select(pairs, t, run)


def select(pairs: list[Pair], t: int, run: Run, drop_identical: bool = True) -> tuple[list[Pair], Row]:
    """Leaves out pairs that have no gradient or that --unfinished does not want. Returns the others, and counts.

    Raises: Stopped where no pair is left.
    """
    unfinished = run.args.unfinished
    if unfinished == "cut":  # otherwise the missing end alone tells a response that was cut from a real one
        for pair in pairs:
            if not pair.finished:
                pair.real_ids = pair.real_ids[: len(pair.generated_ids)]
    # Equal responses have margin 0 whatever the player does, so their gradient is zero.
    different = [pair for pair in pairs if pair.generated_ids != pair.real_ids]
    wanted = different if drop_identical else pairs
    wanted = [pair for pair in wanted if pair.finished or unfinished != "drop"]
    if not wanted:
        raise Stopped(f"iteration {t}: no pair is left, all {len(pairs)} were identical or unfinished")
    return wanted, {
        "pairs": len(wanted),
        "generated": len(pairs),
        "identical": len(pairs) - len(different),
        "truncated": mean([not pair.finished for pair in pairs]),
        "real_length": mean([len(pair.real_ids) for pair in pairs]),
        "generated_length": mean([len(pair.generated_ids) for pair in pairs]),
    }


def score(opponent: Player, pairs: list[Pair], run: Run) -> None:
    """Stores log p_t of both responses with every pair, computed once, by the code path that trains.

    Pairs of the iteration before are scored again: their opponent is now theta_t, too.
    """
    logps = run.logps(opponent, [(p.prompt_ids, p.real_ids, p.generated_ids) for p in pairs], "score")
    for pair, (real_logp, generated_logp) in zip(pairs, logps):
        pair.opponent_real_logp = real_logp
        pair.opponent_generated_logp = generated_logp


def train(player: Player, pairs: list[Pair], t: int, run: Run) -> Row:
    """Minimises Eq. 4.7 over the pairs. Returns training signals: means over the last tenth of the steps."""
    beta = value_at(run.args.beta, t)

    def loss_of(batch: list[Pair]) -> dict[str, Tensor]:
        return pair_loss(player, batch, beta)

    return optimize(player, pairs, loss_of, t, run)


def pair_loss(player: Player, batch: list[Pair], beta: float) -> dict[str, Tensor]:
    """The loss of each pair, and what is worth watching: (B,) tensors by name, of which "loss" has a gradient."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=player.device)  # (B,)

    logps = player.response_logps([(p.prompt_ids, p.real_ids, p.generated_ids) for p in batch])  # (2, B), of p_theta
    real_ratios = logps[0] - column([p.opponent_real_logp for p in batch])
    generated_ratios = logps[1] - column([p.opponent_generated_logp for p in batch])
    margins = beta * (real_ratios - generated_ratios).detach()
    return {
        "loss": spin_loss(real_ratios, generated_ratios, beta),
        "margin": margins,
        "accuracy": (margins > 0).float(),  # a margin of 0, as at the first step, counts as wrong
        "real_logp": logps[0].detach() / column([len(p.real_ids) for p in batch]),  # nats a token
        "generated_logp": logps[1].detach() / column([len(p.generated_ids) for p in batch]),
    }


# ---------------------------------------------------------------- the optimizer


def optimize(
    player: Player, items: list[Any], loss_of: Callable, t: int, run: Run, prepare: Callable = lambda batch: None
) -> Row:
    """Minimises the mean of loss_of(batch)["loss"] over `items`. The optimizer starts afresh in every iteration.

    `prepare` sees each batch whole, before `take_step` cuts it into the micro-batches that `loss_of` sees.

    `run.training` shuffles, resumes, keeps the log, and stops the run after several steps that are not finite.
    """
    args = run.args
    peak = value_at(args.lr, t)
    with run.weights_to_train(player):
        optimizer = make_optimizer([p for p in player.model.parameters() if p.requires_grad], args)
        training = run.training(t, items, player.model, optimizer)
        player.model.train()
        for step, batch in training:
            optimizer.param_groups[0]["lr"] = peak * schedule(step, training.steps, args.warmup)
            prepare(batch)
            training.record(take_step(player, optimizer, batch, loss_of, args.clip))
        player.model.eval()
    return training.signals()


def take_step(
    player: Player, optimizer: torch.optim.Optimizer, batch: list[Any], loss_of: Callable, clip: float
) -> Row:
    """One update by the gradient of the mean loss over the batch, however micro-batches cut it.

    Returns the means of all that `loss_of` computes. If the loss or the gradient is not finite, the weights stay as
    they are, "skipped" is true, and values that are not finite are None, since JSON has no NaN.
    """
    sums: dict[str, Tensor] = {}
    # The weight is 1, or 0 where a rank repeats a micro-batch because others have more (see docs/scaling.md).
    for micro_batch, weight in parallel.micro_batches([item.tokens for item in batch], player.micro_batches):
        values = loss_of([batch[i] for i in micro_batch])
        (weight * values["loss"].sum() / len(batch)).backward()
        sums = {name: sums.get(name, 0) + weight * value.detach().sum() for name, value in values.items()}
    group = optimizer.param_groups[0]
    sums = parallel.sum_gradients(group["params"], sums)  # over all ranks, of which each had a part of the batch
    norm = parallel.whole(torch.nn.utils.clip_grad_norm_(group["params"], clip))
    means = torch.stack([*(total / len(batch) for total in sums.values()), norm]).tolist()  # waits for the GPU once
    row = {name: value if math.isfinite(value) else None for name, value in zip([*sums, "grad_norm"], means)}
    skipped = None in row.values()
    if not skipped:
        optimizer.step()
    optimizer.zero_grad()
    return row | {"lr": group["lr"], "skipped": skipped}


def make_optimizer(parameters: list[Tensor], args: Args) -> torch.optim.Optimizer:
    """AdamW, or the paper's RMSProp, which has no weight decay. `optimize` sets the learning rate of each step."""
    if args.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters)
    return torch.optim.AdamW(parameters, weight_decay=args.weight_decay)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: linear rise over the first `warmup` share of the steps, then linear fall to 0."""
    rise = math.ceil(warmup * steps)
    return (step + 1) / rise if step < rise else (steps - step) / max(steps - rise, 1)


def main(argv: list[str] | None = None) -> int:
    def self_play(player: Player, examples: list[Example], run: Run) -> None:
        play(player, examples, run, generate, score, train)

    return cli.main("spin", self_play, Player, Args, argv, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
