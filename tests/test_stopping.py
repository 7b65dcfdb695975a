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

LONG = 600  # seconds: a limit on waiting for what must happen, on any machine

# The third step of the run lasts until a signal has arrived.
WAIT_FOR_SIGNAL = """
import signal, sys, time, spin
from pathlib import Path
from runtime.stopping import SIGNALS

take, steps = spin.take_step, []
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it

def step(*args):
    steps.append(1)
    if len(steps) == 3:
        Path("in_step").touch()
        while not SIGNALS.pending:
            time.sleep(0.01)
    return take(*args)

spin.take_step = step
sys.exit(spin.main(sys.argv[1:]))
"""

# The first step notes that a signal has arrived, and never ends.
NEVER_ENDS = """
import sys, time, spin
from pathlib import Path
from runtime.stopping import SIGNALS

def step(*args):
    Path("in_step").touch()
    while True:
        time.sleep(0.01)
        if SIGNALS.pending:
            Path("noted").touch()

spin.take_step = step
sys.exit(spin.main(sys.argv[1:]))
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def process_of(code: str, argv) -> Iterator[subprocess.Popen]:
    """A process that runs the code; it does not outlive the test."""
    command = [sys.executable, "-c", code, *argv]
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(path, process) -> None:
    end = time.monotonic() + LONG
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"no {path.name}"
        time.sleep(0.01)


def run_spin(argv) -> None:
    """spin.py as a process of its own, with as many threads as the processes it is compared with."""
    done = subprocess.run([sys.executable, str(ROOT / "spin.py"), *argv], capture_output=True, env=environment())
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def whole(start, data, tmp_path_factory) -> dict[str, bytes]:
    """All files of a run that nothing disturbs, but run.json."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        run_spin(small(start, data))
    return {name: content for name, content in tree(folder).items() if name != "run/run.json"}


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_says_how_to_resume(start, data, here, whole, number, code):
    """In training: exit code 143 or 130, one line; the same command then ends as if the run had not been disturbed.

    The step in which the signal arrives is finished, saved, and the last.
    """
    argv = small(start, data, save_minutes=1000)
    with process_of(WAIT_FOR_SIGNAL, argv) as process:
        wait_for(here / "in_step", process)
        assert not (here / "run/resume/iterate-1/train.safetensors").exists(), "saved before it was asked to"
        process.send_signal(number)
        error = process.communicate(timeout=LONG)[1]
    assert process.returncode == code
    assert f"stopped by {number.name}" in error and "the same command resumes" in error and error.count("\n") == 1
    assert len(rows(here / "run/steps-0.jsonl")) == 3
    assert (here / "run/resume/iterate-1/train.safetensors").exists()
    (here / "in_step").unlink()
    run_spin(argv)
    files = tree(here)
    del files["run/run.json"]  # --save-minutes differs there
    assert files == whole


def test_a_second_signal_ends_the_process_at_once(start, data, here):
    """In a step that never ends the first SIGTERM waits and the second does not; the run can be resumed."""
    with process_of(NEVER_ENDS, small(start, data)) as process:
        wait_for(here / "in_step", process)
        process.send_signal(signal.SIGTERM)
        wait_for(here / "noted", process)
        (here / "noted").unlink()
        wait_for(here / "noted", process)  # the step goes on: the first signal has not ended it
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=LONG)[1]
    assert process.returncode == 143 and "stopped at once" in error and "Traceback" not in error
    assert spin.main(small(start, data)) == 0


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, which a shell's background processes do not have: they ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_a_signal_before_anything_has_begun(start, data, here, monkeypatch, capsys, interruptible):
    """Exit code 130, one line, nothing is written, and the handlers of the process are put back."""
    spy(monkeypatch, cli, "setup", lambda args, _: signal.raise_signal(signal.SIGINT))
    assert spin.main(small(start, data)) == 130
    assert capsys.readouterr().err == "spin.py: error: stopped by SIGINT\n" and not list(here.iterdir())
    assert signal.getsignal(signal.SIGINT) is interruptible
    SIGNALS.check()  # nothing is pending for the next run of the process


def test_a_signal_in_generation_keeps_the_shards_that_are_finished(start, data, here, monkeypatch, capsys):
    """It stops between two tokens of the second of three shards; the first one's 32 responses are not sampled again."""
    argv, folder, sampled = small(start, data, iterations=1), here / "run/resume/iterate-1", []

    def look(args, _):
        if len(list(folder.glob("generate-*"))) == 1 and not SIGNALS.pending:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        spy(patch, sampling.Batch, "_step", look)
        assert spin.main(argv) == 143
    error = capsys.readouterr().err
    assert "stopped by SIGTERM" in error and "the same command resumes" in error and error.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["generate-0-32.jsonl"]
    spy(monkeypatch, Player, "respond", lambda args, _: sampled.append(len(args[1])))
    assert spin.main(argv) == 0
    assert sum(sampled) == 68 - 32 + 2 * 12  # and both evaluations of the iterate


def test_hangup_stops_a_run_and_ignored_signals_stay_ignored(start, data, here, monkeypatch, capsys):
    """A closed terminal (SIGHUP) is like SIGTERM; nohup, and `&` in a script, make a process ignore signals."""
    argv = small(start, data, iterations=1)
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever ran the tests may ignore it
    spy(monkeypatch, spin, "take_step", lambda *a: signal.raise_signal(signal.SIGHUP))
    try:
        assert spin.main(argv) == 128 + signal.SIGHUP
        assert "stopped by SIGHUP" in capsys.readouterr().err
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        spy(monkeypatch, spin, "score", lambda *a: signal.raise_signal(signal.SIGINT))
        assert spin.main(argv) == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
