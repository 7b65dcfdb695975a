"""The folder of a run: files that are written whole, and checked when they are read again.

A process may die at any moment. Every file therefore appears under its name by a rename, after its content has reached
the disk: a reader finds the old content or the new one, never a part. Long work is cut into shards, each written as
soon as it is finished; a resumed run reads what is there and computes the rest.

Disks damage files, too. Therefore `checksums` beside the files has the sha256 of each, in the format of sha256sum. The
line of a new content is added before the rename, and that of the old one is dropped after it. In between, a process may
die: a file is intact if any line with its name has its sha256.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime import parallel
from runtime.stopping import Stopped

TEMPORARY = ".tmp-"  # The names of temporary folders begin with it.
CHECKSUMS, RECORD, METRICS, CHECKPOINT = "checksums", "run.json", "metrics.jsonl", "train.safetensors"
RESTORE = "restore it, or remove the run's folder and begin again"
UMASK = os.umask(0)  # The only way to read the umask is to set it.
os.umask(UMASK)

# ---------------------------------------------------------------- files


def write(path: Path, fill: Callable[[Path], object], checksum: bool = False) -> None:
    """Calls fill(temporary path), which creates a file or a folder there, and renames that to `path`.

    The directory is not created: a run whose folder was removed must not go on. Raises: OSError naming `path`, which
    stays as it was.
    """
    with _named(path), tempfile.TemporaryDirectory("", TEMPORARY, path.parent, ignore_cleanup_errors=True) as own:
        temporary = Path(own, path.name)
        fill(temporary)
        for file in files_of(temporary):
            file.chmod(0o666 & ~UMASK)  # safetensors creates files that only their owner may read.
            sync(file)
        if checksum:
            named = [(file, Path(path.name, file.relative_to(temporary))) for file in files_of(temporary)]
            lines = [f"{digest_of_file(file)}  {name}\n" for file, name in named]
            change_checksums(path, lines, keep_old=True)
        if temporary.is_dir():
            sync(temporary)
            shutil.rmtree(path, ignore_errors=True)  # A rename replaces only an empty folder.
        os.replace(temporary, path)
        sync(path.parent)
        if checksum:
            change_checksums(path, lines)


def write_text(path: Path, text: str, checksum: bool = False) -> None:
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), checksum)


def write_rows(path: Path, rows: Iterable[Any], checksum: bool = False) -> None:
    """Writes JSON Lines. Python writes floats so that reading them gives the same bits."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows), checksum)


def read_rows(path: Path) -> list[Any]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def files_of(path: Path) -> list[Path]:
    """The files in a folder and below, sorted; a file itself."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def sync(path: Path) -> None:
    """Forces a file or directory to the disk: until then, a power failure may undo a rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Makes errors of the disk OSErrors that name `path`. safetensors reports a full disk by an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, getattr(error, "strerror", None) or str(error), str(path)) from None


# ---------------------------------------------------------------- checksums


