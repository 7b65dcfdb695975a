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
import re
from fractions import Fraction

import pytest
import torch
from helpers import ROOT, begin, exact_logps, player_of, random_model
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

import evaluate
import sampling
import spin
from data.examples import Example, as_decoded, decode, encode, fit_context, held_out, load_tokenizer, split
from model import GPTNeo
from player import Player

EOS_TEXT = "<|endoftext|>"


def examples(count: int) -> settings:
    """Settings for `count` examples, without a time limit: time says nothing on a busy machine."""
    slow = [HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=slow)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


seeds, booleans = st.integers(0, 2**32), st.booleans()


# ---------------------------------------------------------------- the model

LAYERS = (("global", "local"), ("local", "global"), ("local", "local"), ("global",), ("local", "global", "local"))


@functools.cache
def twins(layers: tuple[str, ...], window: int, context: int, vocabulary: int) -> tuple[GPTNeo, GPTNeo]:
    """A model and its float64 copy. Its random weights are so large that attention is not flat; no bias is 0 and no
    norm 1. With few tokens, responses often end early."""
    changes = dict(num_layers=len(layers), attention_types=((layers, 1),), window_size=window, initializer_range=0.4)
    model = random_model(vocabulary, 0, max_position_embeddings=context, hidden_size=8, **changes)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter += 0.2 * normal(i, len(parameter))
    return model, copy.deepcopy(model).double()


def some_ids(seed: int, count: int, vocabulary: int) -> list[int]:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


kinds, windows = st.sampled_from(LAYERS), st.integers(1, 9)


@st.composite
def trees(draw) -> list[int]:
    """Marks of a row's tokens: a prompt, then tokens of up to three branches, in order or mixed; padding anywhere."""
    branches = draw(st.lists(st.integers(1, 3), max_size=10))
    marks = [0] * draw(st.integers(0, 6)) + (sorted(branches) if draw(booleans) else branches)
    for place in draw(st.lists(st.integers(0, 16), max_size=6)):
        marks.insert(place, -1)
    return marks


@examples(50)
@given(kinds, windows, st.lists(trees(), min_size=1, max_size=3), booleans, seeds)
def test_segments_equal_rows_of_their_own(layers, window, rows, left, seed):
    """Prompt and branch give what they give in a row by themselves: no branch sees another or padding, positions and
    windows count along the path. Rows are wider than the context at times, paths never."""
    width = max(1, *map(len, rows))
    rows = [[-1] * (width - len(row)) * left + row + [-1] * (width - len(row)) * (not left) for row in rows]
    model, exact = twins(layers, window, 16, 23)
    ids = [some_ids(seed + i, width, 23) for i in range(len(rows))]
    hidden = model(torch.tensor(ids), torch.tensor(rows))
    assert hidden.isfinite().all()
    for row, marks in enumerate(rows):
        for branch in set(marks) - {-1}:
            path = [slot for slot, mark in enumerate(marks) if mark in (0, branch)]
            own = [i for i, slot in enumerate(path) if marks[slot] == branch]
            expected = exact(torch.tensor([[ids[row][slot] for slot in path]]))[0, own]
            torch.testing.assert_close(hidden[row, path][own].double(), expected, atol=5e-5, rtol=0)


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


# ids 0 and 393 are padding and the end-of-sequence token of the run: anywhere in a text they are tokens like others
ids = st.sampled_from([0, 393]) | st.integers(0, 395)
texts = st.sampled_from([3, 8, 1, 28, 2]).flatmap(lambda length: st.lists(ids, min_size=length, max_size=length))
batches = st.sampled_from([2, 1, 4]).flatmap(
    lambda responses: st.lists(st.tuples(*[texts] * (1 + responses)), min_size=2, max_size=4)
)
masked_tokens = st.sampled_from([1024, 40, 0])  # Beyond this number of tokens, a prompt is computed for each response.


@examples(40)
@given(batches, masked_tokens)
def test_response_logps_and_their_gradients_equal_those_of_single_rows(scorer, items, masked):
    player, exact = scorer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Player, "masked_tokens", masked)
        actual = player.response_logps(items)
    expected = exact_logps(exact, items)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, atol=5e-5, rtol=1e-6)
    upstream = normal(0, *expected.shape)
    grads = torch.autograd.grad(actual, list(player.model.parameters()), upstream)
    expected_grads = torch.autograd.grad(expected, list(exact.parameters()), upstream.double())
    for (name, _), a, b in zip(player.model.named_parameters(), grads, expected_grads):
        assert (a - b).norm() <= 1e-4 * (b.norm() + 1e-2), name


