"""What evidence.py and real_model.py share: running a script in this process, results that go on, and frontiers.

A model that is only sharper samples better, so sampled metrics say something at equal entropy only. A *frontier* is a
model's accuracy and error against the entropy of its responses, over sampling temperatures. One model is better than
another if its frontier lies above the other's.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # This must precede the import of torch: one thread per process.

import numpy as np
from bench import FOLDER, write_whole  # It makes the modules of this project importable.

from evaluate import Row, interpolation, nearest_edits
from player import Player
from runtime.options import combined, parse
from runtime.setup import setup
from runtime.work import Work
from spin import SpinOptions

ROOT = FOLDER.parent
Judge = Callable[[str, Sequence[str]], float]

# ---------------------------------------------------------------- running


def run_script(script: str, words: Sequence[str], name: str) -> float:
    """Runs a script of this project in this process. Returns its CPU seconds, to which other work does not add.

    Of a flag that stands several times among `words` the last one counts.

    Raises: RuntimeError with `name` and the end of what was printed if the script fails.
    """
    printed = io.StringIO()
    began = time.process_time()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        place = "methods." if script in ("family", "sdft") else ""
        code = importlib.import_module(place + script).main(list(words))
    if code:
        raise RuntimeError(f"{name}: exit code {code}: {printed.getvalue().strip()[-500:]}")
    return time.process_time() - began


def begun(path: Path, new: Row, fixed: Sequence[str]) -> Row:
    """The results in a file, to go on with, or `new`. Ends the program if these fields of both differ."""
    found = json.loads(path.read_text()) if path.exists() else new
    for name in fixed:
        if found[name] != new[name]:
            told = f"begun with {name} {found[name]}, now {new[name]}"
            sys.exit(f"{Path(sys.argv[0]).name}: error: {path}: {told}; give another --out")
    return found


def store(path: Path, found: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(found, indent=1) + "\n")


def loaded(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def write_lines(path: Path, lines: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@functools.cache
def ruler(model: str, heldout: str, *flags: str) -> tuple[Player, Work]:
    """A player to load weights into, and what asks it, with these prompts held out. `flags` are those of spin.py."""
    argv = ["--device", "cpu", "--gen-batch", "1024", *flags, "--model", model, "--data", heldout]
    argv += ["--eval-data", heldout, "--eval-limit", "0", "--rank", "0", "--out", f"{heldout}-none"]
    with contextlib.redirect_stdout(io.StringIO()):  # held-out prompts are given as data, too: nothing is trained
        loaded, _, run = setup(parse(combined(SpinOptions), argv, "spin.py"), "spin", Player.class_of)
    return Player(loaded.eval(), run.work.eos_token_id, run.args, run.weights.dtype), run.work


# ---------------------------------------------------------------- judges of a text: numbers, given its references


def equal(text: str, references: Sequence[str]) -> float:
    return float(text in references)


def overlap(text: str, references: Sequence[str], without: Collection[str] = ()) -> float:
    """F1 of the words that a text shares with a reference, each as often as it stands there; the best reference's.

    Words of `without` do not count.
    """
    words = Counter(word for word in text.split() if word not in without)
    others = [Counter(word for word in r.split() if word not in without) for r in references]
    return max(2 * (words & other).total() / max(words.total() + other.total(), 1) for other in others)


@functools.cache
def judges_of_definitions(trained_on: Path) -> tuple[Judge, Judge, Judge]:
    """Overlap, overlap without frequent words, and the number of frequent words.

    Frequent words are the 40 that stand most often in responses of a file: "a", "the", "of", ..., "genus", "person".
    """
    responses = [json.loads(line)["response"] for line in trained_on.read_text().splitlines()]
    counts = Counter(word for response in responses for word in response.split())
    frequent = frozenset(word for word, _ in counts.most_common(40))
    content = functools.partial(overlap, without=frequent)
    return overlap, content, lambda text, _: sum(word in frequent for word in text.split())


# ---------------------------------------------------------------- frontiers

# (temperatures, metrics, examples): for each metric a value of each example, whose mean over examples is the metric.
Frontier = np.ndarray
MEASURED = ("entropy", "sampled", "sampled_error", "nll")  # nats per response, share, rate, nats per token
OF_TEXTS = ("content", "frequent")  # for definitions: F1 without the most frequent words; number of frequent words


def frontier(
    player: Player, run: Work, temperatures: Sequence[float], judges: Sequence[Judge] = (equal,), draw: int = 0
) -> Frontier:
    """A player's held-out metrics at every sampling temperature, with the same random numbers for the same `draw`.

    "sampled" is the mean of what the first of the judges says; that of the others follows behind MEASURED.

    A rate, such as edits over tokens, is linearised: its values are rate + (edits - rate * tokens) / mean tokens, whose
    mean is the rate and whose standard error is that of the rate.
    """
    points = []
    for temperature in temperatures:
        responses = run.respond(player, run.heldout, "frontier", run.seed(draw, "evaluate"), temperature)
        items = [(e.prompt_ids, e.real_ids, ids) for e, (ids, _) in zip(run.heldout, responses)]
        logps = np.array(run.logps(player, items, "frontier-logps", temperature))  # (n, 2): real, sampled
        texts = [(run.text(ids), e.references) for e, (ids, _) in zip(run.heldout, responses)]
        agreement, *others = [[judge(*text) for text in texts] for judge in judges]
        edits, words = np.array([nearest_edits(*text) for text in texts]).T
        tokens = np.array([len(e.real_ids) for e in run.heldout])
        error, nll = linearised(edits, words), linearised(-logps[:, 0], tokens)
        points.append([-logps[:, 1], agreement, error, nll, *others])
    return np.array(points, dtype=np.float32)


def names_of(points: Frontier) -> tuple[str, ...]:
    """The metrics of a frontier."""
    return (MEASURED + OF_TEXTS)[: points.shape[1]]


def linearised(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n,) values whose mean is sum(values) / sum(weights), and whose standard error is the ratio's."""
    ratio = values.sum() / weights.sum()
    return ratio + (values - ratio * weights) / weights.mean()


