"""Batched generation: ragged prompts in, sampled ids and their log-probabilities out.

Needs torch only. Works with any model that offers what model.GPTNeo does: `model(input_ids, attention_mask, cache)`,
`model.logits(hidden)`, `model.head_weight`, `model.new_cache(batch, slots)` and `model.config`.

Shapes: B rows, P longest prompt, S cache slots, V vocabulary; b rows still running.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Samples(NamedTuple):
    """What `generate` returns, one entry a prompt, in the order of the prompts."""

    ids: list[list[int]]  # the sampled tokens, the end-of-sequence token included when it was sampled
    finished: list[bool]  # whether the end-of-sequence token was sampled within the length limit
    logps: list[list[float]]  # nats: log-probability of each sampled token, before temperature, top-k and top-p


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Samples:
    """Samples one continuation of every prompt, in batches of prompts of like length, with a KV cache.

    Args:
        prompts: token ids, each of at least one token; at most max_position_embeddings - max_new_tokens long.
        temperature: logits are divided by it; 0 means greedy, where nothing is random.
        top_k: sample among the k likeliest tokens only; 0: all.
        top_p: sample among the fewest likeliest tokens whose probabilities reach top_p; 1: all.
        generator: a CPU generator; one uniform number per (prompt, position) is drawn from it up front, so a row's
            tokens depend on neither the batch size nor its batch mates.
        progress: called with the number of rows of each batch that is done.

    Raises: ValueError naming the argument, or the prompt that is empty or too long; FloatingPointError where logits
    are NaN.
    """
    _check_sampling(model.config, prompts, max_new_tokens, temperature, top_k, top_p, batch_size)
    uniform = torch.rand(len(prompts), max_new_tokens, generator=generator)
    results: list[Any] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            pick = Picker(temperature, top_k, top_p, uniform[rows].to(model.head_weight.device))
            for row, result in zip(rows, _generate_batch(model, [prompts[r] for r in rows], eos_token_id, pick)):
                results[row] = result
            if progress is not None:
                progress(len(rows))
    finally:
        model.train(was_training)
    return Samples(*map(list, zip(*results))) if results else Samples([], [], [])


class Picker(NamedTuple):
    """How the next token is chosen; `uniform` (B, max_new_tokens) holds the randomness of each row and step."""

    temperature: float
    top_k: int
    top_p: float
    uniform: Tensor

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """logits (b, V) fp32 of the batch rows `rows` (b,) -> next tokens (b,)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return sample(filter_logits(logits, self.temperature, self.top_k, self.top_p), self.uniform[rows, step])


def filter_logits(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Temperature, then top-k, then top-p, as transformers orders them: (b, V) -> (b, V), -inf where excluded."""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all likelier tokens
        excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, before >= top_p)
        logits = logits.masked_fill(excluded, -torch.inf)
    return logits


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """One draw a row by inversion: the first token whose cumulative probability exceeds uniform (b,) in [0, 1)."""
    cdf = logits.double().softmax(-1).cumsum(-1)  # fp64: V = 50257 roundings of fp32 would bias the tail
    threshold = uniform.double()[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp(max=logits.shape[1] - 1)  # NaN logits: V


def _generate_batch(
    model: nn.Module, prompts: list[list[int]], eos_token_id: int | None, pick: Picker
) -> list[tuple[list[int], bool, list[float]]]:
    """One batch from left-padded prompts to finished rows: (ids, finished, logps) each."""
    device, steps = model.head_weight.device, pick.uniform.shape[1]
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # (B, P)
    mask = torch.ones(len(prompts), longest + steps, dtype=torch.bool, device=device)  # (B, S)
    for row, prompt in enumerate(prompts):
        mask[row, : longest - len(prompt)] = False
    rows = torch.arange(len(prompts), device=device)  # which row of `prompts` each row of the cache works on
    ids = torch.zeros(len(prompts), steps, dtype=torch.long, device=device)
    logps = torch.zeros(len(prompts), steps, device=device)
    length = torch.full((len(prompts),), steps, device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache = model.new_cache(len(prompts), longest + steps)
    for step in range(steps):
        hidden = model(input_ids, mask[:, : cache.length + input_ids.shape[1]], cache)
        logits = model.logits(hidden[:, -1]).float()  # (b, V)
        token = pick(logits, rows, step)
        ids[rows, step] = token
        logps[rows, step] = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        if eos_token_id is not None:
            stopped = (token == eos_token_id) & ~finished[rows]
            length[rows[stopped]], finished[rows[stopped]] = step + 1, True
            running = (~finished[rows]).nonzero()[:, 0]
            if not len(running):
                break
            if len(running) <= 0.8 * len(rows):  # rows that stopped leave; seldom, since the cache is copied
                rows, token, mask = rows[running], token[running], mask[running]
                cache.keep_rows(running)
        input_ids = token[:, None]
    if not logps.isfinite().all():  # once a batch, since it waits for the device
        raise FloatingPointError("the model's logits are not finite: its weights are damaged or have diverged")
    return [
        (row_ids[:n], done, row_logps[:n])
        for row_ids, n, done, row_logps in zip(ids.tolist(), length.tolist(), finished.tolist(), logps.tolist())
    ]


def _check_sampling(
    config: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    batch_size: int,
) -> None:
    for name, value, good, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        # far below 0.001 the divided logits would overflow fp32
        ("temperature", temperature, temperature == 0 or 1e-3 <= temperature < float("inf"), "0 (greedy) or >= 0.001"),
        ("top_k", top_k, top_k >= 0, "0 (all) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
    ):
        if not good:
            raise ValueError(f"{name} = {value!r}: expected {expected}")
    limit = config.max_position_embeddings - max_new_tokens
    for row, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= limit:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens: expected 1 to {limit} "
                f"(max_position_embeddings {config.max_position_embeddings} - max_new_tokens {max_new_tokens})"
            )
