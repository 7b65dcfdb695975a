"""Properties over random inputs, each against a slow and obvious reference written here: loops, float64, big integers.

The examples are the same in every run (derandomize): they depend only on the code of this file and, because Hypothesis
looks there for telling numbers and texts, of the modules that are loaded. Where rounding could decide, such as between
two tokens of almost equal probability, the reference says that it is in doubt, and nothing is compared.
"""

import copy
import functools
import hashlib
import itertools
import json
import math
import random
import re
from contextlib import contextmanager
from fractions import Fraction
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, begin, player_of
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

import evaluate
import player as player_module
import sampling
import spin
from data.examples import (
    Example,
    as_decoded,
    decode,
    encode,
    fit_context,
    held_out,
    load_tokenizer,
    split,
)
from kernels import linear_logprobs, logprobs, tiles, token_logprobs
from model import GPTNeo, GPTNeoConfig
from player import Player
from sampling import KVCache, filter_logits

EOS_TEXT = "<|endoftext|>"


def examples(count: int) -> settings:
    """This many examples, without a time limit: time says nothing on a busy machine."""
    slow = [HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=slow)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


seeds, booleans = st.integers(0, 2**32), st.booleans()


# ---------------------------------------------------------------- kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GRAD_RTOL = dict(zip(DTYPES, (5e-5, 2e-3, 1e-2)))  # 16 bits round to 2^-12 and 2^-9


def slow_logprobs(
    logits: Tensor, targets: list[int], ignore_index: int, upstream: list[float]
) -> tuple[Tensor, Tensor]:
    """(N,) values and (N, V) gradients, number by number in float64."""
    values, grads = [], []
    for row, target, factor in zip(logits.tolist(), targets, upstream):
        top, counts = max(row), target != ignore_index
        total = math.fsum(math.exp(z - top) for z in row)
        values.append(row[target] - top - math.log(total) if counts else 0.0)
        grads += [factor * counts * ((v == target) - math.exp(z - top) / total) for v, z in enumerate(row)]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(grads, dtype=torch.float64).view(logits.shape)


