"""Times and memory of the parts that cost time, in one process, each interleaved with its peers.

    python benchmarks/bench.py [kernel|generation|training|iteration ...] [--device cuda]
    python benchmarks/bench.py --quick      every part on tiny sizes, in about a minute; stores nothing

Prints a table per case, stores the figures in benchmarks/results/bench-<device>.json and renews the tables in
benchmarks/README.md. The cases of a part are in <part>_cases.py, the most informative first. Results are written after
each case, so a run that is cut off keeps what it had; an error ends only the way or the case that raised it, and is
stored in place of the figures. Peers that are not installed are named and left out.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]
from kernels import onednn  # noqa: E402

PARTS = ["kernel", "generation", "training", "iteration"]
GPU_MINUTES = 6  # limit of all parts together on a GPU: a borrowed one may grant 10 minutes per command
WARM_UP_ROUNDS = 4  # cases with fewer rounds take so long that what a first call sets up does not matter
WHEELS = {  # module of a peer -> its name on PyPI
    name: name.replace("_", "-")
    for name in ("transformers", "peft", "trl", "datasets", "liger_kernel", "cut_cross_entropy")
}


@dataclass
class Ways:
    """Functions that all do one thing, the first of them ours."""

    calls: dict[str, Callable[[], Any]]
    notes: dict[str, str] = field(default_factory=dict)  # by way: printed beside the figures
    rates: dict[str, tuple[float, str]] = field(default_factory=dict)  # by way: amount and unit of work in one call
    rounds: int = 5  # minimum
    check: Callable[[Any], str] | None = None  # turns the result of a first call into a note


@dataclass
class Case:
    """A row of ways under a name. `build` allocates their inputs, and may raise."""

    name: str
    build: Callable[[], Ways]
    estimate: float = 0.0  # seconds in total on a GPU; the case is skipped if fewer remain
    extra: bool = False  # runs only if --match names it


def measure(ways: Ways, device: torch.device, seconds: float, deadline: float = float("inf")) -> dict[str, dict]:
    """Runs the ways in turn, in alternating order, until `seconds` have passed, `ways.rounds` times at least.

    No further call begins when time.perf_counter() has passed `deadline`.

    Returns: way -> its figures, or "failed" with the reason.
    """
    rows: dict[str, dict] = {name: {} for name in ways.calls}
    for name, note in ways.notes.items():
        rows.setdefault(name, {})["note"] = note
    times: dict[str, list[float]] = {name: [] for name in ways.calls}  # of the ways that have not failed

    def attempt(name: str, function: Callable, *args: Any) -> Any:
        try:
            if time.perf_counter() > deadline and not times[name]:
                raise TimeoutError("not run: the time limit has passed")
            return function(*args)
        except Exception as error:
            rows[name]["failed"] = str(error) if isinstance(error, TimeoutError) else reason(error)
            del times[name]
        release(device)  # after the except clause, whose traceback holds the tensors of the failed call
        return None

    for name in ways.calls:
        attempt(name, first_call, ways, name, rows[name], device)
    began = time.perf_counter()
    for turn in itertools.count():
        now = time.perf_counter()
        if not times or (turn and (now > deadline or (turn >= ways.rounds and now - began > seconds))):
            break
        for name in list(times) if turn % 2 else list(times)[::-1]:
            elapsed = attempt(name, timed, ways.calls[name], device)
            if elapsed is not None:
                times[name].append(elapsed)
    add_times(rows, times, ways.rates)
    return rows


def first_call(ways: Ways, name: str, row: dict[str, Any], device: torch.device) -> None:
    """Warms a way up, checks its result, and measures its memory."""
    if ways.rounds >= WARM_UP_ROUNDS:
        result = ways.calls[name]()
        if ways.check and (note := ways.check(result)):
            row["note"] = ", ".join(filter(None, [row.get("note"), note]))
        del result
    row["peak_mib"] = peak_bytes(ways.calls[name], device) / 2**20


def add_times(rows: dict[str, dict], times: dict[str, list[float]], rates: dict[str, tuple[float, str]]) -> None:
    """Adds to each way's row the median, the 20th and 80th percentile and the rate."""
    for name, samples in times.items():
        if not samples:
            continue
        low, median, high = (sorted(samples)[int(q * (len(samples) - 1))] for q in (0.2, 0.5, 0.8))
        rows[name] |= {"median_ms": median, "p20_ms": low, "p80_ms": high, "runs": len(samples)}
        if name in rates:
            amount, unit = rates[name]
            rows[name] |= {"rate": amount / median * 1e3, "unit": f"{unit}/s"}


