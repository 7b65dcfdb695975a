"""Batched sampling of responses: ragged prompts in, token ids and their log-probabilities out.

Needs torch only; copy this file alone into another code base. Works with any model that has the interface of
model.GPTNeo: `model(input_ids, update_cache=...)`, `model.decode(tokens, positions, masks, update_cache)`,
`model.logits(hidden)` (in fp32, because near logits tie in 16 bits), `model.head_weight` and `model.config`.

Every active row has a slot of a preallocated cache. When a row finishes, the next prompt takes its slot immediately, so
the batch stays full until no prompt is waiting; then it shrinks. All tensors of a step stay at fixed addresses. On CUDA
a step is therefore captured as a graph, and the host checks for finished rows only every STEPS_PER_CHECK steps.

Legend: B slots, n of them, S tokens per slot, P longest prompt, M maximum of new tokens, V vocabulary, G key/value
heads, K head size.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

STEPS_PER_CHECK = 16  # on CUDA: steps between two checks for finished rows, each of which waits for the GPU
READ_MULTIPLE = 64  # attention reads the cache up to the longest row, rounded up to a multiple of this
REFILL_SHARE = 1 / 16  # prompts are admitted when this share of the slots is idle: one large prefill is cheaper
SHRINK_SHARE = 2 / 3  # once no prompt is waiting, idle slots are dropped when at most this share is active
PREFILL_TOKENS = 2**14  # upper bound on the padded prompt tokens of one forward pass: bounds its activations
DRAW_BLOCK = 256  # tokens per block of the two-step search in `draw`


class Responses(NamedTuple):
    """The result of `respond`: one entry per prompt, in the order of the prompts."""

    ids: list[list[int]]  # the drawn tokens, including the end-of-sequence token if it was drawn
    finished: list[bool]  # whether the end-of-sequence token was drawn within the length limit
    logps: list[list[float]]  # nats: log-probability of each drawn token, before temperature, top-k and top-p


@torch.no_grad()
def respond(
    model: nn.Module,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    batch_size: int = 64,
    cache_tokens: int = 2**17,
    progress: Callable[[int, int], None] | None = None,
) -> Responses:
    """Samples one response to every prompt, with the model in evaluation mode.

    Args:
        prompts: token ids, each prompt of 1 to max_position_embeddings - max_new_tokens tokens.
        eos_token_id: a response ends after this token, or any of these. If None, it has max_new_tokens tokens.
        temperature: divides the logits; 0 means greedy decoding. Other values below 0.001 may overflow fp32.
        top_k: draw from the k likeliest tokens only; 0 means all tokens.
        top_p: draw from the fewest likeliest tokens whose total probability reaches top_p; 1 means all tokens.
        seed, rows: the randomness of a token depends only on the seed, the number of its row and its position in the
            row, not on other rows, batch size or process. `rows` are the prompts' numbers, 0, 1, 2, ... by default.
        batch_size: upper bound on the number of active rows.
        cache_tokens: upper bound on the tokens that the cache can hold, which bounds the batch, too; at least one row.
        progress: called at least every STEPS_PER_CHECK steps with the numbers of rows that finished since the last call
            and of their new tokens.

    Raises: ValueError naming the prompt that is empty or too long; FloatingPointError if logits are not finite.
    """
    limit = model.config.max_position_embeddings - max_new_tokens
    for row, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= limit:
            expected = f"1 to max_position_embeddings - max_new_tokens = {limit}"
            raise ValueError(f"prompt {row} has {len(prompt)} tokens, expected {expected}")
    if not prompts:
        return Responses([], [], [])
    capacity = max(map(len, prompts)) + max_new_tokens
    size = min(batch_size, len(prompts), max(1, cache_tokens // capacity))
    was_training = model.training
    model.eval()
    try:
        with torch.cuda.device_of(model.head_weight):  # graphs are captured on the current device
            sampler = Sampler(temperature, top_k, top_p)
            batch = Batch(model, size, capacity, max_new_tokens, eos_token_id, sampler, seed)
            return _respond_all(batch, prompts, rows or range(len(prompts)), progress)
    finally:
        model.train(was_training)


def _respond_all(
    batch: "Batch",
    prompts: Sequence[list[int]],
    numbers: Sequence[int],
    progress: Callable[[int, int], None] | None,
) -> Responses:
    """Passes all prompts through the batch. `numbers` are their row numbers, see `respond`."""
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # popped from the end: longest prompt first
    results: list[Any] = [None] * len(prompts)
    while waiting or batch.active_rows:
        admitted = [waiting.pop() for _ in range(min(len(waiting), batch.size - batch.active_rows))]
        while admitted:
            count = max(1, PREFILL_TOKENS // len(prompts[admitted[0]]))  # the first prompt is the longest
            group, admitted = admitted[:count], admitted[count:]
            batch.admit(group, [prompts[i] for i in group], [numbers[i] for i in group])
        batch.run(math.ceil(batch.size * (REFILL_SHARE if waiting else 1 - SHRINK_SHARE)), progress)
        finished = batch.collect()
        for i, result in finished:
            results[i] = result
        if progress is not None:
            progress(len(finished), sum(len(ids) for _, (ids, _, _) in finished))
        if not waiting:
            batch.shrink()
    return Responses(*map(list, zip(*results)))


# ---- drawing a token ----


def uniforms(seed: int, rows: Sequence[int], count: int) -> Tensor:
    """(n, count) fp64 in [0, 1): number i of row r is a hash of (seed, r, i). 53 bits reach every token of a long tail.

    The hash is SplitMix64 (Steele, Lea and Flood, 2014) of a counter that starts at a random value for each row.
    """
    starts = [hashlib.sha256(f"{seed}/{row}".encode()).digest()[:8] for row in rows]
    x = torch.tensor([int.from_bytes(start, "big", signed=True) for start in starts])[:, None]
    golden_gamma = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number; int64 wraps around
    x = x + torch.arange(1, count + 1) * golden_gamma
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor  # the mask makes it an unsigned shift
    x = x ^ ((x >> 31) & (2**33 - 1))
    return ((x >> 11) & (2**53 - 1)).double() / 2**53


class Sampler(NamedTuple):
    """Selects the next tokens: the likeliest at temperature 0, otherwise a draw from the filtered distribution."""

    temperature: float
    top_k: int
    top_p: float

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Selects one token per row, from logits (n, V) fp32 and random numbers (n,) fp64 in [0, 1).

        Returns: tokens (n,) int64 and their log-probabilities (n,) fp32, in nats, under `logits` before the filters.
        """
        if self.temperature == 0:
            token = logits.argmax(1)
        else:
            token = draw(filter_logits(logits, self.temperature, self.top_k, self.top_p), uniform)
        return token, logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(1)


