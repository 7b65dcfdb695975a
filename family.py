#!/usr/bin/env python3
"""The methods beside SPIN: the same loop with other pairs, another reference, or another loss.

    python family.py --loss ipo                                  IPO's loss on the embedded task
    python family.py --alpha 0.3                                 alpha-SPIN: stay near the start
    python family.py --history 0                                 fictitious play against all opponents so far
    python family.py --pairs F.jsonl --iterations 1 --model DIR  DPO on given pairs
    python family.py --reinforce --adapter DIR ...               self-reinforcement, without answers
    python family.py --help                                      every option

A method changes one phase of `spin.play`; `play` below puts together those that the options ask for, and they combine.
All losses are functions of (real_ratios, generated_ratios, beta), (B,) fp32 tensors in nats. A ratio is
log p_theta(response|x) - log q(response|x), summed over the response's tokens, with q the reference: the opponent p_t,
a mixture, or the start. The table of methods with their sources is in README.md.
"""

import contextlib
import functools
import hashlib
import numbers
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import lora
import spin
from player import Player
from runtime import cli, storage
from runtime.data import Example, Pair
from runtime.evaluate import Row
from runtime.options import Args, at_least, option, shown, valid, value_at
from runtime.run import Run
from runtime.stopping import SIGNALS, Stopped

OUR_NAMES = {path.stem for path in Path(__file__).resolve().parent.iterdir()}  # of modules and packages
SCORER_SHARD = 1024  # pairs that the scorer is asked about before its answers are written

# ---------------------------------------------------------------- losses


