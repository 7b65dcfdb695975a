"""All methods on the embedded task, at equal cost and with the same small budget of tuning each.

    python benchmarks/methods.py                                       the whole table
    python benchmarks/methods.py --methods SPIN,IPO --seeds 2 --prompts 600 --test 500 --out m.json    a look

Every method trains the shipped start on as many prompts, in as many iterations, with batches of one size. First each of
its settings is tried with one seed, and the one with the lowest NLL on the tuning words is kept. Then it runs with
every seed and is measured on the test words, which no choice has seen. Both kinds of words are held out from training,
also from that of the start. NLL is the criterion because it does not reward low entropy for itself, as sampled accuracy
does.

Beside the methods stand continued supervised training, and the start, sampled at the temperature at which its responses
have as much entropy as the method's: what a method gains over that is more than a change of temperature.

Writes benchmarks/results/methods.json after every run, and the table as Markdown beside it. The same command goes on
where it was stopped. To add a method, add a line to METHODS.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring  # before torch: it sets the number of threads
import torch
from measuring import ROOT, at_entropy, commit, flags_of, run_script, write

from runtime.data import draw, load_examples, split
from runtime.evaluate import Row, mean

# ---------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """One row of the table. A later flag replaces an earlier one: those of all runs, `flags`, then a setting's."""

    script: str
    flags: str = ""
    settings: tuple[str, ...] = ()  # what tuning chooses from
    share: float = 1.0  # of the prompts, so that a method with more pairs a prompt takes as many steps
    first: str = ""  # flags of a run of the same script before it, whose folder is {first} in `flags`


RATES = ("--lr 3e-5", "--lr 1e-4", "--lr 3e-4")
PAIRS = ("--lr 3e-5 --beta 2", "--lr 1e-4 --beta 2", "--lr 1e-4 --beta 5")
UNIT = ("--lr 3e-5 --beta 1", "--lr 1e-4 --beta 1", "--lr 3e-4 --beta 1")  # losses whose optimum is the data at beta 1
METHODS = {
    "SPIN": Method("spin", "", PAIRS),
    "SPIN with previous pairs": Method("spin", "--mix-previous", PAIRS, share=0.6),
    "alpha-SPIN": Method("family", "--alpha 0.3", PAIRS),
    "fictitious play": Method("family", "--history 0", PAIRS),
    "hinge": Method("family", "--loss hinge", PAIRS),
    "IPO": Method("family", "--loss ipo", PAIRS),
    "SPPO": Method("family", "--loss sppo", PAIRS),
    "SPACE": Method("family", "--loss space", UNIT),
    "T-SPIN": Method(
        "family", "--loss tspin", ("--lr 3e-5 --beta 0.1", "--lr 1e-4 --beta 0.1", "--lr 1e-4 --beta 0.5")
    ),
    "SPIF": Method("family", "--loss spif", PAIRS),
    "IRIS": Method("family", "--loss iris", UNIT),
    "IRIS, adaptive order": Method("family", "--loss iris --adaptive-order", UNIT),
    "SPIN, NLL term": Method("family", "--nll-weight 1", PAIRS),
    "SPIN, four responses": Method("family", "--samples 4", PAIRS),
    "SPIN, temperature 1.5": Method("spin", "--temperature 1.5", PAIRS),
    "SPIN, temperature 1.5, sampled reference": Method("family", "--temperature 1.5 --reference sampled", PAIRS),
    "SEFT": Method("seft", "--reviser {first}", RATES, first="--iterations 1 --lr 3e-3"),
    "supervised (equal steps)": Method("sft", "", RATES),
    "supervised (equal time)": Method("sft", "--epochs 2", RATES),
}
COMMON = "--max-new-tokens 32 --gen-batch 1024 --eval-limit 50 --rank 0 --batch 64 --epochs 1"
OF_SCRIPT = {"seft": r"--revise-template '{prompt}{response}\n\n### Response: '"}
TEMPERATURES = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.4)
TUNING_SEED = 1000  # none of those that are reported


# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class Size:
    """What all runs share. Two tables of one size may be compared."""

    model: str = str(ROOT / "pronounce/start")
    data: str = str(ROOT / "pronounce/cmudict.jsonl.gz")
    iterations: int = 3
    prompts: int = 8000  # an iteration
    words: int = 40_000  # that prompts are drawn from: fewer are read faster
    tuning: int = 2000  # held-out words to choose settings by
    test: int = 5000  # and to report


