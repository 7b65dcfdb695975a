"""The methods beside SPIN: the same loop with other pairs, another reference, or another loss.

    python -m methods.family --loss space --beta 1                       SPACE's loss on the embedded task
    python -m methods.family --alpha 0.3                                 alpha-SPIN: stay near the start
    python -m methods.family --history 0                                 fictitious play against all opponents so far
    python -m methods.family --ditto --samples 10 --alpha 1 ...          DITTO, from fewer than ten demonstrations
    python -m methods.family --pairs F.jsonl --iterations 1 --model DIR  DPO on given pairs
    python -m methods.family --reinforce --adapter DIR ...               self-reinforcement, without answers
    python -m methods.family --help                                      every option

A method changes one phase of `spin.play`, and methods combine. docs/family.md has a table of them with their sources.
"""

import itertools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

import lora
import spin
from data.examples import Example
from methods import losses
from player import Player
from runtime import cli, functions
from runtime.run import Run
from runtime.stopping import Stopped
from spin import Pair, Row, option


class Loss(NamedTuple):
    function: Callable[..., Tensor]
    what: str
    source: str
    found: str  # where its equations come from: the paper, a summary, code, or a reconstruction


PAPER, SUMMARY, CODE = (f"equations from {source}" for source in ("the paper", "a summary", "the authors' code"))
LOSSES = {
    "logistic": Loss(spin.spin_loss, "SPIN's own, Eq. 4.7", "arXiv 2401.01335", PAPER),
    "hinge": Loss(losses.hinge_loss, "no gradient from a margin of 1/beta on", "arXiv 2305.10425", PAPER),
    "ipo": Loss(losses.ipo_loss, "margins are drawn to 1/(2 beta)", "arXiv 2310.12036", PAPER),
    "sppo": Loss(losses.sppo_loss, "each ratio has a goal of its own", "arXiv 2405.00675", PAPER),
    "space": Loss(losses.space_loss, "noise-contrastive estimation", "arXiv 2512.07175", SUMMARY),
    "gsil": Loss(losses.gsil_loss, "density-ratio estimation; see --form", "arXiv 2410.10093", CODE),
    "spif": Loss(losses.spif_loss, "bounded rewards", "arXiv 2602.01357", "reconstructed from the abstract"),
    "tspin": Loss(losses.tspin_loss, "triplets with the start", "arXiv 2601.08198", SUMMARY),
    "iris": Loss(losses.iris_loss, "Renyi divergence", "arXiv 2604.20933", "reconstructed from a summary"),
}
MARGIN_LOSSES = ("logistic", "hinge", "ipo")  # losses that depend only on the difference of the two ratios
DITTO_SHARES = 0.7, 0.2, 0.1  # Shares of (real, newest), (real, older) and (newer, older) pairs.
SETTINGS = {"mu": "space", "form": "gsil", "order": "iris", "historical": "tspin"}  # Each option belongs to one loss.


def train(player: Player, pairs: list[Pair], t: int, run: Run) -> Row:
    """spin.train with the loss of --loss and the term of --nll-weight.

    That term is the real response's negative log-probability, nats per token: the usual cure if real responses lose
    probability. Source: iterative RPO, arXiv 2404.19733, whose weight is 1.
    """
    args, beta = run.args, run.args.beta[t]
    settings = {name: getattr(args, name) for name, loss in SETTINGS.items() if loss == args.loss}
    if args.adaptive_order:
        settings["order"] = adaptive_order(pairs)

    def loss_of(batch: list[Pair]) -> dict[str, Tensor]:
        def columns(rows: list) -> Tensor:
            return torch.tensor(rows, dtype=torch.float32, device=player.device).T

        def loss(real: Tensor, generated: Tensor, beta: float) -> Tensor:  # (B,), (K, B)
            own = dict(settings)
            if args.loss == "ipo":
                lengths = columns([[len(ids) for ids in pair.responses] for pair in batch])
                real, generated = real / lengths[0], generated / lengths[1:]
            elif args.loss == "sppo":
                own["real_wins"], own["generated_wins"] = columns([pair.wins for pair in batch])
            elif args.loss == "tspin" and t > 0:
                generated, own["start_logps"] = generated.tensor_split([-1])
            return LOSSES[args.loss].function(real, generated, beta, **own)

        values = spin.pair_loss(player, batch, beta, loss)
        return values | {"loss": values["loss"] - args.nll_weight * values["real_logp"]}

    signals = spin.optimize(player, pairs, loss_of, t, run)
    return signals | {"order": settings["order"]} if args.loss == "iris" else signals


