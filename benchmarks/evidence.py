"""What self-play does beyond sharpening: every case beside its two controls, over seeds.

    python benchmarks/evidence.py --out runs/evidence.json   all cases, then tables and figures (make reproduce)
    python benchmarks/evidence.py --only "few words" wide    those regimes, or all cases from that start
    python benchmarks/evidence.py --write                    tables and figures from the stored results

A case wins if its frontier (benchmarks/measuring.py) lies above those of both controls: the start itself, sampled
at other temperatures, and continued supervised training of the start on the same prompts, with twice the epochs, which
costs about as much. Of several learning rates of the control, the one with the lowest NLL *on the test words* stands
for it: a choice that can only favour the control.

The cases are in evidence_cases.py. The same command resumes. Each row has the commit that it was made at. Rows are
compared with the start and the control that were measured in the same work folder, so a stored start whose weights are
gone gets no further run. Writes --out, by default benchmarks/results/evidence.json, the figure of all settings, and the
tables of docs/evidence.md and README.md.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import evidence_report
import measuring  # This import precedes that of torch, since measuring sets the number of threads.
import numpy as np
import theory
from bench import current_commit
from evidence_cases import CASES, STARTS, Case
from measuring import ROOT, run_script, write_lines

from data.examples import Example, draw, load_examples, split
from evaluate import Row

STORED = ROOT / "benchmarks/results/evidence.json"
WORK = ROOT / "runs/evidence"  # data, starts and frontiers
COMMON = "--gen-batch 1024 --eval-limit 50 --eval-temperatures 1 --rank 0 --batch 32 --epochs 1 --weight-decay 0"
SELF_PLAY = "--lr 1e-4 --beta 1 --temperature 1"
TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.2)
GRID = (0.5, 0.6, 0.7, 0.775, 0.85, 0.925, 1.0, 1.1, 1.2)
AT_ONE = TEMPERATURES.index(1.0)

# ---------------------------------------------------------------- data and starts


def write_data(
    folder: Path, data: str = "pronounce/cmudict.jsonl.gz", glosses: str = "glosses/glosses.jsonl.gz",
    words: int = 20_000, few: int = 8_000, test: int = 2_500, lines: int = 40_000,
) -> None:  # fmt: skip
    """all (what starts are trained on), words, few, eight, other, long, answers, glosses; tuning and test*: held out.

    Self-play draws its prompts from so many `words`; `lines` of two words each are for the task with long responses.
    Every second prompt of `answers` holds its answer, as the teacher's of SDFT does.
    """
    train, heldout = split(load_examples(str(ROOT / data)), 0.1)  # the same share as the shipped start's
    some, tests = draw(train, words), draw(heldout, test + 50)
    rng = random.Random(0)
    rng.shuffle(some)
    parts = {"all": train, "words": some, "few": some[:few], "eight": some[:8], "other": some[few:]}
    parts |= {"tuning": tests[:50], "test": tests[50:]}
    for name, examples in parts.items():
        rows = [dict(prompt=e.prompt, response=e.response, references=e.references) for e in examples]
        write_lines(folder / f"{name}.jsonl", rows)
    write_lines(folder / "long.jsonl", two_words(rng, train, lines))
    write_lines(folder / "test-long.jsonl", two_words(rng, tests[50:], test // 2))
    order = draw(train, lines)
    prompts = [f"{e.response}={e.prompt}" if i % 2 else e.prompt for i, e in enumerate(order)]
    rows = [dict(prompt=prompt, response=e.response) for prompt, e in zip(prompts, order)]
    write_lines(folder / "answers.jsonl", rows)
    train, heldout = split(load_examples(str(ROOT / glosses)), 0.1)
    tests = draw(heldout, test // 2)
    others = draw([e for e in heldout if e not in tests], test)
    for name, examples in {"glosses": train, "test-glosses": tests, "test-glosses-again": others}.items():
        write_lines(folder / f"{name}.jsonl", [dict(prompt=e.prompt, response=e.response) for e in examples])


def two_words(rng: random.Random, examples: Sequence[Example], count: int) -> Iterator[Row]:
    order = list(examples)
    rng.shuffle(order)
    for two in zip(order[: 2 * count : 2], order[1 : 2 * count : 2]):
        responses = [" ".join(some) for some in itertools.product(*(e.references[:3] for e in two))]
        yield dict(prompt=" ".join(e.prompt for e in two), response=responses[0], references=responses)


def place_of(name: str, work: Path) -> Path:
    """The folder of a start's weights. Starts that differ in what follows only share them."""
    start = STARTS[name]
    if not start.data:
        return ROOT / "pronounce/start"
    return work / "starts" / digest(start.data, start.flags, start.origin, start.width, start.model) / "final"


