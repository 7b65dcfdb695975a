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
"""

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

import lora
import onednn
import report
from data import Example, as_decoded, decode, encode, fit_context, load_examples, load_tokenizer, split
from kernels import linear_logprobs
from model import GPTNeo, GPTNeoConfig
from sampling import Samples
from sampling import generate as sample_responses

HERE = Path(__file__).resolve().parent
MASKED_TOKENS = 1024  # longer rows compute a prompt for each response: a (T, T) mask would cost more than it saves
# ids of a prompt and of one or more responses to it, their end-of-sequence tokens included
PromptResponses = tuple[list[int], ...]


@dataclass(frozen=True)
class Args:
    """Every option; a field's comment is its help. Options of self-play alone are marked (spin)."""

    model: str = ""  # directory or hub id of the start; without it, the embedded task is run
    data: str = ""  # JSON Lines of {"prompt", "response"} or of the official {"real": [...]}; .gz is fine
    eval_data: str = ""  # held-out data; without it, a share of --data
    eval_share: float = 0.05  # share of --data held out, chosen by a hash of the prompt
    eval_limit: int = 1000  # at most so many held-out examples are used (0: all)
    out: str = "runs/spin"  # directory for everything the run writes; must not hold another run
    template: str = r"### Instruction: {prompt}\n\n### Response: "  # prompt template; \n is a line break
    overlong: str = "error"  # examples that do not fit the context: error | skip (and count)
    iterations: int = 3  # rounds of self-play (of sft: rounds of training and evaluation)
    prompts: int = 0  # examples an iteration, drawn afresh for each (0: all)
    mix_previous: bool = False  # (spin) train on the pairs of iteration t - 1 too
    beta: tuple[float, ...] = (0.1,)  # (spin) beta of Eq. 4.7, the paper's lambda; one value or one an iteration
    max_new_tokens: int = 256  # length limit of generated responses, in tokens
    temperature: float = 1.0  # (spin) of the opponent's sampling; 0: greedy
    top_k: int = 0  # (spin) of the opponent's sampling; 0: off
    top_p: float = 1.0  # (spin) of the opponent's sampling; 1: off
    unfinished: str = "keep"  # (spin) responses cut at the length limit: keep | drop | cut (the real one alike)
    gen_batch: int = 64  # rows generated together
    gen_tokens: int = 131072  # tokens that the cache of generation has room for; reduces --gen-batch to fit
    rank: int = 16  # LoRA rank; 0: train all parameters
    alpha: float = 32.0  # LoRA scaling is alpha / rank
    lora_dropout: float = 0.0  # dropout on the adapters' input
    lora_targets: tuple[str, ...] = lora.DEFAULT_TARGETS  # names of the linear layers that get an adapter
    optimizer: str = "adamw"  # adamw | rmsprop (the paper's)
    lr: tuple[float, ...] = (5e-5,)  # peak learning rate; one value or one an iteration
    epochs: tuple[int, ...] = (2,)  # passes over the pairs; one value or one an iteration
    warmup: float = 0.1  # share of an iteration's steps in which the rate rises; it then falls linearly to 0
    weight_decay: float = 0.0  # of AdamW
    clip: float = 1.0  # largest norm of the gradient
    batch: int = 64  # examples (pairs) a step
    micro_tokens: int = 0  # tokens a forward pass, padding included; less needs less memory (0: 2048, on a GPU 8192)
    checkpoint: bool = False  # keep only a block's input for its backward pass: less memory, one more forward pass
    compile: bool = False  # torch.compile the blocks for training: a minute at first; its gain is not measured yet
    precision: str = "auto"  # bf16 | fp32 | auto (bf16 on a GPU, fp32 on CPU)
    device: str = "auto"  # cpu | cuda | cuda:N | auto (a GPU where there is one)
    seed: int = 0  # of everything random
    from_scratch: bool = False  # (sft) --model holds config.json and a tokenizer; weights start at random

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("eval_share", 0 < self.eval_share < 1, "between 0 and 1"),
            ("eval_limit", self.eval_limit >= 0, "0 or more"),
            ("template", "{prompt}" in self.template, "text with {prompt} in it"),
            ("overlong", self.overlong in ("error", "skip"), "error or skip"),
            ("iterations", self.iterations >= 1, "1 or more"),
            ("prompts", self.prompts >= 0, "0 or more"),
            ("beta", all(0 < b < math.inf for b in self.beta), "positive numbers"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature == 0 or 1e-3 <= self.temperature < math.inf, "0 or at least 0.001"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("unfinished", self.unfinished in ("keep", "drop", "cut"), "keep, drop or cut"),
            ("gen_batch", self.gen_batch >= 1, "1 or more"),
            ("gen_tokens", self.gen_tokens >= 1, "1 or more"),
            ("rank", self.rank >= 0, "0 or more"),
            ("alpha", 0 < self.alpha < math.inf, "positive"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
            ("optimizer", self.optimizer in ("adamw", "rmsprop"), "adamw or rmsprop"),
            ("lr", all(0 < x < math.inf for x in self.lr), "positive numbers"),
            ("epochs", all(e >= 1 for e in self.epochs), "1 or more"),
            ("warmup", 0 <= self.warmup <= 1, "in [0, 1]"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("clip", self.clip > 0, "positive"),
            ("batch", self.batch >= 1, "1 or more"),
            ("micro_tokens", self.micro_tokens >= 0, "0 or more"),
            ("precision", self.precision in ("auto", "bf16", "fp32"), "auto, bf16 or fp32"),
            ("device", bool(re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", self.device)), "auto, cpu, cuda or cuda:N"),
        ):
            if not ok:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)!r}: expected {expected}")
        for name, value in vars(self).items():
            if isinstance(value, int) and abs(value) >= 2**31:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected less than 2^31")
        for name in ("beta", "lr", "epochs"):
            if len(getattr(self, name)) not in (1, self.iterations):
                raise ValueError(f"--{name} has {len(getattr(self, name))} values: expected 1 or {self.iterations}")


@dataclass(slots=True)
class Pair:
    """A prompt with its real and its generated response; `score` fills in the opponent's log-probabilities."""

    prompt_ids: list[int]
    real_ids: list[int]
    generated_ids: list[int]
    finished: bool  # the opponent sampled the end-of-sequence token
    opponent_real_logp: float = math.nan  # nats, summed over the response
    opponent_generated_logp: float = math.nan

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.real_ids) + len(self.generated_ids)


class Stopped(RuntimeError):
    """The run cannot go on; the message says where and why."""


class Run(NamedTuple):
    """What every phase needs besides the player."""

    args: Args
    tokenizer: Tokenizer
    eos_token_id: int
    device: torch.device
    dtype: torch.dtype  # of the player's products
    start: Path  # directory of theta_0
    out: Path

    @property
    def micro_tokens(self) -> int:
        return self.args.micro_tokens or (8192 if self.device.type == "cuda" else 2048)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


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
    """Algorithm 1. Returns the held-out metrics and training signals of every iterate theta_0 ... theta_T."""
    rows, previous = [], []
    start = sample_start(player, heldout, run)
    rows.append(evaluate(player, heldout, start, run, iterate=0))
    finish_iterate(player, rows, [], run)
    for t in range(run.args.iterations):
        opponent = player  # theta_t: nothing below changes it before `train`, and its log-probabilities are kept
        pairs, counts = generate(opponent, choose(train_set, t, run), t, run)
        score(opponent, pairs + previous, run)
        signals = train(player, pairs + previous, t, run)
        metrics = evaluate(player, heldout, start, run, iterate=t + 1)
        rows.append(metrics | counts | signals)
        finish_iterate(player, rows, pairs, run)
        previous = pairs if run.args.mix_previous else []
    return rows


def generate(opponent: GPTNeo, examples: list[Example], t: int, run: Run) -> tuple[list[Pair], report.Row]:
    """The opponent writes one response to every prompt. Returns the pairs worth training on, and counts."""
    args, began = run.args, time.perf_counter()
    seed = seed_of(args.seed, t, "generate")
    samples = sample(opponent, examples, run, seed, f"generate {t}", args.temperature, args.top_k, args.top_p)
    pairs = [
        Pair(e.prompt_ids, e.real_ids, ids, finished)
        for e, ids, finished in zip(examples, samples.ids, samples.finished)
    ]
    if args.unfinished == "cut":  # else a cut response is told from a whole one by its missing end alone
        for pair in pairs:
            if not pair.finished:
                pair.real_ids = pair.real_ids[: len(pair.generated_ids)]
    # A pair of equal responses has margin 0 whatever the player does: no gradient, only cost.
    different = [pair for pair in pairs if pair.generated_ids != pair.real_ids]
    kept = [pair for pair in different if pair.finished or args.unfinished != "drop"]
    if not kept:
        raise Stopped(f"iteration {t}: no pair is left, all {len(pairs)} were identical or dropped as unfinished")
    return kept, {
        "pairs": len(kept),
        "identical": len(pairs) - len(different),
        "truncated": mean([not pair.finished for pair in pairs]),
        "real_length": mean([len(pair.real_ids) for pair in pairs]),
        "generated_length": mean([len(pair.generated_ids) for pair in pairs]),
        "generate_seconds": time.perf_counter() - began,
    }


def score(opponent: GPTNeo, pairs: list[Pair], run: Run) -> None:
    """log p_t of both responses of every pair, once, by the code path that trains; stored with the pairs.

    Pairs of the iteration before are scored again: their opponent is now theta_t as well.
    """
    logps = sequence_logps(opponent, [(p.prompt_ids, p.real_ids, p.generated_ids) for p in pairs], run)
    for i, pair in enumerate(pairs):
        pair.opponent_real_logp, pair.opponent_generated_logp = logps[i], logps[len(pairs) + i]


def train(player: GPTNeo, pairs: list[Pair], t: int, run: Run) -> report.Row:
    """Minimises Eq. 4.7 over the pairs; returns the signals of the last tenth of the steps."""
    beta = nth(run.args.beta, t)

    def pair_loss(batch: list[Pair]) -> dict[str, Tensor]:
        logps = response_logps(player, [(p.prompt_ids, p.real_ids, p.generated_ids) for p in batch], run)
        real, generated = logps.chunk(2)  # (B,) each
        opponent = torch.tensor([(p.opponent_real_logp, p.opponent_generated_logp) for p in batch], device=run.device)
        lengths = torch.tensor([(len(p.real_ids), len(p.generated_ids)) for p in batch], device=run.device)
        margins = beta * spin_margins(real, generated, *opponent.T).detach()
        return {
            "loss": spin_loss(real, generated, *opponent.T, beta),
            "margin": margins,
            "accuracy": (margins > 0).float(),
            "real_logp": real.detach() / lengths[:, 0],
            "generated_logp": generated.detach() / lengths[:, 1],
        }

    return fit(player, pairs, pair_loss, t, run)


def evaluate(player: GPTNeo, heldout: list[Example], start: "StartSamples", run: Run, iterate: int) -> report.Row:
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
        samples = sample(player, heldout, run, seed, f"{name} {iterate}", temperature)
        texts = [decode(ids, run.tokenizer, run.eos_token_id) for ids in samples.ids]
        right = [float(text in example.references) for text, example in zip(texts, heldout)]
        row |= report.with_se(name, right)
        nearest = [report.nearest_edits(text, example.references) for text, example in zip(texts, heldout)]
        row |= report.with_se(f"{name}_error", [float(e) for e, _ in nearest], [float(n) for _, n in nearest])
    real = sequence_logps(player, [(e.prompt_ids, e.real_ids) for e in heldout], run)
    row |= report.with_se("nll", [-logp for logp in real], [float(len(e.real_ids)) for e in heldout])
    now = sequence_logps(player, start.sequences, run)
    row |= report.with_se("kl", [before - after for before, after in zip(start.logps, now)])
    return row | {"evaluate_seconds": time.perf_counter() - began}


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
def sequence_logps(player: GPTNeo, items: list[PromptResponses], run: Run) -> list[float]:
    """`response_logps` of any number of items, without gradient or dropout, in the same order."""
    player.eval()
    result = torch.full((len(items[0]) - 1 if items else 0, len(items)), math.nan)
    chunks = list(micro_batches([sum(map(len, item)) for item in items], run.micro_tokens))
    for chunk in tqdm(chunks, desc="score", leave=False, disable=None):
        result[:, chunk] = response_logps(player, [items[i] for i in chunk], run).view(-1, len(chunk)).cpu()
    return result.flatten().tolist()


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
    player: GPTNeo, items: list[Any], loss_of: Callable[[list[Any]], dict[str, Tensor]], t: int, run: Run
) -> report.Row:
    """Minimises the mean of loss_of(batch)["loss"] over `items`; the optimizer starts afresh every iteration.

    `loss_of` maps a list of items to (b,) tensors by name. A step's gradient is that of the mean over its batch,
    however the batch is cut into micro-batches. Raises Stopped at a loss or gradient that is not finite.
    """
    args, began = run.args, time.perf_counter()
    params = [p for p in player.parameters() if p.requires_grad]
    lr, epochs = nth(args.lr, t), int(nth(args.epochs, t))
    optimizer = make_optimizer(params, args, lr)
    steps = epochs * math.ceil(len(items) / args.batch)
    shuffle = generator(args.seed, t, "shuffle")
    batches = (b for _ in range(epochs) for b in torch.randperm(len(items), generator=shuffle).split(args.batch))
    torch.manual_seed(seed_of(args.seed, t, "dropout"))
    player.train()
    log = []
    bar = tqdm(batches, total=steps, desc=f"train {t}", leave=False, disable=None)
    for step, batch in enumerate(bar):
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps, args.warmup)
        sums: dict[str, Tensor] = {}
        chosen = [items[i] for i in batch.tolist()]
        for micro in micro_batches([item.tokens for item in chosen], run.micro_tokens):
            values = loss_of([chosen[i] for i in micro])
            (values["loss"].sum() / len(batch)).backward()
            sums = {name: sums.get(name, 0) + value.detach().sum() for name, value in values.items()}
        norm = torch.nn.utils.clip_grad_norm_(params, args.clip)
        means = (torch.stack([*sums.values()]) / len(batch)).tolist()
        row = dict(zip(sums, means)) | {"grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]}
        log.append({"iteration": t, "step": step + 1} | row)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            report.write_rows(run.out / f"steps-{t}.jsonl", log)
            raise Stopped(
                f"iteration {t}, step {step + 1} of {steps}: loss {row['loss']}, gradient norm {row['grad_norm']}; "
                f"nothing was updated by this step; a lower --lr or --precision fp32 may help"
            )
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{row['loss']:.4f}")
    player.eval()
    report.write_rows(run.out / f"steps-{t}.jsonl", log)
    last = log[-max(1, len(log) // 10) :]
    return {name: mean([row[name] for row in last]) for name in row} | {"train_seconds": time.perf_counter() - began}


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
) -> Samples:
    """One response of the player to each example's prompt. `name` tells the phase. Raises Stopped at NaN logits."""
    bar = tqdm(total=len(examples), desc=name, leave=False, disable=None)
    began, written = time.perf_counter(), 0

    def progress(rows: int, tokens: int) -> None:
        nonlocal written
        written += tokens
        bar.set_postfix_str(f"{written / (time.perf_counter() - began):,.0f} tokens/s", refresh=False)
        bar.update(rows)

    try:
        # generation is not for the compiler: a step is a graph on CUDA already
        eager = torch.compiler.set_stance("force_eager") if run.args.compile else contextlib.nullcontext()
        with bar, in_dtype(player, run.dtype), eager:
            return sample_responses(
                player,
                [e.prompt_ids for e in examples],
                max_new_tokens=run.args.max_new_tokens,
                eos_token_id=run.eos_token_id,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                batch_size=run.args.gen_batch,
                cache_tokens=run.args.gen_tokens,
                progress=progress,
            )
    except FloatingPointError as error:
        raise Stopped(f"{name}: {error}") from None


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


def sample_start(player: GPTNeo, heldout: list[Example], run: Run) -> StartSamples:
    samples = sample(player, heldout, run, seed_of(run.args.seed, 0, "kl"), "sample theta_0", 1.0)
    sequences = [(e.prompt_ids, ids) for e, ids in zip(heldout, samples.ids)]
    return StartSamples(sequences, sequence_logps(player, sequences, run))


def choose(examples: list[Example], t: int, run: Run) -> list[Example]:
    """The examples of iteration t: all, or a fresh random subset of --prompts."""
    count = run.args.prompts or len(examples)
    order = torch.randperm(len(examples), generator=generator(run.args.seed, t, "choose"))
    return [examples[i] for i in order[:count].tolist()]


def seed_of(seed: int, t: int, purpose: str) -> int:
    """A seed for one purpose in one iteration: no phase disturbs the random numbers of another."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{t}/{purpose}".encode()).digest()[:8], "big") >> 1


def generator(seed: int, t: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, t, purpose))


def sft(player: GPTNeo, train_set: list[Example], heldout: list[Example], run: Run) -> list[report.Row]:
    """Supervised fine-tuning on the real responses: the same fit, evaluation and files as `play`."""
    length = mean([len(e.real_ids) for e in train_set])

    def nll(batch: list[Example]) -> dict[str, Tensor]:
        logps = response_logps(player, [(e.prompt_ids, e.real_ids) for e in batch], run)
        # over the mean length, a constant: nats a token, every token of equal weight however a batch is cut
        return {"loss": -logps / length}

    start = sample_start(player, heldout, run)
    rows = [evaluate(player, heldout, start, run, iterate=0)]
    finish_iterate(player, rows, [], run)
    for t in range(run.args.iterations):
        signals = fit(player, choose(train_set, t, run), nll, t, run)
        rows.append(evaluate(player, heldout, start, run, iterate=t + 1) | signals)
        finish_iterate(player, rows, [], run)
    return rows


# ---------------------------------------------------------------- small things


def nth(values: Sequence[float], t: int) -> float:
    """The value of iteration t of an option that has one value or one an iteration."""
    return values[t] if len(values) > 1 else values[0]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------- files and flags

# The columns of the two tables, and how their values are written.
COLUMNS = dict(iterate="d", greedy=".1%", sampled=".1%", greedy_error=".1%", sampled_error=".1%", nll=".4f", kl=".2f")
SIGNALS = dict(iterate="d", pairs="d", identical="d", truncated=".2%", real_length=".1f", generated_length=".1f")
SIGNALS |= dict(loss=".4f", margin=".3f", accuracy=".1%", real_logp=".3f", generated_logp=".3f", grad_norm=".2f")


def finish_iterate(player: GPTNeo, rows: list[report.Row], pairs: list[Pair], run: Run) -> None:
    """Writes metrics, pairs and weights of the newest iterate, and prints its line."""
    iterate = rows[-1]["iterate"]
    report.write_rows(run.out / "metrics.jsonl", rows)
    if iterate:
        folder = run.out / f"iterate-{iterate}"
        if run.args.rank:
            lora.save_adapter(player, folder, base_model_name_or_path=run.args.model)
        else:
            player.save_pretrained(folder)
            run.tokenizer.save(str(folder / "tokenizer.json"))
    if pairs:
        lines = [
            {"generated": decode(p.generated_ids, run.tokenizer, run.eos_token_id)} | dataclasses.asdict(p)
            for p in pairs
        ]
        report.write_rows(run.out / f"pairs-{iterate - 1}.jsonl", lines)
    seconds = "".join(f", {key[:-8]} {value:.0f} s" for key, value in rows[-1].items() if key.endswith("_seconds"))
    print(report.line(rows[-1], COLUMNS) + seconds, flush=True)


def finish(player: GPTNeo, rows: list[report.Row], run: Run) -> None:
    """Writes the last iterate as one plain model that transformers loads too, and the plot; prints the tables."""
    if run.args.rank:  # merged in fp32, into the base as it is on disk: bf16 would round small updates away
        player = GPTNeo.from_pretrained(run.start)
        lora.load_adapter(player, run.out / f"iterate-{rows[-1]['iterate']}")
        lora.merge(player)
        lora.remove_lora(player)
    player.save_pretrained(run.out / "final")
    run.tokenizer.save(str(run.out / "final" / "tokenizer.json"))
    keys = [key for key in ({**COLUMNS, **SIGNALS}) if key in rows[-1] and key not in ("iterate", "pairs", "identical")]
    report.plot(run.out / "metrics.svg", rows, keys, f"{run.args.out}: held-out metrics and training signals")
    print("\nHeld-out metrics \u00b1 one standard error\n" + report.table(rows, COLUMNS))
    print("\nTraining signals, means over the last tenth of an iteration's steps\n" + report.table(rows[1:], SIGNALS))
    print(f"\nThe plot is {run.out}/metrics.svg, the last iterate {run.out}/final.")


def parse(argv: list[str]) -> tuple[str, Args]:
    """Command line to (command, Args). `@FILE` reads flags from a recipe, in which $SPIN is the folder of spin.py."""
    command = argv[0] if argv and argv[0] in ("spin", "sft") else "spin"
    argv = argv[1:] if argv and argv[0] == command else argv
    if not any(flag.startswith(("--model", "--data", "@", "-h", "--help")) for flag in argv):
        argv = [f"@{HERE / 'recipes' / ('pronounce.args' if command == 'spin' else 'pronounce-sft.args')}", *argv]
    parser = argparse.ArgumentParser(
        prog=f"spin.py {command}",
        fromfile_prefix_chars="@",
        description=__doc__.split("\n\nAlgorithm 1")[0] + "\n\n@FILE reads flags from a recipe; defaults are in [].",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # or --mod would not be seen as --model above
    )
    parser.convert_arg_line_to_args = recipe_words
    parser.error = bad_flag
    other = {"spin": "(sft)", "sft": "(spin)"}[command]
    for field, text in zip(dataclasses.fields(Args), field_comments(Args)):
        if not text.startswith(other):
            add_flag(parser, field, text)
    options = vars(parser.parse_args(argv))
    return command, Args(**options)


def recipe_words(line: str) -> list[str]:
    try:
        return [word.replace("$SPIN", str(HERE)) for word in shlex.split(line, comments=True)]
    except ValueError as error:
        raise ValueError(f"recipe line {line!r}: {error}") from None


def bad_flag(message: str) -> NoReturn:
    """Argparse would print the usage of all flags first; `main` prints one line."""
    raise ValueError(message)


def field_comments(cls: type) -> list[str]:
    return re.findall(r"^    \w+: .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE)


def add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, text: str) -> None:
    flag, default = "--" + field.name.replace("_", "-"), field.default
    text = re.sub(r"^\((spin|sft)\) ", "", text).replace("%", "%%")
    if field.type is bool:
        parser.add_argument(flag, action="store_true", help=text)
    elif isinstance(default, tuple):
        text += f" [{','.join(map(str, default))}]"
        kind = comma_separated(field.type.__args__[0])
        parser.add_argument(flag, type=kind, default=default, metavar="X,...", help=text)
    else:
        text += f" [{default}]" if default != "" else ""
        parser.add_argument(flag, type=field.type, default=default, metavar="X", help=text)


def comma_separated(item: type) -> Callable[[str], tuple]:
    def convert(text: str) -> tuple:
        return tuple(item(part) for part in text.split(","))

    convert.__name__ = f"comma-separated {item.__name__}"  # argparse names it in its message
    return convert


def resolve_model(name: str) -> Path:
    """The directory of a model: `name` itself, or the snapshot of a hub id."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"--model {name}: neither a directory nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    common = ["config.json", "tokenizer.json", "vocab.json", "merges.txt"]
    try:
        path = Path(snapshot_download(name, allow_patterns=[*common, "model*.safetensors*"]))
        if not any(path.glob("model*.safetensors")):
            path = Path(snapshot_download(name, allow_patterns=[*common, "pytorch_model*.bin*"]))
    except Exception as error:  # whatever the hub or the network answers
        raise ValueError(f"--model {name}: no such directory, and the hub says: {error}") from None
    return path


def setup(args: Args, command: str) -> tuple[GPTNeo, list[Example], list[Example], Run]:
    """Checks and loads everything before the first token is generated. Raises ValueError and OSError."""
    if not args.model or not args.data:
        missing, expected = ("--data", "a JSON Lines file") if args.model else ("--model", "a directory or a hub id")
        raise ValueError(f"{missing} is missing: expected {expected}")
    if args.from_scratch and args.rank:
        raise ValueError(f"--rank {args.rank}: expected 0 with --from-scratch, adapters on random weights learn little")
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: already holds another run or other files; name a new directory or remove it")
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {args.device}: this machine has {torch.cuda.device_count()} CUDA devices")
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    path = resolve_model(args.model)
    config = GPTNeoConfig.from_json(path / "config.json")
    if args.rank > config.hidden_size:
        raise ValueError(f"--rank {args.rank}: expected at most the model's hidden_size, {config.hidden_size}")
    if config.eos_token_id is None:
        raise ValueError(f"{path / 'config.json'}: eos_token_id is missing, and responses could not end")
    tokenizer = load_tokenizer(path, config.eos_token_id, config.vocab_size)
    train_set, heldout = load_data(args, tokenizer, config)
    player = load_player(path, args, device, bf16)
    run = Run(
        args,
        tokenizer,
        config.eos_token_id,
        device,
        torch.bfloat16 if bf16 else torch.float32,
        path,
        out,
    )
    record = dataclasses.asdict(args) | {"command": command, "train": len(train_set), "heldout": len(heldout)}
    report.write_text(out / "run.json", json.dumps(record, indent=2) + "\n")
    return player, train_set, heldout, run


def load_data(args: Args, tokenizer: Tokenizer, config: GPTNeoConfig) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples, encoded and checked against the context."""
    train_set = load_examples(args.data)
    if args.eval_data:
        heldout = load_examples(args.eval_data)
    else:
        train_set, heldout = split(train_set, args.eval_share)
        if not train_set or not heldout:
            raise ValueError(f"{args.data}: too few records to hold out a share of {args.eval_share}; use --eval-data")
    heldout = heldout[: args.eval_limit or None]
    result = []
    for examples in (train_set, heldout):
        encode(examples, tokenizer, args.template.replace(r"\n", "\n"), config.eos_token_id)
        if examples is heldout:
            as_decoded(examples, tokenizer, config.eos_token_id)
        kept, skipped = fit_context(examples, config.max_position_embeddings, args.max_new_tokens, args.overlong)
        if skipped:
            print(f"left out {skipped} of {len(examples)} examples that do not fit the context", flush=True)
        result.append(kept)
    return result[0], result[1]


def load_player(path: Path, args: Args, device: torch.device, bf16: bool) -> GPTNeo:
    """The start, with adapters where --rank asks for them.

    Under LoRA a bf16 run keeps the frozen base in bf16 and the adapters in fp32; in full-parameter training the
    weights stay fp32 and the products are bf16 (autocast), since bf16's 8 bits would lose the small updates.
    """
    if args.from_scratch:
        player = GPTNeo(GPTNeoConfig.from_json(path / "config.json"))
        player.init_weights(generator(args.seed, 0, "weights")).to(device)
    else:
        dtype = torch.bfloat16 if bf16 and args.rank else torch.float32
        player = GPTNeo.from_pretrained(path, dtype=dtype, device=device)
    if args.rank:
        rng = generator(args.seed, 0, "lora")
        lora.add_lora(player, args.rank, args.alpha, args.lora_dropout, args.lora_targets, rng)
    player.checkpointing = args.checkpoint
    if args.compile:
        for block in player.transformer["h"]:
            block.compile(dynamic=True)  # every micro-batch has a shape of its own
    return player


def fail(message: object) -> int:
    print("spin.py: error: " + str(message).replace("\n", " "), file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    try:
        command, args = parse(sys.argv[1:] if argv is None else argv)
        player, train_set, heldout, run = setup(args, command)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        return fail(error)
    try:
        with onednn.products():
            rows = (play if command == "spin" else sft)(player, train_set, heldout, run)
        finish(player, rows, run)
    except (Stopped, OSError, torch.OutOfMemoryError) as error:
        fail(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