def adaptive_order(pairs: list[Pair]) -> float:
    """IRIS's order of an iteration, in [1/2, 2): 1/2 + 3/2 (1 - exp(-D)), with D the gap between data and opponent.

    D is the distance of the means of log p_t(y) and log p_t(y'), nats per token: 0 if p_t writes like the data. As in
    the paper a large gap asks for a large order, and order 1/2, at the end, has the least extreme weights. The paper's
    own schedule was not found; this one needs no more than the stored log-probabilities.
    """
    real = fmean(p.opponent_real_logp / len(p.real_ids) for p in pairs)
    generated = fmean(p.opponent_generated_logps[0] / len(p.generated_ids[0]) for p in pairs)
    return 0.5 - 1.5 * math.expm1(-abs(real - generated))


# ---------------------------------------------------------------- references


def score(opponent: Player, pairs: list[Pair], run: Run) -> None:
    """spin.score under the reference q of the log-ratios that the options name.

    p_t: the opponent, as in SPIN.
    --reference sampled: the distribution s that wrote the responses, the softmax of p_t's logits over --temperature,
        token by token. With p_t in the ratios the optimum is p_t (p_data / s)^(1/beta), normalised, and the game ends
        where s is the data: at the data with each token's distribution to the power --temperature. With s it is
        s (p_data / s)^(1/beta), p_data at beta 1. The player stays p_theta, so the first loss is not ln 2.
        (No paper: derived here; docs/evidence.md has what it means for responses of several tokens.)
    --alpha: see `mixture_logp`; the base policy p_0 is the start, theta_0.
    --loss tspin: none, q = 1.
    """
    args = run.args
    items = [(pair.prompt_ids, *pair.responses) for pair in pairs]
    if args.loss == "tspin":
        logps = [[0.0] * (len(item) - 1) for item in items]
    else:
        logps = run.logps(opponent, items, "score", args.temperature if args.reference == "sampled" else 1.0)
    if args.alpha:
        with run.weights.of_start(opponent):
            base = run.logps(opponent, items, "score-base")
        logps = [[mixture_logp(*both, args.alpha) for both in zip(*two)] for two in zip(logps, base)]
    for pair, (real_logp, *generated_logps) in zip(pairs, logps):
        pair.opponent_real_logp, pair.opponent_generated_logps = real_logp, generated_logps


def mixture_logp(opponent_logp: float, base_logp: float, alpha: float) -> float:
    """(1 - alpha) log p_t + alpha log p_0: the geometric mixture of the opponent and the base policy, not normalised.

    In place of log p_t it adds to self-play a KL term that keeps the player near the base policy. Its normaliser
    depends on the prompt alone, so it cancels in a margin (in a loss of more than the margin it shifts all ratios).
    Source: alpha-SPIN, arXiv 2404.04291; alpha 0 is SPIN, alpha 1 always plays against the base policy.
    """
    return (1 - alpha) * opponent_logp + alpha * base_logp


# ---------------------------------------------------------------- sources of pairs


