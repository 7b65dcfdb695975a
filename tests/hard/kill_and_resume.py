"""A run killed with SIGKILL again and again, for test_kill.py.

    python tests/hard/kill_and_resume.py SEED SCRIPT FLAG ...

Runs the script with the flags once undisturbed, in ./whole, and once in ./killed, where it dies once in every phase, at
a random moment. Prints a JSON line of [round, phase] for each kill. A fork is a fresh process without the
seconds that importing torch takes; nothing of torch has run in the process that forks.

The run reports every moment, such as a step or a rename, and waits until it is told to continue. It therefore never
leaves the phase in which it is to die, however fast or slow the machine is.
"""

import json
import os
import random
import select
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: small products, and no threads to lose in a fork
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch._dynamo  # noqa: F401 - takes a second, and every optimizer needs it
from helpers import SCRIPTS

import evaluate
import sampling
import spin
from kernels import onednn
from methods import family, seft
from player import Player
from runtime import folder
from runtime.run import Run
from runtime.training import Training

onednn.available = lambda: False  # as in conftest.py
# What a run is doing, in the order of an iteration. "sample_start" stands for all that comes before the others.
PHASES = ("sample_start", "generate", "revise", "score", "train", "evaluate", "finish_iterate", "finish")
# A moment is just before or just after one of these.
MOMENTS = (
    (folder, "write"), (folder.os, "replace"), (Player, "response_logps"), (Training, "step"),
    (sampling.Batch, "_step"),
)  # fmt: skip
Moment = tuple[int, int]  # (round: iterates that are finished, number of the phase); moments only grow in a run


def module_of(phase: str, script: str) -> object:
    """Where the function of a phase is looked up: methods/ has some of their own."""
    if phase == "sample_start":
        return evaluate
    own = {"family": family, "seft": seft}.get(script, spin)
    return Run if hasattr(Run, phase) else own if hasattr(own, phase) else spin if hasattr(spin, phase) else seft


def surrounded(where: object, name: str, before: Callable[[], None], after: Callable[[], None]) -> None:
    original = getattr(where, name)

    def wrapper(*args, **kwargs):
        before()
        result = original(*args, **kwargs)
        after()
        return result

    setattr(where, name, wrapper)


def child(folder: Path, script: str, argv: list[str], reports: int, answers: int) -> None:
    """Runs the script; writes every moment to `reports` and waits for a byte from `answers`."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    for descriptor in (1, 2):
        os.dup2(os.open("../log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    metrics = Path("run/metrics.jsonl")
    now = {"round": len(metrics.read_text().splitlines()) if metrics.exists() else 0, "phase": 0}

    def report() -> None:
        os.write(reports, struct.pack("ii", now["round"], now["phase"]))
        if not os.read(answers, 1):  # the parent is gone
            os._exit(1)

    for n, name in enumerate(PHASES):

        def enter(n=n) -> None:
            now["phase"] = n
            report()

        def leave(name=name) -> None:
            if name == "finish_iterate":
                now["round"] += 1
                now["phase"] = 0
            report()

        surrounded(module_of(name, script), name, enter, leave)
    for where, name in MOMENTS:
        surrounded(where, name, report, report)
    os._exit(SCRIPTS[script].main(argv))


class Process:
    """A run in a fork. Iterating yields its moments; the run continues when the next one is asked for."""

    def __init__(self, folder: str, script: str, argv: list[str]) -> None:
        reports, write = os.pipe()
        read, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reports)
            os.close(answers)
            child(Path(folder), script, argv, write, read)
        os.close(write)
        os.close(read)
        self.reports, self.answers = reports, answers

    def __iter__(self) -> Iterator[Moment]:
        while block := os.read(self.reports, 8):
            yield struct.unpack("ii", block)
            os.write(self.answers, b"x")

    def continue_for(self, seconds: float, phase: Moment) -> None:
        """Lets the run continue for that long, but not beyond the phase."""
        end = time.monotonic() + seconds
        os.write(self.answers, b"x")
        while select.select([self.reports], [], [], max(0, end - time.monotonic()))[0]:
            block = os.read(self.reports, 8)
            if not block or struct.unpack("ii", block) != phase:
                return
            os.write(self.answers, b"x")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Waits for the end; returns the exit code."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.reports)
        os.close(self.answers)
        return code


def run_to_its_end(folder: str, script: str, argv: list[str]) -> Counter:
    """Returns the number of moments of each phase."""
    process = Process(folder, script, argv)
    seen = Counter(process)
    assert process.end() == 0, Path("log").read_text()
    return seen


def kill_in(phase: Moment, goal: int, wait: float, script: str, argv: list[str]) -> Moment | None:
    """Kills a run at moment number `goal` of the phase, or up to `wait` seconds later.

    What was finished before is not done again, so the phase may have fewer moments: then it dies at the first moment of
    the next one. Returns the phase in which it died; None if it ended.
    """
    process, count = Process("killed", script, argv), 0
    for moment in process:
        count += moment == phase
        if moment > phase or count == goal:
            if moment == phase and wait:
                process.continue_for(wait, phase)
            process.kill()
            process.end()
            return moment
    assert process.end() == 0, Path("log").read_text()
    return None


def main() -> None:
    seed, script, argv = int(sys.argv[1]), sys.argv[2], [*sys.argv[3:], "--out", "run"]
    rng = random.Random(seed)
    whole = run_to_its_end("whole", script, argv)
    for phase in whole:  # in the order in which the run comes to them
        goal = rng.randint(1, whole[phase])
        wait = rng.choice((0.0, rng.random() / 100))
        if PHASES[phase[1]] == "finish":  # after which there is nothing left to kill
            goal, wait = min(goal, 3), 0.0
        if died := kill_in(phase, goal, wait, script, argv):
            print(json.dumps([died[0], PHASES[died[1]]]))
    run_to_its_end("killed", script, argv)


if __name__ == "__main__":
    main()
