"""benchmarks/real_model.py: all of its parts on a tiny model, its numbers by a second way, and its rules."""

import dataclasses
import json
import re
import shutil

import documents
import numpy as np
import pytest
import real_model
import real_model_report
import torch
from helpers import ROOT, rows
from measuring import loaded
from real_model import Size
from real_model_report import Report

from model import GPTNeo, GPTNeoConfig


@pytest.mark.parametrize("size", real_model.SIZES)
def test_documents_and_figure_say_what_is_stored(size):
    stored = ROOT / f"benchmarks/results/smollm2-{size}.json"
    if not stored.exists():
        return
    report = Report(json.loads(stored.read_text()), loaded(stored.with_suffix(".npz")))
    for name in documents.DOCUMENTS:
        text = (ROOT / name).read_text()
        assert documents.with_blocks(text, f"smollm2 {size}", report.block) == text
    assert stored.with_suffix(".svg").read_text() == report.figure()
    assert stored.with_suffix(".md").read_text() == report.page()


@pytest.fixture
def base(tmp_path):
    """A tiny model with random weights and the tokenizer of the definitions."""
    config = GPTNeoConfig.from_json(ROOT / "glosses/start/config.json")
    torch.manual_seed(0)
    GPTNeo(dataclasses.replace(config, hidden_size=16)).save_pretrained(tmp_path / "base")
    shutil.copy(ROOT / "glosses/start/tokenizer.json", tmp_path / "base")
    return tmp_path / "base"


def test_all_parts_on_a_tiny_model(base, tmp_path, monkeypatch, capsys):
    """Every arm is trained and asked; what is done is not done again; results of another commit are refused."""
    monkeypatch.setitem(real_model.SIZES, "tiny", Size(8, 4, 4, 12, 4, start_epochs=2, iterations=1, rates=1, seeds=1))
    monkeypatch.setattr(real_model, "COMMON", real_model.COMMON.replace("--max-new-tokens 48", "--max-new-tokens 6"))
    monkeypatch.setattr(real_model_report, "write_all", lambda *args: None)
    monkeypatch.setattr(real_model, "current_commit", lambda: "abc")
    out = tmp_path / "results.json"
    argv = ["--size", "tiny", "--model", str(base), "--work", str(tmp_path / "work"), "--out", str(out)]
    threads = ["--threads", str(torch.get_num_threads())]  # Other files' tests go on in this process.
    real_model.main([*argv, "--minutes", "0", *threads])  # one part, then it goes on
    real_model.main([*argv, *threads])
    found, values = json.loads(out.read_text()), loaded(out.with_suffix(".npz"))
    assert [row["arm"] for row in found["trials"].values()] == list(real_model.ARMS)
    assert set(found["models"]) == {"start", "untouched"}
    assert {(len(values[f"{key}/nll"]), len(values[f"{key}/summed"])) for key in found["trials"]} == {(8, 16)}
    report = Report(found, values)
    assert report.block("about").startswith(f"{len(real_model.ARMS)} trials, 0 not run")
    for block in ("table", "verdict"):
        assert report.block(block).count("\n") > 2
    assert report.answers().count("\n") == 2 + 4 and " | ".join(sorted(real_model.ARMS)) in report.answers()
    assert report.figure().count("<title>") == len(real_model.ARMS), "a spot for each trial"
    capsys.readouterr()
    real_model.main([*argv, *threads])
    assert capsys.readouterr().out == report.about()
    monkeypatch.setattr(real_model, "current_commit", lambda: "def")
    with pytest.raises(SystemExit, match="begun with commit abc, now def"):
        real_model.main(argv)


def test_a_judge_is_not_asked_about_kinds_that_are_trained_on(tmp_path):
    size = Size(50, 10, 10, 60, 5)
    real_model.write_data(size, tmp_path)
    lines = {path.stem: rows(path) for path in tmp_path.glob("*.jsonl")}
    kinds = {name: [line["prompt"].rpartition(" of ")[2] for line in some] for name, some in lines.items()}
    judged = kinds["heldout"][size.tuning + size.test :]
    assert len(judged) >= size.tuning + size.choice
    assert min(map(judged.count, judged)) >= 9
    assert not set(judged) & {*kinds["start"], *kinds["fresh"]}
    prompts = [line["prompt"] for name in ("start", "fresh", "heldout") for line in lines[name]]
    assert len(set(prompts)) == len(prompts)
    texts = [line["response"] for name in ("start", "fresh", "heldout") for line in lines[name]]
    assert len(set(texts)) == len(texts), "no definition is trained on and asked for"
    assert all(line["generated"] != line["response"] for line in lines["pairs"])


