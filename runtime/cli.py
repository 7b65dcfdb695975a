"""From a command line to a run, and from every way a run can end to an exit code and one line."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from kernels import onednn
from runtime import parallel, plan
from runtime.options import Args, overridden, parse
from runtime.record import locked
from runtime.setup import setup
from runtime.stopping import SIGNALS, Finished, Interrupted, Stopped

LONGEST_MESSAGE = 600  # characters; a message may quote a file that holds megabytes in one value
LESS_MEMORY = "lower --micro-tokens or --gen-tokens, or give --checkpoint"


def main(
    command: str,
    method: Callable,
    player_class: Callable,
    args_class: type[Args],
    argv: list[str] | None = None,
    about: str | None = "",
) -> int:
    """Runs method(player, examples, run) with the options in `argv`, of sys.argv by default.

    Exit codes: 0 done, 1 a run that cannot go on, 2 bad input, 128 + number of the signal that stopped it.
    """
    prepare_streams()
    script = f"{command}.py"
    run = None
    began = False
    with contextlib.ExitStack() as stack:
        stack.enter_context(SIGNALS.noted())
        stack.enter_context(onednn.products())
        try:
            argv = sys.argv[1:] if argv is None else argv
            parallel.silence()
            args = parse(command, argv, args_class, (about or "").partition("\n\n")[0])  # python -OO has no docstrings
            parallel.join(on_gpu=args.device != "cpu", alone=args.fsdp)
            model, examples, run = setup(args, command)
            player = player_class(model, run.eos_token_id, run.args, run.dtype)
            SIGNALS.check()
            replaced = overridden(command, argv, args_class)
            if args.dry_run:
                print(plan.describe(examples, run, replaced, *plan.rehearse(player, examples, run)))
                parallel.leave()
                return 0
            stack.enter_context(locked(run.out) if parallel.is_writer() else contextlib.nullcontext())
            run.begin()
            stack.callback(lambda: run.trackers.close())
            began = True
            print(plan.describe(examples, run, replaced), end="\n\n", flush=True)
            method(player, examples, run)
            run.finish(player)
            parallel.leave()
        except Finished as finished:
            shutil.rmtree(Path(args.out, "resume"), ignore_errors=True)  # the run may have died just before doing so
            print(finished)
            parallel.leave()
        except (ValueError, OSError, Stopped, MemoryError, RuntimeError, Interrupted) as error:
            if not began:
                return fail(script, as_text(error), getattr(error, "exit_code", 2), error)
            if isinstance(error, Stopped):
                return fail(script, error, 1, error)
            if isinstance(error, ValueError):  # input was checked before: this is a bug, whose traceback is needed
                raise
            resumable = f"what is finished is kept in {run.out}; the same command resumes"
            return fail(script, f"{as_text(error)}; {resumable}", getattr(error, "exit_code", 1), error)
        finally:
            flush_streams()
    return 0


def as_text(error: BaseException) -> str:
    """What a user should read. Raises the error again if it is none that a user could mend."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "memory" in str(error) and "alloc" in str(error)
    ):
        return f"out of memory; {LESS_MEMORY} ({str(error).strip().partition(chr(10))[0][:200]})"
    if parallel.ended_elsewhere(error):
        return f"rank {parallel.rank()} lost its connection: another rank has ended"
    if isinstance(error, RuntimeError) and not isinstance(error, Stopped):
        raise error
    return str(error)


def fail(script: str, text: object, code: int, error: BaseException | None = None) -> int:
    """Prints the text as one line, whatever characters it holds, on one of the ranks. Returns the exit code."""
    if not parallel.is_to_report(error):
        return code
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text).replace("\n", " "))
    if len(text) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        text = f"{text[:half]} [...] {text[-half:]}"
    with contextlib.suppress(OSError):  # a terminal that is gone
        print(f"{script}: error: {text}", file=sys.stderr, flush=True)
    return code


def prepare_streams() -> None:
    """Makes printing safe where a stream is closed (as under some daemons) or cannot encode a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open for as long as the process lives
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def flush_streams() -> None:
    """Python would flush at exit and print a traceback if the other end of a pipe is gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
