"""The record of a run: what it is (run.json), what it has finished (metrics.jsonl) and the checksums of that.

checksums.json has an entry for every iterate, in order: the sha256 of each of its files, as sha256sum prints it, and of
metrics.jsonl as it was then. It is written first; the iterate's row in metrics.jsonl makes the iterate finished.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime import storage
from runtime.options import value_at
from runtime.stopping import Stopped

RESTORE = "restore it, or remove the run's folder and begin again"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder of a run and keeps other processes out. Raises: ValueError where one is at work in it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when the process ends, however it ends
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"--out {folder}: another process is at work in it") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


# ---------------------------------------------------------------- what the run is


def write(folder: Path, record: dict[str, Any]) -> None:
    storage.write_signed(folder / "run.json", record)


def read(folder: Path) -> dict[str, Any] | None:
    """The record of the run in `folder`; None where there is no run yet.

    Raises: ValueError where the folder holds something else, or a damaged record.
    """
    path = folder / "run.json"
    if not folder.exists():
        return None
    if folder.is_dir() and all(p.name.startswith(storage.TEMPORARY) for p in folder.iterdir()):
        return None
    if not path.is_file():
        raise ValueError(f"--out {folder}: holds other files and no run; name a new directory, or remove it")
    record = storage.read_signed(path)
    if record is None:
        raise ValueError(f"{path}: damaged, or of another version; {RESTORE}")
    return record


PER_ITERATION = ("beta", "lr", "epochs")  # options with one value or one for each iteration


def continued(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that is resumed: the old one, not finished where --iterations has grown; without it `new`."""
    if not old or old["args"]["iterations"] == new["args"]["iterations"]:
        return old or new
    new_args = json.loads(json.dumps(new["args"]))
    args = {name: new_args[name] if name in ("iterations", *PER_ITERATION) else v for name, v in old["args"].items()}
    return {name: v for name, v in old.items() if name not in ("best", "files")} | {"args": args, "finished": False}


def _same_so_far(name: str, old: Any, new: Any, iterations: int, more: int) -> bool:
    """Whether an option that `more` iterations change was the same in the iterations that the run began with."""
    if more <= iterations or name not in ("iterations", *PER_ITERATION):
        return False
    return name == "iterations" or all(value_at(old, t) == value_at(new, t) for t in range(iterations))


def check_same(folder: Path, old: dict[str, Any], new: dict[str, Any], changeable: Sequence[str]) -> None:
    """Compares a resumed run's options with those it began with. --iterations may grow.

    Raises: ValueError naming the first that differs and is not `changeable`.
    """
    old, new = ({"command": r["command"]} | r["args"] for r in (old, json.loads(json.dumps(new))))
    for name in (*new, *(old.keys() - new.keys())):
        if name in changeable or old.get(name) == new.get(name):
            continue
        if not _same_so_far(name, old.get(name), new.get(name), old["iterations"], new["iterations"]):
            was, now = (", ".join(map(str, v)) if isinstance(v, list) else v for v in (old.get(name), new.get(name)))
            flag = name if name == "command" else f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} {now!r}: the run in {folder} began with {was!r}; give the old value or another --out"
            )


def check_same_inputs(whose: str, old: dict[str, str], new: dict[str, str]) -> None:
    """Raises ValueError where data or weights differ. `whose` says whose contents were expected."""
    for name in old | new:
        if old.get(name) != new.get(name):
            now, then = (digests.get(name, "none")[:12] for digests in (new, old))
            raise ValueError(
                f"--{name}: not the contents {whose} (sha256 {now}, then {then}); restore them or give another --out"
            )


def check_ranks(folder: Path, old: dict[str, Any], ranks: int) -> None:
    """Raises ValueError where the run in `folder` began with another number of ranks."""
    if old["ranks"] != ranks:
        raise ValueError(
            f"{ranks} ranks: the run in {folder} began with {old['ranks']}, on which dropout's random numbers depend; "
            "start as many, or give another --out"
        )


# ---------------------------------------------------------------- what it has finished


def digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """sha256 by name, of those files in `folder` that exist; for a directory, of the files in it."""
    found = {}
    for name in names:
        path = folder / name
        for file in sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []:
            found[str(file.relative_to(folder))] = storage.digest_of_file(file)
    return found


def write_finished(folder: Path, iterate: int, rows: list[Any], checksums: list[dict[str, str]]) -> None:
    """Adds the entry of an iterate to `checksums` and writes both files; `rows` are the metrics with its row."""
    t = iterate - 1
    names = [f"pairs-{t}.jsonl", f"responses-{t}.jsonl", f"steps-{t}.jsonl"]
    files = digests(folder, [*names, f"heldout-{iterate}.jsonl", f"iterate-{iterate}"])
    metrics = storage.as_lines(rows)
    checksums.append(files | {"metrics.jsonl": storage.digest_of_text(metrics)})
    storage.write_signed(folder / "checksums.json", {"iterates": checksums})
    storage.write_text(folder / "metrics.jsonl", metrics)


def read_finished(folder: Path) -> tuple[list[Any], list[dict[str, str]]]:
    """(rows of metrics, checksums) of the finished iterates. Raises: Stopped where the two files do not fit."""
    metrics, checksums = folder / "metrics.jsonl", folder / "checksums.json"
    if not metrics.exists() and not checksums.exists():
        return [], []
    try:
        text = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
        entries = (storage.read_signed(checksums) or {}).get("iterates", [])
    except (OSError, ValueError):
        text, entries = "", []
    count = text.count("\n")
    extra = len(entries) - count
    if (
        not entries
        or extra not in (0, 1)
        or (count and entries[count - 1]["metrics.jsonl"] != storage.digest_of_text(text))
    ):
        raise Stopped(f"{metrics}: damaged, or checksums.json beside it is: they do not fit; {RESTORE}")
    return [json.loads(line) for line in text.splitlines()], entries[:count]


def check_files(folder: Path, checksums: list[dict[str, str]], names: Sequence[str] | None = None) -> None:
    """Compares files of finished iterates, by default all, with their checksums. Raises: Stopped naming the first."""
    known = {name: digest for entry in checksums for name, digest in entry.items() if name != "metrics.jsonl"}
    for name in known if names is None else names:
        file = folder / name
        if not file.is_file():
            raise Stopped(f"{file}: missing; {RESTORE}")
        if storage.digest_of_file(file) != known.get(name):
            raise Stopped(f"{file}: damaged, its sha256 is not the one in checksums.json; {RESTORE}")


def check_finished(folder: Path, record: dict[str, Any]) -> None:
    """Raises Stopped naming the first file of a finished run that is missing or damaged."""
    check_files(folder, [*read_finished(folder)[1], record["files"]])