def digest_of_file(path: Path) -> str:
    """The sha256 of a file, as sha256sum prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def change_checksums(path: Path, new: list[str], keep_old: bool = False) -> None:
    """Replaces the lines for a file or folder by new ones at the end. With `keep_old`, the old line of a file stays.

    So a resumed run, which repeats an iteration, has its lines in the order of one that was never stopped.
    """
    own = path.parent / CHECKSUMS
    old = own.read_text(errors="replace").splitlines(keepends=True) if own.exists() else []
    dropped = (f"{path.name}/",) if keep_old else (f"{path.name}/", f"{path.name}\n")
    changed = [line for line in old if line not in new and not line[66:].startswith(dropped)] + new
    if changed != old:
        write_text(own, "".join(changed))


def checksums(folder: Path) -> list[tuple[str, str]]:
    """(sha256, name) of everything that was written into `folder` with its checksum."""
    file = folder / CHECKSUMS
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return [(line[:64], line[66:]) for line in lines]


def damage_of(folder: Path, name: str) -> str:
    """What is wrong with a file that was written with its checksum: "" if nothing is."""
    if not (folder / name).is_file():
        return "missing"
    intact = (digest_of_file(folder / name), name) in checksums(folder)
    return "" if intact else f"damaged, its sha256 is not in {CHECKSUMS}"


def is_usable(folder: Path, name: str, remedy: str) -> bool:
    """Whether a file is there and intact. If it is damaged, a line on stderr says so, and what happens now."""
    damage = damage_of(folder, name)
    if damage and damage != "missing":
        print(f"{folder / name}: {damage}; {remedy}", file=sys.stderr, flush=True)
    return not damage


# ---------------------------------------------------------------- the folder of a run


class Folder:
    """The files of a run. `name` is always a path relative to the folder.

    run.json is the record: options, sha256 of all inputs, whether the run is finished. metrics.jsonl has one row per
    finished iterate, which is written after all other files of the iterate. resume/iterate-<n>/ has shards and the
    checkpoint of training on the way to iterate n.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.resume: Path | None = None  # shards and checkpoint on the way to the iterate that `enter` names

    def write_rows(self, name: str, rows: Iterable[Any]) -> None:
        write_rows(self.path / name, rows, checksum=True)

    def write_folder(self, name: str, fill: Callable[[Path], object]) -> None:
        """Writes a folder with the files that fill(temporary folder) creates in it, in place of an old one."""
        write(self.path / name, lambda temporary: (temporary.mkdir(), fill(temporary)), checksum=True)

    def append(self, name: str, text: str) -> None:
        """Appends to a file, which has no checksum and may not survive a power failure."""
        with _named(self.path / name), open(self.path / name, "a", encoding="utf-8") as file:
            file.write(text)

    def remove(self, name: str) -> None:
        """Removes a folder and its checksums."""
        change_checksums(self.path / name, [])
        shutil.rmtree(self.path / name, ignore_errors=True)

    def read_rows(self, name: str) -> list[Any]:
        """What `write_rows` wrote. Raises: Stopped if it is missing or damaged."""
        self.check([name])
        return read_rows(self.path / name)

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raises Stopped naming the first file that is missing or damaged: by default, of finished iterates."""
        for name in self._complete() if names is None else names:
            if damage := damage_of(self.path, name):
                raise Stopped(f"{self.path / name}: {damage}; {RESTORE}")

    def _complete(self) -> list[str]:
        """Names of the files that must be there, apart from metrics.jsonl, which is checked on the way."""
        lines = checksums(self.path) if self.finished() else []
        if lines and not self.record().get("finished"):  # Then files of an unfinished iterate may follow the metrics.
            lines = lines[: lines.index((digest_of_file(self.path / METRICS), METRICS))]
        return [name for _, name in lines if name != METRICS]

    # ------------------------------------------------------------ what the run is, and what it has finished

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the folder and keeps other processes out. Raises: ValueError if one is at work in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # The kernel drops it however the process ends.
            except BlockingIOError:
                raise ValueError(f"--out {self.path}: another process is at work in it") from None
            except OSError:  # This file system has no locks.
                pass
            yield

    def begin(self) -> None:
        """Creates the folder and removes the temporary files of killed processes."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.rglob(f"{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)

    def record(self) -> dict[str, Any] | None:
        """The content of run.json; None if there is no run yet.

        Raises: ValueError if the folder holds other things, or if the record is damaged.
        """
        damage = damage_of(self.path, RECORD)
        if not damage:
            return json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        if damage != "missing":
            raise ValueError(f"{self.path / RECORD}: damaged, or of another version; {RESTORE}")
        # Temporary folders and checksums are there if a process died while it wrote its first file.
        ours = self.path.is_dir() and all(p.name.startswith((TEMPORARY, CHECKSUMS)) for p in self.path.iterdir())
        if self.path.exists() and not ours:
            raise ValueError(f"--out {self.path}: holds other files and no run; name a new directory, or remove it")
        return None

    def write_record(self, record: dict[str, Any]) -> None:
        write_text(self.path / RECORD, json.dumps(record, indent=2) + "\n", checksum=True)

    def finished(self) -> list[dict[str, Any]]:
        """The rows of metrics of the finished iterates. Raises: Stopped if they are missing or damaged."""
        if not (self.path / METRICS).exists() and not any("/" in name for _, name in checksums(self.path)):
            return []  # There is no folder of an iterate yet.
        return self.read_rows(METRICS)

    # ------------------------------------------------------------ on the way to an iterate

    def enter(self, iterate: int) -> None:
        """Begins or resumes the work on an iterate: `resume` is now its folder. The one before is finished."""
        self.resume = self.path / "resume" / f"iterate-{iterate}"
        if not parallel.is_writer():
            return
        for folder in (self.resume.parent, self.resume):  # But not their parents: a removed run stays removed.
            folder.mkdir(exist_ok=True)
        if iterate > 1:  # iterate-0 stays: a resumed run reads the start's samples there.
            shutil.rmtree(self.resume.with_name(f"iterate-{iterate - 1}"), ignore_errors=True)

    def save_training(self, model: nn.Module, optimizer: torch.optim.Optimizer, log: Sequence[dict[str, Any]]) -> None:
        """Writes a checkpoint: what `tensors_of` names, and the rows of the log of steps so far.

        All ranks must call it, since weights may be sharded.
        """
        tensors, metadata = parallel.collected(tensors_of(model, optimizer)), {"log": json.dumps(log)}
        if parallel.is_writer():
            write(self.resume / CHECKPOINT, lambda temporary: save_file(tensors, temporary, metadata), checksum=True)

    def load_training(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """Restores model and optimizer of all ranks from the checkpoint. Returns the log.

        Without a checkpoint, or with a line on stderr if it is damaged, the log is empty and nothing changes.
        """
        tensors: dict[str, Tensor] = {}

        def read() -> list[dict[str, Any]]:
            if not self.resume or not is_usable(self.resume, CHECKPOINT, "training this iteration again from step 1"):
                return []
            with safe_open(self.resume / CHECKPOINT, framework="pt") as reader:
                tensors.update((key, reader.get_tensor(key)) for key in reader.keys())  # noqa: SIM118 - not a dict
                return json.loads(reader.metadata()["log"])

        log = parallel.on_writer(read)
        if not all(row["skipped"] for row in log):  # Until the first step there is no state.
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # This makes the state, which is then overwritten together with the weights.
            optimizer.zero_grad()
            parallel.overwrite(tensors_of(model, optimizer), tensors)
        return log


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds: the trained weights and the optimizer's state."""
    tensors = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    for i, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in values.items()}
    return tensors


