"""Batched generation: ragged prompts in, sampled ids and their log-probabilities out.

Needs torch only. Works with any model that offers what model.GPTNeo does: `model(input_ids, remember=...)`,
`model.decode(tokens, positions, masks, remember)`, `model.logits(hidden)`, `model.head_weight` and `model.config`.

Every row at work has a slot of a preallocated cache. Where a row has finished, the next prompt takes its slot at once,
so the batch stays full until no prompt waits; then it shrinks. All that a step needs lies in tensors whose places do
not change. On CUDA a step is therefore captured as a graph, and the host looks at the outcome every LOOK steps only.

Shapes: B slots, n of them, S tokens a slot, P longest prompt, M new tokens at most, V vocabulary, H heads, K head size.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LOOK = 16  # steps on CUDA between looks at which rows have finished: each look waits for the GPU
REACH = 64  # attention reads the cache as far as the longest row goes, rounded up to a multiple of this
REFILL = 1 / 16  # of the slots idle: then prompts take them, together, which is cheaper than each by itself
SHRINK = 2 / 3  # when no prompt waits and no more than this share of the slots is at work, the others are dropped
PREFILL_TOKENS = 2**14  # prompts that go through the model together, at most: bounds its activations
SEARCHED = 256  # probabilities are summed in blocks of this many before one is searched for


class Samples(NamedTuple):
    """What `generate` returns, one entry a prompt, in the order of the prompts."""

    ids: list[list[int]]  # the sampled tokens, the end-of-sequence token included when it was sampled
    finished: list[bool]  # whether the end-of-sequence token was sampled within the length limit
    logps: list[list[float]]  # nats: log-probability of each sampled token, before temperature, top-k and top-p


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    batch_size: int = 64,
    cache_tokens: int = 2**17,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Samples one continuation of every prompt.

    Args:
        prompts: token ids, each of at least one token; at most max_position_embeddings - max_new_tokens long.
        temperature: logits are divided by it; 0 means greedy, where nothing is random.
        top_k: sample among the k likeliest tokens only; 0: all.
        top_p: sample among the fewest likeliest tokens whose probabilities reach top_p; 1: all.
        seed, rows: a token's randomness comes from the seed, its row's number and its position in the row alone: not
            from batch mates, the batch size or the process that works on the row. `rows` are the numbers of the
            prompts' rows; None: 0, 1, 2, ...
        batch_size: rows at work at a time, at most.
        cache_tokens: tokens that the cache has room for, at most, but one row's at least: bounds the batch too.
        progress: called every LOOK steps at least, with numbers of rows that have finished since the last call, and of
            their new tokens. What it raises ends the generation.

    Raises: ValueError naming the argument or the prompt that is at fault; FloatingPointError where logits are NaN.
    """
    _check(model.config, prompts, max_new_tokens, temperature, top_k, top_p, batch_size, cache_tokens)
    if not prompts:
        return Samples([], [], [])
    room = max(map(len, prompts)) + max_new_tokens
    size = min(batch_size, len(prompts), max(1, cache_tokens // room))
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # taken from the end, the longest first
    results: list[Any] = [None] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with torch.cuda.device_of(model.head_weight):  # graphs are captured on the current device
            batch = Batch(model, size, room, max_new_tokens, eos_token_id, Choice(temperature, top_k, top_p))
            while waiting or batch.running:
                admitted = [waiting.pop() for _ in range(min(len(waiting), size - batch.running))]
                for some in _cut(admitted, prompts):
                    numbers = some if rows is None else [rows[i] for i in some]
                    batch.admit(some, [prompts[i] for i in some], uniforms(seed, numbers, max_new_tokens))
                batch.run(math.ceil(size * (REFILL if waiting else 1 - SHRINK)), progress)
                done = batch.collect()
                for i, result in done:
                    results[i] = result
                if progress is not None:
                    progress(len(done), sum(len(ids) for _, (ids, _, _) in done))
                if not waiting:
                    size = batch.shrink()
    finally:
        model.train(was_training)
    return Samples(*map(list, zip(*results)))


def _cut(indices: list[int], prompts: Sequence[list[int]]) -> Iterator[list[int]]:
    """Runs of `indices`, longest prompt first, of no more than PREFILL_TOKENS padded tokens (one prompt at least)."""
    while indices:
        count = max(1, PREFILL_TOKENS // len(prompts[indices[0]]))
        yield indices[:count]
        indices = indices[count:]


def _check(
    config: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    batch_size: int,
    cache_tokens: int,
) -> None:
    for name, value, good, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        # far below 0.001 the divided logits would overflow fp32
        ("temperature", temperature, temperature == 0 or 1e-3 <= temperature < float("inf"), "0 (greedy) or >= 0.001"),
        ("top_k", top_k, top_k >= 0, "0 (all) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ("cache_tokens", cache_tokens, cache_tokens >= 1, "at least 1"),
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


# ---- choosing a token ----


def uniforms(seed: int, rows: Sequence[int], count: int) -> Tensor:
    """(n, count) fp32 in [0, 1): number i of row r is a hash of (seed, r, i).

    The hash is SplitMix64's (Steele, Lea and Flood, 2014), of a counter that starts at a random place for each row.
    """
    starts = [hashlib.sha256(f"{seed}/{row}".encode()).digest()[:8] for row in rows]
    x = torch.tensor([int.from_bytes(start, "big", signed=True) for start in starts])[:, None]
    x = (
        x + torch.arange(1, count + 1) * -0x61C8864680B583EB
    )  # int64 wraps around; 2^64 / golden ratio, as a signed number
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor  # the mask makes it a shift without sign
    x = x ^ ((x >> 31) & (2**33 - 1))
    return ((x >> 40) & (2**24 - 1)).float() / 2**24


class Choice(NamedTuple):
    """How the next token is chosen."""

    temperature: float
    top_k: int
    top_p: float

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """logits (n, V) fp32, uniform (n,) -> tokens (n,), their log-probabilities (n,) under the logits as given."""
        if self.temperature == 0:
            token = logits.argmax(1)
        else:
            token = sample(filter_logits(logits, self.temperature, self.top_k, self.top_p), uniform)
        return token, logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(1)


def filter_logits(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Temperature, then top-k, then top-p, as transformers orders them: (n, V) -> (n, V), -inf where excluded."""
    if temperature != 1:
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
    """One draw a row by inversion: the first token whose cumulative probability exceeds uniform (n,) in [0, 1).

    Found in two steps, a block of SEARCHED tokens and the token in it, so that only sums of blocks and one block are
    cumulated, in fp64: V = 50257 roundings of fp32 would bias the tail. Probability 0 is never drawn.
    """
    n, V = logits.shape
    p = logits.new_zeros(n, -(-V // SEARCHED) * SEARCHED)
    torch.exp(logits - logits.amax(1, keepdim=True), out=p[:, :V])
    p = p.view(n, -1, SEARCHED)
    block, within = _invert(p.sum(2), uniform.double())
    index = block[:, None, None].expand(-1, 1, SEARCHED)
    token, _ = _invert(p.gather(1, index)[:, 0], within)
    return (block * SEARCHED + token).clamp(max=V - 1)  # NaN logits: past the end


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(n, W), uniform (n,) fp64 -> the entry in which uniform * total falls (n,), and where in it, in [0, 1)."""
    cumulated = weights.double().cumsum(1)
    goal = uniform * cumulated[:, -1]
    entry = torch.searchsorted(cumulated, goal[:, None], right=True).clamp(max=weights.shape[1] - 1)  # NaN: W
    width = weights.gather(1, entry)[:, 0].double()
    below = cumulated.gather(1, entry)[:, 0] - width
    return entry[:, 0], ((goal - below) / width).clamp(0, 1 - 2**-53)


# ---- rows at work ----


class KVCache:
    """Keys and values, for each layer (B, H, S, K) each. A local layer has no more than window_size places a row, and
    a token takes the place of the one that its window leaves behind; attention does not mind the order of places."""

    def __init__(self, model: nn.Module, size: int, room: int) -> None:
        config, device = model.config, model.head_weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else model.head_weight.dtype
        K = config.hidden_size // config.num_heads
        places = [min(room, config.window_size) if kind == "local" else room for kind in config.attention_layers]
        # zeros: a place not filled yet has weight 0 in attention, but 0 times a nan would be a nan
        self.keys, self.values = (
            [torch.zeros(size, config.num_heads, S, K, dtype=dtype, device=device) for S in places] for _ in range(2)
        )
        self.window, self.room = config.window_size, room
        self.lengths = torch.zeros(size, dtype=torch.long, device=device)  # tokens that each row has had
        self.rows = torch.arange(size, device=device)
        self.reach = room  # no row goes further

    def fill(self, rows: Tensor, lengths: Tensor, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps what `rows` (n,) remember of prompts of `lengths` (n,): k, v (n, H, P, K), padded on the right."""
        P = k.shape[2]
        for kept, new in ((self.keys[layer], k), (self.values[layer], v)):
            S = kept.shape[2]
            if P > S:  # the last S tokens of each row: place s has the last token whose position is s modulo S
                last = lengths[:, None] - 1
                position = (last - (last - torch.arange(S, device=k.device)) % S).clamp(min=0)  # (n, S)
                new = new.gather(2, position[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
            kept[rows, :, : new.shape[2]] = new.to(kept.dtype)
        return k, v

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps one token a row, k, v (B, H, 1, K); returns all that attention may reach, (B, H, <= S, K)."""
        keys, values = self.keys[layer], self.values[layer]
        place = self.lengths % keys.shape[2]
        keys[self.rows, :, place], values[self.rows, :, place] = k[:, :, 0], v[:, :, 0]
        return keys[:, :, : self.reach], values[:, :, : self.reach]

    def masks(self) -> dict[str, Tensor]:
        """(B, 1, 1, reach) for each kind of layer: True for the tokens so far, the new one included."""
        seen = (torch.arange(self.reach, device=self.lengths.device) <= self.lengths[:, None])[:, None, None]
        return {"global": seen, "local": seen[..., : self.window]}

    def keep(self, rows: Tensor) -> None:
        """Drops every row but `rows` (n,)."""
        self.keys, self.values = ([layer[rows] for layer in side] for side in (self.keys, self.values))
        self.lengths, self.rows = self.lengths[rows], self.rows[: len(rows)]


class Batch:
    """Rows at work, one a slot of the cache; a slot whose row has finished idles until it is given another."""

    def __init__(self, model: nn.Module, size: int, room: int, M: int, eos: int | None, choice: Choice) -> None:
        device = model.head_weight.device
        self.model, self.cache, self.choice = model, KVCache(model, size, room), choice
        self.eos = -1 if eos is None else eos
        self.owner: list[int | None] = [None] * size  # the prompt that each slot works on
        self.longest = 0  # tokens of the longest row at work, at most
        self.tokens = torch.zeros(size, dtype=torch.long, device=device)  # the last of each row: the next input
        self.active = torch.zeros(size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(size, dtype=torch.long, device=device)  # new tokens so far
        self.ids = torch.zeros(size, M, dtype=torch.long, device=device)
        self.logps, self.uniform = torch.zeros(2, size, M, device=device)
        self.graphs: dict[int, Any] = {}  # by reach
        if self.tokens.is_cuda:  # graphs run one after the other, so they can share their scratch memory
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    @property
    def running(self) -> int:
        return len(self.owner) - self.owner.count(None)

    def admit(self, owners: list[int], prompts: list[list[int]], uniform: Tensor) -> None:
        """Gives prompts to idle slots, passes them through the model at once, and chooses their first tokens."""
        device, width = self.tokens.device, max(map(len, prompts))
        slots = [slot for slot, owner in enumerate(self.owner) if owner is None][: len(owners)]
        for slot, owner in zip(slots, owners, strict=True):
            self.owner[slot] = owner
        rows = torch.tensor(slots, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        input_ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)  # (n, P)
        hidden = self.model(input_ids, remember=partial(self.cache.fill, rows, lengths))
        self.cache.lengths[rows], self.uniform[rows] = lengths, uniform.to(device)
        self.counts[rows], self.active[rows] = 0, True
        self._take(hidden[torch.arange(len(prompts), device=device), lengths - 1], rows)
        self.longest = max(self.longest, width)

    def run(self, count: int, progress: Callable[[int, int], None] | None) -> None:
        """Steps until at least `count` rows have finished, or all."""
        left = max(0, self.running - count)
        while int(self.active.sum()) > left:
            for _ in range(LOOK if self.tokens.is_cuda else 1):
                self.cache.reach = min(self.cache.room, (self.longest // REACH + 1) * REACH)
                self._advance()
                self.longest += 1
            if progress is not None:
                progress(0, 0)

    def _advance(self) -> None:
        """One step, on CUDA by a graph of it."""
        graph = self.graphs.get(self.cache.reach)
        if graph is not None:
            graph.replay()
            return
        self._step()
        if self.tokens.is_cuda:  # that was the warm-up; capturing does nothing but record
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self._step()
            self.graphs[self.cache.reach] = graph

    def _step(self) -> None:
        """One token for every row; of rows that have finished, nothing is changed that will be read."""
        hidden = self.model.decode(self.tokens, self.cache.lengths, self.cache.masks(), self.cache.append)
        self.cache.lengths += self.active
        self._take(hidden, self.cache.rows)

    def _take(self, hidden: Tensor, rows: Tensor) -> None:
        """Chooses the next tokens of `rows` (n,) from their last hidden states (n, D), and books them."""
        active, count = self.active[rows], self.counts[rows]
        place = count.clamp(max=self.ids.shape[1] - 1)  # of a row that is full, and so not active
        token, logp = self.choice(self.model.logits(hidden).float(), self.uniform[rows, place])
        self.tokens[rows] = token
        self.ids[rows, place] = torch.where(active, token, self.ids[rows, place])
        self.logps[rows, place] = torch.where(active, logp, self.logps[rows, place])
        self.counts[rows] = count + active
        self.active[rows] = active & (token != self.eos) & (count + 1 < self.ids.shape[1])

    def collect(self) -> list[tuple[int, tuple[list[int], bool, list[float]]]]:
        """(prompt, (ids, finished, logps)) of the rows that have finished; their slots are idle then."""
        active = self.active.tolist()
        slots = [slot for slot, owner in enumerate(self.owner) if owner is not None and not active[slot]]
        rows = torch.tensor(slots, dtype=torch.long, device=self.tokens.device)
        columns = (self.ids[rows].tolist(), self.logps[rows].tolist(), self.counts[rows].tolist())
        done = []
        for slot, ids, logps, count in zip(slots, *columns, strict=True):
            if not all(map(math.isfinite, logps[:count])):
                raise FloatingPointError("the model's logits are not finite: its weights are damaged or have diverged")
            done.append((self.owner[slot], (ids[:count], ids[count - 1] == self.eos, logps[:count])))
            self.owner[slot] = None
        self.longest = int((self.cache.lengths * self.active).max())
        return done

    def shrink(self) -> int:
        """Drops idle slots where they are many; returns how many slots there are."""
        if 0 < self.running <= SHRINK * len(self.owner):
            slots = [slot for slot, owner in enumerate(self.owner) if owner is not None]
            self.owner = [self.owner[slot] for slot in slots]
            rows = torch.tensor(slots, dtype=torch.long, device=self.tokens.device)
            self.cache.keep(rows)
            for name in ("tokens", "active", "counts", "ids", "logps", "uniform"):
                setattr(self, name, getattr(self, name)[rows])
            self.graphs.clear()  # they work on the old tensors
        return len(self.owner)
