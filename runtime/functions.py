"""Functions in files of the user, which --metric and --scorer name as FILE.py:NAME."""

import functools
import hashlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.files import shown
from evaluate import SHIPPED, Metric, name_of
from runtime.stopping import Stopped


def load_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """The functions of --metric, keyed by the names of their columns: metric(prompt, response, references) -> float.

    Each raises Stopped if it fails or does not return a finite number. Raises: FileNotFoundError, ValueError.
    """
    functions = {name: SHIPPED.get(name) or load("--metric", name) for name in names}
    metrics = {name_of(name): _checked(f"--metric {name}", f, _number) for name, f in functions.items()}
    if len({*metrics, "error"}) <= len(names):  # Two columns would have one name, or one would be greedy_error.
        raise ValueError(f"--metric {', '.join(names)}: expected names that differ, and none that is 'error'")
    return metrics


def load_scorer(name: str) -> Callable[[str, list[str]], list[float]]:
    """The function of --scorer: scorer(prompt, two responses) -> the probability in [0, 1] that each of them wins.

    It raises Stopped if it fails or returns anything else. Raises: FileNotFoundError, ValueError.
    """
    return _checked(f"--scorer {name}", load("--scorer", name), _probabilities)


def load(flag: str, name: str) -> Callable[..., Any]:
    """The function that FILE.py:NAME names, which is the user's own code: code that comes with a model is never run."""
    file, _, attribute = name.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{flag} {name}: no such file, expected FILE.py:NAME")
    try:
        return getattr(_module(Path(file).resolve()), attribute)
    except BaseException as error:  # The user's code may raise anything, including SystemExit.
        raise ValueError(f"{flag} {name}: {type(error).__name__}: {error}") from None


@functools.cache
def _module(file: Path) -> types.ModuleType:
    """Runs the file once per process, so that several functions share what it has loaded.

    The file may import modules that lie beside it, unless a module of ours or an installed one has the same name.
    """
    spec = importlib.util.spec_from_file_location(f"user:{file}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # Dataclasses look their module up there.
    sys.path.append(str(file.parent))
    spec.loader.exec_module(module)
    return module


def digest(names: Sequence[str]) -> str:
    """The sha256 of functions: of their names and of the contents of their files, which may be moved."""
    total = hashlib.sha256()
    for name in names:
        file, _, attribute = name.rpartition(":")
        total.update((Path(file).read_bytes() if file else b"") + attribute.encode())
    return total.hexdigest()


def _checked(what: str, function: Callable[..., Any], convert: Callable[[Any], Any]) -> Callable:
    """`function` with its results converted. It raises Stopped if the function or `convert` raises."""

    def call(prompt: str, *texts: Any) -> Any:
        try:
            return convert(function(prompt, *texts))
        except BaseException as error:  # The user's code may raise anything, including SystemExit.
            raise Stopped(f"{what}: {type(error).__name__}: {error} (for the prompt {shown(repr(prompt))})") from None

    return call


def _number(value: Any) -> float:
    if isinstance(value, str) or not math.isfinite(value):
        raise ValueError(f"expected a finite number, not {shown(repr(value))}")
    return float(value)


def _probabilities(value: Any) -> list[float]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(0 <= p <= 1 for p in value):
        raise ValueError(f"expected a list of two probabilities, not {shown(repr(value))}")
    return list(map(float, value))
