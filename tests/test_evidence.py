"""benchmarks/evidence.py: its cases, a run of all its parts, and that documents say what was measured."""

import dataclasses
import functools
import gzip
import itertools
import json

import documents
import evidence
import evidence_report
import numpy as np
import pytest
import theory
import torch
from evidence import CASES, STARTS, STORED
from evidence_cases import Case
from helpers import OPTIONS, ROOT

from runtime.options import parse


def test_documents_and_figure_say_what_is_stored():
    """Every table between markers is made again from the stored results, which are those of cases that exist."""
    found = json.loads(STORED.read_text())
    for name in documents.DOCUMENTS:
        text = (ROOT / name).read_text()
        assert documents.with_blocks(text, "evidence", functools.partial(evidence_report.block, found)) == text
    assert evidence_report.FIGURE.read_text() == evidence_report.settings(found)
    assert found["runs"].keys() <= {key for case in CASES for key in case.runs}
    assert all(row["commit"] for part in ("starts", "runs") for row in found[part].values())


def test_what_was_measured_elsewhere_is_kept_and_gets_no_further_run(tmp_path):
    """Weights are not stored. Another training of a start is another start, with which stored runs share nothing."""
    found = json.loads(STORED.read_text())
    with pytest.raises(SystemExit, match=r"the runs from converged are stored, but .* lacks that start; --out FILE"):
        evidence.play([case for case in CASES if case.start == "converged"], found, tmp_path, map, None)
    assert evidence.summary(found["runs"], tmp_path, found["summary"]) == found["summary"]


def test_every_case_parses_and_has_a_control_of_equal_cost(tmp_path):
    """The control of a case has twice its epochs on the same prompts; no setting stands twice in a regime."""
    controls = {case.group for case in CASES if case.is_control}
    assert len({(case.regime, case.key) for case in CASES}) == len(CASES)
    for case in (case for case in CASES if case.script):  # All but placebos are trained.
        assert case.group in controls, case.key
        args = parse(OPTIONS[case.script], evidence.words_of_run(case, 3, tmp_path, tmp_path / "run"), case.script)
        play = STARTS[case.start].play
        assert (args.prompts, args.iterations, args.seed) == (case.prompts, case.iterations, 3)
        assert args.data == (f"{tmp_path}/{play}.jsonl",)
        assert play == "eight" or set(args.epochs) == {2 if case.script == "sft" else 1}


def test_all_parts_on_a_tiny_start(tmp_path, monkeypatch):
    """Data, starts, all kinds of run and the summary are made; what is done is not done again."""
    few = dataclasses.replace(STARTS["few words"], flags="--epochs 1 --lr 1e-3", width=8)
    monkeypatch.setitem(STARTS, "few words", few)
    monkeypatch.setitem(STARTS, "draws", dataclasses.replace(STARTS["underfitted"], draws=2))
    size = dict(seeds=1, prompts=40, iterations=1, iterates=(1,))
    cases = [Case("few words", "few words", "SPIN", "--lr 1e-9", "spin", **size)]
    cases += [Case("few words", "few words", f"supervised, lr {r}", f"--lr {r}", "sft", **size) for r in (1e-9, 1e-2)]
    size |= dict(iterations=2, iterates=(1, 2))
    cases += [Case("start", "underfitted", "SPIN", "--lr 1e-9", "spin", **size)]
    cases += [Case("start", "underfitted", "supervised, lr 1e-9", "--lr 1e-9", "sft", **size)]
    size |= dict(iterations=1, iterates=(1,), first_seed=5)
    cases += [Case("placebo", "draws", "the start itself", "--placebo", "", **size)]
    monkeypatch.setattr(evidence, "CASES", cases)
    monkeypatch.setattr(evidence, "TEMPERATURES", (0.5, 0.8, 0.9, 1.0, 1.2))
    found, asked, saved = {"starts": {}, "runs": {}, "summary": [], "commit": "0"}, [], []

    def each(function, jobs):
        return map(function, [asked.append(job) or job for job in jobs])

    sizes = dict(words=100, few=40, test=16, lines=10)
    for name, source in (("data", "pronounce/cmudict.jsonl.gz"), ("glosses", "glosses/glosses.jsonl.gz")):
        with gzip.open(ROOT / source, "rt") as file:
            (tmp_path / f"{name}.jsonl").write_text("".join(itertools.islice(file, 1000)))
        sizes[name] = str(tmp_path / f"{name}.jsonl")
    evidence.play(cases, found, tmp_path / "work", each, lambda: saved.append(1), **sizes)
    assert len(saved) == 3 + 6
    found = json.loads(json.dumps(found))
    first, *_, once, twice, _, _, placebo = found["summary"]
    assert "control" not in placebo and placebo["over start"]["best_nll"][0] == pytest.approx(0, abs=1e-6)
    assert placebo["over start"]["sampled_error"][0] != 0
    for row in (first, once, twice):  # A learning rate of 1e-9 changes nothing, so the row is level with its start.
        for value, *_ in row["over start"].values():
            assert value == pytest.approx(0, abs=1e-3)
    assert first["control"] == "supervised, lr 0.01", "the control with the lowest NLL"
    assert first["over supervised"]["best_nll"][0] < 0 and evidence_report.prepared(found)[3]["verdict"] == "level"
    asked.clear()
    evidence.play(cases, found, tmp_path / "work", each, None, **sizes)
    assert len(asked) == 2, "the two trained or shipped places are looked for"


