"""From a command line to a run, and from every way in which a run can end to an exit code and one line."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels import onednn
from report import card, console, page, trackers
from runtime import folder, parallel, plan
from runtime.options import combined, parse, settings
from runtime.setup import setup
from runtime.stopping import SIGNALS, Finished, Interrupted, Stopped


def main(
    command: str,
    method: Callable,
    player_class: Any,
    options_class: type,
    argv: Sequence[str] | None = None,
    about: str | None = "",
    recipe: str = "pronounce.args",
) -> int:
    """Runs method(player, examples, run) with the options in `argv` (default: those of the command line).

    --help shows the first two paragraphs of `about`; `recipe` is what a command line without model and data runs.

    Returns: 0 if the run is finished, 1 if it cannot go on, 2 for bad input, 128 + N if signal N stopped it.
    """
    script, about = f"{command}.py", "\n\n".join((about or "").split("\n\n")[:2])  # python -OO has no docstrings
    began = ""  # the folder of the run, once it holds files
    with contextlib.ExitStack() as stack:
        for context in (streams(), SIGNALS.noted(), onednn.products()):
            stack.enter_context(context)
        try:
            args = parse(combined(options_class), sys.argv[1:] if argv is None else argv, script, about, recipe)
            trackers.check(args.log)
            parallel.join(on_gpu=args.device != "cpu", alone=args.fsdp)
            model, examples, run = setup(args, command, player_class.class_of)
            player = player_class(model, run.work.eos_token_id, run.args, run.weights.dtype)
            SIGNALS.check()
            if args.dry_run:
                print(plan.describe(examples, run), plan.dry_run(method, player, examples, run), sep="\n")
            else:
                stack.enter_context(run.folder.locked() if parallel.is_writer() else contextlib.nullcontext())
                run.begin()
                run.observers = observers(run, script)
                began = args.out
                stack.callback(run.tell, "close")
                print(plan.describe(examples, run), end="\n\n", flush=True)
                method(player, examples, run)
                run.finish()
            parallel.leave()
        except Finished as finished:
            shutil.rmtree(Path(args.out, "resume"), ignore_errors=True)  # It may have died just before doing so.
            print(finished)
            parallel.leave()
        except (ValueError, OSError, MemoryError, RuntimeError, Interrupted) as error:
            if not is_expected(error) or (began and isinstance(error, ValueError)):  # Input was checked: it is a bug.
                raise
            if isinstance(error, Stopped) or not began:
                return fail(script, error, 1 if began else 2)
            return fail(script, error, 1, f"; what is finished is kept in {began}; the same command resumes")
    return 0


def observers(run: Any, script: str) -> list[Any]:
    """Those who are told what the run does: see runtime/run.py."""
    write, out = folder.write_text, run.folder.path
    told = [console.Console(script, out), page.Page(out, write), card.Card(settings(run.args), write)]
    return [*told, *trackers.start(run.args.log, out, run.record)]


def is_expected(error: BaseException) -> bool:
    """Whether people can mend the error, so that its message says more to them than a traceback."""
    known = isinstance(error, Stopped) or ran_out_of_memory(error) or parallel.ended_elsewhere(error)
    return known or not isinstance(error, RuntimeError)


def ran_out_of_memory(error: BaseException) -> bool:
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


def fail(script: str, error: BaseException, code: int, note: str = "") -> int:
    """Prints an error as one line, without control characters. Returns the exit code: `code`, or that of a signal."""
    if parallel.is_to_report(error):
        text = str(error)
        if ran_out_of_memory(error):
            reason = text.strip().partition("\n")[0][:200]
            text = f"out of memory; lower --micro-tokens or --gen-tokens, or give --checkpoint ({reason})"
        elif parallel.ended_elsewhere(error):
            text = f"rank {parallel.rank()} lost its connection: another rank has ended"
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in (text + note).replace("\n", " "))
        with contextlib.suppress(OSError):  # The terminal is gone.
            print(f"{script}: error: {text}", file=sys.stderr, flush=True)
    return getattr(error, "exit_code", code)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Makes printing safe if a stream is closed, loses its reader, or cannot encode a character. One rank prints."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # It was closed, as some daemons do.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open while the process lives
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    parallel.silence()
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # The reader of a pipe has gone; Python would flush again at exit and print a traceback.
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
