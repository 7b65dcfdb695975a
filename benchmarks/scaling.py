"""One rank against two, on one machine with a thread each: generation, training, bytes that travel, memory.

    python benchmarks/scaling.py [--rounds 3] [--shape 125M]

Starts worlds of one and of two ranks in turn, and one of three ranks for the memory of a loaded checkpoint. Weights are
random, prompts and responses have GSM8K's lengths. Bytes are those that the loopback device carried, so nothing else
may use it meanwhile. Writes benchmarks/results/scaling.json and the table in docs/scaling.md.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from bench import current_commit, device_name, write_whole
from generation_cases import forced_ends, neo_config, random_model
from training_cases import our_run, random_pairs

import lora
import spin
from kernels import onednn
from model import GPTNeo
from player import Player
from runtime import parallel
from runtime.folder import in_shards
from runtime.run import Run

PROMPTS, SHARD, LONGEST = 48, 12, 48  # prompts to generate for, of which a rank takes SHARD at a time; new tokens
PAIRS = 32  # of a training step
TIMES = {
    "generate": f"generation, {PROMPTS} prompts",
    "train LoRA": f"training step of {PAIRS} pairs, LoRA",
    "train all parameters": f"training step of {PAIRS} pairs, all parameters",
}
FOLDER = Path(__file__).resolve().parent
RESULTS, DOCS = FOLDER / "results" / "scaling.json", FOLDER.parent / "docs" / "scaling.md"


def loopback_bytes() -> int:
    """Bytes that the loopback device has sent since the machine began."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def timed(work: Callable[[], object]) -> tuple[float, int]:
    """(seconds, bytes on the loopback device) from when all ranks begin until all have ended."""
    parallel.barrier()
    began, before = time.perf_counter(), loopback_bytes()
    work()
    parallel.barrier()
    return time.perf_counter() - began, loopback_bytes() - before


def worker(shape: str) -> dict[str, float]:
    """What one rank measures."""
    pairs = random_pairs(PROMPTS, LONGEST)
    for pair in pairs:
        pair.opponent_real_logp, pair.opponent_generated_logps = -100.0, [-100.0]
    found: dict[str, float] = {}
    for trained, rank in (("LoRA", 16), ("all parameters", 0)):
        model = random_model(neo_config(shape), torch.float32, torch.device("cpu"))
        if rank:
            lora.add_lora(model, rank, 32.0)
        player, run = our_run(model, False, batch=PAIRS, gen_batch=SHARD, max_new_tokens=LONGEST, micro_tokens=2048)
        if rank:
            found["generate"] = generation(player, pairs, run)
        parameters = [p for p in model.parameters() if p.requires_grad]
        seconds, sent = steps(player, pairs, run)
        found |= {f"train {trained}": seconds, f"bytes {trained}": sent}
        found[f"trained {trained}"] = sum(p.numel() for p in parameters)
    return found


def generation(player: Player, pairs: list, run: Run) -> float:
    """Seconds to generate all responses."""

    def respond(items: range) -> list:
        return player.respond([pairs[i].prompt_ids for i in items], 0, rows=items)

    with forced_ends([len(p.generated_ids[0]) for p in pairs]):
        player.respond([pairs[0].prompt_ids], 0, rows=[0])
        return timed(lambda: in_shards(None, "generate", PROMPTS, SHARD, respond))[0]


def steps(player: Player, pairs: list, run: Run) -> tuple[float, int]:
    """(seconds, bytes on the loopback device) of a step."""
    spin.train(player, pairs[PAIRS : PAIRS + 4], 0, run)  # warms up
    return timed(lambda: spin.train(player, pairs[:PAIRS], 0, run))


