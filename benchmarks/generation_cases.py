"""Generation: sampling.py beside transformers' generate on the same weights, prompts, lengths and sampling settings.

Weights are random, so no model ends a response by itself. Where responses are to be as long as real ones, the length of
each is drawn from GSM8K's and the end is forced by a bias on its logit, in transformers by a logits processor. Both do
all their usual work.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import Case, Ways, optional, ours
from torch import Tensor

import sampling
from data.examples import encode, load_examples, load_tokenizer
from data.templates import DEFAULT_TEMPLATE, Template
from llama import Llama, LlamaConfig
from model import GPTNeo, GPTNeoConfig, LanguageModel

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # hidden size, layers, heads, vocabulary
    "125M": (768, 12, 12, 50257),
    "1.3B": (2048, 24, 16, 50257),
    "2.7B": (2560, 32, 20, 50257),
    "tiny": (64, 2, 4, 1009),
}
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True,
    bos_token_id=49151, eos_token_id=49151,
)  # fmt: skip


def config_of(shape: str) -> GPTNeoConfig | LlamaConfig:
    if shape == "SmolLM2":
        return SMOLLM2
    D, L, H, V = SHAPES[shape]
    return GPTNeoConfig(
        vocab_size=V, max_position_embeddings=2048, hidden_size=D, num_layers=L, num_heads=H,
        attention_types=((("global", "local"), L // 2),), window_size=256, bos_token_id=V - 1, eos_token_id=V - 1,
    )  # fmt: skip


def random_model(config: GPTNeoConfig | LlamaConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    with torch.device(device):
        model = (Llama if isinstance(config, LlamaConfig) else GPTNeo)(config)
    return model.init_weights(torch.Generator(device).manual_seed(0)).to(dtype).eval()


def in_transformers(model: LanguageModel) -> object:
    """The same weights, shared, in transformers' class of the same model."""
    import transformers

    settings = json.loads(model.config.to_json())
    settings.pop("attention_layers", None)
    with torch.device(model.head_weight.device):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings))
    theirs.load_state_dict(model.state_dict() | {"lm_head.weight": model.head_weight}, assign=True, strict=False)
    theirs.tie_weights()
    return theirs.eval()


def gsm8k_like(count: int, longest: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of random ids with GSM8K's lengths, and the lengths of their responses, at most `longest`."""
    pairs = json.loads((ROOT / "benchmarks/gsm8k_lengths.json").read_text())["lengths"][:count]
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1000, (n,), generator=rng).tolist() for n, _ in pairs]
    return prompts, [min(m, longest) for _, m in pairs]


def respond(model: LanguageModel, prompts: list, lengths: list[int] | None, batch: int, M: int, eos: int | None) -> int:
    """Returns the number of tokens."""
    with forced_ends(lengths):
        found = sampling.respond(model, prompts, max_new_tokens=M, eos_token_id=eos, batch_size=batch)
    if lengths:
        assert [len(ids) for ids in found.ids] == lengths
    return sum(map(len, found.ids))


