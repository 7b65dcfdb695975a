"""sampling.py is compared with transformers' generate and logit warpers, and with a full scoring pass."""

import contextlib
import copy
import hashlib
import math
import weakref

import pytest
import torch
from helpers import random_model, spy
from transformers import GPTNeoForCausalLM
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from model import GPTNeo
from sampling import Batch, KVCache, draw, filter_logits, respond, uniforms

EOS = 50


@pytest.fixture(scope="module")
def model() -> GPTNeo:
    """A model with weights large enough for distributions far from uniform, and a window shorter than the prompts."""
    return random_model(51, EOS, hidden_size=32, num_heads=4)


def prompts(count: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(50, (1 + 5 * i % 17,), generator=rng).tolist() for i in range(count)]


def test_greedy_responses_and_their_log_probabilities_equal_those_of_transformers(model, tmp_path):
    model.save_pretrained(tmp_path)
    theirs = GPTNeoForCausalLM.from_pretrained(tmp_path)
    responses = respond(model, prompts(7), max_new_tokens=12, eos_token_id=EOS, temperature=0, batch_size=4)
    for prompt, ids, logps in zip(prompts(7), responses.ids, responses.logps):
        ids_in = torch.tensor([prompt])
        expected = theirs.generate(
            ids_in, attention_mask=torch.ones_like(ids_in), max_new_tokens=12, do_sample=False, pad_token_id=0,
            eos_token_id=EOS,
        )  # fmt: skip
        assert ids == expected[0, len(prompt) :].tolist()
        whole = theirs(expected).logits[0, len(prompt) - 1 : -1].log_softmax(-1).detach()
        torch.testing.assert_close(torch.tensor(logps), whole[range(len(ids)), ids], atol=1e-4, rtol=0)


def test_a_freed_slot_is_refilled_immediately(model, monkeypatch):
    """No step leaves a slot idle while a prompt waits; then the batch shrinks, so that few slots idle. Progress counts
    every row and token."""
    seen, counts = [], []
    spy(monkeypatch, Batch, "_step", lambda a, k: seen.append((int(a[0].active.sum()), a[0].size)))
    settings = dict(max_new_tokens=20, eos_token_id=EOS, temperature=1.5, batch_size=8)
    responses = respond(model, prompts(30), progress=lambda *args: counts.append(args), **settings)
    tokens = sum(len(ids) - 1 for ids in responses.ids)  # The first token comes from the prompt's pass.
    assert [*map(sum, zip(*counts))] == [30, tokens + 30] and len(counts) > 6
    assert sum(active for active, _ in seen) == tokens
    drained = [active < 8 for active, _ in seen].index(True)
    assert sum(active for active, _ in seen[:drained]) > tokens / 2
    assert all(active > size - math.ceil(size / 3) for active, size in seen[drained:])


def test_cache_holds_no_more_than_its_budget(model, monkeypatch):
    """`cache_tokens` bounds rows times capacity; local layers hold only their window; one row always fits."""
    made = []
    spy(monkeypatch, KVCache, "__init__", lambda a, k: made.append(a))
    for budget, size in ((1000, 8), (280, 7), (279, 6), (1, 1)):
        respond(model, [[1]] * 8 + [[1] * 30], max_new_tokens=10, eos_token_id=EOS, batch_size=8, cache_tokens=budget)
        cache, _, *shape = made.pop()
        assert shape == [size, 40] and [keys.shape[2] for keys in cache.keys] == [40, 4]