def kernel_case(seed: int) -> dict:
    """Sizes that are no multiple of anything; rows are ignored by an id outside the vocabulary or by one inside it.

    All from one seed, since Hypothesis varies what it has drawn before, and here little is learned from a like size.
    """
    pick = random.Random(seed)
    N, V, D = pick.choice([0, 1, 3, 4, 5, 5]), pick.randint(1, 70), pick.randint(1, 20)
    ignore_index = pick.choice([-100, 0, V - 1, 2**40])
    return {
        "V": V, "D": D, "ignore_index": ignore_index, "seed": seed, "scale": pick.choice([0.0, 0.3, 1.0, 1.0, 4.0]),
        "targets": [pick.choice([pick.randrange(V), pick.randrange(V), ignore_index]) for _ in range(N)],
        "upstream": [pick.choice([1.0, -0.5, 3.0, 0.0]) for _ in range(N)], "dtype": pick.choice(DTYPES),
        "cut": (pick.randint(1, 4), V // pick.randint(1, 4) + 1),
        "layouts": pick.choices(["plain", "columns first", "inside another"], k=2),
    }  # fmt: skip


kernel_cases = st.integers(0, 2**48).map(kernel_case)


@contextmanager
def tiles_of(rows: int, columns: int):
    """Tiles so small that a few numbers go through every loop.

    New memory holds nan, as it may: no result can come from what was never written.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "tile_shape", lambda device, N, V, D, bytes_per_logit: (rows, columns))
        patch.setattr(logprobs, "scratch_rows", lambda V: rows)
        torch.use_deterministic_algorithms(True)  # It also fills new memory with nan.
        assert torch.zeros(1).new_empty(3).isnan().all()
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    if layout == "columns first":
        return matrix.t().contiguous().t()
    return F.pad(matrix, (3, 2))[:, 3:-2] if layout == "inside another" else matrix


def assert_within(actual: Tensor, expected: Tensor, error: Tensor | float) -> None:
    assert actual.shape == expected.shape and actual.isfinite().all()
    assert ((actual.double() - expected).abs() <= error).all()


@examples(100)
@given(kernel_cases)
def test_token_logprobs_equal_the_textbook(case):
    """Values and gradients, whatever the sizes, dtype, strides, ignored rows and chunks."""
    targets, upstream, ignore_index = case["targets"], case["upstream"], case["ignore_index"]
    logits = (5 * case["scale"] * normal(case["seed"], len(targets), case["V"])).to(case["dtype"])
    logits = laid_out(logits, case["layouts"][0]).requires_grad_()
    expected, expected_grad = slow_logprobs(logits.double(), targets, ignore_index, upstream)
    with tiles_of(*case["cut"]):
        actual = token_logprobs(logits, torch.tensor(targets, dtype=torch.int64), ignore_index)
        (grad,) = torch.autograd.grad(actual, logits, torch.tensor(upstream))
    assert_within(actual, expected, 2e-6 * (1 + logits.detach().abs().double().amax() if targets else 1))
    assert_within(grad, expected_grad, GRAD_RTOL[case["dtype"]] * expected_grad.abs() + 1e-5)
    assert grad.dtype == case["dtype"] and actual.dtype == torch.float32


@examples(100)
@given(kernel_cases)
def test_linear_logprobs_equal_the_textbook(case):
    """The same from hidden states, whichever gradients are wanted: each is made in a way of its own."""
    targets, upstream, dtype = case["targets"], case["upstream"], case["dtype"]
    hidden = case["scale"] * normal(case["seed"], len(targets), case["D"])
    hidden = laid_out(hidden.to(dtype), case["layouts"][0])
    weight = laid_out(normal(case["seed"] + 1, case["V"], case["D"]).to(dtype), case["layouts"][1])
    h, w = hidden.double(), weight.double()
    expected, d_logits = slow_logprobs(h @ w.T, targets, case["ignore_index"], upstream)
    largest = (h.abs() @ w.abs().T).amax() if targets else 0.0  # what the sums of a logit run up to
    for wanted in ([hidden], [weight], [hidden, weight], []):
        for tensor in (hidden, weight):
            tensor.requires_grad_(any(tensor is other for other in wanted))
        with tiles_of(*case["cut"]):
            actual = linear_logprobs(hidden, weight, torch.tensor(targets, dtype=torch.int64), case["ignore_index"])
            grads = torch.autograd.grad(actual, wanted, torch.tensor(upstream)) if wanted else ()
        assert_within(actual, expected, 2e-6 * (1 + largest))
        assert actual.dtype == torch.float32 and actual.requires_grad == bool(wanted)
        for tensor, grad in zip(wanted, grads):
            a, b = (d_logits, w) if tensor is hidden else (d_logits.T, h)
            assert grad.dtype == dtype
            assert_within(grad, a @ b, GRAD_RTOL[dtype] * (a.abs() @ b.abs()) + 2e-5 * (1 + b.abs().sum(0)))


# ---------------------------------------------------------------- the model

LAYERS = (("global", "local"), ("local", "global"), ("local", "local"), ("global",), ("local", "global", "local"))
VOCABULARY = 23


@functools.cache
def tiny_model(layers: tuple[str, ...], window: int, context: int, vocabulary: int = VOCABULARY) -> GPTNeo:
    """Random weights large enough that attention is not flat; no bias is 0 and no norm 1."""
    config = GPTNeoConfig(
        vocab_size=vocabulary, max_position_embeddings=context, hidden_size=8, num_layers=len(layers), num_heads=2,
        attention_types=((layers, 1),), window_size=window, initializer_range=0.4, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPTNeo(config).init_weights(torch.Generator().manual_seed(0)).eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter += 0.2 * normal(i, len(parameter))
    return model


def slow_hidden(model: GPTNeo, ids: list[int]) -> Tensor:
    """(T, D) float64: GPT-Neo one token and one head at a time, each looking at a list of what came before."""
    config, w = model.config, {name: value.double() for name, value in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean()
        centred /= (centred.square().mean() + config.layer_norm_epsilon).sqrt()
        return centred * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)

    xs = [w["transformer.wte.weight"][token] + w["transformer.wpe.weight"][t] for t, token in enumerate(ids)]
    for layer, kind in enumerate(config.attention_layers):
        name = f"transformer.h.{layer}"
        keys, values = [], []
        for t, x in enumerate(xs):
            q, k, v = (linear(norm(x, f"{name}.ln_1"), f"{name}.attn.attention.{which}_proj") for which in "qkv")
            keys.append(k)
            values.append(v)
            first = max(0, t + 1 - config.window_size) if kind == "local" else 0
            heads = []
            for head in torch.arange(config.hidden_size).chunk(config.num_heads):
                scores = torch.stack([key[head] @ q[head] for key in keys[first:]])
                heads.append(sum(p * value[head] for p, value in zip(scores.softmax(0), values[first:])))
            x = x + linear(torch.cat(heads), f"{name}.attn.attention.out_proj")
            inner = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
            inner = inner / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
            xs[t] = x + linear(inner, f"{name}.mlp.c_proj")
    return torch.stack([norm(x, "transformer.ln_f") for x in xs])


def some_ids(seed: int, count: int, vocabulary: int = VOCABULARY) -> list[int]:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_hidden(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=5e-5, rtol=0)


kinds, windows = st.sampled_from(LAYERS), st.integers(1, 9)


@examples(60)
@given(kinds, windows, st.integers(1, 24), seeds)
def test_plain_rows_equal_a_pass_token_by_token(layers, window, length, seed):
    """Local attention in blocks sees the window and no more, whether the row is a multiple of it or not."""
    model, rows = tiny_model(layers, window, 24), [some_ids(seed + i, length) for i in range(2)]
    for actual, row in zip(model(torch.tensor(rows)), rows):
        assert_hidden(actual, slow_hidden(model, row))


@st.composite
def trees(draw) -> list[int]:
    """Marks of a row's tokens: a prompt, then tokens of up to three branches, in order or mixed; padding anywhere."""
    branches = draw(st.lists(st.integers(1, 3), max_size=10))
    marks = [0] * draw(st.integers(0, 6)) + (sorted(branches) if draw(booleans) else branches)
    for place in draw(st.lists(st.integers(0, 16), max_size=6)):
        marks.insert(place, -1)
    return marks


@examples(100)
@given(kinds, windows, st.lists(trees(), min_size=1, max_size=3), booleans, seeds)
def test_segments_equal_rows_of_their_own(layers, window, rows, left, seed):
    """Prompt and branch as in a row by themselves: no branch sees another or padding, positions and windows count
    along the path. Rows are wider than the context at times, paths never."""
    width = max(1, *map(len, rows))
    rows = [[-1] * (width - len(row)) * left + row + [-1] * (width - len(row)) * (not left) for row in rows]
    model, ids = tiny_model(layers, window, 16), [some_ids(seed + i, width) for i in range(len(rows))]
    hidden = model(torch.tensor(ids), torch.tensor(rows))
    assert hidden.isfinite().all()
    for row, marks in enumerate(rows):
        for branch in set(marks) - {-1}:
            path = [slot for slot, mark in enumerate(marks) if mark in (0, branch)]
            own = [i for i, slot in enumerate(path) if marks[slot] == branch]
            expected = slow_hidden(model, [ids[row][slot] for slot in path])
            assert_hidden(hidden[row, path][own], expected[own])


@examples(50)
@given(
    kinds, windows, seeds,
    st.lists(
        st.tuples(
            st.dictionaries(st.integers(0, 3), st.integers(1, 9), min_size=1), st.integers(0, 5), st.integers(0, 4)
        ),
        min_size=1, max_size=4,
    ),
    st.none() | st.lists(st.integers(0, 3), min_size=1, unique=True),
)  # fmt: skip
def test_decoding_with_a_cache_equals_the_full_pass(layers, window, seed, rounds, kept):
    """Rounds of new prompts for some of four slots, whoever had them before, and of steps of all slots at once.

    At the end slots may be dropped or change places, and one more step is made.
    """
    room = 9 + sum(steps for _, steps, _ in rounds) + 1
    model = tiny_model(layers, window, 32)
    cache, texts, seen = KVCache(model, 4, room), [[] for _ in range(4)], [[] for _ in range(4)]

    def step(slack: int) -> None:
        nonlocal seed
        seed += 1
        tokens = some_ids(seed, len(texts))
        cache.read_length = min(room, max(map(len, texts)) + 1 + slack)
        hidden = model.decode(torch.tensor(tokens), cache.lengths, cache.masks(), cache.append)
        for slot, text in enumerate(texts):
            if text:  # slots never filled idle
                text.append(tokens[slot])
                seen[slot].append(hidden[slot])
                cache.lengths[slot] += 1

    def check(slot: int) -> None:
        if texts[slot]:
            assert_hidden(torch.stack(seen[slot]), slow_hidden(model, texts[slot]))

    for prompts, steps, slack in rounds:
        for slot, length in prompts.items():
            check(slot)
            seed += 1
            texts[slot] = some_ids(seed, length)
        slots, lengths, width = list(prompts), torch.tensor(list(prompts.values())), max(prompts.values())
        padded = torch.tensor([texts[slot] + [0] * (width - len(texts[slot])) for slot in slots])
        hidden = model(padded, update_cache=partial(cache.fill, torch.tensor(slots), lengths))
        cache.lengths[slots] = lengths
        for row, slot in enumerate(slots):
            seen[slot] = [*hidden[row, : lengths[row]]]
        for _ in range(steps):
            step(slack)
    if kept is not None:
        cache.keep_rows(torch.tensor(kept))
        texts, seen = ([side[slot] for slot in kept] for side in (texts, seen))
        step(0)
    for slot in range(len(texts)):
        check(slot)


# ---------------------------------------------------------------- log-probabilities of responses


@pytest.fixture(scope="module")
def scorer(start, data, tmp_path_factory) -> tuple[Player, GPTNeo]:
    """A player whose biases and norms are random too, and a float64 copy of its model."""
    player, _, _ = begin(start, data, tmp_path_factory.mktemp("properties") / "run", rank=0)
    with torch.no_grad():
        for i, parameter in enumerate(player.model.parameters()):
            if parameter.dim() == 1:
                parameter += 0.2 * normal(i, len(parameter))
    return player, copy.deepcopy(player.model).double()


def slow_logp(exact: GPTNeo, prompt: list[int], response: list[int]) -> Tensor:
    """log p(response | prompt), a pass for each token, of the tokens before it and nothing else."""
    total = 0.0
    for n, token in enumerate(response):
        last = exact(torch.tensor([prompt + response[:n]]))[0, -1]
        total = total + exact.logits(last).log_softmax(0)[token]
    return total


def slow_logps(exact: GPTNeo, items: list[tuple[list[int], ...]]) -> Tensor:
    """(R, B): the first responses of all items, then the second ones, ..."""
    return torch.stack([torch.stack([slow_logp(exact, i[0], i[n]) for i in items]) for n in range(1, len(items[0]))])


# ids 0 and 393 are padding and the end-of-sequence token of the run: anywhere in a text they are tokens like others
ids = st.sampled_from([0, 393]) | st.integers(0, 395)
texts = st.sampled_from([3, 8, 1, 28, 2]).flatmap(lambda length: st.lists(ids, min_size=length, max_size=length))
batches = st.sampled_from([2, 1, 4]).flatmap(
    lambda responses: st.lists(st.tuples(*[texts] * (1 + responses)), min_size=2, max_size=4)
)
masked_tokens = st.sampled_from([1024, 40, 0])  # rows beyond it compute a prompt for each response


@contextmanager
def masks_up_to(tokens: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(player_module.Player, "masked_tokens", tokens)
        yield


@examples(80)
@given(batches, masked_tokens)
@torch.no_grad()
def test_response_logps_equal_a_loop_over_tokens(scorer, items, masked):
    player, exact = scorer
    with masks_up_to(masked):
        actual = player.response_logps(items)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), slow_logps(exact, items), atol=5e-5, rtol=1e-6)


