"""Generation: sampling.py beside transformers' generate on the same weights, prompts, lengths and sampling settings.

Weights are random, so no model ends a response by itself. Where responses are to be as long as real ones, the length of
each is drawn from GSM8K's and the end is forced: in ours by the random number of that position, which then falls on
the last token of the vocabulary, the end; in transformers by a logits processor. Both do all their usual work.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from bench import Case, Ways, optional
from torch import Tensor

import sampling
from data.examples import encode, load_examples, load_tokenizer
from data.templates import DEFAULT_TEMPLATE, Template
from kernels import onednn
from model import GPTNeo, GPTNeoConfig

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # hidden size, layers, heads
    "125M": (768, 12, 12),
    "1.3B": (2048, 24, 16),
    "2.7B": (2560, 32, 20),
}


def neo_config(shape: str) -> GPTNeoConfig:
    D, L, H = SHAPES[shape]
    return GPTNeoConfig(
        vocab_size=50257, max_position_embeddings=2048, hidden_size=D, num_layers=L, num_heads=H,
        attention_types=((("global", "local"), L // 2),), window_size=256, bos_token_id=50256, eos_token_id=50256,
    )  # fmt: skip


def random_model(config: GPTNeoConfig, dtype: torch.dtype, device: torch.device) -> GPTNeo:
    with torch.device(device):
        model = GPTNeo(config)
    return model.init_weights(torch.Generator(device).manual_seed(0)).to(dtype).eval()


def in_transformers(model: GPTNeo) -> object:
    """The same weights, shared, in transformers' GPT-Neo."""
    from transformers import GPTNeoConfig as TheirConfig
    from transformers import GPTNeoForCausalLM

    settings = json.loads(model.config.to_json())
    settings.pop("attention_layers")
    with torch.device(model.head_weight.device):
        theirs = GPTNeoForCausalLM(TheirConfig(**settings))
    state = dict(model.state_dict())
    theirs.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]}, assign=True, strict=False)
    theirs.tie_weights()
    return theirs.eval()


def gsm8k_like(count: int, longest: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of random ids with GSM8K's lengths, and the lengths of their responses, at most `longest`."""
    pairs = json.loads((ROOT / "benchmarks/gsm8k_lengths.json").read_text())["lengths"][:count]
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(50000, (n,), generator=rng).tolist() for n, _ in pairs]
    return prompts, [min(m, longest) for _, m in pairs]


def ours(
    model: GPTNeo, prompts: list, lengths: list[int] | None, batch: int, M: int, eos: int | None, fast: bool = False
) -> Callable:
    """`fast`: with onednn.py, as spin.py does on a CPU."""

    def run() -> int:
        with forced_ends(lengths), onednn.products() if fast else contextlib.nullcontext():
            responses = sampling.respond(
                model, prompts, max_new_tokens=M, eos_token_id=eos, batch_size=batch, temperature=1.0
            )
        if lengths:
            assert [len(ids) for ids in responses.ids] == lengths
        return sum(map(len, responses.ids))

    return run


@contextlib.contextmanager
def forced_ends(lengths: list[int] | None) -> Iterator[None]:
    """Row i ends after lengths[i] tokens, and no earlier: its random number there falls on the last token, the end."""
    plain = sampling.uniforms

    def steered(seed: int, rows: list[int], count: int) -> Tensor:
        # Never the last token, the end: its probability is about 2^-16 and was seen to reach 2^-12.
        uniform = plain(seed, rows, count) * (1 - 2**-10)
        for i, row in enumerate(rows):
            uniform[i, lengths[row] - 1 :] = 1 - 2**-53
        return uniform

    sampling.uniforms = steered if lengths else plain
    try:
        yield
    finally:
        sampling.uniforms = plain


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


def peers(notes: dict[str, str], model: GPTNeo, *rest: object) -> dict[str, Callable]:
    with optional(notes, "transformers"):
        other = in_transformers(model)
        return {
            "transformers, default cache": theirs(other, *rest),
            "transformers, static cache": theirs(other, *rest, cache_implementation="static"),
        }
    return {}


def case(
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    count: int,
    batch: int,
    M: int,
    ragged: bool,
    alone: bool,
    estimate: float = 0.0,
) -> Case:
    """`alone`: without peers, which take long."""
    kind = "lengths of GSM8K's responses" if ragged else "no early end"
    return Case(
        f"generation: {shape} shape, {str(dtype).removeprefix('torch.')}, {count} prompts, batch {batch}, "
        f"{M} new tokens at most, {kind}",
        partial(build, shape, dtype, device, count, batch, M, ragged, alone),
        estimate=estimate,
    )


