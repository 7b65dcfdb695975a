"""The methods beside SPIN: the same loop with other pairs, another reference, or another loss.

    python -m methods.family --loss space --beta 1                       SPACE's loss on the embedded task
    python -m methods.family --alpha 0.3                                 alpha-SPIN: stay near the start
    python -m methods.family --history 0                                 fictitious play against all opponents so far
    python -m methods.family --pairs F.jsonl --iterations 1 --model DIR  DPO on given pairs
    python -m methods.family --reinforce --adapter DIR ...               self-reinforcement, without answers
    python -m methods.family --help                                      every option

A method changes one phase of `spin.play`, and methods combine. The losses are functions of (real_ratios,
generated_ratios, beta). A ratio is log p_theta(response|x) - log q(response|x) in nats, summed over the response's
tokens, where q is the reference (`score`). docs/family.md has the table of methods with their sources.
"""

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
from runtime.options import option
from runtime.run import Run
from runtime.stopping import Stopped
from spin import Pair, Row


class Loss(NamedTuple):
    function: Callable[..., Tensor]
    what: str
    source: str
    found: str  # whether its equations stand in the paper, or were reconstructed


PAPER = "equations from the paper"
LOSSES = {
    "logistic": Loss(spin.spin_loss, "SPIN's own, Eq. 4.7", "arXiv 2401.01335", PAPER),
    "hinge": Loss(losses.hinge_loss, "no gradient from a margin of 1/beta on", "arXiv 2305.10425", PAPER),
    "ipo": Loss(losses.ipo_loss, "margins are drawn to 1/(2 beta)", "arXiv 2310.12036", PAPER),
    "sppo": Loss(losses.sppo_loss, "each ratio has a goal of its own", "arXiv 2405.00675", PAPER),
    "space": Loss(losses.space_loss, "noise-contrastive estimation", "arXiv 2512.07175", "equations from a summary"),
    "spif": Loss(losses.spif_loss, "bounded rewards", "arXiv 2602.01357", "reconstructed from the abstract"),
    "tspin": Loss(losses.tspin_loss, "triplets with the start", "arXiv 2601.08198", "equations from a summary"),
    "iris": Loss(losses.iris_loss, "Renyi divergence", "arXiv 2604.20933", "reconstructed from a summary"),
}
MARGIN_LOSSES = ("logistic", "hinge", "ipo")  # losses of nothing but the difference of the two ratios


def train(player: Player, pairs: list[Pair], t: int, run: Run) -> Row:
    """spin.train with the loss of --loss and the term of --nll-weight.

    That term is the real response's negative log-probability, nats per token: the usual cure if real responses lose
    probability. Source: iterative RPO, arXiv 2404.19733, whose weight is 1.
    """
    args, beta = run.args, run.args.beta[t]
    order = adaptive_order(pairs) if args.adaptive_order else args.order

    def loss_of(batch: list[Pair]) -> dict[str, Tensor]:
        def column(rows: list) -> Tensor:
            return torch.tensor(rows, dtype=torch.float32, device=player.device).T

        def loss(real: Tensor, generated: Tensor, beta: float) -> Tensor:  # (B,), (K, B)
            extra: dict[str, object] = {}
            if args.loss == "ipo":
                lengths = column([[len(ids) for ids in pair.responses] for pair in batch])
                extra = dict(real_lengths=lengths[0], generated_lengths=lengths[1:])
            elif args.loss == "sppo":
                extra = dict(zip(("real_wins", "generated_wins"), column([pair.wins for pair in batch])))
            elif args.loss == "space":
                extra = dict(mu=args.mu)
            elif args.loss == "iris":
                extra = dict(order=order)
            elif args.loss == "tspin" and t > 0:
                generated, start = generated.tensor_split([-1])
                extra = dict(start_logps=start, historical=args.historical)
            return LOSSES[args.loss].function(real, generated, beta, **extra)

        values = spin.pair_loss(player, batch, beta, loss)
        return values | {"loss": values["loss"] - args.nll_weight * values["real_logp"]}

    signals = spin.optimize(player, pairs, loss_of, t, run)
    return signals | {"order": order} if args.loss == "iris" else signals


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
    --reference sampled: the distribution s that wrote the responses. With --temperature T that is not p_t: its tokens
        have the probabilities of p_t's logits over T. SPIN with p_t in the ratios has its optimum at
        p_t (p_data / s)^(1/beta), normalised. If responses are one token and p_t is p_data already, that is p_t to the
        power 1 + (1 - 1/T) / beta: a hot opponent sharpens the player in every iteration, whatever the data. With s in
        the ratios the optimum is s (p_data / s)^(1/beta), there p_t to the power 1 + (1 - 1/T) (1/beta - 1): p_data at
        beta 1; for T above 1 a flattening if beta is above 1, and a sharpening below. Only the reference changes,
        the player stays p_theta, so the first loss is not ln 2. Top-k and top-p give some real responses probability
        0, so they have no such reference. (No paper: derived here.)
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
    """The pairs of an iteration, from the source that the options name: given, reinforced, or the opponents so far."""
    args = run.args
    if args.pairs:
        pairs = [Pair(e.prompt_ids, e.real_ids, [e.generated_ids], True, e.asked, wins=e.wins) for e in examples]
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
    # A loss of more than the margin has a gradient for pairs of equal responses, too.
    margin_only = args.loss in MARGIN_LOSSES and not args.nll_weight
    return spin.select(better, args.unfinished, drop_identical=margin_only)


