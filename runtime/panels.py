"""What the files of a run say, and the figures made of it: for report.html, metrics.svg and model cards."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from runtime import report, storage
from runtime.evaluate import Row, interpolation, sign_of
from runtime.figures import BINS, GREY, NOISE, Mark, Panel, Series, bins, box, sheet
from runtime.options import Args, flag_of

SAMPLE = 5000  # pairs of an iteration whose lengths are shown; a file of pairs is in random order
STEPS = {"loss": ".4f", "margin": ".3f", "accuracy": ".0%", "real_logp": ".3f", "generated_logp": ".3f"}
STEPS |= {"grad_norm": ".3g", "lr": ".3g"}


class Loaded:
    """What the files in a run's folder say. `missing` has a line for each that is not there.

    Raises: ValueError where the folder holds no run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.record = json.loads((folder / "run.json").read_text(encoding="utf-8", errors="replace"))
            self.args = dict(self.record["args"])
        except OSError:
            raise ValueError(f"{folder}: holds no run, expected a folder with run.json") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{folder / 'run.json'}: damaged, expected the record of a run") from None
        self.name = folder.resolve().name
        self.missing: list[str] = []
        self.rows = [
            row for row in storage.readable_rows(folder / "metrics.jsonl") if isinstance(row.get("iterate"), int)
        ]
        self.times = {row.get("iterate"): row for row in storage.readable_rows(folder / "times.jsonl")}
        if not self.rows:
            self.missing.append("metrics.jsonl: no iterate has been evaluated yet")
        elif len(self.times) < len(self.rows):
            self.missing.append("times.jsonl: times and memory of some iterates are not known")

    def _read(self, name: str, most: int | None = None) -> list[Row]:
        rows = storage.readable_rows(self.folder / name, most)
        if not rows:
            self.missing.append(f"{name}: missing or empty")
        return rows

    @cached_property
    def heldout(self) -> dict[int, list[Row]]:
        """heldout-<t>.jsonl by the iterate; those of one length, of the same prompts."""
        found = {row["iterate"]: self._read(f"heldout-{row['iterate']}.jsonl") for row in self.rows}
        count = max(map(len, found.values()), default=0)
        return {t: rows for t, rows in found.items() if rows and len(rows) == count}

    @cached_property
    def steps(self) -> dict[int, list[Row]]:
        """steps-<t>.jsonl by the iteration, with that which is at work."""
        last = self.rows[-1]["iterate"] if self.rows else 0
        running = [last] if (self.folder / f"steps-{last}.jsonl").exists() else []
        return {t: self._read(f"steps-{t}.jsonl") for t in [*range(last), *running]}

    @cached_property
    def pairs(self) -> dict[int, list[Row]]:
        last = self.rows[-1]["iterate"] if self.rows else 0
        names = {t: f"pairs-{t}.jsonl" for t in range(last)}
        if "pairs" not in (self.rows or [{}])[-1]:  # supervised fine-tuning has none
            return {}
        return {t: self._read(name, SAMPLE) for t, name in names.items()}

    @property
    def command(self) -> str:
        """The options that are not the defaults, as a command that begins such a run."""
        defaults = {field.name: field for field in fields(Args)}
        words = ["python", f"{self.record.get('command', 'spin')}.py"]
        for name, value in self.args.items():
            field = defaults.get(name)
            value = tuple(value) if isinstance(value, list) else value
            if field.default == value if field else value in ((), "", False, None):
                continue
            several = value if isinstance(value, tuple) else (value,)
            several = several if field and field.metadata["repeated"] else [",".join(map(str, several))]
            words += [flag_of(name)] if value is True else [w for one in several for w in (flag_of(name), str(one))]
        return shlex.join(words)


def number(row: Row, key: str) -> float | None:
    """A value that can be drawn: JSON of other programs may hold anything."""
    value = row.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return value if usable else None


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Names of the held-out metrics: those with a standard error, but for those that are 0 throughout."""
    telling = report.telling(rows)
    return [key for key in telling if number(rows[0], f"{key}_se") is not None] if rows else []


def change_of(row: Row, key: str) -> tuple[float, float] | None:
    """A metric's change against the start, with its paired standard error."""
    found = row.get("since_start")
    found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, list | tuple) or len(found) != 2:
        return None
    both = [number({"x": value}, "x") for value in found]
    return None if None in both else tuple(both)


