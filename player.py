"""A player: a language model that writes responses and tells how likely it finds given ones.

Any object with these members can play SPIN: `model`, an nn.Module whose parameters with requires_grad are trained;
`respond`, `response_logps` and `logps`, as below; `micro_batches`, which cuts a batch to fit the memory. With
`logps_by_token` and `respond(with_logps=True)` the report page shows how likely each token of a response was.

Shapes: B items of R responses each, packed into rows of T tokens; D hidden size; N response tokens of all rows.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sampling
from kernels import linear_logprobs, onednn
from model import GPTNeo

MASKED_TOKENS = 1024  # longer rows compute the prompt once a response: a (T, T) mask would cost more than it saves

# The ids of a prompt and of one or more responses to it, which include their end-of-sequence tokens.
Item = tuple[list[int], ...]


class Player:
    """GPT-Neo, with or without LoRA, as a player.

    Args:
        model: its trained parameters are fp32; frozen ones may be bf16.
        eos_token_id: ends a response.
        args: options that bound lengths and memory: max_new_tokens, gen_batch, gen_tokens, micro_tokens.
        dtype: of matrix products. In bf16, training and scoring use autocast, generation casts the weights.
    """

    # Both work on CUDA only, and wait for a measurement there: see benchmarks/README.md.
    decode_kernel = False  # generate with kernels/triton_attention.py: each row reads its own length of the cache
    # Score and train in bf16 on one row without padding or masks, by torch's variable-length attention, which has no
    # dropout: the config's attention_dropout is left out.
    packed = False

    def __init__(self, model: GPTNeo, eos_token_id: int, args: Any, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.eos_token_id = eos_token_id
        self.args = args
        self.dtype = dtype
        self.device = model.head_weight.device
        self.micro_tokens = args.micro_tokens or (8192 if self.device.type == "cuda" else 2048)

    # ------------------------------------------------------------ writing

    @onednn.products()
    def respond(
        self,
        prompts: Sequence[list[int]],
        seed: int,
        *,
        rows: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        with_logps: bool = False,
    ) -> list[tuple]:
        """One response to each prompt: (ids, whether it ended by itself). Arguments as in sampling.respond.

        `with_logps` adds the log-probability of every token, in nats, before temperature and filters.

        Raises: FloatingPointError where logits are not finite.
        """
        attend = None
        if self.decode_kernel:
            from kernels.triton_attention import decode_attention as attend  # imports triton
        with self._weights_in_dtype():
            responses = sampling.respond(
                self.model,
                prompts,
                max_new_tokens=max_new_tokens or self.args.max_new_tokens,
                eos_token_id=self.eos_token_id,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                rows=rows,
                batch_size=self.args.gen_batch,
                cache_tokens=self.args.gen_tokens,
                progress=progress,
                attend=attend,
            )
        columns = responses if with_logps else responses[:2]
        return list(zip(*columns))

    @contextlib.contextmanager
    def _weights_in_dtype(self) -> Iterator[None]:
        """Casts the weights for a while. Under autocast they would be cast anew in every step of generation.

        In bf16 this rounds the residual stream too. Training and scoring keep it in fp32 when all parameters are
        trained; with LoRA the frozen embedding is bf16 already, and so is the stream.
        """
        originals = [(p, p.data) for p in self.model.parameters() if p.dtype != self.dtype]
        for parameter, data in originals:
            parameter.data = data.to(self.dtype)
        try:
            yield
        finally:
            for parameter, data in originals:
                parameter.data = data

    # ------------------------------------------------------------ log-probabilities

    @onednn.products()
    def response_logps(self, items: Sequence[Item], temperature: float = 1.0) -> Tensor:
        """log p(response | prompt) of every response: (R, B) fp32, nats, summed over the response's tokens.

        At another temperature than 1, p is what `respond` samples from at that temperature.

        The one code path of scoring and training, differentiable. All responses to a prompt follow it in one row, as
        segments that do not see each other, so the prompt is computed once. Lengths decide which positions count,
        never a token's id. Only the hidden states that predict a response token go through the head.
        """
        R = len(items[0]) - 1
        if R > 1 and max(sum(map(len, item)) for item in items) - R > MASKED_TOKENS and not self.packed:
            apart = [[(item[0], item[n]) for item in items] for n in range(1, R + 1)]
            return torch.cat([self.response_logps(some, temperature) for some in apart])
        return self.token_logps(items, temperature).sum(2)

    def token_logps(self, items: Sequence[Item], temperature: float = 1.0) -> Tensor:
        """log p of every token of the responses: (R, B, longest) fp32, nats; 0 behind the end of a response."""
        # A response's last token is no input: nothing behind it is predicted.
        rows = [prompt + [t for response in responses for t in response[:-1]] for prompt, *responses in items]
        width = max(map(len, rows))
        R = len(items[0]) - 1
        if self.packed:
            rows, width = [[token for row in rows for token in row]], 0
            layout = self._packed_layout(items)
        elif R > 1:
            layout = {"segments": self._tensor(segments_of(items, width))}
        else:
            layout = {}  # one response: plain causal attention
        input_ids = self._tensor([ids + [0] * (width - len(ids)) for ids in rows])  # (B, T), or (1, all tokens)
        sources, targets, slots, longest = head_rows(items, width)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden = self.model(input_ids, **layout).flatten(0, 1)[self._tensor(sources)]  # (N, D)
            hidden = hidden if temperature == 1 else hidden / temperature  # logits are linear in it
            logps = linear_logprobs(
                hidden, self.model.head_weight, self._tensor(targets), padding_rows=self.model.head_padding_rows
            )  # (N,)
        # Every slot is written once and responses are summed after that: index_add would add in any order on CUDA.
        padded = logps.new_zeros(R * len(items) * longest).index_put((self._tensor(slots),), logps)
        return padded.view(R, len(items), longest)

    def logps(
        self, items: Sequence[Item], progress: Callable[[int], None] | None = None, temperature: float = 1.0
    ) -> list[list[float]]:
        """`response_logps` of any number of items, without gradient or dropout: R numbers an item, in nats."""
        return self._in_chunks(items, lambda some: self.response_logps(some, temperature).T.tolist(), progress)

    @onednn.products()
    def logps_by_token(self, items: Sequence[Item], progress: Callable[[int], None] | None = None) -> list[list[float]]:
        """`token_logps` of any number of (prompt, response): a number for each token of the response, in nats."""
        rows = self._in_chunks(items, lambda some: self.token_logps(some)[0].tolist(), progress)
        return [row[: len(response)] for row, (_, response) in zip(rows, items)]

    @torch.no_grad()
    def _in_chunks(self, items: Sequence[Item], compute: Callable, progress: Callable[[int], None] | None) -> list:
        self.model.eval()
        result: list[Any] = [None for _ in items]
        for chunk in self.micro_batches([sum(map(len, item)) for item in items]):
            for i, logps in zip(chunk, compute([items[i] for i in chunk])):
                result[i] = logps
            if progress is not None:
                progress(len(chunk))
        return result

    def micro_batches(self, tokens: Sequence[int]) -> Iterator[list[int]]:
        """Cuts items of so many tokens into groups of like length that fit --micro-tokens: yields their indices.

        A group's size is that of its longest item times their number; an item that is too long is alone.
        """
        group: list[int] = []
        for i in sorted(range(len(tokens)), key=lambda i: tokens[i]):
            if group and tokens[i] * (len(group) + 1) > self.micro_tokens:
                yield group
                group = []
            group.append(i)
        if group:
            yield group

    def _packed_layout(self, items: Sequence[Item]) -> dict[str, Any]:
        """What the model needs beside the ids of all items behind each other: positions, and how its layers attend."""
        positions, keys, queries, seen = packed_sequences(items)
        starts = {"cu_seq_q": queries, "cu_seq_k": seen}
        starts = {name: torch.tensor([0, *n], device=self.device).cumsum(0).int() for name, n in starts.items()}
        attend = partial(
            packed_attention, None if len(keys) == len(positions) else self._tensor(keys),
            **starts, max_q=max(queries), max_k=max(seen),
        )  # fmt: skip
        masks = {"global": attend, "local": partial(attend, window=self.model.config.window_size)}
        return {"positions": self._tensor([positions]), "masks": masks}

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.device)


def segments_of(items: Sequence[Item], width: int) -> list[list[int]]:
    """For each token of a row of `width` tokens: 0 for the prompt, n for the n-th response, -1 for padding."""
    rows = []
    for prompt, *responses in items:
        row = [0] * len(prompt)
        for n, response in enumerate(responses, 1):
            row += [n] * (len(response) - 1)
        rows.append(row + [-1] * (width - len(row)))
    return rows


class Sequences(NamedTuple):
    """Items behind each other without padding, cut into sequences of queries that variable-length attention knows.

    With one response a sequence is the prompt and the response. With several, the prompt is a sequence, and so is each
    response, whose keys are the prompt's and then its own. The last query of a sequence sees its last key.
    """

    positions: list[int]  # of each token
    keys: list[int]  # indices of tokens: the keys of all sequences, behind each other
    queries: list[int]  # the number of queries of each sequence
    seen: list[int]  # the number of keys of each sequence


def packed_sequences(items: Sequence[Item]) -> Sequences:
    """The sequences of items; a response's last token is left out, as nothing behind it is predicted."""
    result = Sequences([], [], [], [])
    for prompt, *responses in items:
        first = len(result.positions)
        prompt_keys = range(first, first + len(prompt))
        parts = [range(len(prompt))] if len(responses) > 1 else []
        shared = len(prompt) if parts else 0
        parts += [range(shared, len(prompt) + len(response) - 1) for response in responses]
        for part in parts:
            if not part:  # a response of one token
                continue
            own = range(len(result.positions), len(result.positions) + len(part))
            keys = [*prompt_keys[: part.start], *own]
            result.positions.extend(part)
            result.keys.extend(keys)
            result.queries.append(len(part))
            result.seen.append(len(keys))
    return result