@examples(20)
@given(batches, masked_tokens)
def test_gradients_of_response_logps_equal_those_of_the_loop(scorer, items, masked):
    player, exact = scorer
    with masks_up_to(masked):
        actual = player.response_logps(items)
    expected = slow_logps(exact, items)
    upstream = normal(0, *expected.shape)
    grads = torch.autograd.grad(actual, list(player.model.parameters()), upstream)
    expected_grads = torch.autograd.grad(expected, list(exact.parameters()), upstream.double())
    for (name, _), a, b in zip(player.model.named_parameters(), grads, expected_grads):
        assert (a - b).norm() <= 1e-4 * (b.norm() + 1e-2), name


@examples(60)
@given(batches, masked_tokens, st.sampled_from([1000, 100, 40, 1]), st.data())
def test_logps_do_not_depend_on_the_batch(scorer, items, masked, micro_tokens, choose):
    """Items in any order, some twice, at any size of micro-batches: each has the log-probabilities it has alone."""
    player = player_of(scorer[0].model, micro_tokens=micro_tokens)
    order = choose.draw(st.lists(st.integers(0, len(items) - 1), min_size=2, max_size=6))
    alone = [player.logps([item])[0] for item in items]
    with masks_up_to(masked):
        together = player.logps([items[i] for i in order])
    assert [len(logps) for logps in together] == [len(items[0]) - 1] * len(order)
    for i, logps in zip(order, together):
        assert logps == pytest.approx(alone[i], abs=5e-5)