def test_no_graph_is_captured_into_a_pool_whose_graphs_have_died(model, monkeypatch):
    """Before torch 2.12 such a capture fails. Stand-ins for torch.cuda run the steps on the CPU."""
    settings = dict(max_new_tokens=40, eos_token_id=EOS, seed=3, batch_size=40)
    expected = respond(model, prompts(40), **settings)
    pools: dict[int, list[weakref.ref]] = {}  # handle -> graphs captured into this pool
    capturing, step = [], Batch._step

    class Graph:
        def replay(self):
            step(self.batch)

    def new_pool():
        pools[len(pools)] = []
        return len(pools) - 1

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert not pools[pool] or any(captured() for captured in pools[pool]), "the pool is dead"
        pools[pool].append(weakref.ref(graph))
        capturing.append(graph)
        yield
        capturing.clear()

    def step_or_record(self):
        if capturing:
            capturing[0].batch = self
        else:
            step(self)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", new_pool)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(Batch, "_step", step_or_record)
    monkeypatch.setattr("sampling.READ_MULTIPLE", 4)
    monkeypatch.setattr("sampling.STEPS_PER_CHECK", 2)
    assert respond(model, prompts(40), **settings).ids == expected.ids
    assert len(pools) > 1, "the batch shrinks"
    assert any(len(captured) > 1 for captured in pools.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [dict(temperature=0), dict(), dict(top_k=20), dict(top_p=0.9)])
def test_graphs_change_nothing_on_cuda(model, monkeypatch, settings, dtype):
    """Captured steps give the responses of single steps; greedily in fp32, those of the CPU."""
    there = copy.deepcopy(model).to("cuda", dtype)
    settings = dict(max_new_tokens=40, eos_token_id=EOS, seed=3) | settings
    graphs = []
    spy(monkeypatch, torch.cuda.CUDAGraph, "replay", lambda a, k: graphs.append(1))
    captured = [respond(there, prompts(40), batch_size=size, **settings) for size in (16, 40)]
    assert len(graphs) > 40
    monkeypatch.setattr(Batch, "_advance", Batch._step)
    single = respond(there, prompts(40), batch_size=16, **settings)
    assert captured[0].ids == single.ids
    if dtype == torch.float32:
        assert captured[1].ids == single.ids
    if dtype == torch.float32 and not settings.get("temperature", 1):
        assert single.ids == respond(model, prompts(40), **settings).ids


