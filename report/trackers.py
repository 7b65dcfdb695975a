"""--log: the rows of a run in TensorBoard or W&B, besides the run's own files. Both are optional packages.

A row's number is its place on the axis: 0 for the start, then the steps of training, then iterate 1, and so on. A
resumed run, which repeats the steps after its last checkpoint, gives every row the number that it had.
"""

import importlib
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
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
    """An observer that gives every row its number and logs it. If logging fails, the run goes on without it.

    Args:
        out: folder of the run.
        log: called with {name: value} and the number of a row.
    """

    def __init__(self, name: str, out: Path, log: Callable[[dict[str, float], int], None], close: Callable) -> None:
        self.name, self.out, self.log, self.close = name, out, log, close
        self.began = False  # whether this process has logged a row
        self.steps: dict[int, int] = {}  # steps of training before each iterate

    def step(self, row: Row) -> None:
        if row["step"] == 1 and not self.began:  # The last process may have died before it logged the iterate.
            self.iterate(read_rows(self.out / "metrics.jsonl"), {}, "")
        self._log("train", row, self._number(row["iteration"]) + row["step"])

    def iterate(self, rows: list[Row], answers: Mapping[int, list[Row]], note: str) -> None:
        self._log("iterate", rows[-1], self._number(rows[-1]["iterate"]))

    def finish(self, rows: list[Row], record: Row) -> None:
        if not self.began:
            self.iterate(rows, {}, "")

    def _number(self, iterate: int) -> int:
        if iterate not in self.steps:
            files = [self.out / f"steps-{t}.jsonl" for t in range(iterate)]
            self.steps[iterate] = sum(file.read_bytes().count(b"\n") for file in files)
        return iterate + self.steps[iterate]

    def _log(self, group: str, row: Row, number: int) -> None:
        self.began = True
        place = ("iteration", "step", "iterate")
        values = {f"{group}/{k}": float(v) for k, v in row.items() if isinstance(v, int | float) and k not in place}
        try:
            self.log(values, number)
        except Exception as error:
            print(f"--log {self.name}: {error}; the run goes on without it", file=sys.stderr, flush=True)
            self.log = lambda values, number: None


def tensorboard(module: Any, out: Path, record: Row) -> tuple[Callable, Callable]:
    """(log, close) of TensorBoard, whose files are in `tensorboard` in the run's folder."""
    writer: Any = None

    def log(values: dict[str, float], number: int) -> None:
        nonlocal writer
        # What an earlier process logged from this number on no longer counts.
        writer = writer or module.SummaryWriter(str(out / "tensorboard"), purge_step=number)
        for name, value in values.items():
            writer.add_scalar(name, value, number)

    return log, lambda: writer and writer.close()


def wandb(module: Any, out: Path, record: Row) -> tuple[Callable, Callable]:
    """(log, close) of W&B. A resumed run has the same id there."""
    file = out / "wandb" / "run-id"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(uuid.uuid4().hex)
    project = os.environ.get("WANDB_PROJECT", "spin")
    settings = {"id": file.read_text(), "resume": "allow", "name": str(out), "project": project}
    run = module.init(dir=str(out), config=record["args"], **settings)

    def log(values: dict[str, float], number: int) -> None:
        if number >= run.step:  # W&B has the earlier ones already, and cannot take them back.
            run.log(values, step=number)

    return log, run.finish
