"""runtime/evaluate.py: metrics of known responses, standard errors, the KL estimate, edit distances."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import begin, flags, known_model, player_of, script_responses, spy

import spin
from runtime.data import Example
from runtime.evaluate import StartSamples, edit_distance, evaluate, nearest_edits, with_se
from runtime.run import Run


def test_edit_distance_on_known_pairs():
    """In tokens; here letters."""
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert edit_distance("abc", "") == 3


def test_the_nearest_reference_has_the_lowest_error_rate():
    """Not the fewest edits: one of four words is less than one of two."""
    assert nearest_edits("A B C", ["A B", "A B C D"]) == (1, 4)
    assert nearest_edits("A B", ["X", "A B"]) == (0, 2)


def test_standard_errors_of_mean_and_ratio():
    """Of a mean: sqrt(p (1 - p) / n). Of a ratio: against the spread over 2000 resampled data sets."""
    row = with_se("x", [1.0, 0.0, 0.0, 0.0])
    assert row["x"] == 0.25
    assert row["x_se"] == pytest.approx(math.sqrt(0.25 * 0.75 / 4))
    rng = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 9, (300,), generator=rng).double()
    values = weights * 2 + torch.randn(300, generator=rng)
    row = with_se("x", values.tolist(), weights.tolist())
    index = torch.randint(300, (2000, 300), generator=rng)
    resampled = values[index].sum(1) / weights[index].sum(1)
    assert row["x_se"] == pytest.approx(resampled.std().item(), rel=0.1)


def test_evaluation_counts_any_reference_as_right(start, data, tmp_path, monkeypatch):
    player, _, run = begin(start, data, tmp_path / "run")
    samples = StartSamples([(run.heldout[0].prompt_ids, run.heldout[0].real_ids)], [0.0])
    run.heldout = [dataclasses.replace(run.heldout[0], references=["A B", "HH AH0"]), run.heldout[1]]
    right = [*run.tokenizer.encode("HH AH0").ids, run.eos_token_id]
    script_responses(monkeypatch, [right, [1, 2]], [True, False])
    row = evaluate(player, samples, run)
    assert row["greedy"] == row["sampled"] == 0.5
    logps = [logp for (logp,) in player.logps([(e.prompt_ids, e.real_ids) for e in run.heldout])]
    assert row["nll"] == pytest.approx(-sum(logps) / sum(len(e.real_ids) for e in run.heldout))
    sampled = player.logps([(e.prompt_ids, ids) for e, ids in zip(run.heldout, [right, [1, 2]])])
    assert row["entropy"] == pytest.approx(-sum(logp for (logp,) in sampled) / 2)


def test_evaluation_sees_all_held_out_prompts_and_no_other(start, data, tmp_path, monkeypatch):
    """Whatever a run asks a player for, but for the opponent's responses and their scores, is about those prompts."""
    asked, scored = {}, {}
    spy(monkeypatch, Run, "respond", lambda a, k: asked.setdefault(a[3], []).append([e.prompt_ids for e in a[2]]))
    spy(monkeypatch, Run, "logps", lambda a, k: scored.setdefault(a[3], []).append([item[0] for item in a[2]]))
    assert spin.main(flags(start, data, tmp_path / "run")) == 0
    _, _, run = begin(start, data, tmp_path / "again")
    heldout = [e.prompt_ids for e in run.heldout]
    (generated,), (pairs,) = asked.pop("generate"), scored.pop("score")
    assert asked == {"start": [heldout], "greedy": [heldout] * 2, "sampled": [heldout] * 2}
    assert scored == {"start-logps": [heldout], "nll": [heldout] * 2, "kl": [heldout] * 2}
    assert all(prompt not in heldout for prompt in generated + pairs)


def test_kl_to_the_start_is_that_of_the_whole_distribution():
    """One-token responses, where KL(theta_0 || theta) is a sum over 11 tokens: the estimate agrees within 5 se."""
    model = known_model()
    player = player_of(model, micro_tokens=20)
    prompt = [3]
    before = model.logits(model(torch.tensor([prompt])))[0, -1].detach().log_softmax(-1)
    draws = torch.multinomial(before.exp(), 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    sequences = [(prompt, [token]) for token in draws.tolist()]
    start_logps = player.logps(sequences)
    with torch.no_grad():
        model.transformer["ln_f"].weight.mul_(3.0)
    after = model.logits(model(torch.tensor([prompt])))[0, -1].detach().log_softmax(-1)
    exact = (before.exp() * (before - after)).sum().item()
    now = player.logps(sequences)
    estimate = with_se("kl", [a - b for (a,), (b,) in zip(start_logps, now)])
    assert exact > 1e-3
    assert abs(estimate["kl"] - exact) <= 5 * estimate["kl_se"]


def test_the_entropy_is_that_of_the_whole_distribution():
    """One-token responses, where the entropy is a sum over 11 tokens: the estimate agrees within 5 se."""
    model = known_model()
    player = player_of(model, max_new_tokens=1)
    examples = [Example("", 1, "3", "5", ["5"], prompt_ids=[3], real_ids=[5, 10])] * 4000
    run = SimpleNamespace(
        heldout=examples,
        seed=lambda t, purpose: 0,
        text=str,
        respond=lambda player, examples, name, seed, temperature: player.respond(
            [e.prompt_ids for e in examples], seed, temperature=temperature
        ),
        logps=lambda player, items, name: player.logps(items),
    )
    log_p = model.logits(model(torch.tensor([[3]])))[0, -1].detach().log_softmax(-1)
    row = evaluate(player, StartSamples([([3], [5])], [0.0]), run)
    exact = -(log_p.exp() * log_p).sum().item()
    assert 1 < exact and abs(row["entropy"] - exact) <= 5 * row["entropy_se"] < 0.1
