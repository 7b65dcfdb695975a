"""The progress of a run: one line, which a terminal rewrites in place and others get at most every 30 seconds."""

import contextlib
import platform
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from runtime import parallel

INTERVAL = 30.0  # Seconds between two lines that stay.
REDRAW = 0.1  # Seconds between two changes of the line in a terminal.


class Progress:
    """Measures the phases of an iterate, and estimates from them when the run will end.

    Args:
        clock: returns seconds that never decrease.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.device = torch.device("cpu")
        self.iterate: int | None = None  # The number of the iterate that is being made.
        self.left = 0  # The number of iterates that follow it.
        self.phase: str | None = None  # The phase that is running, for example "generate".
        self.began = self.said = clock()  # When that phase began, and when the last line was printed.
        self.seconds: Counter[str] = Counter()  # Keyed by the finished phases of this iterate.
        self.memory: Counter[str] = Counter()  # Peak bytes, with the same keys.
        self.before: dict[str, float] = {}  # The seconds of all phases of the last iterate.
        self.tokens = 0  # The number of tokens in the batches of this iterate's training steps.

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the time spent inside to the seconds of the phase. Nested phases count as the outermost one."""
        if self.phase:
            yield
            return
        self.phase, self.began = phase, self.clock()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            self.seconds[phase] += self.clock() - self.began
            self.memory[phase] = max(self.memory[phase], peak_memory(self.device))
            self.phase = None

    def finish_iterate(self) -> dict[str, Any]:
        """Begins the next iterate. Returns seconds and peak bytes of this one's phases, its tokens, and the machine.

        All of them are measured in this process. If it resumed the iterate, the first part of the iterate is missing.
        """
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor()
        machine = f"{platform.system()} {platform.machine()}, {name or 'CPU'}, Python {platform.python_version()}"
        self.before = {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}
        times = {"seconds": self.before, "memory": dict(self.memory), "tokens": self.tokens, "machine": machine}
        self.seconds, self.memory, self.tokens = Counter(), Counter(), 0
        return times

    def seconds_left(self, of_bar: float) -> float | None:
        """Seconds to the end of the run if the running phase takes `of_bar` more; None if that cannot be estimated.

        Later phases are assumed to take as long as in the last iterate. The start has no phase but the evaluation, so
        in the first iteration the estimate begins with training: then only the evaluation is left, whose time is known.
        """
        if not self.before or not (self.phase in self.before or self.phase == "train"):
            return None
        running = self.clock() - self.began
        own = max(of_bar, self.before.get(self.phase, 0.0) - self.seconds[self.phase] - running)
        later = sum(s for phase, s in self.before.items() if phase != self.phase and phase not in self.seconds)
        return own + later + self.left * (sum(self.seconds.values()) + running + own + later)


class Bar(contextlib.AbstractContextManager):
    """A context that shows the progress of one phase of `total` items, of which earlier processes finished `done`."""

    def __init__(self, progress: Progress, name: str, total: int, done: int = 0) -> None:
        self.progress, self.name, self.total = progress, name, total
        self.done = self.first = done  # `first` is where this process began, for the rate.
        self.began = progress.clock()
        self.clear = "\r\x1b[K" if parallel.is_writer() and sys.stderr.isatty() else ""  # It clears a line.

    def __exit__(self, *error: object) -> None:
        if self.clear:
            print(self.clear, end="", file=sys.stderr, flush=True)

    def at(self, done: int) -> None:
        """Continues at item number `done`: other ranks, or an earlier process, have taken the items before it."""
        if self.done == self.first:  # What an earlier process did says nothing about the rate of this one.
            self.first = done
        self.done = done

    def update(self, count: int, **notes: str) -> None:
        """Adds `count` finished items. `notes` are shown behind the rate."""
        self.done += count
        now = self.progress.clock()
        if now - self.progress.said < (REDRAW if self.clear else INTERVAL) or not parallel.is_writer():
            return
        self.progress.said = now
        line = self.line(now, notes)
        if self.clear:
            width = shutil.get_terminal_size().columns - 1
            print(self.clear + line[:width], end="", file=sys.stderr, flush=True)
        else:
            print(line, flush=True)

    def line(self, now: float, notes: dict[str, str]) -> str:
        """For example "iterate 2, train 1: 120 of 450 (27%), 3.1/s, loss 0.6123, 2 min left; run: 14 min left"."""
        rate = (self.done - self.first) / max(now - self.began, 1e-9)
        seconds = (self.total - self.done) / rate if rate else 0.0
        rest = self.progress.seconds_left(seconds)
        text = "" if self.progress.iterate is None else f"iterate {self.progress.iterate}, "
        text += f"{self.name}: {self.done:,} of {self.total:,} ({self.done / max(self.total, 1):.0%}), {rate:,.3g}/s"
        text += "".join(f", {name} {value}" for name, value in notes.items())
        text += f", {duration(seconds)} left" if rate else ""
        return text if rest is None else f"{text}; run: {duration(rest)} left"


def duration(seconds: float) -> str:
    """A duration in the unit of its size: "42 s", "14 min" or "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has allocated on a GPU since the last reset, or the most that the process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
