"""What a resumed run must have in common with the run that began: options, inputs and, with dropout, the ranks."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model import weight_files
from runtime.export import CHANGED, COPIED
from runtime.folder import digest_of_file
from runtime.options import as_typed, changeable

PER_ITERATION = ("beta", "lr", "epochs")  # The record has one value per iteration of these options.
MODEL_FILES = ("config.json", "tokenizer.json", *COPIED, *CHANGED)  # what is read of a model besides its weights


def continued(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Returns the record to resume with: `old`, or `new` if there is no old record.

    With another --iterations it is unfinished, and has the new values of options with one value per iteration.
    """
    if not old or old["args"]["iterations"] == new["args"]["iterations"]:
        return old or new
    changed = {name: new["args"][name] for name in ("iterations", *PER_ITERATION) if name in new["args"]}
    kept = {name: value for name, value in old.items() if name != "best"}
    return kept | {"args": old["args"] | changed, "finished": False}


def check_same(args: Any, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Compares command, number of ranks and options of a resumed run with those that it began with.

    --iterations may grow. Raises: ValueError naming the first that would change the outcome.
    """
    may_change = {"ranks", *changeable(type(args))}
    if args.dropout or args.lora_dropout:  # Which numbers dropout draws depends on how a batch is split.
        may_change -= {"ranks", "micro_tokens", "device"}
    began, now = ({name: record[name] for name in ("command", "ranks")} | record["args"] for record in (old, new))
    both = min(began["iterations"], now["iterations"])
    for name in now | began:
        given, before = now.get(name), began.get(name)
        same = given >= before if name == "iterations" else given == before
        if name in PER_ITERATION:
            same = (given or [])[:both] == (before or [])[:both]
        if not same and name == "command":
            raise ValueError(f"--out {args.out}: holds a run of {before}; give another --out")
        if not same and name not in may_change:
            given, before = (as_typed(name, v) if name != "ranks" else f"ranks {v}" for v in (given, before))
            raise ValueError(f"{given}: the run in {args.out} began with {before}; give the old value or another --out")


def check_same_inputs(whose: str, old: dict[str, str], new: dict[str, str]) -> None:
    """Compares the sha256 of all inputs, by the name of the option. `whose` says whose contents were expected."""
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
    return hashlib.sha256("".join(map(digest_of_file, paths)).encode()).hexdigest()