def reason(error: Exception) -> str:
    """One line of an exception."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"


@contextlib.contextmanager
def optional(notes: dict[str, str], name: str) -> Iterator[None]:
    """Around the import and setup of a peer: notes why it is left out, if it is."""
    try:
        yield
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in WHEELS
        notes[name] = "not installed" if missing else reason(error)
    except Exception as error:
        notes[name] = reason(error)


def ours(call: Callable, device: torch.device) -> dict[str, Callable]:
    """Our ways of a call: on a CPU with onednn.py, as spin.py runs, and without it."""

    def fast(*args: Any) -> Any:
        with onednn.products():
            return call(*args)

    return {"ours": fast, "ours without onednn.py": call} if device.type == "cpu" else {"ours": call}


def release(device: torch.device) -> None:
    """Frees what is no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # of a GPU that an error has made unusable: see `alive`
            torch.cuda.empty_cache()


def alive(device: torch.device) -> bool:
    """False after an error like an illegal memory access: this process can then no longer use the GPU."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception:
            return False
    return True


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
    """The commit, marked if code or recipes differ from it; "unknown" without git or outside a repository."""

    def git(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *args], cwd=FOLDER.parent, capture_output=True, text=True)

    try:
        commit = git("rev-parse", "--short", "HEAD").stdout.strip()
        changed = git("diff", "--quiet", "HEAD", "--", "*.py", "*.args").returncode
    except OSError:
        return "unknown"
    return commit + ("-dirty" if changed else "") if commit else "unknown"


def lines_of(rows: dict[str, dict]) -> Iterator[str]:
    """A Markdown table of one case; times are also given as multiples of the first way's."""
    ours = next(iter(rows.values()), {}).get("median_ms")
    rated = any("rate" in row for row in rows.values())
    yield f"| | median ms | p20 to p80 | times ours | peak MiB |{' rate |' if rated else ''}"
    yield f"|---|---|---|---|---|{'---|' if rated else ''}"
    for name, row in rows.items():
        note = f" ({row['note']})" if "note" in row else ""
        if "failed" in row or "median_ms" not in row:
            yield f"| {name}{note} | {row.get('failed', 'not run')} | | | |{' |' if rated else ''}"
            continue
        times = f"{row['median_ms'] / ours:.2f}" if ours else ""
        rate = " |" if rated else ""
        if "rate" in row:
            rate = f" {row['rate']:{',.0f' if row['rate'] >= 100 else '.3g'}} {row['unit']} |"
        yield (
            f"| {name}{note} | {row['median_ms']:.2f} | {row['p20_ms']:.2f} to {row['p80_ms']:.2f} | {times} "
            f"| {row['peak_mib']:,.0f} |{rate}"
        )


def renew_section(path: Path, name: str, lines: Iterable[str]) -> None:
    """Replaces what stands in a document between the two marks of this name."""
    head, begin, rest = path.read_text().partition(f"<!-- {name} -->\n")
    _, end, tail = rest.partition(f"<!-- end of {name} -->\n")
    if not end:
        raise ValueError(f"{path} has no section between <!-- {name} --> and <!-- end of {name} -->")
    write_whole(path, head + begin + "\n".join(["", *lines, ""]) + end + tail)


