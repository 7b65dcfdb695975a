"""One rank against two, on one machine with a thread each: generation and training.

    python benchmarks/scaling.py [--rounds 3] [--shape 125M]

Starts worlds of one and of two ranks in turn. Weights are random, prompts and responses have GSM8K's lengths. Writes
benchmarks/results/scaling.json and prints the table of docs/scaling.md; --shape tiny tries it and writes nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median

import torch
from bench import FOLDER, current_commit, device_name, write_whole
from generation_cases import CONFIGS, FP32, forced_ends
from training_cases import parts

import spin
from kernels import onednn
from runtime import parallel
from runtime.folder import in_shards

PROMPTS, SHARD, LONGEST = 48, 12, 48  # prompts to generate for, of which a rank takes SHARD at a time; new tokens
PAIRS = 32  # pairs per training step
TRAINED = {"all parameters": 0, "LoRA": 16}  # rank of the adapters
TIMES = {"generate": f"generation, {PROMPTS} prompts"}
TIMES |= {f"train {name}": f"training step of {PAIRS} pairs, {name}" for name in TRAINED}


def timed(work: Callable[[], object]) -> float:
    """Seconds from when all ranks begin until all have ended."""
    parallel.barrier()
    began = time.perf_counter()
    work()
    parallel.barrier()
    return time.perf_counter() - began


def worker(shape: str) -> dict[str, float]:
    """What one rank measures."""
    found: dict[str, float] = {}
    sizes = dict(batch=PAIRS, gen_batch=SHARD, max_new_tokens=LONGEST, micro_tokens=2048)
    for trained, rank in TRAINED.items():
        player, run, pairs, _ = parts(shape, FP32, torch.device("cpu"), PROMPTS, LONGEST, rank, **sizes)
        for pair in pairs:
            pair.opponent_real_logp, pair.opponent_generated_logps = -100.0, [-100.0]
        spin.train(player, pairs[PAIRS : PAIRS + 4], 0, run)  # a warm-up
        found[f"train {trained}"] = timed(partial(spin.train, player, pairs[:PAIRS], 0, run))

    def respond(items: range) -> list:  # The model has adapters here, since these come last.
        return player.respond([pairs[i].prompt_ids for i in items], 0, rows=items)

    with forced_ends([len(pair.generated_ids[0]) for pair in pairs]):
        respond(range(1))  # a warm-up
        return found | {"generate": timed(lambda: in_shards(None, "generate", PROMPTS, SHARD, respond))}


def world(ranks: int, shape: str) -> dict[str, float]:
    """Runs this program as `ranks` ranks with a thread each. Returns what the first of them has printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, __file__, "--worker", "--shape", shape]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))


def lines_of(results: dict) -> Iterator[str]:
    """The table: medians over the rounds, and the range."""
    yield f"{results['shape']} shape, fp32, {results['device'].replace('1 threads', 'one thread a rank')},"
    yield f"commit {results['commit']}, torch {results['torch']};"
    yield f"`{results['command']}`; medians of {len(results['rounds']['1'])} rounds, range."
    yield "\n| | one rank | two ranks | times as fast | the machine's limit |\n|---|---|---|---|---|"
    for key, name in TIMES.items():
        one, two, apart = ([row[key] for row in results["rounds"][of]] for of in ("1", "2", "side by side"))
        ratios = [x / y for x, y in zip(one, two)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        limit = median(2 * x / y for x, y in zip(one, apart))
        yield f"| {name} | {median(one):.1f} s | {median(two):.1f} s | {spread} | {limit:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default="125M", choices=list(CONFIGS))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        parallel.join(on_gpu=False)
        with onednn.products():
            found = worker(args.shape)
        if parallel.is_writer():
            print(json.dumps(found), flush=True)
        return parallel.leave()
    torch.set_num_threads(1)  # device_name tells this number.
    rounds: dict[str, list[dict]] = {"1": [], "2": [], "side by side": []}
    for n in range(args.rounds):
        for ranks in (1, 2) if n % 2 else (2, 1):
            rounds[str(ranks)].append(world(ranks, args.shape))
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda _: world(1, args.shape), range(2)))
        rounds["side by side"].append({key: max(row[key] for row in both) for key in TIMES})
        print(f"{n + 1} of {args.rounds} rounds", flush=True)
    results = {
        "device": device_name(torch.device("cpu")), "torch": torch.__version__, "commit": current_commit(),
        "command": " ".join(["python", "benchmarks/scaling.py", *sys.argv[1:]]), "shape": args.shape,
        "rounds": rounds,
    }  # fmt: skip
    print("\n".join(lines_of(results)))
    if args.shape != "tiny":
        write_whole(FOLDER / "results/scaling.json", json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
