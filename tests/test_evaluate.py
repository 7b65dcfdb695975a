"""evaluate.py: metrics of known responses, standard errors, the KL estimate, equal entropy, edit distances."""

import dataclasses
import math
import random
from types import SimpleNamespace

import pytest
import torch
from helpers import begin, flags, known_model, player_of, script_responses, set_temperature, spy

import evaluate
import spin
from data.examples import Example
from runtime.work import Work


def test_columns_of_functions_and_of_other_methods_have_formats_and_directions():
    names = evaluate.metrics_with(["judge.py:brief", "edit_distance"])
    assert names == [
        "greedy", "sampled", "greedy_error", "sampled_error", "nll",
        "greedy_brief", "sampled_brief", "greedy_edit_distance", "sampled_edit_distance",
    ]  # fmt: skip
    assert [evaluate.column(name).better for name in names] == [1, 1, -1, -1, -1, 1, 1, -1, -1]
    assert [evaluate.column(name).format for name in ("greedy_brief", "sampled_exact", "nll", "other")] == [
        ".3f", ".1%", ".4f", ".3f"
    ]  # fmt: skip


def test_edit_distance_is_that_of_the_whole_table():
    """The textbook's table gives the same distances, on random lists of up to 90 words, longer than a machine word."""
    rng = random.Random(0)
    for sizes in [(0, 3), (3, 0), *((rng.randrange(90), rng.randrange(90)) for _ in range(100))]:
        a, b = ([rng.choice("abc") for _ in range(size)] for size in sizes)
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            diagonal, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
        assert evaluate.edit_distance(a, b) == row[-1]


def test_standard_errors_are_the_spread_over_resampled_data():
    """Errors of a mean and its paired change have a closed form; a ratio's are compared with 2000 resampled sets."""
    mean, error, _ = evaluate.ratio_of((value, 1.0) for value in (1.0, 0.0, 0.0, 0.0))
    assert mean == 0.25 and error == pytest.approx(math.sqrt(0.25 * 0.75 / 4))
    before, now = ([{"values": {"x": (v, 1.0)}} for v in values] for values in ([0, 1, 0, 1], [1, 1, 0, 1]))
    assert evaluate.changes(before, now)["x"] == (0.25, pytest.approx(math.sqrt(0.75**2 + 3 * 0.25**2) / 4))
    assert evaluate.changes(now, now)["x"] == (0.0, 0.0)
    rng = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 9, (2, 300), generator=rng).double()
    noise = torch.randn(300, generator=rng)  # Both iterates share this noise.
    values = [weights[0] * 2 + 3 * noise, weights[1] * 1.5 + 3 * noise + torch.randn(300, generator=rng)]
    index = torch.randint(300, (2000, 300), generator=rng)
    before, now = (v[index].sum(1) / w[index].sum(1) for v, w in zip(values, weights))
    _, error, _ = evaluate.ratio_of(zip(values[0].tolist(), weights[0].tolist()))
    assert error == pytest.approx(before.std().item(), rel=0.1)
    rows = [[{"values": {"x": pair}} for pair in zip(v.tolist(), w.tolist())] for v, w in zip(values, weights)]
    assert evaluate.changes(*rows)["x"][1] == pytest.approx((now - before).std().item(), rel=0.1)


def test_an_iterate_is_better_or_worse_than_the_start_by_more_than_two_standard_errors():
    """Few examples require more standard errors; one example, an error of 0 or changes all alike decide nothing."""
    for name, change, error, examples, expected in (
        ("nll", -0.21, 0.1, 1000, 1), ("nll", -0.2, 0.1, 1000, 0), ("greedy", -1, 0.1, 1000, -1),
        ("entropy", 1, 0.1, 1000, 0), ("greedy", 0.5, 0.1, 3, 0), ("greedy", 0.6, 0.1, 3, 1),
        ("greedy", 1, 0, 1000, 0), ("nll", 1, 1e-17, 4, 0), ("nll", 1, 0.01, 1, 0),
    ):  # fmt: skip
        assert evaluate.verdict({"examples": examples, "since_start": {name: (change, error)}}, name) == expected
    rows = [{"iterate": 0, "nll": 1.0}]
    assert evaluate.verdict(rows[0], "nll") == evaluate.best_of(rows, "nll") == 0
    rows += [{"iterate": t, "nll": nll, "since_start": {"nll": (nll - 1, 0.1)}} for t, nll in ((1, 0.5), (2, 0.6))]
    assert evaluate.best_of(rows, "nll") == 1


