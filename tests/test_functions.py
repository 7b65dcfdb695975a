"""runtime/functions.py: metrics of --metric in the run, in its files, in --best and in respond.py; results of scorers.

test_family.py tests runs with --scorer.
"""

import contextlib
import json
import shutil

import pytest
from helpers import die_at, failed, flags, refused, rows, small, tree

import spin
from methods import family
from runtime import functions
from runtime.functions import load_metrics
from runtime.run import Run
from runtime.stopping import Stopped

SHARE = "def vowels(prompt, response, references):\n    return sum(c in 'AEIOU' for c in response) / 7 + len(prompt)\n"


def share(prompt, response):
    return sum(c in "AEIOU" for c in response) / 7 + len(prompt)


@pytest.fixture
def metric(tmp_path):
    (tmp_path / "mine.py").write_text(SHARE)
    return f"{tmp_path}/mine.py:vowels"


def test_a_metric_is_computed_for_both_responses_and_shown_beside_the_others(metric, start, data, tmp_path, capsys):
    """The metric is in the rows, the table, the plot and the changes; --best may name it; a shipped metric joins it."""
    argv = [*flags(start, data, tmp_path / "run", best="sampled_vowels", prompts=8), "--metric", metric, "exact"]
    assert spin.main(argv) == 0
    printed = capsys.readouterr().out
    metrics = rows(tmp_path / "run/metrics.jsonl")
    for t, row in enumerate(metrics):
        lines = rows(tmp_path / f"run/heldout-{t}.jsonl")
        for decoding in ("greedy", "sampled"):
            values = [share(line["prompt"], line[decoding]) for line in lines]
            assert [line["values"][f"{decoding}_vowels"][0] for line in lines] == values
            assert row[f"{decoding}_vowels"] == sum(values) / len(values) and f"{decoding}_vowels_se" in row
            assert f"{decoding}_exact" in row
            others = [line.get("by_temperature", {}).get("0.8", {}).get("sampled_vowels", [0])[0] for line in lines]
            assert (others == [0] * len(lines)) == (t > 0) and others != values, "other responses at 0.8"
    assert "greedy_vowels" in metrics[1]["since_start"] and "greedy vowels +" in printed
    assert "sampled vowels" in printed.partition("Held-out metrics")[2]
    assert "by sampled vowels" in printed and "sampled vowels" in (tmp_path / "run/metrics.svg").read_text()
    assert json.loads((tmp_path / "run/run.json").read_text())["best"]["metric"] == "sampled_vowels"


