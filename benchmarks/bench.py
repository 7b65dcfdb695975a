"""Times and memory of the parts that cost time, in one process, each interleaved with its peers.

    python benchmarks/bench.py [kernel|generation|training|iteration ...] [--device cuda]
    python benchmarks/bench.py --quick      every part on tiny sizes, in about a minute; stores nothing

Prints a table per case, stores the figures in benchmarks/results/bench-<device>.json and all tables beside them in .md.
The cases of a part are in <part>_cases.py, the most informative first. Results are written after each case, so a run
that is cut off keeps what it had. An error ends only the way or the case that raised it, and is stored in place of the
figures; so is the reason why a peer is missing.
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
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # Otherwise torch's profiler announces its every start.
import torch

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]
from kernels import onednn  # noqa: E402

PARTS = ["kernel", "generation", "training", "iteration"]
GPU_MINUTES = 6  # limit of all parts together on a GPU: a borrowed one may grant 10 minutes per command


@dataclass
class Ways:
    """Functions that all do one thing, the first of them ours."""

    calls: dict[str, Callable[[], Any]]
    peers: dict[str, Callable[[], Callable]] = field(default_factory=dict)  # Each sets a way up and returns its call.
    work: tuple[float, str] | None = None  # amount and unit of what one call does
    rounds: int = 5  # least number of rounds
    check: Callable[[Callable], str] | None = None  # called with a way before its measurement; returns a note


@dataclass
class Case:
    """A row of ways under a name. `build` allocates their inputs, and may raise."""

    name: str
    build: Callable[[torch.device], Ways]
    estimate: float = 0.0  # seconds in total on a GPU; the case is skipped if fewer remain
    extra: bool = False  # An extra case runs only if --match names it.


def ours(call: Callable, device: torch.device) -> dict[str, Callable]:
    """Our ways of a call: on a CPU with onednn.py, as spin.py runs, and without it."""

    def fast(*args: Any) -> Any:
        with onednn.products():
            return call(*args)

    return {"ours": fast, "ours without onednn.py": call} if device.type == "cpu" else {"ours": call}


def measure(ways: Ways, device: torch.device, seconds: float, deadline: float = float("inf")) -> dict[str, dict]:
    """Runs the ways in turn, in alternating order, until `seconds` have passed, `ways.rounds` times at least.

    The first turn sets peers up and measures memory. After `deadline`, in terms of time.perf_counter(), no turn begins.

    Returns: way -> its figures, or "failed" with the reason.
    """
    calls = dict(ways.calls)
    rows: dict[str, dict] = {name: {} for name in [*calls, *ways.peers]}
    times: dict[str, list[float]] = {name: [] for name in rows}  # times of the ways that have not failed
    for turn in itertools.count():
        now = time.perf_counter()
        if turn <= 1:
            began = now
        elif not times or now > deadline or (turn > ways.rounds and now - began > seconds):
            break
        for name in list(times)[:: -1 if turn % 2 else 1]:
            try:
                if time.perf_counter() > deadline and not times[name]:
                    raise TimeoutError("no time was left")
                if turn:
                    times[name].append(timed(calls[name], device))
                    continue
                if name in ways.peers:
                    calls[name] = ways.peers[name]()
                if ways.check:
                    rows[name]["note"] = ways.check(calls[name])
                rows[name]["peak_mib"] = peak_bytes(calls[name], device) / 2**20
            except Exception as error:
                rows[name]["failed"] = reason(error)
                del times[name]
            finally:
                release(device)
    return {name: row | figures(times.get(name), ways.work) for name, row in rows.items()}


def figures(samples: list[float] | None, work: tuple[float, str] | None) -> dict[str, Any]:
    """Median, 20th and 80th percentile and rate of a way's times."""
    if not samples:
        return {}
    ordered, cut = sorted(samples), int(0.2 * (len(samples) - 1))
    found = {"median_ms": median(ordered), "p20_ms": ordered[cut], "p80_ms": ordered[-1 - cut], "runs": len(ordered)}
    return found | ({"rate": work[0] / found["median_ms"] * 1e3, "unit": f"{work[1]}/s"} if work else {})


