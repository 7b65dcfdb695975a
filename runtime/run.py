"""The run: which iteration it is in, where random numbers come from, what is kept and who is told.

A `Run` goes through all phases of a method; spin.py says what a method asks of it. A phase asks for responses or
log-probabilities and gets those that an earlier process finished for free. Random numbers depend on (seed, iteration,
purpose) alone, so on a CPU a run that died ends bit for bit like one that did not, on one machine with as many threads.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import evaluate
from data.examples import Example
from evaluate import Row
from runtime import parallel
from runtime.folder import Folder
from runtime.stopping import Stopped
from runtime.training import Training
from runtime.weights import Weights
from runtime.work import Work


@dataclass
class Run:
    """One run of a method: its inputs, its folder and its progress."""

    args: Any  # the options of the method and of the machinery: see runtime/options.py
    work: Work  # asks the player
    folder: Folder
    weights: Weights  # keeps the iterates in memory and on disk
    device: torch.device
    record: dict[str, Any]  # what run.json says
    found: dict[str, Any] | None = None  # what it said when `setup` read it
    observers: Sequence[Any] = ()  # see `tell`
    rows: list[Row] = field(default_factory=list)  # metrics of theta_0 ... theta_t, the finished iterates
    iterate: int | None = None  # number of the iterate that is being made; None outside `iterations`
    start_samples: evaluate.StartSamples | None = None
    heldout_responses: dict[int, list[Row]] = field(default_factory=dict)  # keyed by iterate

    # ------------------------------------------------------------ iterations

    def iterations(self, player: Any) -> Iterator[int]:
        """Yields the number t of every iteration that is not finished yet, with the player as theta_t.

        A new run evaluates theta_0 first. A resumed one loads the last finished iterate.
        """
        self.rows = parallel.on_writer(self.folder.finished)
        self.enter(0)
        with self.work.progress.timed("evaluate"):
            self.start_samples = evaluate.sample_start(player, self.work)
        if self.rows:
            self.weights.load(player, self.rows[-1]["iterate"])
        else:
            self.finish_iterate(player, self.evaluate(player))
        for t in range(len(self.rows) - 1, self.args.iterations):
            self.enter(t + 1)
            yield t

    def enter(self, iterate: int) -> None:
        """Begins or resumes work on an iterate."""
        self.iterate, self.work.folder, progress = iterate, self.folder, self.work.progress
        progress.iterate, progress.left, progress.device = iterate, self.args.iterations - iterate, self.device
        self.folder.enter(iterate)

    def prompts(self, examples: list[Example], t: int) -> list[Example]:
        """The examples of iteration t: all of them in random order, or a fresh random subset of --prompts."""
        count = self.args.prompts or len(examples)
        order = torch.randperm(len(examples), generator=self.generator(t, "choose"))
        return [examples[i] for i in order[:count].tolist()]

    def previous_pairs(self, t: int) -> list[Row]:
        """The fields of the pairs of iteration t - 1 if --mix-previous asks for them, otherwise []."""
        rows = self.read_rows(f"pairs-{t - 1}.jsonl") if self.args.mix_previous and t else []
        return [{name: row[name] for name in row if name not in ("response", "generated")} for row in rows]

    @contextlib.contextmanager
    def training(self, player: Any, items: list[Any], t: int) -> Iterator[Training]:
        """The optimizer steps of iteration t over the items, during which --fsdp shards the player's weights.

        Raises: Stopped if there are no items.
        """
        if not items:
            reasons = "all responses were identical to the real ones, unfinished, or left out by an option"
            raise Stopped(f"iteration {t}: nothing is left to train on: {reasons}")
        if parallel.is_writer():
            self.folder.path.mkdir(parents=True, exist_ok=True)  # Outside `iterations` nothing has made it yet.
        with self.weights.to_train(player):
            player.model.train()
            yield Training(self.work, self.folder, player, items, t, self.tell)
            player.model.eval()

    def evaluate(self, player: Any) -> Row:
        """Held-out metrics of the player as the next iterate, and their changes against the start and the last one."""
        with self.work.progress.timed("evaluate"):
            now = evaluate.answers(player, self.start_samples, self.work)
            if not self.iterate:
                evaluate.add_temperatures(player, now, self.work)
        row = {"iterate": self.iterate} | evaluate.summary(now)
        if self.iterate:
            row["since_start"] = evaluate.changes(self.answers_of(0), now)
            row["since_last"] = evaluate.changes(self.answers_of(self.iterate - 1), now)
            row["at_equal_entropy"] = evaluate.at_equal_entropy(self.answers_of(0), now)
        else:
            row["frontier"] = evaluate.frontier(now)
        self.heldout_responses[self.iterate] = now
        return row

    def answers_of(self, iterate: int) -> list[Row]:
        """A finished iterate's responses to the held-out prompts."""
        if iterate not in self.heldout_responses:
            self.heldout_responses[iterate] = self.read_rows(f"heldout-{iterate}.jsonl")
        return self.heldout_responses[iterate]

    def finish_iterate(self, player: Any, row: Row, pairs: Sequence[Any] = ()) -> None:
        """Writes pairs, held-out responses, weights and, last, the row of metrics that makes the iterate finished."""
        self.rows.append(row)
        model = self.weights.sharded.to_save() if self.weights.sharded else player.model
        times = {"iterate": self.iterate} | self.work.progress.finish_iterate()
        note = "".join(f", {phase} {seconds:.0f} s" for phase, seconds in times["seconds"].items())

        def write() -> None:
            if pairs or (self.iterate and getattr(self.args, "mix_previous", False)):  # The next iteration reads them.
                self.folder.write_rows(f"pairs-{self.iterate - 1}.jsonl", map(self._with_texts, pairs))
            if self.iterate in self.heldout_responses:
                self.folder.write_rows(f"heldout-{self.iterate}.jsonl", self.heldout_responses[self.iterate])
            if self.iterate:
                self.folder.write_folder(f"iterate-{self.iterate}", lambda path: self.weights.save(model, path))
            self.folder.write_rows("metrics.jsonl", self.rows)  # The row of this iterate makes it finished.
            self.folder.append("times.jsonl", json.dumps(times) + "\n")  # People read this file; no run does.
            self.tell("iterate", self.rows, self.heldout_responses, note)

        parallel.on_writer(write)
        self.heldout_responses = {n: rows for n, rows in self.heldout_responses.items() if n in (0, self.iterate)}

    def _with_texts(self, pair: Any) -> Row:
        """A row of the file of pairs: the fields, and the texts that make the file valid as --pairs of another run."""
        texts = {"response": self.work.text(pair.real_ids), "generated": self.work.text(pair.generated_ids[0])}
        return {"prompt": pair.prompt} | texts | dataclasses.asdict(pair)

    # ------------------------------------------------------------ what a player is asked for

    def sample(self, player: Any, examples: list[Example], t: int, purpose: str) -> list[tuple[list[int], bool]]:
        """A response to each prompt, (ids, whether it ended), at --temperature, --top-k and --top-p."""
        temperature, filters = self.args.temperature, dict(top_k=self.args.top_k, top_p=self.args.top_p)
        return self.work.respond(player, examples, purpose, self.seed(t, purpose), temperature, **filters)

    def logps(self, player: Any, items: Sequence[tuple], purpose: str, temperature: float = 1.0) -> list[list[float]]:
        """log p(response | prompt), nats, of every response of every item, a tuple (prompt ids, response ids, ...)."""
        return self.work.logps(player, items, purpose, temperature)

    def seed(self, t: int, purpose: str) -> int:
        return self.work.seed(t, purpose)

    def generator(self, t: int, purpose: str) -> torch.Generator:
        """The random numbers of one purpose in one iteration."""
        return torch.Generator().manual_seed(self.seed(t, purpose))

    # ------------------------------------------------------------ files and observers

    def read_rows(self, name: str) -> list[Any]:
        """The rows of a file in the run's folder, on all ranks. Raises: Stopped if it is damaged or missing."""
        return parallel.on_writer(lambda: self.folder.read_rows(name))

    def write_rows(self, name: str, rows: Iterable[Any]) -> None:
        parallel.on_writer(lambda: self.folder.write_rows(name, rows))

    def tell(self, event: str, *args: Any) -> None:
        """Calls the method `event` of every observer that has it; rank 0 alone does so.

        step(row): an optimizer step was taken or skipped. iterate(rows, responses, note): an iterate is finished.
        exported(folder, iterate, rows, record): a plain model was written into a folder. finish(rows, record).
        """
        for observer in self.observers if parallel.is_writer() else ():
            if hasattr(observer, event):
                getattr(observer, event)(*args)

    # ------------------------------------------------------------ beginning and end

    def begin(self) -> None:
        """Under the lock: writes the record of a new run, or says how far the run has come."""
        parallel.on_writer(self._begin)

    def _begin(self) -> None:
        self.folder.begin()
        found = self.folder.record()
        if found != self.found:
            raise ValueError(f"--out {self.args.out}: another process was at work in it a moment ago; try again")
        if found != self.record:  # the run is new, or --iterations has grown
            self.folder.write_record(self.record)
        if found is None:
            return
        if found["torch"] != torch.__version__:
            began, now = found["torch"], torch.__version__
            print(f"the run began with torch {began}, this is {now}: results may differ by rounding", flush=True)
        self.folder.check()
        done = max(0, len(self.folder.finished()) - 1)
        print(f"resuming {self.args.out}: {done} of {self.args.iterations} iterations are finished", flush=True)

    def finish(self) -> None:
        """Writes final/, best/ if an iterate before the last is the best, and the record of a finished run.

        If an earlier process has done so, checks all files instead. Raises: Stopped naming one that is damaged.
        """
        parallel.on_writer(self.folder.check if self.record["finished"] else self._finish)
        if parallel.is_writer():
            shutil.rmtree(self.folder.path / "resume", ignore_errors=True)

    def _finish(self) -> None:
        last, best = self.rows[-1]["iterate"], evaluate.best_of(self.rows, self.args.best)
        self.record |= {"best": {"iterate": best, "metric": self.args.best}}
        for name, iterate in {"final": last, "best": best}.items():
            if name == "final" or 0 < best < last:
                self.folder.write_folder(name, lambda path, iterate=iterate: self._export(iterate, path))
            else:
                self.folder.remove(name)  # Left over from a process that died here with another --best.
        self.record |= {"finished": True}
        self.folder.write_record(self.record)
        self.tell("finish", self.rows, self.record)

    def _export(self, iterate: int, path: Path) -> None:
        self.weights.export(iterate, path)
        self.tell("exported", path, iterate, self.rows, self.record)