@examples(60)
@given(st.lists(st.integers(1, 60), max_size=25), st.integers(1, 150))
def test_micro_batches_partition_within_the_budget(tokens, budget):
    """Each item is in one group; groups, padded to their longest, fit or have one; lengths rise; none ends early."""
    player = player_of(twins(("global",), 4, 24, 6)[0], micro_tokens=budget)
    groups = list(player.micro_batches(tokens))
    assert sorted(i for group in groups for i in group) == list(range(len(tokens)))
    lengths = [[tokens[i] for i in group] for group in groups]
    assert [*itertools.chain(*lengths)] == sorted(tokens)
    for group in lengths:
        assert len(group) == 1 or len(group) * max(group) <= budget
    for group, following in itertools.pairwise(lengths):
        assert (len(group) + 1) * following[0] > budget


@examples(60)
@given(st.integers(1, 300), st.floats(0, 1) | st.sampled_from([0.0, 0.03, 0.1, 0.5, 1.0]))
def test_schedule_rises_to_1_and_falls_towards_0(steps, warmup):
    """Factors in (0, 1] rise to 1 in equal steps while the share lasts, then fall in equal ones; 0 would be next."""
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


def slow_filter(logits: list[float], temperature: float, top_k: int, top_p: float, doubt: float) -> set[int] | None:
    """The tokens that may be drawn; None if rounding decides. Ties at the k-th place all stay."""
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
top_ks = st.sampled_from([0, 1, 2, 5, 100])
top_ps = st.just(1.0) | st.floats(0.01, 0.999)


@examples(100)
@given(rough_logits, st.data(), st.integers(1, 8))
def test_draws_invert_the_cumulative_sum(logits, choose, block):
    """Blocks have any size; excluded tokens are never drawn, not even by the first and last number of the range."""
    kept = choose.draw(st.sets(st.integers(0, len(logits) - 1), min_size=1))
    numbers = st.sampled_from([0.0, 1 - 2**-24]) | st.integers(0, 2**24 - 1).map(lambda n: n / 2**24)
    numbers = choose.draw(st.lists(numbers, min_size=1, max_size=8))
    shift = choose.draw(st.sampled_from([0, 100]))  # exp(100) is no number of fp32
    masked = torch.tensor([[z + shift if token in kept else -math.inf for token, z in enumerate(logits)]])
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


@examples(60)
@given(
    st.sampled_from([(("global", "local"), 4), (("local", "global"), 1), (("local", "global", "local"), 9)]),
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
def test_generation_equals_a_loop_row_by_row(network, lengths, options, prefill, multiple, numbered, choose):
    """Ids, log-probabilities and ends of every row are those that it gets by itself, in float64, without a cache: so
    neither batch mates nor the sizes of batch, cache and prefill matter."""
    model, exact = twins(*network, 24, FEW)
    prompts = [some_ids(options["seed"] + i, length, FEW) for i, length in enumerate(lengths)]
    numbers = st.lists(st.integers(0, 50), min_size=len(prompts), max_size=len(prompts))
    rows = choose.draw(numbers) if numbered else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "PREFILL_TOKENS", prefill)
        patch.setattr(sampling, "READ_MULTIPLE", multiple)
        patch.setattr(sampling, "DRAW_BLOCK", 5)
        responses = sampling.respond(model, prompts, rows=rows, **options)
    assert len(responses.ids) == len(responses.finished) == len(responses.logps) == len(prompts)
    eos, most, filters = options["eos_token_id"], options["max_new_tokens"], ("temperature", "top_k", "top_p")
    for i, (prompt, ids, finished, logps) in enumerate(zip(prompts, *responses)):
        assert 1 <= len(ids) == len(logps) <= most and eos not in ids[:-1]
        assert finished == (ids[-1] == eos) and (finished or len(ids) == most)
        logits = exact.logits(exact(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1])
        uniforms = sampling.uniforms(options["seed"], [rows[i] if numbered else i], most)[0].tolist()
        for n, (token, logp) in enumerate(zip(ids, logps)):
            expected = slow_choice(logits[n], *(options[name] for name in filters), uniforms[n])
            assert token == (token if expected is None else expected)
            assert logp == pytest.approx(logits[n].log_softmax(0)[token].item(), abs=1e-4)


