"""What ends a run early: errors that it cannot recover from, and signals.

SIGTERM, SIGHUP and Ctrl-C are noted when they arrive and acted on between two steps, when the run is in a consistent
state. A handler that raised at once, as Python's own does, could throw through C++ code that calls Python, which aborts
the process.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


class Stopped(RuntimeError):
    """The run cannot continue; the message says where and why."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop. `exit_code` is what a shell expects in that case."""

    of_all_ranks = True  # torchrun passes its signals on to every rank, so one of them reports it.

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Signals:
    """The handler only notes the signal; `check`, called between steps, raises Interrupted. A second one ends all."""

    pending = 0  # The number of the signal that has arrived, or 0.
    agreed = 0  # The same, once all ranks know of it, which is after the same training step on each of them.

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Installs the handlers inside the context, and restores the old ones at its end."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # `nohup` and `&` ignore signals on purpose.
                signal.signal(number, self._note)
        try:
            yield
        finally:
            self.pending = self.agreed = 0
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            os.write(2, b"\nstopped at once; what was saved stays\n")
            os._exit(128 + number)
        self.pending = number

    def check(self) -> None:
        """Raises Interrupted if a signal has arrived."""
        if self.pending:
            raise Interrupted(self.pending)


SIGNALS = Signals()  # Signals belong to the process, so there is one instance.