def generate(opponent: Player, examples: list[Example], t: int, run: Run) -> tuple[list[Pair], Row]:
    """The pairs of an iteration, from the source that the options name."""
    args = run.args
    if args.pairs:
        pairs = [Pair(e.prompt_ids, e.real_ids, [e.generated_ids], True, e.asked, wins=e.wins) for e in examples]
    elif args.reinforce:
        pairs = reinforce(opponent, examples, t, run)
    elif args.ditto:
        pairs = ditto(opponent, examples, t, run)
    else:
        pairs = self_play(opponent, examples, t, run)
    if args.scorer:
        ask_scorer(examples, pairs, run)
    better = [pair for pair in pairs if pair.wins[0] >= args.min_win]
    if not better:
        raise Stopped(f"iteration {t}: no pair is left, all {len(pairs)} are below --min-win {args.min_win}")
    # A loss of more than the margin has a gradient for pairs of equal responses, too.
    margin_only = args.loss in MARGIN_LOSSES and not args.nll_weight
    return spin.select(better, args.unfinished, drop_identical=margin_only)


def pair_of(example: Example, real: tuple, *generated: tuple) -> Pair:
    """A pair of responses (ids, whether it ended), of which the first is the better one."""
    ended = all(response[1] for response in (real, *generated))
    return Pair(example.prompt_ids, real[0], [ids for ids, _ in generated], ended, example.asked)


def self_play(opponent: Player, examples: list[Example], t: int, run: Run) -> list[Pair]:
    """SPIN's pairs, with further responses of the opponent or the start, each with random numbers of its own.

    For --samples K they are the opponent's: the mean of K losses has the minimiser of one, and less noise in the
    gradient. (One softmax over all K + 1 responses has it too, and with two seeds was as good.)
    For T-SPIN the last is the start's. The paper draws these once; here each iteration draws them for its own prompts.
    The logged margin and generated logp are means over the responses of opponent and start.
    """
    with run.work.progress.timed("generate"):
        written = [run.sample(opponent, examples, t, "generate")]
        if run.args.history != 1:
            written = [draw_from_history(examples, written[0], t, run)]
        written += [run.sample(opponent, examples, t, f"generate-{k}") for k in range(1, run.args.samples)]
        if run.args.loss == "tspin" and t > 0:
            with run.weights.of_start(opponent):
                written.append(run.sample(opponent, examples, t, "proto"))
    return [pair_of(e, (e.real_ids, True), *responses) for e, *responses in zip(examples, *written)]


def draw_from_history(examples: list[Example], responses: list[tuple], t: int, run: Run) -> list[tuple]:
    """Fictitious play: draws each prompt's response evenly from those of the last --history opponents to it.

    The opponent is then the average of theta_{t-K+1} ... theta_t (of those that met the prompt, with --prompts). Both
    log-probabilities in the loss are nevertheless those under theta_t: p_t stands in Eq. 4.7 as the policy that the KL
    term of Eq. 4.3 keeps the player near, which is its own last iterate whoever wrote y'.
    Source: arXiv 2404.04291.
    """
    written = keep_responses(examples, responses, t, run)[-run.args.history :]
    rng = run.generator(t, "history")
    drawn = []
    for example in examples:
        choices = [response for by_line in written for response in by_line.get(example.line, [])]
        drawn.append(choices[int(torch.randint(len(choices), (), generator=rng))])
    return drawn


def keep_responses(examples: list[Example], responses: list[tuple], t: int, run: Run) -> list[dict[int, list[tuple]]]:
    """Writes the newest responses to responses-<t>.jsonl. Returns those of each opponent so far, by line."""
    lines = [[example.line, *response] for example, response in zip(examples, responses)]
    run.write_rows(f"responses-{t}.jsonl", lines)
    kept: list[dict[int, list[tuple]]] = []
    for rows in [*(run.read_rows(f"responses-{k}.jsonl") for k in range(t)), lines]:
        kept.append({})
        for line, ids, finished in rows:
            kept[-1].setdefault(line, []).append((ids, finished))
    return kept