def renew_tables() -> None:
    """Writes all stored results into benchmarks/README.md."""
    lines = []
    for path in sorted((FOLDER / "results").glob("bench-*.json")):
        results = json.loads(path.read_text())
        lines += [f"### {results['device']}", ""]
        for name, case in results["cases"].items():
            table = [case["failed"]] if "failed" in case else lines_of(case["ways"])
            lines += [f"**{name}** (torch {case['torch']}, commit {case['commit']})", "", *table, ""]
    renew_section(FOLDER / "README.md", "results", lines)


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

    def put(self, case: str, **figures: Any) -> None:
        """Stores ways={way: row} or failed="reason" under the name of a case, and writes the file."""
        self.stored["cases"][case] = self.versions | figures
        write_whole(self.path, json.dumps(self.stored, indent=1) + "\n")


def run_case(case: Case, results: Results, device: torch.device, seconds: float, deadline: float) -> None:
    """Builds and measures one case, and stores and prints its figures, or the reason why there are none."""
    began = time.perf_counter()
    try:
        rows = measure(case.build(), device, seconds, deadline)
        results.put(case.name, ways=rows)
        lines = list(lines_of(rows))
    except Exception as error:
        results.put(case.name, failed=f"failed: {reason(error)}")
        lines = [f"failed: {reason(error)}"]
    print("\n".join(["", f"{case.name}  [{time.perf_counter() - began:.0f} s]", *lines]), flush=True)


def run_part(
    part: str, cases: list[Case], results: Results, device: torch.device, seconds: float, deadline: float
) -> None:
    """Runs the cases in turn; one that would not end before the deadline, by its estimate, is skipped and named.

    Raises: SystemExit if an error has made the GPU unusable to this process.
    """
    estimate = sum(case.estimate for case in cases)
    print(f"\n== {part}: {len(cases)} cases{f', about {estimate / 60:.1f} min' if estimate else ''}", flush=True)
    for case in cases:
        if time.perf_counter() + case.estimate > deadline:
            print(f"\n{case.name}\nskipped: less than {case.estimate:.0f} s are left", flush=True)
            continue
        run_case(case, results, device, seconds, deadline)
        release(device)
        if not alive(device):
            sys.exit("That error made the GPU unusable to this process; name the parts that are left in another.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the benchmark, measures nothing")
    parser.add_argument("--minutes", type=float, help=f"limit of all parts ({GPU_MINUTES} on a GPU, none on a CPU)")
    parser.add_argument("--match", default="", metavar="TEXT", help="only cases with this in their name; more sizes")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", metavar="FOLDER", help="to write to")
    parser.add_argument("--tables", action="store_true", help="only renew the tables of benchmarks/README.md")
    args = parser.parse_args(argv)
    if args.tables:
        return renew_tables()
    if wrong := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(wrong))}; there are {', '.join(PARTS)}")
    on_gpu, device = args.device == "cuda", torch.device(args.device)
    if on_gpu and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device")
    if missing := [wheel for name, wheel in WHEELS.items() if importlib.util.find_spec(name) is None]:
        print(f"Peers that are not installed and will be missing: pip install {' '.join(missing)}")
    minutes = args.minutes if args.minutes is not None else GPU_MINUTES if on_gpu else float("inf")
    seconds = 0 if args.quick else 2 if on_gpu else 20  # of timing for each case
    deadline = time.perf_counter() + 60 * minutes
    stance = "force_eager" if args.quick else "default"  # compilation takes longer than all the rest
    with tempfile.TemporaryDirectory() as nowhere, torch.compiler.set_stance(stance):
        results = Results(Path(nowhere) if args.quick else args.results, device)
        print(f"{results.stored['device']}, torch {torch.__version__}, commit {results.versions['commit']}")
        for part in args.parts or PARTS:
            cases = importlib.import_module(f"{part}_cases").cases(device, args.quick)
            cases = [case for case in cases if args.match in case.name and (args.match or not case.extra)]
            if args.quick:
                cases = [replace(case, build=lambda case=case: replace(case.build(), rounds=1)) for case in cases]
            run_part(part, cases, results, device, seconds, deadline)
    if args.results == FOLDER / "results" and not args.quick:
        renew_tables()


if __name__ == "__main__":
    main()
