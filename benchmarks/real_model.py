"""The paper's question on a real language model: does self-play give more than further supervised training?

    python benchmarks/real_model.py                  all trials on SmolLM2-135M-Instruct (make evidence-smollm2)
    python benchmarks/real_model.py --size medium    fewer words and one rate for each arm, for a CPU; small: fewer still
    python benchmarks/real_model.py --minutes 60     begins no trial after an hour; the same command goes on
    python benchmarks/real_model.py --device cuda    the same on a GPU
    python benchmarks/real_model.py --write          tables and figure from the stored results

`make smollm2` makes the model. A start is fine-tuned on definitions written by people; every arm of `ARMS` then trains
it further on the same definitions (D on others), by the scripts of this project. Three questions are asked of all:

- as a model of the data: the NLL of held-out definitions, at temperature 1 and at each model's best temperature;
- as a judge: which of four definitions of words of one kind, of nearly equal lengths, is likeliest for a word. Kinds
  that are asked for are left out of training;
- as a writer: what its definitions share with people's, their length and repetitions, and their fluency under the
  untouched model.

The model's weights were quantised to 4 bits; the hub has it before that. The arms, the rates and the rules, `ruling` in
real_model_report.py, were written down before the first trial. Results are in
benchmarks/results/smollm2-<size>.json and .npz, each trial with its values per word, and of one commit only.
"""

import argparse
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring  # before torch: it sets the number of threads
import numpy as np
import real_model_report
import torch
from bench import current_commit, write_whole
from measuring import ROOT, flags_of, linearised, run_script

