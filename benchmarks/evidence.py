"""What self-play does beyond sharpening: every case beside its two controls, over seeds.

    python benchmarks/evidence.py --out runs/evidence.json   all cases, then tables and figures (make reproduce)
    python benchmarks/evidence.py --only "few words" wide    those regimes, or all cases from that start
    python benchmarks/evidence.py --write                    tables and figures from the stored results

A case wins if its frontier (benchmarks/measuring.py) lies above those of both controls: the start itself, sampled
at other temperatures, and continued supervised training of the start on the same prompts, with twice the epochs, which
costs about as much. Of several learning rates of the control, the one with the lowest NLL *on the test words* stands
for it: a choice that can only favour the control.

`cases` was written before any of them was run, except for those that say otherwise, and all of them are reported. The
same command resumes. Each row has the commit that it was made at. Rows are compared with the start and the control that
were measured in the same work folder, so a stored start whose weights are gone gets no further run. Writes --out, by
default benchmarks/results/evidence.json, the figure of all settings, and the tables of docs/evidence.md and README.md.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence_report
import measuring  # before torch: it sets the number of threads
import numpy as np
import theory
from bench import current_commit, write_whole
from measuring import ROOT, flags_of, run_script, words_of

from data.examples import draw, load_examples, split
from evaluate import Row

STORED = ROOT / "benchmarks/results/evidence.json"

# ---------------------------------------------------------------- what is run


@dataclass(frozen=True)
class Size:
    """Of everything, so that tests can run all of it in seconds."""

    data: str = "pronounce/cmudict.jsonl.gz"
    glosses: str = "glosses/glosses.jsonl.gz"
    words: int = 20_000  # that self-play draws its prompts from
    few: int = 8_000  # words of the start that knows few
    test: int = 2_500  # held-out words
    lines: int = 40_000  # of two words each, for the task with long responses
    share: float = 1.0  # of the prompts, epochs and temperatures of every start and case: for tests


@dataclass(frozen=True)
class Start:
    """A model that self-play starts from, by supervised training with `flags`."""

    data: str  # a file of write_data
    flags: str
    origin: str = ""  # another start, whose weights training goes on from; "": from scratch
    width: int = 64
    play: str = "words"  # what self-play and its control are given
    test: str = "test"  # and what they are measured on
    model: str = "pronounce/start"  # whose config and tokenizer a start from scratch has
    control: str = "--epochs 2"  # flags with which supervised training costs about as much as self-play
    draws: int = 0  # of its frontier at the temperatures of GRID, whose mean then stands for it at equal entropy


STARTS = {
    "underfitted": Start("", ""),  # the shipped start
    "converged": Start("all", "--epochs 10 --lr 3e-3 --weight-decay 0.1"),
    "narrow": Start("all", "--epochs 4 --lr 5e-3 --weight-decay 0.1", width=32),
    "wide": Start("all", "--epochs 4 --lr 3e-3 --weight-decay 0.1", width=96),
    "few words": Start("few", "--epochs 20 --batch 64 --lr 3e-3 --weight-decay 0.3", play="few"),
    "glosses": Start(
        "glosses", "--epochs 6 --lr 3e-3 --batch 64 --weight-decay 0.1", width=96, play="glosses", test="test-glosses",
        model="glosses/start",
    ),
    "long": Start(
        "long", "--epochs 4 --batch 64 --lr 3e-3 --weight-decay 0.1", "underfitted", play="long", test="test-long"
    ),
}  # fmt: skip
# The same weights, given words that they were not trained on.
STARTS["few words, other words"] = dataclasses.replace(STARTS["few words"], play="other")
# And measured on prompts on which no setting was chosen.
STARTS["glosses, other prompts"] = dataclasses.replace(STARTS["glosses"], test="test-glosses-again")
# Each again, for the greedy opponent, whose cases were added when the weights of the other runs were gone.
STARTS |= {f"{name}, again": start for name, start in STARTS.items()}
STARTS["glosses, four draws"] = dataclasses.replace(STARTS["glosses"], draws=4)
STARTS |= {  # of the ways to learn from demonstrations alone: the shipped start twice, and one that SDFT can teach
    "shipped": Start("", ""),
    "reads answers": Start("answers", "--epochs 2 --lr 3e-3", "underfitted"),
    "eight words": Start("", "", play="eight", control="--epochs 18 --batch 8"),
}


@dataclass(frozen=True)
class Case:
    """One setting of a script, over several seeds. A later flag replaces an earlier one."""

    regime: str  # the table that it stands in
    start: str
    name: str
    flags: str = ""
    script: str = "spin"
    seeds: int = 3
    prompts: int = 5000  # an iteration
    iterations: int = 2
    iterates: tuple[int, ...] = ()  # that are measured; (): the last
    first_seed: int = 0

    @property
    def is_control(self) -> bool:
        return self.name.startswith("supervised")

    @property
    def group(self) -> tuple:
        """Cases that share a control."""
        return self.start, self.prompts, self.iterations, self.first_seed

    @property
    def every_seed(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def key(self) -> str:
        return " | ".join([self.start, self.script, self.flags, f"{self.iterations} x {self.prompts}"])


COMMON = "--max-new-tokens {tokens} --gen-batch 1024 --eval-limit 50 --eval-temperatures 1"
COMMON += " --rank 0 --batch 32 --epochs 1 --weight-decay 0"
SELF_PLAY = "--lr 1e-4 --beta 1 --temperature 1"
TOKENS_OF = {"test": 32, "test-long": 64, "test-glosses": 48, "test-glosses-again": 48}  # of a response at most
TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.2)
GRID = (0.5, 0.6, 0.7, 0.775, 0.85, 0.925, 1.0, 1.1, 1.2)
CAPACITY = ((1, 1), (1, 3), (1, 0.3), (1.5, 1))  # temperatures and betas of theory.limited_capacity


def named(*flags: str) -> dict[str, str]:
    return {f"SPIN, {some.replace('--', '')}": some for some in flags}


def blocks() -> Iterator[tuple[str, str, dict, dict[str, str], Sequence[str]]]:
    """(regime, start, sizes, flags of self-play by name, learning rates of its control), in the order of the runs."""
    yield "temperature and beta", "converged", {}, {"SPIN": ""}, ("3e-5", "3e-4")
    pairs = ((0.8, 1), (1.2, 1), (1.5, 1), (1.5, 3), (1, 0.3), (1, 3))
    some = {f"SPIN, T {t}, beta {beta}": f"--temperature {t} --beta {beta}" for t, beta in pairs}
    yield "temperature and beta", "converged", {}, some, ()
    yield "learning rate", "converged", {}, named("--lr 3e-5", "--lr 3e-4"), ()
    size = dict(prompts=8000, iterations=1)
    yield "few words", "few words", size, named("--lr 1e-5", "--lr 3e-5", "--lr 1e-4"), ("1e-5", "1e-4")
    for rate in ("3e-5", "1e-4"):
        cures = {f"alpha-SPIN 0.3, lr {rate}": f"--alpha 0.3 --lr {rate}"}
        cures[f"SPIN, NLL term, lr {rate}"] = f"--nll-weight 1 --lr {rate}"
        yield "few words", "few words", size, cures, ()
    some = {f"SPIN, LoRA 16, lr {rate}": f"--rank 16 --lr {rate}" for rate in ("1e-4", "3e-4")}
    yield "few words", "few words", size, some, ()
    size = dict(prompts=8000, iterations=4, iterates=(4,))
    yield "few words", "few words", size, {"SPIN, lr 1e-5, four iterations": "--lr 1e-5"}, ("1e-5",)
    for start in ("underfitted", "narrow", "wide", "few words, other words"):
        yield "start", start, {}, named("--lr 1e-4", "--lr 3e-4"), ("1e-4", "3e-4")
    some = named("--temperature 1", "--temperature 1.2", "--lr 3e-4")
    yield "long responses", "long", dict(prompts=2000), some, ("1e-4", "3e-4")
    size = dict(prompts=2500)
    yield "definitions", "glosses", size, some, ("3e-5", "1e-4", "3e-4")
    # Chosen after those of "definitions" were run.
    some = named("--temperature 1.5", "--temperature 1.5 --beta 3", "--temperature 2 --beta 3")
    some |= named("--temperature 1.2 --lr 3e-5", "--temperature 1.5 --lr 3e-5")
    yield "hot definitions", "glosses", size, some, ()
    # Chosen after those, and measured on other prompts, by content words: a hot opponent teaches to write more frequent
    # words than people do, for which F1 has points.
    size, some = dict(size, seeds=5, first_seed=10), named("--temperature 1.5", "--temperature 1.2 --lr 3e-5")
    yield "definitions again", "glosses, other prompts", size, some, ("3e-5",)
    # A hot opponent, iteration by iteration, as theory has it.
    some = {f"SPIN, T 1.5, beta {beta}": f"--temperature 1.5 --beta {beta}" for beta in (1, 3)}
    yield "hot opponent", "converged", dict(iterations=4, iterates=(1, 2, 3, 4), seeds=2), some, ("1e-4",)
    for prompts in (625, 10_000):
        yield "pairs", "converged", dict(prompts=prompts), {f"SPIN, {prompts} prompts": ""}, ("1e-4",)
    size = dict(iterations=6, prompts=2500)
    yield "iterations", "converged", dict(size, iterates=(1, 2, 4, 6)), {"SPIN": ""}, ("1e-4",)
    yield "iterations", "converged", dict(size, iterates=(2, 4, 6)), {"SPIN, previous pairs": "--mix-previous"}, ()
    some = {f"SPIN, LoRA {rank}, lr 3e-4": f"--rank {rank} --lr 3e-4" for rank in (4, 32)}
    yield "adapters", "converged", {}, some, ()
    yield "methods", "converged", dict(seeds=2), METHODS, ()
    yield from later_blocks()


def later_blocks() -> Iterator[tuple[str, str, dict, dict[str, str], Sequence[str]]]:
    """What was added after all others had been run, in the same form."""
    # The opponent of the official script: one response per prompt, the likeliest.
    some = named("--temperature 0", "--temperature 0 --lr 1e-5")
    sizes = {"few words": dict(prompts=8000, iterations=1), "long": dict(prompts=2000), "glosses": dict(prompts=2500)}
    controls = {"underfitted": "1e-4", "few words": "1e-5", "few words, other words": "3e-4"}
    for start in GREEDY:
        yield "greedy opponent", f"{start}, again", sizes.get(start, {}), some, (controls.get(start, "3e-5"),)
    # The start itself, with other samples: what the noise of a start's frontier looks like.
    size = dict(prompts=2500, iterations=1, first_seed=10)
    for start in ("glosses, again", "glosses, four draws"):
        yield "placebo", start, size, {"the start itself": "--placebo"}, ()
    # Ways to learn from demonstrations alone.
    size = dict(seeds=2, prompts=2500)
    yield "demonstrations", "shipped", size, DEMONSTRATIONS, ("1e-4",)
    some = {name: DEMONSTRATIONS[name] for name in ("SDFT", "SPIN")}
    yield "demonstrations", "reads answers", size, some, ("1e-4",)
    some = {"DITTO": "--ditto --samples 10 --alpha 1 --batch 8", "SPIN": "--samples 10 --epochs 3 --batch 8"}
    yield "demonstrations", "eight words", dict(seeds=2, prompts=40, iterations=3), some, ("1e-4",)


GREEDY = ("underfitted", "few words", "converged", "glosses", "few words, other words", "long", "narrow", "wide")

METHODS = {  # each at SPIN's settings but for its beta
    "alpha-SPIN 0.3": "--alpha 0.3", "fictitious play": "--history 0", "hinge": "--loss hinge", "IPO": "--loss ipo",
    "SPPO": "--loss sppo", "SPACE": "--loss space", "T-SPIN": "--loss tspin --beta 0.1", "SPIF": "--loss spif",
    "IRIS": "--loss iris", "SPIN, NLL term": "--nll-weight 1", "SPIN, four responses": "--samples 4",
    "SPIN, T 1.5, beta 3, sampled reference": "--reference sampled --temperature 1.5 --beta 3",
}  # fmt: skip
DEMONSTRATIONS = {
    "SPIN": "", "GSIL": "--loss gsil", "DFT": "--loss dft --epochs 2 --lr 1e-4",
    "SDFT": "--teacher-template {response}={prompt}",
}  # fmt: skip
# By how a case's flags begin; otherwise spin.
SCRIPTS = {"--loss dft": "sft", "--teacher-template": "sdft", "--placebo": ""}
FAMILY = ("--alpha", "--history", "--loss", "--nll-weight", "--samples", "--reference", "--ditto")
SCRIPTS |= dict.fromkeys(FAMILY, "family")


def cases() -> list[Case]:
    """In the order in which they are run: if the time is short, the last are left out."""
    found: list[Case] = []
    for regime, start, size, settings, rates in blocks():
        for name, flags in settings.items():
            script = next((script for flag, script in SCRIPTS.items() if flags.startswith(flag)), "spin")
            found.append(Case(regime, start, name, flags, script, **size))
        for rate in rates:  # the control: continued supervised training
            flags = f"{STARTS[start].control} --lr {rate}"
            facts = dict(script="sft", name=f"supervised, lr {rate}", flags=flags)
            found.append(dataclasses.replace(found[-1], **facts))
    return found


# ---------------------------------------------------------------- data and starts


def write_data(size: Size, folder: Path) -> None:
    """all (what starts are trained on), words, few, eight, other, long, answers, glosses; tuning and test*: held out.

    Every second prompt of `answers` holds its answer, as the teacher's of SDFT does.
    """
    train, heldout = split(load_examples(str(ROOT / size.data)), 0.1)  # as the shipped start's
    words, tests = draw(train, size.words), draw(heldout, size.test + 50)
    rng = random.Random(0)
    rng.shuffle(words)
    parts = {"all": train, "words": words, "few": words[: size.few], "eight": words[:8], "other": words[size.few :]}
    parts |= {"tuning": tests[:50], "test": tests[50:]}
    for name, examples in parts.items():
        lines = [dict(prompt=e.prompt, response=e.response, references=e.references) for e in examples]
        write_lines(folder / f"{name}.jsonl", lines)
    for name, source, count in (("long", train, size.lines), ("test-long", tests[50:], size.test // 2)):
        order = list(source)
        rng.shuffle(order)
        lines = []
        for two in zip(order[: 2 * count : 2], order[1 : 2 * count : 2]):
            responses = [" ".join(some) for some in itertools.product(*(e.references[:3] for e in two))]
            lines.append(dict(prompt=" ".join(e.prompt for e in two), response=responses[0], references=responses))
        write_lines(folder / f"{name}.jsonl", lines)
    order = draw(train, size.lines)
    prompts = [f"{e.response}={e.prompt}" if i % 2 else e.prompt for i, e in enumerate(order)]
    lines = [dict(prompt=prompt, response=e.response) for prompt, e in zip(prompts, order)]
    write_lines(folder / "answers.jsonl", lines)
    train, heldout = split(load_examples(str(ROOT / size.glosses)), 0.1)
    tests = draw(heldout, size.test // 2)
    others = draw([e for e in heldout if e not in tests], size.test)
    for name, examples in (("glosses", train), ("test-glosses", tests), ("test-glosses-again", others)):
        write_lines(folder / f"{name}.jsonl", [dict(prompt=e.prompt, response=e.response) for e in examples])


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def place_of(name: str, work: Path) -> Path:
    """The folder of a start's weights. Starts that differ in what follows only share them."""
    start = STARTS[name]
    if not start.data:
        return ROOT / "pronounce/start"
    return work / "starts" / digest([start.data, start.flags, start.origin, start.width, start.model]) / "final"


