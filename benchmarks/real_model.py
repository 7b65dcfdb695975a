"""The paper's question on a real language model: does self-play give more than further supervised training?

    python benchmarks/real_model.py                  all trials on SmolLM2-135M-Instruct (make evidence-smollm2)
    python benchmarks/real_model.py --size medium    fewer words, one rate for each arm, for a CPU
    python benchmarks/real_model.py --minutes 60     begins no trial after an hour; the same command goes on
    python benchmarks/real_model.py --device cuda    the same on a GPU
    python benchmarks/real_model.py --write          tables and figure from the stored results

A start is fine-tuned on definitions written by people; every arm of `ARMS` then trains it further on the same
definitions (D on others), by the scripts of this project. Three questions are asked of all:

- as a model of the data: the NLL of held-out definitions, at temperature 1 and at each model's best temperature;
- as a judge: which of four definitions of words of one kind, of nearly equal lengths, is likeliest for a word. Kinds
  that are asked for are left out of training;
- as a writer: what its definitions share with people's, their length, repetitions, and fluency.

The arms, the rates and the rules, `ruling` in real_model_report.py, were written down before the first trial. Results
are in benchmarks/results/smollm2-<size>.json and .npz, with values of each word, all of one commit and machine. The
page beside them, .md, has every column and some definitions.
"""

import argparse
import dataclasses
import gzip
import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring  # before torch: it sets the number of threads
import numpy as np
import real_model_report
import torch
from bench import current_commit
from measuring import ROOT, run_script, write_lines
from real_model_report import Report, Values

from evaluate import Row
from player import Item

# ---------------------------------------------------------------- what is run


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
    rates: int = 8  # Each arm has so many trials with the first seed.
    seeds: int = 3  # The further ones have those rates that are best in a question.


SIZES = {
    "full": Size(),
    "medium": Size(400, 60, 1000, 1000, 40, start_epochs=1, iterations=1, rates=1, seeds=2),
    "tiny": Size(8, 4, 4, 8, 4, start_epochs=1, iterations=1, rates=1, seeds=1),  # for tests
}

# The first of each list is the middle of a pilot's, made with other code; it is the only one of the medium size.
SUPERVISED = [f"--lr {rate}" for rate in ("5.4e-5", "2e-5", "2e-4", "1e-4", "2.8e-5", "3.9e-5", "7.5e-5", "1.4e-4")]
PAIRS = [f"--lr {rate} --beta {beta}" for beta in (0.1, 1) for rate in ("1e-5", "3e-6", "1e-6", "3e-5")]
ARMS = {  # ways to go on from the start: (script, flags, rates)
    "A": ("sft", "--data WORK/start.jsonl", SUPERVISED),  # more supervised training
    "B": ("spin", "--data WORK/start.jsonl --temperature 1", PAIRS),
    "R": ("family", "--pairs WORK/pairs.jsonl", PAIRS),  # SPIN's loss, against other words' definitions
    "D": ("sft", "--data WORK/fresh.jsonl", SUPERVISED),  # supervised training on fresh definitions
    "C": ("spin", "--data WORK/start.jsonl --temperature 0", PAIRS),
    "F": ("sft", "--data WORK/start.jsonl --loss dft", SUPERVISED),
}
COMMON = "--rank 0 --precision fp32 --batch 16 --epochs 1 --weight-decay 0 --max-new-tokens 48 --gen-batch 64"
COMMON += r" --template '<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n'"
COMMON += " --eval-data WORK/tuning.jsonl --eval-limit 4 --eval-temperatures 1 --save-minutes 5"
ANSWERS = 4  # a choice between so many definitions
PER_KIND = 20  # the most words of a kind that are asked for: questions of one kind share their wrong answers
TEMPERATURES = (0.8, 0.9, 1.0, 1.15, 1.35)
SAMPLED = (0.7, 1.0, 1.2)  # temperatures of written definitions, for equal entropy
KEPT = 50  # responses of each model, to be read


def trials(size: Size, found: Row, values: Values) -> Iterator[tuple[str, str, int]]:
    """(arm, rate, seed): first one rate of every arm, then the others, then further seeds of the rates that are best.

    Which ones are best on the tuning words is known once the trials before them are in `found`.
    """
    yield from ((arm, ARMS[arm][2][i], 0) for i in range(size.rates) for arm in ARMS)
    report = Report(found, values)
    yield from ((arm, rate, seed) for seed in range(1, size.seeds) for arm in ARMS for rate in report.rates(arm))