def packed_attention(
    index: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *, window: int = 0, **sequences: Any
) -> Tensor:
    """Causal attention within the sequences of one packed row, scores unscaled; not yet measured, see Player.packed.

    Args:
        index: (S,) int64, which tokens are the keys of all sequences; None: each token once.
        q, k, v: (1, H, N, K), bf16 or fp16.
        window: number of positions that a token sees, itself included; 0: all.
        sequences: cu_seq_q, cu_seq_k, max_q and max_k of varlen_attn.

    Returns: (1, H, N, K).
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, H, K)
    if index is not None:
        k, v = k[index], v[index]
    y = varlen_attn(q, k, v, **sequences, scale=1.0, window_size=(window - 1, 0))
    return y.transpose(0, 1)[None]


def head_rows(items: Sequence[Item], width: int) -> tuple[list[int], list[int], list[int], int]:
    """Which hidden states predict which response tokens, in rows of `width` tokens; 0: in one row without padding.

    Returns: for each response token of all rows where in (B * T) it is predicted, its id, and its slot in
    (R, B, longest); and `longest`, the tokens of the longest response.
    """
    longest = max(len(response) for _, *responses in items for response in responses)
    sources: list[int] = []
    targets: list[int] = []
    slots: list[int] = []
    end = 0
    for row, (prompt, *responses) in enumerate(items):
        start = row * width if width else end
        end = start + len(prompt)
        for n, response in enumerate(responses):
            # The prompt's last position predicts the first token, each other token is predicted by the one before it.
            sources += [start + len(prompt) - 1, *range(end, end + len(response) - 1)]
            targets += response
            first = (n * len(items) + row) * longest
            slots += range(first, first + len(response))
            end += len(response) - 1
    return sources, targets, slots, longest
