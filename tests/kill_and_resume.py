"""A run killed with SIGKILL again and again, for tests/test_resume.py: python tests/kill_and_resume.py SEED FLAG ...

Runs spin.py with the flags once undisturbed, in ./whole, and once in ./killed, where it dies once or twice in every
phase, at a random moment. Prints a JSON line of (phase, moment) for each kill. A fork is a fresh process without the
seconds that importing torch takes; nothing of torch has run in the process that forks.
"""

import json
import os
import random
import signal
import struct
import sys
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: small products, and no threads to lose in a fork
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import resume
import sampling
import spin

PHASES = ("sample_start", "generate", "score", "train", "evaluate", "finish_iterate", "finish")
MOMENTS = ((resume, "write"), (resume.os, "replace"), (spin, "response_logps"), (spin, "take_step"))
MOMENTS += ((sampling.Batch, "_step"),)


def spied(where, name, before, after) -> None:
    original = getattr(where, name)

    def wrapper(*args, **kwargs):
        before()
        result = original(*args, **kwargs)
        after()
        return result

    setattr(where, name, wrapper)


def child(folder: Path, argv: list[str], pipe: int) -> None:
    """Runs spin.py and tells the parent of every moment: (number of the phase, counted over the run; kind of phase)."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    for descriptor in (1, 2):
        os.dup2(os.open("../log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    done = len(resume.read_rows(Path("run/metrics.jsonl")))
    # a run of iterations has these phases in this order; one that goes on is in the round of iterate `done`
    now = {"phase": 0, "round": done}

    def tell() -> None:
        os.write(pipe, struct.pack("ii", now["round"], now["phase"]))

    for n, name in enumerate(PHASES):

        def enter(n=n) -> None:
            now["phase"] = n
            tell()

        def leave(name=name) -> None:
            if name == "finish_iterate":
                now["round"] += 1
                now["phase"] = 0
            tell()

        spied(spin, name, enter, leave)
    for where, name in MOMENTS:
        spied(where, name, tell, tell)
    os._exit(spin.main(argv))


def moments(folder: Path, argv: list[str], until=lambda moment, count: False, wait: float = 0.0):
    """Runs until `until` says so, then kills; returns (moments and how often, the last, exit code)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        child(folder, argv, write)
    os.close(write)
    seen, killed, moment = Counter(), False, None
    while block := os.read(read, 8):
        moment = struct.unpack("ii", block)
        seen[moment] += 1
        if not killed and until(moment, seen[moment]):
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
            killed = True
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    return seen, moment, os.waitstatus_to_exitcode(status)


def main() -> None:
    seed, argv = int(sys.argv[1]), [*sys.argv[2:], "--out", "run"]
    rng = random.Random(seed)
    whole, _, code = moments(Path("whole"), argv)
    assert code == 0, Path("log").read_text()
    for phase in whole:  # in the order in which the run comes to them
        for _ in range(rng.choice((1, 1, 2))):
            goal = rng.randint(1, whole[phase])

            def reached(moment, count, phase=phase, goal=goal) -> bool:
                # what was finished before is not done again: the phase may end before the goal
                return moment > phase or (moment == phase and count >= goal)

            wait = rng.random() / 100
            if PHASES[phase[1]] == "finish":  # after which there is nothing left to kill
                goal, wait = min(goal, 3), 0.0
            _, last, code = moments(Path("killed"), argv, reached, wait)
            if code == -signal.SIGKILL:
                print(json.dumps([last[0], PHASES[last[1]]]))
    _, _, code = moments(Path("killed"), argv)
    assert code == 0, Path("log").read_text()


if __name__ == "__main__":
    main()