def ditto(opponent: Player, examples: list[Example], t: int, run: Run) -> list[Pair]:
    """DITTO's pairs, for fewer than ten demonstrations; each iterate so far wrote --samples responses to each prompt.

    70% are a demonstration with a new response, 20% a demonstration with an older one, 10% a newer iterate's response
    with an older one's, as the better and the worse. Every pair of the first kind is used once; pairs of the other two
    are drawn to keep these shares. Iteration 0 has the first kind only. With --alpha 1 the reference is the start, as
    in the paper. That start was fine-tuned on the demonstrations (sft.py). Source: arXiv 2406.00888; the shares are
    those of the authors' configuration.
    """
    asked = [example for example in examples for _ in range(run.args.samples)]
    written = keep_responses(asked, run.sample(opponent, asked, t, "generate"), t, run)
    kinds: list[list[Pair]] = [[], [], []]
    for e in examples:
        authors = [*(by_line.get(e.line, []) for by_line in written), [(e.real_ids, True)]]  # from worst to best
        for worse, better in itertools.combinations(range(t + 2), 2):
            both = itertools.product(authors[better], authors[worse])
            kinds[2 if better <= t else int(worse < t)] += [pair_of(e, *responses) for responses in both]
    rng, total = run.generator(t, "ditto"), len(kinds[0]) / DITTO_SHARES[0]
    orders = [torch.randperm(len(kind), generator=rng)[: round(s * total)] for kind, s in zip(kinds, DITTO_SHARES)]
    return [kind[i] for kind, order in zip(kinds, orders) for i in order.tolist()]


def reinforce(player: Player, examples: list[Example], t: int, run: Run) -> list[Pair]:
    """Self-reinforcement (Tong et al., 2024, arXiv 2405.04086), which needs no answers.

    The tuned model's response takes the place of the human one, and that of the untuned model, with the adapters off,
    takes the place of the opponent's.
    """
    tuned = run.sample(player, examples, t, "generate")
    with lora.lora_disabled(player.model):
        untuned = run.sample(player, examples, t, "untuned")
    return [pair_of(*one) for one in zip(examples, tuned, untuned)]


def ask_scorer(examples: list[Example], pairs: list[Pair], run: Run) -> None:
    """Stores with every pair the probabilities to win that --scorer gives. Raises: Stopped if it gives none."""
    scorer = functions.load_scorer(run.args.scorer)
    asked = [(e.prompt, list(map(run.work.text, pair.responses))) for e, pair in zip(examples, pairs)]
    for pair, wins in zip(pairs, run.work.each("wins", asked, lambda question: scorer(*question))):
        pair.wins = tuple(wins)


# ---------------------------------------------------------------- options

# A flag alone stands for any value but the default.
REQUIRES = [  # (flag, flags of which it requires one)
    *((f"--{name}", [f"--loss {loss}"]) for name, loss in SETTINGS.items()),
    ("--adaptive-order", ["--loss iris"]),
    ("--min-win", ["--scorer", "--pairs"]),
    ("--reinforce", ["--adapter"]),
    ("--reinforce", ["--eval-data"]),
]
EXCLUDES = [  # (flag, flags that exclude it, reason)
    ("--pairs", ["--data", "--reinforce"], "given pairs replace it"),
    ("--history", ["--pairs", "--reinforce", "--samples"], "--history draws one response of many opponents"),
    ("--adaptive-order", ["--order"], "--adaptive-order chooses the order"),
    ("--loss tspin", ["--alpha", "--mix-previous", "--reference sampled"], "T-SPIN has no reference"),
    ("--loss tspin", ["--pairs", "--reinforce", "--scorer"], "T-SPIN makes triplets"),
    ("--ditto", ["--pairs", "--reinforce", "--history", "--scorer"], "--ditto makes its own pairs"),
    ("--ditto", ["--mix-previous", "--loss tspin", "--reference sampled"], "--ditto makes its own pairs"),
    ("--samples", ["--pairs", "--reinforce", "--scorer"], "a pair then has one generated response"),
    ("--samples", ["--temperature 0"], "all samples would be equal"),
    ("--unfinished cut", ["--samples", "--loss tspin", "--reinforce", "--ditto"], "cut needs a single other response"),
    ("--reference sampled", ["--pairs", "--reinforce"], "the responses were not sampled from the opponent"),
    ("--reference sampled", ["--temperature 0", "--top-k", "--top-p"], "real responses could have probability 0"),
]