def filter_logits(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Applies temperature > 0, then top-k, then top-p, as in `respond` and in the order of transformers.

    Takes logits (n, V) of any float dtype; returns (n, V), -inf where a token is excluded.
    """
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1, dtype=torch.float64)  # in fp32, sums on a GPU vary between two calls
        before = p.cumsum(-1) - p  # probability of all likelier tokens
        excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, before >= top_p)
        logits = logits.masked_fill(excluded, -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draws one token per row by inversion: the first whose cumulative probability exceeds the row's uniform number.

    First finds a block of DRAW_BLOCK tokens and then the token in it, so that only the sums of the blocks and one block
    are cumulated. They are cumulated in fp64, because V = 50257 roundings in fp32 would bias the tail. A token of
    probability 0 is never drawn.

    Takes logits (n, V) fp32 and uniform numbers (n,) fp64 in [0, 1); returns (n,) int64.
    """
    n, V = logits.shape
    p = logits.new_zeros(n, -(-V // DRAW_BLOCK) * DRAW_BLOCK)
    torch.exp(logits - logits.amax(1, keepdim=True), out=p[:, :V])
    p = p.view(n, -1, DRAW_BLOCK)
    block, within = _invert(p.sum(2), uniform)
    index = block[:, None, None].expand(-1, 1, DRAW_BLOCK)
    token, _ = _invert(p.gather(1, index)[:, 0], within)
    return (block * DRAW_BLOCK + token).clamp(max=V - 1)  # with NaN logits, the index is past the end


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the entry of each row of weights (n, W) in which the fraction `uniform`, (n,), of the row's total falls.

    Returns: the entry (n,) int64, and the position inside the entry (n,) fp64 in [0, 1).
    """
    cumulated = weights.double().cumsum(1)
    goal = uniform * cumulated[:, -1]
    # With NaN weights, searchsorted returns W.
    entry = torch.searchsorted(cumulated, goal[:, None], right=True).clamp(max=weights.shape[1] - 1)
    width = weights.gather(1, entry)[:, 0].double()
    below = cumulated.gather(1, entry)[:, 0] - width
    return entry[:, 0], ((goal - below) / width).clamp(0, 1 - 2**-53)


# ---- active rows ----


class KVCache:
    """Keys and values of every row, (B, G, S, K) for each layer.

    A local layer holds at most window_size tokens per row, as a ring buffer: a new token overwrites the one that has
    left its window. The order of the entries does not matter to attention.

    Args:
        model: the model whose keys and values are cached; the cache has the dtype of its activations.
        size: B, the number of rows.
        capacity: S of a global layer, the most tokens per row.
    """

    def __init__(self, model: nn.Module, size: int, capacity: int) -> None:
        config, device = model.config, model.head_weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else model.head_weight.dtype
        G, K = config.num_key_value_heads, config.head_dim
        self.window = config.window_size
        self.capacity = capacity
        lengths = [min(capacity, self.window) if kind == "local" else capacity for kind in config.attention_layers]
        # Zeros, because an empty entry has weight 0 in attention, but 0 * nan would be nan.
        self.keys = [torch.zeros(size, G, S, K, dtype=dtype, device=device) for S in lengths]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.lengths = torch.zeros(size, dtype=torch.long, device=device)  # tokens of each row so far
        self.rows = torch.arange(size, device=device)
        self.read_length = capacity  # the number of entries that attention reads; no row may be longer

    def fill(self, rows: Tensor, lengths: Tensor, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's keys and values of new prompts in `rows` (n,). The caller sets self.lengths[rows].

        Takes the prompts' numbers of tokens, (n,) int64, and k and v, (n, G, P, K), padded on the right. Returns k and
        v, to which the prompts' own tokens attend.
        """
        P = k.shape[2]
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            S = stored.shape[2]
            if P > S:  # store the last S tokens of each row: entry s is the last token with position = s modulo S
                last = lengths[:, None] - 1
                position = (last - (last - torch.arange(S, device=k.device)) % S).clamp(min=0)  # (n, S)
                new = new.gather(2, position[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
            stored[rows, :, : new.shape[2]] = new.to(stored.dtype)
        return k, v

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's key and value of one new token per row, k and v (B, G, 1, K).

        Returns: all keys and values that attention reads, (B, G, S, K); S is read_length, or less in local layers.
        """
        keys, values = self.keys[layer], self.values[layer]
        entry = self.lengths % keys.shape[2]
        keys[self.rows, :, entry] = k[:, :, 0]
        values[self.rows, :, entry] = v[:, :, 0]
        return keys[:, :, : self.read_length], values[:, :, : self.read_length]

    def masks(self) -> dict[str, Tensor]:
        """For each kind of layer the entries that the new token sees: (B, 1, 1, S) bool, S as in `append`."""
        seen = (torch.arange(self.read_length, device=self.lengths.device) <= self.lengths[:, None])[:, None, None]
        return {"global": seen, "local": seen[..., : self.window]}

    def keep_rows(self, rows: Tensor) -> None:
        """Drops all rows except `rows` (n,) int64."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.lengths = self.lengths[rows]
        self.rows = self.rows[: len(rows)]


class Batch:
    """The rows that are generated together, one per slot of the cache. A slot without a row is idle.

    Args:
        size: B, the number of slots.
        capacity: the most tokens of a row, including its prompt.
        max_new_tokens: M.
        eos: the token or tokens that end a response; None if there is none.
        seed: see `respond`.
    """

    def __init__(
        self, model: nn.Module, size: int, capacity: int, max_new_tokens: int,
        eos: int | Sequence[int] | None, sampler: Sampler, seed: int,
    ) -> None:  # fmt: skip
        device = model.head_weight.device
        self.model = model
        self.cache = KVCache(model, size, capacity)
        self.sampler = sampler
        self.seed = seed
        ends = [eos] if isinstance(eos, int) else list(eos or [])
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.prompt_of_slot: list[int | None] = [None] * size  # the index of its prompt, or None if the slot is idle
        self.longest = 0  # upper bound on the tokens of an active row
        self.tokens = torch.zeros(size, dtype=torch.long, device=device)  # last token of each row: the next input
        self.active = torch.zeros(size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(size, dtype=torch.long, device=device)  # new tokens of each row so far
        self.ids = torch.zeros(size, max_new_tokens, dtype=torch.long, device=device)
        self.logps = torch.zeros(size, max_new_tokens, device=device)
        self.uniform = torch.zeros(size, max_new_tokens, dtype=torch.float64, device=device)
        self.graphs: dict[int, Any] = {}  # captured steps, by read_length
        if self.tokens.is_cuda:  # graphs never run at the same time, so they can share their scratch memory
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(device)

    @property
    def size(self) -> int:
        """B, the number of slots."""
        return len(self.prompt_of_slot)

    @property
    def active_rows(self) -> int:
        """The number of slots with a row."""
        return self.size - self.prompt_of_slot.count(None)

    def admit(self, indices: list[int], prompts: list[list[int]], numbers: list[int]) -> None:
        """Assigns prompts to idle slots, runs the model on all of them at once and draws their first tokens.

        `collect` returns a prompt's index with its response; its row number determines its random numbers.
        """
        device, width = self.tokens.device, max(map(len, prompts))
        slots = [slot for slot, prompt in enumerate(self.prompt_of_slot) if prompt is None][: len(indices)]
        for slot, index in zip(slots, indices, strict=True):
            self.prompt_of_slot[slot] = index
        rows = torch.tensor(slots, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        input_ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)  # (n, P)
        hidden = self.model(input_ids, update_cache=partial(self.cache.fill, rows, lengths))
        self.cache.lengths[rows] = lengths
        self.uniform[rows] = uniforms(self.seed, numbers, self.ids.shape[1]).to(device)
        self.counts[rows] = 0
        self.active[rows] = True
        self._draw_next(hidden[torch.arange(len(prompts), device=device), lengths - 1], rows)
        self.longest = max(self.longest, width)

    def run(self, count: int, progress: Callable[[int, int], None] | None) -> None:
        """Runs steps until at least `count` rows, or all, have finished."""
        remaining = max(0, self.active_rows - count)
        while int(self.active.sum()) > remaining:
            for _ in range(STEPS_PER_CHECK if self.tokens.is_cuda else 1):
                read_length = (self.longest // READ_MULTIPLE + 1) * READ_MULTIPLE
                self.cache.read_length = min(self.cache.capacity, read_length)
                self._advance()
                self.longest += 1
            if progress is not None:
                progress(0, 0)

    def _advance(self) -> None:
        """Runs one step, on CUDA by replaying its graph."""
        graph = self.graphs.get(self.cache.read_length)
        if graph is not None:
            graph.replay()
            return
        self._step()
        if self.tokens.is_cuda:  # the step above was the warm-up; capturing records a step without running it
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads, such as NCCL's watchdog, may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                self._step()
            self.graphs[self.cache.read_length] = graph

    def _step(self) -> None:
        """Computes one token for every row. For finished rows, it changes nothing that is read later."""
        hidden = self.model.decode(self.tokens, self.cache.lengths, self.cache.masks(), self.cache.append)
        self.cache.lengths += self.active
        self._draw_next(hidden, self.cache.rows)

    def _draw_next(self, hidden: Tensor, rows: Tensor) -> None:
        """Draws and records the next tokens of `rows` (n,) from their last hidden states (n, D)."""
        active, count = self.active[rows], self.counts[rows]
        column = count.clamp(max=self.ids.shape[1] - 1)  # clamped for full rows, which are not active
        token, logp = self.sampler(self.model.logits(hidden).float(), self.uniform[rows, column])
        self.tokens[rows] = token
        self.ids[rows, column] = torch.where(active, token, self.ids[rows, column])
        self.logps[rows, column] = torch.where(active, logp, self.logps[rows, column])
        self.counts[rows] = count + active
        ended = (token[:, None] == self.ends).any(1)
        self.active[rows] = active & ~ended & (count + 1 < self.ids.shape[1])

    def collect(self) -> list[tuple[int, tuple[list[int], bool, list[float]]]]:
        """Removes finished rows and returns (prompt index, (ids, finished, logps)) of each; see Responses.

        Raises: FloatingPointError if a log-probability is not finite.
        """
        active = self.active.tolist()
        slots = [slot for slot, prompt in enumerate(self.prompt_of_slot) if prompt is not None and not active[slot]]
        rows = torch.tensor(slots, dtype=torch.long, device=self.tokens.device)
        columns = (self.ids[rows].tolist(), self.logps[rows].tolist(), self.counts[rows].tolist())
        responses, ends = [], set(self.ends.tolist())
        for slot, ids, logps, count in zip(slots, *columns, strict=True):
            if not all(map(math.isfinite, logps[:count])):
                raise FloatingPointError("the model's logits are not finite: its weights are damaged or have diverged")
            responses.append((self.prompt_of_slot[slot], (ids[:count], ids[count - 1] in ends, logps[:count])))
            self.prompt_of_slot[slot] = None
        self.longest = int((self.cache.lengths * self.active).max())
        return responses

    def shrink(self) -> None:
        """Drops the idle slots if at most SHRINK_SHARE of all slots is active."""
        if 0 < self.active_rows <= SHRINK_SHARE * self.size:
            slots = [slot for slot, prompt in enumerate(self.prompt_of_slot) if prompt is not None]
            self.prompt_of_slot = [self.prompt_of_slot[slot] for slot in slots]
            rows = torch.tensor(slots, dtype=torch.long, device=self.tokens.device)
            self.cache.keep_rows(rows)
            for name in ("tokens", "active", "counts", "ids", "logps", "uniform"):
                setattr(self, name, getattr(self, name)[rows])
            self.graphs.clear()  # they refer to the old tensors
            if self.tokens.is_cuda:
                # Before torch 2.12 a capture into the old pool would fail an assertion: no graph uses it now, but
                # cuBLAS's workspace keeps a block of it alive (pytorch #175276).
                self.pool = torch.cuda.graph_pool_handle()
