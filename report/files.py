"""The files of a run's folder, as its page reads them. The run may be at work, so some may not be there yet."""

import json
from pathlib import Path

from evaluate import Row


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of JSON Lines; [] if there is none.

    An unfinished last line, which a run at work is writing, is left out.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number}: damaged, expected a row of JSON") from None
    return rows


class RunFiles:
    """What the files in a run's folder hold. Raises: ValueError if it holds no run or a damaged file."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "run.json").is_file():
            raise ValueError(f"{folder}: holds no run, expected a folder with run.json")
        self.name = str(folder)
        self.record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        self.args = self.record["args"]
        self.rows = read_rows(folder / "metrics.jsonl")
        self.times = read_rows(folder / "times.jsonl")
        self.heldout = [read_rows(folder / f"heldout-{t}.jsonl") for t in range(len(self.rows))]
        self.steps = [read_rows(folder / f"steps-{t}.jsonl") for t in range(len(self.rows))]
