"""Worlds of several ranks on one machine, for the tests: a process that forks the ranks of each request.

Importing torch takes seconds, and a fork of a process that has imported it takes none. Each line of stdin is a request:

    {"script": "spin", "argv": [...], "folders": ["a", "b"], "die": [rank, moment], "die_in": [name, rank, call],
     "terminate_in": [name, rank, call], "signals": 1, "restarts": 1}

Rank r works in folders[r]; ranks in the same folder are on the same host. A moment is a call of one of MOMENTS. A rank
kills itself with SIGKILL at the given moment ("die"), or at the given call of one of them ("die_in"), or then sends
SIGTERM to all ranks, as torchrun would ("terminate_in"), once or as often as "signals" says. With "restarts", the ranks
are children of torchrun's agent, which starts them again, so many times, if one of them dies, as only the first do.

Each line of stdout is an answer: {"codes": [...], "moments": [...], "out": [...], "err": [...]}, with one entry per
rank. With "restarts", the only code is that of the agent.
"""

import json
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # This must precede the import of torch; a fork would lose other threads.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# The ranks would import these themselves, which takes a second or two.
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401
from helpers import SCRIPTS
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import sampling
from kernels import onednn
from player import Player
from runtime import folder, parallel
from runtime.folder import Folder
from runtime.run import Run
from runtime.training import Training

onednn.available = lambda: False  # conftest.py does the same.
MOMENTS = (
    (folder, "write"), (folder.os, "replace"), (Folder, "save_training"), (Player, "response_logps"),
    (Training, "step"), (sampling.Batch, "_step"), (parallel, "values_of_all"), (parallel, "sum_gradients"),
    (Run, "finish"),
)  # fmt: skip


def environment(rank: int, folders: list[str], port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    host = [r for r, folder in enumerate(folders) if folder == folders[rank]]
    values = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE=len(folders))
    values |= dict(LOCAL_RANK=host.index(rank), LOCAL_WORLD_SIZE=len(host))
    return {name: str(value) for name, value in values.items()}


def work(request: dict, logs: str) -> int:
    """Runs the script as the rank that the environment names. Returns its exit code."""
    rank = int(os.environ["RANK"])
    os.chdir(request["folders"][rank])
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{logs}/{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    calls = Counter()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        request = {name: value for name, value in request.items() if name != "die_in"}

    def moment(name: str) -> None:
        calls[name] += 1
        this_call = [name, rank, calls[name]]
        if request.get("die") == [rank, calls.total()] or request.get("die_in") == this_call:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.get("terminate_in") == this_call:
            for _ in range(request.get("signals", 1)):
                os.killpg(0, signal.SIGTERM)

    for where, name in MOMENTS:
        original = getattr(where, name)

        def wrapper(*args, original=original, name=name, **kwargs):
            moment(name)
            return original(*args, **kwargs)

        setattr(where, name, wrapper)
    code = SCRIPTS[request["script"]].main(request["argv"])
    # A thread of the process group may abort the process at its end. FSDP keeps the group, and so its threads.
    if code == 0 and sys.platform == "linux" and "--fsdp" not in request["argv"]:
        threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        assert not any("gloo" in name for name in threads), threads
    Path(f"{logs}/moments-{rank}").write_text(str(calls.total()))
    return code


def begin(request: dict, logs: str, more: dict[str, str]) -> int:
    """Runs one rank, with `more` in its environment, or torchrun's agent. Returns the exit code."""
    os.environ |= more
    if "restarts" not in request:
        return work(request, logs)
    rendezvous = dict(run_id="tests", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", monitor_interval=0.1)
    limits = dict(max_restarts=request["restarts"], start_method="fork")
    codes = elastic_launch(LaunchConfig(1, 1, len(request["folders"]), **rendezvous, **limits), work)(request, logs)
    return max(codes.values())


def answer(request: dict) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders, pids = request["folders"], []
    ranks = range(len(folders))
    with tempfile.TemporaryDirectory() as logs:
        for more in [{}] if "restarts" in request else [environment(rank, folders, port) for rank in ranks]:
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, pids[0] if pids else 0)
                code = 1
                try:
                    code = begin(request, logs, more)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
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