def frontier_of(rows: Sequence[Row]) -> list[Row]:
    """The start's sampled metrics by temperature, where the first row has them."""
    found = rows[0].get("frontier") if rows else None
    found = [point for point in found if isinstance(point, dict)] if isinstance(found, list) else []
    return [point for point in found if None not in (number(point, "temperature"), number(point, "entropy"))]


def equal_entropy_of(row: Row) -> tuple[float | None, dict[str, tuple[float, float]]]:
    """The start's temperature that gives it the entropy of an iterate, and the iterate's changes against that."""
    found = row.get("at_equal_entropy")
    found = found if isinstance(found, dict) else {}
    changes = {key: change_of({"since_start": found}, key) for key in found}
    return number(found, "temperature"), {key: change for key, change in changes.items() if change}


def load(folders: Iterable[Path]) -> list[Loaded]:
    runs = [Loaded(Path(folder)) for folder in folders]
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] > 1:
            run.name = str(run.folder)
    return runs


# ---------------------------------------------------------------- names and values


def label(key: str) -> str:
    accuracy = {"greedy": "greedy accuracy", "sampled": "sampled accuracy", "nll": "NLL", "kl": "KL"}
    return accuracy.get(key, key.replace("_", " "))


def shown(value: float | None, key: str) -> str:
    return "-" if value is None else format(value, formats(key))


def formats(key: str) -> str:
    """The format of a metric's or signal's values."""
    return (report.columns_of([{key: 0, f"{key}_se": 0}]) | report.SIGNALS | STEPS)[key]


def difference(change: float, error: float, key: str) -> str:
    """+2.0 ± 0.3 points for shares, else in the metric's unit."""
    fmt = formats(key)
    if "%" in fmt:
        return f"{100 * change:+.1f} \u00b1 {100 * error:.1f} points"
    return f"{change:+{fmt}} \u00b1 {error:{fmt}}"


# ---------------------------------------------------------------- figures


def metric_panels(runs: Sequence[tuple[str, Sequence[Row]]]) -> Iterator[Panel]:
    """Held-out metrics by iterate, of runs as (name, rows). Bars are paired standard errors of the change."""
    for key in dict.fromkeys(key for _, rows in runs for key in metrics_of(rows)):
        series, paired, single = [], 0.0, 0.0
        for n, (name, rows) in enumerate(runs):
            marks = []
            for row in rows:
                value = number(row, key)
                change, error = change_of(row, key) or (None, 0.0)
                paired, single = max(paired, error), max(single, number(row, f"{key}_se") or 0.0)
                if value is not None:
                    note = f"iterate {row['iterate']}: {shown(value, key)}"
                    note += "" if change is None else f", {difference(change, error, key)} against the start"
                    marks.append(Mark(row["iterate"], value, value - error, value + error, note=note))
            series.append(Series(name, marks, n))
        rows = runs[0][1]
        change = change_of(rows[-1], key) if len(runs) == 1 and rows else None
        first, last = (shown(number(row, key), key) for row in (rows[0], rows[-1])) if rows else ("", "")
        note = f"{first} \u2192 {last} ({difference(*change, key)})" if change else ""
        yield panel(label(key), series, formats(key), sign_of(key), note, least=NOISE * (paired or single / 2))


def equal_entropy_panels(runs: Sequence[tuple[str, Sequence[Row]]]) -> Iterator[Panel]:
    """By iterate, how much better sampled metrics are than those of the start at the temperature of equal entropy."""
    for key in dict.fromkeys(key for _, rows in runs for row in rows for key in equal_entropy_of(row)[1]):
        series, last = [], (0.0, 0.0)
        for n, (name, rows) in enumerate(runs):
            marks = [Mark(row["iterate"], 0.0, note="the start") for row in rows[:1]]
            for row in rows:
                temperature, changes = equal_entropy_of(row)
                if temperature is not None and key in changes:
                    last = change, error = changes[key]
                    note = f"iterate {row['iterate']}: {difference(change, error, key)}; start at {temperature:.2f}"
                    marks.append(Mark(row["iterate"], change, change - error, change + error, note=note))
            series.append(Series(name, marks, n))
        note = "change from the start" + (f": {difference(*last, key)}" if len(runs) == 1 else "")
        yield panel(
            key.replace("_", " ") + ", equal entropy", series, formats(key), sign_of(key), note, least=NOISE * last[1]
        )


