"""What a resumed run must have in common with the run that began: options, inputs and, with dropout, the ranks."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model import weight_files
from runtime.folder import digest_of_file
from runtime.options import flag_of

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
    """Compares command, number of ranks and options of a resumed run with those that it began with.

    --iterations may grow. Raises: ValueError naming the first that differs and is not `changeable`.
    """
    new = json.loads(json.dumps(new))  # The old record has lists in place of tuples.
    began, now = ({name: record[name] for name in ("command", "ranks")} | record["args"] for record in (old, new))
    both = min(began["iterations"], now["iterations"])
    for name in now | began:
        given, before = now.get(name), began.get(name)
        same = given >= before if name == "iterations" else given == before
        if name in PER_ITERATION:
            same = (given or [])[:both] == (before or [])[:both]
        if not same and name not in changeable:
            flag = name if name in ("command", "ranks") else flag_of(name)
            remedy = "give the old value or another --out"
            raise ValueError(f"{flag} {given!r}: the run in {folder} began with {before!r}; {remedy}")


def check_same_inputs(whose: str, old: dict[str, str], new: dict[str, str]) -> None:
    """Compares the sha256 of all inputs, by the name of the option. `whose` says whose contents were expected.

    Raises: ValueError naming the first option whose contents differ.
    """
    for name in old | new:
        if old.get(name) != new.get(name):
            now, then = (digests.get(name, "none")[:12] for digests in (new, old))
            remedy = "restore them or give another --out"
            raise ValueError(f"--{name}: not the contents {whose} (sha256 {now}, then {then}); {remedy}")


def digest_of_model(folder: Path, with_weights: bool = True) -> str:
    """One sha256 over a model's config, tokenizer and, if `with_weights`, the weight files that are read."""
    files = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    return _digest_of_files([*files, *(weight_files(folder) if with_weights else [])])


def digest_of_adapter(folder: Path) -> str:
    """One sha256 over the files of an adapter."""
    return _digest_of_files([folder / "adapter_config.json", folder / "adapter_model.safetensors"])


def _digest_of_files(paths: Sequence[Path]) -> str:
    found = [(path, path.stat()) for path in paths]
    digests = [_digest_of_state(path, status.st_ino, status.st_size, status.st_mtime_ns) for path, status in found]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@functools.cache
def _digest_of_state(path: Path, inode: int, size: int, changed: int) -> str:
    """The sha256 of a file. It is computed again only if the file has changed: models are large."""
    return digest_of_file(path)