def test_further_seeds_have_the_rates_that_are_best_on_the_tuning_words():
    """The second rate of every arm has the best NLL on the tuning words, the first one on the test words, and both have
    equal choices: then the first one stands for them."""
    size = Size(8, 1, 1, 1, 1, iterations=1, rates=2, seeds=2)
    found, values = {"size": dataclasses.asdict(size), "trials": {}}, {}
    grid = [(arm, rates[i], 0) for i in (0, 1) for arm, (*_, rates) in real_model.ARMS.items()]
    for arm, rate, seed in grid:
        second, key = rate == real_model.ARMS[arm][2][1], f"{arm} | {rate} | {seed} | 1"
        found["trials"][key] = {"arm": arm, "rate": rate, "seed": seed, "iterate": 1, "seconds": 1.0}
        nll = np.array([1.0, 2.0] if second else [2.0, 1.0])
        values |= {f"{key}/{name}": nll for name in ("nll", "best_nll")}
        values |= {f"{key}/{name}": np.ones(2) for name in ("summed", "per_token", "tokens")}
    again = [(arm, rate, 1) for arm, (*_, rates) in real_model.ARMS.items() for rate in (rates[1], rates[0])]
    assert list(real_model.trials(size, found, values)) == grid + again


def test_the_figure_joins_the_rates_of_an_arm_from_the_lowest_to_the_highest():
    size, rates = dataclasses.asdict(Size(8, 0, 1, 1, 1, iterations=1)), ("--lr 1e-5 --beta 1", "--lr 3e-6 --beta 1")
    found, values = {"size": size, "trials": {}}, {}
    for name, rate, nll in [("start", "", 0.0), ("one", rates[0], 3.0), ("two", rates[1], 1.0), ("three", "--lr 2", 2)]:
        if rate:
            found["trials"][name] = {"arm": "B", "rate": rate, "seed": 0, "iterate": 1}
        values |= {f"{name}/{measure}": np.array([nll]) for measure in ("best_nll", "summed")}
        values |= {f"{name}/{measure}": np.ones(1, int) for measure in ("tokens", "kinds")}
    figure = Report(found, values).figure()
    dots = dict(re.findall(r'<circle cx="([0-9.]+) *" cy="([0-9.]+)"[^>]*><title>', figure))
    assert len(dots) == 3
    two, _, one = sorted(dots, key=float)  # The NLL goes to the right.
    assert f'd="M{two} {dots[two]}L{one} {dots[one]}"' in figure


def test_errors_of_choices_are_those_of_kinds():
    """Questions of one kind that change together count as one: the error is that of the mean of four kinds."""
    kinds, of_kinds = np.repeat([2, 3, 5, 7], 25), np.array([1.0, -1.0, 0.0, 2.0])
    each = np.repeat(of_kinds, 25)
    assert real_model_report.error_of(each, kinds) == (pytest.approx(of_kinds.std() / 2), 3)
    alternating = np.tile([1.0, -1.0], 50)  # Within a kind it cancels, over words it does not.
    assert real_model_report.error_of(alternating, kinds) == (pytest.approx(0.1), 99)
    assert real_model_report.error_of(each, None) == (pytest.approx(of_kinds.std() / 10), 99)


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ([[[4, 1, 999]], [[4, 1, 999]], [[4, 1, 999]]], "SPIN is supported by 1 of 2 seeds, and so is the opponent"),
        ([[[4, 1, 999]], [[4, 1, 999]], [[2, 1, 999]]], "SPIN is supported by 1 of 2 seeds, its opponent is not"),
        ([[[4, 1, 999]], [[4, 1, 5]], [[4, 1, 999]]], "better than the start"),  # Student's t with few kinds
        ([[[4, 1, 999], [2, 1, 999]], [[4, 1, 999]] * 2, []], ""),
    ],
)
def test_rules(over, expected):
    over = {name: [tuple(lead) for lead in leads] for name, leads in zip(("start", "A", "R"), over)}
    assert real_model_report.ruling(over, len(over["start"])) == expected


def test_repetition():
    assert real_model.repeats("a kind of a kind of bird")
    assert not real_model.repeats("a kind of bird, a kind that flies")
