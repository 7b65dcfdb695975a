"""A player: a language model that writes responses and tells how likely given responses are.

Any object can play SPIN if it has these members, with the meaning that they have in `Player`:
- `model`, an nn.Module, whose parameters with requires_grad are trained;
- `respond`, which samples responses to prompts;
- `response_logps`, differentiable log-probabilities of responses, for training;
- `logps`, the same for any number of items, without gradient, for scoring;
- `micro_batches`, which divides a batch so that `response_logps` fits into memory.

Shapes: B items of R responses each; T tokens per row; D hidden size; N response tokens of all rows.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora
import sampling
from kernels import linear_logprobs
from llama import FAMILY, Llama
from model import GPTNeo, LanguageModel, read_config

MODELS: dict[str, type[LanguageModel]] = {"gpt_neo": GPTNeo} | dict.fromkeys(FAMILY, Llama)  # keyed by model_type

# The token ids of a prompt and of one or more responses to it, which include their end-of-sequence tokens.
Item = tuple[list[int], ...]


class Player:
    """A model of ours, with or without LoRA, as a player.

    Args:
        model: its trained parameters are fp32; frozen parameters may be bf16.
        eos_token_id: the token that ends a response. If the model's config lists several, each ends generated ones.
        args: options that bound lengths and memory: max_new_tokens, gen_batch, gen_tokens, micro_tokens.
        dtype: of matrix products. In bf16, training and scoring use autocast, and generation casts the weights.
    """

    # A prompt with several responses shares one row with them, up to this many tokens. In longer rows the (T, T) mask
    # costs more than it saves, and each response gets a row of its own.
    masked_tokens = 1024

    @staticmethod
    def class_of(folder: Path) -> type[LanguageModel]:
        """The class of the model in a directory, by its config.json. Raises: FileNotFoundError, ValueError."""
        return MODELS[read_config(folder / "config.json", MODELS)["model_type"]]

    def __init__(self, model: LanguageModel, eos_token_id: int, args: Any, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.eos_token_id = eos_token_id
        listed = model.config.eos_token_id
        self.ends = [eos_token_id, *(listed if isinstance(listed, list) else [])]
        self.args = args
        self.dtype = dtype
        self.device = model.head_weight.device
        self.micro_tokens = args.micro_tokens or (8192 if self.device.type == "cuda" else 2048)

    # ------------------------------------------------------------ writing

    def respond(
        self,
        prompts: Sequence[list[int]],
        seed: int,
        *,
        max_new_tokens: int | None = None,
        with_logps: bool = False,
        **options: Any,
    ) -> list[tuple]:
        """Samples one response to each prompt. `options` are rows, temperature, top_k, top_p and progress, as in
        sampling.respond.

        Returns: (token ids, whether the response ended by itself) for each prompt. `with_logps` adds a list with the
        log-probability of each token, in nats, before temperature and filters.

        Raises: FloatingPointError if logits are not finite; ValueError if a prompt does not fit the context.
        """
        with lora.factors_ready(self.model, self.dtype), self._weights_in_dtype():
            responses = sampling.respond(
                self.model,
                prompts,
                max_new_tokens=max_new_tokens or self.args.max_new_tokens,
                eos_token_id=self.ends,
                seed=seed,
                batch_size=self.args.gen_batch,
                cache_tokens=self.args.gen_tokens,
                **options,
            )
        return list(zip(*(responses if with_logps else responses[:2])))

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

    def response_logps(self, items: Sequence[Item], temperature: float = 1.0) -> Tensor:
        """log p(response | prompt) of every response: (R, B) fp32, in nats, summed over the response's tokens.

        Scoring and training both use it; it is differentiable. At a temperature other than 1, p is the distribution
        that `respond` samples from at that temperature without filters.

        All responses to a prompt follow it in one row, as segments that do not see each other, so the prompt is
        computed once. Lengths and not token ids decide which positions count.
        """
        R = len(items[0]) - 1
        if R > 1 and max(sum(map(len, item)) for item in items) - R > self.masked_tokens:
            apart = [[(item[0], item[n]) for item in items] for n in range(1, R + 1)]
            return torch.cat([self.response_logps(some, temperature) for some in apart])
        return self.token_logps(items, temperature).sum(2)

    def token_logps(self, items: Sequence[Item], temperature: float = 1.0) -> Tensor:
        """log p of every token of the responses: (R, B, longest) fp32, in nats; 0 behind the end of a response."""
        hidden, targets, slots, longest = self.predictors(items)
        logps = self.head_logps(hidden, targets, temperature)
        # Every slot is written once and responses are summed after that: index_add would add in any order on CUDA.
        R = len(items[0]) - 1
        padded = logps.new_zeros(R * len(items) * longest).index_put((slots,), logps)
        return padded.view(R, len(items), longest)

    def head_logps(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """log p of tokens (N,) from the hidden states that predict them, (N, D): (N,) fp32, in nats."""
        with self._autocast():
            hidden = hidden if temperature == 1 else hidden / temperature  # logits are linear in it
            return linear_logprobs(hidden, self.model.head_weight, targets)

    def predictions(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Hidden states (N, D) and head (V, D), whose product is the logits of all tokens of the responses in order."""
        return self.predictors(items)[0].to(self.dtype), self.model.head_weight.to(self.dtype)

    def predictors(self, items: Sequence[Item]) -> tuple[Tensor, Tensor, Tensor, int]:
        """The hidden states that predict response tokens, (N, D); the ids of these tokens; their indices in
        (R * B * longest); and `longest`. See `head_rows`."""
        # The last token of a response is no input, because nothing behind it is predicted.
        rows = [prompt + [t for response in responses for t in response[:-1]] for prompt, *responses in items]
        width = max(map(len, rows))
        segments = self._tensor(segments_of(items, width)) if len(items[0]) > 2 else None  # one response: causal
        input_ids = self._tensor([ids + [0] * (width - len(ids)) for ids in rows])  # (B, T)
        sources, targets, slots, longest = head_rows(items, width)
        with self._autocast(), lora.factors_ready(self.model, self.dtype):
            # Only the hidden states that predict a response token go through the head.
            hidden = self.hidden(input_ids, segments).flatten(0, 1)[self._tensor(sources)]
        return hidden, self._tensor(targets), self._tensor(slots), longest

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def hidden(self, input_ids: Tensor, segments: Tensor | None) -> Tensor:
        """Hidden states (B, T, D) of rows as LanguageModel takes them; segments are None if items have one response."""
        return self.model(input_ids, segments)

    @torch.no_grad()
    def logps(
        self,
        items: Sequence[Item],
        progress: Callable[[int], None] | None = None,
        temperature: float = 1.0,
        by_token: bool = False,
    ) -> list[list[float]]:
        """Log-probabilities of any number of items, in nats, without gradient or dropout.

        Args:
            progress: called with the number of items that were scored since the last call.
            by_token: requires items of one response each.

        Returns: for each item one number per response or, `by_token`, one number per token of its response.
        """
        self.model.eval()
        result: list[list[float]] = [[] for _ in items]
        for group in self.micro_batches([sum(map(len, item)) for item in items]):
            some = [items[i] for i in group]
            logps = self.token_logps(some, temperature)[0] if by_token else self.response_logps(some, temperature).T
            for i, numbers in zip(group, logps.tolist()):
                result[i] = numbers[: len(items[i][1])] if by_token else numbers
            if progress is not None:
                progress(len(group))
        return result

    def micro_batches(self, tokens: Sequence[int]) -> Iterator[list[int]]:
        """Divides items with these numbers of tokens into groups of similar lengths: yields the indices of each group.

        A group's number of items times its longest item is at most `micro_tokens`, unless the group is a single item.
        """
        group: list[int] = []
        for i in sorted(range(len(tokens)), key=lambda i: tokens[i]):
            if group and tokens[i] * (len(group) + 1) > self.micro_tokens:
                yield group
                group = []
            group.append(i)
        if group:
            yield group

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


def head_rows(items: Sequence[Item], width: int) -> tuple[list[int], list[int], list[int], int]:
    """Which hidden states predict which response tokens, in rows of `width` tokens.

    Returns: for each response token of all rows the index in (B * T) of the hidden state that predicts it, its id, and
    its index in (R * B * longest); and `longest`, the number of tokens of the longest response.
    """
    longest = max(len(response) for _, *responses in items for response in responses)
    sources, targets, slots = [], [], []
    for row, (prompt, *responses) in enumerate(items):
        end = row * width + len(prompt)
        last_of_prompt = end - 1  # predicts the first token of every response
        for n, response in enumerate(responses):
            sources += [last_of_prompt, *range(end, end + len(response) - 1)]
            targets += response
            first = (n * len(items) + row) * longest
            slots += range(first, first + len(response))
            end += len(response) - 1
    return sources, targets, slots, longest