def hinge_loss(real_ratios: Tensor, generated_ratios: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta * margin): pairs whose margin has reached 1 / beta have no gradient.

    Source: one of the losses that SPIN's Eq. 4.2 admits; as a loss on pairs SLiC-HF (arXiv 2305.10425) and RSO
    (arXiv 2309.06657).
    """
    return torch.relu(1 - beta * (real_ratios - generated_ratios))


def ipo_loss(
    real_ratios: Tensor,
    generated_ratios: Tensor,
    beta: float,
    real_lengths: Tensor | float = 1.0,
    generated_lengths: Tensor | float = 1.0,
) -> Tensor:
    """(margin - 1 / (2 beta))^2: the margin has a goal that it must not exceed, so it stays bounded.

    Each ratio is divided by its response's length in tokens, as the authors say they did: otherwise the goal would
    depend on the length. Source: arXiv 2310.12036, Eq. 17, with beta for its tau.
    """
    return (real_ratios / real_lengths - generated_ratios / generated_lengths - 1 / (2 * beta)) ** 2


def sppo_loss(
    real_ratios: Tensor,
    generated_ratios: Tensor,
    beta: float,
    real_wins: Tensor | float = 1.0,
    generated_wins: Tensor | float = 0.0,
) -> Tensor:
    """Half the sum of (ratio - (P - 1/2) / beta)^2 over both responses: each ratio has a goal of its own.

    P, in [0, 1], is the probability that a response is preferred to one of the opponent's; 1 and 0 are the `hard` form.
    Source: arXiv 2405.00675, Eq. 4.7, with 1 / beta for its eta; halved as in the authors' code.
    """
    real = (real_ratios - (real_wins - 0.5) / beta) ** 2
    generated = (generated_ratios - (generated_wins - 0.5) / beta) ** 2
    return (real + generated) / 2


LOSSES = {"logistic": spin.spin_loss, "hinge": hinge_loss, "ipo": ipo_loss, "sppo": sppo_loss}


def train(player: Player, pairs: list[Pair], t: int, run: Run) -> Row:
    """spin.train with the loss of --loss. IPO is told the lengths of the responses, SPPO their probabilities to win."""
    beta = value_at(run.args.beta, t)
    name = run.args.loss

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=player.device)  # (B,)

    def loss_of(batch: list[Pair]) -> dict[str, Tensor]:
        extra = {}
        if name == "ipo":
            extra["real_lengths"] = column([len(p.real_ids) for p in batch])
            extra["generated_lengths"] = column([len(p.generated_ids) for p in batch])
        if name == "sppo":
            extra["real_wins"] = column([p.wins[0] for p in batch])
            extra["generated_wins"] = column([p.wins[1] for p in batch])
        return spin.pair_loss(player, batch, beta, functools.partial(LOSSES[name], **extra))

    return spin.optimize(player, pairs, loss_of, t, run)


# ---------------------------------------------------------------- references


def mixture_logp(opponent_logp: float, base_logp: float, alpha: float) -> float:
    """(1 - alpha) log p_t + alpha log p_0: the geometric mixture of the opponent and the base policy, not normalised.

    In place of log p_t it adds to self-play a KL term that keeps the player near the base policy. Its normaliser
    depends on the prompt alone, so it cancels in a margin (not in `sppo_loss`, where it shifts both ratios).
    Source: alpha-SPIN, arXiv 2404.04291; alpha 0 is SPIN, alpha 1 always plays against the base policy.
    """
    return (1 - alpha) * opponent_logp + alpha * base_logp


def score_mixture(opponent: Player, pairs: list[Pair], run: Run) -> None:
    """spin.score with the mixture of --alpha as the reference. The base policy p_0 is the start, theta_0."""
    spin.score(opponent, pairs, run)
    with base_policy(opponent, run):
        base = run.logps(opponent, [(p.prompt_ids, p.real_ids, p.generated_ids) for p in pairs], "score-base")
    for pair, (real_logp, generated_logp) in zip(pairs, base):
        pair.opponent_real_logp = mixture_logp(pair.opponent_real_logp, real_logp, run.args.alpha)
        pair.opponent_generated_logp = mixture_logp(pair.opponent_generated_logp, generated_logp, run.args.alpha)


@contextlib.contextmanager
def base_policy(player: Player, run: Run) -> Iterator[None]:
    """The player as theta_0 for a while: with adapters off, or, where those do not suffice, with weights from disk.

    One model is in memory at a time: the player's own weights wait on disk.
    """
    if run.args.rank and not run.args.adapter:
        with lora.lora_disabled(player.model):
            yield
        return
    folder = run.out / "resume" / "player"
    run.check_start("adapter" if run.args.adapter else "model")
    if run.args.adapter:
        lora.save_adapter(player.model, folder)
        lora.load_adapter(player.model, run.args.adapter)
    else:
        player.model.save_pretrained(folder)
        player.model.load_weights(run.start)
    # No `finally`: an error ends the run, and a resumed run reads its last iterate.
    yield
    if run.args.adapter:
        lora.load_adapter(player.model, folder)
    else:
        player.model.load_weights(folder)
    shutil.rmtree(folder)


# ---------------------------------------------------------------- sources of pairs


def generate(opponent: Player, examples: list[Example], t: int, run: Run) -> tuple[list[Pair], Row]:
    """The pairs of an iteration, from the source that the options name: given, reinforced, or the opponents so far."""
    args = run.args
    if args.pairs:
        pairs = [Pair(e.prompt_ids, e.real_ids, e.generated_ids, finished=True, wins=e.wins) for e in examples]
    elif args.reinforce:
        pairs = reinforce(opponent, examples, t, run)
    else:
        pairs = fictitious_play(opponent, examples, t, run)
    if args.scorer:
        ask_scorer(examples, pairs, run)
    better = [pair for pair in pairs if pair.wins[0] >= args.min_win]
    if not better:
        raise Stopped(f"iteration {t}: no pair is left, all {len(pairs)} are below --min-win {args.min_win}")
    # SPPO has no margin, so pairs of equal responses have a gradient there.
    return spin.select(better, t, run, drop_identical=args.loss != "sppo")


def fictitious_play(opponent: Player, examples: list[Example], t: int, run: Run) -> list[Pair]:
    """Each prompt's response is drawn evenly from those of the last --history opponents to it; with 1 this is SPIN.

    The opponent is then the average of theta_{t-K+1} ... theta_t (of those that met the prompt, with --prompts). Both
    log-probabilities in the loss are nevertheless those under theta_t: p_t stands in Eq. 4.7 as the policy that the KL
    term of Eq. 4.3 keeps the player near, which is its own last iterate whoever wrote y'.
    Source: arXiv 2404.04291.
    """
    args = run.args
    responses = run.respond(
        opponent, examples, "generate", run.seed(t, "generate"), args.temperature, args.top_k, args.top_p
    )
    if args.history != 1:
        responses = draw_from_history(examples, responses, t, run)
    return [Pair(e.prompt_ids, e.real_ids, ids, finished) for e, (ids, finished) in zip(examples, responses)]


def draw_from_history(
    examples: list[Example], responses: list[tuple[list[int], bool]], t: int, run: Run
) -> list[tuple[list[int], bool]]:
    """Writes the newest responses to responses-<t>.jsonl and draws one of the last --history for each prompt."""
    lines = [[example.line, *response] for example, response in zip(examples, responses)]
    storage.write_rows(run.out / f"responses-{t}.jsonl", lines)
    oldest = max(0, t + 1 - run.args.history) if run.args.history else 0
    written = [run.read_rows(f"responses-{k}.jsonl") for k in range(oldest, t)] + [lines]
    by_line = [{line: (ids, finished) for line, ids, finished in rows} for rows in written]
    rng = run.generator(t, "history")
    drawn = []
    for example in examples:
        choices = [responses[example.line] for responses in by_line if example.line in responses]
        drawn.append(choices[int(torch.randint(len(choices), (), generator=rng))])
    return drawn


def reinforce(player: Player, examples: list[Example], t: int, run: Run) -> list[Pair]:
    """Self-reinforcement (Tong et al., 2024, arXiv 2405.04086): no answers are needed.

    The tuned model's response takes the place of the human one, and the untuned model's, with the adapters off, that
    of the opponent's.
    """
    args = run.args
    options = (args.temperature, args.top_k, args.top_p)
    tuned = run.respond(player, examples, "tuned", run.seed(t, "generate"), *options)
    with lora.lora_disabled(player.model):
        untuned = run.respond(player, examples, "untuned", run.seed(t, "untuned"), *options)
    pairs = []
    for example, (real_ids, real_end), (generated_ids, generated_end) in zip(examples, tuned, untuned):
        pairs.append(Pair(example.prompt_ids, real_ids, generated_ids, finished=real_end and generated_end))
    return pairs


# ---------------------------------------------------------------- scorers


def ask_scorer(examples: list[Example], pairs: list[Pair], run: Run) -> None:
    """Stores with every pair the probabilities to win that --scorer gives. Raises: Stopped if it gives none."""
    name = run.args.scorer
    scorer = load_scorer(name)

    def work(items: range) -> list[list[float]]:
        wins = []
        for i in items:
            texts = [run.text(pairs[i].real_ids), run.text(pairs[i].generated_ids)]
            try:
                answer = scorer(examples[i].prompt, texts)
            except BaseException as error:  # the user's code may raise anything, SystemExit too
                raise Stopped(f"--scorer {name}: {type(error).__name__}: {error}") from None
            wins.append(probabilities(answer, name))
            SIGNALS.check()  # a scorer may take long
        return wins

    for pair, (real, generated) in zip(pairs, run.shards("wins", len(pairs), SCORER_SHARD, work)):
        pair.wins = (real, generated)


def probabilities(answer: object, name: str) -> list[float]:
    """A scorer's answer, checked: a list or tuple of two probabilities. Raises: Stopped."""
    two = isinstance(answer, list | tuple) and len(answer) == 2
    if two and all(isinstance(p, numbers.Real) and 0 <= p <= 1 for p in answer):
        return [float(p) for p in answer]
    raise Stopped(f"--scorer {name}: returned {shown(repr(answer))}, expected a list of two probabilities")