def digest(key: Any) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def train_start(name: str, size: Size, work: Path) -> Row:
    """Trains a start, if that is not done, and measures its frontier on what its cases are measured on."""
    start, place = STARTS[name], place_of(name, work)
    row: Row = {"seconds": 0.0, "command": ""}
    if start.data and not place.exists():
        model = place_of(start.origin, work) if start.origin else work / f"models/{start.test}-{start.width}"
        flags = flags_of(COMMON.format(tokens=TOKENS_OF[start.test]), "--batch 128", start.flags)
        flags["--epochs"] = str(max(1, round(size.share * int(flags["--epochs"]))))
        flags |= {"--model": str(model), "--data": f"{work}/{start.data}.jsonl", "--eval-data": f"{work}/tuning.jsonl"}
        flags |= {"--out": str(place.parent), "--iterations": "1"} | ({} if start.origin else {"--from-scratch": None})
        row = {"seconds": run_script("sft", words_of(flags), name), "command": command_of("sft", flags, work)}
    return row | look(name, place, frontier_of(work, "start", name), work, grid=start.draws)


def frontier_of(work: Path, *key: Any) -> Path:
    return work / f"frontiers/{digest(list(key))}.npz"


def write_models(work: Path) -> None:
    """Configs and tokenizers of starts that are trained from scratch."""
    for start in STARTS.values():
        if start.data and not start.origin:
            folder, source = work / f"models/{start.test}-{start.width}", ROOT / start.model
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / "tokenizer.json", folder)
            config = json.loads((source / "config.json").read_text()) | {"hidden_size": start.width}
            (folder / "config.json").write_text(json.dumps(config))