def build(
    shape: str, dtype: torch.dtype, device: torch.device, count: int, batch: int, M: int, ragged: bool, alone: bool
) -> Ways:
    config = neo_config(shape)
    model = random_model(config, dtype, device)
    prompts, lengths = gsm8k_like(count, M)
    lengths, eos = (lengths, config.eos_token_id) if ragged else (None, None)
    written = sum(lengths) if ragged else count * M
    notes: dict[str, str] = {}
    ways = {"ours": ours(model, prompts, lengths, batch, M, eos, fast=device.type == "cpu")}
    if device.type == "cpu":
        ways["ours without onednn.py"] = ours(model, prompts, lengths, batch, M, eos)
    if not alone:
        ways |= peers(notes, model, prompts, lengths, batch, M, eos, device)
    if device.type == "cuda":
        ways["floor: weights and cache once a step"] = floor(model, prompts, written, batch)
    rates = dict.fromkeys(ways, (written, "tokens"))
    return Ways(ways, notes, rates, rounds=3 if device.type == "cpu" else 1)


def floor(model: GPTNeo, prompts: list, written: int, batch: int) -> Callable:
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


def default_model(count: int, batch: int) -> Case:
    """The start of the default run and its held-out prompts, as it ends its responses itself."""
    name = f"generation: the default run's model, float32, {count} prompts, batch {batch}, 32 new tokens at most"
    return Case(name, partial(build_default_model, count, batch))


def build_default_model(count: int, batch: int) -> Ways:
    folder = ROOT / "pronounce/start"
    model = GPTNeo.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, model.config.eos_token_id, model.config.vocab_size)
    examples = load_examples(ROOT / "pronounce/cmudict.jsonl.gz")[:count]
    encode(examples, tokenizer, Template(DEFAULT_TEMPLATE.replace(r"\n", "\n"), tokenizer), model.config.eos_token_id)
    prompts = [example.prompt_ids for example in examples]
    eos, device = model.config.eos_token_id, torch.device("cpu")
    notes: dict[str, str] = {}
    ways = {"ours": ours(model, prompts, None, batch, 32, eos)}
    written = ways["ours"]()
    ways |= peers(notes, model, prompts, None, batch, 32, eos, device)
    return Ways(ways, notes, dict.fromkeys(ways, (written, "tokens")))


def beside_ctranslate2(count: int, batch: int, M: int) -> Case:
    """A public inference engine. It does not know GPT-Neo: it runs a GPT-2 of the same size, with random weights too.

    Its batches are static and no length can be forced, so all responses run to the limit: no early end.
    """
    return Case(
        f"generation: 125M shape, float32, {count} prompts, batch {batch}, {M} new tokens, no early end, CTranslate2",
        partial(build_beside_ctranslate2, count, batch, M),
    )


def build_beside_ctranslate2(count: int, batch: int, M: int) -> Ways:
    model = random_model(neo_config("125M"), torch.float32, torch.device("cpu"))
    prompts, _ = gsm8k_like(count, M)
    ways = {
        "ours": ours(model, prompts, None, batch, M, None, fast=True),
        "ours without onednn.py": ours(model, prompts, None, batch, M, None),
    }
    notes: dict[str, str] = {}
    with optional(notes, "CTranslate2"):
        ways["CTranslate2, GPT-2 124M"] = ctranslate2_gpt2(prompts, batch, M)
    return Ways(ways, notes, dict.fromkeys(ways, (count * M, "tokens")), rounds=3)


def ctranslate2_gpt2(prompts: list, batch: int, M: int) -> Callable:
    import ctranslate2
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(50257)}
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(f"{folder}/gpt2")
        words = Tokenizer(models.WordLevel(vocabulary, "t0"))
        end = "t50256"
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", bos_token=end, eos_token=end).save_pretrained(
            f"{folder}/gpt2"
        )
        ctranslate2.converters.TransformersConverter(f"{folder}/gpt2").convert(f"{folder}/converted")
        engine = ctranslate2.Generator(f"{folder}/converted", intra_threads=torch.get_num_threads())
    tokens = [[f"t{i}" for i in prompt] for prompt in sorted(prompts, key=len)]

    def run() -> None:
        results = engine.generate_batch(
            tokens, max_batch_size=batch, max_length=M, min_length=M, sampling_topk=0, sampling_temperature=1.0,
            include_prompt_in_result=False,
        )  # fmt: skip
        assert all(len(result.sequences[0]) == M for result in results)

    return run


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            default_model(4000, 1024),
            default_model(2000, 64),
            case("125M", torch.float32, device, 32, 16, 256, ragged=True, alone=False),
            case("125M", torch.bfloat16, device, 32, 16, 256, ragged=True, alone=False),
            beside_ctranslate2(32, 16, 96),
        ]

    def even(shape: str, batch: int, alone: bool, estimate: float) -> Case:
        return case(shape, torch.bfloat16, device, batch, batch, 256, ragged=False, alone=alone, estimate=estimate)

    def ragged(shape: str, count: int, batch: int, alone: bool, estimate: float) -> Case:
        return case(shape, torch.bfloat16, device, count, batch, 256, ragged=True, alone=alone, estimate=estimate)

    return [
        even("1.3B", 64, False, 75),
        ragged("1.3B", 128, 64, False, 110),
        *(even("1.3B", batch, True, 14) for batch in (1, 16, 256)),
        even("2.7B", 64, False, 100),
        even("125M", 64, False, 50),
        *(ragged(shape, 512, 256, True, 28) for shape in ("125M", "2.7B")),
    ]