def reason(error: Exception) -> str:
    """One line of an exception."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"


def release(device: torch.device) -> None:
    """Frees what is no longer referenced. Raises if an error has made the GPU unusable to this process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: on a GPU by events on its own clock, otherwise wall time.

    The GPU first sleeps for about a millisecond, so that launches are queued by the time it starts: a short call is
    timed by its kernels and not by Python, as in training, where the CPU runs ahead.
    """
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)
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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.machine()
    with contextlib.suppress(OSError, AttributeError):
        name = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    return f"{name.removesuffix(' Processor')}, {torch.get_num_threads()} threads"


def current_commit() -> str:
    """The commit, marked if code or recipes differ from it; "unknown" without git or outside a repository."""

    def git(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *args], cwd=FOLDER.parent, capture_output=True, text=True)

    try:
        commit = git("rev-parse", "--short", "HEAD").stdout.strip()
        changed = git("diff", "--quiet", "HEAD", "--", "*.py", "*.args").returncode
    except OSError:
        return "unknown"
    return commit + ("-dirty" if changed else "") if commit else "unknown"


def lines_of(case: dict[str, Any]) -> Iterator[str]:
    """A Markdown table of a case's figures; times are also given as multiples of the first way's."""
    if "failed" in case:
        yield case["failed"]
        return
    yield "| | median ms | p20 to p80 | times ours | peak MiB | rate |"
    yield "|---|---|---|---|---|---|"
    ours = next(iter(case["ways"].values())).get("median_ms")
    for name, row in case["ways"].items():
        title = f"{name} ({row['note']})" if row.get("note") else name
        if "median_ms" not in row:
            yield f"| {title} | {row.get('failed', 'not run')} | | | | |"
            continue
        times = f"{row['median_ms'] / ours:.2f}" if ours else ""
        rate = f"{row['rate']:{',.0f' if row['rate'] >= 100 else '.3g'}} {row['unit']}" if "rate" in row else ""
        spread = f"{row['median_ms']:.2f} | {row['p20_ms']:.2f} to {row['p80_ms']:.2f}"
        yield f"| {title} | {spread} | {times} | {row['peak_mib']:,.0f} | {rate} |"


def write_whole(path: Path, text: str) -> None:
    """Replaces the file at once, so that a run that is killed never leaves half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


class Results:
    """The stored figures of one device. A run replaces the cases that it measures and keeps the others."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        name = device_name(device)
        self.path = folder / f"bench-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
        self.stored: dict[str, Any] = {"device": name, "cases": {}}
        self.versions = {"torch": torch.__version__, "commit": current_commit()}
        if self.path.exists():
            self.stored = json.loads(self.path.read_text())
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, case: dict[str, Any]) -> None:
        """Stores {"ways": {way: row}} or {"failed": reason} under the name of a case, and writes figures and tables."""
        self.stored["cases"][name] = self.versions | case
        write_whole(self.path, json.dumps(self.stored, indent=1) + "\n")
        lines = [f"# {self.stored['device']}", ""]
        for name, case in self.stored["cases"].items():
            lines += [f"**{name}** (torch {case['torch']}, commit {case['commit']})", "", *lines_of(case), ""]
        write_whole(self.path.with_suffix(".md"), "\n".join(lines))


def run_part(
    part: str, cases: list[Case], results: Results, device: torch.device, seconds: float, deadline: float
) -> None:
    """Measures, stores and prints the cases in turn, or says why there are no figures.

    A case that would not end before the deadline, by its estimate, is skipped and named.
    """
    print(f"\n== {part}: {len(cases)} cases", flush=True)
    for case in cases:
        began = time.perf_counter()
        if began + case.estimate > deadline:
            print(f"\n{case.name}\nskipped: less than {case.estimate:.0f} s are left", flush=True)
            continue
        try:
            found = {"ways": measure(case.build(device), device, seconds, deadline)}
        except Exception as error:
            found = {"failed": f"failed: {reason(error)}"}
        results.put(case.name, found)
        print(f"\n{case.name}  [{time.perf_counter() - began:.0f} s]", *lines_of(found), sep="\n", flush=True)
        release(device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the benchmark, measures nothing")
    parser.add_argument("--minutes", type=float, help=f"limit of all parts ({GPU_MINUTES} on a GPU, none on a CPU)")
    parser.add_argument("--match", default="", metavar="TEXT", help="only cases with this in their name; more sizes")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", metavar="FOLDER", help="to write to")
    args = parser.parse_args(argv)
    if wrong := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(wrong))}; there are {', '.join(PARTS)}")
    on_gpu, device = args.device == "cuda", torch.device(args.device)
    if on_gpu and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device")
    minutes = args.minutes if args.minutes is not None else GPU_MINUTES if on_gpu else float("inf")
    seconds = 0 if args.quick else 2 if on_gpu else 20  # seconds of timing per case
    deadline = time.perf_counter() + 60 * minutes
    stance = "force_eager" if args.quick else "default"  # compilation takes longer than all the rest
    with tempfile.TemporaryDirectory() as nowhere, torch.compiler.set_stance(stance):
        results = Results(Path(nowhere) if args.quick else args.results, device)
        print(f"{results.stored['device']}, torch {torch.__version__}, commit {results.versions['commit']}")
        for part in args.parts or PARTS:
            cases = importlib.import_module(f"{part}_cases").CASES["quick" if args.quick else args.device]
            cases = [case for case in cases if args.match in case.name and (args.match or not case.extra)]
            if args.quick:
                cases = [replace(case, build=lambda _, c=case: replace(c.build(device), rounds=1)) for case in cases]
            run_part(part, cases, results, device, seconds, deadline)


if __name__ == "__main__":
    main()