def command_of(script: str, flags: dict[str, str | None], work: Path) -> str:
    program = f"{script}.py" if script in ("spin", "sft") else f"-m methods.{script}"
    line = " ".join([f"python {program}", *map(shlex.quote, words_of(flags))])
    return line.replace(str(work), "WORK").replace(str(ROOT), ".")


# ---------------------------------------------------------------- one run


def flags_of_run(case: Case, seed: int, size: Size, work: Path, out: Path) -> dict[str, str | None]:
    """The command line of a run, without the script."""
    start = STARTS[case.start]
    common = {"sft": "", "sdft": "--lr 1e-4"}.get(case.script, SELF_PLAY)
    flags = flags_of(COMMON.format(tokens=TOKENS_OF[start.test]), common, case.flags)
    flags |= {"--iterations": str(case.iterations), "--prompts": str(max(40, round(size.share * case.prompts)))}
    flags |= {"--model": str(place_of(case.start, work)), "--data": f"{work}/{start.play}.jsonl"}
    flags |= {"--eval-data": f"{work}/tuning.jsonl", "--seed": str(seed), "--out": str(out)}
    return flags


def run(job: tuple[Case, int], size: Size, work: Path) -> Row:
    """Trains a case with a seed and measures its iterates."""
    case, seed = job
    if not case.script:  # a placebo
        place = frontier_of(work, case.key, seed, 1)
        facts = look(case.start, place_of(case.start, work), place, work, seed)
        return {"seconds": 0.0, "steps": 0, "command": "", "iterates": {"1": facts}}
    out = work / "runs" / digest([case.key, seed])
    shutil.rmtree(out, ignore_errors=True)
    flags = flags_of_run(case, seed, size, work, out)
    seconds = run_script(case.script, words_of(flags), f"{case.key}, seed {seed}")
    steps = sum(len(path.read_text().splitlines()) for path in out.glob("steps-*.jsonl"))
    row: Row = {"seconds": seconds, "steps": steps, "command": command_of(case.script, flags, work), "iterates": {}}
    for t in case.iterates or (case.iterations,):
        weights = out / ("final" if t == case.iterations else f"iterate-{t}")
        row["iterates"][str(t)] = look(case.start, weights, frontier_of(work, case.key, seed, t), work)
    shutil.rmtree(out)
    return row


