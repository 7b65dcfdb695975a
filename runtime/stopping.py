"""What ends a run early: errors that it cannot recover from, and signals.

SIGTERM, SIGHUP and Ctrl-C are noted when they arrive and acted on between two steps, when the run is in good order. A
handler that raised at once, as Python's own does, could throw inside C++ code that is calling Python: that aborts.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(RuntimeError):
    """The run cannot go on; the message says where and why."""


class Finished(Exception):
    """The run in --out has nothing left to do."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; `exit_code` is what a shell expects then."""

    of_all_ranks = False  # whether every rank raises it, so that one may report it for all

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Signals:
    """The handler only sets a flag; `check()`, called between steps, raises it. A second signal ends the process."""

    DEFAULT = signal.SIGTERM  # what a rank has received if another one says so
    pending = 0  # number of the signal that has arrived; 0: none
    agreed = 0  # of the signal that all ranks know of, after the same step of training

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Installs the handlers, and puts the old ones back at the end."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.pending:
                os.write(2, b"\nstopped at once; what was saved stays\n")
                os._exit(128 + number)
            self.pending = number

        before = {}
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to the main thread only
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or `&` in a script: whoever did so meant it
                    before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            self.pending = self.agreed = 0
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted if a signal has arrived."""
        if self.pending:
            raise Interrupted(self.pending)

    def check_agreed(self) -> None:
        """Raises Interrupted, on all ranks after the same step, if a signal has arrived at one of them."""
        if self.agreed:
            error = Interrupted(self.agreed)
            error.of_all_ranks = True
            raise error


SIGNALS = Signals()  # signals belong to the process, so there is one of these
