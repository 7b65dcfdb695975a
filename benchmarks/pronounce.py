"""The default run over several seeds, beside continued supervised training of the same start at no less cost.

    python benchmarks/pronounce.py --seeds 5

Writes benchmarks/results/pronounce.json and prints the README's table: for every held-out metric the start's value
and one standard error of it, then the change of each method, mean and worst over the seeds, in those standard errors.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METRICS = {"greedy": 1, "sampled": 1, "greedy_error": -1, "sampled_error": -1, "nll": -1}  # sign: which way is better


def last_rows(flags: list[str], seed: int) -> tuple[dict, dict, float]:
    """(first row, last row, seconds) of one run of spin.py."""
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        command = [sys.executable, str(ROOT / "spin.py"), *flags, "--seed", str(seed), "--out", out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return rows[0], rows[-1], seconds


def gains(first: dict, last: dict) -> dict[str, float]:
    """Improvement of every metric, in standard errors of the start's value."""
    return {name: sign * (last[name] - first[name]) / first[f"{name}_se"] for name, sign in METRICS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    methods = {
        "self-play": ["spin"],
        "supervised": ["sft", f"@{ROOT}/recipes/pronounce-continue.args"],
    }
    results: dict = {"machine": f"{platform.machine()}, {platform.processor() or 'CPU'}", "seeds": seeds}
    for name, flags in methods.items():
        runs = [last_rows(flags, seed) for seed in range(seeds)]
        results[name] = [
            {"first": first, "last": last, "gains": gains(first, last), "seconds": seconds}
            for first, last, seconds in runs
        ]
        seconds = sorted(seconds for *_, seconds in runs)
        print(f"{name}: {seconds[0]:.0f} to {seconds[-1]:.0f} s a run", flush=True)
    path = ROOT / "benchmarks/results/pronounce.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print("\n| metric | start | " + " | ".join(f"{m}: after | gain in s.e., mean (worst)" for m in methods) + " |")
    print("|---" * (2 + 2 * len(methods)) + "|")
    for metric in METRICS:
        first = results["self-play"][0]["first"]
        scale, unit = (1, "") if metric == "nll" else (100, "%")
        cells = [f"{scale * first[metric]:.4g}{unit} ± {scale * first[metric + '_se']:.2g}"]
        for name in methods:
            last = [scale * r["last"][metric] for r in results[name]]
            gain = [r["gains"][metric] for r in results[name]]
            mean, spread = sum(last) / seeds, max(last) - min(last)
            cells += [f"{mean:.4g}{unit} (range {spread:.2g})", f"{sum(gain) / seeds:+.1f} ({min(gain):+.1f})"]
        print(f"| {metric.replace('_', ' ')} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