def test_chance_alone_is_called_a_change_in_4_55_percent_whatever_the_number_of_examples():
    """Quantiles are those of the GUM's table G.2; then pure noise gives the share of changes called significant."""
    for freedom, expected in {1: 13.97, 2: 4.53, 3: 3.31, 4: 2.87, 5: 2.65, 10: 2.28, 20: 2.13, 50: 2.05}.items():
        quantile = evaluate.significant_errors(freedom + 1) / math.sqrt(1 + 1 / freedom)
        assert quantile == pytest.approx(expected, rel=0.004)
    assert evaluate.significant_errors(1) == math.inf
    assert evaluate.significant_errors(10_000) == pytest.approx(2, abs=1e-3)
    for n in (2, 3, 10):
        noise = torch.randn(100_000, n, generator=torch.Generator().manual_seed(n))
        errors = noise.std(1, correction=0) / math.sqrt(n)  # the estimate of `changes`
        share = (noise.mean(1).abs() > evaluate.significant_errors(n) * errors).float().mean()
        assert share == pytest.approx(0.0455, abs=0.003)


def test_evaluation_counts_any_reference_as_right(start, data, tmp_path, monkeypatch):
    """References count at every temperature. The KL is negative if the player is likelier than the start."""
    player, _, run = begin(start, data, tmp_path / "run")
    run = run.work
    samples = evaluate.StartSamples([(e.prompt_ids, e.real_ids) for e in run.heldout[:2]], [-1000.0, -1000.0])
    run.heldout = [dataclasses.replace(run.heldout[0], references=["A B", "HH AH0"]), run.heldout[1]]
    right = [*run.tokenizer.encode("HH AH0").ids, run.eos_token_id]
    script_responses(monkeypatch, [right, [1, 2]], [True, False])
    found = evaluate.answers(player, samples, run)
    evaluate.add_temperatures(player, found, run)
    assert [row["by_temperature"]["0.8"]["sampled"] for row in found] == [(1.0, 1.0), (0.0, 1.0)]
    row = evaluate.summary(found)
    assert row["greedy"] == row["sampled"] == 0.5
    logps = [logp for (logp,) in player.logps([(e.prompt_ids, e.real_ids) for e in run.heldout])]
    assert row["nll"] == pytest.approx(-sum(logps) / sum(len(e.real_ids) for e in run.heldout))
    assert row["kl"] == pytest.approx(-1000 - sum(logps) / 2)
    assert row["entropy"] == (len(right) + 2) / 2


def test_evaluation_sees_all_held_out_prompts_and_no_other(start, data, tmp_path, monkeypatch):
    """Whatever a run asks a player for, but for the opponent's responses and their scores, is about those prompts.

    Iterates draw the same random numbers; the start's responses, which estimate the KL, are drawn at temperature 1.
    """
    asked, scored, respond = {}, {}, Work.respond

    def spied(work, player, examples, name, seed, temperature=1.0, **options):
        asked.setdefault(name, []).append(([e.prompt_ids for e in examples], seed, temperature))
        assert name == "generate" or not {"top_k", "top_p"} & options.keys()
        return respond(work, player, examples, name, seed, temperature, **options)

    monkeypatch.setattr(Work, "respond", spied)
    spy(monkeypatch, Work, "logps", lambda a, k: scored.setdefault(a[3], []).append([item[0] for item in a[2]]))
    assert spin.main(flags(start, data, tmp_path / "run", temperature=0.9, top_k=9, prompts=8)) == 0
    _, _, run = begin(start, data, tmp_path / "again")
    run = run.work
    heldout = [e.prompt_ids for e in run.heldout]
    ((generated, *_),), (pairs,) = asked.pop("generate"), scored.pop("score")
    seed = run.seed(0, "evaluate")
    assert asked == {
        "start": [(heldout, run.seed(0, "kl"), 1.0)],
        "greedy": [(heldout, seed, 0.0)] * 2,
        "sampled": [(heldout, seed, 1.0)] * 2,
        "sampled-0.8": [(heldout, seed, 0.8)],
    }
    assert scored == {
        "start-logps": [heldout], "nll": [heldout] * 2, "kl": [heldout] * 2, "entropy-0.8": [heldout]
    }  # fmt: skip
    assert all(prompt not in heldout for prompt in generated + pairs)


