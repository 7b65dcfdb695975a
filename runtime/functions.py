"""Functions of the user's own files, which --scorer and --metric name as FILE.py:NAME, and the metrics that ship."""

import functools
import hashlib
import math
import numbers
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtime.evaluate import SHIPPED, Metric, name_of
from runtime.options import shown
from runtime.stopping import Stopped

OUR_NAMES = {path.stem for path in Path(__file__).resolve().parents[1].iterdir()}  # of modules and packages


def load(flag: str, name: str) -> Callable[..., Any]:
    """FILE.py:NAME to the function. It is the user's own code: nothing that comes with a model is run.

    Raises: FileNotFoundError, or ValueError naming what is wrong with it.
    """
    file, _, attribute = name.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{flag} {name}: no such file, expected FILE.py:NAME")
    try:
        function = getattr(_module(Path(file).resolve(), Path(file).read_bytes()), attribute)
    except BaseException as error:  # the user's code may raise anything, SystemExit too
        raise ValueError(f"{flag} {name}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise ValueError(f"{flag} {name}: {type(function).__name__}, expected a function")
    return function


@functools.cache
def _module(file: Path, source: bytes) -> types.ModuleType:
    """Runs the file once in a process, so that its functions keep what they have loaded.

    It may import modules that lie beside it, even if one is called like one of ours: `model`, say.
    """
    module = types.ModuleType(f"user:{file}")
    module.__file__ = str(file)
    beside = {path.stem for path in file.parent.iterdir()}
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in beside & OUR_NAMES}
    sys.modules[module.__name__] = module  # dataclasses in the file look their module up here
    sys.path.insert(0, str(file.parent))
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    finally:
        sys.path.remove(str(file.parent))
        sys.modules.update(ours)
    return module


def digest(names: Sequence[str]) -> str:
    """sha256 of functions by their names and the contents of their files, which may move."""
    total = hashlib.sha256()
    for name in names:
        file, _, attribute = name.rpartition(":")
        total.update((Path(file).read_bytes() if file else b"") + attribute.encode())
    return total.hexdigest()


# ---------------------------------------------------------------- metrics


def load_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """The functions of --metric by the names of their columns. Each checks what it returns, and raises Stopped.

    Raises: FileNotFoundError, ValueError.
    """
    metrics = {name_of(name): _checked(name, SHIPPED.get(name) or load("--metric", name)) for name in names}
    if len({*metrics, "error"}) <= len(names):  # columns would be called alike, or like greedy_error
        raise ValueError(f"--metric {', '.join(names)}: expected names that differ, and none that is 'error'")
    return metrics


def _checked(name: str, function: Callable[..., Any]) -> Metric:
    def measure(prompt: str, response: str, references: list[str]) -> float:
        where = f"for the prompt {shown(repr(prompt))}"
        try:
            value = function(prompt, response, references)
            value = value.item() if hasattr(value, "item") else value  # of numpy or torch
        except BaseException as error:  # the user's code may raise anything, SystemExit too
            raise Stopped(f"--metric {name}: {type(error).__name__} {where}: {error}") from None
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return float(value)
        raise Stopped(f"--metric {name}: returned {shown(repr(value))} {where}, expected a finite number")

    return measure
