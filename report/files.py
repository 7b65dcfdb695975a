"""The files of a run's folder, as its page reads them. The run may be at work, so some may not be there yet."""

import itertools
import json
import shlex
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from evaluate import Row

SAMPLE = 5000  # pairs of an iteration that are read; a file of pairs is in random order
PLACES = ("model", "adapter", "data", "pairs", "eval_data", "metric", "out")  # options that are shown beside `settings`


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
    """What the files in a run's folder hold. `missing` has a line for each that is not there.

    Raises: ValueError if the folder holds no run or a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "run.json"
        if not file.is_file():
            raise ValueError(f"{folder}: holds no run, expected a folder with run.json")
        try:
            self.record = json.loads(file.read_text(encoding="utf-8", errors="replace"))
            self.args = dict(self.record["args"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}: damaged, expected the record of a run") from None
        self.name = folder.resolve().name
        self.missing: list[str] = []
        self.rows = read_rows(folder / "metrics.jsonl")
        self.last = self.rows[-1]["iterate"] if self.rows else 0
        self.times = {row["iterate"]: row for row in read_rows(folder / "times.jsonl")}
        if not self.rows:
            self.missing.append("metrics.jsonl: no iterate has been evaluated yet")

    def _read(self, name: str, most: int | None = None) -> list[Row]:
        rows = read_rows(self.folder / name, most)
        if not rows:
            self.missing.append(f"{name}: missing or empty")
        return rows

    @cached_property
    def heldout(self) -> dict[int, list[Row]]:
        """heldout-<t>.jsonl by iterate. Those with fewer rows than others were not made from the same prompts."""
        found = {row["iterate"]: self._read(f"heldout-{row['iterate']}.jsonl") for row in self.rows}
        count = max(map(len, found.values()), default=0)
        return {t: rows for t, rows in found.items() if rows and len(rows) == count}

    @cached_property
    def steps(self) -> dict[int, list[Row]]:
        """steps-<t>.jsonl by iteration, including the iteration that is at work."""
        running = [self.last] if (self.folder / f"steps-{self.last}.jsonl").exists() else []
        return {t: self._read(f"steps-{t}.jsonl") for t in [*range(self.last), *running]}

    @cached_property
    def pairs(self) -> dict[int, list[Row]]:
        """pairs-<t>.jsonl by iteration; {} for a method without pairs, such as supervised fine-tuning."""
        if not self.rows or "pairs" not in self.rows[-1]:
            return {}
        return {t: self._read(f"pairs-{t}.jsonl", SAMPLE) for t in range(self.last)}

    @property
    def command(self) -> str:
        """A command that begins such a run."""
        words = ["python", f"{self.record.get('command', 'spin')}.py"]
        for name in PLACES:
            value = self.args.get(name)
            if value:
                words += [flag_of(name), *(value if isinstance(value, list) else [value])]
        return f"{shlex.join(words)} {self.record.get('settings', '')}".strip()


def flag_of(name: str) -> str:
    """The flag of an option: --gen-batch for gen_batch."""
    return f"--{name.replace('_', '-')}"


def load(folders: Iterable[Path]) -> list[RunFiles]:
    """The runs in the folders, under names that differ."""
    runs = [RunFiles(Path(folder)) for folder in folders]
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] > 1:
            run.name = str(run.folder)
    return runs
