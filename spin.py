#!/usr/bin/env python3
"""SPIN: Self-Play Fine-Tuning (Chen et al., 2024, arXiv 2401.01335), the whole loop in one script.

    python spin.py                             self-play on the embedded task (spelling to pronunciation), CPU
    python spin.py --model DIR --data F.jsonl  self-play from your own fine-tuned GPT-Neo
    python spin.py sft --model DIR --data F    supervised fine-tuning, the phase before it

Algorithm 1 of the paper is `play`, Eq. 4.7 is `spin_loss`. Words used throughout: the *player* p_theta is trained;
the *opponent* p_t is the player as it stood when iteration t began; a prompt x has a *real* response y from the data
and a *generated* one y' from the opponent. An *iteration* is a round of self-play, an *epoch* a pass over the pairs
of one iteration, a *step* one optimizer update. The *iterate* theta_t is the player after t iterations.

Deviations from the paper and from the official code (uclaml/SPIN):
- The opponent's log-probabilities are computed once an iteration, before training, so no second model is in memory.
- LoRA is the default of `--rank`; 0 trains all parameters as the paper does (and as recipes/pronounce.args, the run
  without flags). AdamW is the default; `--optimizer rmsprop` is the paper's. The published recipe: recipes/paper.args.
- Sampled ids are scored as they were sampled, never decoded and encoded again. The end-of-sequence token counts
  where it was sampled; the official code appends one to responses that were cut.
- Prompt and response are encoded apart. Responses equal to the real one are dropped: they have no gradient.
- Examples that do not fit the context are an error or left out and counted, never cut silently.
- The prompts of an iteration may be a fresh random subset (`--prompts`); the paper uses the same 50k every time.
The rest of the family (alpha-SPIN, fictitious play, SPPO, IPO, DPO, self-reinforcement) is a table in README.md.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import lora
import losses
import onednn
import plan
import report
import resume
from data import Example, decode
from family import ask_scorer, base_weights, draw_from_history
from kernels import linear_logprobs
from model import GPTNeo
from options import METRICS, Args, parse
from prepare import Finished, Run, Stopped, generator, seed_of, setup
from sampling import generate as sample_responses

MASKED_TOKENS = 1024  # longer rows compute a prompt for each response: a (T, T) mask would cost more than it saves
SCORE_SHARD = 1024  # items that are scored, then kept: what a killed run may lose
SKIPS = 3  # steps in a row with a loss or gradient that is not finite, after which the run stops
# ids of a prompt and of one or more responses to it, their end-of-sequence tokens included
PromptResponses = tuple[list[int], ...]


@dataclass(slots=True)
class Pair:
    """A prompt with its real and its generated response; `score` fills in the opponent's log-probabilities."""

    prompt_ids: list[int]
    real_ids: list[int]
    generated_ids: list[int]
    finished: bool  # the opponent sampled the end-of-sequence token
    opponent_real_logp: float | None = None  # nats, summed over the response
    opponent_generated_logp: float | None = None
    base_real_logp: float | None = None  # of the base policy p_0, the start, where --alpha asks for it
    base_generated_logp: float | None = None
    real_wins: float = 1.0  # probability that it is preferred to a response of the opponent, for --loss sppo
    generated_wins: float = 0.0

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.real_ids) + len(self.generated_ids)


# ---------------------------------------------------------------- the algorithm


def spin_margins(
    player_real_logps: Tensor,
    player_generated_logps: Tensor,
    opponent_real_logps: Tensor,
    opponent_generated_logps: Tensor,
) -> Tensor:
    """[log p_theta(y|x) - log p_t(y|x)] - [log p_theta(y'|x) - log p_t(y'|x)], all (B,), nats."""
    return (player_real_logps - opponent_real_logps) - (player_generated_logps - opponent_generated_logps)


def spin_loss(
    player_real_logps: Tensor,
    player_generated_logps: Tensor,
    opponent_real_logps: Tensor,
    opponent_generated_logps: Tensor,
    beta: float,
) -> Tensor:
    """Eq. 4.7 for each pair: l(beta * margin) with the logistic loss l(z) = log(1 + exp(-z)).

    Args: four (B,) fp32 tensors of log-probabilities in nats, each summed over the tokens of a response, its
    end-of-sequence token included; beta, which the paper calls lambda.
    Returns: (B,), ln 2 where player and opponent are the same.
    """
    margins = spin_margins(player_real_logps, player_generated_logps, opponent_real_logps, opponent_generated_logps)
    return F.softplus(-beta * margins)


