#!/usr/bin/env python3
"""The methods beside SPIN: the same loop with other pairs, another reference, or another loss.

    python family.py --loss space --beta 1                       SPACE's loss on the embedded task
    python family.py --alpha 0.3                                 alpha-SPIN: stay near the start
    python family.py --history 0                                 fictitious play against all opponents so far
    python family.py --pairs F.jsonl --iterations 1 --model DIR  DPO on given pairs
    python family.py --reinforce --adapter DIR ...               self-reinforcement, without answers
    python family.py --help                                      every option

A method changes one phase of `spin.play`; `play` below puts together those that the options ask for, and they combine.
The losses are in losses.py, all of them functions of (real_ratios, generated_ratios, beta). A ratio is
log p_theta(response|x) - log q(response|x) in nats, summed over the response's tokens, with q the reference (`score`).
The table of methods with their sources is in docs/family.md.
"""

import contextlib
import math
import numbers
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import lora
import losses
import spin
from player import Player
from runtime import cli, functions, parallel
from runtime.data import Example, Pair
from runtime.evaluate import Row, mean
from runtime.options import POSITIVE, Args, at_least, option, shown, valid, value_at
from runtime.run import Run
from runtime.stopping import SIGNALS, Stopped

SCORER_SHARD = 1, 1024  # fewest and most pairs that the scorer is asked about before its answers are written

# ---------------------------------------------------------------- losses

LOSSES = {
    "logistic": spin.spin_loss,
    "hinge": losses.hinge_loss,
    "ipo": losses.ipo_loss,
    "sppo": losses.sppo_loss,
    "space": losses.space_loss,
    "spif": losses.spif_loss,
    "tspin": losses.tspin_loss,
    "iris": losses.iris_loss,
}
MARGIN_LOSSES = ("logistic", "hinge", "ipo")  # those that see nothing but the difference of the two ratios


