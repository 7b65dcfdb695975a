"""Times of the parts that cost time, in one process, each interleaved with its peers.

    python benchmarks/bench.py [--device cuda] [--seconds 60]

Prints a table and writes a JSON file named after the device to benchmarks/results: median, 20th and 80th percentile
in ms, and on a GPU the peak memory over the inputs in MiB. Later comparisons are added here, one function each.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from kernels import linear_logprobs  # noqa: E402


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The textbook way: all logits at once."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def logprob_cases(device: torch.device) -> dict[str, dict[str, Callable[[], None]]]:
    """{case: {way: function}} for log-probabilities from hidden states, with a frozen head."""
    shapes = [(512, 768)] if device.type == "cpu" else [(2048, 768), (8192, 768), (8192, 2560)]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    cases = {}
    for N, D in shapes:
        rng = torch.Generator().manual_seed(0)
        hidden = torch.randn(N, D, generator=rng).to(device, dtype).requires_grad_()
        weight = (torch.randn(50257, D, generator=rng) * D**-0.5).to(device, dtype)
        targets = torch.randint(50257, (N,), generator=rng).to(device)
        upstream = torch.randn(N, generator=rng).to(device)

        def train(way: Callable, hidden=hidden, weight=weight, targets=targets, upstream=upstream) -> None:
            hidden.grad = None
            (way(hidden, weight, targets) * upstream).sum().backward()

        def score(way: Callable, hidden=hidden, weight=weight, targets=targets) -> None:
            with torch.no_grad():
                way(hidden, weight, targets)

        for name, call in (("forward + backward", train), ("scoring", score)):
            ways = {"ours": linear_logprobs, "eager": eager}
            cases[f"log-probabilities, {name}, N {N}, D {D}, V 50257, {dtype}".replace("torch.", "")] = {
                way: (lambda call=call, function=function: call(function)) for way, function in ways.items()
            }
    return cases


def measure(ways: dict[str, Callable[[], None]], device: torch.device, seconds: float) -> dict[str, dict[str, float]]:
    """Runs the ways in turn until `seconds` have passed; the order alternates, so drift hits all alike."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    peak = {}
    for way, function in ways.items():  # warm-up, and memory
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            torch.cuda.synchronize()
            peak[way] = (torch.cuda.max_memory_allocated() - before) / 2**20
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times[way]) < 5:
        for way, function in ways.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[way].append(1e3 * (time.perf_counter() - start))
    result = {}
    for way, samples in times.items():
        low, median, high = (sorted(samples)[int(q * (len(samples) - 1))] for q in (0.2, 0.5, 0.8))
        result[way] = {"median_ms": median, "p20_ms": low, "p80_ms": high, "runs": len(samples)}
        if way in peak:
            result[way]["peak_mib"] = peak[way]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=60, help="for all cases together")
    args = parser.parse_args()
    device = torch.device(args.device)
    cases = logprob_cases(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    results = {
        "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit.strip(),
        "cases": {},
    }  # fmt: skip
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for case, ways in cases.items():
        results["cases"][case] = rows = measure(ways, device, args.seconds / len(cases))
        print(case)
        for way, row in rows.items():
            memory = f"  peak {row['peak_mib']:7.0f} MiB" if "peak_mib" in row else ""
            print(f"  {way:6} {row['median_ms']:9.2f} ms  ({row['p20_ms']:.2f} to {row['p80_ms']:.2f}){memory}")
        ratios = {way: row["median_ms"] / rows["ours"]["median_ms"] for way, row in rows.items() if way != "ours"}
        print("  " + ", ".join(f"{way} / ours {ratio:.2f}" for way, ratio in ratios.items()), flush=True)
    path = ROOT / "benchmarks/results" / f"{name.replace(' ', '-').lower()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