# ---------------------------------------------------------------- data


@functools.cache
def shipped() -> tuple[Tokenizer, Tokenizer, dict[str, int], int]:
    """The embedded task's tokenizer, the same without special tokens, those by their texts, and the one that ends."""
    folder = ROOT / "pronounce/start"
    config, file = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer.json"))
    tokenizer = load_tokenizer(folder, config["eos_token_id"], config["vocab_size"])
    special = {token["content"]: token["id"] for token in file["added_tokens"]}
    return tokenizer, Tokenizer.from_str(json.dumps(file | {"added_tokens": []})), special, config["eos_token_id"]


def slow_ids(text: str, prompt: str = "") -> list[int]:
    """Special texts are tokens by themselves, what is between them is encoded by a tokenizer that has none.

    `prompt` takes the place of {prompt}: in it special texts are text.
    """
    _, plain, special, _ = shipped()
    ids = []
    for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
        filled = part.replace("{prompt}", prompt) if prompt else part
        ids += [special[part]] if part in special else plain.encode(filled).ids
    return ids


# All but halves of surrogate pairs, which no data may hold. st.characters() would first write a table of Unicode.
characters = st.integers(32, 126).map(chr) | st.integers(0, 0x10F7FF).map(lambda n: chr(n + 0x800 * (n >= 0xD800)))
pieces = st.sampled_from(
    [
        "HH AH0", " L OW1", "A", "O", "Y1", " ", "\n", "\n\n### Response: ", "### Instruction: ", "### ", "<|end",
        "{prompt}", "\u00e9", "e\u0301", "\U0001f44d\U0001f3fd", "\u200b", "\u00a0", "\u2028", "\x85", "\r\n", "\0",
    ]
)  # fmt: skip
unicode_text = st.lists(st.text(characters, max_size=5) | pieces, max_size=8).map("".join)
wanted_text = unicode_text.filter(lambda text: text.strip() and EOS_TEXT not in text)


@examples(50)
@given(wanted_text, wanted_text, st.integers(0, 3), unicode_text, unicode_text)
def test_encoding_is_that_of_the_pieces_and_decoding_undoes_it(prompt, response, ends, before, after):
    """Prompt and response are encoded apart; the response gets one end-of-sequence token, however many its text had."""
    tokenizer, _, _, eos = shipped()
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


@examples(40)
@given(st.lists(st.tuples(unicode_text, unicode_text), max_size=12), shares, shares)
def test_held_out_depends_on_the_prompt_alone(records, share, other):
    """A prompt is held out if its hash, as a fraction of 1, is below the share; both parts keep their order."""
    made = [Example("x", i, prompt, response, []) for i, (prompt, response) in enumerate(records)]
    chosen = [e for e in made if Fraction(int(hashlib.sha256(e.prompt.encode()).hexdigest()[:16], 16), 2**64) < share]
    train, heldout = split(made, share)
    assert heldout == chosen and train == [e for e in made if e not in chosen]
    assert not {e.prompt for e in train} & {e.prompt for e in heldout}
    low, high = sorted([share, other])
    assert all(held_out(e.prompt, high) for e in made if held_out(e.prompt, low)), "a larger share keeps the smaller"


@examples(60)
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


@examples(50)
@given(words, st.lists(words, min_size=1, max_size=4), st.sampled_from([" ", "  ", "\n"]))
@example(["A"], [["B"], ["A", "B", "B"]], " ")  # The first reference needs fewer edits, but has a higher rate.
def test_the_nearest_reference_has_the_lowest_error_rate(text, references, space):
    """The rate is edits over the reference's length, one at least; the first of equals counts, white space does not."""
    edits, length = evaluate.nearest_edits(space.join(text), [" ".join(reference) for reference in references])
    rates = [Fraction(slow_distance(text, reference), max(len(reference), 1)) for reference in references]
    best = references[rates.index(min(rates))]
    assert (edits, length) == (slow_distance(text, best), max(len(best), 1))
