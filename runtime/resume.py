"""What a resumed run must have in common with the run that began: options, inputs and the number of ranks."""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from model import weight_files
from runtime.folder import digest_of_file

PER_ITERATION = ("beta", "lr", "epochs")  # The record has one value per iteration of these options.
MODEL_FILES = (  # the files of a model's directory that are read, apart from the weights
    "config.json", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
    "generation_config.json", "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip


def continued(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Returns the record to resume with: `old`, or `new` if there is no old record.

    If --iterations has changed, the old record is marked unfinished and gets the new values of --iterations and of the
    options that have one value per iteration.
    """
    if not old or old["args"]["iterations"] == new["args"]["iterations"]:
        return old or new
    changed = {name: new["args"][name] for name in ("iterations", *PER_ITERATION) if name in new["args"]}
    kept = {name: value for name, value in old.items() if name != "best"}
    return json.loads(json.dumps(kept | {"args": old["args"] | changed, "finished": False}))


def check_same(folder: Path, old: dict[str, Any], new: dict[str, Any], changeable: Sequence[str]) -> None:
    """Compares the options of a resumed run with those that it began with. --iterations may grow.

    Raises: ValueError naming the first option that differs and is not `changeable`.
    """
    new = json.loads(json.dumps(new))  # The old record has lists in place of tuples.
    began, now = ({"command": record["command"]} | record["args"] for record in (old, new))
    for name in now | began:
        if name in changeable or began.get(name) == now.get(name) or _same_so_far(name, began, now):
            continue
        values = (options.get(name) for options in (now, began))
        given, before = (", ".join(map(str, v)) if isinstance(v, list) else v for v in values)
        flag = name if name == "command" else f"--{name.replace('_', '-')}"
        raise ValueError(
            f"{flag} {given!r}: the run in {folder} began with {before!r}; give the old value or another --out"
        )


def _same_so_far(name: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether an option that belongs to the number of iterations was the same in those that both runs have."""
    if name == "iterations":
        return new[name] >= old[name]
    both = min(old["iterations"], new["iterations"])
    return name in PER_ITERATION and (old.get(name) or [])[:both] == (new.get(name) or [])[:both]


def check_same_inputs(whose: str, old: dict[str, str], new: dict[str, str]) -> None:
    """Compares the sha256 of all inputs, by the name of the option. `whose` says whose contents were expected.

    Raises: ValueError naming the first option whose contents differ.
    """
    for name in old | new:
        if old.get(name) != new.get(name):
            now, then = (digests.get(name, "none")[:12] for digests in (new, old))
            raise ValueError(
                f"--{name}: not the contents {whose} (sha256 {now}, then {then}); restore them or give another --out"
            )


def check_ranks(folder: Path, old: dict[str, Any], ranks: int) -> None:
    """Raises ValueError if the run in `folder` began with another number of ranks."""
    if old["ranks"] != ranks:
        raise ValueError(
            f"{ranks} ranks: the run in {folder} began with {old['ranks']}, on which dropout's random numbers depend; "
            "start as many, or give another --out"
        )


# ---------------------------------------------------------------- the sha256 of inputs


def digest_of_model(folder: Path, with_weights: bool = True) -> str:
    """One sha256 over a model's config, tokenizer and, if `with_weights`, the weight files that are read."""
    files = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    return _digest_of_files([*files, *(weight_files(folder) if with_weights else [])])


def digest_of_adapter(folder: Path) -> str:
    """One sha256 over the files of an adapter."""
    return _digest_of_files([folder / "adapter_config.json", folder / "adapter_model.safetensors"])


def _digest_of_files(paths: Iterable[Path]) -> str:
    found = [(path, path.stat()) for path in paths]
    digests = [_digest_of_state(path, status.st_ino, status.st_size, status.st_mtime_ns) for path, status in found]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@functools.cache
def _digest_of_state(path: Path, inode: int, size: int, changed: int) -> str:
    """The sha256 of a file. It is computed again only if the file has changed: models are large."""
    return digest_of_file(path)