def fictitious_play(opponent: Player, examples: list[Example], t: int, run: Run) -> list[Pair]:
    """Each prompt's response is drawn evenly from those of the last --history opponents to it; with 1 this is SPIN.

    The opponent is then the average of theta_{t-K+1} ... theta_t (of those that met the prompt, with --prompts). Both
    log-probabilities in the loss are nevertheless those under theta_t: p_t stands in Eq. 4.7 as the policy that the KL
    term of Eq. 4.3 keeps the player near, which is its own last iterate whoever wrote y'.
    Source: arXiv 2404.04291.
    """
    responses = run.sample(opponent, examples, t, "generate")
    if run.args.history != 1:
        responses = draw_from_history(examples, responses, t, run)
    return [Pair(e.prompt_ids, e.real_ids, [ids], ended, e.asked) for e, (ids, ended) in zip(examples, responses)]


def draw_from_history(examples: list[Example], responses: list[tuple], t: int, run: Run) -> list[tuple]:
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


def add_samples(opponent: Player, examples: list[Example], pairs: list[Pair], t: int, run: Run) -> None:
    """Adds --samples K - 1 further responses of the opponent to every pair.

    The K losses of a prompt have the minimiser of one, with less noise in the gradient. (One softmax over all K + 1
    responses has it too, and with two seeds was as good.)
    """
    for k in range(1, run.args.samples):
        with run.work.progress.timed("generate"):
            add_responses(pairs, run.sample(opponent, examples, t, f"generate-{k}"))


def add_start_response(player: Player, examples: list[Example], pairs: list[Pair], t: int, run: Run) -> None:
    """Makes each pair T-SPIN's triplet: the last response is one of the start's, theta_0.

    The paper draws these once; here each iteration draws its own, since with --prompts its prompts are its own. The
    logged margin and generated logp are means over the responses of opponent and start.
    """
    with run.weights.of_start(player), run.work.progress.timed("generate"):
        add_responses(pairs, run.sample(player, examples, t, "proto"))


def add_responses(pairs: list[Pair], responses: list[tuple[list[int], bool]]) -> None:
    for pair, (ids, finished) in zip(pairs, responses):
        pair.generated_ids.append(ids)
        pair.finished = pair.finished and finished


def reinforce(player: Player, examples: list[Example], t: int, run: Run) -> list[Pair]:
    """Self-reinforcement (Tong et al., 2024, arXiv 2405.04086), which needs no answers.

    The tuned model's response takes the place of the human one, and that of the untuned model, with the adapters off,
    takes the place of the opponent's.
    """
    tuned = run.sample(player, examples, t, "generate")
    with lora.lora_disabled(player.model):
        untuned = run.sample(player, examples, t, "untuned")
    return [
        Pair(e.prompt_ids, real_ids, [generated_ids], real_ended and generated_ended, e.asked)
        for e, (real_ids, real_ended), (generated_ids, generated_ended) in zip(examples, tuned, untuned)
    ]


def ask_scorer(examples: list[Example], pairs: list[Pair], run: Run) -> None:
    """Stores with every pair the probabilities to win that --scorer gives. Raises: Stopped if it gives none."""
    scorer = functions.load_scorer(run.args.scorer)

    def wins_of(both: tuple[Example, Pair]) -> list[float]:
        example, pair = both
        return scorer(example.prompt, [run.work.text(ids) for ids in pair.responses])

    for pair, wins in zip(pairs, run.work.each("wins", list(zip(examples, pairs)), wins_of)):
        pair.wins = tuple(wins)


# ---------------------------------------------------------------- options


