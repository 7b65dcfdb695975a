"""Files that survive a crash: written whole, in shards, with the state of training.

A process may die at any moment. Every file therefore appears under its name by a rename, after its content has reached
the disk: a reader finds the old file or the new one, never a part. Long work is cut into shards, and each shard is
written as soon as it is finished. A resumed run reads what is there and computes the rest.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime import parallel

# ---------------------------------------------------------------- files


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Calls fill(temporary path beside `path`), syncs what it wrote, and renames it to `path`.

    Raises: OSError naming `path`, which is then as it was before; the temporary file is removed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk by an error of its own
        with contextlib.suppress(OSError):
            temporary.unlink()
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, getattr(error, "strerror", None) or str(error), str(path)) from None


def sync(path: Path) -> None:
    """Forces a file or directory to the disk: before that, a power failure may undo a rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Writes JSON Lines. Python writes floats so that reading them gives the same bits."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path, required: bool = False) -> list[Any]:
    """Reads what `write_rows` wrote; an absent file has no rows unless it is `required`.

    Raises: OSError naming a damaged or missing file.
    """
    if not path.exists() and not required:
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise OSError(errno.EIO, f"damaged ({error})", str(path)) from None


def digest_of_files(paths: Iterable[Path]) -> str:
    """sha256 over the sha256 of each file's content, in order."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


# ---------------------------------------------------------------- shards


def in_shards(
    folder: Path | None, name: str, count: int, size: int, work: Callable[[range], Sequence[Any]]
) -> list[Any]:
    """The results of work(items) for items 0 to count - 1, computed `size` items at a time.

    Args:
        folder: where finished shards are written and found again; None: nothing is written. The cut is the same
            either way, since rounding may depend on which items are computed together.
        work: returns one JSON value for each item of the range it is given.

    Raises: OSError naming a shard that is damaged.
    """
    shards = [range(first, min(first + size, count)) for first in range(0, count, size)]
    results: list[Any] = []
    for items in parallel.share(shards):
        path = folder / f"{name}-{items.start}-{items.stop}.jsonl" if folder else None
        done = read_rows(path) if path else []
        if not done:
            done = list(work(items))
            if path:
                write_rows(path, done)
        if len(done) != len(items):
            raise OSError(errno.EIO, f"holds {len(done)} rows, expected {len(items)}", str(path))
        results += done
    return parallel.gather(results)


# ---------------------------------------------------------------- the state of training


def save_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, log: list[Any]) -> None:
    """Writes all that the next step depends on: trained weights, optimizer state, dropout's random state, the log."""
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    for i, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            tensors[f"optimizer.{i}.{name}"] = value.contiguous()
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["random.cuda"] = torch.cuda.get_rng_state(_device(model))
    write(path, lambda temporary: save_file(tensors, temporary, metadata={"log": json.dumps(log)}))


@torch.no_grad()
def load_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Restores what `save_training` wrote and returns the log. Raises OSError naming a damaged file."""
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
