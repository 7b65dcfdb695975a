"""From a command line to a run, and from every way a run can end to an exit code and one line."""

import contextlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernels import onednn
from runtime import plan
from runtime.options import Args, parse
from runtime.run import locked
from runtime.setup import setup
from runtime.stopping import SIGNALS, Finished, Interrupted, Stopped


def main(
    command: str,
    method: Callable,
    player_class: Callable,
    args_class: type[Args],
    argv: list[str] | None = None,
    about: str = "",
) -> int:
    """Runs method(player, examples, run) with the options in `argv`, of sys.argv by default.

    Exit codes: 0 done, 1 a run that cannot go on, 2 bad input, 130 and 143 stopped by Ctrl-C and SIGTERM.
    """
    script = f"{command}.py"
    with contextlib.ExitStack() as stack:
        stack.enter_context(SIGNALS.noted())
        stack.enter_context(onednn.products())
        try:
            args = parse(command, sys.argv[1:] if argv is None else argv, args_class, about.partition("\n\n")[0])
            model, examples, run = setup(args, command)
            player = player_class(model, run.eos_token_id, run.args, run.dtype)
            SIGNALS.check()
            if args.dry_run:
                print(plan.describe(examples, run, *plan.rehearse(player, examples, run)))
                return 0
            stack.enter_context(locked(run.out))
            run.begin()
        except Finished as finished:
            shutil.rmtree(Path(args.out, "resume"), ignore_errors=True)  # the run may have died just before doing so
            print(finished)
            return 0
        except (ValueError, OSError, Stopped, torch.OutOfMemoryError, Interrupted) as error:
            return fail(script, error, getattr(error, "exit_code", 2))
        try:
            method(player, examples, run)
            run.finish(player)
        except Stopped as error:
            return fail(script, error, 1)
        except (OSError, torch.OutOfMemoryError, Interrupted) as error:
            remedy = ""
            if isinstance(error, torch.OutOfMemoryError):
                remedy = ", with lower --micro-tokens or --gen-tokens, or with --checkpoint"
            resumable = f"what is finished is kept in {run.out}; the same command resumes{remedy}"
            return fail(script, f"{error}; {resumable}", getattr(error, "exit_code", 1))
    return 0


def fail(script: str, error: Any, code: int) -> int:
    """Prints the error as one line, whatever characters it holds, and returns the exit code."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error).replace("\n", " "))
    print(f"{script}: error: {text}", file=sys.stderr)
    return code
