#!/usr/bin/env python3
"""Supervised fine-tuning, the phase before self-play: the same optimizer, evaluation and files as spin.py.

    python sft.py                             recipes/pronounce-sft.args: trains pronounce/start from random weights
    python sft.py --model DIR --data F.jsonl  fine-tunes a model on the responses of your data
    python sft.py --help                      every option

The loss is `token_loss`, the loop `fine_tune`; what is left is that of spin.py.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from player import Player
from spin import Run, TrainingOptions, optimize, option


def fine_tune(player: Player, examples: list, run: Run) -> None:
    """Minimises the negative log-probability of the real responses, for --iterations rounds of --epochs each."""
    loss_of = token_loss(player, examples, run.args.loss)
    for t in run.iterations(player):
        signals = optimize(player, run.prompts(examples, t), loss_of, t, run)
        run.finish_iterate(player, run.evaluate(player) | signals, [])


def token_loss(player: Player, examples: list, loss: str = "nll") -> Callable[[list], dict[str, Tensor]]:
    """Returns the loss for `optimize`: the negative log-probability of each real response, (B,), in nats per token.

    `loss` is "nll" or "dft". Dynamic fine-tuning (DFT, arXiv 2508.05629) weighs each token by its own probability, a
    constant: the gradient of -log p is that of -p over p, which is large for tokens that the model finds unlikely. At
    the optimum the likeliest token of each place has probability 1, and the NLL rises on the way.
    """
    length = fmean(len(e.real_ids) for e in examples)

    def loss_of(batch: list) -> dict[str, Tensor]:
        items = [(e.prompt_ids, e.real_ids) for e in batch]
        if loss == "dft":
            (by_token,) = player.token_logps(items)  # (B, longest), 0 behind the end of a response
            logps = (by_token.exp().detach() * by_token).sum(1)
        else:
            (logps,) = player.response_logps(items)  # (B,)
        # Dividing by the mean length, a constant, gives nats per token in which every token has the same weight.
        return {"loss": -logps / length}

    return loss_of


@dataclass(frozen=True)
class SftOptions(TrainingOptions):
    """Options of supervised fine-tuning."""

    loss: str = option(
        "nll", "nll: negative log-probability; dft: weighted by each token's probability.", choices=("nll", "dft")
    )
    from_scratch: bool = option(False, "Start from random weights; --model needs only config.json and a tokenizer.")

    def check_together(self) -> None:
        super().check_together()  # type: ignore[misc] - RunOptions in runtime/options.py has it
        self.require(not (self.from_scratch and self.rank), "--from-scratch requires --rank 0: it trains all weights")


def main(argv: list[str] | None = None) -> int:
    from runtime import cli

    return cli.main("sft", fine_tune, Player, SftOptions, argv, about=__doc__, recipe="pronounce-sft.args")


if __name__ == "__main__":
    sys.exit(main())