def in_shards(
    folder: Folder | None, name: str, count: int, size: int, work: Callable[[range], Sequence[Any]]
) -> list[Any]:
    """Computes work(items) for items 0 to count - 1, `size` items at a time, and returns all results in order.

    The ranks take shards in turn. All get the results of all, which do not depend on who computed them.

    Args:
        folder: Finished shards are written into its `resume` and found there again. Without a folder, or outside an
            iterate, all stays in memory. Shards are the same: rounding may depend on what is computed together.
        work: Returns one JSON value for each item of the range that it is given.
    """
    place = folder and folder.resume
    shards = [range(first, min(first + size, count)) for first in range(0, count, size)]
    names = [f"{name}-{items.start}-{items.stop}.jsonl" for items in shards]

    def read() -> dict[int, Sequence[Any]]:
        usable = [n for n, shard in enumerate(names) if place and is_usable(place, shard, "computing it again")]
        return {n: read_rows(place / names[n]) for n in usable}

    done = parallel.on_writer(read)
    missing = [n for n in range(len(shards)) if n not in done]
    for first in range(0, len(missing), parallel.world_size()):
        turn = missing[first : first + parallel.world_size()]
        own = [list(work(shards[n])) for n in turn[parallel.rank() :][:1]]  # At the end a rank may have none.
        for n, (rows,) in zip(turn, parallel.values_of_all(own)):
            done[n] = rows
            if place and parallel.is_writer():
                write_rows(place / names[n], rows, checksum=True)
    return [row for n in range(len(shards)) for row in done[n]]
