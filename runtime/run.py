"""The run: which iteration it is in, what is finished already, where random numbers come from, what is written.

A `Run` goes through all phases. It knows its folder and its iteration, so a phase asks it for responses or
log-probabilities and gets those that an earlier process finished for free. Random numbers depend on (seed, iteration,
purpose) alone, so a run that died ends bit for bit like one that did not.
"""

import contextlib
import dataclasses
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

import lora
from runtime import fsdp, page, panels, parallel, record, report, storage
from runtime.data import Example, Pair, decode, shared
from runtime.evaluate import (
    DECODINGS,
    Metric,
    Row,
    StartSamples,
    add_temperatures,
    answers,
    at_equal_entropy,
    better,
    changes,
    frontier,
    sample_start,
    sign_of,
    summary,
)
from runtime.export import export, write_card
from runtime.options import Args
from runtime.progress import Progress
from runtime.stopping import SIGNALS, Stopped
from runtime.trackers import Trackers
from runtime.training import Training

SHARDS = 32  # in a phase of generation or scoring, unless their limits, in batches or items, say otherwise
SHARD_BATCHES = 4, 64  # fewest and most batches of responses in a shard
SCORE_SHARD = 256, 1024  # fewest and most items in a shard of log-probabilities
METRIC_SHARD = 1, 1024  # of values of a --metric, which may be slow


