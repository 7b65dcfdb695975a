"""Times and memory of the parts that cost time, in one process, each interleaved with its peers.

    python benchmarks/bench.py [logprobs ...] [--device cuda] [--seconds 60]

Prints a table, keeps the figures in benchmarks/results/<device>.json and renews the tables in benchmarks/README.md.
A part's cases are in the file of its name. Peers that are not installed are named and left out.
"""

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]
PARTS = ["logprobs", "generation", "training"]


@dataclass
class Case:
    """Ways to do one thing, the first of them ours."""

    name: str
    ways: dict[str, Callable[[], object]]
    notes: dict[str, str] = field(default_factory=dict)  # of ways: printed beside the figures
    rounds: int = 5  # at least
    rates: dict[str, tuple[float, str]] = field(default_factory=dict)  # of ways: amount and unit, to be had per second


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, dict[str, float]]:
    """Runs the ways in turn until `seconds` have passed, `case.rounds` times at least, in alternating order."""
    rows: dict[str, dict[str, float]] = {}
    ways = dict(case.ways)
    for name, function in case.ways.items():
        try:
            if case.rounds > 3:  # else a call takes so long that what is to be warmed up does not matter
                function()
            rows[name] = {"peak_mib": peak_bytes(function, device) / 2**20}
        except Exception as error:  # a peer that cannot run here must not cost the others their figures
            gc.collect()
            ways.pop(name)
            rows[name] = {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"}
    times: dict[str, list[float]] = {name: [] for name in ways}
    began = time.perf_counter()
    for turn in itertools.count():
        if turn >= case.rounds and time.perf_counter() - began > seconds:
            break
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            times[name].append(timed(ways[name], device))
    for name, samples in times.items():
        low, median, high = (sorted(samples)[int(q * (len(samples) - 1))] for q in (0.2, 0.5, 0.8))
        rows[name] |= {"median_ms": median, "p20_ms": low, "p80_ms": high, "runs": len(samples)}
        if name in case.rates:
            amount, unit = case.rates[name]
            rows[name] |= {"rate": amount / median * 1e3, "unit": f"{unit}/s"}
    for name, note in case.notes.items():
        rows.setdefault(name, {})["note"] = note
    return rows


def timed(function: Callable[[], object], device: torch.device) -> float:
    """ms of one call: by events on the GPU's own clock where there is one."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)
    began = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - began)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Most bytes that tensors made by one call held at a time, over what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with quiet_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """The profiler tells of its every start there, past Python."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if models:
            return f"{models[0].removesuffix(' Processor')}, {torch.get_num_threads()} threads"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def current_commit() -> str:
    """Marked where code differs from it; results and tables may."""

    def git(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *args], cwd=FOLDER.parent, capture_output=True, text=True)

    changed = git("diff", "--quiet", "HEAD", "--", "*.py").returncode
    return git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if changed else "")


def lines_of(rows: dict[str, dict]) -> Iterator[str]:
    """A Markdown table of one case; times are also given as multiples of the first way's."""
    ours = next(iter(rows.values())).get("median_ms")
    rated = any("rate" in row for row in rows.values())
    yield f"| | median ms | p20 to p80 | times ours | peak MiB |{' rate |' if rated else ''}"
    yield f"|---|---|---|---|---|{'---|' if rated else ''}"
    for name, row in rows.items():
        note = f" ({row['note']})" if "note" in row else ""
        if "median_ms" not in row:
            yield f"| {name}{note} | {row.get('failed', 'not run')} | | | |{' |' if rated else ''}"
            continue
        times = f"{row['median_ms'] / ours:.2f}" if ours else ""
        rate = f" {rounded(row['rate'])} {row['unit']} |" if "rate" in row else " |" if rated else ""
        yield (
            f"| {name}{note} | {row['median_ms']:.2f} | {row['p20_ms']:.2f} to {row['p80_ms']:.2f} | {times} "
            f"| {row['peak_mib']:,.0f} |{rate}"
        )


def rounded(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def renew_tables() -> None:
    """Writes all results into benchmarks/README.md, between its two marks."""
    readme = FOLDER / "README.md"
    head, begin, rest = readme.read_text().partition("<!-- results -->\n")
    _, end, tail = rest.partition("<!-- end of results -->\n")
    lines = []
    for path in sorted((FOLDER / "results").glob("bench-*.json")):
        results = json.loads(path.read_text())
        lines += [f"### {results['device']}", ""]
        for name, case in results["cases"].items():
            lines += [f"**{name}** (torch {case['torch']}, commit {case['commit']})", "", *lines_of(case["ways"]), ""]
    readme.write_text(head + begin + "\n".join(["", *lines, ""]) + end + tail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, help="of timing for each case (1 on a GPU, 20 on a CPU)")
    parser.add_argument("--match", default="", metavar="TEXT", help="only cases with this in their name")
    args = parser.parse_args()
    if wrong := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(wrong))}; there are {', '.join(PARTS)}")
    device = torch.device(args.device)
    name = device_name(device)
    commit = current_commit()
    path = FOLDER / "results" / f"bench-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    results = json.loads(path.read_text()) if path.exists() else {"device": name, "cases": {}}
    print(f"{name}, torch {torch.__version__}, commit {commit}")
    for part in args.parts or PARTS:
        for case in importlib.import_module(f"{part}_cases").cases(device):
            if args.match not in case.name:
                continue
            began = time.perf_counter()
            rows = measure(case, device, args.seconds or (1 if device.type == "cuda" else 20))
            results["cases"][case.name] = {"torch": torch.__version__, "commit": commit, "ways": rows}
            path.write_text(json.dumps(results, indent=1) + "\n")  # at once: a lease may end
            print("\n".join(["", f"{case.name}  [{time.perf_counter() - began:.0f} s]", *lines_of(rows)]), flush=True)
            del case
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    renew_tables()


if __name__ == "__main__":
    main()
