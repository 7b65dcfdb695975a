"""What an iteration of self-play costs on many GPUs, simulated from costs a token and the speed of links.

    python benchmarks/simulate.py                     the table of docs/scaling.md: 125M, 1.3B, 2.7B on 1, 8, 64 GPUs
    python benchmarks/simulate.py --check             its prediction for two ranks beside results/scaling.json
    python benchmarks/simulate.py --shapes 2.7B --ranks 16 --flops 5e14 --between 25e9

Shards of prompts go to the rank that is free first, as in runtime/parallel.py; the batch of each step is cut over the
ranks by the same function. Rates of computing are arithmetic: the work of a token over `--flops` (training, scoring),
and the bytes that a step of generation reads over `--memory`. Times are in seconds, rates a second, sizes in bytes.
"""

import argparse
import heapq
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import FOLDER
from generation_cases import SHAPES

from runtime import parallel
from runtime.run import SCORE_SHARD, SHARD_BATCHES, SHARDS

VOCABULARY, PLACES, WINDOW = 50257, 2048, 256
LOOPBACK = 2e9  # bytes a second between two processes of a machine, for --check


class Machine(NamedTuple):
    """Speeds that are within reach, not peaks."""

    flops: float  # of one GPU
    memory: float  # bytes a second that one GPU reads
    inside: float  # bytes a second that a GPU sends to the others of its host
    between: float  # bytes a second that a GPU sends to other hosts
    latency: float  # of a message
    per_host: int


class Shape(NamedTuple):
    blocks: int  # parameters of the blocks
    outside: int  # of the embeddings
    width: int
    layers: int

    @property
    def parameters(self) -> int:
        return self.blocks + self.outside


def shape_of(name: str) -> Shape:
    D, L, _ = SHAPES[name]
    return Shape(12 * D * D * L, (VOCABULARY + PLACES) * D, D, L)


def spread(times: Sequence[float], ranks: int) -> float:
    """When the last of `ranks` ends, if each takes the next piece of work whenever it has finished one."""
    free = [0.0] * ranks
    for time in times:
        heapq.heapreplace(free, free[0] + time)
    return max(free)