def test_kl_and_entropy_are_those_of_the_whole_distribution():
    """Responses have one token, so KL(theta_0 || theta) and entropy are sums over 11 tokens: both agree within 5 se."""
    model = known_model()
    player = player_of(model, max_new_tokens=1, micro_tokens=20)
    examples = [Example("", 1, "3", "5", ["5"], prompt_ids=[3], real_ids=[5, 10])] * 3000

    def log_p():
        return model.logits(model(torch.tensor([[3]])))[0, -1].detach().log_softmax(-1)

    before, rng = log_p(), torch.Generator().manual_seed(0)
    draws = torch.multinomial(before.exp(), len(examples), replacement=True, generator=rng)
    sequences = [([3], [token]) for token in draws.tolist()]
    samples = evaluate.StartSamples(sequences, [logp for (logp,) in player.logps(sequences)])
    with torch.no_grad():
        model.transformer["ln_f"].weight.mul_(2.0)
    run = SimpleNamespace(heldout=examples, metrics={}, seed=lambda *_: 0, text=str, pieces=lambda *_: [])
    run.logps = lambda player, items, name, by_token=False: player.logps(items)
    run.respond = lambda player, some, name, seed, temperature, with_logps: player.respond(
        [e.prompt_ids for e in some], seed, temperature=temperature, with_logps=with_logps
    )
    row, after = evaluate.evaluate(player, samples, run), log_p()
    kl, entropy = (before.exp() * (before - after)).sum().item(), -(after.exp() * after).sum().item()
    assert 1e-3 < kl and abs(row["kl"] - kl) <= 5 * row["kl_se"]
    assert 1 < entropy and abs(row["entropy"] - entropy) <= 5 * row["entropy_se"] < 0.1


def at_temperatures(sets, n, temperatures, metric, noise, seed):
    """Held-out rows, as of `answers`, of models at temperatures, in many data sets. The first temperature is 1."""
    draws = torch.randn(sets, n, len(temperatures), 2, generator=torch.Generator().manual_seed(seed))
    entropy = 10 * torch.tensor(temperatures) + draws[..., 0]
    sampled = metric(10 * torch.tensor(temperatures)) + noise * draws[..., 1]

    def values(entropy, sampled):
        return {"entropy": (entropy, 1.0), "sampled": (sampled, 1.0), "sampled_error": (2.0, 4.0)}

    return [
        [
            {"values": values(*one), "by_temperature": {str(t): values(*o) for t, o in zip(temperatures[1:], others)}}
            for one, *others in rows
        ]
        for rows in torch.stack([entropy, sampled], -1).tolist()
    ]