def digest(*key: Any) -> str:
    return hashlib.sha256(repr([*key]).encode()).hexdigest()[:16]


def train_start(name: str, work: Path) -> float:
    """Trains a start, if that is not done. Returns its CPU seconds."""
    start, place = STARTS[name], place_of(name, work)
    if place.exists():
        return 0.0
    model = place_of(start.origin, work) if start.origin else place.parent.with_suffix(".model")
    words = f"{COMMON} --batch 128 {start.limit} {start.flags} --iterations 1".split()
    words += ["--model", str(model), "--data", f"{work}/{start.data}.jsonl", "--eval-data", f"{work}/tuning.jsonl"]
    words += ["--out", str(place.parent)]
    if not start.origin:
        words.append("--from-scratch")
        model.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / start.model / "tokenizer.json", model)
        config = json.loads((ROOT / start.model / "config.json").read_text()) | {"hidden_size": start.width}
        (model / "config.json").write_text(json.dumps(config))
    return run_script("sft", words, name)


def look_at_start(name: str, work: Path) -> Row:
    return look(name, place_of(name, work), frontier_of(work, "start", name), work, grid=STARTS[name].draws)


# ---------------------------------------------------------------- one run


def words_of_run(case: Case, seed: int, work: Path, out: Path) -> list[str]:
    """The command line of a run, without the script."""
    start = STARTS[case.start]
    own = {"sft": "", "sdft": "--lr 1e-4"}.get(case.script, SELF_PLAY)
    words = f"{COMMON} {start.limit} {own} {case.flags} --iterations {case.iterations} --prompts {case.prompts}".split()
    words += ["--model", str(place_of(case.start, work)), "--data", f"{work}/{start.play}.jsonl"]
    return [*words, "--eval-data", f"{work}/tuning.jsonl", "--seed", str(seed), "--out", str(out)]


def run(job: tuple[Case, int], work: Path) -> Row:
    """Trains a case with a seed and measures its iterates."""
    case, seed = job
    if not case.script:  # The case is a placebo.
        place = frontier_of(work, case.key, seed, 1)
        return {"seconds": 0.0, "iterates": {"1": look(case.start, place_of(case.start, work), place, work, seed)}}
    out = work / "runs" / digest(case.key, seed)
    shutil.rmtree(out, ignore_errors=True)
    row: Row = {"seconds": run_script(case.script, words_of_run(case, seed, work, out), f"{case.key}, seed {seed}")}
    row["iterates"] = {}
    for t in case.iterates:
        weights = out / ("final" if t == case.iterations else f"iterate-{t}")
        row["iterates"][str(t)] = look(case.start, weights, frontier_of(work, case.key, seed, t), work)
    shutil.rmtree(out)
    return row


def frontier_of(work: Path, *key: Any) -> Path:
    return work / f"frontiers/{digest(*key)}.npz"


