"""What the comparisons of methods share: running a script in this process, measuring what it made, and frontiers.

A model that is only sharper samples better, so sampled metrics say something at equal entropy only. A *frontier* is a
model's accuracy and error against the entropy of its responses, over sampling temperatures. One model is better than
another if its frontier lies above the other's.
"""

import contextlib
import functools
import importlib
import io
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: one thread per process

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from evaluate import interpolation, nearest_edits  # noqa: E402
from player import Player  # noqa: E402
from runtime.options import combined, parse  # noqa: E402
from runtime.setup import setup  # noqa: E402
from runtime.work import Work  # noqa: E402
from spin import SpinOptions  # noqa: E402

# ---------------------------------------------------------------- running


def flags_of(*texts: str) -> dict[str, str | None]:
    """Flags and their values, separated by spaces, or None; those of a later text replace those of an earlier one."""
    flags: dict[str, str | None] = {}
    for text in texts:
        for word in shlex.split(text):
            if word.startswith("--"):
                name, flags[word] = word, None
            else:
                flags[name] = word if flags[name] is None else f"{flags[name]} {word}"
    return flags


def words_of(flags: dict[str, str | None]) -> list[str]:
    return [word for flag, value in flags.items() for word in (flag, *(value or "").split())]


def run_script(script: str, argv: Sequence[str], name: str) -> float:
    """Runs a script of this project in this process. Returns its CPU seconds, to which other work does not add.

    Raises: RuntimeError with `name` and the end of what was printed if the script fails.
    """
    printed = io.StringIO()
    began = time.process_time()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        place = "methods." if script in ("family", "sdft") else ""
        code = importlib.import_module(place + script).main(list(argv))
    if code:
        raise RuntimeError(f"{name}: exit code {code}: {printed.getvalue().strip()[-500:]}")
    return time.process_time() - began


@functools.cache
def ruler(model: str, heldout: str, max_new_tokens: int = 32, more: tuple[str, ...] = ()) -> tuple[Player, Work]:
    """A player to load weights into, and what asks it, with these prompts held out. `more` are flags of spin.py."""
    argv = ["--model", model, "--data", heldout, "--eval-data", heldout, "--eval-limit", "0", "--device", "cpu"]
    argv += ["--max-new-tokens", str(max_new_tokens), "--gen-batch", "1024", "--rank", "0", "--out", f"{heldout}-none"]
    argv += more
    with contextlib.redirect_stdout(io.StringIO()):  # held-out prompts are given as data, too: nothing is trained
        loaded, _, run = setup(parse(combined(SpinOptions), argv, "spin.py"), "spin", Player.class_of)
    return Player(loaded.eval(), run.work.eos_token_id, run.args, run.weights.dtype), run.work


# ---------------------------------------------------------------- frontiers

# (temperatures, metrics, examples): for each metric a value of each example, whose mean over examples is the metric.
Frontier = np.ndarray
MEASURED = ("entropy", "sampled", "sampled_error", "nll")  # nats per response, share, rate, nats per token
OF_TEXTS = ("content", "frequent")  # of definitions: F1 without the most frequent words; how many of these there are


def equal(text: str, references: Sequence[str]) -> float:
    return float(text in references)


def overlap(text: str, references: Sequence[str], without: Collection[str] = ()) -> float:
    """F1 of the words that a text shares with a reference, each as often as it stands there; the best reference's.

    Words of `without` do not count.
    """
    words = Counter(word for word in text.split() if word not in without)
    others = [Counter(word for word in r.split() if word not in without) for r in references]
    return max(2 * (words & other).total() / max(words.total() + other.total(), 1) for other in others)


def frontier(
    player: Player, run: Work, temperatures: Sequence[float], agreement: Callable = equal,
    more: Sequence[Callable] = (), draw: int = 0,
) -> Frontier:  # fmt: skip
    """A player's held-out metrics at every sampling temperature, with the same random numbers for the same `draw`.

    `agreement(text, references)` is what "sampled" is the mean of: whether they are equal, or `overlap`. Those of
    `more` follow behind the metrics of MEASURED.

    A rate, such as edits over tokens, is linearised: its values are rate + (edits - rate * tokens) / mean tokens, whose
    mean is the rate and whose standard error is that of the rate.
    """
    points = []
    for temperature in temperatures:
        responses = run.respond(player, run.heldout, "frontier", run.seed(draw, "evaluate"), temperature)
        items = [(e.prompt_ids, e.real_ids, ids) for e, (ids, _) in zip(run.heldout, responses)]
        logps = np.array(run.logps(player, items, "frontier-logps", temperature))  # (n, 2): real, sampled
        texts = [run.text(ids) for ids, _ in responses]
        right = [agreement(text, e.references) for text, e in zip(texts, run.heldout)]
        edits, words = np.array([nearest_edits(text, e.references) for text, e in zip(texts, run.heldout)]).T
        tokens = np.array([len(e.real_ids) for e in run.heldout])
        others = [np.array([f(text, e.references) for text, e in zip(texts, run.heldout)]) for f in more]
        points.append([-logps[:, 1], right, linearised(edits, words), linearised(-logps[:, 0], tokens), *others])
    return np.array(points, dtype=np.float32)


def linearised(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n,) values whose mean is sum(values) / sum(weights), and whose standard error is the ratio's."""
    ratio = values.sum() / weights.sum()
    return ratio + (values - ratio * weights) / weights.mean()


def reached(mine: Frontier, control: Frontier) -> set[int]:
    """Numbers of the temperatures of `mine` whose entropy lies within those of the control."""
    x = control[:, 0].mean(1)
    return {i for i, point in enumerate(mine) if x.min() <= point[0].mean() <= x.max()}


def lead(mine: Frontier, control: Frontier, metric: str, temperatures: Collection[int]) -> np.ndarray | None:
    """How far one frontier lies above another in a metric at equal entropy, as a value of each example: (n,).

    Averaged over these temperatures of `mine`, all of which the control must reach. Between its own temperatures the
    control is interpolated by the cubic f through the four nearest, with weights L_k. A change de_k of a knot's entropy
    acts like a change -f'(e_k) de_k of its metric, so the values account for the noise of both entropies (delta
    method), and the standard error of their mean is std / sqrt(n). Returns None if there is no such temperature or the
    metric was not measured.
    """
    k = (MEASURED + OF_TEXTS).index(metric)
    if k >= mine.shape[1]:
        return None
    found = []
    for i in sorted(temperatures):
        entropy = mine[i, 0].mean(dtype=np.float64)
        nearest = np.argsort(abs(control[:, 0].mean(1) - entropy))[:4]
        knots, values = control[nearest, 0].astype(np.float64), control[nearest, k].astype(np.float64)
        places = knots.mean(1)
        slope, *slopes = (slope_at(x, places, values.mean(1)) for x in (entropy, *places))
        moved = values - np.array(slopes)[:, None] * (knots - places[:, None])
        found.append(mine[i, k] - slope * (mine[i, 0] - entropy) - interpolation(entropy, places) @ moved)
    return np.mean(found, 0) if found else None


def slope_at(x: float, places: Sequence[float], values: np.ndarray) -> float:
    """The derivative at x of the polynomial through all points."""
    step = 1e-4 * (max(places) - min(places))
    return float((np.array(interpolation(x + step, places)) - interpolation(x - step, places)) @ values / (2 * step))


def best_nll(points: Frontier) -> np.ndarray:
    """The NLL at the temperature where it is lowest, a value of each example."""
    return min((point[MEASURED.index("nll")] for point in points), key=lambda values: values.mean())
