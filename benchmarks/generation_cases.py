"""Generation: sampling.py beside transformers' generate on the same weights, prompts, lengths and sampling settings.

Weights are random, so no model ends a response by itself. If responses are to be as long as real ones, the length of
each is drawn from GSM8K's and the end is forced by a bias on its logit, in transformers by a logits processor. Both
programs do all their usual work.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial

import torch
from bench import FOLDER, Case, Ways, ours
from torch import Tensor

import sampling
from llama import Llama, LlamaConfig
from model import GPTNeo, GPTNeoConfig, LanguageModel


def neo(hidden_size: int, layers: int, heads: int, vocabulary: int = 50257) -> GPTNeoConfig:
    return GPTNeoConfig(
        vocab_size=vocabulary, max_position_embeddings=2048, hidden_size=hidden_size, num_layers=layers,
        num_heads=heads, attention_types=((("global", "local"), layers // 2),), window_size=256,
        bos_token_id=vocabulary - 1, eos_token_id=vocabulary - 1,
    )  # fmt: skip


CONFIGS = {
    "125M": neo(768, 12, 12),
    "1.3B": neo(2048, 24, 16),
    "2.7B": neo(2560, 32, 20),
    "tiny": neo(64, 2, 4, vocabulary=1009),
    "SmolLM2": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True,
        bos_token_id=49151, eos_token_id=49151,
    ),
}  # fmt: skip


def random_model(config: GPTNeoConfig | LlamaConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    with torch.device(device):
        model = (Llama if isinstance(config, LlamaConfig) else GPTNeo)(config)
    return model.init_weights(torch.Generator(device).manual_seed(0)).to(dtype).eval()


def in_transformers(model: LanguageModel) -> object:
    """The same weights, shared, in transformers' class of the same model."""
    import transformers

    settings = {name: value for name, value in json.loads(model.config.to_json()).items() if value is not None}
    settings.pop("attention_layers", None)
    with torch.device(model.head_weight.device):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings))
    theirs.load_state_dict(model.state_dict() | {"lm_head.weight": model.head_weight}, assign=True, strict=False)
    theirs.tie_weights()
    return theirs.eval()


def gsm8k_like(count: int, longest: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of random ids with GSM8K's lengths, and the lengths of their responses, at most `longest`."""
    pairs = json.loads((FOLDER / "gsm8k_lengths.json").read_text())["lengths"][:count]
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1000, (n,), generator=rng).tolist() for n, _ in pairs]
    return prompts, [min(m, longest) for _, m in pairs]