def train(player: Player, pairs: list[Pair], t: int, run: Run) -> Row:
    """spin.train with the loss of --loss, for one or more generated responses, and the term of --nll-weight.

    That term is the real response's negative log-probability, nats a token: the usual cure where real responses lose
    probability. Source: iterative RPO, arXiv 2404.19733, whose weight is 1.
    """
    args, beta = run.args, value_at(run.args.beta, t)
    order = adaptive_order(pairs) if args.adaptive_order else args.order
    norms: list[Tensor] = []  # IRIS's, of the batch

    def columns(values: list[list[float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=player.device).T  # (R, B)

    def ratios_of(logps: Tensor, batch: list[Pair]) -> Tensor:
        return logps - columns([reference_of(pair) for pair in batch])  # (R, B), the real response first

    def prepare(batch: list[Pair]) -> None:
        """IRIS weighs a response by its share of the whole batch: a pass before the one that has a gradient."""
        if args.loss == "iris":
            ratios = beta * ratios_of(columns(player.logps([item_of(pair) for pair in batch])), batch)
            norms[:] = losses.log_mean_exp((order - 1) * ratios[0]), losses.log_mean_exp(order * ratios[1:])
            player.model.train()

    def loss_of(batch: list[Pair]) -> dict[str, Tensor]:
        logps = player.response_logps([item_of(pair) for pair in batch])  # (R, B), of p_theta
        lengths = columns([list(map(len, item_of(pair)[1:])) for pair in batch])  # (R, B)
        real, generated = ratios_of(logps, batch).tensor_split([1])  # (1, B), (K, B)
        extra: dict[str, object] = {}
        if args.loss == "ipo":
            extra = dict(real_lengths=lengths[0], generated_lengths=lengths[1:])
        if args.loss == "sppo":
            extra = dict(zip(("real_wins", "generated_wins"), columns([pair.wins for pair in batch])))
        if args.loss == "space":
            extra = dict(mu=args.mu)
        if args.loss == "iris":
            extra = dict(order=order, real_norm=norms[0], generated_norm=norms[1])
        if args.loss == "tspin" and t > 0:
            generated, start = generated.tensor_split([-1])
            extra = dict(start_logps=start, historical=args.historical)
        # K generated responses make K pairs with the real one, and one item, so their prompt is computed once.
        loss = LOSSES[args.loss](real[0], generated, beta, **extra).mean(0)
        nll = -logps[0] / lengths[0]  # nats a token
        margins = beta * (real[0] - generated.mean(0)).detach()
        return {
            "loss": loss + args.nll_weight * nll,
            "margin": margins,
            "accuracy": (margins > 0).float(),
            "real_logp": -nll.detach(),
            "generated_logp": (logps[1 : 1 + len(generated)] / lengths[1 : 1 + len(generated)]).detach().mean(0),
        }

    signals = spin.optimize(player, pairs, loss_of, t, run, prepare)
    return signals | {"order": order} if args.loss == "iris" else signals


def item_of(pair: Pair) -> tuple[list[int], ...]:
    """The prompt and all responses of a pair, as a player scores them."""
    return pair.prompt_ids, pair.real_ids, pair.generated_ids, *pair.more_ids


def reference_of(pair: Pair) -> list[float]:
    """The reference's log-probabilities of all responses of a pair, nats."""
    return [pair.opponent_real_logp, pair.opponent_generated_logp, *pair.opponent_more_logps]


def adaptive_order(pairs: list[Pair]) -> float:
    """IRIS's order of an iteration, in [1/2, 2): 1/2 + 3/2 (1 - exp(-D)), with D what data and opponent differ by.

    D is the distance of the means of log p_t(y) and log p_t(y'), nats a token: 0 where p_t writes like the data. As in
    the paper a large gap asks for a large order, and order 1/2, at the end, has the least extreme weights. The paper's
    own schedule was not found; this one needs no more than the stored log-probabilities.
    """
    gaps = [[p.opponent_real_logp / len(p.real_ids), p.opponent_generated_logp / len(p.generated_ids)] for p in pairs]
    real, generated = map(mean, zip(*gaps))
    return 0.5 - 1.5 * math.expm1(-abs(real - generated))


# ---------------------------------------------------------------- references


def score(opponent: Player, pairs: list[Pair], run: Run) -> None:
    """spin.score for all responses, under the reference q of the log-ratios that the options name.

    p_t: the opponent, as in SPIN.
    --reference sampled: the distribution s that wrote the responses. With --temperature T that is not p_t: its tokens
        have the probabilities of p_t's logits over T. SPIN with p_t in the ratios has its optimum at
        p_t (p_data / s)^(1/beta), normalised. If responses are one token and p_t is p_data already, that is p_t to the
        power 1 + (1 - 1/T) / beta: a hot opponent sharpens the player in every iteration, whatever the data. With s in
        the ratios the optimum is s (p_data / s)^(1/beta), there p_t to the power 1 + (1 - 1/T) (1/beta - 1): p_data at
        beta 1; for T above 1 a flattening where beta is above 1, and a sharpening below. Only the reference changes,
        the player stays p_theta, so the first loss is not ln 2. Top-k and top-p give some real responses probability
        0, so they have no such reference. (No paper: derived here.)
    --alpha: see `mixture_logp`; the base policy p_0 is the start, theta_0.
    --loss tspin: none, q = 1.
    """
    args = run.args
    items = [item_of(pair) for pair in pairs]
    if args.loss == "tspin":
        logps = [[0.0] * (len(item) - 1) for item in items]
    else:
        logps = run.logps(opponent, items, "score", args.temperature if args.reference == "sampled" else 1.0)
    if args.alpha:
        with base_policy(opponent, run):
            base = run.logps(opponent, items, "score-base")
        logps = [[mixture_logp(*both, args.alpha) for both in zip(*two)] for two in zip(logps, base)]
    for pair, (real_logp, generated_logp, *more) in zip(pairs, logps):
        pair.opponent_real_logp, pair.opponent_generated_logp = real_logp, generated_logp
        pair.opponent_more_logps = more or ()


def mixture_logp(opponent_logp: float, base_logp: float, alpha: float) -> float:
    """(1 - alpha) log p_t + alpha log p_0: the geometric mixture of the opponent and the base policy, not normalised.

    In place of log p_t it adds to self-play a KL term that keeps the player near the base policy. Its normaliser
    depends on the prompt alone, so it cancels in a margin (not in the losses without one, where it shifts all ratios).
    Source: alpha-SPIN, arXiv 2404.04291; alpha 0 is SPIN, alpha 1 always plays against the base policy.
    """
    return (1 - alpha) * opponent_logp + alpha * base_logp


@contextlib.contextmanager
def base_policy(player: Player, run: Run) -> Iterator[None]:
    """The player as theta_0 for a while: with adapters off, or, where those do not suffice, with weights from disk.

    One model is in memory at a time: the player's own weights wait on disk.
    """
    if run.args.rank and not run.args.adapter:
        with lora.lora_disabled(player.model):
            yield
        return
    folder = run.out / "resume" / f"player-{parallel.rank()}"
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
        pairs = [
            Pair(e.prompt_ids, e.real_ids, e.generated_ids, finished=True, wins=e.wins, prompt=e.asked)
            for e in examples
        ]
    elif args.reinforce:
        pairs = reinforce(opponent, examples, t, run)
    else:
        pairs = fictitious_play(opponent, examples, t, run)
        add_samples(opponent, examples, pairs, t, run)
        if args.loss == "tspin" and t > 0:
            add_start_response(opponent, examples, pairs, t, run)
    if args.scorer:
        ask_scorer(examples, pairs, run)
    better = [pair for pair in pairs if pair.wins[0] >= args.min_win]
    if not better:
        raise Stopped(f"iteration {t}: no pair is left, all {len(pairs)} are below --min-win {args.min_win}")
    # Where more than a margin counts, pairs of equal responses have a gradient.
    return spin.select(better, t, run, drop_identical=args.loss in MARGIN_LOSSES and not args.nll_weight)


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
    return [
        Pair(e.prompt_ids, e.real_ids, ids, finished, prompt=e.asked) for e, (ids, finished) in zip(examples, responses)
    ]


def add_samples(opponent: Player, examples: list[Example], pairs: list[Pair], t: int, run: Run) -> None:
    """Adds --samples K - 1 further responses of the opponent to every pair.

    The K losses of a prompt have the minimiser of one, with less noise in the gradient. (One softmax over all K + 1
    responses has it too, and with two seeds was as good.) A response that differs from the real one goes first, if
    there is any: a pair is left out as identical if all K are.
    """
    args = run.args
    for k in range(1, args.samples):
        seed = run.seed(t, f"generate-{k}")
        with run.progress.timed("generate"):
            more = run.respond(opponent, examples, f"generate-{k}", seed, args.temperature, args.top_k, args.top_p)
        for pair, (ids, finished) in zip(pairs, more):
            responses = sorted([pair.generated_ids, *pair.more_ids, ids], key=pair.real_ids.__eq__)
            pair.generated_ids, *pair.more_ids = responses
            pair.finished = pair.finished and finished


def add_start_response(player: Player, examples: list[Example], pairs: list[Pair], t: int, run: Run) -> None:
    """Makes each pair T-SPIN's triplet: the last response is one of the start's, theta_0.

    The paper draws these once; here each iteration draws its own, since with --prompts its prompts are its own.
    """
    args = run.args
    with base_policy(player, run), run.progress.timed("generate"):
        seed = run.seed(t, "proto")
        written = run.respond(player, examples, "proto", seed, args.temperature, args.top_k, args.top_p)
    for pair, (ids, finished) in zip(pairs, written):
        pair.more_ids = [*pair.more_ids, ids]
        pair.finished = pair.finished and finished


def draw_from_history(
    examples: list[Example], responses: list[tuple[list[int], bool]], t: int, run: Run
) -> list[tuple[list[int], bool]]:
    """Writes the newest responses to responses-<t>.jsonl and draws one of the last --history for each prompt."""
    lines = [[example.line, *response] for example, response in zip(examples, responses)]
    run.write_rows(f"responses-{t}.jsonl", lines)
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
        both = real_end and generated_end
        pairs.append(Pair(example.prompt_ids, real_ids, generated_ids, finished=both, prompt=example.asked))
    return pairs


# ---------------------------------------------------------------- scorers


def ask_scorer(examples: list[Example], pairs: list[Pair], run: Run) -> None:
    """Stores with every pair the probabilities to win that --scorer gives. Raises: Stopped if it gives none."""
    name = run.args.scorer
    scorer = functions.load("--scorer", name)

    bar = run.progress.bar("wins", len(pairs))

    def work(items: range) -> list[list[float]]:
        bar.at(items.start)
        wins = []
        for i in items:
            texts = [run.text(pairs[i].real_ids), run.text(pairs[i].generated_ids)]
            try:
                answer = scorer(examples[i].prompt, texts)
            except BaseException as error:  # the user's code may raise anything, SystemExit too
                raise Stopped(f"--scorer {name}: {type(error).__name__}: {error}") from None
            wins.append(probabilities(answer, name))
            bar.update(1)
            SIGNALS.check()  # a scorer may take long
        return wins

    with bar, run.progress.timed("wins"):
        answers = run.shards("wins", len(pairs), *SCORER_SHARD, work)
    for pair, (real, generated) in zip(pairs, answers):
        pair.wins = (real, generated)


def probabilities(answer: object, name: str) -> list[float]:
    """A scorer's answer, checked: a list or tuple of two probabilities. Raises: Stopped."""
    two = isinstance(answer, list | tuple) and len(answer) == 2
    if two and all(isinstance(p, numbers.Real) and 0 <= p <= 1 for p in answer):
        return [float(p) for p in answer]
    raise Stopped(f"--scorer {name}: returned {shown(repr(answer))}, expected a list of two probabilities")


# ---------------------------------------------------------------- options


SHARE = valid(lambda x: 0 <= x <= 1, "in [0, 1]")


@dataclass(frozen=True)
class FamilyArgs(Args):
    """The options of spin.py, and those of the other methods."""

    pairs: tuple[str, ...] = option(
        (), 'Given pairs in place of --data and of responses: a record also holds a "generated" one (DPO).',
        group="methods", changeable=True, repeated="PATH", **valid(bool, "a path"),
    )  # fmt: skip
    loss: str = option("logistic", "Loss of a pair; logistic is SPIN's Eq. 4.7.", choices=tuple(LOSSES))
    mu: float = option(1.0, "Weight of a generated response against a real one in --loss space.", **POSITIVE)
    order: float = option(0.5, "Order of the Renyi divergence in --loss iris.", **at_least(0))
    adaptive_order: bool = option(False, "Choose --loss iris's order for each iteration, by the gap to the data.")
    historical: float = option(1.0, "Weight of the historical advantage in --loss tspin.", **at_least(0))
    nll_weight: float = option(
        0.0, "Adds this times the real response's negative log-probability, nats a token, to any loss.", **at_least(0)
    )
    reference: str = option(
        "opponent", "Of the log-ratios: the opponent, or what it sampled from at --temperature.",
        choices=("opponent", "sampled"),
    )  # fmt: skip
    samples: int = option(1, "Responses of the opponent to each prompt.", **at_least(1))
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
        for name, loss in (("mu", "space"), ("order", "iris"), ("adaptive_order", "iris"), ("historical", "tspin")):
            unused = getattr(self, name) == type(self).__dataclass_fields__[name].default
            self.require(name, unused or self.loss == loss, f"--loss {loss} with it")
        self.require("order", not self.adaptive_order or self.order == 0.5, "no --adaptive-order with it")
        if self.loss == "tspin":
            plain = not (self.alpha or self.mix_previous or self.reference == "sampled")
            self.require("loss", plain, "no --alpha, --reference sampled or --mix-previous with it")
        if self.generated_in_pair > 1:
            name = "loss" if self.loss == "tspin" else "samples"
            self.require(name, one_source and not self.scorer, "no --pairs, --reinforce or --scorer with it")
            self.require(name, self.unfinished != "cut", "no --unfinished cut with it")
        if self.samples > 1:
            self.require("samples", self.history == 1, "no --history with it")
            self.require("samples", self.temperature, "no --temperature 0 with it: all would be equal")
        if self.reference == "sampled":
            self.require("reference", one_source, "no --pairs or --reinforce with it")
            every = self.temperature and not self.top_k and self.top_p == 1
            self.require(
                "reference", every, "no --temperature 0, --top-k or --top-p, where a real response may be ruled out"
            )
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
        return 0 if self.pairs else 2 if self.reinforce else self.generated_in_pair

    @property
    def generated_in_pair(self) -> int:
        return self.samples + (self.loss == "tspin")

    @property
    def scoring_passes(self) -> float:
        batches = mean([float(n) for n in self.epochs]) if self.loss == "iris" else 0  # in the pass before each step
        return batches + (0 if self.loss == "tspin" else 2 if self.alpha else 1)

    @property
    def keeps_responses(self) -> bool:
        return self.history != 1

    @property
    def swaps_weights(self) -> bool:
        return bool((self.alpha or self.loss == "tspin") and not self.rank)

    def digests(self) -> dict[str, str]:
        if not self.scorer:
            return {}
        functions.load("--scorer", self.scorer)  # refuses one that cannot be loaded before the run begins
        return {"scorer": functions.digest([self.scorer])}


def play(player: Player, examples: list[Example], run: Run) -> None:
    """spin.play with the phases that the options ask for."""
    spin.play(player, examples, run, generate, score, train)


def main(argv: list[str] | None = None) -> int:
    return cli.main("family", play, Player, FamilyArgs, argv, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
