"""Files that survive a crash: written whole, in shards, with the state of training.

A process may die at any moment. Every file therefore appears under its name by a rename, after its content has reached
the disk: a reader finds the old file or the new one, never a part. Long work is cut into shards, and each shard is
written as soon as it is finished. A resumed run reads what is there and computes the rest.

Disks damage files, too. Shards and checkpoints carry a sha256 of their content: a damaged one is computed again. The
digests of finished results are kept in checksums.json (see run.py).
"""

import contextlib
import errno
import hashlib
import itertools
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

from model import weight_files
from runtime import parallel

TEMPORARY = ".tmp-"  # beginning of the name of every temporary folder, here as in model.py and lora.py
MODEL_FILES = (  # of a model's directory, beside the weights
    "config.json", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
    "generation_config.json", "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip
CHECKPOINT = "train.safetensors"  # the state of training, in an iterate's folder
UMASK = os.umask(0)  # there is no way to read it without setting it
os.umask(UMASK)

# ---------------------------------------------------------------- files


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Calls fill(temporary path), syncs what it wrote, and renames it to `path`, whose folder must exist.

    The temporary file is in a new folder of its own, so nothing planted under its name is followed, and what a killed
    process leaves is known by the folder's name (`remove_leftovers`).

    Raises: OSError naming `path`, which is then as it was before.
    """
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
        temporary = folder / path.name
        fill(temporary)
        temporary.chmod(0o666 & ~UMASK)  # safetensors makes files that only the owner may read
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk by an error of its own
        raise _named(error, path) from None
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _named(error: Exception, path: Path) -> OSError:
    """The error as an OSError that names the file."""
    number = getattr(error, "errno", None) or errno.EIO
    return OSError(number, getattr(error, "strerror", None) or str(error), str(path))


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of processes that were killed while writing into `folder` or below."""
    for path in folder.rglob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Forces a file or directory to the disk: before that, a power failure may undo a rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy_files(source: Path, folder: Path) -> None:
    """Copies the files of a folder, which have been written whole, into another."""
    folder.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        write(folder / file.name, lambda temporary, file=file: shutil.copyfile(file, temporary))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_signed(path: Path, value: dict[str, Any]) -> None:
    """JSON with the sha256 of the value in it."""
    write_json(path, value | {"sha256": digest_of_text(json.dumps(value))})


def read_signed(path: Path) -> dict[str, Any] | None:
    """What `write_signed` wrote; None where the file is damaged. Raises: OSError where it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        digest = value.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return value if digest == digest_of_text(json.dumps(value)) else None


def append(path: Path, text: str, sync: bool = True) -> None:
    """Appends to a file and, with `sync`, forces all of it to the disk.

    A reader must know how much of the file is valid: a crash may cut the text.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        raise _named(error, path) from None


def as_lines(rows: Iterable[Any]) -> str:
    """JSON Lines. Python writes floats so that reading them gives the same bits."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """JSON Lines, a row at a time: the rows of an iteration may be many."""

    def fill(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    write(path, fill)


def read_rows(path: Path) -> Iterator[Any]:
    """Yields what `write_rows` wrote, a row at a time. Raises: OSError naming a damaged or missing file."""
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OSError(errno.EIO, f"damaged ({error})", str(path)) from None


def readable_rows(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The objects in a file of JSON Lines, at most so many, without lines that are damaged; [] where there is none."""
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in itertools.islice(file, most):
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                rows += [row] if isinstance(row, dict) else []
    return rows


def digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_files(paths: Iterable[Path]) -> str:
    """sha256 over those of the files, in order."""
    return digest_of_text("".join(map(digest_of_file, paths)))


def digest_of_model(folder: Path, with_weights: bool = True) -> str:
    """sha256 of a model's config and tokenizer and, `with_weights`, of the weight files that are read."""
    files = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    return digest_of_files([*files, *(weight_files(folder) if with_weights else [])])


def digest_of_adapter(folder: Path) -> str:
    return digest_of_files([folder / "adapter_config.json", folder / "adapter_model.safetensors"])


def report_damage(path: Path, reason: object, remedy: str) -> None:
    print(f"{path}: damaged ({str(reason)[:100]}); {remedy}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- shards


def in_shards(
    folder: Path | None, name: str, count: int, size: int, work: Callable[[range], Sequence[Any]]
) -> list[Any]:
    """The results of work(items) for items 0 to count - 1, computed `size` items at a time.

    Ranks share the shards: each takes the next one when it has finished its last, writes it on its own host, and gets
    the results of all. A shard has the same content whoever computes it.

    Args:
        folder: where finished shards are written and found again; None: nothing is written. The cut is the same
            either way, since rounding may depend on which items are computed together.
        work: returns one JSON value for each item of the range it is given.

    Raises: OSError naming a shard that is damaged.
    """
    shards = [range(first, min(first + size, count)) for first in range(0, count, size)]
    paths = [folder / f"{name}-{items.start}-{items.stop}.jsonl" if folder else None for items in shards]
    done: dict[int, Sequence[Any]] = {}  # what this rank has, by the shard's number
    for n in parallel.dealt([n for n, path in enumerate(paths) if path and path.exists()]):
        rows = read_shard(paths[n], len(shards[n]))
        if rows is not None:
            done[n] = rows
    found = parallel.gather(dict.fromkeys(done))
    for n in parallel.claimed([n for n in range(len(shards)) if n not in found]):
        done[n] = list(work(shards[n]))
        if paths[n]:
            write_shard(paths[n], done[n])
    everything = parallel.gather(done)
    return [row for n in range(len(shards)) for row in everything[n]]


def write_shard(path: Path, rows: Sequence[Any]) -> None:
    """JSON Lines, and a last line with the sha256 of the shard's place and of the lines before it."""
    text = as_lines(rows)
    write_text(path, text + as_lines([{"sha256": _digest_of_shard(path, text)}]))


def read_shard(path: Path, count: int) -> list[Any] | None:
    """The rows of a shard; None, and a line on stderr, where it is damaged: then it is computed again."""
    try:
        *lines, last = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if json.loads(last) != {"sha256": _digest_of_shard(path, "".join(lines))} or len(lines) != count:
            raise ValueError("its checksum does not fit")
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        report_damage(path, error, "computing it again")
        return None


def _digest_of_shard(path: Path, text: str) -> str:
    return digest_of_text(f"{path.parent.name}/{path.name}\n{text}")


# ---------------------------------------------------------------- the state of training


def save_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, str]) -> None:
    """Writes trained weights and the optimizer's state, on which the next step depends; the writer alone does so.

    `progress` is stored with them.
    """
    if not parallel.is_writer():
        return
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    for i, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            tensors[f"optimizer.{i}.{name}"] = value.contiguous()
    metadata = progress | {"sha256": _digest_of_state(path, tensors, progress)}
    write(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_training(path: Path) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """(progress, tensors) of a checkpoint; None where it is damaged."""
    try:
        with safe_open(path, framework="pt") as reader:
            progress = reader.metadata() or {}
            tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, RuntimeError):
        return None
    fits = progress.pop("sha256", None) == _digest_of_state(path, tensors, progress)
    return (progress, tensors) if fits else None


@torch.no_grad()
def restore_training(tensors: dict[str, Tensor] | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Sets model and optimizer of all ranks to those of a checkpoint, which rank 0 has read."""
    tensors = dict(parallel.sent(tensors))
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            states.setdefault(int(i), {})[name] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(tensors[f"model.{name}"])


def _digest_of_state(path: Path, tensors: dict[str, Tensor], progress: dict[str, str]) -> str:
    total = hashlib.sha256(json.dumps([path.parent.name, sorted(progress.items())]).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()
