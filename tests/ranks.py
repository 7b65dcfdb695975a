"""Worlds of several ranks on one machine, for the tests: a process that forks one for each request.

Importing torch takes seconds; a fork of a process that has imported it takes none. It reads a JSON object a line:

    {"script": "spin", "argv": [...], "folders": ["a", "b"], "die": [rank, moment], "die_in": [name, rank, call],
     "terminate_in": [name, rank, call]}

Rank r works in folders[r], so a world has as many ranks as folders; a folder stands for a host. A moment is a call of
one of MOMENTS. A rank kills itself with SIGKILL at the given moment, or at the given call of one of them, or then sends
SIGTERM to all ranks, as torchrun would. Answers, a line each:
{"codes": [...], "moments": [...], "out": [...], "err": [...]}, of the ranks in order.
"""

import json
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; and a fork would lose threads
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Imported later by what each rank does, which takes a second or two.
import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp  # noqa: F401
from helpers import SCRIPTS

import runtime.fsdp
import sampling
import spin
from player import Player
from runtime import parallel, storage

MOMENTS = (
    (storage, "write"), (storage.os, "replace"), (Player, "response_logps"), (spin, "take_step"),
    (sampling.Batch, "_step"), (parallel, "gather"), (parallel, "sum_gradients"), (runtime.fsdp, "save_training"),
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(rank: int, request: dict, port: int, logs: str) -> None:
    """Runs the script as one rank."""
    world = len(request["folders"])
    os.chdir(request["folders"][rank])
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{logs}/{name}-{rank}", os.O_WRONLY | os.O_CREAT), descriptor)
    host = [r for r in range(world) if request["folders"][r] == request["folders"][rank]]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_RANK": str(host.index(rank)), "LOCAL_WORLD_SIZE": str(len(host))}
    count, calls = 0, Counter()

    def moment(name: str) -> None:
        nonlocal count
        count += 1
        calls[name] += 1
        if request.get("die") == [rank, count] or request.get("die_in") == [name, rank, calls[name]]:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.get("terminate_in") == [name, rank, calls[name]]:
            os.killpg(0, signal.SIGTERM)

    for where, name in MOMENTS:
        original = getattr(where, name)

        def wrapper(*args, original=original, name=name, **kwargs):
            moment(name)
            return original(*args, **kwargs)

        setattr(where, name, wrapper)
    code = SCRIPTS[request["script"]].main(request["argv"])
    Path(f"{logs}/moments-{rank}").write_text(str(count))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def answer(request: dict) -> dict:
    port, pids, ranks = free_port(), [], range(len(request["folders"]))
    with tempfile.TemporaryDirectory() as logs:
        for rank in ranks:
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, pids[0] if pids else 0)
                try:
                    work(rank, request, port, logs)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    sys.stderr.flush()
                    os._exit(1)
            os.setpgid(pid, pids[0] if pids else pid)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        out, err = ([Path(logs, f"{name}-{rank}").read_text() for rank in ranks] for name in ("out", "err"))
        files = [Path(logs, f"moments-{rank}") for rank in ranks]
        moments = [int(file.read_text()) if file.exists() else 0 for file in files]
    return {"codes": codes, "moments": moments, "out": out, "err": err}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