def frontier_panels(runs: Sequence[tuple[str, Sequence[Row]]]) -> Iterator[Panel]:
    """Sampled metrics against entropy: the start by temperature, and the path of the iterates at temperature 1.

    An iterate has learned something where it lies on the better side of the start's line. Bars are standard errors of
    its distance to the line.
    """
    lines = [frontier_of(rows) for _, rows in runs]
    lines = [line for n, line in enumerate(lines) if line and line not in lines[:n]]
    for key in dict.fromkeys(key for _, rows in runs for key in metrics_of(rows) if key.startswith("sampled")):
        series = []
        for n, (name, rows) in enumerate(runs):
            marks = []
            for row in rows:
                x, y = number(row, "entropy"), number(row, key)
                if x is not None and y is not None:
                    error = equal_entropy_of(row)[1].get(key, (0.0, 0.0))[1]
                    marks.append(Mark(x, y, y - error, y + error, note=f"iterate {row['iterate']}"))
            series.append(Series(name, marks, n))
        xs = [mark.x for one in series for mark in one.marks]
        lines_of_key = [[(p["entropy"], y) for p in line if (y := number(p, key)) is not None] for line in lines]
        drawn = [Series("start", near(line, xs), GREY, line=True) for line in lines_of_key if len(line) > 1 and xs]
        note = "entropy in nats; grey: the start by temperature"
        found = panel(f"{label(key)} by entropy", [*drawn, *series], formats(key), sign_of(key), note, kind="places")
        if drawn:
            xs += [mark.x for one in drawn for mark in one.marks]
            found.x = (min(xs), max(xs))
            yield found


def near(line: Sequence[tuple[float, float]], xs: Sequence[float]) -> list[Mark]:
    """The polynomial through all points of a line, as far as the points around `xs`."""
    places, values = zip(*sorted(line))
    if len(set(places)) < len(places):
        return []
    low = max([x for x in places if x < min(xs)], default=places[0])
    high = min([x for x in places if x > max(xs)], default=places[-1])
    steps = [low + (high - low) * n / 40 for n in range(41)]
    return [Mark(x, sum(w * y for w, y in zip(interpolation(x, places), values))) for x in steps]


def signal_panels(rows: Sequence[Row]) -> Iterator[Panel]:
    """Training signals by iterate."""
    for key, fmt in report.SIGNALS.items():
        marks = [Mark(row["iterate"], row[key]) for row in rows if number(row, key) is not None]
        if marks and key not in ("iterate", "pairs", "identical"):
            yield panel(key.replace("_", " "), [Series("", marks)], fmt)


def plot(rows: Sequence[Row], title: str) -> str:
    """metrics.svg: held-out metrics and training signals by iterate."""
    metrics = [*metric_panels([("", rows)]), *equal_entropy_panels([("", rows)])]
    metrics, signals = ([one for one in some if one.series] for some in (metrics, signal_panels(rows)))
    for one in metrics + signals:
        one.x = (0, max(rows[-1]["iterate"], 1))
    return sheet(title, [*metrics, *signals])


def panel(name: str, series: list[Series], fmt: str, better: int = 0, note: str = "", **more: Any) -> Panel:
    return Panel(name, [one for one in series if one.marks], fmt.replace("d", ".3g"), better, note, **more)


def step_panels(runs: Sequence[Loaded]) -> Iterator[Panel]:
    """Training signals by step, one iteration behind the other."""
    lengths = [[len(steps) for steps in run.steps.values()] for run in runs]
    total = max((sum(some) for some in lengths), default=0)
    if not total:
        return
    width = total / BINS * len(runs)
    starts = [sum(lengths[0][:t]) for t in range(len(lengths[0]))]
    lines = [(start, f"iteration {t}" if len(starts) < 6 else str(t)) for t, start in enumerate(starts)]
    lines = lines if all(some == lengths[0][: len(some)] for some in lengths) else []
    common = {"kind": "curve", "x": (0, total), "lines": lines}
    found = dict.fromkeys(key for run in runs for steps in run.steps.values() for key in (steps or [{}])[0])
    others = [key for key in found if key not in (*STEPS, "iteration", "step", "skipped")]  # of other methods
    for key in [*(key for key in STEPS if key in found), *others]:
        series = []
        for n, run in enumerate(runs):
            values = [number(row, key) for steps in run.steps.values() for row in steps]
            marks = bins([(i + 1, value) for i, value in enumerate(values) if value is not None], width)
            series.append(Series(run.name, marks, n))
        yield panel(key.replace("_", " "), series, formats(key), **common)
    series = []
    for n, run in enumerate(runs):
        marks, before = [], 0
        for t, steps in run.steps.items():
            pace = run.times.get(t + 1, {}).get("pace") or []
            marks += [Mark(before + step, value) for step, value in pace]
            before += len(steps)
        series.append(Series(run.name, marks, n))
    if any(one.marks for one in series):
        yield panel("tokens a second", series, ".0f", **common)


