"""The optimizer steps of one iteration: their batches, checkpoints and log, and the policy on steps that fail."""

import contextlib
import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from runtime import fsdp, parallel, storage
from runtime.evaluate import Row, mean
from runtime.options import value_at
from runtime.progress import number
from runtime.stopping import SIGNALS, Stopped

SKIPS = 3  # consecutive steps with a loss or gradient that is not finite, after which the run stops


class Training:
    """An iterator over the batches of an iteration; `record` takes what each step returned.

        training = run.training(t, items, model, optimizer)
        for step, batch in training:
            training.record(take_step(...))

    Every epoch passes over the items in a random order. A resumed run begins at the step after its last checkpoint.
    """

    def __init__(self, run: Any, t: int, items: list[Any], model: torch.nn.Module, optimizer: Any) -> None:
        args = run.args
        self.run, self.t, self.items, self.model, self.optimizer = run, t, items, model, optimizer
        self.epochs = value_at(args.epochs, t)
        self.steps = self.epochs * math.ceil(len(items) / args.batch)
        self.files = fsdp if run.args.fsdp else storage  # how a checkpoint is written and read
        self.checkpoint = None if run.iterate is None else run.folder / self.files.CHECKPOINT
        self.log_file = run.out / f"steps-{t}.jsonl"
        self.log: list[Row] = []
        self.log_digest = hashlib.sha256()  # of the lines in the file
        self.logged = 0  # rows in the file

    def __iter__(self) -> Iterator[tuple[int, list[Any]]]:
        """Yields (step, items of its batch), step from 0 on."""
        self._resume()
        left = itertools.islice(enumerate(self._batches()), len(self.log), None)
        self.saved = time.monotonic()
        progress = self.run.progress
        with progress.bar(f"train {self.t}", self.steps, len(self.log)) as bar, progress.timed("train"):
            for step, batch in left:
                # Dropout's numbers depend on step and rank alone, so a checkpoint need not hold the generator's state.
                torch.manual_seed(self.run.seed(self.t, f"dropout {step} {parallel.rank()}"))
                yield step, [self.items[i] for i in batch.tolist()]
                progress.stepped(step + 1, sum(self.items[i].tokens for i in batch.tolist()))
                last = self.log[-1]
                self.run.trackers.step(last)
                bar.update(1, **{name: number(last[name]) for name in ("loss", "margin") if name in last})
                self._stop_if_not_finite()
                self._save_if_due()
                SIGNALS.check_agreed()

    def _resume(self) -> None:
        """Restores the last checkpoint with the log up to it; without one, or if either is damaged, begins afresh."""
        state: Any = None  # what the checkpoint holds; rank 0 reads it

        def read() -> list[str]:
            nonlocal state
            lines, state = self._read()
            storage.write_text(self.log_file, "".join(lines))  # without what was appended after the checkpoint
            return lines

        lines = parallel.on_writer(read)
        if lines:
            self.files.restore_training(state, self.model, self.optimizer)
        self.log = [json.loads(line) for line in lines]
        self.log_digest = hashlib.sha256("".join(lines).encode())
        self.logged = len(lines)

    def _read(self) -> tuple[list[str], Any]:
        """(lines of the log, state of training) at the last checkpoint; ([], None) where there is none to use."""
        if not self.checkpoint or not self.checkpoint.exists():
            return [], None
        found = self.files.read_training(self.checkpoint)
        lines: list[str] = []
        with contextlib.suppress(OSError, UnicodeDecodeError):
            lines = self.log_file.read_text(encoding="utf-8").splitlines(keepends=True)
        lines = lines[: int(found[0]["steps"])] if found else []
        if found and storage.digest_of_text("".join(lines)) == found[0]["log"]:
            return lines, found[1]
        damaged = self.log_file if found else self.checkpoint
        remedy = f"training iteration {self.t} again from its first step"
        storage.report_damage(damaged, "its checksum does not fit", remedy)
        return [], None

    def _batches(self) -> Iterator[torch.Tensor]:
        shuffle = self.run.generator(self.t, "shuffle")
        for _ in range(self.epochs):
            yield from torch.randperm(len(self.items), generator=shuffle).split(self.run.args.batch)

    def record(self, row: Row) -> None:
        """Adds a step's row to the log; row["skipped"] says that its loss or gradient was not finite."""
        self.log.append({"iteration": self.t, "step": len(self.log) + 1} | row)

    def signals(self) -> Row:
        """Means over the last tenth of the steps that were taken, and the number of those skipped."""
        taken = [row for row in self.log if not row["skipped"]]
        last = taken[-max(1, len(taken) // 10) :]
        names = [name for name in last[0] if name not in ("iteration", "step")]
        means = {name: mean([row[name] for row in last]) for name in names}
        return means | {"skipped": len(self.log) - len(taken)}

    def _stop_if_not_finite(self) -> None:
        last = self.log[-min(SKIPS, self.steps) :]
        if len(last) == min(SKIPS, self.steps) and all(row["skipped"] for row in last):
            self._append_log()
            raise Stopped(
                f"iteration {self.t}, steps {last[0]['step']} to {last[-1]['step']} of {self.steps}: loss or gradient "
                f"is not finite; these steps changed nothing; begin another run with a lower --lr or with "
                f"--precision fp32"
            )

    def _save_if_due(self) -> None:
        """Checkpoints after the last step, every --save-minutes, and before a signal ends the process."""
        due = time.monotonic() - self.saved >= 60 * self.run.args.save_minutes
        if self.files is fsdp:  # all ranks write a part, so all must know
            due = parallel.on_writer(lambda: due)
        if not (due or SIGNALS.agreed or len(self.log) == self.steps):
            self._append_log(sync=False)  # a reader sees it grow; resume cuts it to the checkpoint's lines
            return
        self._append_log()
        if self.checkpoint:
            progress = {"steps": str(len(self.log)), "log": self.log_digest.hexdigest()}
            self.files.save_training(self.checkpoint, self.model, self.optimizer, progress)
            self.saved = time.monotonic()
        if SIGNALS.agreed:
            parallel.barrier()  # a rank that ends makes torchrun end the others, which may still be writing

    def _append_log(self, sync: bool = True) -> None:
        """Brings steps-<t>.jsonl up to date. It is appended to, since an iteration may have many steps."""
        text = storage.as_lines(self.log[self.logged :])
        self.log_digest.update(text.encode())
        if parallel.is_writer():
            storage.append(self.log_file, text, sync)
        self.logged = len(self.log)