@pytest.mark.parametrize("gain", [0.0, 0.03])
def test_a_gain_at_equal_entropy_is_what_a_lower_temperature_does_not_give(gain):
    """A synthetic iterate that is only colder gains nothing; the temperature of equal entropy is found."""
    temperatures = (1.0, 0.6, 0.8, 1.2)
    (start,) = at_temperatures(1, 4000, temperatures, lambda entropy: 0.9 - 0.005 * entropy**2, 0.1, 0)
    (now,) = at_temperatures(1, 4000, (0.9,), lambda entropy: 0.9 - 0.005 * entropy**2 + gain, 0.1, 1)
    found = evaluate.at_equal_entropy(start, now)
    assert found["temperature"] == pytest.approx(0.9, abs=0.01)
    assert abs(found["sampled"][0] - gain) <= 3 * found["sampled"][1] < 0.01
    assert found["sampled_error"] == pytest.approx((0.0, 0.0), abs=1e-9), "the same at every entropy"
    assert evaluate.at_equal_entropy(now, start) == {}, "beyond the only temperature"
    (colder,) = at_temperatures(1, 4000, (0.7,), lambda entropy: entropy, 0.1, 1)
    swapped = [{"0.6": b["0.6"], "0.8": b["1.2"], "1.2": b["0.8"]} for b in (row["by_temperature"] for row in start)]
    disorder = [row | {"by_temperature": points} for row, points in zip(start, swapped)]
    assert evaluate.at_equal_entropy(start, colder) and evaluate.at_equal_entropy(disorder, colder) == {}
    unchanged = evaluate.at_equal_entropy([{"values": row["values"]} for row in start], start)
    assert unchanged == {"temperature": 1.0, "sampled": (0.0, 0.0), "sampled_error": (0.0, 0.0)}


def test_the_standard_error_at_equal_entropy_is_the_spread():
    """The spread is over 200 data sets. The metric is flat at the iterate's entropy; noise counts at the start's."""

    def metric(entropy):
        return 0.005 * (entropy - 9) ** 3

    start = at_temperatures(200, 40, (1.0, 0.6, 0.8, 1.2), metric, 0.01, 0)
    now = at_temperatures(200, 40, (0.9,), metric, 0.01, 1)
    changes, errors = zip(*(evaluate.at_equal_entropy(*rows)["sampled"] for rows in zip(start, now)))
    assert sum(errors) / 200 == pytest.approx(torch.tensor(changes).std().item(), rel=0.15)


def test_a_polynomial_is_reproduced_by_interpolation():
    xs = [0.5, 1.0, 2.0, 2.5]
    weights = evaluate.interpolation(1.7, xs)
    assert sum(w * (x**3 - 2 * x) for w, x in zip(weights, xs)) == pytest.approx(1.7**3 - 2 * 1.7)
    assert evaluate.interpolation(2.0, xs) == pytest.approx([0, 0, 1, 0])


def test_a_model_that_is_only_sharper_gains_nothing_at_equal_entropy(start, data, tmp_path):
    """Logits divided by 0.7 are sampled like the start at temperature 0.7, example by example."""
    player, _, run = begin(start, data, tmp_path / "run", eval_temperatures=[0.6, 0.7, 1, 1.3], metric="edit_distance")
    samples = evaluate.sample_start(player, run.work)
    before = evaluate.answers(player, samples, run.work)
    evaluate.add_temperatures(player, before, run.work)
    assert [point["temperature"] for point in evaluate.frontier(before)] == [0.6, 0.7, 1.0, 1.3]
    entropies = [point["entropy"] for point in evaluate.frontier(before)]
    assert entropies == sorted(entropies)
    set_temperature(player, 0.7)
    now = evaluate.answers(player, samples, run.work)
    for row, sharper in zip(before, now):
        at = row["by_temperature"]["0.7"]
        assert at["sampled_error"] == sharper["values"]["sampled_error"]
        assert at["sampled_edit_distance"] == sharper["values"]["sampled_edit_distance"]
        assert at["entropy"][0] == pytest.approx(sharper["values"]["entropy"][0], rel=1e-4)
    found = evaluate.at_equal_entropy(before, now)
    assert found["temperature"] == pytest.approx(0.7, abs=1e-3)
    assert found["sampled_error"] == pytest.approx((0.0, 0.0), abs=1e-3)
    assert set(found) == {"temperature", "sampled", "sampled_error", "sampled_edit_distance"}