def write_data(size: Size, work: Path) -> None:
    """start, fresh and pairs, to train on; heldout: words for the NLL (tuning, test), then words of whole kinds."""
    rows = []
    with gzip.open(ROOT / "glosses/glosses.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            word, _, kind = row["prompt"].rpartition(", ")
            order = hashlib.sha256(f"order {row['prompt']}".encode()).digest()
            prompt = f"Define the word.\n{word} (a kind of {kind}):"
            rows.append((order, kind, {"prompt": prompt, "response": row["response"]}))
    # Of words with the same definition the first one stays: none is trained on and asked for, too.
    rows = sorted({row[2]["response"]: row for row in sorted(rows, reverse=True)}.values())
    kinds = Counter(kind for _, kind, _ in rows)
    asked: list[str] = []  # kinds of nine words or more, whose words are not trained on
    for kind in dict.fromkeys(kind for _, kind, _ in rows):
        if sum(min(kinds[one], PER_KIND) for one in asked) < size.tuning + size.choice and kinds[kind] >= 9:
            asked.append(kind)
    judged = [line for _, kind, line in rows if kind in asked]
    others = iter([line for _, kind, line in rows if kind not in asked])
    counts = {"start": size.train, "fresh": size.train, "tuning": size.tuning, "test": size.test}
    lines = {name: [next(others) for _ in range(count)] for name, count in counts.items()}
    lines["heldout"] = lines["tuning"] + lines.pop("test") + judged
    start = lines["start"]
    shifted = [*start[1:], start[0]]  # their order is random, so these are definitions of random other words
    lines["pairs"] = [one | {"generated": other["response"]} for one, other in zip(start, shifted)]
    for name, some in lines.items():
        write_lines(work / f"{name}.jsonl", some)


# ---------------------------------------------------------------- the three questions


class Judge:
    """Asks models of one architecture about the held-out words. `base` is the untouched model, which tells fluency."""

    def __init__(self, size: Size, work: Path, base: Path, flags: list[str]) -> None:
        self.size, self.base = size, base
        self.player, self.work = measuring.ruler(str(base), f"{work}/heldout.jsonl", *flags)
        first = size.tuning + size.test
        self.words, judged = self.work.heldout[:first], self.work.heldout[first:]
        kinds = [e.prompt.rpartition("(a kind of ")[2] for e in judged]
        of_kind = {kind: [e for e, other in zip(judged, kinds) if other == kind] for kind in kinds}
        asked = [(e, kind) for e, kind in zip(judged, kinds) if e in of_kind[kind][:PER_KIND]]
        asked = asked[: size.tuning + size.choice]
        self.choices = [nearest(e, of_kind[kind]) for e, kind in asked]
        self.kinds = [list(of_kind).index(kind) for _, kind in asked]
        self.judges = measuring.judges_of_definitions(work / "start.jsonl")[:2]

    def nll(self, words: Sequence[Any], temperature: float) -> np.ndarray:
        items = [(e.prompt_ids, e.real_ids) for e in words]
        return -np.array(self.player.logps(items, temperature=temperature))[:, 0]

    def ask(self, weights: Path) -> tuple[dict[str, np.ndarray], Row]:
        """Returns values of each word, by measure, and what readers want to see. Tuning words come first.

        nll, best_nll: nats per response. summed, per_token: whether the true definition is the likeliest of four, in
        sum or per token. content, length, repeats, unfinished, fluency: of greedy definitions; frontier: of sampled.
        """
        player, size = self.player, self.size
        player.model.load_weights(weights)
        best = min(TEMPERATURES, key=lambda temperature: self.nll(self.words[: size.tuning], temperature).sum())
        found: dict[str, Any] = {"nll": self.nll(self.words, 1.0), "best_nll": self.nll(self.words, best)}
        found["tokens"] = [len(e.real_ids) for e in self.words]
        logps = np.array(player.logps(self.choices))
        lengths = np.array([[len(ids) for ids in responses] for _, *responses in self.choices])
        found |= {"summed": logps.argmax(1) == 0, "per_token": (logps / lengths).argmax(1) == 0, "kinds": self.kinds}
        writer = dataclasses.replace(self.work, heldout=self.words[size.tuning :][: size.written])
        greedy = writer.respond(player, writer.heldout, "greedy", 0, 0.0)
        texts = [writer.text(ids) for ids, _ in greedy]
        found["frontier"] = measuring.frontier(player, writer, SAMPLED, self.judges)
        found["content"] = [self.judges[1](text, e.references) for text, e in zip(texts, writer.heldout)]
        found["length"] = [len(ids) for ids, _ in greedy]
        found["repeats"] = [repeats(text) for text in texts]
        found["unfinished"] = [not ended for _, ended in greedy]
        player.model.load_weights(self.base)
        fluency = player.logps([(e.prompt_ids, ids) for e, (ids, _) in zip(writer.heldout, greedy)])
        found["fluency"] = np.array(fluency)[:, 0] / found["length"]
        row = {"temperature": best, "texts": texts[:KEPT]}
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


# ---------------------------------------------------------------- all of it


@dataclass
class Experiment:
    """The trials of a size. `found` and `values` are the results: see real_model_report.py."""

    size: Size
    work: Path  # data and weights
    base: Path  # the untouched model
    device: str
    out: Path  # `found`; `values` lie beside it
    found: Row
    values: Values

    def argv(self, flags: str, model: Path) -> list[str]:
        words = shlex.split(f"{COMMON} --device {self.device} {flags}")
        return [*(word.replace("WORK", str(self.work)) for word in words), "--model", str(model)]

    def train_start(self) -> None:
        """Fine-tunes the model, and keeps the epoch with the lowest NLL of the tuning words as WORK/start."""
        flags = f"--lr 1e-4 --iterations {self.size.start_epochs} --eval-limit 0 --data WORK/start.jsonl --out WORK/sft"
        run_script("sft", self.argv(flags, self.base), "start")
        best = self.work / "sft/best"  # It is there unless the last epoch is the best one.
        shutil.copytree(best if best.exists() else self.work / "sft/final", self.work / "part", dirs_exist_ok=True)
        (self.work / "part").rename(self.work / "start")
        shutil.rmtree(self.work / "sft")

    def play(self, deadline: float) -> Iterator[str]:
        """Does what is missing, yields a line about each model, and begins no trial after the deadline."""
        if not (self.work / "pairs.jsonl").exists():
            write_data(self.size, self.work)
        if not (self.work / "start").exists():
            self.train_start()
        judge, last = Judge(self.size, self.work, self.base, self.argv("", self.base)), self.size.iterations
        for name, end in (("longest", max), ("shortest", min)):
            true_ones = [end(map(len, ids)) == len(ids[0]) for _, *ids in judge.choices]
            self.found.setdefault("lengths", {})[name] = float(np.mean(true_ones))
        yield from self.look(judge, "start", self.work / "start")
        for arm, rate, seed in trials(self.size, self.found, self.values):
            key = f"{arm} | {rate} | {seed}"
            if f"{key} | {last}" in self.found["trials"]:
                continue
            if time.monotonic() > deadline:
                return
            began, (script, flags, _) = time.monotonic(), ARMS[arm]
            out = self.work / "trials" / hashlib.sha256(key.encode()).hexdigest()[:12]
            flags += f" {rate} --iterations {last} --seed {seed} --out WORK/trials/{out.name}"
            run_script(script, self.argv(flags, self.work / "start"), key)
            facts = {"arm": arm, "rate": rate, "seed": seed, "seconds": time.monotonic() - began}
            for t in range(1, last + 1):
                folder = out / ("final" if t == last else f"iterate-{t}")
                yield from self.look(judge, f"{key} | {t}", folder, facts | {"iterate": t})
            shutil.rmtree(out)
        yield from self.look(judge, "untouched", self.base)

    def look(self, judge: Judge, name: str, folder: Path, facts: Row | None = None) -> Iterator[str]:
        """Asks a model, unless that is done. That of a trial has facts."""
        part = self.found["trials" if facts else "models"]
        if name not in part:
            values, row = judge.ask(folder)
            part[name] = (facts or {}) | row
            self.values |= {f"{name}/{measure}": some for measure, some in values.items()}
            whole = self.out.with_suffix(".part.npz")
            np.savez_compressed(whole, **self.values)
            whole.replace(self.out.with_suffix(".npz"))
            measuring.store(self.out, self.found)
            nll, tokens = (values[measure][self.size.tuning :].sum() for measure in ("nll", "tokens"))
            yield f"{name}: {nll / tokens:.4f} nats per token"


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
    new = {"commit": current_commit(), "size": dataclasses.asdict(size), "models": {}, "trials": {}}
    new["machine"] = f"{platform.machine()}, {args.device}, {args.threads} threads"
    found = measuring.begun(out, new, () if args.write else ("commit", "size", "machine"))
    values = measuring.loaded(out.with_suffix(".npz")) if found["models"] else {}
    if not args.write:
        if not (args.model / "config.json").exists():
            sys.exit(f"real_model.py: error: --model {args.model}: no such model; make smollm2 makes it")
        torch.set_num_threads(args.threads)
        work = args.work or ROOT / f"runs/smollm2/{args.size}"
        for line in Experiment(size, work, args.model, args.device, out, found, values).play(deadline):
            print(line, flush=True)
    if found["trials"]:
        print(Report(found, values).about(), end="")
        real_model_report.write_all(found, values, args.size)


if __name__ == "__main__":
    main()