def loaded(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def look(start: str, weights: Path, path: Path, work: Path, draw: int = 0, grid: int = 0) -> Row:
    """Measures weights, writes the values of each example to `path`, and returns their means.

    `draw` is the seed of the samples. `grid`: so many draws at the temperatures of GRID are measured, too.
    """
    heldout = STARTS[start].test
    player, run = measuring.ruler(str(place_of(start, work)), f"{work}/{heldout}.jsonl", TOKENS_OF[heldout])
    player.model.load_weights(weights)
    agreement, more = measuring.equal, []
    if STARTS[start].data == "glosses":
        agreement, frequent = measuring.overlap, frequent_words(work)
        more = [functools.partial(measuring.overlap, without=frequent)]
        more.append(lambda text, _: sum(word in frequent for word in text.split()))
    points = measuring.frontier(player, run, TEMPERATURES, agreement, more, draw)
    greedy = run.respond(player, run.heldout, "greedy", run.seed(0, "evaluate"), 0.0)
    texts = [run.text(ids) for ids, _ in greedy]
    right = np.array([agreement(text, e.references) for text, e in zip(texts, run.heldout)], np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {"frontier": points, "greedy": right}
    if grid:
        draws = [measuring.frontier(player, run, GRID, agreement, more, i) for i in range(grid)]
        saved["dense"] = np.mean(draws, 0)
    np.savez(path, **saved)
    names = (measuring.MEASURED + measuring.OF_TEXTS)[: points.shape[1]]
    means = {name: [float(point[k].mean()) for point in points] for k, name in enumerate(names)}
    return means | {"greedy": float(right.mean())}


@functools.cache
def frequent_words(work: Path) -> frozenset[str]:
    """The 40 words that stand in definitions most often: "a", "the", "of", ..., "genus", "person"."""
    lines = map(json.loads, (work / "glosses.jsonl").read_text().splitlines())
    return frozenset(word for word, _ in Counter(w for line in lines for w in line["response"].split()).most_common(40))


# ---------------------------------------------------------------- from runs to tables

LEADS = ("sampled", "sampled_error", "greedy", "nll", "best_nll", "content")


def summary(runs: dict[str, Row], work: Path, stored: list[Row]) -> list[Row]:
    """A row of each measured iterate of each case: its leads over both controls, with their standard errors.

    Leads are positive if the case is better. The standard error has two parts: over held-out examples, of the mean
    over seeds, and over seeds. A case whose start was measured in another work folder keeps its stored rows.
    """
    result = []
    at_one = TEMPERATURES.index(1.0)
    for case in cases():
        if not all(f"{case.key} | {seed}" in runs for seed in case.every_seed):
            continue
        if not frontier_of(work, "start", case.start).exists():
            same = dict(regime=case.regime, start=case.start, name=case.name, prompts=case.prompts)
            same |= dict(flags=case.flags, iterations=case.iterations)
            result += [row for row in stored if all(row[name] == value for name, value in same.items())]
            continue
        done = [runs[f"{case.key} | {seed}"] for seed in case.every_seed]
        for t in case.iterates or (case.iterations,):
            rows = [run["iterates"][str(t)] for run in done]
            fields = ("regime", "start", "name", "script", "flags", "seeds", "prompts", "iterations")
            row: Row = {name: getattr(case, name) for name in fields} | {"iterate": t}
            row["greedy"] = float(np.mean([r["greedy"] for r in rows]))
            names = [name for name in measuring.MEASURED + measuring.OF_TEXTS if name in rows[0]]
            row |= {name: float(np.mean([r[name][at_one] for r in rows])) for name in names}
            row["seconds"] = float(np.median([run["seconds"] for run in done]))
            mine = [loaded(frontier_of(work, case.key, seed, t)) for seed in case.every_seed]
            row["over start"] = leads(mine, [loaded(frontier_of(work, "start", case.start))] * len(mine))
            if not case.is_control and (control := control_of(case, t, runs)):
                row["control"] = control.name
                theirs = [loaded(frontier_of(work, control.key, seed, t)) for seed in case.every_seed]
                row["over supervised"] = leads(mine, theirs)
            result.append(row)
    return result


def control_of(case: Case, t: int, runs: dict[str, Row]) -> Case | None:
    """The supervised case of the same group with the lowest NLL."""
    at_one, found = TEMPERATURES.index(1.0), {}
    for control in cases():
        if control.is_control and control.group == case.group:
            done = [runs.get(f"{control.key} | {seed}", {}).get("iterates", {}) for seed in case.every_seed]
            if all(str(t) in iterates for iterates in done):
                found[control] = np.mean([iterates[str(t)]["nll"][at_one] for iterates in done])
    return min(found, key=found.get, default=None)


def leads(mine: Sequence[Any], theirs: Sequence[Any]) -> dict[str, list[float]]:
    """[lead, standard error, degrees of freedom] by metric, of a case's seeds over a control's.

    All seeds are compared at the same temperatures, those at which every seed's entropy is one that its control
    reaches. The degrees of freedom are those of Welch and Satterthwaite for a sum of two variances.
    """
    pairs = [(a["frontier"], b.get("dense", b["frontier"])) for a, b in zip(mine, theirs)]
    shared = set.intersection(*(measuring.reached(*pair) for pair in pairs))
    found = {}
    for metric in LEADS:
        values = [lead_of(a, b, metric, shared) for a, b in zip(mine, theirs)]
        if any(value is None for value in values):
            continue
        examples, by_seed = len(values[0]), [value.mean() for value in values]
        variances = {examples - 1: np.mean(values, 0).var() / examples}  # by degrees of freedom
        if len(by_seed) > 1:
            variances[len(by_seed) - 1] = np.var(by_seed, ddof=1) / len(by_seed)
        found[metric] = [float(np.mean(by_seed)), float(sum(variances.values()) ** 0.5), freedom(variances)]
    return found


def freedom(variances: dict[int, float]) -> float:
    """Degrees of freedom of the sum of variances, each given under its own."""
    parts = sum(variance**2 / own for own, variance in variances.items())
    return float(sum(variances.values()) ** 2 / parts) if parts else float(max(variances))


def lead_of(mine: Any, control: Any, metric: str, temperatures: set[int]) -> np.ndarray | None:
    """Values of each example, positive if `mine` is better."""
    a, b = mine["frontier"], control["frontier"]
    if metric == "greedy":
        return mine["greedy"] - control["greedy"]
    if metric == "best_nll":
        return measuring.best_nll(b) - measuring.best_nll(a)
    if metric == "nll":
        at_one, k = TEMPERATURES.index(1.0), measuring.MEASURED.index("nll")
        return b[at_one, k] - a[at_one, k]
    found = measuring.lead(a, control.get("dense", b), metric, temperatures)
    return -found if metric == "sampled_error" and found is not None else found


# ---------------------------------------------------------------- all of it


def play(wanted: Sequence[Case], found: dict, size: Size, work: Path, do: Callable) -> None:
    """Fills found["starts"], ["runs"] and ["summary"].

    do(function, jobs) yields (job, function(job)) as processes end them, and saves after each.
    """
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "test-long.jsonl").exists():
        write_data(size, work)
        write_models(work)
    needed = list(dict.fromkeys(case.start for case in wanted))
    for name in needed:  # another training of a start is another start
        if name in found["starts"] and not frontier_of(work, "start", name).exists():
            sys.exit(
                f"evidence.py: error: the runs from {name} are stored, but {work} lacks that start; "
                "--out FILE measures all of it anew"
            )
    assert {STARTS[name].origin for name in needed} <= {"", "underfitted"}, "starts are trained in one go"
    first = functools.partial(train_start, size=size, work=work)
    weights: dict[Path, str] = {}
    for name in needed:  # starts that share weights come in a second go
        weights.setdefault(place_of(name, work), name)
    for names in (list(weights.values()), [name for name in needed if name not in weights.values()]):
        missing = [name for name in names if name not in found["starts"] or not place_of(name, work).exists()]
        for name, row in do(first, missing):
            found["starts"][name] = row | {"commit": found["commit"]}
            print(f"start {name}: greedy {row['greedy']:.3f}, {row['seconds']:.0f} s", flush=True)
    jobs = {f"{case.key} | {seed}": (case, seed) for case in wanted for seed in case.every_seed}
    jobs = [job for key, job in jobs.items() if key not in found["runs"]]
    for (case, seed), row in do(functools.partial(run, size=size, work=work), jobs):
        found["runs"][f"{case.key} | {seed}"] = row | {"commit": found["commit"]}
        print(f"{case.key}, seed {seed}: {row['seconds']:.0f} s", flush=True)
    found["summary"] = summary(found["runs"], work, found["summary"])


def toys() -> dict[str, list[Row]]:
    """What theory.py enumerates; first gradients are those of the greedy opponent."""
    starts = ("flatter", "sharper", "other", "data")
    return {
        "capacity": [dict(temperature=t, beta=b, nats=theory.limited_capacity(t, b, 6)) for t, b in CAPACITY],
        "sequences": [dict(temperature=1.5, beta=b, iterates=theory.sequence_game(1.5, b, 8)) for b in (1, 3)],
        "first gradients": [{"start": start} | theory.first_gradients(start, 0) for start in starts],
    }


def waiting(found: dict) -> dict[str, dict[str, list[str]]]:
    """By regime and name, the starts of the cases of self-play that lack a run."""
    missing: dict[str, dict[str, list[str]]] = {}
    for case in cases():
        if not case.is_control and not all(f"{case.key} | {seed}" in found["runs"] for seed in case.every_seed):
            missing.setdefault(case.regime, {}).setdefault(case.name, []).append(case.start.removesuffix(", again"))
    return missing


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    regimes, starts = (list(dict.fromkeys(getattr(case, name) for case in cases())) for name in ("regime", "start"))
    parser.add_argument("--only", nargs="+", choices=regimes + starts, default=regimes, metavar="REGIME or START")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/evidence", help="data, starts and frontiers")
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument("--write", action="store_true", help="only tables and figures, from what is stored")
    args = parser.parse_args(argv)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    if not args.write:
        machine = f"{platform.machine()} CPU, {os.cpu_count()} cores"
        about = {"machine": machine, "size": dataclasses.asdict(Size()), "temperatures": list(TEMPERATURES)}
        found = found or about | {"starts": {}, "runs": {}, "summary": []}
        found["commit"] = current_commit()  # of what is run now; each row has its own
        for name, value in about.items():
            if found[name] != value:
                sys.exit(f"evidence.py: error: {args.out}: begun with {name} {found[name]}, now {value}; remove it")
        found["command"] = "python benchmarks/evidence.py"
        wanted = [case for case in cases() if case.regime in args.only or case.start in args.only]
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:

            def do(function: Callable, jobs: list) -> Iterator[tuple[Any, Row]]:
                futures = {pool.submit(function, job): job for job in jobs}
                for future in as_completed(futures):
                    yield futures[future], future.result()
                    save(args.out, found)

            play(wanted, found, Size(), args.work, do)
        found |= toys()
    found["regimes"] = regimes
    found["waiting"] = waiting(found)
    save(args.out, found)
    if args.out == STORED or len(args.only) == len(regimes):
        evidence_report.write_all(found, ROOT)
    else:  # some regimes, measured anew: the documents keep what is stored
        print("\n".join(evidence_report.regimes(found, [name], True) for name in regimes if name in args.only))


def save(path: Path, found: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
