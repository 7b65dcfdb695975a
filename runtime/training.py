"""The optimizer steps of one iteration: batches, checkpoints, the log, and what happens if a step fails."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from evaluate import Row
from runtime import parallel
from runtime.folder import Folder, write_rows
from runtime.progress import Bar
from runtime.stopping import SIGNALS, Interrupted, Stopped
from runtime.work import Work

SKIPS = 3  # consecutive steps with a loss or gradient that is not finite, after which the run stops


class Training:
    """The steps of iteration t; spin.optimize shows how it is used.

    Every epoch passes over the items in a random order. A resumed run begins at the step after its last checkpoint.
    """

    def __init__(
        self, work: Work, folder: Folder, player: Any, items: list[Any], t: int, tell: Callable[..., None]
    ) -> None:
        self.args, self.progress, self.seed = work.args, work.progress, work.seed
        self.folder, self.player, self.items, self.t, self.tell = folder, player, items, t, tell
        self.parameters = [p for p in player.model.parameters() if p.requires_grad]
        self.steps = self.args.epochs[t] * math.ceil(len(items) / self.args.batch)
        self.log: list[Row] = []
        self.log_name = f"steps-{t}.jsonl"
        self.batch: list[Any] = []
        self.sums: dict[str, Tensor] = {}

    def batches(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, list[Any]]]:
        """Yields (step, items of its batch), step from 0 on. Each step must end with `step`."""
        self.log = self.folder.load_training(self.player.model, optimizer)
        # Steps that were logged after the checkpoint are dropped.
        parallel.on_writer(lambda: write_rows(self.folder.path / self.log_name, self.log))
        left = itertools.islice(enumerate(self._order()), len(self.log), None)
        self.saved = time.monotonic()
        bar = Bar(self.progress, f"train {self.t}", self.steps, len(self.log))
        with bar, self.progress.timed("train"):
            for step, indices in left:
                # Dropout depends on step and rank alone, so a checkpoint need not hold the generator's state.
                torch.manual_seed(self.seed(self.t, f"dropout {step} {parallel.rank()}"))
                self.batch = [self.items[i] for i in indices.tolist()]
                yield step, self.batch
                self.progress.tokens += sum(item.tokens for item in self.batch)
                last = self.log[-1]
                self.tell("step", last)
                shown = {name: last[name] for name in ("loss", "margin") if last.get(name) is not None}
                bar.update(1, **{name: f"{value:.4g}" for name, value in shown.items()})
                self._keep(optimizer)

    def _order(self) -> Iterator[Tensor]:
        shuffle = torch.Generator().manual_seed(self.seed(self.t, "shuffle"))
        for _ in range(self.args.epochs[self.t]):
            yield from torch.randperm(len(self.items), generator=shuffle).split(self.args.batch)

    def micro_batches(self, batch: list[Any]) -> Iterator[tuple[list[Any], float]]:
        """Yields the parts of the batch that this rank works on, and their weights: see parallel.micro_batches."""
        for part, weight in parallel.micro_batches([item.tokens for item in batch], self.player.micro_batches):
            yield [batch[i] for i in part], weight

    def add(self, values: dict[str, Tensor], weight: float) -> None:
        """Adds (B,) values of a micro-batch to those of the step."""
        self.sums = {name: self.sums.get(name, 0) + weight * value.detach().sum() for name, value in values.items()}

    def step(self, optimizer: torch.optim.Optimizer, clip: float) -> None:
        """One update by the gradients of all ranks, whose norm is cut to `clip`; logs the means over the batch.

        If the loss or the gradient is not finite, the weights stay as they are and the step is logged as "skipped",
        with None for values that are not finite, since JSON has no NaN.
        """
        sums = parallel.sum_gradients(self.parameters, self.sums)  # These are sums over all ranks.
        norm = parallel.whole(torch.nn.utils.clip_grad_norm_(self.parameters, clip))
        means = torch.stack([*(total / len(self.batch) for total in sums.values()), norm]).tolist()  # one wait for CUDA
        row = {name: value if math.isfinite(value) else None for name, value in zip([*sums, "grad_norm"], means)}
        skipped = None in row.values()
        if not skipped:
            optimizer.step()
        optimizer.zero_grad()
        self.sums = {}
        place = {"iteration": self.t, "step": len(self.log) + 1}
        self.log.append(place | row | {"lr": optimizer.param_groups[0]["lr"], "skipped": skipped})

    def signals(self) -> Row:
        """Means over the last tenth of the steps that were taken, and the number of those skipped."""
        taken = [row for row in self.log if not row["skipped"]]
        last = taken[-max(1, len(taken) // 10) :]
        names = [name for name in last[0] if name not in ("iteration", "step")]
        means = {name: sum(row[name] for row in last) / len(last) for name in names}
        return means | {"skipped": len(self.log) - len(taken)}

    # ------------------------------------------------------------ the log and checkpoints

    def _keep(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs a step, and checkpoints after the last one, every --save-minutes, and before a signal ends the process.

        Raises: Stopped if too many steps in a row were skipped; Interrupted on all ranks if one has got a signal.
        """
        last = self.log[-min(SKIPS, self.steps) :]
        failed = len(last) == min(SKIPS, self.steps) and all(row["skipped"] for row in last)
        due = time.monotonic() - self.saved >= 60 * self.args.save_minutes
        if self.args.fsdp:  # The ranks collect the state together, so all must agree.
            due = parallel.on_writer(lambda: due)
        due = due or SIGNALS.agreed or len(self.log) == self.steps
        if parallel.is_writer():  # Readers see the log grow; a resumed run cuts it to the checkpoint's steps.
            self.folder.append(self.log_name, json.dumps(self.log[-1]) + "\n")
        if len(self.log) == self.steps:
            parallel.on_writer(lambda: self.folder.write_rows(self.log_name, self.log))  # This adds its checksum.
        if failed:
            steps = f"iteration {self.t}, steps {last[0]['step']} to {last[-1]['step']} of {self.steps}"
            advice = "begin another run with a lower --lr or with --precision fp32"
            raise Stopped(f"{steps}: loss or gradient is not finite; these steps changed nothing; {advice}")
        if due and self.folder.resume:
            self.folder.save_training(self.player.model, optimizer, self.log)
            self.saved = time.monotonic()
        if SIGNALS.agreed:
            parallel.barrier()  # When a rank ends, torchrun ends the others, which must have finished writing.
            raise Interrupted(SIGNALS.agreed)