@dataclass(frozen=True)
class FamilyOptions(spin.SpinOptions):
    """The options of the methods beside SPIN."""

    # fmt: off
    pairs: tuple[str, ...] = option(
        (), 'Given pairs, which replace --data and generation: a record also holds a "generated" response (DPO).',
        group="methods", changeable=True, metavar="PATH")
    loss: str = option("logistic", "Loss of a pair; the list is above.", choices=tuple(LOSSES))
    mu: float = option(1.0, "Weight of a generated response against a real one in --loss space.", within="(0, inf)")
    form: str = option("bernoulli", "Estimate of the density ratio in --loss gsil.", choices=tuple(losses.GSIL_FORMS))
    order: float = option(0.5, "Order of the Renyi divergence in --loss iris.", within="[0, inf)")
    adaptive_order: bool = option(False, "Choose --loss iris's order for each iteration by the gap to the data.")
    historical: float = option(1.0, "Weight of the historical advantage in --loss tspin.", within="[0, inf)")
    nll_weight: float = option(0.0, "Weight of the real response's negative log-probability per token, added to any "
                               "loss.", within="[0, inf)")
    reference: str = option("opponent", "Reference of the log-ratios: the opponent, or the tempered distribution that "
                            "it sampled from.", choices=("opponent", "sampled"))
    samples: int = option(1, "Responses of the opponent to each prompt.", within="[1, inf)")
    alpha: float = option(0.0, "Share of the start in the reference of the log-ratios (alpha-SPIN).", within="[0, 1]")
    history: int = option(1, "Number of the latest opponents that responses are drawn from; 0: all (fictitious play).",
                          within="[0, inf)")
    reinforce: bool = option(False, "Pair a response of the model with --adapter with one of the model alone; the "
                             "data needs no answers (self-reinforcement).")
    ditto: bool = option(False, "Pair a few demonstrations with --samples responses of every iterate so far, and newer "
                         "with older ones (DITTO).")
    scorer: str = option(
        "", "FILE.py:NAME of f(prompt, responses) -> probabilities to beat the opponent, for --loss sppo.",
        changeable=True, check=lambda name: not name or re.fullmatch(r".+\.py:\w+", name), expected="FILE.py:NAME")
    min_win: float = option(0.0, "Leave out pairs whose real response wins with a lower probability.", within="[0, 1]")
    # fmt: on

    def check_together(self) -> None:
        super().check_together()
        for flag, others in REQUIRES:
            self.require(not self.has(flag) or any(map(self.has, others)), f"{flag} requires {' or '.join(others)}")
        for flag, others, why in EXCLUDES:
            for other in others:
                self.require(not (self.has(flag) and self.has(other)), f"{flag} cannot go with {other}: {why}")

    def has(self, flag: str) -> bool:
        name, _, value = flag[2:].replace("-", "_").partition(" ")
        found = getattr(self, name)
        return found == type(found)(value) if value else found != self.__dataclass_fields__[name].default

    @property
    def source(self) -> tuple[str, tuple[str, ...], str]:
        if self.pairs:
            return "pairs", self.pairs, "pairs"
        return "data", self.data, "prompts" if self.reinforce else "responses"

    def digests(self) -> dict[str, str]:
        if not self.scorer:
            return {}
        functions.load_scorer(self.scorer)  # A scorer that cannot be loaded is refused before the run begins.
        return {"scorer": functions.digest([self.scorer])}


def play(player: Player, examples: list[Example], run: Run) -> None:
    """spin.play with the phases that the options ask for."""
    spin.play(player, examples, run, generate, score, train)


def main(argv: list[str] | None = None) -> int:
    table = "\n".join(f"  {name:10}{loss.what}; {loss.source}, {loss.found}" for name, loss in LOSSES.items())
    about = f"The methods beside SPIN: the same loop with other pairs, another reference, or another loss.\n{table}"
    about += "\nFurther methods: python -m methods.sdft, python sft.py --loss dft, python examples/seft.py."
    return cli.main("family", play, Player, FamilyOptions, argv, about=about, program="python -m methods.family")


if __name__ == "__main__":
    sys.exit(main())