def test_a_resumed_run_finds_the_metrics_that_were_computed(metric, start, data, tmp_path, monkeypatch):
    """Metrics may be slow. The run ends like one that did not die, though the function's file was moved in between."""
    argv = [*flags(start, data, tmp_path / "run", shard=2, prompts=8, eval_limit=4), "--metric"]
    asked = []
    die_at(Run, "finish_iterate", [*argv, metric], lambda run, *rest: run.iterate == 1)
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(tmp_path / "mine.py", tmp_path / "moved")
    monkeypatch.setattr(functions, "_number", lambda value: asked.append(value) or value)
    assert spin.main([*argv, f"{moved}:vowels"]) == 0
    assert len(asked) == 1, "the check before the run"
    died = tree(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert spin.main([*argv, metric]) == 0
    assert tree(tmp_path / "run") == died


@pytest.mark.parametrize(
    "flag, script, source",
    [
        ("metric", spin, "def f(prompt, response, references):\n    return 1\n"),
        ("scorer", family, "def f(prompt, responses):\n    return [1, 0]\n"),
    ],
)
def test_a_run_is_not_resumed_with_another_function_but_its_file_may_move(
    flag, script, source, start, data, here, capsys
):
    for name, text in (("mine", source), ("moved", source), ("other", source.replace("1", "0.5"))):
        (here / f"{name}.py").write_text(text)
    for out, began, others in (("a", None, ["mine.py:f"]), ("b", "mine.py:f", ["other.py:f", None])):
        die_at(Run, "evaluate", small(start, data, out=out, **{flag: began}), script=script)
        for other in others:
            error = failed(small(start, data, out=out, **{flag: other}), capsys, script=script)
            assert f"--{flag}: not the contents that the run in" in error
    die_at(Run, "evaluate", small(start, data, out="b", **{flag: "moved.py:f"}), script=script)


@pytest.mark.parametrize(
    "body, says",
    [
        ("return None", "TypeError: must be real number, not NoneType (for"),
        ("return 'x'", "ValueError: expected a finite number, not 'x'"),
        ("return float('nan')", "ValueError: expected a finite number, not nan"), ("return [1]", "TypeError: "),
        ("raise KeyError('k')", "KeyError: 'k' (for the prompt '"), ("raise SystemExit", "SystemExit: "),
    ],
)  # fmt: skip
def test_a_metric_that_fails_is_refused_before_the_run(body, says, start, data, tmp_path, capsys):
    """The message names the function, its result and the prompt. The metric is tried on a real response."""
    (tmp_path / "bad.py").write_text(f"def f(prompt, response, references):\n    {body}\n")
    error = refused(flags(start, data, tmp_path / "out", metric=f"{tmp_path}/bad.py:f"), tmp_path / "out", capsys)
    assert f"bad.py:f: {says}" in error and "for the prompt '" in error


@pytest.mark.parametrize(
    "words, says",
    [
        (["--metric", "rouge"], "expected FILE.py:NAME or one of exact, edit_distance, last_number"),
        (["--metric", "none.py:f"], "--metric none.py:f: no such file"),
        (["--metric", "mine.py:f"], "AttributeError"), (["--metric", "mine.py:number"], "'int' object is not callable"),
        (["--metric", "mine.py:vowels", "mine.py:vowels"], "expected names that differ"),
        (["--metric", "mine.py:error"], "none that is 'error'"), (["--metric", "broken.py:f"], "SyntaxError"),
        (["--best", "greedy_exact"], "--best greedy_exact: expected one of greedy, sampled, greedy_error, "),
        (["--metric", "exact", "--best", "exact"], "nll, greedy_exact, sampled_exact"),
    ],
)  # fmt: skip
def test_metrics_that_are_refused(words, says, start, data, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(f"{SHARE}number = 1\nerror = vowels\n")
    (tmp_path / "broken.py").write_text("def f(")
    with contextlib.chdir(tmp_path):
        assert says in refused([*flags(start, data, tmp_path / "out"), *words], tmp_path / "out", capsys)


@pytest.mark.parametrize("answer, accepted", [("(1, 0.5)", True), ("[1, 2]", False), ("[0.5]", False), ("'01'", False)])
def test_a_scorer_returns_two_probabilities(tmp_path, answer, accepted):
    (tmp_path / "judge.py").write_text(f"def judge(prompt, responses):\n    return {answer}\n")
    scorer = functions.load_scorer(f"{tmp_path}/judge.py:judge")
    if accepted:
        assert scorer("p", ["a", "b"]) == [1.0, 0.5]
    else:
        with pytest.raises(Stopped, match=r"judge.py:judge: .*Error: .* \(for the prompt 'p'\)"):
            scorer("p", ["a", "b"])


def test_shipped_metrics_on_values_computed_by_hand():
    exact, edits, number = load_metrics(["exact", "edit_distance", "last_number"]).values()
    assert exact("", " The  cat.", ["a dog", "the cat"]) == 1 and exact("", "cat", ["the cat"]) == 0
    assert edits("", "kitten", ["sitting", "kitchen!"]) == 3 / 8 and edits("", "", ["ab"]) == 1
    for text in ("#### 1,234", "it is 7, so 1234.0", "5-1234", "is $1234."):
        assert number("", text, ["7 days, so 1234"]) == 1, text
    for text in ("1235", "-1234", "1234 or 5", "many", ""):
        assert number("", text, ["1234"]) == 0, text
    assert number("", "none", ["none"]) == 0 and number("", "so -2", ["x - y = -2"]) == 1


def test_functions_of_one_file_share_its_module_and_what_lies_beside_it(tmp_path):
    """Functions of a file share its module, so a model that the file loads is loaded once."""
    (tmp_path / "beside.py").write_text("value = 2\n")
    (tmp_path / "late.py").write_text("value = 2\n")
    text = "import beside\ndef a():\n    import late\n    return beside.value * late.value\ndef b(): pass\n"
    (tmp_path / "two.py").write_text(text)
    a, b = (functions.load("--metric", f"{tmp_path}/two.py:{name}") for name in "ab")
    assert a.__globals__ is b.__globals__ and a() == 4
