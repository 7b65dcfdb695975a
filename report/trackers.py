"""--log: the rows of a run in TensorBoard or W&B, besides the run's own files. Both are optional packages.

A row's number is its place on the axis: 0 for the start, then the steps of training, then iterate 1, and so on. A
resumed run logs all rows again, so every row keeps its number.
"""

import importlib
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluate import Row
from report.files import read_rows

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # what is imported of a package


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
            open_ = {"tensorboard": tensorboard, "wandb": wandb}[name]
            trackers.append(Tracker(name, out, *open_(importlib.import_module(MODULES[name]), out, record)))
        except Exception as error:
            raise ValueError(f"--log {name}: {error}") from None
    return trackers


class Tracker:
    """An observer that numbers the rows and logs them. If logging fails, the run goes on without it.

    Args:
        out: folder of the run.
        log: called with {name: value} and the number of a row.
    """

    def __init__(self, name: str, out: Path, log: Callable[[dict[str, float], int], None], close: Callable) -> None:
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

    def _log(self, rows: Iterable[Row]) -> None:
        for row in rows:
            group = "train" if "step" in row else "iterate"
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
            values = {f"{group}/{k}": float(v) for k, v in numbers.items() if k not in ("iteration", "step", "iterate")}
            try:
                self.log(values, self.count)
            except Exception as error:
                print(f"--log {self.name}: {error}; the run goes on without it", file=sys.stderr, flush=True)
                self.log = lambda values, number: None
            self.count += 1


def tensorboard(module: Any, out: Path, record: Row) -> tuple[Callable, Callable]:
    """(log, close) of TensorBoard, whose files are in `tensorboard` in the run's folder."""
    writer: Any = None

    def log(values: dict[str, float], number: int) -> None:
        nonlocal writer
        # What an earlier process logged no longer counts: all rows are logged again.
        writer = writer or module.SummaryWriter(str(out / "tensorboard"), purge_step=0)
        for name, value in values.items():
            writer.add_scalar(name, value, number)

    return log, lambda: writer and writer.close()


def wandb(module: Any, out: Path, record: Row) -> tuple[Callable, Callable]:
    """(log, close) of W&B. A resumed run has the same id there, and what W&B has already stays as it is."""
    file = out / "wandb" / "run-id"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(uuid.uuid4().hex)
    project = os.environ.get("WANDB_PROJECT", "spin")
    settings = {"id": file.read_text(), "resume": "allow", "name": str(out), "project": project}
    run = module.init(dir=str(out), config=record["args"], **settings)
    return lambda values, number: number < run.step or run.log(values, step=number), run.finish
