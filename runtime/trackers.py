"""--log: the rows of a run in TensorBoard or W&B, beside the run's own files. Both are optional packages.

The number of a row is its place on the axis: 0 for the start, then come the steps of training, then iterate 1, and so
on. A resumed run, which repeats the steps after its last checkpoint, gives every row the number that it had.
"""

import importlib
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime import storage

Row = dict[str, Any]
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # what is imported of a package


def check(names: Sequence[str]) -> None:
    """Raises ValueError where the package of a --log cannot be imported."""
    for name in names:
        _module(name)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(MODULES[name])
    except Exception as error:  # a package may fail in its own ways
        raise ValueError(f"--log {name}: {error}; pip install {name}") from None


class Trackers:
    """Those that --log names; by default none, and nothing is imported.

    Args:
        out: folder of the run; TensorBoard's files are in its `tensorboard`.
        record: of the run.

    Raises: ValueError where one does not begin.
    """

    def __init__(self, names: Sequence[str] = (), out: Path = Path(), record: Row | None = None) -> None:
        kinds = {"tensorboard": TensorBoard, "wandb": WandB}
        self.out = out
        self.open = []
        self.steps: dict[int, int] = {}  # of training before each iterate
        for name in names:
            try:
                self.open.append(kinds[name](out, record or {}))
            except Exception as error:
                raise ValueError(f"--log {name}: {error}") from None

    def step(self, row: Row) -> None:
        """A step of training, as steps-<t>.jsonl has it."""
        if self.open:
            at = self._number(row["iteration"]) + row["step"]
            self._log("train", {k: v for k, v in row.items() if k not in ("iteration", "step")}, at)

    def iterate(self, row: Row) -> None:
        """An evaluated iterate, as metrics.jsonl has it."""
        if self.open:
            self._log("iterate", {k: v for k, v in row.items() if k != "iterate"}, self._number(row["iterate"]))

    def _number(self, iterate: int) -> int:
        """The number of an iterate's row: so many rows of iterates and steps are before it."""
        if iterate not in self.steps:
            self.steps[iterate] = sum(_lines(self.out / f"steps-{t}.jsonl") for t in range(iterate))
        return iterate + self.steps[iterate]

    def _log(self, group: str, row: Row, number: int) -> None:
        values = {f"{group}/{k}": float(v) for k, v in row.items() if isinstance(v, int | float)}
        for tracker in list(self.open):
            try:
                tracker.log(values, number)
            except Exception as error:  # a run of hours must not end for it
                self.open.remove(tracker)
                print(f"--log {tracker.name}: {error}; the run goes on without it", file=sys.stderr, flush=True)

    def close(self) -> None:
        while self.open:
            self.open.pop().close()


def _lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


class TensorBoard:
    name = "tensorboard"

    def __init__(self, out: Path, record: Row) -> None:
        self.make, self.folder, self.writer = _module(self.name).SummaryWriter, out / "tensorboard", None

    def log(self, values: dict[str, float], number: int) -> None:
        if self.writer is None:  # rows from here on that an earlier process logged no longer count
            self.writer = self.make(str(self.folder), purge_step=number)
        for name, value in values.items():
            self.writer.add_scalar(name, value, number)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandB:
    name = "wandb"

    def __init__(self, out: Path, record: Row) -> None:
        file = out / "wandb" / "run-id"  # of W&B: a resumed run has the same one
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            storage.write_text(file, uuid.uuid4().hex)
        self.run = _module(self.name).init(
            dir=str(out),
            id=file.read_text(),
            resume="allow",
            name=str(out),
            project=os.environ.get("WANDB_PROJECT", "spin"),
            config=record.get("args", {}),
        )

    def log(self, values: dict[str, float], number: int) -> None:
        if number >= self.run.step:  # W&B has the others already, and cannot take them back
            self.run.log(values, step=number)

    def close(self) -> None:
        self.run.finish()
