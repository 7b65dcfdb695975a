"""How far a run has come: bars in a terminal, elsewhere a plain line at most every 30 seconds."""

import contextlib
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runtime import parallel

INTERVAL = 30.0  # seconds between two lines
PACES = 50  # stretches of an iteration's steps whose pace is kept, at most


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
        self.device = torch.device("cpu")
        self.memory: dict[str, int] = {}  # peak of each finished phase of this iterate, bytes
        self.steps: list[tuple[int, int, float]] = []  # of this process: (number, tokens, when it was taken)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the time that passes inside to the seconds of the phase, or of the outermost phase where they nest."""
        if self.phase:
            yield
            return
        self.phase, self.began = phase, self.clock()
        reset_peak_memory(self.device)
        try:
            yield
        finally:
            self.seconds[phase] += self.clock() - self.began
            self.memory[phase] = max(self.memory.get(phase, 0), peak_memory(self.device))
            self.phase = None

    def finish_iterate(self) -> str:
        """The seconds of its phases as text."""
        text = "".join(f", {phase} {seconds:.0f} s" for phase, seconds in self.seconds.items())
        self.before = dict(self.seconds)
        self.seconds.clear()
        self.memory.clear()
        self.steps.clear()
        return text

    def stepped(self, step: int, tokens: int) -> None:
        """A training step was taken, on a batch of so many tokens."""
        self.steps.append((step, tokens, self.clock()))

    def times(self) -> dict[str, Any]:
        """Seconds and peak memory of this iterate's phases, and tokens a second up to some of its training steps.

        They are of this process, so where it resumed an iterate, of the rest of it.
        """
        size = -(-len(self.steps) // PACES)  # of a stretch, in steps
        pace = []
        for i in range(size, len(self.steps), size or 1):
            tokens = sum(tokens for _, tokens, _ in self.steps[i - size + 1 : i + 1])
            pace.append((self.steps[i][0], round(tokens / max(self.steps[i][2] - self.steps[i - size][2], 1e-9), 1)))
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor()
        machine = f"{platform.system()} {platform.machine()}, {name or 'CPU'}, Python {platform.python_version()}"
        seconds = {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}
        return {"seconds": seconds, "memory": dict(self.memory), "pace": pace, "machine": machine}

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


def peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU those that torch allocated, on a CPU those of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Begins a new peak. Only Linux can do so for a process; elsewhere its peak stays that of all phases so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