def memory(folder: str) -> dict[str, int]:
    """Resident memory of this rank before and after a checkpoint is loaded, in bytes; shared pages count in parts."""

    def proportional() -> int:
        return int(re.search(r"Pss:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) * 1024

    before = proportional()
    model = GPTNeo.from_pretrained(folder)
    parallel.barrier()
    found = {"loaded": proportional() - before, "weights": sum(p.numel() * 4 for p in model.parameters())}
    parallel.barrier()
    return found


def world(ranks: int, *arguments: str) -> list[dict]:
    """Runs this program as `ranks` ranks with a thread each. Returns what each has printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run([*launcher, __file__, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def lines_of(results: dict) -> Iterator[str]:
    """The table: medians over the rounds, and the range."""
    one, two, apart = (results["rounds"][name] for name in ("1", "2", "side by side"))
    yield f"{results['shape']} shape, fp32, {results['device'].replace('1 threads', 'one thread a rank')},"
    yield f"commit {results['commit']}, torch {results['torch']};"
    yield f"`{results['command']}`; medians of {len(one)} rounds, range."
    yield ""
    yield "| | one rank | two ranks | times as fast | the machine's limit |"
    yield "|---|---|---|---|---|"
    for key, name in TIMES.items():
        a, b, c = ([row[key] for row in rows] for rows in (one, two, apart))
        ratios = [x / y for x, y in zip(a, b)]
        yield (
            f"| {name} | {statistics.median(a):.1f} s | {statistics.median(b):.1f} s | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{statistics.median([2 * x / y for x, y in zip(a, c)]):.2f} |"
        )
    yield ""
    yield (
        "The machine's limit is how much faster two processes of one rank each, which know nothing of each other, get\n"
        "through twice the work side by side: the cores share memory and cache."
    )
    yield ""
    for trained in ("LoRA", "all parameters"):
        count = two[0][f"trained {trained}"]
        sent = statistics.median(row[f"bytes {trained}"] for row in two)
        least = 2 * 4 * count  # each of k ranks must send 2 (k - 1) / k of the buffer: with two, all of it
        text = f"{sent / 1e6:.1f} MB in all; the least possible is {least / 1e6:.1f} MB."
        yield f"A step with {trained} trained sends {text}"
    found = results["memory"]
    loaded = ", ".join(f"{row['loaded'] / 2**20:.0f}" for row in found)
    yield (
        f"Three ranks that load a checkpoint of {found[0]['weights'] / 2**20:.0f} MiB hold {loaded} MiB each\n"
        "(proportional set size): their own weights, and no second copy. The file is mapped, so a host reads it once."
    )


def renew_docs(results: dict) -> None:
    text = DOCS.read_text()
    head, begin, rest = text.partition("<!-- measured -->\n")
    _, end, tail = rest.partition("<!-- end of measured -->\n")
    write_whole(DOCS, head + begin + "\n".join(["", *lines_of(results), ""]) + end + tail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default="125M", choices=["125M", "1.3B", "2.7B"])
    parser.add_argument("--table", action="store_true", help="only renew the table of docs/scaling.md")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        parallel.join(on_gpu=False)
        with onednn.products():
            found = worker(args.shape) if args.worker == "speed" else memory(args.worker)
        if args.worker != "speed" or parallel.is_writer():
            print(json.dumps(found), flush=True)
        return parallel.leave()
    if args.table:
        return renew_docs(json.loads(RESULTS.read_text()))
    torch.set_num_threads(1)
    rounds: dict[str, list[dict]] = {"1": [], "2": [], "side by side": []}
    speed = ("--worker", "speed", "--shape", args.shape)
    for n in range(args.rounds):
        for ranks in (1, 2) if n % 2 else (2, 1):
            rounds[str(ranks)] += world(ranks, *speed)
            print(ranks, rounds[str(ranks)][-1], flush=True)
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda _: world(1, *speed), range(2)))
        rounds["side by side"].append({key: max(row[key] for (row,) in both) for key in TIMES})
        print("side by side", rounds["side by side"][-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        random_model(neo_config(args.shape), torch.float32, torch.device("cpu")).save_pretrained(folder)
        held = world(3, "--worker", folder)
    results = {
        "device": device_name(torch.device("cpu")), "torch": torch.__version__, "commit": current_commit(),
        "command": " ".join(["python", "benchmarks/scaling.py", *sys.argv[1:]]), "shape": args.shape,
        "rounds": rounds, "memory": held,
    }  # fmt: skip
    write_whole(RESULTS, json.dumps(results, indent=1) + "\n")
    renew_docs(results)
    print("\n".join(lines_of(results)))


if __name__ == "__main__":
    main()
