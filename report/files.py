"""The files of a run's folder, as its page reads them. The run may be at work, so some may not be there yet."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from evaluate import Row

SAMPLE = 5000  # pairs of an iteration that are read; a file of pairs is in random order


def read_rows(path: Path, most: int | None = None) -> list[Row]:
    """The rows of a file of JSON Lines, at most so many; [] if there is none.

    An unfinished last line, which a run at work is writing, is left out.

    Raises: ValueError naming a line that is not valid JSON.
    """
    if not path.exists():
        return []
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(itertools.islice(file, most), 1):
            try:
                rows += [json.loads(line)] if line.endswith("\n") else []
            except ValueError:
                raise ValueError(f"{path}, line {number}: damaged, expected a row of JSON") from None
    return rows


class RunFiles:
    """What the files in a run's folder hold. Raises: ValueError if it holds no run or a damaged file."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "run.json").is_file():
            raise ValueError(f"{folder}: holds no run, expected a folder with run.json")
        self.folder, self.name = folder, folder.resolve().name
        self.record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        self.args = self.record["args"]
        self.rows = read_rows(folder / "metrics.jsonl")
        self.times = read_rows(folder / "times.jsonl")
        iterates = range(len(self.rows))
        self.heldout = [read_rows(folder / f"heldout-{t}.jsonl") for t in iterates]
        self.steps = [read_rows(folder / f"steps-{t}.jsonl") for t in iterates]  # The last iteration may be at work.
        self.pairs = [read_rows(folder / f"pairs-{t}.jsonl", SAMPLE) for t in iterates[:-1]]


def load(folders: Iterable[Path]) -> list[RunFiles]:
    """The runs in the folders, under names that differ."""
    runs = [RunFiles(Path(folder)) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    return runs