@contextlib.contextmanager
def forced_ends(lengths: list[int] | None) -> Iterator[None]:
    """Row i ends after lengths[i] tokens, and no earlier: a bias decides whether the last token, the end, is drawn.

    A sampler does not know a row's position, so the random number that ends a response is 1 larger.
    """
    uniforms, choose = sampling.uniforms, sampling.Sampler.__call__

    def marked(seed: int, rows: list[int], count: int) -> Tensor:
        ends = torch.tensor([lengths[row] for row in rows])[:, None]
        return uniforms(seed, rows, count) + (torch.arange(1, count + 1) >= ends)

    def biased(self: sampling.Sampler, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        logits[:, -1] = (uniform >= 1) * 2e4 - 1e4
        return choose(self, logits, uniform % 1)

    if lengths:
        sampling.uniforms, sampling.Sampler.__call__ = marked, biased
    try:
        yield
    finally:
        sampling.uniforms, sampling.Sampler.__call__ = uniforms, choose


def respond(
    model: LanguageModel, prompts: list, lengths: list[int] | None, batch: int, M: int, eos: int | None
) -> None:
    """Samples responses of these lengths or, by default, of M tokens."""
    with forced_ends(lengths):
        found = sampling.respond(model, prompts, max_new_tokens=M, eos_token_id=eos, batch_size=batch)
    assert [len(ids) for ids in found.ids] == (lengths or [M] * len(prompts))


def theirs(
    model: object, prompts: list, lengths: list[int] | None, batch: int, M: int, eos: int | None, **settings: object
) -> Callable:
    """Responses of transformers, in batches of prompts sorted by length, padded on the left."""

    def end(width: int, last: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        """Forces the end of each row at its length, and nowhere else."""
        scores[:, eos] = torch.where(ids.shape[1] + 1 - width >= last, 1e4, -1e4).to(scores.dtype)
        return scores

    def run() -> None:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            width = max(len(prompts[i]) for i in rows)
            pad = [width - len(prompts[i]) for i in rows]
            ids = torch.tensor([[0] * n + prompts[i] for n, i in zip(pad, rows)], device=model.device)
            mask = torch.tensor([[0] * n + [1] * (width - n) for n in pad], device=model.device)
            last = torch.tensor([lengths[i] for i in rows], device=model.device) if lengths else None
            model.generate(
                ids, attention_mask=mask, max_new_tokens=M, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                eos_token_id=eos, pad_token_id=0, logits_processor=[partial(end, width, last)] if lengths else [],
                **settings,
            )  # fmt: skip

    return run


def generation(
    shape: str, dtype: torch.dtype, count: int, batch: int, M: int, ragged: bool = False, estimate: float = 0.0
) -> Case:
    """Responses of M tokens each or, if `ragged`, with the lengths of GSM8K's."""

    def build(device: torch.device) -> Ways:
        model = random_model(CONFIGS[shape], dtype, device)
        prompts, lengths = gsm8k_like(count, M)
        rest = prompts, lengths if ragged else None, batch, M, model.config.eos_token_id if ragged else None
        peers = {
            "transformers, default cache": lambda: theirs(in_transformers(model), *rest),
            "transformers, static cache": lambda: theirs(in_transformers(model), *rest, cache_implementation="static"),
        }
        written = sum(lengths) if ragged else count * M
        rounds = 3 if device.type == "cpu" else 1
        return Ways(ours(partial(respond, model, *rest), device), peers, (written, "tokens"), rounds)

    kind = "lengths of GSM8K's responses" if ragged else "no early end"
    name = f"generation: {shape} shape, {str(dtype).removeprefix('torch.')}, {count} prompts, batch {batch}, "
    return Case(name + f"{M} new tokens at most, {kind}", build, estimate)


def attention_kernels(shape: str, count: int, M: int, estimate: float) -> Case:
    """Which kernel of attention is fastest for one query per row, and which gives the same responses each time."""

    def build(device: torch.device) -> Ways:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        model, (prompts, _) = random_model(CONFIGS[shape], BF16, device), gsm8k_like(count, M)

        def write(*kernels: SDPBackend) -> list[list[int]]:
            with sdpa_kernel(list(kernels)) if kernels else contextlib.nullcontext():
                return sampling.respond(model, prompts, max_new_tokens=M, eos_token_id=None, batch_size=count).ids

        def equal(call: Callable) -> str:
            return f"{sum(one == other for one, other in zip(call(), call()))} of {count} are equal in two calls"

        kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        calls = {"ours": write} | {f"ours, {kernel.name.lower()}": partial(write, kernel) for kernel in kernels}
        return Ways(calls, work=(count * M, "tokens"), rounds=3, check=equal)

    name = f"generation: kernels of attention, {shape} shape, bfloat16, {count} prompts, {M} new tokens"
    return Case(name, build, estimate, extra=True)


BF16, FP32 = torch.bfloat16, torch.float32
CASES = {
    "quick": [generation("tiny", FP32, 8, 4, 16, ragged=True)],
    "cpu": [
        generation("125M", FP32, 32, 16, 256, ragged=True),
        generation("125M", BF16, 32, 16, 256, ragged=True),
        generation("SmolLM2", FP32, 16, 16, 32),
    ],
    "cuda": [
        generation("1.3B", BF16, 64, 64, 256, estimate=45),
        generation("125M", BF16, 64, 64, 256, estimate=25),
        attention_kernels("1.3B", 64, 128, estimate=40),
    ],
}
