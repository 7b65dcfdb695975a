"""What a run needs to survive: files written whole, finished work kept on disk, its record, and signals.

A process may die at any moment. Every file therefore appears under its name by a rename, once its content has reached
the disk: a reader finds all of the old or all of the new. Long work is cut into shards, and each is kept as soon as it
is finished. A run that goes on reads what is there and computes the rest, from random numbers that depend on (seed,
iteration, purpose) alone, so it ends as if it had never been stopped.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# ---------------------------------------------------------------- files


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """fill(temporary name beside `path`) writes a file, which is then synced and renamed to `path`.

    Raises: OSError naming the file. `path` is then as it was before, and no temporary file takes room on a full disk.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in an error of its own
        with contextlib.suppress(OSError):
            temporary.unlink()
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, getattr(error, "strerror", None) or str(error), str(path)) from None


def sync(path: Path) -> None:
    """Until a file, and the folder that names it, are synced, a power failure may lose them after the rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """JSON Lines, one row a line. Floats are written so that they are read as they were, to the bit."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path, expected: bool = False) -> list[Any]:
    """The rows that `write_rows` wrote; none where there is no file, unless one is `expected`.

    Raises: OSError naming a damaged or missing file.
    """
    if not path.exists() and not expected:
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise OSError(errno.EIO, f"damaged ({error})", str(path)) from None


def in_shards(
    folder: Path | None, name: str, count: int, size: int, work: Callable[[range], Sequence[Any]]
) -> list[Any]:
    """work(range(count)), done and kept `size` items at a time; what `folder` holds already is read, not done again.

    The shards are the same whether anything is kept or not (`folder` None: nothing is), since rounding may depend on
    what is computed together. A result is a value that JSON can hold.
    """
    results: list[Any] = []
    for first in range(0, count, size):
        items = range(first, min(first + size, count))
        path = folder / f"{name}-{items.start}-{items.stop}.jsonl" if folder else None
        done = read_rows(path) if path else []
        if not done:
            done = list(work(items))
            if path:
                write_rows(path, done)
        if len(done) != len(items):
            raise OSError(errno.EIO, f"holds {len(done)} rows, expected {len(items)}", str(path))
        results += done
    return results


# ---------------------------------------------------------------- the state of training


def save_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, log: list[Any]) -> None:
    """Writes what the next step depends on: trained weights, optimizer, random numbers (of dropout), and the log."""
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    for i, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value.contiguous() for name, value in values.items()}
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["random.cuda"] = torch.cuda.get_rng_state(_device(model))
    write(path, lambda temporary: save_file(tensors, temporary, metadata={"log": json.dumps(log)}))


@torch.no_grad()
def load_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Sets everything to what `save_training` wrote, and returns the log. Raises OSError naming a damaged file."""
    try:
        with safe_open(path, framework="pt") as reader:
            log = json.loads(reader.metadata()["log"])
            tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 - not a dict
        states: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".")
                states.setdefault(int(i), {})[name] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[f"model.{name}"])
        torch.set_rng_state(tensors["random"])
        if "random.cuda" in tensors and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(tensors["random.cuda"], _device(model))
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise OSError(errno.EIO, f"damaged ({error})", str(path)) from None
    return log


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# ---------------------------------------------------------------- the record of a run


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder of a run and keeps other processes out of it. Raises ValueError where one is at work in it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, whatever ends it
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"--out {folder}: another process is at work in it") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run that `folder` holds; None where nothing has begun.

    Raises: ValueError where `folder` holds something else.
    """
    path = folder / "run.json"
    if not folder.exists() or (folder.is_dir() and not {p.name for p in folder.iterdir()} - {"run.json.tmp"}):
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"command": str, "args": dict, "digests": dict, "shard": int}
        if all(isinstance(record[name], kind) for name, kind in kinds.items()):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"--out {folder}: holds other files, or a run of another version; name a new directory or remove it"
    )


def check_same(folder: Path, old: dict[str, Any], new: dict[str, Any], changeable: Sequence[str]) -> None:
    """Raises ValueError naming the first option of a run in `folder` whose value is not the one it began with."""
    old, new = ({"command": r["command"]} | r["args"] for r in (old, json.loads(json.dumps(new))))
    for name in (*new, *(old.keys() - new.keys())):
        if name not in changeable and old.get(name) != new.get(name):
            was, now = (", ".join(map(str, v)) if isinstance(v, list) else v for v in (old.get(name), new.get(name)))
            flag = name if name == "command" else f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} {now!r}: the run in {folder} began with {was!r}; give the old value or another --out"
            )


def check_same_inputs(folder: Path, old: dict[str, str], new: dict[str, str]) -> None:
    """Raises ValueError where data or weights are not those that the run in `folder` began with."""
    for name in old | new:
        if old.get(name) != new.get(name):
            now, then = (digests.get(name, "none")[:12] for digests in (new, old))
            raise ValueError(
                f"--{name}: not the contents that the run in {folder} began with "
                f"(sha256 {now}, then {then}); restore them or give another --out"
            )


def digest_of_files(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


# ---------------------------------------------------------------- signals


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C came."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Signals:
    """SIGTERM and Ctrl-C are noted; `check`, where a run is in good order, raises the first. A second ends the process.

    Raised at once, as Python does, an exception might end in C++ code that is calling Python, which aborts.
    """

    pending = 0  # the signal that came

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            if self.pending:
                os.write(2, b"\nspin.py: stopped at once; what was saved stays\n")
                os._exit(128 + number)
            self.pending = number

        main = threading.current_thread() is threading.main_thread()  # others get no signals, and may ask for none
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM) if main}
        try:
            yield
        finally:
            self.pending = 0
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        if self.pending:
            raise Interrupted(self.pending)


SIGNALS = Signals()  # a process has one set of them
