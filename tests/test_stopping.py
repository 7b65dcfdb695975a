"""runtime/stopping.py: SIGTERM, SIGHUP and Ctrl-C stop a run between two steps, and the same command resumes it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from helpers import ROOT, rows, small, spy, tree

import sampling
import spin
from player import Player
from runtime import cli
from runtime.stopping import SIGNALS
from runtime.training import Training

LONG = 600  # Seconds to wait at most for what must happen, on any machine.

# The third step lasts until a signal has arrived, and for ever if there is a file called "for_ever".
PROGRAM = """
import signal, sys, time, spin
from kernels import onednn
from pathlib import Path
from runtime.stopping import SIGNALS
from runtime.training import Training

onednn.available = lambda: False  # as in conftest.py
take, steps = Training.step, []
signal.signal(signal.SIGINT, signal.default_int_handler)  # The background processes of a shell ignore it.

def step(*args):
    steps.append(1)
    if len(steps) == 3:
        Path("in_step").touch()
        while not SIGNALS.pending or Path("for_ever").exists():
            time.sleep(0.01)
            if SIGNALS.pending:
                Path("noted").touch()
    return take(*args)

Training.step = step
sys.exit(spin.main(sys.argv[1:]))
"""


@contextlib.contextmanager
def in_third_step(here, argv) -> Iterator[subprocess.Popen]:
    """A process that runs PROGRAM and has come to its third step. It does not outlive the context."""
    command = [sys.executable, "-c", PROGRAM, *argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # conftest.py has set OMP_NUM_THREADS.
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    with subprocess.Popen(command, **options) as process:
        try:
            wait_for(here / "in_step", process)
            yield process
        finally:
            process.kill()


def wait_for(path, process) -> None:
    """Waits for a file that the process makes, and removes it."""
    end = time.monotonic() + LONG
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"no {path.name}"
        time.sleep(0.01)
    path.unlink()


def files_of(run) -> dict[str, bytes]:
    """All files but run.json, which holds --save-minutes, and the checksums, which hold that of run.json."""
    return {name: content for name, content in tree(run).items() if name not in ("run.json", "checksums")}


def test_a_signal_saves_the_step_and_says_how_to_resume(start, data, here, whole):
    """The step in which it arrives is finished and saved. The same command then ends as if nothing happened.

    The signal is Ctrl-C's; the next test sends SIGTERM.
    """
    argv = small(start, data, save_minutes=1000)
    with in_third_step(here, argv) as process:
        assert not (here / "run/resume/iterate-1/train.safetensors").exists(), "saved before it was asked to"
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=LONG)[1]
    assert process.returncode == 130
    assert "stopped by SIGINT" in error and "the same command resumes" in error and error.count("\n") == 1
    assert len(rows(here / "run/steps-0.jsonl")) == 3
    assert (here / "run/resume/iterate-1/train.safetensors").exists()
    (here / "noted").unlink(missing_ok=True)
    assert spin.main(argv) == 0
    assert files_of(here / "run") == files_of(whole)


def test_a_second_signal_ends_the_process_at_once(start, data, here):
    """In a step that never ends the first SIGTERM waits and the second does not; the run can be resumed."""
    (here / "for_ever").touch()
    with in_third_step(here, small(start, data, iterations=1)) as process:
        process.send_signal(signal.SIGTERM)
        wait_for(here / "noted", process)
        wait_for(here / "noted", process)  # The step continues: the first signal has not ended it.
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=LONG)[1]
    assert process.returncode == 143 and "stopped at once" in error and "Traceback" not in error
    assert spin.main(small(start, data, iterations=1)) == 0


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


def test_a_signal_in_generation_keeps_the_shards_that_are_finished(start, data, here, monkeypatch, capsys):
    """It stops between two tokens of the second shard; the 32 responses of the first one are not sampled again."""
    argv, folder, sampled = small(start, data, iterations=1), here / "run/resume/iterate-1", []

    def look(args, _):
        if len(list(folder.glob("generate-*"))) == 1 and not SIGNALS.pending:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        spy(patch, sampling.Batch, "_step", look)
        assert spin.main(argv) == 143
    error = capsys.readouterr().err
    assert "stopped by SIGTERM" in error and "the same command resumes" in error and error.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["checksums", "generate-0-32.jsonl"]
    spy(monkeypatch, Player, "respond", lambda args, _: sampled.append(len(args[1])))
    assert spin.main(argv) == 0
    assert sum(sampled) == 68 - 32 + 2 * 12  # The iterate is evaluated twice on 12 prompts.


def test_hangup_stops_a_run_and_ignored_signals_stay_ignored(start, data, here, monkeypatch, capsys, handlers):
    """A closed terminal (SIGHUP) acts like SIGTERM. nohup, and `&` in a script, make a process ignore signals."""
    argv = small(start, data, iterations=1)
    spy(monkeypatch, Training, "step", lambda *a: signal.raise_signal(signal.SIGHUP))
    assert spin.main(argv) == 128 + signal.SIGHUP
    assert "stopped by SIGHUP" in capsys.readouterr().err
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    spy(monkeypatch, spin, "score", lambda *a: signal.raise_signal(signal.SIGINT))
    assert spin.main(argv) == 0
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