@examples(200)
@given(st.lists(st.integers(1, 60), max_size=25), st.integers(1, 150))
def test_micro_batches_partition_within_the_budget(tokens, budget):
    """Every item once; groups fit, padded to their longest, or hold one item; from short to long; none ends early."""
    player = player_of(tiny_model(("global",), 4, 24), micro_tokens=budget)
    groups = list(player.micro_batches(tokens))
    assert sorted(i for group in groups for i in group) == list(range(len(tokens)))
    lengths = [[tokens[i] for i in group] for group in groups]
    assert [*itertools.chain(*lengths)] == sorted(tokens)
    for group in lengths:
        assert len(group) == 1 or len(group) * max(group) <= budget
    for group, following in itertools.pairwise(lengths):
        assert (len(group) + 1) * following[0] > budget


@examples(200)
@given(st.integers(1, 300), st.floats(0, 1) | st.sampled_from([0.0, 0.03, 0.1, 0.5, 1.0]))
def test_schedule_rises_to_1_and_falls_towards_0(steps, warmup):
    """In (0, 1]; equal steps up to 1 while the share lasts, then equal steps down that would reach 0 one step later."""
    factors = [spin.schedule(step, steps, warmup) for step in range(steps)]
    rise = 0
    while rise < warmup * steps:
        rise += 1
    up = [Fraction(step, rise) for step in range(1, rise + 1)]
    down = [Fraction(left, steps - rise) for left in range(steps - rise, 0, -1)]
    assert factors == pytest.approx([*map(float, up + down)], abs=1e-12)
    assert all(0 < factor <= 1 for factor in factors) and max(factors) == 1
    assert factors[:rise] == sorted(factors[:rise]) and factors[rise:] == sorted(factors[rise:], reverse=True)


