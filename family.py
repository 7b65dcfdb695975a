"""The rest of the family: what other methods put in place of the opponent's newest responses, or of its weights.

Their losses and the mixture with the base policy are in losses.py.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import lora
import resume
from data import Example, decode
from model import GPTNeo
from prepare import Run, Stopped, generator

SHARD = 1024  # pairs that the scorer is asked about, then kept


def draw_from_history(
    examples: list[Example], responses: list[tuple[list[int], bool]], t: int, run: Run
) -> list[tuple[list[int], bool]]:
    """Fictitious play (arXiv 2404.04291): a prompt's response is drawn evenly from those of the last opponents to it.

    The opponent is then the average of theta_{t-K+1} ... theta_t (of those that met the prompt, with --prompts). Both
    log-probabilities in the loss are nevertheless recomputed under theta_t: p_t stands in Eq. 4.7 as the policy that
    the KL term of Eq. 4.3 keeps the player near, which is its own last iterate whoever wrote y'.
    """
    lines = [[example.line, *response] for example, response in zip(examples, responses)]
    resume.write_rows(run.out / f"responses-{t}.jsonl", lines)
    oldest = 0 if run.args.history == "all" else max(0, t + 1 - int(run.args.history))
    written = [resume.read_rows(run.out / f"responses-{k}.jsonl", expected=True) for k in range(oldest, t + 1)]
    by_line = [{line: (ids, finished) for line, ids, finished in rows} for rows in written]
    rng, drawn = generator(run.args.seed, t, "history"), []
    for example in examples:
        choices = [responses[example.line] for responses in by_line if example.line in responses]
        drawn.append(choices[int(torch.randint(len(choices), (), generator=rng))])
    return drawn


def ask_scorer(examples: list[Example], pairs: list[Any], run: Run, kept: Path | None) -> None:
    """Fills in the probability to win of every response. Raises Stopped where the scorer returns no probabilities."""

    def work(rows: range) -> list[list[float]]:
        wins = []
        for i in rows:
            texts = [
                decode(ids, run.tokenizer, run.eos_token_id) for ids in (pairs[i].real_ids, pairs[i].generated_ids)
            ]
            try:
                real, generated = map(float, run.scorer(examples[i].prompt, texts))
            except Exception as error:  # whatever the user's code raises, or returns
                raise Stopped(f"--scorer {run.args.scorer}: {type(error).__name__}: {error}") from None
            if not (0 <= real <= 1 and 0 <= generated <= 1):
                raise Stopped(f"--scorer {run.args.scorer}: returned {real, generated}, expected two probabilities")
            wins.append([real, generated])
        return wins

    for pair, (real, generated) in zip(pairs, resume.in_shards(kept, "wins", len(pairs), SHARD, work)):
        pair.real_wins, pair.generated_wins = real, generated


@contextlib.contextmanager
def base_weights(player: GPTNeo, run: Run) -> Iterator[None]:
    """The player with the weights of theta_0 for a while. Its own wait on disk: one model is in memory at a time."""
    adapter, folder = run.args.adapter, run.out / "resume" / "player"
    save, load = (lora.save_adapter, lora.load_adapter) if adapter else (GPTNeo.save_pretrained, GPTNeo.load_weights)
    save(player, folder)
    load(player, adapter or run.start)
    yield  # an error ends the run, and a run that goes on reads its last iterate: nothing to put back
    load(player, folder)
    shutil.rmtree(folder)