def seed_of(seed: int, t: int, purpose: str) -> int:
    """A seed for one purpose in one iteration: no phase disturbs the random numbers of another."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{t}/{purpose}".encode()).digest()[:8], "big") >> 1


@dataclass
class Run:
    """One run of a method: its inputs, its folder and its progress."""

    args: Args
    tokenizer: Tokenizer | None
    eos_token_id: int
    device: torch.device
    out: Path  # everything that the run writes
    start: Path  # directory of theta_0
    dtype: torch.dtype = torch.float32  # of the player's matrix products
    heldout: list[Example] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)  # what run.json says
    found: dict[str, Any] | None = None  # what it said when `setup` read it
    needs: Any = None  # plan.Needs
    metrics: dict[str, Metric] = field(default_factory=dict)  # of --metric, by name
    sharded: fsdp.Sharded | None = None  # the player's weights, where --fsdp cuts them over the ranks
    rows: list[Row] = field(default_factory=list)  # metrics of theta_0 ... theta_t, the finished iterates
    checksums: list[dict[str, str]] = field(default_factory=list)  # of the files of each of them, by name
    iterate: int | None = None  # number of the iterate that is being made; None: outside `iterations`
    start_samples: StartSamples | None = None
    said: dict[int, list[Row]] = field(default_factory=dict)  # to the held-out prompts, by the iterate
    progress: Progress = field(default_factory=Progress)
    trackers: Trackers = field(default_factory=Trackers)  # of --log

    # ------------------------------------------------------------ iterations

    def iterations(self, player: Any) -> Iterator[int]:
        """Yields the number t of every iteration that is not finished yet, with the player as theta_t.

        A new run evaluates theta_0 first. A resumed one loads the last finished iterate into the player.
        """
        self.rows, self.checksums = parallel.on_writer(lambda: record.read_finished(self.out))
        self.enter(0)
        with self.progress.timed("evaluate"):
            self.start_samples = sample_start(player, self)
        if self.rows:
            self.load_iterate(player, self.rows[-1]["iterate"])
        else:
            self.finish_iterate(player, self.evaluate(player))
        for t in range(len(self.rows) - 1, self.args.iterations):
            self.enter(t + 1)
            yield t

    def enter(self, iterate: int) -> None:
        """Begins or resumes work on an iterate."""
        self.iterate = self.progress.iterate = iterate
        self.progress.device = self.device
        self.progress.left = self.args.iterations - iterate
        for folder in (self.folder.parent, self.folder):  # not their parents: a run that was removed stays removed
            folder.mkdir(exist_ok=True)

    def prompts(self, examples: list[Example], t: int) -> list[Example]:
        """The examples of iteration t: all of them in random order, or a fresh random subset of --prompts."""
        count = self.args.prompts or len(examples)
        order = torch.randperm(len(examples), generator=self.generator(t, "choose"))
        return [examples[i] for i in order[:count].tolist()]

    def previous_pairs(self, t: int) -> list[Pair]:
        """The pairs of iteration t - 1 where --mix-previous asks for them."""
        if not self.args.mix_previous or t == 0:
            return []
        names = {field.name for field in dataclasses.fields(Pair)}
        return [
            Pair(**{name: shared(value) for name, value in row.items() if name in names})
            for row in self.read_rows(f"pairs-{t - 1}.jsonl")
        ]

    def read_rows(self, name: str) -> Iterator[Any]:
        """The rows of a file of an earlier iteration. Raises: Stopped where it is damaged or missing."""
        if parallel.world_size() > 1:
            return iter(parallel.on_writer(lambda: list(self._read_rows(name))))
        return self._read_rows(name)

    def _read_rows(self, name: str) -> Iterator[Any]:
        record.check_files(self.out, self.checksums, [name])
        return storage.read_rows(self.out / name)

    def write_rows(self, name: str, rows: Iterable[Any]) -> None:
        parallel.on_writer(lambda: storage.write_rows(self.out / name, rows))

    def evaluate(self, player: Any) -> Row:
        """Held-out metrics of the player as the next iterate, and their changes against the start and the last one."""
        with self.progress.timed("evaluate"):
            now = answers(player, self.start_samples, self)
            if not self.iterate:
                add_temperatures(player, now, self)
        row = {"iterate": self.iterate} | summary(now)
        if self.iterate:
            row["since_start"] = changes(self.answers_of(0), now)
            row["since_last"] = changes(self.answers_of(self.iterate - 1), now)
            row["at_equal_entropy"] = at_equal_entropy(self.answers_of(0), now)
        else:
            row["frontier"] = frontier(now)
        self.said[self.iterate] = now
        return row

    def answers_of(self, iterate: int) -> list[Row]:
        """What a finished iterate said to the held-out prompts."""
        if iterate not in self.said:
            self.said[iterate] = list(self.read_rows(f"heldout-{iterate}.jsonl"))
        return self.said[iterate]

    def finish_iterate(self, player: Any, row: Row, pairs: Sequence[Pair] = ()) -> None:
        """Writes pairs, held-out responses, weights and, last, the row of metrics that makes the iterate finished.

        Prints that row, with the responses to some held-out prompts.
        """
        self.rows.append(row)
        self.trackers.iterate(row)
        model = self.model_to_save(player)

        def write() -> None:
            if pairs:
                self.write_pairs(pairs)
            if self.iterate in self.said:
                storage.write_rows(self.out / f"heldout-{self.iterate}.jsonl", self.said[self.iterate])
            if self.iterate:
                self.save_iterate(model)
            record.write_finished(self.out, self.iterate, self.rows, self.checksums)
            self.draw()

        parallel.on_writer(write)
        parallel.on_writer(self.write_page)
        if self.iterate:
            shutil.rmtree(self.folder, ignore_errors=True)
        line = report.line(row, report.columns_of([row])) + self.progress.finish_iterate()
        print("\n".join([line, *report.changes(row)]), flush=True)
        if self.iterate in self.said:
            names = {t: f"iterate {t}" if t else "start" for t in sorted({0, max(0, self.iterate - 1), self.iterate})}
            shown = {name: self.said[t] for t, name in names.items() if t in self.said}
            print(report.examples(shown), flush=True)
            self.said = {t: self.said[t] for t in (0, self.iterate) if t in self.said}
        for text in report.warnings_of(self.rows):
            self.warn(text)

    def draw(self) -> None:
        """metrics.svg, of the iterates so far."""
        title = f"{self.args.out}: held-out metrics and training signals"
        storage.write_text(self.out / "metrics.svg", panels.plot(self.rows, title))

    def write_page(self) -> None:
        """times.jsonl and report.html. They depend on the clock, so they have no checksum and nothing reads them again.

        An error is a warning: it must not end a run that has trained.
        """
        try:
            times = storage.readable_rows(self.out / "times.jsonl")
            times = [row for row in times if row.get("iterate") != self.iterate]
            storage.write_rows(self.out / "times.jsonl", [*times, {"iterate": self.iterate} | self.progress.times()])
            storage.write_text(self.out / "report.html", page.page([self.out]))
        except Exception as error:
            self.warn(f"{self.out}/report.html: not written ({type(error).__name__}: {error})")

    def write_pairs(self, pairs: Sequence[Pair]) -> None:
        """pairs-<t>.jsonl: ids and log-probabilities, and the texts, by which the file is --pairs for another run."""
        names = [field.name for field in dataclasses.fields(Pair)]

        def row_of(pair: Pair) -> dict[str, Any]:
            texts = {"prompt": pair.prompt, "response": self.text(pair.real_ids)}
            row = texts | {"generated": self.text(pair.generated_ids)} | {name: getattr(pair, name) for name in names}
            return {name: value for name, value in row.items() if value != ()}  # no further responses

        storage.write_rows(self.out / f"pairs-{self.iterate - 1}.jsonl", map(row_of, pairs))

    # ------------------------------------------------------------ what a player is asked for

    def respond(
        self,
        player: Any,
        examples: list[Example],
        name: str,
        seed: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        with_logps: bool = False,
    ) -> list[tuple]:
        """The player's response to each example's prompt: (ids, whether it ended), in shards, with a progress bar.

        `name` says what the responses are for. `with_logps` adds log-probabilities of the tokens where the player can.
        Raises: Stopped where logits are not finite.
        """
        more = {"with_logps": True} if with_logps and hasattr(player, "logps_by_token") else {}
        bar = self.progress.bar(name, len(examples))
        began, written = self.progress.clock(), 0

        def progress(rows: int, tokens: int) -> None:
            nonlocal written
            written += tokens
            bar.update(rows, tokens=f"{written / max(self.progress.clock() - began, 1e-9):,.0f}/s")
            SIGNALS.check()

        def work(items: range) -> list[tuple[list[int], bool]]:
            bar.at(items.start)
            prompts = [examples[i].prompt_ids for i in items]
            return player.respond(
                prompts, seed, rows=items, temperature=temperature, top_k=top_k, top_p=top_p, progress=progress, **more
            )

        try:
            with bar, self.progress.timed(name):
                return self.shards(name, len(examples), *self.shard_limits, work)
        except FloatingPointError as error:
            raise Stopped(f"responses for '{name}': {error}") from None

    def logps(
        self,
        player: Any,
        items: Sequence[tuple[list[int], ...]],
        name: str,
        temperature: float = 1.0,
        by_token: bool = False,
    ) -> list[list[float]]:
        """log p(response | prompt) of every response of every item, nats, in shards, with a progress bar.

        An item is (prompt ids, response ids, ...), with as many responses in each item. `by_token`, with one response
        an item: a number for each of its tokens, where the player can tell.
        """
        by_token = by_token and hasattr(player, "logps_by_token")
        bar = self.progress.bar(name, len(items))

        def progress(count: int) -> None:
            bar.update(count)
            SIGNALS.check()

        def work(part: range) -> list[list[float]]:
            bar.at(part.start)
            some = items[part.start : part.stop]
            return player.logps_by_token(some, progress) if by_token else player.logps(some, progress, temperature)

        with bar, self.progress.timed(name):
            return self.shards(name, len(items), *SCORE_SHARD, work)

    def measure(
        self, name: str, rows: Sequence[Row], decodings: Iterable[str] = DECODINGS, where: str = ""
    ) -> list[list[float]]:
        """What a function of --metric gives each row's responses: one number for each of `decodings`.

        `rows` are those of `evaluate.answers`; `where` tells one set of responses from others. Raises: Stopped where it
        gives no number.
        """
        bar = self.progress.bar(name, len(rows))

        def measured(row: Row) -> list[float]:
            values = [self.metrics[name](row["prompt"], row[decoding], row["references"]) for decoding in decodings]
            bar.update(1)
            SIGNALS.check()  # a metric may take long
            return values

        def work(items: range) -> list[list[float]]:
            bar.at(items.start)
            return [measured(rows[i]) for i in items]

        with bar, self.progress.timed(name):
            return self.shards(f"metric-{name}{where}", len(rows), *METRIC_SHARD, work)

    def shards(self, name: str, count: int, least: int, most: int, work: Callable[[range], Sequence[Any]]) -> list[Any]:
        """work(items) for items 0 to count - 1, in shards that the ranks share; what was finished before is read.

        The size of a shard is --shard, or a multiple of `least` up to `most`. It does not depend on the number of
        ranks, so neither do the results.
        """
        folder = None if self.iterate is None else self.folder
        return storage.in_shards(folder, name, count, self.shard_size(count, least, most), work)

    def shard_size(self, count: int, least: int, most: int) -> int:
        return self.args.shard or min(most, -(-max(count, 1) // (SHARDS * least)) * least)

    @property
    def shard_limits(self) -> tuple[int, int]:
        """Fewest and most responses of a shard."""
        batch = self.record.get("shard_batch", self.args.gen_batch)  # --gen-batch as the run began
        return SHARD_BATCHES[0] * batch, SHARD_BATCHES[1] * batch

    @contextlib.contextmanager
    def weights_to_train(self, player: Any) -> Iterator[None]:
        """The player's weights cut over the ranks while it trains, where --fsdp asks for it."""
        if self.sharded is None:
            yield
            return
        player.model = self.sharded.master
        self.sharded.release()
        yield
        player.model = self.sharded.whole
        self.sharded.gather()

    def training(self, t: int, items: list[Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Training:
        """The optimizer steps of iteration t over `items`, as an iterator that resumes."""
        if self.iterate is None:
            self.out.mkdir(parents=True, exist_ok=True)
        return Training(self, t, items, model, optimizer)

    def text(self, ids: list[int]) -> str:
        """The text of a response, without end-of-sequence tokens behind it and white space around it."""
        return decode(ids, self.tokenizer, self.eos_token_id)

    def pieces(self, ids: list[int], logps: Sequence[float]) -> list[tuple[str, float]]:
        """A response as (text, log-probability) of its tokens, rounded; tokens that are no whole character together."""
        pieces: list[tuple[str, float]] = []
        waiting: list[int] = []
        total = 0.0
        for token, logp in zip(ids, logps):
            waiting, total = [*waiting, token], total + logp
            text = "" if waiting == [self.eos_token_id] else self.tokenizer.decode(waiting, skip_special_tokens=False)
            if not text.endswith("\ufffd") or len(waiting) == 4:  # bytes of a character in UTF-8
                pieces.append((text, round(total, 3)))
                waiting, total = [], 0.0
        return pieces

    # ------------------------------------------------------------ random numbers, time, folders

    def seed(self, t: int, purpose: str) -> int:
        return seed_of(self.args.seed, t, purpose)

    def generator(self, t: int, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed(t, purpose))

    @property
    def script(self) -> str:
        """Name of the script that runs, for messages."""
        return f"{self.record.get('command', 'spin')}.py"

    @property
    def folder(self) -> Path:
        """Shards and state of training on the way to the current iterate; removed when the iterate is finished."""
        return self.out / "resume" / f"iterate-{self.iterate}"

    def warn(self, text: str) -> None:
        if parallel.is_writer():
            print(f"{self.script}: warning: {text}", file=sys.stderr, flush=True)

    # ------------------------------------------------------------ weights

    def model_to_save(self, player: Any) -> Any:
        """The player's model in full precision; None on ranks that do not write. All ranks must call it."""
        return player.model if self.sharded is None else self.sharded.to_save()

    def save_iterate(self, model: Any) -> None:
        """iterate-<t>/: the adapter in PEFT's layout, or a full model where all parameters are trained."""
        folder = self.out / f"iterate-{self.iterate}"
        folder.mkdir(exist_ok=True)
        if self.args.rank:
            lora.save_adapter(model, folder, self.args.model, task_type="CAUSAL_LM")
        else:
            self.save_model(model, folder)
        storage.sync(folder)

    def load_iterate(self, player: Any, iterate: int) -> None:
        """Turns the player into an iterate that an earlier process finished; `begin` has checked its files."""
        if not iterate:
            return
        folder = self.out / f"iterate-{iterate}"
        if self.sharded is not None:
            self.sharded.load(folder)
            return
        if self.args.rank:
            parallel.on_writer(lambda: lora.load_adapter(player.model, folder))
        else:
            parallel.on_writer(lambda: player.model.load_weights(folder))
        parallel.send_weights(player.model)

    def check_start(self, name: str = "model") -> None:
        """Compares the start, or its "adapter", with what it was when the run began. Raises: Stopped."""
        if name == "model":
            path, digest = self.start, storage.digest_of_model(self.start, with_weights=not self.args.from_scratch)
        else:
            path, digest = Path(self.args.adapter), storage.digest_of_adapter(Path(self.args.adapter))
        if digest != self.record["digests"][name]:
            raise Stopped(
                f"--{name} {path}: has changed since the run began; restore it, then the same command resumes"
            )

    def save_model(self, model: Any, folder: Path) -> None:
        """A directory that transformers loads, with the start's tokenizer and what else came with it."""
        folder.mkdir(exist_ok=True)
        export(model, folder, self.start, self.tokenizer, self.eos_token_id, self.record.get("template", ""))

    def save_final(self, model: Any) -> None:
        """final/: the last iterate as one plain model that transformers loads too; best/ where another is the best.

        `model` is the last iterate.
        """
        self.check_start()  # its tokenizer and, with LoRA, its weights are read again
        last, best = self.rows[-1]["iterate"], self.best()
        self.save_plain(model, last, self.out / "final")
        shutil.rmtree(self.out / "best", ignore_errors=True)  # of a process that died here, by another --best
        if 0 < best < last:
            self.save_plain(model, best, self.out / "best")

    def save_plain(self, model: Any, iterate: int, folder: Path) -> None:
        """An iterate as one plain model, with a model card. `model` is the last one."""
        if self.args.rank:
            # Merge in fp32, into the base as it is on disk: bf16 would round small updates away.
            model = type(model).from_pretrained(self.start)
            lora.load_adapter(model, self.out / f"iterate-{iterate}")
            lora.merge(model)
            lora.remove_lora(model)
            self.save_model(model, folder)
        elif iterate == self.rows[-1]["iterate"]:
            self.save_model(model, folder)
        else:
            storage.copy_files(self.out / f"iterate-{iterate}", folder)
        write_card(self, iterate, folder)

    def best(self) -> int:
        """Number of the best iterate by --best, of those that are better than the start; 0 where none is."""
        metric = self.args.best
        rows = [row for row in self.rows if better(row, metric)]
        return max(rows, key=lambda row: sign_of(metric) * row[metric])["iterate"] if rows else 0

    # ------------------------------------------------------------ beginning and end

    def begin(self) -> None:
        """Under the lock: writes the record of a new run, or says how far the run has come."""
        self.out.mkdir(parents=True, exist_ok=True)  # on hosts of other ranks than the writer
        if parallel.local_rank() == 0:
            storage.remove_leftovers(self.out)
        parallel.barrier()
        parallel.on_writer(self._begin)
        parallel.on_writer(self._begin_to_log)
        if parallel.local_rank() == 0 and record.read(self.out) != self.record:  # this host has a disk of its own
            shutil.rmtree(self.out / "resume", ignore_errors=True)  # shards of a run that is gone
            record.write(self.out, self.record)
        parallel.barrier()

    def _begin(self) -> None:
        found = record.read(self.out)
        if found is None:
            record.write(self.out, self.record)
            return
        expected = self.found or self.record  # `setup` compared options and inputs with it; none: there was no run
        if found != expected:
            raise ValueError(f"--out {self.out}: another process was at work in it a moment ago; run the command again")
        if found["torch"] != torch.__version__:
            began, now = found["torch"], torch.__version__
            self.warn(f"the run began with torch {began}, this is {now}: results differ by rounding")
        rows, checksums = record.read_finished(self.out)
        record.check_files(self.out, checksums)
        if found != self.record:  # --iterations has grown
            record.write(self.out, self.record)
        done = max(0, len(rows) - 1)
        print(f"resuming {self.out}: {done} of {self.args.iterations} iterations are finished", flush=True)

    def _begin_to_log(self) -> None:
        self.trackers = Trackers(self.args.log, self.out, self.record)

    def finish(self, player: Any) -> None:
        """Writes final/, the plot and the record of a finished run; prints the tables."""
        model = self.model_to_save(player)
        parallel.on_writer(lambda: self._finish(model))
        shutil.rmtree(self.out / "resume", ignore_errors=True)
        self.trackers.close()

    def _finish(self, model: Any) -> None:
        self.save_final(model)
        self.draw()
        print(report.tables(self.rows))
        metric = self.args.best
        best = self.best()
        files = record.digests(self.out, ["metrics.svg", "final", "best"])
        best_of_all = {"iterate": best, "metric": metric}
        record.write(self.out, self.record | {"finished": True, "best": best_of_all, "files": files})
        name = metric.replace("_", " ")
        if best:
            where = f"{self.out}/{'final' if best == self.rows[-1]['iterate'] else 'best'}"
            row = next(row for row in self.rows if row["iterate"] == best)
            print(f"\nBest by {name}: iterate {best} ({where}), {report.change(row, metric)}.")
        else:
            print(f"\nNo iterate is better than the start by {name} (more than two standard errors). {report.REMEDY}")
        print(f"The plot is {self.out}/metrics.svg, the last iterate {self.out}/final.")