def reached(mine: Frontier, control: Frontier) -> set[int]:
    """Numbers of the temperatures of `mine` whose entropy lies within those of the control."""
    x = control[:, 0].mean(1)
    return {i for i, point in enumerate(mine) if x.min() <= point[0].mean() <= x.max()}


def lead(mine: Frontier, control: Frontier, metric: str, temperatures: Collection[int]) -> np.ndarray:
    """How far one frontier lies above another in a metric at equal entropy, as a value of each example: (n,).

    The lead is a mean over these temperatures of `mine`, all of which the control must reach. Between its temperatures
    the control is interpolated by the cubic f through the four nearest, with weights L_k. A change de_k of a knot's
    entropy acts like a change -f'(e_k) de_k of its metric, so the values account for the noise of both entropies (delta
    method), and the standard error of their mean is std / sqrt(n).
    """
    k, found = names_of(mine).index(metric), []
    for i in sorted(temperatures):
        entropy = mine[i, 0].mean(dtype=np.float64)
        nearest = np.argsort(abs(control[:, 0].mean(1) - entropy))[:4]
        knots, values = control[nearest, 0].astype(np.float64), control[nearest, k].astype(np.float64)
        places = knots.mean(1)
        slope, *slopes = (slope_at(x, places, values.mean(1)) for x in (entropy, *places))
        moved = values - np.array(slopes)[:, None] * (knots - places[:, None])
        found.append(mine[i, k] - slope * (mine[i, 0] - entropy) - interpolation(entropy, places) @ moved)
    return np.mean(found, 0)


def slope_at(x: float, places: Sequence[float], values: np.ndarray) -> float:
    """The derivative at x of the polynomial through all points."""
    step = 1e-4 * (max(places) - min(places))
    return float((np.array(interpolation(x + step, places)) - interpolation(x - step, places)) @ values / (2 * step))


def best_nll(points: Frontier) -> np.ndarray:
    """The NLL at the temperature where it is lowest, a value of each example."""
    return min((point[MEASURED.index("nll")] for point in points), key=lambda values: values.mean())