def play(player: GPTNeo, train_set: list[Example], heldout: list[Example], run: Run) -> list[report.Row]:
    """Algorithm 1. Returns the held-out metrics and training signals of every iterate theta_0 ... theta_T.

    A run that was stopped goes on: finished iterates are read, and of the phase it was in, what `kept` holds.
    """
    rows, start = begin(player, heldout, run)
    previous = read_pairs(len(rows) - 2, run) if run.args.mix_previous and len(rows) > 1 else []
    for t in range(len(rows) - 1, run.args.iterations):
        opponent = player  # theta_t: nothing below changes it before `train`, and its log-probabilities are kept
        kept = run.kept(t + 1)
        pairs, counts = pairs_of(opponent, choose(train_set, t, run), t, run, kept)
        score(opponent, pairs + previous, run, kept)
        signals = train(player, pairs + previous, t, run, kept)
        metrics = evaluate(player, heldout, start, run, iterate=t + 1, kept=kept)
        rows.append(metrics | counts | signals)
        finish_iterate(player, rows, pairs, run)
        previous = pairs if run.args.mix_previous else []
    return rows


def generate(
    opponent: GPTNeo, examples: list[Example], t: int, run: Run, kept: Path | None = None
) -> tuple[list[Pair], report.Row]:
    """The opponent writes one response to every prompt. Returns the pairs worth training on, and counts."""
    args = run.args
    how = (args.temperature, args.top_k, args.top_p)
    responses = sample(opponent, examples, run, seed_of(args.seed, t, "generate"), "generate", *how, kept=kept)
    if args.history != "1":
        responses = draw_from_history(examples, responses, t, run)
    pairs = [Pair(e.prompt_ids, e.real_ids, ids, finished) for e, (ids, finished) in zip(examples, responses)]
    return worth_training(examples, pairs, t, run, kept)


def worth_training(
    examples: list[Example], pairs: list[Pair], t: int, run: Run, kept: Path | None = None
) -> tuple[list[Pair], report.Row]:
    """Leaves out pairs that have no gradient or that the options do not want. Returns the others, and counts of all."""
    args = run.args
    if run.scorer:
        ask_scorer(examples, pairs, run, kept)
    if args.unfinished == "cut":  # else a cut response is told from a whole one by its missing end alone
        for pair in pairs:
            if not pair.finished:
                pair.real_ids = pair.real_ids[: len(pair.generated_ids)]
    # A pair of equal responses has margin 0 whatever the player does: no gradient, only cost. SPPO knows no margin.
    different = [pair for pair in pairs if pair.generated_ids != pair.real_ids]
    wanted = pairs if args.loss == "sppo" else different
    wanted = [p for p in wanted if (p.finished or args.unfinished != "drop") and p.real_wins >= args.min_win]
    if not wanted:
        raise Stopped(f"iteration {t}: no pair is left, all {len(pairs)} were identical, unfinished or below --min-win")
    return wanted, {
        "pairs": len(wanted),
        "identical": len(pairs) - len(different),
        "truncated": mean([not pair.finished for pair in pairs]),
        "real_length": mean([len(pair.real_ids) for pair in pairs]),
        "generated_length": mean([len(pair.generated_ids) for pair in pairs]),
    }


def score(opponent: GPTNeo, pairs: list[Pair], run: Run, kept: Path | None = None) -> None:
    """log p_t of both responses of every pair, once, by the code path that trains; stored with the pairs.

    Pairs of the iteration before are scored again: their opponent is now theta_t as well. With --alpha the base
    policy's log-probabilities are stored beside: with adapters off, in the same pass over the pairs, or, where the
    start is more than that (full-parameter training, --adapter), in a second one by the weights of the start.
    """
    items = [(p.prompt_ids, p.real_ids, p.generated_ids) for p in pairs]
    alpha, off_is_start = run.args.alpha, run.args.rank and not run.args.adapter
    logps = sequence_logps(opponent, items, run, "score", kept, base=bool(alpha and off_is_start))
    if alpha and not off_is_start:
        with base_weights(opponent, run):
            logps += sequence_logps(opponent, items, run, "score-base", kept)
    n = len(pairs)
    for i, pair in enumerate(pairs):
        pair.opponent_real_logp, pair.opponent_generated_logp = logps[i], logps[n + i]
        if alpha:
            pair.base_real_logp, pair.base_generated_logp = logps[2 * n + i], logps[3 * n + i]


