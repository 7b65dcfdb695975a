"""--log: the rows of a run in TensorBoard or W&B, besides the run's own files. Both are optional packages.

A row's number is its place on the axis: 0 for the start, then the steps of training, then iterate 1, and so on. A
resumed run logs all rows again, so every row keeps its number.
"""

import importlib
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from evaluate import Row
from report.files import read_rows

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # what is imported of a package
Log = Callable[[dict[str, float], int], object]  # called with {name: value} and the number of a row


def check(names: Sequence[str]) -> None:
    """Raises: ValueError if the package of a --log cannot be imported."""
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except Exception as error:  # A package may fail in ways of its own.
            raise ValueError(f"--log {name}: {error}; pip install {name}") from None


def start(names: Sequence[str], out: Path, record: Row) -> list["Tracker"]:
    """The observers that --log names. Raises: ValueError naming one that cannot be started."""
    trackers = []
    for name in names:
        try:
            trackers.append(Tracker(name, out, *{"tensorboard": tensorboard, "wandb": wandb}[name](out, record)))
        except Exception as error:
            raise ValueError(f"--log {name}: {error}") from None
    return trackers


class Tracker:
    """An observer that numbers the rows of the run in `out` and logs them. If it fails, the run goes on without it."""

    def __init__(self, name: str, out: Path, log: Log, close: Callable[[], object]) -> None:
        self.name, self.out, self.log, self.close = name, out, log, close
        self.count = 0  # rows that this process has logged

    def step(self, row: Row) -> None:  # The row is not in the file yet.
        self._log([row] if self.count else [*self._earlier(), row])

    def iterate(self, rows: list[Row], answers: Mapping[int, list[Row]], note: str) -> None:
        self._log([rows[-1]] if self.count else self._earlier())

    def finish(self, rows: list[Row], record: Row) -> None:
        self._log([] if self.count else self._earlier())

    def _earlier(self) -> list[Row]:
        """All rows in the run's files, in the order in which they were made."""
        rows = []
        for t, row in enumerate(read_rows(self.out / "metrics.jsonl")):
            rows += [row, *read_rows(self.out / f"steps-{t}.jsonl")]
        return rows

    def _log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            group, keys = ("train", ("iteration", "step")) if "step" in row else ("iterate", ("iterate",))
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
            try:
                self.log({f"{group}/{name}": float(numbers[name]) for name in numbers if name not in keys}, self.count)
            except Exception as error:
                print(f"--log {self.name}: {error}; the run goes on without it", file=sys.stderr, flush=True)
                self.log = lambda values, number: None
            self.count += 1


def tensorboard(out: Path, record: Row) -> tuple[Log, Callable[[], object]]:
    """(log, close) of TensorBoard, which forgets what an earlier process logged."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=0)

    def log(values: dict[str, float], number: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, number)

    return log, writer.close


def wandb(out: Path, record: Row) -> tuple[Log, Callable[[], object]]:
    """(log, close) of W&B. A resumed run has the same id there; rows that W&B already has are not sent again."""
    import wandb

    file = out / "wandb" / "run-id"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(uuid.uuid4().hex)
    settings = {"id": file.read_text(), "resume": "allow", "project": os.environ.get("WANDB_PROJECT", "spin")}
    run = wandb.init(dir=str(out), name=str(out), config=record["args"], **settings)
    return lambda values, number: number < run.step or run.log(values, step=number), run.finish
