"""benchmarks/real_model.py: all of its parts on a tiny model, its numbers by a second way, and its rules."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import real_model
import real_model_report
import torch
from helpers import ROOT, known_model, player_of, rows
from real_model import Size

from model import GPTNeo, GPTNeoConfig


@pytest.mark.parametrize("size", real_model.SIZES)
def test_documents_and_figure_say_what_is_stored(size):
    stored = ROOT / f"benchmarks/results/smollm2-{size}.json"
    if not stored.exists():
        return
    found = json.loads(stored.read_text())
    for name in real_model_report.DOCUMENTS:
        text = (ROOT / name).read_text()
        assert real_model_report.filled(text, found, size) == text
    assert stored.with_suffix(".svg").read_text() == real_model_report.figure(found)


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
    found = json.loads(out.read_text())
    assert [row["arm"] for row in found["summary"]] == list(real_model.ARMS)
    assert found["left"] == []
    assert set(found["models"]) == {"start", "untouched"}
    values = real_model.unpacked(out.with_suffix(".npz"))
    asked = [values[row["key"]] for row in found["summary"]]
    assert {(len(some["nll"]), len(some["summed"])) for some in asked} == {(8, 16)}
    for block in ("about", "changes", "verdict", "answers"):
        assert getattr(real_model_report, block)(found).count("\n") > 0
    assert real_model_report.figure(found).count("<circle") == 2 * len(real_model.ARMS)
    capsys.readouterr()
    real_model.main([*argv, *threads])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(real_model, "current_commit", lambda: "def")
    with pytest.raises(SystemExit, match="results of commit abc, now def"):
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
    assert all(line["generated"] != line["response"] for line in lines["pairs"])


def test_errors_of_choices_are_those_of_kinds():
    """Questions of one kind that change together count as one: the error is that of the mean of four kinds."""
    kinds = np.repeat(np.arange(4), 25)
    of_kinds, size = np.array([1.0, -1.0, 0.0, 2.0]), Size(tuning=0)
    error = real_model.error_of(of_kinds[kinds], {"kinds": kinds}, "summed", size)
    assert error == pytest.approx(of_kinds.std() / 2)
    alternating = np.tile([1.0, -1.0], 50)  # Within a kind it cancels, over words it does not.
    assert real_model.error_of(alternating, {"kinds": kinds}, "summed", size) == pytest.approx(0.1)
    assert real_model.error_of(of_kinds[kinds], {}, "nll", size) == pytest.approx(of_kinds.std() / 10)


def test_log_probabilities_at_several_temperatures():
    player = player_of(known_model())
    items = [([1, 2], [3, 4, 0]), ([2], [1, 0])]
    found = real_model.logps_at(player, items, (1.0, 1.5))
    for row, temperature in zip(found, (1.0, 1.5)):
        assert np.allclose(row, np.array(player.logps(items, temperature=temperature))[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ([[[4, 1]], [[4, 1]], [[4, 1]]], "SPIN is supported by 1 of 2 seeds, and so is the opponent"),
        ([[[4, 1]], [[4, 1]], [[2, 1]]], "SPIN is supported by 1 of 2 seeds, its opponent is not"),
        ([[[4, 1]], [[2, 1]], [[4, 1]]], "better than the start"),
        ([[[4, 1], [2, 1]], [[4, 1]] * 2, []], ""),
    ],
)
def test_rules(over, expected):
    over = dict(zip(("start", "A", "R"), over))
    row = {"arm": "B", "measure": "summed", "over": over}
    assert real_model_report.ruling(row, len(over["start"])) == expected


def test_repetition():
    assert real_model.repeats("a kind of a kind of bird")
    assert not real_model.repeats("a kind of bird, a kind that flies")
