"""runtime/stopping.py: SIGTERM, SIGHUP and Ctrl-C stop a run between two steps, and the same command resumes it."""

import itertools
import signal
from collections.abc import Iterator

import pytest
from helpers import die_at, rows, small, spy, tree

import sampling
import spin
from player import Player
from runtime import cli
from runtime.stopping import SIGNALS
from runtime.training import Training


@pytest.fixture
def handlers() -> Iterator[None]:
    """Python's own handlers, whatever the shell that runs the tests makes its processes ignore."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_before_anything_has_begun(start, data, here, monkeypatch, capsys, handlers):
    """The exit code is 130, one line is printed, nothing is written, and the process gets its handlers back."""
    spy(monkeypatch, cli, "setup", lambda args, _: signal.raise_signal(signal.SIGINT))
    assert spin.main(small(start, data)) == 130
    assert capsys.readouterr().err == "spin.py: error: stopped by SIGINT\n" and not list(here.iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    SIGNALS.check()  # Nothing is pending for the next run of the process.


def test_a_signal_saves_the_step_and_says_how_to_resume(start, data, here, whole, monkeypatch, capsys, handlers):
    """The step in which the signal arrives is finished and saved. The same command then ends as if nothing happened."""
    argv, steps = small(start, data, save_minutes=1000), itertools.count(1)
    checkpoint = here / "run/resume/iterate-1/train.safetensors"

    def look(*_):
        assert not checkpoint.exists(), "saved before it was asked to"
        if next(steps) == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        spy(patch, Training, "step", look)
        assert spin.main(argv) == 130
    error = capsys.readouterr().err
    assert "stopped by SIGINT" in error and "the same command resumes" in error and error.count("\n") == 1
    assert len(rows(here / "run/steps-0.jsonl")) == 2 and checkpoint.exists()
    assert spin.main(argv) == 0
    expected, found = tree(whole), tree(here / "run")
    changed = {name for name in expected | found if found.get(name) != expected.get(name)}
    assert changed == {"run.json", "checksums"}, "run.json has --save-minutes, the checksums have that of run.json"


def test_a_second_signal_ends_the_process_at_once(launch, start, data, here):
    """In a step the first SIGTERM waits and the second does not; the run can be resumed."""
    argv = small(start, data, prompts=8, iterations=1)
    world = launch(argv, [here], terminate_in=["step", 0, 1], signals=2)
    assert world.codes == [143] and world.err == ["\nstopped at once; what was saved stays\n"]
    assert rows(here / "run/steps-0.jsonl") == []
    assert spin.main(argv) == 0


def test_a_signal_in_generation_keeps_the_shards_that_are_finished(start, data, here, monkeypatch, capsys):
    """The run stops between two tokens of the second shard; the 8 responses of the first one are not sampled again."""
    argv, folder, sampled = small(start, data, iterations=1), here / "run/resume/iterate-1", []

    def look(args, _):
        if len(list(folder.glob("generate-*"))) == 1 and not SIGNALS.pending:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        spy(patch, sampling.Batch, "_step", look)
        assert spin.main(argv) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["checksums", "generate-0-8.jsonl"]
    spy(monkeypatch, Player, "respond", lambda args, _: sampled.append(len(args[1])))
    die_at(spin, "score", argv)
    assert sum(sampled) == 24 - 8


def test_hangup_stops_a_run_and_ignored_signals_stay_ignored(start, data, here, monkeypatch, capsys, handlers):
    """A closed terminal (SIGHUP) acts like SIGTERM. nohup, and `&` in a script, make a process ignore signals."""
    argv = small(start, data, iterations=1, prompts=8, eval_limit=2)
    spy(monkeypatch, Training, "step", lambda *a: signal.raise_signal(signal.SIGHUP))
    assert spin.main(argv) == 128 + signal.SIGHUP
    assert "stopped by SIGHUP" in capsys.readouterr().err
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    spy(monkeypatch, spin, "score", lambda *a: signal.raise_signal(signal.SIGINT))
    assert spin.main(argv) == 0
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
