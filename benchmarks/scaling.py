"""One rank against two, on one machine with a thread each: generation, training, bytes that travel.

    python benchmarks/scaling.py [--rounds 3] [--shape 125M]

Starts worlds of one and of two ranks in turn. Weights are random, prompts and responses have GSM8K's lengths. Bytes are
those that the loopback device carried, so nothing else may use it meanwhile. Writes benchmarks/results/scaling.json and
the table in docs/scaling.md; --shape tiny tries it and writes nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
from bench import FOLDER, current_commit, device_name, renew_section, write_whole
from generation_cases import SHAPES, config_of, forced_ends, random_model
from training_cases import our_run, random_pairs

import lora
import spin
from kernels import onednn
from runtime import parallel
from runtime.folder import in_shards

PROMPTS, SHARD, LONGEST = 48, 12, 48  # prompts to generate for, of which a rank takes SHARD at a time; new tokens
PAIRS = 32  # of a training step
TRAINED = {"LoRA": 16, "all parameters": 0}  # rank of the adapters
TIMES = {"generate": f"generation, {PROMPTS} prompts"}
TIMES |= {f"train {name}": f"training step of {PAIRS} pairs, {name}" for name in TRAINED}


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
    found: dict[str, float] = {}
    for trained, rank in TRAINED.items():
        model = random_model(config_of(shape), torch.float32, torch.device("cpu"))
        if rank:
            lora.add_lora(model, rank, 32.0)
        player, run = our_run(model, False, batch=PAIRS, gen_batch=SHARD, max_new_tokens=LONGEST, micro_tokens=2048)
        pairs = random_pairs(PROMPTS, LONGEST, player.eos_token_id)
        for pair in pairs:
            pair.opponent_real_logp, pair.opponent_generated_logps = -100.0, [-100.0]

        def respond(items: range, player=player, pairs=pairs) -> list:
            return player.respond([pairs[i].prompt_ids for i in items], 0, rows=items)

        if rank:
            with forced_ends([len(p.generated_ids[0]) for p in pairs]):
                respond(range(1))
                found["generate"], _ = timed(lambda work=respond: in_shards(None, "generate", PROMPTS, SHARD, work))
        spin.train(player, pairs[PAIRS : PAIRS + 4], 0, run)  # warms up
        step = timed(lambda player=player, pairs=pairs, run=run: spin.train(player, pairs[:PAIRS], 0, run))
        found |= zip((f"train {trained}", f"bytes {trained}"), step)
        found[f"trained {trained}"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return found


def world(ranks: int, shape: str) -> list[dict]:
    """Runs this program as `ranks` ranks with a thread each. Returns what the first of them has printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, __file__, "--worker", "--shape", shape]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def lines_of(results: dict) -> Iterator[str]:
    """The table: medians over the rounds, and the range."""
    one, two, apart = (results["rounds"][name] for name in ("1", "2", "side by side"))
    yield f"{results['shape']} shape, fp32, {results['device'].replace('1 threads', 'one thread a rank')},"
    yield f"commit {results['commit']}, torch {results['torch']};"
    yield f"`{results['command']}`; medians of {len(one)} rounds, range."
    yield "\n| | one rank | two ranks | times as fast | the machine's limit |\n|---|---|---|---|---|"
    for key, name in TIMES.items():
        a, b, c = ([row[key] for row in rows] for rows in (one, two, apart))
        ratios = [x / y for x, y in zip(a, b)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        limit = median(2 * x / y for x, y in zip(a, c))
        yield f"| {name} | {median(a):.1f} s | {median(b):.1f} s | {spread} | {limit:.2f} |"
    yield ""
    yield "The machine's limit is how much faster two processes of one rank each, which know nothing of each other, get"
    yield "through twice the work side by side: the cores share memory and cache.\n"
    for trained in TRAINED:
        sent = median(row[f"bytes {trained}"] for row in two) / 1e6
        least = 2 * 4 * two[0][f"trained {trained}"] / 1e6  # Each of two ranks must send all of the buffer.
        yield f"A step with {trained} trained sends {sent:.1f} MB in all; the least possible is {least:.1f} MB."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default="125M", choices=list(SHAPES))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        parallel.join(on_gpu=False)
        with onednn.products():
            found = worker(args.shape)
        if parallel.is_writer():
            print(json.dumps(found), flush=True)
        return parallel.leave()
    torch.set_num_threads(1)
    rounds: dict[str, list[dict]] = {"1": [], "2": [], "side by side": []}
    for n in range(args.rounds):
        for ranks in (1, 2) if n % 2 else (2, 1):
            rounds[str(ranks)] += world(ranks, args.shape)
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda _: world(1, args.shape), range(2)))
        rounds["side by side"].append({key: max(row[key] for (row,) in both) for key in TIMES})
        print({name: rows[-1] for name, rows in rounds.items()}, flush=True)
    results = {
        "device": device_name(torch.device("cpu")), "torch": torch.__version__, "commit": current_commit(),
        "command": " ".join(["python", "benchmarks/scaling.py", *sys.argv[1:]]), "shape": args.shape,
        "rounds": rounds,
    }  # fmt: skip
    print("\n".join(lines_of(results)))
    if args.shape != "tiny":
        write_whole(FOLDER / "results/scaling.json", json.dumps(results, indent=1) + "\n")
        renew_section(FOLDER.parent / "docs/scaling.md", "measured", lines_of(results))


if __name__ == "__main__":
    main()
