"""From a command line to a run, and from every way in which a run can end to an exit code and one line."""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from data.files import shown
from kernels import onednn
from report import console, page, trackers
from runtime import folder, parallel, plan
from runtime.options import combined, parse
from runtime.run import Run
from runtime.setup import setup
from runtime.stopping import SIGNALS, Interrupted, Stopped


def main(
    command: str,
    method: Callable,
    player_class: Any,
    options_class: type,
    argv: Sequence[str] | None = None,
    about: str | None = "",
    recipe: str = "pronounce.args",
    program: str = "",
) -> int:
    """Runs method(player, examples, run) with the options in `argv` (default: those of the command line).

    --help shows `program` and two paragraphs of `about`. A command line without model and data reads `recipe`.

    Returns: 0 if the run is finished, 1 if it cannot go on, 2 for bad input, 128 + N if signal N stopped it.
    """
    script = program or f"{command}.py"
    about = "\n\n".join((about or "").split("\n\n")[:2])  # python -OO has no docstrings
    began = ""  # the folder of the run, once it holds files
    try:
        with streams(), SIGNALS.noted(), onednn.products(), contextlib.ExitStack() as stack:
            args = parse(combined(options_class), sys.argv[1:] if argv is None else argv, script, about, recipe)
            args = dataclasses.replace(args, out=args.out or f"runs/{command}")
            trackers.check(args.log)
            parallel.join(on_gpu=args.device != "cpu", alone=args.fsdp)
            model, examples, run = setup(args, command, player_class.class_of)
            SIGNALS.check()
            if model is None:
                run.finish()
                print(f"{args.out}: this run is finished; its metrics are in metrics.jsonl, its last iterate in final")
                parallel.leave()
                return 0
            player = player_class(model, run.work.eos_token_id, run.args, run.weights.dtype)
            if args.dry_run:
                print(plan.describe(examples, run), plan.dry_run(method, player, examples, run), sep="\n")
            else:
                stack.enter_context(run.folder.locked() if parallel.is_writer() else contextlib.nullcontext())
                run.begin()
                run.observers, began = observers(run, script), args.out
                stack.callback(run.tell, "close")
                print(plan.describe(examples, run), end="\n\n", flush=True)
                method(player, examples, run)
                run.finish()
            parallel.leave()
    except (ValueError, OSError, MemoryError, RuntimeError, FloatingPointError, Interrupted) as error:
        if not reason(error) or (began and isinstance(error, ValueError)):  # Input was checked: it is a bug.
            raise
        note = f"; what is finished is kept in {began}; the same command resumes"
        return fail(script, error, 1 if began else 2, note if began and not isinstance(error, Stopped) else "")
    return 0


def observers(run: Run, script: str) -> list[Any]:
    """The observers of a run, which `Run.tell` calls."""
    out = run.folder.path
    told = [console.Console(script, out), page.Page(out, folder.write_text)]
    return [*told, *trackers.start(run.args.log, out, run.record)]


def reason(error: BaseException) -> str:
    """What is wrong, in words that help people; "" for a bug, about which a traceback says more."""
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        text = text.strip().partition("\n")[0][:200]
        return f"out of memory; lower --micro-tokens or --gen-tokens, or give --checkpoint ({text})"
    if parallel.ended_elsewhere(error):
        return f"rank {parallel.rank()} lost its connection: another rank has ended"
    return text if isinstance(error, Stopped) or not isinstance(error, RuntimeError) else ""


def fail(script: str, error: BaseException, code: int, note: str = "") -> int:
    """Prints an error as one line, without control characters. Returns the exit code: `code`, or that of a signal."""
    if parallel.is_to_report(error):
        text = shown(f"{reason(error) or error}{note}".replace("\n", " "), 10**6)
        with contextlib.suppress(OSError):  # The terminal is gone.
            print(f"{script}: error: {text}", file=sys.stderr, flush=True)
    if isinstance(error, BrokenPipeError):  # Python flushes stdout again at its end, and would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # Shells report the same code for `yes | head`.
    return getattr(error, "exit_code", code)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Makes printing safe if a stream is closed or cannot encode a character. One rank prints."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # It was closed, as some daemons do.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open while the process lives
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if not parallel.is_writer():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    yield
    sys.stdout.flush()