@contextlib.contextmanager
def forced_ends(lengths: list[int] | None) -> Iterator[None]:
    """Row i ends after lengths[i] tokens, and no earlier: a bias decides whether the last token, the end, is drawn.

    A sampler does not know a row's position. A random number tells it: where the response is to end, it is 1 larger.
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


def theirs(
    model: object, prompts: list, lengths: list[int] | None, batch: int, M: int, eos: int | None, device: torch.device,
    **settings: object,
) -> Callable:  # fmt: skip
    """Batches of prompts sorted by length, padded on the left."""
    from transformers import LogitsProcessorList

    class End:
        """Forces the end of each row at its length, and nowhere else."""

        def __init__(self, last: Tensor) -> None:
            self.last, self.step = last, 0

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            self.step += 1
            scores[:, eos] = torch.where(self.step >= self.last, 1e4, -1e4).to(scores.dtype)
            return scores

    def run() -> None:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            width = max(len(prompts[i]) for i in rows)
            pad = [width - len(prompts[i]) for i in rows]
            ids = torch.tensor([[0] * n + prompts[i] for n, i in zip(pad, rows)], device=device)
            mask = torch.tensor([[0] * n + [1] * (width - n) for n in pad], device=device)
            ends = [End(torch.tensor([lengths[i] for i in rows], device=device))] if lengths else []
            model.generate(
                ids, attention_mask=mask, max_new_tokens=M, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                eos_token_id=eos, pad_token_id=0, logits_processor=LogitsProcessorList(ends), **settings,
            )  # fmt: skip

    return run


def case(estimate: float, *size: Any) -> Case:
    shape, dtype, _, count, batch, M, ragged, _ = size
    kind = "lengths of GSM8K's responses" if ragged else "no early end"
    name = f"generation: {shape} shape, {str(dtype).removeprefix('torch.')}, {count} prompts, batch {batch}, "
    return Case(name + f"{M} new tokens at most, {kind}", partial(build, *size), estimate=estimate)


def build(
    shape: str, dtype: torch.dtype, device: torch.device, count: int, batch: int, M: int, ragged: bool, alone: bool
) -> Ways:
    """`alone`: without peers, which take long."""
    config = config_of(shape)
    model = random_model(config, dtype, device)
    prompts, lengths = gsm8k_like(count, M)
    written = sum(lengths) if ragged else count * M
    lengths, eos = (lengths, config.eos_token_id) if ragged else (None, None)
    ways = ways_of(written, alone, device, model, prompts, lengths, batch, M, eos)
    if device.type == "cuda":
        ways.calls["floor: weights and cache once a step"] = floor(model, prompts, written, batch)
        ways.rates |= dict.fromkeys(ways.calls, (written, "tokens"))
    ways.rounds = 3 if device.type == "cpu" else 1
    return ways


def ways_of(written: int, alone: bool, device: torch.device, model: LanguageModel, *rest: Any) -> Ways:
    """Ours and, unless `alone`, the peers; each writes so many tokens. `rest` as in `respond`."""
    calls, notes = ours(partial(respond, model, *rest), device), {}
    if not alone:
        with optional(notes, "transformers"):
            other = in_transformers(model)
            calls["transformers, default cache"] = theirs(other, *rest, device)
            calls["transformers, static cache"] = theirs(other, *rest, device, cache_implementation="static")
    return Ways(calls, notes, dict.fromkeys(calls, (written, "tokens")))


def floor(model: LanguageModel, prompts: list, written: int, batch: int) -> Callable:
    """Copies that move as many bytes as steps with full batches must read, at the average length of a row."""
    config, size = model.config, next(model.parameters()).element_size()
    length = sum(map(len, prompts)) / len(prompts) + written / len(prompts) / 2
    places = sum(min(length, config.window_size) if kind == "local" else length for kind in config.attention_layers)
    cache = batch * places * 2 * config.hidden_size * size
    weights = sum(p.numel() for p in model.parameters()) * size
    source = torch.empty(int(cache + weights) // 2, dtype=torch.uint8, device=model.head_weight.device)
    target = torch.empty_like(source)

    def run() -> None:
        for _ in range(written // batch):
            target.copy_(source)

    return run


def backends(estimate: float, shape: str, device: torch.device, count: int, M: int, *names: str) -> Case:
    """Which kernel of attention is fastest for one query per row, and which gives the same responses each time."""
    name = f"generation: kernels of attention, {shape} shape, bfloat16, {count} prompts, {M} new tokens"
    return Case(name, partial(backend_ways, shape, device, count, M, names), estimate=estimate, extra=True)


def backend_ways(shape: str, device: torch.device, count: int, M: int, names: tuple[str, ...]) -> Ways:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, (prompts, _) = random_model(config_of(shape), torch.bfloat16, device), gsm8k_like(count, M)

    def write(kernels: list[SDPBackend]) -> list[list[int]]:
        with sdpa_kernel(kernels):
            return sampling.respond(model, prompts, max_new_tokens=M, eos_token_id=None, batch_size=count).ids

    every = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    choices = {"ours": every} | {f"ours, {name.lower()}": [getattr(SDPBackend, name)] for name in names}
    notes = {}
    for name, kernels in choices.items():
        with optional(notes, name):  # a kernel that does not fit
            same = sum(one == other for one, other in zip(write(kernels), write(kernels)))
            notes[name] = f"{same} of {count} responses are equal in two calls"
    ways = {name: partial(write, kernels) for name, kernels in choices.items()}
    return Ways(ways, notes, dict.fromkeys(ways, (count * M, "tokens")), rounds=3)


def default_model(count: int, batch: int) -> Case:
    name = f"generation: the default run's model, float32, {count} prompts, batch {batch}, 32 new tokens at most"
    return Case(name, partial(build_default_model, count, batch))


def build_default_model(count: int, batch: int) -> Ways:
    """The start of the default run, as it ends its responses itself."""
    folder = ROOT / "pronounce/start"
    model = GPTNeo.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, model.config.eos_token_id, model.config.vocab_size)
    examples = load_examples(ROOT / "pronounce/cmudict.jsonl.gz")[:count]
    encode(examples, tokenizer, Template(DEFAULT_TEMPLATE.replace(r"\n", "\n"), tokenizer), model.config.eos_token_id)
    prompts = [example.prompt_ids for example in examples]
    rest = prompts, None, batch, 32, model.config.eos_token_id
    return ways_of(respond(model, *rest), False, torch.device("cpu"), model, *rest)


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    if quick:
        return [default_model(40, 20), case(0, "tiny", fp32, device, 8, 4, 16, True, False)]
    if device.type == "cpu":
        ragged = [case(0, "125M", dtype, device, 32, 16, 256, True, False) for dtype in (fp32, bf16)]
        smollm2 = case(0, "SmolLM2", fp32, device, 16, 16, 32, False, False)
        return [default_model(4000, 1024), default_model(2000, 64), *ragged, smollm2]
    return [
        case(45, "1.3B", bf16, device, 64, 64, 256, False, False),
        case(20, "1.3B", bf16, device, 128, 64, 256, True, True),
        case(25, "125M", bf16, device, 64, 64, 256, False, False),
        backends(40, "1.3B", device, 64, 128, "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
    ]
