#!/usr/bin/env python3
"""Supervised fine-tuning, the phase before self-play: the same optimizer, evaluation and files as spin.py.

python sft.py --model DIR --data F.jsonl   fine-tunes a GPT-Neo on the responses of the data
python sft.py                              makes the start of the embedded task from scratch
python sft.py --help                       every option
"""

import sys
from collections.abc import Callable

from torch import Tensor

from player import Player
from runtime import cli
from runtime.data import Example
from runtime.evaluate import mean
from runtime.options import Args
from runtime.run import Run
from spin import optimize


def fine_tune(player: Player, examples: list[Example], run: Run) -> None:
    """Minimises the negative log-probability of the real responses, for --iterations rounds of --epochs each."""
    loss_of = token_loss(player, examples)
    for t in run.iterations(player):
        signals = optimize(player, run.prompts(examples, t), loss_of, t, run)
        run.finish_iterate(player, run.evaluate(player) | signals)


def token_loss(player: Player, examples: list[Example]) -> Callable[[list[Example]], dict[str, Tensor]]:
    """The loss for `optimize`: the negative log-probability of a batch's real responses, (B,), in nats a token."""
    length = mean([len(e.real_ids) for e in examples])

    def loss_of(batch: list[Example]) -> dict[str, Tensor]:
        (logps,) = player.response_logps([(e.prompt_ids, e.real_ids) for e in batch])  # (B,)
        # Dividing by the mean length, a constant, gives nats a token in which every token has the same weight.
        return {"loss": -logps / length}

    return loss_of


def main(argv: list[str] | None = None) -> int:
    return cli.main("sft", fine_tune, Player, Args, argv, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