def write_data(size: Size, folder: Path) -> None:
    """train.jsonl, tuning.jsonl and test.jsonl: disjoint words, drawn by hashes; the start was trained on none of the
    last two."""
    words, heldout = split(load_examples(size.data), 0.1)  # the share that recipes/pronounce-sft.args holds out
    heldout = draw(heldout, size.tuning + size.test)
    parts = {"train": draw(words, size.words), "tuning": heldout[:: max(1, len(heldout) // size.tuning)][: size.tuning]}
    chosen = {e.line for e in parts["tuning"]}
    parts["test"] = [e for e in heldout if e.line not in chosen]
    for name, examples in parts.items():
        lines = [dict(prompt=e.prompt, response=e.response, references=e.references) for e in examples]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@dataclass(frozen=True)
class Job:
    """A run of a method: with a setting and a seed, measured on the words of a part; or the run before it."""

    name: str
    setting: str
    seed: int
    part: str  # "tuning" or "test"; "first": the run before it, which is not measured

    @property
    def key(self) -> str:
        return f"{self.name} | {self.setting} | {self.seed} | {self.part}"


def argv_of(method: Method, job: Job, size: Size, folder: Path) -> list[str]:
    """The command line of a run, without the script."""
    own = (method.first,) if job.part == "first" else (method.flags, job.setting)
    flags = flags_of(COMMON, OF_SCRIPT.get(method.script, ""), f"--iterations {size.iterations}", *own)
    share = 1 if job.part == "first" else method.share
    flags |= {"--prompts": str(round(share * size.prompts)), "--seed": str(job.seed), "--out": str(out_of(job, folder))}
    flags |= {"--model": size.model, "--data": f"{folder}/train.jsonl", "--eval-data": f"{folder}/tuning.jsonl"}
    if "{first}" in flags.values():
        first = dataclasses.replace(job, setting="", part="first")
        flags = {flag: str(out_of(first, folder)) if value == "{first}" else value for flag, value in flags.items()}
    return [word for pair in flags.items() for word in pair if word is not None]


def out_of(job: Job, folder: Path) -> Path:
    return folder / hashlib.sha256(job.key.encode()).hexdigest()[:16]


def run(job: Job, size: Size, folder: Path) -> Row:
    """Trains and measures. Returns the metrics, with `steps`, CPU `seconds` and the `command`."""
    method, out = METHODS[job.name], out_of(job, folder)
    argv = argv_of(method, job, size, folder)
    shutil.rmtree(out, ignore_errors=True)
    seconds = run_script(method.script, argv, job.key)
    steps = sum(len(path.read_text().splitlines()) for path in out.glob("steps-*.jsonl"))
    command = " ".join([f"python {method.script}.py", *map(shlex.quote, argv)])
    row = {"seconds": seconds, "steps": steps, "command": command.replace(str(folder), "DATA").replace(str(ROOT), ".")}
    if job.part != "first":
        row |= measure(out / "final", job.part, size, folder)
        shutil.rmtree(out)
    return row


def measure(weights: str | Path, part: str, size: Size, folder: Path, temperature: float = 1.0) -> Row:
    """Held-out metrics on a part's words."""
    row = measuring.measure(weights, size.model, f"{folder}/{part}.jsonl", temperature)
    return {name: value for name, value in row.items() if not name.startswith("greedy_error")}


# ---------------------------------------------------------------- all runs


def best_setting(name: str, runs: dict[str, Row]) -> str:
    """The setting with the lowest NLL on the tuning words."""
    return min(METHODS[name].settings, key=lambda setting: runs[Job(name, setting, TUNING_SEED, "tuning").key]["nll"])


def play(names: Sequence[str], seeds: int, size: Size, folder: Path, found: dict, do: Callable) -> None:
    """Fills found["runs"] and found["curve"]. `do(function, jobs)` yields (job, result) of each as it is ready."""
    runs = found["runs"]

    def all_of(jobs: list[Job]) -> None:
        missing = [job for job in jobs if job.key not in runs]
        before = [dataclasses.replace(job, setting="", part="first") for job in missing if METHODS[job.name].first]
        for some in (list(dict.fromkeys(before)), missing):  # what a run needs from the one before it is not kept
            for job, row in do(functools.partial(run, size=size, folder=folder), some):
                runs[job.key] = row
                print(f"{job.key}: {shown(row)}", flush=True)

    missing = [temperature for temperature in TEMPERATURES if str(temperature) not in found["curve"]]
    for temperature, row in do(functools.partial(measure_start, size=size, folder=folder), missing):
        found["curve"][str(temperature)] = {"temperature": temperature} | row
    all_of([Job(name, setting, TUNING_SEED, "tuning") for name in names for setting in METHODS[name].settings])
    all_of([Job(name, best_setting(name, runs), seed, "test") for name in names for seed in range(seeds)])


def measure_start(temperature: float, size: Size, folder: Path) -> Row:
    return measure(size.model, "test", size, folder, temperature)


def shown(row: Row) -> str:
    names = ("nll", "greedy", "sampled", "entropy", "seconds")
    return ", ".join(f"{name} {row[name]:.4g}" for name in names if name in row)


COLUMNS = {  # scale and digits
    "nll": (1, 4), "greedy": (100, 2), "sampled": (100, 2), "sampled_error": (100, 2), "kl": (1, 3), "entropy": (1, 3),
}  # fmt: skip


def table(found: dict, names: Sequence[str], seeds: int) -> str:
    """Markdown: for each method the mean and the standard deviation over seeds on the test words."""
    runs, curve = found["runs"], list(found["curve"].values())
    title = ["method", "setting", *(name.replace("_", " ") for name in COLUMNS)]
    title += ["T of equal entropy", "start at T: sampled, sampled error", "steps", "CPU seconds"]
    lines = [title, ["---"] * len(title)]
    start = found["curve"]["1.0"]
    lines.append(["the start", "", *(cell([start[name]], *COLUMNS[name]) for name in COLUMNS), "1", "", "", ""])
    for name in names:
        setting = best_setting(name, runs)
        rows = [runs[Job(name, setting, seed, "test").key] for seed in range(seeds)]
        before = [runs.get(Job(name, "", seed, "first").key, {}).get("seconds", 0.0) for seed in range(seeds)]
        cells = [cell([row[column] for row in rows], *COLUMNS[column]) for column in COLUMNS]
        equal = at_entropy(mean([row["entropy"] for row in rows]), curve)
        cells += [f"{equal['temperature']:.2f}" if equal else "outside"]
        cells += [f"{100 * equal['sampled']:.2f}, {100 * equal['sampled_error']:.2f}" if equal else ""]
        seconds = statistics.median(row["seconds"] for row in rows)
        more = f" + {statistics.median(before):.0f}" if any(before) else ""
        cells += [f"{mean([row['steps'] for row in rows]):.0f}", f"{seconds:.0f}{more}"]
        lines.append([name, f"`{setting}`", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(values: Sequence[float], scale: float, digits: int) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(list(values)):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="names, with commas between; default: all", type=lambda text: text.split(","))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/methods.json")
    for name in ("iterations", "prompts", "words", "tuning", "test"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Size, name))
    args = parser.parse_args()
    names = args.methods or list(METHODS)
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"--methods: no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    size = Size(**{name: getattr(args, name) for name in ("iterations", "prompts", "words", "tuning", "test")})
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores, torch {torch.__version__}, {args.jobs} runs at a time"
    about = {
        "commit": commit(),
        "machine": machine,
        "size": {name: value for name, value in dataclasses.asdict(size).items() if isinstance(value, int)},
    }
    found = json.loads(args.out.read_text()) if args.out.exists() else about | {"runs": {}, "curve": {}}
    for name, value in about.items():
        if found[name] != value:
            sys.exit(f"methods.py: error: {args.out}: begun with {name} {found[name]}, now {value}; give another --out")
    found["command"] = shlex.join(["python", "benchmarks/methods.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        write_data(size, Path(folder))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:

            def do(function: Callable, jobs: list) -> Iterator[tuple[Any, Row]]:
                futures = {pool.submit(function, job): job for job in jobs}
                for future in as_completed(futures):
                    yield futures[future], future.result()
                    write(args.out, found)
                write(args.out, found)

            play(names, args.seeds, size, Path(folder), found, do)
    text = table(found, names, args.seeds)
    args.out.with_suffix(".md").write_text(text)
    print(f"\n{about['machine']}, commit {about['commit']}, {args.seeds} seeds, {about['size']}\n\n{text}")


if __name__ == "__main__":
    main()
