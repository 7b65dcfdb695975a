"""benchmarks/methods.py: what every run of the table is given, how it is measured, and what the table says."""

import gzip
import itertools
import json
from pathlib import Path

import measuring
import methods
import pytest
from helpers import ARGS, ROOT, rows
from methods import Job, Method, Size

from runtime.data import held_out
from runtime.options import Args, parse


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """200 words of the shipped dictionary, of which about 20 are held out."""
    path = tmp_path_factory.mktemp("words") / "words.jsonl"
    with gzip.open(ROOT / "pronounce/cmudict.jsonl.gz", "rt") as file:
        path.write_text("".join(itertools.islice(file, 200)))
    return path


def test_the_documented_table_is_made_of_the_stored_results():
    found = json.loads((ROOT / "benchmarks/results/methods.json").read_text())
    table = methods.table(found, list(methods.METHODS), 5)
    assert f"<!-- methods -->\n{table}<!-- end of methods -->" in (ROOT / "docs/family.md").read_text()


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_line_is_a_command_that_parses_at_the_same_size(name, tmp_path):
    """Each with as many settings as the others, on the same data; only the method's own flags differ."""
    method = methods.METHODS[name]
    assert len(set(method.settings)) == 3
    size = Size(iterations=3, prompts=1000)
    for setting in method.settings:
        job = Job(name, setting, 7, "test")
        args = parse(method.script, methods.argv_of(method, job, size, tmp_path), ARGS.get(method.script, Args))
        assert (args.iterations, args.prompts, args.batch, args.seed) == (3, round(1000 * method.share), 64, 7)
        assert (args.data, args.eval_data) == ((f"{tmp_path}/train.jsonl",), (f"{tmp_path}/tuning.jsonl",))
        if method.first:
            before = Job(name, "", 7, "first")
            first = parse(method.script, methods.argv_of(method, before, size, tmp_path), ARGS[method.script])
            assert args.reviser == first.out and not first.reviser and first.revise_template == args.revise_template


def test_the_three_parts_share_no_word_and_only_one_was_trained_on(words, tmp_path):
    methods.write_data(Size(data=str(words), words=30, tuning=3, test=3), tmp_path)
    train, tuning, test = ({r["prompt"] for r in rows(tmp_path / f"{n}.jsonl")} for n in ("train", "tuning", "test"))
    assert len(train) == 30 and len(tuning) == len(test) == 3
    assert not (train & tuning or train & test or tuning & test)
    assert all(held_out(word, 0.1) for word in tuning | test) and not any(held_out(word, 0.1) for word in train)


def test_the_whole_table_on_a_tiny_start(start, words, tmp_path, monkeypatch):
    """Tunes, runs each seed with the setting of the lowest tuning NLL, and writes a line for start and method.

    What is finished is not run again. The start's entropy is minus the mean log-probability of its own responses.
    """
    monkeypatch.setattr(methods, "METHODS", {"SPIN": Method("spin", "", ("--lr 1e-9 --beta 1", "--lr 1 --beta 1"))})
    monkeypatch.setattr(methods, "TEMPERATURES", (0.1, 1.0, 10.0))
    size = Size(str(start), str(words), iterations=1, prompts=20, words=40, tuning=3, test=3)
    methods.write_data(size, tmp_path)
    found, asked = {"runs": {}, "curve": {}}, []

    def do(function, jobs):
        asked.extend(jobs)
        return [(job, function(job)) for job in jobs]

    methods.play(["SPIN"], 2, size, tmp_path, found, do)
    settings = methods.METHODS["SPIN"].settings
    tried = [found["runs"][Job("SPIN", setting, methods.TUNING_SEED, "tuning").key]["nll"] for setting in settings]
    assert tried[0] < tried[1] and len(asked) == 3 + 2 + 2
    entropies = [row["entropy"] for row in found["curve"].values()]
    assert entropies[0] < entropies[1] and found["curve"]["1.0"]["kl"] == pytest.approx(0, abs=1e-6)
    player, run, _ = measuring.ruler(size.model, f"{tmp_path}/test.jsonl")
    player.model.load_weights(start)
    responses = player.respond([e.prompt_ids for e in run.heldout], run.seed(0, "evaluate"))
    logps = player.logps([(e.prompt_ids, ids) for e, (ids, _) in zip(run.heldout, responses)])
    assert entropies[1] == pytest.approx(-sum(logp for (logp,) in logps) / 3)
    row = found["runs"][Job("SPIN", "--lr 1e-9 --beta 1", 1, "test").key]
    assert row["nll"] == pytest.approx(found["curve"]["1.0"]["nll"]) and row["steps"] == 1
    found = json.loads(json.dumps(found))
    asked.clear()
    methods.play(["SPIN"], 2, size, tmp_path, found, do)
    assert asked == []
    title, _, first, last = methods.table(found, ["SPIN"], 2).splitlines()
    assert first.startswith("| the start |") and last.startswith("| SPIN | `--lr 1e-9 --beta 1` |")
    assert {line.count("|") for line in (title, first, last)} == {title.count("|")}