def values_of(rows: Sequence[Row], key: str) -> list[float]:
    """A metric of each held-out prompt, where a row has it."""
    found = [row.get("values", {}).get(key, [None])[0] for row in rows]
    return [value for value in found if value is not None]


def distribution_panels(runs: Sequence[Loaded]) -> Iterator[Panel]:
    """Log-ratios of held-out responses by iterate; lengths and the opponent's log-probabilities of pairs."""
    names = ("log-ratio, real", "log-ratio, generated", "held-out margin")
    notes = (
        "log p(real) \u2212 the start's, nats",
        "the same for the start's own response, nats",
        "the first minus the second, nats",
    )
    found: dict[str, list[Series]] = {name: [Series(run.name, [], n) for n, run in enumerate(runs)] for name in names}
    for n, run in enumerate(runs):
        start = values_of(run.heldout.get(0, []), "nll")
        for t, rows in run.heldout.items():
            real = [before - after for before, after in zip(start, values_of(rows, "nll"))]
            generated = [-kl for kl in values_of(rows, "kl")]
            margins = [a - b for a, b in zip(real, generated)]
            for name, values in zip(names, (real, generated, margins)):
                found[name][n].marks += [mark for mark in [box(t, values, ".2f")] if mark and t]
    for name, note in zip(names, notes):
        if any(series.marks for series in found[name]):
            yield panel(name, found[name], ".2f", note=note, kind="boxes", least=1.0)
    if len(runs) == 1:
        lengths, logps = ([Series("real", [], 0), Series("generated", [], 1)] for _ in range(2))
        for t, rows in runs[0].pairs.items():
            for n, name in enumerate(("real", "generated")):
                size = [len(row.get(f"{name}_ids", ())) for row in rows]
                logp = [number(row, f"opponent_{name}_logp") for row in rows]
                logp = [value / count for value, count in zip(logp, size) if value is not None and count]
                lengths[n].marks += [mark for mark in [box(t + 1, size, ".0f")] if mark]
                logps[n].marks += [mark for mark in [box(t + 1, logp, ".2f")] if mark]
        if lengths[0].marks:
            yield panel("length", lengths, ".0f", note="tokens of a pair's responses", kind="boxes")
        if logps[0].marks:
            yield panel("log p a token", logps, ".2f", note="before the iteration, nats", kind="boxes")
    yield from share_panels(runs)


def share_panels(runs: Sequence[Loaded]) -> Iterator[Panel]:
    """Shares of an iteration's generated responses."""

    def dropped(row: Row) -> float | None:
        total, pairs = number(row, "generated"), number(row, "pairs")
        return 1 - pairs / total if total and pairs is not None else None

    def identical(row: Row) -> float | None:
        same, pairs = number(row, "identical"), number(row, "pairs")
        total = number(row, "generated") or (same is not None and pairs is not None and same + pairs)
        return same / total if total else None

    shares = {"identical to the real": identical, "dropped": dropped, "truncated": lambda row: number(row, "truncated")}
    for name, share in shares.items():
        series = []
        for n, run in enumerate(runs):
            marks = [(row["iterate"], share(row)) for row in run.rows[1:]]
            series.append(Series(run.name, [Mark(x, y, note=f"{y:.2%}") for x, y in marks if y is not None], n))
        if any(one.marks for one in series):
            yield panel(name, series, ".1%", note="share of generated responses", least=0.05)


def figures(runs: Sequence[Loaded]) -> dict[str, list[Panel]]:
    """All panels of the page, by the section."""
    last = max((run.rows[-1]["iterate"] for run in runs if run.rows), default=0)
    named = [(run.name, run.rows) for run in runs]
    found = {
        "metrics": [*metric_panels(named), *equal_entropy_panels(named)],
        "training": list(step_panels(runs)),
        "distributions": list(distribution_panels(runs)),
    }
    found = {name: [one for one in panels if one.series] for name, panels in found.items()}
    for one in found["metrics"] + found["distributions"]:
        one.x = (0, max(last, 1))
    found["metrics"] += frontier_panels(named)
    return found