def load_scorer(name: str) -> Callable[[str, list[str]], Sequence[float]]:
    """FILE.py:NAME to the function. It is the user's own code: nothing that comes with a model is run.

    Raises: FileNotFoundError, or ValueError naming what is wrong with it.
    """
    file, _, attribute = name.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"--scorer {name}: no such file, expected FILE.py:NAME")
    try:
        function = getattr(_module(Path(file).resolve(), Path(file).read_bytes()), attribute)
    except BaseException as error:  # the user's code may raise anything, SystemExit too
        raise ValueError(f"--scorer {name}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise ValueError(f"--scorer {name}: {type(function).__name__}, expected a function")
    return function


@functools.cache
def _module(file: Path, source: bytes) -> types.ModuleType:
    """Runs the file once in a process, so that a scorer keeps what it has loaded.

    It may import modules that lie beside it, even if one is called like one of ours: `model`, say.
    """
    module = types.ModuleType("scorer")
    module.__file__ = str(file)
    beside = {path.stem for path in file.parent.iterdir()}
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in beside & OUR_NAMES}
    sys.modules["scorer"] = module  # dataclasses in the file look their module up here
    sys.path.insert(0, str(file.parent))
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    finally:
        sys.path.remove(str(file.parent))
        sys.modules.update(ours)
    return module