from player import Item, Player

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How many definitions are trained on, and how many words each question is asked about."""

    train: int = 2000
    tuning: int = 300  # Rates, temperatures and the end of the start's training are chosen by these words.
    test: int = 2000
    choice: int = 4000
    written: int = 300
    start_epochs: int = 4
    iterations: int = 2
    rates: int = 8  # Each arm has so many trials.
    seeds: int = 3


SIZES = {
    "full": Size(),
    "medium": Size(400, 60, 1000, 1000, 40, start_epochs=1, iterations=1, rates=1, seeds=2),
    "small": Size(400, 60, 250, 250, 40, start_epochs=1, iterations=1, rates=1, seeds=2),
    "tiny": Size(8, 4, 4, 8, 4, start_epochs=1, iterations=1, rates=1, seeds=1),  # for tests
}

# The first of each list is the middle of a pilot's, made with other code; it is the only one of a small experiment.
SUPERVISED = [f"--lr {rate}" for rate in ("5.4e-5", "2e-5", "2e-4", "1e-4", "2.8e-5", "3.9e-5", "7.5e-5", "1.4e-4")]
PAIRS = [f"--lr {rate} --beta {beta}" for beta in (0.1, 1) for rate in ("1e-5", "3e-6", "1e-6", "3e-5")]


@dataclass(frozen=True)
class Arm:
    """One way to go on from the start."""

    name: str
    script: str
    flags: str = ""
    data: str = "start"
    rates: Sequence[str] = dataclasses.field(default_factory=lambda: SUPERVISED)


ARMS = {
    "A": Arm("more supervised training", "sft"),
    "B": Arm("SPIN, temperature 1", "spin", "--temperature 1", rates=PAIRS),
    "R": Arm("SPIN's loss, other words' definitions", "family", data="pairs", rates=PAIRS),
    "D": Arm("supervised, fresh definitions", "sft", data="fresh"),
    "C": Arm("SPIN, greedy opponent", "spin", "--temperature 0", rates=PAIRS),
    "F": Arm("DFT", "sft", "--loss dft"),
}
COMMON = "--rank 0 --batch 16 --epochs 1 --weight-decay 0 --max-new-tokens 48 --gen-batch 64"
COMMON += r" --template '<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n'"
COMMON += " --eval-limit 4 --eval-temperatures 1 --save-minutes 5"
START = "--lr 1e-4"
ANSWERS = 4  # a choice between so many definitions
PER_KIND = 20  # the most words of a kind that are asked for: questions of one kind share their wrong answers
TEMPERATURES = (0.8, 0.9, 1.0, 1.15, 1.35)
SAMPLED = (0.7, 1.0, 1.2)  # temperatures of written definitions, for equal entropy
KEPT = 50  # responses of each model, to be read

# ---------------------------------------------------------------- data


def write_data(size: Size, work: Path) -> None:
    """start, fresh and pairs, to train on; heldout: words for the NLL (tuning, test), then words of whole kinds."""
    with gzip.open(ROOT / "glosses/glosses.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    rows.sort(key=lambda row: hashlib.sha256(f"order {row['prompt']}".encode()).digest())
    kinds = Counter(kind_of(row) for row in rows)
    asked: list[str] = []  # kinds of nine words or more, whose words are not trained on
    for kind in dict.fromkeys(map(kind_of, rows)):
        if sum(min(kinds[one], PER_KIND) for one in asked) < size.tuning + size.choice and kinds[kind] >= 9:
            asked.append(kind)
    judged = [row for row in rows if kind_of(row) in asked]
    others = iter([row for row in rows if kind_of(row) not in asked])
    counts = {"start": size.train, "fresh": size.train, "heldout": size.tuning + size.test}
    parts = {name: [next(others) for _ in range(count)] for name, count in counts.items()}
    parts["heldout"] += judged
    lines = {name: [line_of(row) for row in part] for name, part in parts.items()}
    start = lines["start"]
    shifted = [*start[1:], start[0]]  # their order is random, so these are definitions of random other words
    lines["tuning"] = lines["heldout"][:4]  # what the scripts evaluate; the questions are asked here
    lines["pairs"] = [one | {"generated": other["response"]} for one, other in zip(start, shifted)]
    work.mkdir(parents=True, exist_ok=True)
    for name, part in lines.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))


def kind_of(row: Row) -> str:
    return row["prompt"].rpartition(", ")[2]


def line_of(row: Row) -> Row:
    word, _, kind = row["prompt"].rpartition(", ")
    return {"prompt": f"Define the word.\n{word} (a kind of {kind}):", "response": row["response"]}


# ---------------------------------------------------------------- trials


@dataclass(frozen=True)
class Trial:
    arm: str
    rate: str  # its flags
    seed: int

    @property
    def key(self) -> str:
        return f"{self.arm} | {self.rate} | {self.seed}"


def trials(size: Size) -> list[Trial]:
    """In the order in which they are run: first one rate of every arm, then the others, then further seeds."""
    rates = range(size.rates)
    return [Trial(arm, ARMS[arm].rates[i], seed) for seed in range(size.seeds) for i in rates for arm in ARMS]


def flags_of_trial(trial: Trial, size: Size, work: Path, out: Path, device: str) -> list[str]:
    arm = ARMS[trial.arm]
    flags = flags_of(COMMON, arm.flags, trial.rate)
    flags["--pairs" if arm.script == "family" else "--data"] = f"{work}/{arm.data}.jsonl"
    flags |= {"--model": f"{work}/start", "--iterations": str(size.iterations), "--seed": str(trial.seed)}
    flags |= {"--eval-data": f"{work}/tuning.jsonl", "--out": str(out), "--device": device}
    return measuring.words_of(flags)


def train_start(size: Size, work: Path, base: Path, device: str) -> None:
    """Fine-tunes the model for as many epochs as lower the NLL of the tuning words, and writes work/start."""
    if (work / "start").exists():
        return
    out = work / "sft"
    flags = flags_of(COMMON, START) | {"--data": f"{work}/start.jsonl", "--eval-data": f"{work}/tuning.jsonl"}
    flags |= {"--model": str(base), "--iterations": str(size.start_epochs), "--out": str(out), "--device": device}
    run_script("sft", measuring.words_of(flags), "start")
    judge = Judge(size, work, base, device)

    def nll(epoch: int) -> float:
        judge.player.model.load_weights(out / f"iterate-{epoch}")
        return judge.tuning_nll()

    best = min(range(1, size.start_epochs + 1), key=nll)
    shutil.copytree(out / "final", work / "start.part", dirs_exist_ok=True)
    shutil.copy(out / f"iterate-{best}/model.safetensors", work / "start.part")
    (work / "start.part").rename(work / "start")
    shutil.rmtree(out)


# ---------------------------------------------------------------- the three questions


class Judge:
    """Asks models of one architecture about the held-out words. `base` is the untouched model, which tells fluency."""

    def __init__(self, size: Size, work: Path, base: Path, device: str) -> None:
        self.size, self.base = size, base
        flags = measuring.words_of(flags_of(COMMON, f"--device {device}") | {"--eval-limit": "0"})
        self.player, self.work = measuring.ruler(str(base), f"{work}/heldout.jsonl", 48, tuple(flags))
        first = size.tuning + size.test
        self.words, judged = self.work.heldout[:first], self.work.heldout[first:]
        kinds = [e.prompt.rpartition("(a kind of ")[2] for e in judged]
        of_kind = {kind: [e for e, other in zip(judged, kinds) if other == kind] for kind in kinds}
        asked = [(e, kind) for e, kind in zip(judged, kinds) if e in of_kind[kind][:PER_KIND]]
        asked = asked[: size.tuning + size.choice]
        self.choices = [nearest(e, of_kind[kind]) for e, kind in asked]
        self.kinds = np.array([list(of_kind).index(kind) for _, kind in asked])
        self.tokens = np.array([len(e.real_ids) for e in self.words])
        lines = map(json.loads, (work / "start.jsonl").read_text().splitlines())
        words = Counter(word for line in lines for word in line["response"].split())
        self.frequent = frozenset(word for word, _ in words.most_common(40))

    def tuning_nll(self) -> float:
        items = [(e.prompt_ids, e.real_ids) for e in self.words[: self.size.tuning]]
        return -float(np.sum(self.player.logps(items)))

    def ask(self, weights: Path) -> tuple[dict[str, np.ndarray], Row]:
        """Returns values of each word, by measure, and what readers want to see. Tuning words come first.

        nll, best_nll: nats per response. summed, per_token: whether the true definition is the likeliest of four, in
        sum or per token. content, length, repeats, unfinished, fluency: of greedy definitions; frontier: of sampled.
        """
        player, size = self.player, self.size
        player.model.load_weights(weights)
        nll = -logps_at(player, [(e.prompt_ids, e.real_ids) for e in self.words], TEMPERATURES)
        best = int(nll[:, : size.tuning].sum(1).argmin())
        found = {"nll": nll[TEMPERATURES.index(1.0)], "best_nll": nll[best], "tokens": self.tokens}
        logps = np.array(player.logps(self.choices))
        lengths = np.array([[len(ids) for ids in responses] for _, *responses in self.choices])
        found["summed"] = logps.argmax(1) == 0
        found["per_token"] = (logps / lengths).argmax(1) == 0
        found["kinds"] = self.kinds
        writer = dataclasses.replace(self.work, heldout=self.words[size.tuning :][: size.written])
        greedy = writer.respond(player, writer.heldout, "greedy", 0, 0.0)
        texts = [writer.text(ids) for ids, _ in greedy]
        content = functools.partial(measuring.overlap, without=self.frequent)
        found["frontier"] = measuring.frontier(player, writer, SAMPLED, measuring.overlap, [content])
        found["content"] = np.array([content(text, e.references) for text, e in zip(texts, writer.heldout)])
        found["length"] = [len(ids) for ids, _ in greedy]
        found["repeats"] = list(map(repeats, texts))
        found["unfinished"] = [not ended for _, ended in greedy]
        player.model.load_weights(self.base)
        fluency = player.logps([(e.prompt_ids, ids) for e, (ids, _) in zip(writer.heldout, greedy)])
        found["fluency"] = np.array(fluency)[:, 0] / found["length"]
        row = {"temperature": TEMPERATURES[best], "texts": texts[:KEPT]}
        return {name: np.asarray(values, np.float32) for name, values in found.items()}, row


def nearest(example: Any, of_kind: Sequence[Any]) -> Item:
    """(prompt, its definition, three of the same kind whose numbers of tokens are nearest to its own)."""
    others = [e for e in of_kind if e.response != example.response]
    others.sort(key=lambda e: (abs(len(e.real_ids) - len(example.real_ids)), e.prompt))
    return (example.prompt_ids, example.real_ids, *(e.real_ids for e in others[: ANSWERS - 1]))


def repeats(text: str) -> bool:
    """Whether three words follow each other in the same order twice."""
    words = text.split()
    triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return len(set(triples)) < len(triples)


@torch.no_grad()
def logps_at(player: Player, items: Sequence[Item], temperatures: Sequence[float]) -> np.ndarray:
    """log p of each item's response at each temperature, (temperatures, items), in nats, with one pass of the model."""
    result = np.zeros((len(temperatures), len(items)))
    for group in player.micro_batches([sum(map(len, item)) for item in items]):
        hidden, targets, slots, longest = player.predictors([items[i] for i in group])
        owners = (slots // longest).cpu().numpy()
        for k, temperature in enumerate(temperatures):
            logps = player.head_logps(hidden, targets, temperature)
            result[k, group] = np.bincount(owners, logps.double().cpu().numpy(), len(group))
    return result


# ---------------------------------------------------------------- changes against the start


def change(a: dict[str, np.ndarray], b: dict[str, np.ndarray], measure: str, part: slice) -> np.ndarray:
    """Values of each word whose mean is the change of a measure from `a` to `b`; NLLs are in nats per token."""
    if measure in ("nll", "best_nll"):
        return linearised(b[measure][part], a["tokens"][part]) - linearised(a[measure][part], a["tokens"][part])
    if measure in ("summed", "per_token"):
        return b[measure][part] - a[measure][part]
    return b[measure] - a[measure]


QUESTIONS = {"nll": -1, "best_nll": -1, "summed": 1, "per_token": 1}  # 1: larger values are better; -1: smaller ones


def error_of(changes: np.ndarray, values: dict[str, np.ndarray], measure: str, size: Size) -> float:
    """The standard error of a mean over test words.

    Questions of one kind share wrong answers. Of the error over words and the one over kinds the larger one counts,
    since the second is itself uncertain if kinds are few.
    """
    centred = changes - changes.mean()
    sums = [centred]
    if measure in ("summed", "per_token"):
        sums.append(np.bincount(values["kinds"][size.tuning :].astype(int), centred))
    return float(max((some**2).sum() ** 0.5 for some in sums) / len(changes))


MEASURES = ("nll", "best_nll", "summed", "per_token", "content", "length", "repeats", "unfinished", "fluency")


def summary(found: Row, values: dict[str, dict[str, np.ndarray]], size: Size) -> list[Row]:
    """A row of each trial's iterates: [change against the start, its standard error] by measure, on test words."""
    start, rows = values["start"], []
    for key, facts in found["trials"].items():
        now = values[key]
        row = facts | {"key": key, "mean": {m: float(now[m][size.tuning :].mean()) for m in ("summed", "per_token")}}
        row["mean"] |= {m: float(now[m].mean()) for m in MEASURES[4:]}
        for m in MEASURES:
            of_words = change(start, now, m, slice(size.tuning, None))
            row[m] = [float(of_words.mean()), error_of(of_words, now, m, size)]
            if m in ("nll", "best_nll", "summed", "per_token"):
                row[f"tuning {m}"] = float(change(start, now, m, slice(size.tuning)).mean())
        both = now["frontier"], start["frontier"]
        lead = measuring.lead(*both, "content", measuring.reached(*both))
        row["content at equal entropy"] = None if lead is None else [lead.mean(), lead.std() / len(lead) ** 0.5]
        rows.append(json.loads(json.dumps(row, default=float)))
    return rows


def contrasts(found: Row, values: dict[str, dict[str, np.ndarray]], size: Size) -> list[Row]:
    """For each question the rate and iterate of every arm that are best on the tuning words, beside start, A and R.

    Leads are [lead, standard error over test words] of each seed, and positive if the arm is better.
    """
    rows = []
    for measure, sign in QUESTIONS.items():
        chosen = {}
        for arm in ARMS:
            of_arm = [row for row in found["summary"] if row["arm"] == arm and row["seed"] == 0]
            if of_arm:
                best = max(of_arm, key=lambda row: sign * row[f"tuning {measure}"])
                chosen[arm] = best["rate"], best["iterate"]
        for arm, (rate, iterate) in chosen.items():
            row: Row = {"measure": measure, "arm": arm, "rate": rate, "iterate": iterate, "over": {}}
            for control in ("start", "A", "R"):
                row["over"][control] = []
                for seed in range(size.seeds if control in ("start", *chosen) and control != arm else 0):
                    mine = values.get(f"{arm} | {rate} | {seed} | {iterate}")
                    theirs = values.get("start") if control == "start" else None
                    if control in chosen:
                        theirs = values.get(f"{control} | {chosen[control][0]} | {seed} | {chosen[control][1]}")
                    if mine and theirs:
                        lead = sign * change(theirs, mine, measure, slice(size.tuning, None))
                        row["over"][control].append([float(lead.mean()), error_of(lead, mine, measure, size)])
            rows.append(row)
    return rows


# ---------------------------------------------------------------- all of it


def play(
    found: Row, values: dict, size: Size, work: Path, base: Path, device: str, save: Callable, out_of_time: Callable
) -> Iterator[str]:
    """Runs what is missing, and yields a line about each part as it is done."""
    if not (work / "pairs.jsonl").exists():
        write_data(size, work)
    train_start(size, work, base, device)
    judge = Judge(size, work, base, device)

    def look(name: str, folder: Path) -> Iterator[str]:
        if name not in values:
            values[name], found["models"][name] = judge.ask(folder)
            save()
            yield f"{name}: {mean_nll(values[name], size):.4f} nats per token"

    yield from look("start", work / "start")
    longest, shortest = (np.mean([f(map(len, ids)) == len(ids[0]) for _, *ids in judge.choices]) for f in (max, min))
    found["lengths"] = {"longest": float(longest), "shortest": float(shortest)}
    for trial in trials(size):
        last = f"{trial.key} | {size.iterations}"
        if last in found["trials"]:
            continue
        out = work / "trials" / hashlib.sha256(trial.key.encode()).hexdigest()[:12]
        if out_of_time():
            return
        began = time.monotonic()
        run_script(ARMS[trial.arm].script, flags_of_trial(trial, size, work, out, device), trial.key)
        seconds = time.monotonic() - began
        for t in range(1, size.iterations + 1):
            key = f"{trial.key} | {t}"
            if key in found["trials"]:
                continue
            values[key], row = judge.ask(out / ("final" if t == size.iterations else f"iterate-{t}"))
            facts = dataclasses.asdict(trial) | {"iterate": t, "seconds": seconds}
            found["trials"][key] = facts | row
            save()
            yield f"{key}: {mean_nll(values[key], size):.4f} nats per token, {seconds:.0f} s"
        shutil.rmtree(out)
    yield from look("untouched", base)


def mean_nll(values: dict[str, np.ndarray], size: Size) -> float:
    return values["nll"][size.tuning :].sum() / values["tokens"][size.tuning :].sum()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--model", type=Path, default=ROOT / "runs/smollm2/model", help="made by make smollm2")
    parser.add_argument("--work", type=Path, help="data and weights; default: runs/smollm2/SIZE")
    parser.add_argument("--out", type=Path, help="results; default: benchmarks/results/smollm2-SIZE.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no trial after that time")
    parser.add_argument("--write", action="store_true", help="only tables and figure, from what is stored")
    args = parser.parse_args(argv)
    size, deadline = SIZES[args.size], time.monotonic() + 60 * args.minutes
    out = args.out or ROOT / f"benchmarks/results/smollm2-{args.size}.json"
    work = args.work or ROOT / f"runs/smollm2/{args.size}"
    new = {"commit": current_commit(), "size": dataclasses.asdict(size), "models": {}, "trials": {}}
    new["machine"] = f"{platform.machine()}, {args.device}, {args.threads} threads"
    found = json.loads(out.read_text()) if out.exists() else new
    values = unpacked(out.with_suffix(".npz"))

    def save() -> None:
        found["summary"] = summary(found, values, size) if "start" in values else []
        found["contrasts"] = contrasts(found, values, size) if found["summary"] else []
        found["left"] = [t.key for t in trials(size) if f"{t.key} | {size.iterations}" not in found["trials"]]
        pack(out.with_suffix(".npz"), values)
        write_whole(out, json.dumps(found, indent=1) + "\n")

    if not args.write:
        if not (args.model / "config.json").exists():
            sys.exit(f"real_model.py: error: --model {args.model}: no such model; make smollm2 makes it")
        for name in ("commit", "size"):
            if found[name] != new[name]:
                stored = f"results of {name} {found[name]}, now {new[name]}"
                sys.exit(f"real_model.py: error: {out}: {stored}; give another --out")
        torch.set_num_threads(args.threads)
        late = lambda: time.monotonic() > deadline  # noqa: E731
        for line in play(found, values, size, work, args.model, args.device, save, late):
            print(f"{line}; {len(found['left'])} trials are left", flush=True)
    if not found["models"]:
        return
    save()
    real_model_report.write_all(found, ROOT, args.size)


def pack(path: Path, values: dict[str, dict[str, np.ndarray]]) -> None:
    """Writes all arrays into one compressed file, under "key/measure"."""
    part = path.with_name(path.stem + ".part.npz")
    np.savez_compressed(part, **{f"{key}/{name}": a for key, some in values.items() for name, a in some.items()})
    part.replace(path)


def unpacked(path: Path) -> dict[str, dict[str, np.ndarray]]:
    values: dict[str, dict[str, np.ndarray]] = {}
    if path.exists():
        with np.load(path) as file:
            for name in file.files:
                key, _, measure = name.rpartition("/")
                values.setdefault(key, {})[measure] = file[name]
    return values


if __name__ == "__main__":
    main()