def test_a_long_prompt_is_prefilled_alone(model, monkeypatch):
    """At most PREFILL_TOKENS tokens or one prompt go through the model at a time."""
    shapes = []
    monkeypatch.setattr("sampling.PREFILL_TOKENS", 20)
    spy(monkeypatch, model, "forward", lambda a, k: shapes.append(tuple(a[0].shape)))
    lengths = [25, 9, 9, 9, 3, 3, 3, 3]
    respond(model, [[1] * n for n in lengths], max_new_tokens=2, eos_token_id=None)
    assert shapes == [(1, 25), (2, 9), (2, 9), (3, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_models_logps_come_from_fp32_logits(model, monkeypatch, dtype):
    """Log-probabilities equal those of fp32 products of the same hidden states; rounded logits would be off by 1e-2."""
    low, hidden = copy.deepcopy(model).to(dtype), []
    for name in ("forward", "decode"):
        call = getattr(low, name)
        monkeypatch.setattr(low, name, lambda *a, call=call, **k: hidden.append(call(*a, **k)) or hidden[-1])
    responses = respond(low, [[1, 2, 3]] * 4, max_new_tokens=9, eos_token_id=None)
    last = torch.stack([hidden[0][:, -1], *hidden[1:]], 1).flip(0).float()  # (B, M, D); the last prompt is in slot 0
    expected = (last @ low.head_weight.float().T).log_softmax(-1)
    expected = expected.gather(2, torch.tensor(responses.ids)[:, :, None])[:, :, 0]
    torch.testing.assert_close(torch.tensor(responses.logps), expected, atol=1e-5, rtol=0)


def test_attention_reads_no_further_than_the_longest_active_row(model, monkeypatch):
    """A row of 40 tokens that has finished does not slow down the short one that follows it."""
    monkeypatch.setattr("sampling.READ_MULTIPLE", 8)
    seen = []
    spy(monkeypatch, Batch, "_step", lambda a, k: seen.append(a[0].cache.read_length))
    respond(model, [[1] * 40, [1]], max_new_tokens=9, eos_token_id=None, batch_size=1)
    assert seen == [48] * 8 + [8] * 7 + [16]


@pytest.mark.parametrize("position", [2, 3, 11])
def test_logits_that_are_not_finite_are_an_error(model, position):
    """The first, the second or the last new token is damaged; the positions before it are sound."""
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.transformer["wpe"].weight[position] = float("nan")
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        respond(damaged, [[1, 2, 3]], max_new_tokens=10, eos_token_id=None)
    respond(damaged, [[1, 2, 3][: max(1, position - 9)]], max_new_tokens=max(1, position - 2), eos_token_id=None)


def test_context_may_be_filled_to_the_last_position(model):
    prompt = [1] * 54
    assert len(respond(model, [prompt, [1]], max_new_tokens=10, eos_token_id=None).ids[0]) == 10
    for bad in (prompt + [1], []):
        with pytest.raises(ValueError, match=f"prompt 1 has {len(bad)} tokens, expected 1 to .* = 54"):
            respond(model, [[1], bad], max_new_tokens=10, eos_token_id=None)
    assert respond(model, [], max_new_tokens=10, eos_token_id=None) == ([], [], [])


def test_filters_equal_transformers():
    logits = torch.randn(20, 33, generator=torch.Generator().manual_seed(0)) * 3
    for temperature in (0.5, 1.0, 2.0):
        scaled = logits / temperature
        for k in (1, 5, 33, 100):
            expected = TopKLogitsWarper(k)(None, scaled)
            assert torch.equal(filter_logits(logits, temperature, top_k=k), expected)
        for p in (0.01, 0.5, 0.9, 0.999):
            expected = TopPLogitsWarper(p)(None, scaled)
            assert torch.equal(filter_logits(logits, temperature, top_p=p), expected)
    both = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(6)(None, logits))
    assert torch.equal(filter_logits(logits, 1.0, 6, 0.7), both)
    assert filter_logits(torch.zeros(1, 4), 1.0, top_p=0.5).isfinite().sum() == 2, "the fewest of a tie"


def test_uniforms_are_splitmix64_of_a_hash():
    """Uniforms are compared with Python's integers, over both halves of the range of int64."""

    def expected(seed, row, i):
        start = int.from_bytes(hashlib.sha256(f"{seed}/{row}".encode()).digest()[:8], "big")
        x = (start + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return ((x ^ (x >> 31)) >> 11) / 2**53

    rows = [0, 5, 10**9]
    actual = uniforms(3, rows, 20)
    assert actual.dtype == torch.float64
    assert actual.tolist() == [[expected(3, row, i) for i in range(20)] for row in rows]


def test_every_token_of_a_long_tail_can_be_drawn():
    """Neighbours have probability 1e-9 each: 24 bits would never draw most of them."""
    logits = torch.zeros(1, 1000)
    logits[0, 0] = math.log(1e9)
    cumulated = logits.double().softmax(1).cumsum(1)
    middles = (cumulated[0, :-1] + cumulated[0, 1:]) / 2
    assert (middles < 1).all() and draw(logits.expand(999, -1), middles).tolist() == list(range(1, 1000))


def test_mode_is_restored_and_dropout_is_off_while_sampling(model):
    noisy = random_model(51, EOS, hidden_size=32, num_heads=4, resid_dropout=0.5).train()
    settings = dict(max_new_tokens=10, eos_token_id=EOS, temperature=0)
    assert respond(noisy, prompts(6), **settings).ids == respond(model, prompts(6), **settings).ids
    assert noisy.training and not model.training


def test_under_autocast_the_cache_has_its_dtype(model, monkeypatch):
    caches = []
    spy(monkeypatch, KVCache, "__init__", lambda a, k: caches.append(a[0]))
    settings = dict(max_new_tokens=12, eos_token_id=None, seed=0)
    expected = respond(model, prompts(6), **settings)
    with torch.autocast("cpu", torch.bfloat16):
        responses = respond(model, prompts(6), **settings)
    assert [cache.keys[0].dtype for cache in caches] == [torch.float32, torch.bfloat16]
    firsts = torch.tensor([[logps[0] for logps in r.logps] for r in (expected, responses)])
    assert [ids[0] for ids in responses.ids] == [ids[0] for ids in expected.ids]
    torch.testing.assert_close(firsts[0], firsts[1], atol=0.2, rtol=0)  # Hidden states are bf16.