def cut(items: Sequence, count: int, least: int, most: int) -> list[Sequence]:
    """In shards, as Run.shard_size cuts them."""
    size = count or min(most, -(-len(items) // (SHARDS * least)) * least)
    return [items[i : i + size] for i in range(0, len(items), size)]


def generation_time(lengths: Sequence[int], batch: int, step: Callable[[int], float]) -> float:
    """Of a shard: the batch stays full until no prompt waits, then its last rows end one by one.

    Args:
        lengths: tokens of the responses.
        step: time of a token for that many rows.
    """
    free = [0.0] * min(batch, len(lengths))
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    ends = sorted(free)
    total, before = 0.0, 0.0
    for done, end in enumerate(ends):
        total += (end - before) * step(len(ends) - done)
        before = end
    return total


def all_reduce(size: float, ranks: int, machine: Machine) -> float:
    """In a ring: 2 (k - 1) / k of the buffer pass every link, the slowest of which decides."""
    if ranks == 1:
        return 0.0
    link = machine.inside if ranks <= machine.per_host else machine.between
    return 2 * (ranks - 1) / ranks * size / link + 2 * (ranks - 1) * machine.latency


class Times(NamedTuple):
    generate: float
    score: float
    train: float
    communication: float  # the part of `train` in which links work, be it hidden behind computing or not
    memory: float  # bytes of a GPU: weights, gradients, optimizer state and, while generating, the cache


def simulate(shape: Shape, machine: Machine, ranks: int, args: argparse.Namespace) -> Times:
    rng = random.Random(0)
    lengths = [max(1, min(args.limit, round(rng.lognormvariate(0, 0.6) * args.response))) for _ in range(args.prompts)]

    def key_values(tokens: float) -> float:
        """Bytes of a row's keys and values in bf16: half of the layers hold the last WINDOW tokens only."""
        return 2 * 2 * shape.width * shape.layers / 2 * (tokens + min(tokens, WINDOW))

    def step(rows: int) -> float:
        read = 2 * shape.parameters + rows * key_values(args.prompt + args.response / 2)
        return max(read / machine.memory, 2 * shape.parameters * rows / machine.flops)

    shards = cut(lengths, args.shard, *(n * args.gen_batch for n in SHARD_BATCHES))
    generate = spread([generation_time(shard, args.gen_batch, step) for shard in shards], ranks)
    tokens = [args.prompt + args.response + length for length in lengths]
    forward = 2 * shape.parameters / machine.flops
    score = spread([forward * sum(shard) for shard in cut(tokens, args.shard, *SCORE_SHARD)], ranks)
    work = 3 * forward if args.full else 2 * forward  # LoRA's frozen weights need no gradient of their own
    batches = [tokens[i : i + args.batch] for i in range(0, len(tokens), args.batch)]
    slowest = [work * max(sum(b[i] for i in part) for part in parallel.shares(b, ranks)) for b in batches[:50]]
    compute = statistics.mean(slowest)
    trained = shape.parameters if args.full else 2 * 8 * 16 * shape.width * shape.layers  # rank 16, attention and MLP
    state = 16 * trained + (0 if args.full else 2 * shape.parameters)
    whole = 2 * shape.parameters + (4 * trained if args.full else 0)
    if args.fsdp and ranks > 1:
        link = machine.inside if ranks <= machine.per_host else machine.between
        micro = max(1, round(sum(tokens[: args.batch]) / ranks / args.micro_tokens))
        # Of each micro-batch: the blocks travel twice in bf16 (forward, backward), and gradients once in fp32.
        sent = micro * (ranks - 1) / ranks * ((2 * 2 + 4) * shape.blocks + (2 * 4 + 4) * shape.outside)
        communication = sent / link
        one_step = max(compute, communication)  # one block travels while another one computes
        state, whole = state / ranks, 2 * shape.parameters + 4 * trained / ranks
    else:
        communication = all_reduce(4 * trained, ranks, machine)
        one_step = compute + communication
    steps = args.epochs * len(batches)
    cache = args.gen_batch * key_values(args.prompt + args.limit)
    return Times(generate, score, steps * one_step, steps * communication, max(state, whole + cache))


def table(args: argparse.Namespace) -> str:
    machine = Machine(args.flops, args.memory, args.inside, args.between, args.latency, args.per_host)
    lines = [
        "| shape | trained | GPUs | generate | score | train | of it links | iteration | GPU hours | memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in args.shapes:
        for full, fsdp in ((False, False), (True, name == "2.7B")):
            args.full, args.fsdp = full, fsdp
            for ranks in args.ranks:
                t = simulate(shape_of(name), machine, ranks, args)
                total = t.generate + t.score + t.train
                trained = ("all, FSDP" if fsdp and ranks > 1 else "all") if full else "LoRA"
                share = t.communication / t.train
                phases = " | ".join(minutes(time) for time in (t.generate, t.score, t.train))
                lines.append(
                    f"| {name} | {trained} | {ranks} | {phases} | {share:.0%} | {minutes(total)} | "
                    f"{ranks * total / 3600:.1f} | {t.memory / 1e9:.0f} GB |"
                )
    return "\n".join(lines)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def check(path: Path) -> str:
    """The times of two ranks, predicted from those of one, beside the measured ones."""
    found = json.loads(path.read_text())["rounds"]
    one, two = ({key: statistics.median(row[key] for row in found[k]) for key in found[k][0]} for k in "12")
    from scaling import LONGEST, PAIRS, PROMPTS, SHARD, random_pairs

    pairs = random_pairs(PROMPTS, LONGEST)
    shards = [[len(p.generated_ids) for p in pairs[i : i + SHARD]] for i in range(0, PROMPTS, SHARD)]
    works = [generation_time(shard, SHARD, lambda rows: 1.0 + rows / SHARD) for shard in shards]
    lines = ["| | predicted for two ranks | measured |", "|---|---|---|"]
    predicted = one["generate"] * spread(works, 2) / sum(works)
    lines.append(f"| generation | {predicted:.1f} s | {two['generate']:.1f} s |")
    batch = [p.tokens for p in pairs[:PAIRS]]
    share = max(sum(batch[i] for i in part) for part in parallel.shares(batch, 2)) / sum(batch)
    for trained in ("LoRA", "all parameters"):
        travel = two[f"bytes {trained}"] / 2 / LOOPBACK
        predicted = one[f"train {trained}"] * share + travel
        lines.append(f"| training step, {trained} | {predicted:.2f} s | {two[f'train {trained}']:.2f} s |")
    return "\n".join(lines)


def args_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def number(flag: str, default: float, text: str, kind: type = float) -> None:
        parser.add_argument(flag, type=kind, default=default, help=f"{text} [{default:g}]")

    parser.add_argument("--shapes", nargs="+", default=["125M", "1.3B", "2.7B"], choices=list(SHAPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 8, 64])
    number("--prompts", 50000, "prompts of an iteration", int)
    number("--prompt", 150, "mean tokens of a prompt", int)
    number("--response", 200, "mean tokens of a response", int)
    number("--limit", 1024, "most tokens of a response", int)
    number("--epochs", 2, "passes over the pairs", int)
    number("--batch", 64, "pairs of a step", int)
    number("--micro-tokens", 8192, "tokens of a forward pass", int)
    number("--gen-batch", 256, "responses that a GPU generates together", int)
    number("--shard", 0, "prompts that a rank takes at a time; 0: as the run chooses", int)
    number("--flops", 4e14, "operations a second of a GPU in training")
    number("--memory", 2e12, "bytes a second that a GPU reads while it generates")
    number("--inside", 2e11, "bytes a second between two GPUs of a host")
    number("--between", 4e10, "bytes a second of a GPU to other hosts")
    number("--latency", 1e-5, "of a message")
    number("--per-host", 8, "GPUs", int)
    parser.add_argument("--check", action="store_true", help="predict the measured times of two ranks")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = args_of()
    print(check(FOLDER / "results" / "scaling.json") if args.check else table(args))
