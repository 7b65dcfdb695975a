"""How far a run has come: bars in a terminal, elsewhere a plain line at most every 30 seconds."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from runtime import parallel

INTERVAL = 30.0  # seconds between two lines


class Progress:
    """Measures the phases of an iterate, from which it tells when the run will end.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.iterate: int | None = None  # that is being made
        self.left = 0  # iterates after it
        self.phase: str | None = None  # generate, score, train or evaluate, while one of them is at work
        self.began = clock()  # the phase
        self.seconds: Counter[str] = Counter()  # of the finished phases of this iterate
        self.before: dict[str, float] = {}  # of all phases of the last iterate
        self.said = clock()  # when the last line was printed

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the time that passes inside to the seconds of the phase, or of the outermost phase where they nest."""
        if self.phase:
            yield
            return
        self.phase, self.began = phase, self.clock()
        try:
            yield
        finally:
            self.seconds[phase] += self.clock() - self.began
            self.phase = None

    def finish_iterate(self) -> str:
        """The seconds of its phases as text."""
        text = "".join(f", {phase} {seconds:.0f} s" for phase, seconds in self.seconds.items())
        self.before = dict(self.seconds)
        self.seconds.clear()
        return text

    def seconds_left(self, of_bar: float) -> float | None:
        """Seconds to the end of the last iterate, if the bar at work needs `of_bar` more; None where nobody can tell.

        Phases that are still to come take as long as in the last iterate. In the first iteration they are known from
        training on: what comes then is the evaluation, which the start had, too.
        """
        if not self.before or not (self.phase in self.before or self.phase == "train"):
            return None
        running = self.clock() - self.began
        own = max(of_bar, self.before.get(self.phase, 0.0) - self.seconds[self.phase] - running)
        later = sum(s for phase, s in self.before.items() if phase != self.phase and phase not in self.seconds)
        iteration = sum(self.seconds.values()) + running + own + later
        return own + later + self.left * iteration

    def bar(self, name: str, total: int, done: int = 0) -> "Bar":
        """Of `total` items or steps of a phase, of which an earlier process has done some."""
        return Bar(self, name, total, done)


class Bar:
    """One bar, which is a context. In a terminal tqdm draws it on stderr; elsewhere lines go to stdout."""

    def __init__(self, progress: Progress, name: str, total: int, done: int) -> None:
        self.progress, self.name, self.total = progress, name, total
        self.done = self.first = done  # at the beginning
        self.began = progress.clock()
        self.notes: dict[str, str] = {}
        writer = parallel.is_writer()
        self.drawn = tqdm(total=total, initial=done, desc=name, leave=False, disable=None if writer else True)
        self.plain = writer and self.drawn.disable

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.drawn.close()

    def at(self, done: int) -> None:
        """Goes to an item: other ranks, or an earlier process, take those between."""
        if self.done == self.first:  # nothing is done yet: what an earlier process did says nothing about the rate
            self.first = done
        self.done = self.drawn.n = done

    def update(self, count: int, **notes: str) -> None:
        """So many items are done; `notes` is what else to show."""
        self.done += count
        self.notes |= notes
        if not self.drawn.disable:
            rest = self.progress.seconds_left(self.seconds_left())
            left = {} if rest is None else {"run": f"{duration(rest)} left"}
            self.drawn.set_postfix(self.notes | left, refresh=False)
            self.drawn.update(count)
        elif self.plain and self.progress.clock() - self.progress.said >= INTERVAL:
            self.progress.said = self.progress.clock()
            print(self.line(), flush=True)

    @property
    def rate(self) -> float:
        return (self.done - self.first) / max(self.progress.clock() - self.began, 1e-9)

    def seconds_left(self) -> float:
        return (self.total - self.done) / self.rate if self.rate else 0.0

    def line(self) -> str:
        """ "iterate 2, train 1: 120 of 450 (27%), 3.1/s, loss 0.6123, 2 min left; run: 14 min left" """
        rest = self.progress.seconds_left(self.seconds_left())
        parts = [
            f"{self.name}: {self.done:,} of {self.total:,} ({self.done / max(self.total, 1):.0%})",
            f"{self.rate:,.3g}/s",
            *(f"{name} {value}" for name, value in self.notes.items()),
            f"{duration(self.seconds_left())} left",
        ]
        which = "" if self.progress.iterate is None else f"iterate {self.progress.iterate}, "
        return which + ", ".join(parts) + ("" if rest is None else f"; run: {duration(rest)} left")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def number(value: Any) -> str:
    """A signal for a bar; None is a step that was skipped."""
    return "-" if value is None else f"{value:.4g}"
