"""The default run over several seeds, beside LoRA and beside continued supervised training at the same cost.

    python benchmarks/pronounce.py --seeds 5

Writes benchmarks/results/pronounce.json and prints the README's table: every held-out metric's value at the start with
one standard error, then for each method its value after the last iteration (mean and standard deviation over seeds)
and its gain in standard errors of the start's value (mean, and the range over seeds; negative is worse).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from runtime.evaluate import METRICS  # noqa: E402
from runtime.report import COLUMNS  # noqa: E402

# The best of the settings tried with adapters.
LORA = ["--rank", "32", "--lora-alpha", "64", "--temperature", "1.15", "--lr", "1.5e-4,1.5e-4,1e-4"]
METHODS = {
    "self-play": ["spin.py"],
    "self-play, LoRA": ["spin.py", f"@{ROOT}/recipes/pronounce.args", *LORA],
    "supervised": ["sft.py", f"@{ROOT}/recipes/pronounce-continue.args"],
}


def run(method: str, seed: int) -> dict:
    """All rows of one run, on one thread; gains in standard errors of the start's value."""
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        script, *flags = METHODS[method]
        command = [sys.executable, str(ROOT / script), *flags, "--seed", str(seed), "--out", out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds = time.perf_counter() - began
        rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    gains = {name: sign * (last[name] - first[name]) / first[f"{name}_se"] for name, sign in METRICS.items()}
    print(method, "seed", seed, {name: round(gain, 1) for name, gain in gains.items()}, f"{seconds:.0f} s", flush=True)
    return {"method": method, "seed": seed, "seconds": seconds, "gains": gains, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each on one thread")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores, torch {torch.__version__}"
    path = ROOT / "benchmarks/results/pronounce.json"
    path.parent.mkdir(exist_ok=True)
    runs: list[dict] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in as_completed([pool.submit(run, m, seed) for seed in range(args.seeds) for m in METHODS]):
            runs.append(done.result())  # written after each: hours of runs should not hang on the last one
            path.write_text(json.dumps({"machine": machine, "commit": commit.strip(), "runs": runs}, indent=1) + "\n")
    print(f"\n{machine}, commit {commit.strip()}, {args.seeds} seeds\n")
    print(table(runs, args.seeds))


def table(runs: list[dict], seeds: int) -> str:
    """A Markdown table: a metric's value at the start, then for each method value and gain after the last iteration."""
    lines = ["| metric | start | " + " | ".join(f"{method} | gain" for method in METHODS) + " |"]
    lines += ["|---" * (2 + 2 * len(METHODS)) + "|"]
    for metric in [name for name in COLUMNS if name in METRICS]:
        scale, unit, digits = (1, "", 4) if metric == "nll" else (100, "%", 2)
        first = runs[0]["rows"][0]
        cells = [f"{scale * first[metric]:.{digits}f}{unit} ± {scale * first[metric + '_se']:.{digits}f}"]
        for method in METHODS:
            mine = [r for r in runs if r["method"] == method]
            last = [scale * r["rows"][-1][metric] for r in mine]
            gains = [r["gains"][metric] for r in mine]
            sd = statistics.stdev(last) if seeds > 1 else 0
            cells += [f"{sum(last) / seeds:.{digits}f}{unit} ± {sd:.{digits}f}"]
            cells += [f"{sum(gains) / seeds:+.1f} ({min(gains):+.1f} to {max(gains):+.1f})"]
        lines.append(f"| {metric.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