@dataclass(frozen=True)
class FamilyOptions(spin.SpinOptions):
    """The options of the methods beside SPIN."""

    pairs: tuple[str, ...] = option(
        (),
        'Given pairs, which replace --data and generation: a record also holds a "generated" response (DPO).',
        group="methods",
        changeable=True,
        metavar="PATH",
    )
    loss: str = option("logistic", "Loss of a pair; the list is above.", choices=tuple(LOSSES))
    mu: float = option(1.0, "Weight of a generated response against a real one in --loss space.", within="(0, inf)")
    order: float = option(0.5, "Order of the Renyi divergence in --loss iris.", within="[0, inf)")
    adaptive_order: bool = option(False, "Choose --loss iris's order for each iteration by the gap to the data.")
    historical: float = option(1.0, "Weight of the historical advantage in --loss tspin.", within="[0, inf)")
    nll_weight: float = option(
        0.0, "Adds the real response's negative log-probability per token, times this, to any loss.", within="[0, inf)"
    )
    reference: str = option(
        "opponent",
        "Reference of the log-ratios: the opponent, or the tempered distribution that it sampled from.",
        choices=("opponent", "sampled"),
    )
    samples: int = option(1, "Responses of the opponent to each prompt.", within="[1, inf)")
    alpha: float = option(0.0, "Share of the start in the reference of the log-ratios (alpha-SPIN).", within="[0, 1]")
    history: int = option(
        1, "Number of the latest opponents that responses are drawn from; 0: all (fictitious play).", within="[0, inf)"
    )
    reinforce: bool = option(
        False, "Pair responses with --adapter and without it; needs no answers (self-reinforcement)."
    )
    scorer: str = option(
        "",
        "FILE.py:NAME of f(prompt, responses) -> probabilities to beat the opponent, for --loss sppo.",
        changeable=True,
        check=lambda name: not name or re.fullmatch(r".+\.py:\w+", name),
        expected="FILE.py:NAME",
    )
    min_win: float = option(0.0, "Smallest probability to win of a pair's real response.", within="[0, 1]")

    def check_together(self) -> None:
        super().check_together()
        sources = self.pairs or self.reinforce
        several, triplets = self.samples > 1, self.loss == "tspin"
        plain = self.temperature > 0 and not self.top_k and self.top_p == 1
        for wrong, message in (
            (self.pairs and self.data, "--pairs replaces --data: give only one of them"),
            (self.min_win and not (self.scorer or self.pairs), "--min-win requires --scorer or --pairs"),
            (self.history != 1 and sources, "--history cannot go with --pairs or --reinforce"),
            (self.mu != 1 and self.loss != "space", "--mu requires --loss space"),
            (self.order != 0.5 and self.loss != "iris", "--order requires --loss iris"),
            (self.adaptive_order and self.loss != "iris", "--adaptive-order requires --loss iris"),
            (self.order != 0.5 and self.adaptive_order, "--adaptive-order chooses the order: give no --order"),
            (self.historical != 1 and not triplets, "--historical requires --loss tspin"),
            (
                triplets and (self.alpha or self.mix_previous or self.reference == "sampled"),
                "--loss tspin cannot go with --alpha, --reference sampled or --mix-previous",
            ),
            (triplets and (sources or self.scorer), "--loss tspin cannot go with --pairs, --reinforce or --scorer"),
            (several and (sources or self.scorer), "--samples cannot go with --pairs, --reinforce or --scorer"),
            ((several or triplets) and self.unfinished == "cut", "--unfinished cut requires one generated response"),
            (several and self.history != 1, "--samples cannot go with --history"),
            (several and not self.temperature, "--samples requires a --temperature above 0: all would be equal"),
            (self.reference == "sampled" and sources, "--reference sampled cannot go with --pairs or --reinforce"),
            (
                self.reference == "sampled" and not plain,
                "--reference sampled cannot go with --temperature 0, --top-k or --top-p: they rule out real responses",
            ),
            (self.reinforce and not (self.adapter and self.rank), "--reinforce requires --adapter"),
            (self.reinforce and not self.eval_data, "--reinforce requires --eval-data, which has answers"),
            (self.reinforce and self.pairs, "--reinforce cannot go with --pairs"),
            (self.reinforce and self.unfinished == "cut", "--reinforce cannot go with --unfinished cut"),
        ):
            self.require(not wrong, message)

    @property
    def source(self) -> tuple[str, tuple[str, ...], str]:
        if self.pairs:
            return "pairs", self.pairs, "pairs"
        return "data", self.data, "prompts" if self.reinforce else "responses"

    def digests(self) -> dict[str, str]:
        if not self.scorer:
            return {}
        functions.load_scorer(self.scorer)  # one that cannot be loaded is refused before the run begins
        return {"scorer": functions.digest([self.scorer])}


def play(player: Player, examples: list[Example], run: Run) -> None:
    """spin.play with the phases that the options ask for."""
    spin.play(player, examples, run, generate, score, train)


def main(argv: list[str] | None = None) -> int:
    table = "\n".join(f"  {name:10}{loss.what}; {loss.source}, {loss.found}" for name, loss in LOSSES.items())
    about = f"The methods beside SPIN: the same loop with other pairs, another reference, or another loss.\n{table}"
    return cli.main("family", play, Player, FamilyOptions, argv, about=about)


if __name__ == "__main__":
    sys.exit(main())