# ---------------------------------------------------------------- options


SHARE = valid(lambda x: 0 <= x <= 1, "in [0, 1]")


@dataclass(frozen=True)
class FamilyArgs(Args):
    """The options of spin.py, and those of the other methods."""

    pairs: tuple[str, ...] = option(
        (), 'Given pairs in place of --data and of responses: a record also holds a "generated" one (DPO).',
        group="methods", changeable=True, repeated="PATH",
    )  # fmt: skip
    loss: str = option("logistic", "Loss of a pair; logistic is SPIN's Eq. 4.7.", choices=tuple(LOSSES))
    alpha: float = option(0.0, "Share of the start in the reference of the log-ratios (alpha-SPIN).", **SHARE)
    history: int = option(
        1, "Opponents that responses are drawn from, the newest first; 0: all (fictitious play).", **at_least(0)
    )
    reinforce: bool = option(
        False, "Responses with --adapter against responses without it; needs no answers (self-reinforcement)."
    )
    scorer: str = option(
        "", "FILE.py:NAME of f(prompt, responses) -> probabilities to beat the opponent, for --loss sppo.",
        changeable=True, **valid(lambda x: not x or re.fullmatch(r".+\.py:\w+", x), "FILE.py:NAME"),
    )  # fmt: skip
    min_win: float = option(0.0, "Smallest probability to win of the real response of a pair.", **SHARE)

    def check_together(self) -> None:
        super().check_together()
        self.require("min_win", not self.min_win or self.scorer or self.pairs, "--scorer or --pairs with it")
        self.require("pairs", not (self.pairs and self.data), "no --data with it: it takes its place")
        one_source = not (self.pairs or self.reinforce)
        self.require("history", self.history == 1 or one_source, "no --pairs or --reinforce with it")
        if self.reinforce:
            self.require("reinforce", self.adapter and self.rank, "--adapter, and no --rank 0, with it")
            self.require("reinforce", self.eval_data, "--eval-data, which has answers, with it")
            self.require("reinforce", not self.pairs, "no --pairs with it")
            self.require("reinforce", self.unfinished != "cut", "no --unfinished cut with it")

    # What the runtime asks, answered for these methods: see Args.

    @property
    def source(self) -> tuple[str, tuple[str, ...], str]:
        if self.pairs:
            return "pairs", self.pairs, "pairs"
        return "data", self.data, "prompts" if self.reinforce else "responses"

    @property
    def responses_per_prompt(self) -> int:
        return 0 if self.pairs else 2 if self.reinforce else 1

    @property
    def scoring_passes(self) -> int:
        return 2 if self.alpha else 1

    @property
    def keeps_responses(self) -> bool:
        return self.history != 1

    @property
    def swaps_weights(self) -> bool:
        return bool(self.alpha and not self.rank)

    def digests(self) -> dict[str, str]:
        if not self.scorer:
            return {}
        load_scorer(self.scorer)  # refuses one that cannot be loaded before the run begins
        file, _, name = self.scorer.rpartition(":")
        return {"scorer": hashlib.sha256(Path(file).read_bytes() + name.encode()).hexdigest()}


def play(player: Player, examples: list[Example], run: Run) -> None:
    """spin.play with the phases that the options ask for."""
    spin.play(player, examples, run, generate, score_mixture if run.args.alpha else spin.score, train)


def main(argv: list[str] | None = None) -> int:
    return cli.main("family", play, Player, FamilyArgs, argv, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