# ---------------------------------------------------------------- sampling


def slow_uniform(seed: int, row: int, number: int) -> float:
    """SplitMix64 as published, on Python's integers: the counter's step, two rounds of xor-shift and multiply, a last
    xor-shift; then the 53 highest bits."""
    word = 2**64
    state = int(hashlib.sha256(f"{seed}/{row}".encode()).hexdigest()[:16], 16)
    for _ in range(number + 1):
        state = (state + 0x9E3779B97F4A7C15) % word
    z = state
    z = (z ^ z // 2**30) * 0xBF58476D1CE4E5B9 % word
    z = (z ^ z // 2**27) * 0x94D049BB133111EB % word
    z = z ^ z // 2**31
    return z // 2**11 / 2**53


def slow_filter(logits: list[float], temperature: float, top_k: int, top_p: float, doubt: float) -> set[int] | None:
    """The tokens that may be drawn; None where rounding decides. Ties at the k-th place all stay."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if 0 < top_k < len(order):
        last = logits[order[top_k - 1]]
        if any(0 < abs(z - last) <= doubt for z in logits):
            return None
        order = [token for token in order if logits[token] >= last]
    weights = [math.exp((logits[token] - logits[order[0]]) / temperature) for token in order]
    kept, before = set(), 0.0
    for token, weight in zip(order, weights):
        if top_p < 1 and abs(before - top_p) <= doubt:
            return None
        if top_p == 1 or before < top_p:
            kept.add(token)
        before += weight / math.fsum(weights)
    return kept


def slow_draw(logits: list[float], kept: set[int], temperature: float, uniform: float, doubt: float) -> int | None:
    """Walks along the tokens until their probabilities have added up to more than `uniform`."""
    top = max(logits)
    weights = [math.exp((z - top) / temperature) if token in kept else 0.0 for token, z in enumerate(logits)]
    total, below = math.fsum(weights), 0.0
    drawn = None
    for token, weight in enumerate(weights):
        if weight and abs(below + weight - uniform * total) <= doubt * total:
            return None
        below += weight
        if drawn is None and below > uniform * total:
            drawn = token
    return drawn


# quarters: equal logits are common, and no two are nearly equal
rough_logits = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=30)
temperatures = st.sampled_from([0.3, 0.7, 1.0, 1.5])
top_ks = st.sampled_from([0, 1, 2, 5, 100])
top_ps = st.just(1.0) | st.floats(0.01, 0.999)


@examples(300)
@given(rough_logits, temperatures, top_ks, top_ps)
def test_filters_keep_the_right_tokens(logits, temperature, top_k, top_p):
    """Logits over temperature where kept. Of equal logits top-p may keep any, but as many as the loop does."""
    kept = slow_filter(logits, temperature, top_k, top_p, 1e-5)
    assume(kept is not None)
    (actual,) = filter_logits(torch.tensor([logits]), temperature, top_k, top_p).tolist()
    ours = {token for token, z in enumerate(actual) if z != -math.inf}
    assert sorted(logits[token] for token in ours) == sorted(logits[token] for token in kept)
    assert all(actual[token] == pytest.approx(logits[token] / temperature, rel=1e-6, abs=1e-6) for token in ours)
    if len(set(logits)) == len(logits):
        assert ours == kept


@examples(300)
@given(rough_logits, st.data(), st.integers(1, 8))
def test_draws_invert_the_cumulative_sum(logits, choose, block):
    """For blocks of any size; what is excluded is never drawn, not even by the first and last number of the range."""
    kept = choose.draw(st.sets(st.integers(0, len(logits) - 1), min_size=1))
    numbers = st.sampled_from([0.0, 1 - 2**-24]) | st.integers(0, 2**24 - 1).map(lambda n: n / 2**24)
    numbers = choose.draw(st.lists(numbers, min_size=1, max_size=8))
    masked = torch.tensor([[z if token in kept else -math.inf for token, z in enumerate(logits)]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "DRAW_BLOCK", block)
        tokens = sampling.draw(masked.expand(len(numbers), -1), torch.tensor(numbers)).tolist()
    for token, uniform in zip(tokens, numbers):
        expected = slow_draw(logits, kept, 1.0, uniform, 1e-6)
        assert token in kept and token == (token if expected is None else expected)


def slow_choice(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: float) -> int | None:
    logits = logits.tolist()
    if temperature == 0:
        best, second = sorted(logits)[-1:-3:-1]
        return logits.index(best) if best - second > 1e-3 else None
    kept = slow_filter(logits, temperature, top_k, top_p, 1e-4)
    return None if kept is None else slow_draw(logits, kept, temperature, uniform, 1e-4)


FEW = 6


@functools.cache
def twins() -> tuple[GPTNeo, GPTNeo]:
    """A model of so few tokens that rows often end early, and its float64 copy."""
    model = tiny_model(("global", "local"), 4, 24, FEW)
    return model, copy.deepcopy(model).double()


@examples(80)
@given(
    st.lists(st.integers(1, 12), min_size=4, max_size=8),
    st.fixed_dictionaries(
        {
            "max_new_tokens": st.sampled_from([12, 5, 1]), "eos_token_id": st.sampled_from([*range(FEW), None]),
            "temperature": st.sampled_from([1.0, 0.0, 0.7, 1.5]), "top_k": top_ks, "top_p": top_ps, "seed": seeds,
            "batch_size": st.sampled_from([8, 4, 3, 1]), "cache_tokens": st.sampled_from([1000, 70, 1]),
        }
    ),
    st.integers(1, 30), st.integers(1, 10), booleans, st.data(),
)  # fmt: skip
@torch.no_grad()
def test_generation_equals_a_loop_row_by_row(lengths, options, prefill, multiple, numbered, choose):
    """Ids, log-probabilities and ends of every row are those that it gets by itself, in float64, a full pass for each
    token: so neither batch mates nor the sizes of batch, cache and prefill matter."""
    model, exact = twins()
    prompts = [some_ids(options["seed"] + i, length, FEW) for i, length in enumerate(lengths)]
    numbers = st.lists(st.integers(0, 50), min_size=len(prompts), max_size=len(prompts))
    rows = choose.draw(numbers) if numbered else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "PREFILL_TOKENS", prefill)
        patch.setattr(sampling, "READ_MULTIPLE", multiple)
        patch.setattr(sampling, "DRAW_BLOCK", 5)
        responses = sampling.respond(model, prompts, rows=rows, **options)
    assert len(responses.ids) == len(responses.finished) == len(responses.logps) == len(prompts)
    eos, most = options["eos_token_id"], options["max_new_tokens"]
    for i, (prompt, ids, finished, logps) in enumerate(zip(prompts, *responses)):
        assert 1 <= len(ids) == len(logps) <= most and eos not in ids[:-1]
        assert finished == (ids[-1] == eos) and (finished or len(ids) == most)
        for n, (token, logp) in enumerate(zip(ids, logps)):
            logits = exact.logits(exact(torch.tensor([prompt + ids[:n]]))[0, -1])
            uniform = slow_uniform(options["seed"], rows[i] if numbered else i, n)
            expected = slow_choice(logits, *(options[name] for name in ("temperature", "top_k", "top_p")), uniform)
            assert token == (token if expected is None else expected)
            assert logp == pytest.approx(logits.log_softmax(0)[token].item(), abs=1e-4)


# ---------------------------------------------------------------- data


def byte_letters() -> list[str]:
    """GPT-2's letter of each byte: itself where it prints, else one of those from 256 on, in order."""
    letters, spare = [], 256
    for byte in range(256):
        prints = chr(byte).isprintable() and chr(byte) != " "
        letters.append(chr(byte if prints else spare))
        spare += not prints
    return letters


LETTERS = byte_letters()


def slow_bpe(text: str, vocabulary: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    """Joins the two neighbours of the lowest rank, the leftmost first, until no two may be joined."""
    parts = [LETTERS[byte] for byte in text.encode()]
    while found := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]:
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [vocabulary[part] for part in parts]


@functools.cache
def shipped() -> tuple[Tokenizer, int, dict]:
    folder = ROOT / "pronounce/start"
    config = json.loads((folder / "config.json").read_text())
    tokenizer = load_tokenizer(folder, config["eos_token_id"], config["vocab_size"])
    return tokenizer, config["eos_token_id"], json.loads((folder / "tokenizer.json").read_text())


def slow_ids(text: str, prompt: str = "") -> list[int]:
    """The shipped tokenizer: special texts are tokens by themselves, byte-pair encoding of all that is between them.

    `prompt` takes the place of {prompt}: in it special texts are text.
    """
    _, _, file = shipped()
    special = {token["content"]: token["id"] for token in file["added_tokens"]}
    ranks = {tuple(pair): rank for rank, pair in enumerate(file["model"]["merges"])}
    ids = []
    for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
        filled = part.replace("{prompt}", prompt) if prompt else part
        ids += [special[part]] if part in special else slow_bpe(filled, file["model"]["vocab"], ranks)
    return ids


characters = st.characters(codec="utf-8")  # all but halves of surrogate pairs, which `load_examples` refuses
pieces = st.sampled_from(
    [
        "HH AH0", " L OW1", "A", "O", "Y1", " ", "\n", "\n\n### Response: ", "### Instruction: ", "### ", "<|end",
        "{prompt}", "\u00e9", "e\u0301", "\U0001f44d\U0001f3fd", "\u200b", "\u00a0", "\u2028", "\x85", "\r\n", "\0",
    ]
)  # fmt: skip
unicode_text = st.lists(st.text(characters, max_size=5) | pieces, max_size=8).map("".join)
wanted_text = unicode_text.filter(lambda text: text.strip() and EOS_TEXT not in text)


@examples(200)
@given(wanted_text, wanted_text, st.integers(0, 3), unicode_text, unicode_text)
def test_encoding_equals_the_loop_and_decoding_undoes_it(prompt, response, ends, before, after):
    """Prompt and response apart, whatever could merge across; one end-of-sequence token however many the text had."""
    tokenizer, eos, _ = shipped()
    assume("{prompt}" not in before + after)
    one = Example("x", 1, prompt, response + ends * EOS_TEXT, [response, "other", response + EOS_TEXT])
    encode([one, Example("x", 2, "P", "R", ["R"])], tokenizer, before + "{prompt}" + after, eos)
    assert one.prompt_ids == slow_ids(before + "{prompt}" + after, prompt)
    assert one.real_ids == [*slow_ids(response), eos] and one.real_ids.count(eos) == 1
    assert one.tokens == len(one.prompt_ids) + len(one.real_ids)
    assert decode(one.real_ids, tokenizer, eos) == response.strip()
    as_decoded([one], tokenizer, eos)
    assert one.references == [response.strip(), "other", response.strip()]


digits = st.integers(1, 9)
shares = st.floats(0, 1) | st.sampled_from([0.05, 0.5])


@examples(100)
@given(st.lists(st.tuples(unicode_text, unicode_text), max_size=12), shares, shares)
def test_held_out_depends_on_the_prompt_alone(records, share, other):
    """A prompt is held out where its hash, as a fraction of 1, is below the share; both parts keep their order."""
    made = [Example("x", i, prompt, response, []) for i, (prompt, response) in enumerate(records)]
    chosen = [e for e in made if Fraction(int(hashlib.sha256(e.prompt.encode()).hexdigest()[:16], 16), 2**64) < share]
    train, heldout = split(made, share)
    assert heldout == chosen and train == [e for e in made if e not in chosen]
    assert not {e.prompt for e in train} & {e.prompt for e in heldout}
    low, high = sorted([share, other])
    assert all(held_out(e.prompt, high) for e in made if held_out(e.prompt, low)), "a larger share keeps the smaller"


@examples(100)
@given(st.lists(st.tuples(digits, digits), min_size=1, max_size=8), st.integers(2, 18), digits)
def test_fit_context_keeps_what_fits(lengths, context, new):
    """Prompt and real response fit, and prompt and longest generated response; what does not is named or counted."""
    made = [
        Example(f"x:{i}", i, "p", "r", [], prompt_ids=[1] * p, real_ids=[1] * r) for i, (p, r) in enumerate(lengths)
    ]
    fits = [e for e, (p, r) in zip(made, lengths) if p + r <= context and p + new <= context]
    if not fits:
        with pytest.raises(ValueError, match=r"^x:0 and all after it: no example fits"):
            fit_context(made, context, new, "skip")
    else:
        assert fit_context(made, context, new, "skip") == (fits, len(made) - len(fits))
    if fits == made:
        assert fit_context(made, context, new, "error") == (made, 0)
    else:
        first = next(e for e in made if e not in fits)
        with pytest.raises(ValueError, match=f"^{first.where}: needs"):
            fit_context(made, context, new, "error")


# ---------------------------------------------------------------- statistics


def slow_distance(a: list[str], b: list[str]) -> int:
    """Delete, insert or replace the first word, whichever leads to the fewest edits in all."""
    if not a or not b:
        return len(a) + len(b)
    replace = slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(replace, slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1)


words = st.lists(st.sampled_from(["A", "B", "CC"]), max_size=5)


@examples(100)
@given(words, st.lists(words, min_size=1, max_size=4), st.sampled_from([" ", "  ", "\n"]))
@example(["A"], [["B"], ["A", "B", "B"]], " ")  # fewer edits, but a higher rate
def test_the_nearest_reference_has_the_lowest_error_rate(text, references, space):
    """Edits over the reference's length, one at least; the first of equals; white space does not matter."""
    edits, length = evaluate.nearest_edits(space.join(text), [" ".join(reference) for reference in references])
    rates = [Fraction(slow_distance(text, reference), max(len(reference), 1)) for reference in references]
    best = references[rates.index(min(rates))]
    assert (edits, length) == (slow_distance(text, best), max(len(best), 1))


@examples(150)
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(1, 20)), min_size=1, max_size=12))
def test_standard_errors_in_exact_numbers(pairs):
    """se^2 = sum (v - ratio w)^2 / (sum w)^2 in fractions; n copies of the data have 1 / sqrt(n) of its error."""
    exact = [(Fraction(v), Fraction(w)) for v, w in pairs]
    total = sum(w for _, w in exact)
    ratio = sum(v for v, _ in exact) / total
    variance = sum((v - ratio * w) ** 2 for v, w in exact) / total**2
    found, error, _ = evaluate.ratio_of(pairs)
    assert (found, error) == pytest.approx((float(ratio), math.sqrt(variance)), abs=1e-9)
    assert evaluate.ratio_of(pairs * 4)[:2] == pytest.approx((found, error / 2), abs=1e-9)
