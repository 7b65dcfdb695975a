"""--log: the rows of a run in TensorBoard or W&B, besides the run's own files. Both are optional packages.

Rows are numbered on one axis: 0 for the start, then the steps of training, then iterate 1, and so on. A resumed run
logs all rows again, so every row keeps its number.
"""

import importlib
import itertools
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from evaluate import Row
from report.files import read_rows

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # what is imported of a package
KEYS = {"iteration", "step", "iterate"}  # numbers that only say which row it is
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

    def step(self, row: Row) -> None:
        self._log([row])

    def iterate(self, rows: list[Row], answers: Mapping[int, list[Row]], note: str) -> None:
        self._log(rows[-1:])

    def finish(self, rows: list[Row], record: Row) -> None:
        self._log([])

    def _log(self, rows: Sequence[Row]) -> None:
        """Logs rows; the first time all that are in the run's files, where a step is not yet."""
        if not self.count:
            earlier = enumerate(read_rows(self.out / "metrics.jsonl"))
            made = [[row, *read_rows(self.out / f"steps-{t}.jsonl")] for t, row in earlier]
            rows = [*itertools.chain(*made), *(row for row in rows if "step" in row)]
        for row in rows:
            group = "train" if "step" in row else "iterate"
            numbers = {name: x for name, x in row.items() if isinstance(x, int | float) and name not in KEYS}
            try:
                self.log({f"{group}/{name}": float(x) for name, x in numbers.items()}, self.count)
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
    """(log, close) of W&B. A resumed run has the same id there, and what W&B has already stays as it is."""
    import wandb

    file = out / "wandb" / "run-id"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(uuid.uuid4().hex)
    settings = {"id": file.read_text(), "resume": "allow", "project": os.environ.get("WANDB_PROJECT", "spin")}
    run = wandb.init(dir=str(out), name=str(out), config=record["args"], **settings)
    return lambda values, number: number < run.step or run.log(values, step=number), run.finish