def look(name: str, weights: Path, path: Path, work: Path, draw: int = 0, grid: int = 0) -> Row:
    """Measures weights of a start's shape, writes the values of each example to `path`, and returns their means.

    `draw` is the seed of the samples. `grid`: so many draws at the temperatures of GRID are measured, too.
    """
    start, judges = STARTS[name], (measuring.equal,)
    if start.data == "glosses":
        judges = measuring.judges_of_definitions(work / "glosses.jsonl")
    player, run = measuring.ruler(str(place_of(name, work)), f"{work}/{start.test}.jsonl", *start.limit.split())
    player.model.load_weights(weights)
    points = measuring.frontier(player, run, TEMPERATURES, judges, draw)
    greedy = run.respond(player, run.heldout, "greedy", run.seed(0, "evaluate"), 0.0)
    right = [judges[0](run.text(ids), e.references) for e, (ids, _) in zip(run.heldout, greedy)]
    saved = {"frontier": points}
    if grid:
        saved["dense"] = np.mean([measuring.frontier(player, run, GRID, judges, i) for i in range(grid)], 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **saved)
    means = {name: [float(point[k].mean()) for point in points] for k, name in enumerate(measuring.names_of(points))}
    return means | {"greedy": float(np.mean(right))}


# ---------------------------------------------------------------- from runs to leads


def summary(runs: dict[str, Row], work: Path, stored: list[Row]) -> list[Row]:
    """A row of each measured iterate of each case, with its leads over both controls.

    A case whose start was measured in another work folder keeps its stored rows.
    """
    fields = ("regime", "start", "name", "script", "flags", "seeds", "prompts", "iterations")
    result = []
    for case in CASES:
        facts = {name: getattr(case, name) for name in fields}
        if not case.runs.keys() <= runs.keys():
            continue
        if frontier_of(work, "start", case.start).exists():
            result += [facts | row_of(case, t, runs, work) for t in case.iterates]
        else:
            result += [row for row in stored if facts.items() <= row.items()]
    return result


def row_of(case: Case, t: int, runs: dict[str, Row], work: Path) -> Row:
    done = [runs[key]["iterates"][str(t)] for key in case.runs]
    row: Row = {"iterate": t, "greedy": float(np.mean([one["greedy"] for one in done]))}
    row |= {name: float(np.mean([one[name][AT_ONE] for one in done])) for name in done[0] if name != "greedy"}
    row["seconds"] = float(np.median([runs[key]["seconds"] for key in case.runs]))

    def values(some: Case) -> list[dict[str, np.ndarray]]:
        return [measuring.loaded(frontier_of(work, some.key, seed, t)) for seed in case.runs.values()]

    row["over start"] = leads(values(case), [measuring.loaded(frontier_of(work, "start", case.start))] * case.seeds)
    if not case.is_control and (control := control_of(case, t, runs)):
        row |= {"control": control.name, "over supervised": leads(values(case), values(control))}
    return row


def control_of(case: Case, t: int, runs: dict[str, Row]) -> Case | None:
    """The supervised case of the same group with the lowest NLL over this case's seeds."""
    found = {}
    for control in CASES:
        if control.is_control and control.group == case.group:
            done = [runs.get(f"{control.key} | {seed}", {"iterates": {}})["iterates"] for seed in case.runs.values()]
            if all(str(t) in iterates for iterates in done):
                found[control] = np.mean([iterates[str(t)]["nll"][AT_ONE] for iterates in done])
    return min(found, key=found.get, default=None)


def leads(mine: Sequence[Any], theirs: Sequence[Any]) -> dict[str, list[float]]:
    """[lead, standard error, degrees of freedom] by metric, of a case's seeds over a control's, positive if better.

    All seeds are compared at the same temperatures, those at which every seed's entropy is one that its control
    reaches.
    """
    pairs = [(a["frontier"], b.get("dense", b["frontier"])) for a, b in zip(mine, theirs)]
    shared = set.intersection(*(measuring.reached(*pair) for pair in pairs))
    lowest = [[measuring.best_nll(one["frontier"]) for one in some] for some in (mine, theirs)]
    found = {"best_nll": [b - a for a, b in zip(*lowest)]}
    for metric, sign in {"sampled": 1, "sampled_error": -1, "content": 1}.items():
        if shared and metric in measuring.names_of(pairs[0][0]):
            found[metric] = [sign * measuring.lead(*pair, metric, shared) for pair in pairs]
    return {metric: with_error(values) for metric, values in found.items()}