def train(player: GPTNeo, pairs: list[Pair], t: int, run: Run, kept: Path | None = None) -> report.Row:
    """Minimises Eq. 4.7, or --loss in its place, over the pairs; returns the signals of the last tenth of the steps."""
    args, beta = run.args, nth(run.args.beta, t)

    def column(values: list[tuple[float, float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=run.device).T  # (2, B): real, generated

    def pair_loss(batch: list[Pair]) -> dict[str, Tensor]:
        logps = response_logps(player, [(p.prompt_ids, p.real_ids, p.generated_ids) for p in batch], run)
        real, generated = logps.chunk(2)  # (B,) each
        opponent = column([(p.opponent_real_logp, p.opponent_generated_logp) for p in batch])
        if args.alpha:
            base = column([(p.base_real_logp, p.base_generated_logp) for p in batch])
            opponent = losses.mixture_logps(opponent, base, args.alpha)
        lengths = column([(len(p.real_ids), len(p.generated_ids)) for p in batch])
        ratios = logps.view(2, -1) - opponent
        match args.loss:
            case "logistic":
                loss = spin_loss(real, generated, *opponent, beta)
            case "hinge":
                loss = losses.hinge_loss(*ratios, beta)
            case "ipo":
                loss = losses.ipo_loss(*(ratios / lengths), beta)
            case "sppo":
                loss = losses.sppo_loss(*ratios, beta, *column([(p.real_wins, p.generated_wins) for p in batch]))
        margins = beta * spin_margins(real, generated, *opponent).detach()
        return {
            "loss": loss,
            "margin": margins,
            "accuracy": (margins > 0).float(),
            "real_logp": real.detach() / lengths[0],
            "generated_logp": generated.detach() / lengths[1],
        }

    return fit(player, pairs, pair_loss, t, run, kept)


def evaluate(
    player: GPTNeo, heldout: list[Example], start: "StartSamples", run: Run, iterate: int, kept: Path | None = None
) -> report.Row:
    """Held-out metrics of one iterate; each x comes with x_se, one standard error over examples.

    greedy / sampled: share of responses equal to one of the references, decoded greedily / sampled at temperature 1.
    greedy_error / sampled_error: edit distance to the nearest reference, over its length, in whitespace tokens.
    nll: negative log-probability of the real response, nats a token. kl: KL(theta_0 || player), nats a response.
    """
    began = time.perf_counter()
    row: report.Row = {"iterate": iterate}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        # the same random numbers for every iterate: the difference of two iterates is less noisy for it
        seed = seed_of(run.args.seed, 0, "evaluate")
        responses = sample(player, heldout, run, seed, name, temperature, kept=kept)
        texts = [text_of(ids, run) for ids, _ in responses]
        right = [float(text in example.references) for text, example in zip(texts, heldout)]
        row |= report.with_se(name, right)
        nearest = [report.nearest_edits(text, example.references) for text, example in zip(texts, heldout)]
        row |= report.with_se(f"{name}_error", [float(e) for e, _ in nearest], [float(n) for _, n in nearest])
    real = sequence_logps(player, [(e.prompt_ids, e.real_ids) for e in heldout], run, "nll", kept)
    row |= report.with_se("nll", [-logp for logp in real], [float(len(e.real_ids)) for e in heldout])
    now = sequence_logps(player, start.sequences, run, "kl", kept)
    row |= report.with_se("kl", [before - after for before, after in zip(start.logps, now)])
    return row | {"evaluate_seconds": time.perf_counter() - began}


# ---------------------------------------------------------------- the rest of the family


def pairs_of(
    opponent: GPTNeo, examples: list[Example], t: int, run: Run, kept: Path | None = None
) -> tuple[list[Pair], report.Row]:
    """The pairs of an iteration, from where the options say: generated (SPIN), given (DPO), or both sampled."""
    source, began = reinforce if run.args.reinforce else generate, time.perf_counter()
    pairs, counts = given(examples, t, run, kept) if run.args.pairs else source(opponent, examples, t, run, kept)
    return pairs, counts | {"generate_seconds": time.perf_counter() - began}


def given(examples: list[Example], t: int, run: Run, kept: Path | None = None) -> tuple[list[Pair], report.Row]:
    """Pairs made elsewhere: with one iteration this is DPO (arXiv 2305.18290), its reference the start."""
    pairs = [Pair(e.prompt_ids, e.real_ids, e.generated_ids, finished=True) for e in examples]
    for pair, example in zip(pairs, examples):
        pair.real_wins, pair.generated_wins = example.wins
    return worth_training(examples, pairs, t, run, kept)


def reinforce(
    player: GPTNeo, examples: list[Example], t: int, run: Run, kept: Path | None = None
) -> tuple[list[Pair], report.Row]:
    """Self-reinforcement (Tong et al., 2024, arXiv 2405.04086): the tuned model's response in place of a human one,
    against the untuned model's, which is the same with its adapters off. No answers are needed.

    --scorer and --min-win filter the pairs.
    """
    args = run.args
    how, seed = (args.temperature, args.top_k, args.top_p), seed_of(args.seed, t, "generate")
    tuned = sample(player, examples, run, seed, "tuned", *how, kept=kept)
    with lora.lora_disabled(player):
        untuned = sample(player, examples, run, seed_of(args.seed, t, "untuned"), "untuned", *how, kept=kept)
    pairs = [Pair(e.prompt_ids, a, b, end_a and end_b) for e, (a, end_a), (b, end_b) in zip(examples, tuned, untuned)]
    return worth_training(examples, pairs, t, run, kept)


# ---------------------------------------------------------------- its parts


def response_logps(player: GPTNeo, items: Sequence[PromptResponses], run: Run) -> Tensor:
    """log p(response | prompt) for the first response of every item, then for the second, if there is one, and so on.

    Each (B,) fp32, nats, summed over the response's tokens; concatenated. The one code path for scoring and training.
    All responses to a prompt follow it in one row, as segments that do not see each other, so the prompt is computed
    once. Which positions count is decided by lengths, never by a token's id. Only hidden states that predict a
    response token go through the head.
    """
    rows = [prompt + [t for response in responses for t in response[:-1]] for prompt, *responses in items]
    width, branches = max(map(len, rows)), len(items[0]) - 1
    if branches > 1 and width > MASKED_TOKENS:
        return torch.cat(
            [response_logps(player, [(item[0], item[n]) for item in items], run) for n in range(1, branches + 1)]
        )
    # a response's last token predicts nothing that is asked for, so it is no input
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows], device=run.device)  # (B, T)
    segments = None  # one response: plain causal attention
    if branches > 1:
        lengths = [[len(prompt), *(len(response) - 1 for response in responses)] for prompt, *responses in items]
        marks = [[n for n, count in enumerate(counts) for _ in range(count)] for counts in lengths]
        segments = torch.tensor([row + [-1] * (width - len(row)) for row in marks], device=run.device)  # (B, T)
    sources, targets, places = [], [], []  # where in B x T each token is predicted, which, where in the result it goes
    longest = max(len(response) for _, *responses in items for response in responses)
    for row, (prompt, *responses) in enumerate(items):
        end = row * width + len(prompt)
        for n, response in enumerate(responses):
            # its first token is predicted by the prompt's last position, the others by the token before them
            sources += [row * width + len(prompt) - 1, *range(end, end + len(response) - 1)]
            targets += response
            places += range((n * len(items) + row) * longest, (n * len(items) + row) * longest + len(response))
            end += len(response) - 1
    sources, targets, places = (torch.tensor(column, device=run.device) for column in (sources, targets, places))
    with run.autocast():
        hidden = player(input_ids, segments).flatten(0, 1)[sources]  # (N, D)
        logps = linear_logprobs(hidden, player.head_weight, targets)  # (N,)
    # every place is written once, then responses are summed: index_add would add in any order on CUDA
    return logps.new_zeros(branches * len(items) * longest).index_put((places,), logps).view(-1, longest).sum(1)


