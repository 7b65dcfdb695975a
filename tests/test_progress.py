"""runtime/progress.py: lines instead of bars, and when a run will end, by a clock that the test sets."""

import sys

import pytest
from helpers import flags

import spin
from runtime import progress
from runtime.progress import Bar, Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def phase(clock, progress, name, seconds):
    with progress.timed(name):
        clock.now += seconds


def test_a_line_is_printed_at_most_every_30_seconds_and_in_a_terminal_rewritten(clock, capsys, monkeypatch):
    run = Progress(clock)
    run.iterate = 2

    def work():
        with Bar(run, "train 1", 100, done=10) as bar, run.timed("train"):
            for _ in range(5):
                clock.now += 10
                bar.update(10, loss="0.61", margin="0.3")

    work()
    line = "iterate 2, train 1: 40 of 100 (40%), 1/s, loss 0.61, margin 0.3, 60 s left"
    assert capsys.readouterr() == (f"{line}\n", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    work()
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 0
    assert printed.err.split("\r\x1b[K") == ["", *(f"iterate 2, train 1: {n} of 100" for n in (20, 30, 40, 50, 60)), ""]
    monkeypatch.setenv("RANK", "1")
    work()
    assert capsys.readouterr() == ("", ""), "a rank that is not the writer"


def test_items_of_an_earlier_process_say_nothing_about_the_rate_and_those_of_other_ranks_do(clock):
    bar = Bar(Progress(clock), "score", 100)
    bar.at(50)
    clock.now += 10
    bar.update(10)
    assert bar.line(clock(), {}) == "score: 60 of 100 (60%), 1/s, 40 s left"
    bar.at(90)  # Other ranks did 30 in the meantime.
    assert bar.line(clock(), {}) == "score: 90 of 100 (90%), 4/s, 2 s left"


def test_the_end_of_the_run_is_estimated_from_the_phases_so_far(clock):
    run = Progress(clock)
    phase(clock, run, "evaluate", 5)
    assert run.seconds_left(1) is None, "nothing is known while the start is evaluated"
    assert run.finish_iterate()["seconds"] == dict(evaluate=5)
    run.left = 2
    with run.timed("generate"):
        assert run.seconds_left(1) is None, "how long training takes is not known"
        clock.now += 20
    with run.timed("train"):
        clock.now += 10
        with run.timed("nested"):
            assert run.seconds_left(30) == 30 + 5 + 2 * (20 + 10 + 30 + 5)
        clock.now += 30
        run.tokens += 400
    phase(clock, run, "evaluate", 5)
    times = run.finish_iterate()
    assert times["seconds"] == dict(generate=20, train=40, evaluate=5) and times["tokens"] == 400
    run.left = 1
    with run.timed("generate"):
        clock.now += 10
        assert run.seconds_left(2) == 10 + 40 + 5 + 65, "generation took 20 s in the last iteration"
        assert run.seconds_left(40) == 40 + 40 + 5 + (10 + 40 + 40 + 5)
    assert run.finish_iterate()["seconds"] == dict(generate=10) and run.tokens == 0


def test_a_run_without_a_terminal_prints_lines_of_every_phase(start, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    assert spin.main(flags(start, data, tmp_path / "run", prompts=8, eval_limit=2)) == 0
    printed = capsys.readouterr().out
    for name in ("start", "greedy", "sampled", "nll", "kl", "generate", "score", "train 0"):
        assert f", {name}: " in printed
    lines = [line for line in printed.splitlines() if line.startswith("iterate 1, train 0: ")]
    assert "loss" in lines[-1] and "margin" in lines[-1] and "; run: " in lines[-1]