def with_error(values: Sequence[np.ndarray]) -> list[float]:
    """[mean, standard error, degrees of freedom] of values of each example, by seed.

    The error has two parts: over examples, of the mean over seeds, and over seeds. The degrees of freedom are those of
    Welch and Satterthwaite for a sum of two variances.
    """
    by_seed, examples = [some.mean() for some in values], len(values[0])
    variances = {examples - 1: np.mean(values, 0).var() / examples}  # variances by their degrees of freedom
    if len(values) > 1:
        variances[len(values) - 1] = np.var(by_seed, ddof=1) / len(values)
    total, parts = sum(variances.values()), sum(variance**2 / own for own, variance in variances.items())
    return [float(np.mean(by_seed)), float(total**0.5), float(total**2 / parts if parts else max(variances))]


# ---------------------------------------------------------------- all of it


def play(wanted: Sequence[Case], found: Row, work: Path, each: Callable, save: Callable, **sizes: Any) -> None:
    """Fills found["starts"], ["runs"] and ["summary"], and saves after every part. `each` is a `map`."""
    needed = list(dict.fromkeys(case.start for case in wanted))
    for name in needed:  # another training of a start is another start
        if name in found["starts"] and not frontier_of(work, "start", name).exists():
            lacks = f"the runs from {name} are stored, but {work} lacks that start"
            sys.exit(f"evidence.py: error: {lacks}; --out FILE measures all of it anew")
    if not (work / "test-glosses-again.jsonl").exists():
        write_data(work, **sizes)
    of_place = {place_of(name, work): name for name in needed}  # Several starts may share their weights.
    seconds = dict(zip(of_place, each(partial(train_start, work=work), of_place.values())))
    missing = [name for name in needed if name not in found["starts"]]
    for name, row in zip(missing, each(partial(look_at_start, work=work), missing)):
        row["seconds"] = seconds.pop(place_of(name, work), 0.0)
        found["starts"][name] = row | {"commit": found["commit"]}
        print(f"start {name}: greedy {row['greedy']:.3f}, {row['seconds']:.0f} s", flush=True)
        save()
    jobs = {key: (case, seed) for case in wanted for key, seed in case.runs.items() if key not in found["runs"]}
    for key, row in zip(jobs, each(partial(run, work=work), jobs.values())):
        found["runs"][key] = row | {"commit": found["commit"]}
        print(f"{key}: {row['seconds']:.0f} s", flush=True)
        save()
    found["summary"] = summary(found["runs"], work, found["summary"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    regimes, starts = (list(dict.fromkeys(getattr(case, name) for case in CASES)) for name in ("regime", "start"))
    parser.add_argument("--only", nargs="+", choices=regimes + starts, default=regimes, metavar="REGIME or START")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument("--write", action="store_true", help="only tables and figures, from what is stored")
    args = parser.parse_args(argv)
    new = {"machine": f"{platform.machine()} CPU, {os.cpu_count()} cores", "temperatures": list(TEMPERATURES)}
    new |= {"command": "python benchmarks/evidence.py", "starts": {}, "runs": {}, "summary": []}
    found = measuring.begun(args.out, new, () if args.write else ("machine", "temperatures"))
    if not args.write:
        found["commit"] = current_commit()  # commit of what is run now; each row has a commit of its own
        wanted = [case for case in CASES if case.regime in args.only or case.start in args.only]
        save = partial(measuring.store, args.out, found)
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            play(wanted, found, WORK, pool.map, save)
        found |= theory.results()
        save()
    if args.out == STORED or len(args.only) == len(regimes):
        evidence_report.write_all(found)
    else:  # Only some regimes were measured anew, so the documents keep what is stored.
        print("\n".join(evidence_report.regimes(found, [name], True) for name in regimes if name in args.only))


if __name__ == "__main__":
    main()