@torch.no_grad()
def sequence_logps(
    player: GPTNeo,
    items: list[PromptResponses],
    run: Run,
    name: str = "score",
    kept: Path | None = None,
    base: bool = False,
) -> list[float]:
    """`response_logps` of any number of items, without gradient or dropout, in the same order.

    base: those of the player with its adapters off follow.
    """
    player.eval()
    bar = tqdm(total=len(items), desc=name, leave=False, disable=None)

    def work(rows: range) -> list[list[float]]:
        bar.n = rows.start
        result = torch.full(((len(items[0]) - 1) * (1 + base), len(rows)), math.nan)
        for chunk in micro_batches([sum(map(len, items[i])) for i in rows], run.micro_tokens):
            logps = [response_logps(player, [items[rows[i]] for i in chunk], run)]
            if base:
                with lora.lora_disabled(player):
                    logps.append(response_logps(player, [items[rows[i]] for i in chunk], run))
            result[:, chunk] = torch.cat(logps).view(-1, len(chunk)).cpu()
            bar.update(len(chunk))
            resume.SIGNALS.check()
        return result.T.tolist()

    with bar:
        done = resume.in_shards(kept, name, len(items), SCORE_SHARD, work)
    return [logp for response in zip(*done) for logp in response]


def micro_batches(tokens: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cuts 0 ... n - 1 into runs of like length: the longest's tokens times the count is in budget, or it is alone."""
    chunk: list[int] = []
    for i in sorted(range(len(tokens)), key=lambda i: tokens[i]):
        if chunk and tokens[i] * (len(chunk) + 1) > budget:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def fit(
    player: GPTNeo,
    items: list[Any],
    loss_of: Callable[[list[Any]], dict[str, Tensor]],
    t: int,
    run: Run,
    kept: Path | None = None,
) -> report.Row:
    """Minimises the mean of loss_of(batch)["loss"] over `items`; the optimizer starts afresh every iteration.

    `loss_of` maps a list of items to (b,) tensors by name. A step whose loss or gradient is not finite is skipped and
    counted; Raises Stopped after SKIPS of them in a row. The state goes to `kept` now and then, and at the end.
    """
    args, began = run.args, time.perf_counter()
    optimizer = make_optimizer([p for p in player.parameters() if p.requires_grad], args, nth(args.lr, t))
    epochs = int(nth(args.epochs, t))
    steps = epochs * math.ceil(len(items) / args.batch)
    shuffle = generator(args.seed, t, "shuffle")
    batches = (b for _ in range(epochs) for b in torch.randperm(len(items), generator=shuffle).split(args.batch))
    torch.manual_seed(seed_of(args.seed, t, "dropout"))
    player.train()
    state, saved = kept and kept / "train.safetensors", time.monotonic()
    log = resume.load_training(state, player, optimizer) if state and state.exists() else []
    left = itertools.islice(enumerate(batches), len(log), None)
    bar = tqdm(left, total=steps, initial=len(log), desc=f"train {t}", leave=False, disable=None)
    with bar:
        for step, batch in bar:
            optimizer.param_groups[0]["lr"] = nth(args.lr, t) * schedule(step, steps, args.warmup)
            row = take_step(optimizer, [items[i] for i in batch.tolist()], loss_of, run)
            log.append({"iteration": t, "step": step + 1} | row)
            bar.set_postfix(loss=row["loss"])
            last = log[-min(SKIPS, steps) :]
            if len(last) == min(SKIPS, steps) and all(row["skipped"] for row in last):
                resume.write_rows(run.out / f"steps-{t}.jsonl", log)
                raise Stopped(
                    f"iteration {t}, steps {last[0]['step']} to {step + 1} of {steps}: loss or gradient is not finite; "
                    f"these steps changed nothing; begin another run with a lower --lr or with --precision fp32"
                )
            due = resume.SIGNALS.pending or time.monotonic() - saved >= 60 * args.save_minutes
            if state and (due or step + 1 == steps):
                resume.write_rows(run.out / f"steps-{t}.jsonl", log)
                resume.save_training(state, player, optimizer, log)
                saved = time.monotonic()
            resume.SIGNALS.check()
    player.eval()
    resume.write_rows(run.out / f"steps-{t}.jsonl", log)
    taken = [row for row in log if not row["skipped"]]
    last = taken[-max(1, len(taken) // 10) :]
    signals = {name: mean([row[name] for row in last]) for name in last[0] if name not in ("iteration", "step")}
    return signals | {"skipped": len(log) - len(taken), "train_seconds": time.perf_counter() - began}


def take_step(
    optimizer: torch.optim.Optimizer, batch: list[Any], loss_of: Callable[[list[Any]], dict[str, Tensor]], run: Run
) -> report.Row:
    """One optimizer step: the gradient of the mean loss over the batch, however it is cut into micro-batches.

    Returns the means of all that `loss_of` computes; null, and `skipped`, where the loss or gradient is not finite:
    then the weights stay as they are.
    """
    sums: dict[str, Tensor] = {}
    for micro in micro_batches([item.tokens for item in batch], run.micro_tokens):
        values = loss_of([batch[i] for i in micro])
        (values["loss"].sum() / len(batch)).backward()
        sums = {name: sums.get(name, 0) + value.detach().sum() for name, value in values.items()}
    group = optimizer.param_groups[0]
    norm = torch.nn.utils.clip_grad_norm_(group["params"], run.args.clip)
    means = torch.stack([*(total / len(batch) for total in sums.values()), norm]).tolist()  # one wait for the GPU
    row = {name: value if math.isfinite(value) else None for name, value in zip([*sums, "grad_norm"], means)}
    skipped = None in row.values()
    if not skipped:
        optimizer.step()
    optimizer.zero_grad()
    return row | {"lr": group["lr"], "skipped": skipped}


def make_optimizer(params: list[Tensor], args: Args, lr: float) -> torch.optim.Optimizer:
    """Over the trainable parameters only. RMSProp has no weight decay, as in the paper."""
    if args.optimizer == "rmsprop":
        return torch.optim.RMSprop(params, lr=lr)
    return torch.optim.AdamW(params, lr=lr, weight_decay=args.weight_decay)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: linear rise over the first `warmup` share of the steps, then linear fall to 0."""
    rise = math.ceil(warmup * steps)
    return (step + 1) / rise if step < rise else (steps - step) / max(steps - rise, 1)


def sample(
    player: GPTNeo,
    examples: list[Example],
    run: Run,
    seed: int,
    name: str,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    kept: Path | None = None,
) -> list[tuple[list[int], bool]]:
    """The player's response to each example's prompt: (ids, whether it ends). Raises Stopped at NaN logits.

    `name` tells what the responses are for, in the progress bar and in `kept`.
    """
    args, began, written = run.args, time.perf_counter(), 0
    bar = tqdm(total=len(examples), desc=name, leave=False, disable=None)

    def progress(rows: int, tokens: int) -> None:
        nonlocal written
        written += tokens
        bar.set_postfix_str(f"{written / (time.perf_counter() - began):,.0f} tokens/s", refresh=False)
        bar.update(rows)
        resume.SIGNALS.check()

    def work(rows: range) -> list[tuple[list[int], bool]]:
        bar.n = rows.start
        samples = sample_responses(
            player,
            [examples[i].prompt_ids for i in rows],
            max_new_tokens=args.max_new_tokens,
            eos_token_id=run.eos_token_id,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            rows=rows,
            batch_size=args.gen_batch,
            cache_tokens=args.gen_tokens,
            progress=progress,
        )
        return list(zip(samples.ids, samples.finished))

    # generation is not for the compiler: a step is a graph on CUDA already
    eager = torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()
    try:
        with bar, in_dtype(player, run.dtype), eager:
            return resume.in_shards(kept, name, len(examples), run.shard, work)
    except FloatingPointError as error:
        raise Stopped(f"responses for '{name}': {error}") from None


@contextlib.contextmanager
def in_dtype(player: GPTNeo, dtype: torch.dtype) -> Iterator[None]:
    """The player's weights in `dtype` for a while, instead of autocast, whose cast copies no CUDA graph could rely on.

    In bf16, unlike under autocast, the residual stream is bf16 too: what is sampled is scored a little more exactly.
    """
    kept = [(p, p.data) for p in player.parameters() if p.dtype != dtype]
    for parameter, data in kept:
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


class StartSamples(NamedTuple):
    """Responses that theta_0 sampled to the held-out prompts, and its log-probabilities of them (nats).

    They estimate KL(theta_0 || theta_t) = E_{y ~ theta_0}[log p_0(y) - log p_t(y)] without a second model.
    """

    sequences: list[PromptResponses]
    logps: list[float]


def sample_start(player: GPTNeo, heldout: list[Example], run: Run, kept: Path | None = None) -> StartSamples:
    responses = sample(player, heldout, run, seed_of(run.args.seed, 0, "kl"), "start", 1.0, kept=kept)
    sequences = [(e.prompt_ids, ids) for e, (ids, _) in zip(heldout, responses)]
    return StartSamples(sequences, sequence_logps(player, sequences, run, "start-logps", kept))


def begin(player: GPTNeo, heldout: list[Example], run: Run) -> tuple[list[report.Row], StartSamples]:
    """The rows of theta_0 and of the iterates that are finished, and the player as the last of them."""
    rows, kept = resume.read_rows(run.out / "metrics.jsonl"), run.kept(0)
    start = sample_start(player, heldout, run, kept)
    if rows:
        load_iterate(player, rows[-1]["iterate"], run)
    else:
        rows.append(evaluate(player, heldout, start, run, iterate=0, kept=kept))
        finish_iterate(player, rows, [], run)
    return rows, start


def choose(examples: list[Example], t: int, run: Run) -> list[Example]:
    """The examples of iteration t: all, or a fresh random subset of --prompts."""
    count = run.args.prompts or len(examples)
    order = torch.randperm(len(examples), generator=generator(run.args.seed, t, "choose"))
    return [examples[i] for i in order[:count].tolist()]


def sft(player: GPTNeo, train_set: list[Example], heldout: list[Example], run: Run) -> list[report.Row]:
    """Supervised fine-tuning on the real responses: the same fit, evaluation and files as `play`."""
    length = mean([len(e.real_ids) for e in train_set])

    def nll(batch: list[Example]) -> dict[str, Tensor]:
        logps = response_logps(player, [(e.prompt_ids, e.real_ids) for e in batch], run)
        # over the mean length, a constant: nats a token, every token of equal weight however a batch is cut
        return {"loss": -logps / length}

    rows, start = begin(player, heldout, run)
    for t in range(len(rows) - 1, run.args.iterations):
        kept = run.kept(t + 1)
        signals = fit(player, choose(train_set, t, run), nll, t, run, kept)
        rows.append(evaluate(player, heldout, start, run, iterate=t + 1, kept=kept) | signals)
        finish_iterate(player, rows, [], run)
    return rows


# ---------------------------------------------------------------- small things


def text_of(ids: list[int], run: Run) -> str:
    return decode(ids, run.tokenizer, run.eos_token_id)


def nth(values: Sequence[float], t: int) -> float:
    """The value of iteration t of an option that has one value or one an iteration."""
    return values[t] if len(values) > 1 else values[0]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------- files and flags


def finish_iterate(player: GPTNeo, rows: list[report.Row], pairs: list[Pair], run: Run) -> None:
    """Writes pairs, weights and, last, metrics of the newest iterate, which is finished then; prints its line."""
    row, iterate = rows[-1], rows[-1]["iterate"]
    if pairs:
        lines = [{"generated": text_of(p.generated_ids, run)} | dataclasses.asdict(p) for p in pairs]
        resume.write_rows(run.out / f"pairs-{iterate - 1}.jsonl", lines)
    folder = run.out / f"iterate-{iterate}"
    if iterate and run.args.rank:
        lora.save_adapter(player, folder, base_model_name_or_path=run.args.model)
    elif iterate:
        save_model(player, folder, run)
    if iterate:
        resume.sync(folder)
    # times are printed, not kept: equal runs leave equal files
    rows[-1] = {name: value for name, value in row.items() if not name.endswith("_seconds")}
    resume.write_rows(run.out / "metrics.jsonl", rows)
    if iterate:
        shutil.rmtree(run.kept(iterate), ignore_errors=True)
    seconds = "".join(f", {key[:-8]} {value:.0f} s" for key, value in row.items() if key.endswith("_seconds"))
    print(report.line(row, report.COLUMNS) + seconds, flush=True)
    for text in report.warnings_of(rows):
        print(f"spin.py: warning: {text}", file=sys.stderr, flush=True)


def load_iterate(player: GPTNeo, iterate: int, run: Run) -> None:
    """Makes the player the iterate that an earlier process finished. Raises Stopped where its files are damaged."""
    folder = run.out / f"iterate-{iterate}"
    try:
        if iterate and run.args.rank:
            lora.load_adapter(player, folder)
        elif iterate:
            player.load_weights(folder)
    except ValueError as error:
        raise Stopped(str(error)) from None


def read_pairs(t: int, run: Run) -> list[Pair]:
    """The pairs of a finished iteration."""
    names = [field.name for field in dataclasses.fields(Pair)]
    lines = resume.read_rows(run.out / f"pairs-{t}.jsonl", expected=True)
    return [Pair(*(line[name] for name in names)) for line in lines]


def save_model(model: GPTNeo, folder: Path, run: Run) -> None:
    model.save_pretrained(folder)
    resume.write_text(folder / "tokenizer.json", run.tokenizer.to_str(pretty=True))


def finish(player: GPTNeo, rows: list[report.Row], run: Run) -> None:
    """Writes the last iterate as one plain model that transformers loads too, and the plot; prints the tables."""
    if run.args.rank:  # merged in fp32, into the base as it is on disk: bf16 would round small updates away
        player = GPTNeo.from_pretrained(run.start)
        lora.load_adapter(player, run.out / f"iterate-{rows[-1]['iterate']}")
        lora.merge(player)
        lora.remove_lora(player)
    save_model(player, run.out / "final", run)
    shown = (report.COLUMNS | report.SIGNALS).keys() & rows[-1].keys() - {"iterate", "pairs", "identical"}
    keys = [key for key in report.COLUMNS | report.SIGNALS if key in shown]
    title = f"{run.args.out}: held-out metrics and training signals"
    resume.write_text(run.out / "metrics.svg", report.plot(rows, keys, title))
    print("\nHeld-out metrics \u00b1 one standard error\n" + report.table(rows, report.COLUMNS))
    print("\nTraining signals, means over the last tenth of an iteration's steps")
    print(report.table(rows[1:], report.SIGNALS))
    best = max(rows, key=lambda row: METRICS[run.args.best] * row[run.args.best])["iterate"]
    record = run.record | {"finished": True, "best": {"iterate": best, "metric": run.args.best}}
    resume.write_text(run.out / "run.json", json.dumps(record, indent=2) + "\n")
    shutil.rmtree(run.out / "resume", ignore_errors=True)
    where = f"{run.out}/iterate-{best}" if best else "the start: none is better"
    print(f"\nBest by {run.args.best.replace('_', ' ')}: iterate {best} ({where}).")
    print(f"The plot is {run.out}/metrics.svg, the last iterate {run.out}/final.")


def rehearse(player: GPTNeo, train_set: list[Example], run: Run) -> tuple[dict[str, float], int]:
    """(seconds a token of each phase, peak memory in bytes), by an iteration of one small step that writes nothing.

    Twice: on the longest examples, which take the most memory and warm up, and on those of middle length.
    """
    ordered = sorted(train_set, key=lambda e: e.tokens)
    room = player.config.max_position_embeddings - max(len(e.prompt_ids) for e in train_set)
    half, size = len(ordered) // 2, max(1, run.micro_tokens // (ordered[-1].tokens + run.args.max_new_tokens))
    changes = dict(iterations=1, epochs=(1,), lr=run.args.lr[:1], beta=run.args.beta[:1], batch=size)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for examples, new in ((ordered[::-1], 8), (ordered[half:] + ordered[:half], 64)):  # few: prompts would dominate
            changes["max_new_tokens"] = min(new, run.args.max_new_tokens, room)  # prompts of given pairs may fill it
            trial = run._replace(args=dataclasses.replace(run.args, **changes), out=Path(folder))
            some, began = examples[: max(size, run.args.gen_batch)], time.perf_counter()
            written = [ids for ids, _ in sample(player, some, trial, 0, "rehearse", 1.0)]
            generated = time.perf_counter()
            real = [e.real_ids or ids for e, ids in zip(some, written)]  # a prompt may have no answer
            pairs = [Pair(e.prompt_ids, ids, ids, finished=True) for e, ids in zip(some[:size], real)]
            score(player, pairs, trial)
            tokens = sum(p.tokens for p in pairs)
            seconds["generate"] = (generated - began) / sum(map(len, written))
            seconds["score"] = (time.perf_counter() - generated) / tokens
            seconds["train"] = train(player, pairs, 0, trial)["train_seconds"] / tokens
    if run.device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated(run.device)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fail(error: object, code: int) -> int:
    # one line, whatever a file or a flag holds
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error).replace("\n", " "))
    print("spin.py: error: " + text, file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a run that cannot go on, 2 bad input, 130 and 143 stopped by Ctrl-C and SIGTERM."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(resume.SIGNALS.noted())
        stack.enter_context(onednn.products())
        try:
            command, args = parse(sys.argv[1:] if argv is None else argv, __doc__.split("\n\nAlgorithm 1")[0])
            player, train_set, heldout, run = setup(args, command)
            resume.SIGNALS.check()
            if args.dry_run:
                print(plan.describe(train_set, heldout, run, *rehearse(player, train_set, run)))
                return 0
            stack.enter_context(resume.claimed(run.out))
            begin_or_go_on(run)
        except Finished as finished:
            shutil.rmtree(Path(args.out, "resume"), ignore_errors=True)  # if it died just before it would have done so
            print(finished)
            return 0
        except (ValueError, OSError, Stopped, torch.OutOfMemoryError, resume.Interrupted) as error:
            return fail(error, getattr(error, "exit_code", 2))
        try:
            rows = (play if command == "spin" else sft)(player, train_set, heldout, run)
            finish(player, rows, run)
        except Stopped as error:
            return fail(error, 1)
        except (OSError, torch.OutOfMemoryError, resume.Interrupted) as error:
            less = ", with lower --micro-tokens or --gen-tokens, or with --checkpoint"
            less = less if isinstance(error, torch.OutOfMemoryError) else ""
            kept = f"what is finished is kept in {run.out}; the same command goes on from there{less}"
            return fail(f"{error}; {kept}", getattr(error, "exit_code", 1))
    return 0


def begin_or_go_on(run: Run) -> None:
    """Under the lock: writes the record of a new run, or says how far an old one is."""
    record = resume.read_record(run.out)
    if record is None:
        resume.write_text(run.out / "run.json", json.dumps(run.record, indent=2) + "\n")
        return
    if record != run.record:  # it was not there, or not so, when `setup` compared options and inputs
        raise ValueError(f"--out {run.out}: another process was at work in it a moment ago; run the command again")
    done = max(0, len(resume.read_rows(run.out / "metrics.jsonl")) - 1)
    print(f"going on in {run.out}: {done} of {run.args.iterations} iterations are finished", flush=True)


if __name__ == "__main__":
    sys.exit(main())
