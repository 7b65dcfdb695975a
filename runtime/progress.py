"""The progress of a run: bars in a terminal, and elsewhere a plain line at most every 30 seconds."""

import contextlib
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from runtime import parallel

INTERVAL = 30.0  # Seconds between two lines.


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
        self.began = clock()  # When that phase began.
        self.said = clock()  # When the last line was printed.
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

    def stepped(self, tokens: int) -> None:
        """Notes that a training step was taken on a batch of that many tokens."""
        self.tokens += tokens

    def finish_iterate(self) -> str:
        """Returns the seconds of the iterate's phases as text, and begins the next iterate."""
        text = "".join(f", {phase} {seconds:.0f} s" for phase, seconds in self.seconds.items())
        self.before = dict(self.seconds)
        self.seconds.clear()
        self.memory.clear()
        self.tokens = 0
        return text

    def times(self) -> dict[str, Any]:
        """Seconds and peak bytes of this iterate's phases, the tokens that it trained on, and the machine's name.

        All of them are measured in this process. If it resumed the iterate, the first part of the iterate is missing.
        """
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor()
        machine = f"{platform.system()} {platform.machine()}, {name or 'CPU'}, Python {platform.python_version()}"
        seconds = {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}
        return {"seconds": seconds, "memory": dict(self.memory), "tokens": self.tokens, "machine": machine}

    def seconds_left(self, of_bar: float) -> float | None:
        """Seconds to the end of the run if the running phase takes `of_bar` more; None if that cannot be estimated.

        Later phases are assumed to take as long as in the last iterate. The start has no phase but the evaluation, so
        in the first iteration there is no estimate before training, after which only the evaluation follows.
        """
        if not self.before or not (self.phase in self.before or self.phase == "train"):
            return None
        running = self.clock() - self.began
        own = max(of_bar, self.before.get(self.phase, 0.0) - self.seconds[self.phase] - running)
        later = sum(s for phase, s in self.before.items() if phase != self.phase and phase not in self.seconds)
        return own + later + self.left * (sum(self.seconds.values()) + running + own + later)

    def bar(self, name: str, total: int, done: int = 0) -> "Bar":
        """A bar of `total` items or steps, of which an earlier process has finished `done`."""
        return Bar(self, name, total, done)


class Bar:
    """A context that shows the progress of one phase: tqdm's bar on stderr in a terminal, lines on stdout elsewhere."""

    def __init__(self, progress: Progress, name: str, total: int, done: int) -> None:
        self.progress, self.name, self.total = progress, name, total
        self.done = self.first = done  # `first` is where this process began, for the rate.
        self.began = progress.clock()
        self.notes: dict[str, str] = {}
        disable = None if parallel.is_writer() else True  # With None, tqdm draws only in a terminal.
        self.drawn = tqdm(total=total, initial=done, desc=name, leave=False, disable=disable)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.drawn.close()

    def at(self, done: int) -> None:
        """Continues at item number `done`: other ranks, or an earlier process, have taken the items before it."""
        if self.done == self.first:  # What an earlier process did says nothing about the rate of this one.
            self.first = done
        self.done = self.drawn.n = done

    def update(self, count: int, **notes: str) -> None:
        """Adds `count` finished items. `notes` are shown beside the bar."""
        self.done += count
        self.notes |= notes
        rest = self.progress.seconds_left(self.seconds_left())
        if not self.drawn.disable:
            left = {} if rest is None else {"run": f"{duration(rest)} left"}
            self.drawn.set_postfix(self.notes | left, refresh=False)
            self.drawn.update(count)
        elif parallel.is_writer() and self.progress.clock() - self.progress.said >= INTERVAL:
            self.progress.said = self.progress.clock()
            print(self.line(rest), flush=True)

    @property
    def rate(self) -> float:
        """Items per second."""
        return (self.done - self.first) / max(self.progress.clock() - self.began, 1e-9)

    def seconds_left(self) -> float:
        """Seconds to the end of the bar, or 0 if the rate is not known yet."""
        return (self.total - self.done) / self.rate if self.rate else 0.0

    def line(self, rest: float | None) -> str:
        """For example "iterate 2, train 1: 120 of 450 (27%), 3.1/s, loss 0.6123, 2 min left; run: 14 min left"."""
        text = "" if self.progress.iterate is None else f"iterate {self.progress.iterate}, "
        text += f"{self.name}: {self.done:,} of {self.total:,} ({self.done / max(self.total, 1):.0%})"
        text += "".join([f", {self.rate:,.3g}/s", *(f", {name} {value}" for name, value in self.notes.items())])
        text += f", {duration(self.seconds_left())} left"
        return text if rest is None else f"{text}; run: {duration(rest)} left"


def duration(seconds: float) -> str:
    """A duration in the unit of its size: "42 s", "14 min" or "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def number(value: float | None) -> str:
    """A number for the notes of a bar; a skipped step has None in its place."""
    return "-" if value is None else f"{value:.4g}"


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has allocated on a GPU since the last reset, or the most that the process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