def test_a_mean_has_the_errors_of_examples_and_of_seeds():
    """The mean's error adds that over examples, of the seeds' mean, and that over seeds."""
    rng = np.random.default_rng(0)
    a, b = ((rng.random(100) < p).astype(float) for p in (0.5, 0.9))
    mean, error, freedom = evidence.with_error([a, b])
    over_examples, over_seeds = ((a + b) / 2).std() / 10, abs(a.mean() - b.mean()) / 2
    assert (mean, error) == pytest.approx(((a.mean() + b.mean()) / 2, np.hypot(over_examples, over_seeds)))
    assert freedom == pytest.approx(error**4 / (over_examples**4 / 99 + over_seeds**4 / 1))


def test_all_seeds_of_a_row_are_compared_at_the_same_temperatures():
    """The second seed's hottest point is beyond its control's, so the first's, which is worse there, does not count."""
    control = np.ones((4, 4, 50)) * np.arange(1, 5)[:, None, None]
    first, second = control.copy(), control.copy()
    first[3, 1] -= 1
    second[3, 0] += 1
    mine, theirs = [{"frontier": frontier} for frontier in (first, second)], [{"frontier": control}] * 2
    assert evidence.leads(mine, theirs)["sampled"][0] == pytest.approx(0, abs=1e-9)
    assert evidence.leads(mine[:1], theirs[:1])["sampled"][0] == pytest.approx(-0.25)


@pytest.mark.parametrize(
    "t, freedom, normal", [(4.3027, 2, 1.96), (2.2281, 10, 1.96), (8.6103, 4, 3.2905), (31.599, 2, 3.2905)]
)
def test_a_lead_over_few_seeds_is_judged_by_students_t(t, freedom, normal):
    """The cases are quantiles of two-sided probability 5% and 0.1%, from tables."""
    assert evidence_report.normal_errors(-t, 1.0, freedom) == pytest.approx(-normal, abs=1e-3)
    assert evidence_report.normal_errors(0.03, 0.01, 2500) == pytest.approx(3, abs=5e-3)
    assert [evidence_report.sign([some * t, 1.0, freedom]) for some in (0.9, -2)] == [0, -1 if t > 5 else 0]


# ---------------------------------------------------------------- theory


def exponents(temperature: float, beta: float, iterations: int) -> list[float]:
    """Exponents of the iterates p_data^g if a response is one choice: g -> g + (1 - g / T) / beta, which ends at T."""
    found = [1.0]
    for _ in range(iterations):
        found.append(found[-1] + (1 - found[-1] / temperature) / beta)
    return found


@pytest.mark.parametrize("temperature, beta", [(1.5, 1), (1.5, 3), (0.8, 2)])
def test_iterates_of_a_softmax_table_have_the_exponents_of_the_closed_form(temperature, beta):
    """The table is trained on the expected loss, for responses of one token."""
    logits = theory.DATA
    for expected in exponents(temperature, beta, 4)[1:]:
        generated = (logits.log_softmax(0) / temperature).softmax(0)
        logits = theory.played(lambda logits: logits.log_softmax(0), logits, theory.DATA.exp(), generated, beta)
        assert theory.coefficients(logits, theory.DATA) == [pytest.approx(expected, abs=1e-3)]


@pytest.mark.parametrize("temperature, beta", [(1.5, 1), (0.8, 2)])
def test_sequences_end_at_data_that_is_tempered_token_by_token(temperature, beta):
    """Tempering is not by response: each token counts by itself, so the slope over responses is not the exponent."""
    first, *rows, last = theory.sequence_game(temperature, beta, 4)
    expected = exponents(temperature, beta, 4)[-1]
    for row in (*rows, last):
        assert row["closed form"] < 1e-3
    assert first["slope"] == pytest.approx(1) and first["nats per token"] == pytest.approx(0, abs=1e-9)
    assert last["by token"] < 2e-3 * first["by token"] and last["by response"] > 0.01
    assert last["slope at equal length"] == pytest.approx(expected, abs=0.01)
    assert abs(last["slope"] - expected) > 0.03 and last["nats per token"] * (temperature - 1) > 0.02


def test_sequences_are_all_there_and_greedy_is_the_limit_of_low_temperatures():
    table = theory.random_table(1)
    for temperature in (0.7, 1.0, 0.0):
        assert float(theory.sequence_logps(table, temperature).exp().sum()) == pytest.approx(1)
    greedy, cold = (theory.sequence_logps(table, temperature).exp() for temperature in (0.0, 3e-4))
    torch.testing.assert_close(greedy, cold)


@pytest.mark.parametrize("start", ["flatter", "sharper", "other", "data"])
def test_the_first_gradient_is_the_supervised_one_at_temperature_1_and_another_with_a_greedy_opponent(start):
    sampled, greedy = (theory.first_gradients(start, temperature) for temperature in (1.0, 0.0))
    assert sampled["spin"] == pytest.approx(sampled["supervised"], abs=1e-12)
    assert greedy["spin"] > max(0.1, 5 * greedy["supervised"])
    if start != "data":  # At the data the supervised gradient is 0 and has no direction.
        assert sampled["cosine"] == pytest.approx(1) and abs(greedy["cosine"]) < 0.7


def test_self_play_ends_at_the_likeliest_model_even_where_that_is_not_the_data():
    """A model of one parameter ends at its optimum at temperature 1, not with a hot opponent or a small beta."""
    steps = theory.limited_capacity(1, 1, 6)
    assert steps[0] > 0.05 and steps[1] > 1e-4 and abs(steps[-1]) < 1e-7
    slower = theory.limited_capacity(1, 3, 6)
    assert all(0 < after < before for before, after in itertools.pairwise(slower))
    assert theory.limited_capacity(1, 0.3, 6)[-1] > 1 and theory.limited_capacity(1.5, 1, 6)[-1] > 0.01
