"""Held-out metrics of an iterate, each with its standard error over examples."""

import itertools
import math
import re
from collections.abc import Callable, Hashable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

# Metric by metric: +1 if a larger value is better, -1 if a smaller one is.
METRICS = {"nll": -1, "greedy": 1, "sampled": 1, "greedy_error": -1, "sampled_error": -1}
NEITHER = ("kl", "entropy")  # metrics of which neither a larger nor a smaller value is better
DECODINGS = {"greedy": 0.0, "sampled": 1.0}  # of the responses that are evaluated, and their temperatures

Row = dict[str, Any]
Metric = Callable[[str, str, list[str]], float]  # of --metric: (prompt, response, references) -> number


class StartSamples(NamedTuple):
    """Responses that theta_0 sampled to the held-out prompts, and its log-probabilities of them in nats.

    They estimate KL(theta_0 || theta_t) = E_{y ~ theta_0}[log p_0(y) - log p_t(y)] without a second model in memory.
    """

    sequences: list[tuple[list[int], list[int]]]  # (prompt ids, response ids)
    logps: list[float]


def sample_start(player: Any, run: Any) -> StartSamples:
    """Has the start, theta_0, answer the held-out prompts."""
    responses = run.respond(player, run.heldout, "start", run.seed(0, "kl"))
    sequences = [(e.prompt_ids, ids) for e, (ids, _) in zip(run.heldout, responses)]
    return StartSamples(sequences, [logp for (logp,) in run.logps(player, sequences, "start-logps")])


def evaluate(player: Any, start: StartSamples, run: Any) -> Row:
    """Metrics of the player on run.heldout: see `summary`."""
    return summary(answers(player, start, run))


def answers(player: Any, start: StartSamples, run: Any) -> list[Row]:
    """What the player says to each held-out prompt, as heldout-<t>.jsonl keeps it.

    A row has "prompt", "references", the responses "greedy" and "sampled" as text, and "values": for each metric
    (value, weight). The metric is sum(values) / sum(weights) over all rows. "tokens" has the greedy and the real
    response in pieces with their log-probabilities, which cost no pass of their own.

    greedy, sampled: whether the response equals one of the references, decoded greedily or sampled at temperature 1.
    greedy_error, sampled_error: edit distance to the nearest reference, weighted by its length in whitespace tokens.
    greedy_NAME, sampled_NAME: what a function NAME of --metric returned.
    nll: negative log-probability of the real response in nats, weighted by its tokens.
    kl: log p_0(y) - log p(y) in nats, of the start's response y: a sample of KL(theta_0 || player).
    entropy: minus the log-probability of the sampled response, nats. A model that is only sharper samples better, too,
        so compare sampled metrics at equal entropy (`at_equal_entropy`).
    """
    heldout = run.heldout
    rows: list[Row] = [{"prompt": e.prompt, "references": e.references, "values": {}, "tokens": {}} for e in heldout]
    for name, temperature in DECODINGS.items():
        # The same random numbers for every iterate make the difference between two iterates less noisy.
        responses = run.respond(player, heldout, name, run.seed(0, "evaluate"), temperature, with_logps=True)
        for row, example, (ids, _, *logps) in zip(rows, heldout, responses):
            row[name] = text = run.text(ids)
            if logps and name == "greedy":
                row["tokens"]["greedy"] = run.pieces(ids, *logps)
            elif logps:
                row["values"]["entropy"] = (-math.fsum(*logps), 1.0)
            edits, length = nearest_edits(text, example.references)
            row["values"] |= {
                name: (float(text in example.references), 1.0),
                f"{name}_error": (float(edits), float(length)),
            }
    if not logps:  # the player does not tell them; `responses` are the sampled ones
        items = [(e.prompt_ids, ids) for e, (ids, _) in zip(heldout, responses)]
        for row, (logp,) in zip(rows, run.logps(player, items, "entropy")):
            row["values"]["entropy"] = (-logp, 1.0)
    real = run.logps(player, [(e.prompt_ids, e.real_ids) for e in heldout], "nll", by_token=True)
    now = run.logps(player, start.sequences, "kl")
    for row, example, real_logps, before, (after,) in zip(rows, heldout, real, start.logps, now):
        row["values"] |= {"nll": (-math.fsum(real_logps), float(len(example.real_ids))), "kl": (before - after, 1.0)}
        if len(real_logps) == len(example.real_ids):
            row["tokens"]["real"] = run.pieces(example.real_ids, real_logps)
    for name in run.metrics:
        for row, values in zip(rows, run.measure(name, rows)):
            row["values"] |= {f"{decoding}_{name}": (value, 1.0) for decoding, value in zip(DECODINGS, values)}
    return rows


def add_temperatures(player: Any, rows: list[Row], run: Any) -> None:
    """Samples at the temperatures of --eval-temperatures, too.

    Row by row of `answers`, "by_temperature" gets the sampled metrics and the entropy by the temperature, as text.
    """
    for temperature in sorted({*run.args.eval_temperatures} - {1.0}):
        key = f"{temperature:g}"
        responses = run.respond(player, run.heldout, f"sampled-{key}", run.seed(0, "evaluate"), temperature)
        items = [(e.prompt_ids, ids) for e, (ids, _) in zip(run.heldout, responses)]
        logps = run.logps(player, items, f"entropy-{key}", temperature)
        said = [row | {"sampled": run.text(ids)} for row, (ids, _) in zip(rows, responses)]
        measured = {name: run.measure(name, said, ("sampled",), f"-{key}") for name in run.metrics}
        for i, (row, answer, (logp,)) in enumerate(zip(rows, said, logps)):
            edits, length = nearest_edits(answer["sampled"], row["references"])
            values = {"sampled": (float(answer["sampled"] in row["references"]), 1.0)}
            values |= {"sampled_error": (float(edits), float(length)), "entropy": (-logp, 1.0)}
            values |= {f"sampled_{name}": (numbers[i][0], 1.0) for name, numbers in measured.items()}
            row.setdefault("by_temperature", {})[key] = values


def frontier(rows: list[Row]) -> list[Row]:
    """The sampled metrics and the entropy at every temperature, each with its "temperature", in rising order."""
    points = []
    for temperature, values in _by_temperature(rows):
        point: Row = {"temperature": temperature}
        points.append(point | {name: _ratio([value[name] for value in values])[0] for name in values[0]})
    return points


def _by_temperature(rows: list[Row]) -> list[tuple[float, list[Row]]]:
    """(temperature, each row's values), with those of temperature 1, in rising order."""
    sampled = rows[0].get("by_temperature", {})
    names = ["entropy", *(name for name in rows[0]["values"] if name.startswith("sampled"))]
    at_one = [{name: row["values"][name] for name in names} for row in rows]
    others = [(float(key), [row["by_temperature"][key] for row in rows]) for key in sampled]
    return sorted([(1.0, at_one), *others], key=lambda item: item[0])


def at_equal_entropy(start: list[Row], now: list[Row]) -> Row:
    """What an iterate gained over the start sampled at the temperature at which it has the iterate's entropy.

    Lower temperatures improve sampled metrics without training, so only what is left here has been learned. Between
    its temperatures, the start is the polynomial through all of them.

    Returns: {"temperature": the start's, metric: (change, paired standard error)} for the sampled metrics. The error
    accounts for the noise of both entropies (delta method). {} where the start's temperatures do not reach the entropy.
    """
    temperatures, values = zip(*_by_temperature(start))
    curves = {name: [_ratio([value[name] for value in at]) for at in values] for name in values[0][0]}
    entropies = [entropy for entropy, _ in curves["entropy"]]
    if "entropy" not in now[0]["values"] or any(b <= a for a, b in itertools.pairwise(entropies)):
        return {}  # too few examples to tell the temperatures apart
    entropy, noise = _ratio([row["values"]["entropy"] for row in now])
    if not entropies[0] <= entropy <= entropies[-1]:
        return {}

    def at(entropy: float, points: Sequence[float]) -> float:
        return sum(weight * point for weight, point in zip(interpolation(entropy, entropies), points))

    def noise_of_start(name: str) -> list[float]:
        return [at(entropy, residuals) for residuals in zip(*(residuals for _, residuals in curves[name]))]

    result: Row = {"temperature": at(entropy, temperatures)}
    noise = [a - b for a, b in zip(noise, noise_of_start("entropy"))]
    for name in [name for name in curves if name != "entropy"]:
        curve = [ratio for ratio, _ in curves[name]]
        slope = (at(entropy + 1e-4, curve) - at(entropy, curve)) / 1e-4
        ratio, residuals = _ratio([row["values"][name] for row in now])
        columns = zip(residuals, noise_of_start(name), noise)
        result[name] = (ratio - at(entropy, curve), math.sqrt(sum((a - b - slope * c) ** 2 for a, b, c in columns)))
    return result


def interpolation(place: float, xs: Sequence[float]) -> list[float]:
    """Weights of the values at `xs` that give the polynomial through all of them at one place (Lagrange's formula)."""
    return [math.prod((place - b) / (a - b) for j, b in enumerate(xs) if j != i) for i, a in enumerate(xs)]


def summary(rows: list[Row]) -> Row:
    """Each metric x of `answers`, and x_se, its standard error over examples."""
    result: Row = {}
    for name in rows[0]["values"]:
        values, weights = zip(*(row["values"][name] for row in rows))
        result |= with_se(name, values, weights)
    return result


def changes(before: list[Row], now: list[Row]) -> dict[str, tuple[float, float]]:
    """Each metric's change between two iterates, and its *paired* standard error.

    Both iterates answered the same prompts, so noise that they share cancels: with the residuals
    e_i = (v_i - ratio * w_i) / sum(w) of each, the error is the root of sum (e_i now - e_i before)^2.
    """
    result = {}
    for name in now[0]["values"]:
        ratios, residuals = zip(*(_ratio([row["values"][name] for row in rows]) for rows in (before, now)))
        error = math.sqrt(sum((b - a) ** 2 for a, b in zip(*residuals)))
        result[name] = (ratios[1] - ratios[0], error)
    return result


def _ratio(pairs: Sequence[Sequence[float]]) -> tuple[float, list[float]]:
    """sum(values) / sum(weights), and each example's part of its error, of (value, weight) pairs."""
    values, weights = zip(*pairs)
    total = sum(weights)
    ratio = sum(values) / total
    return ratio, [(v - ratio * w) / total for v, w in pairs]


def better(row: Row, metric: str) -> bool:
    """Whether an iterate's metrics are better than the start's by more than two paired standard errors."""
    change, error = row.get("since_start", {}).get(metric, (0.0, 0.0))
    return sign_of(metric) * change > 2 * error


def sign_of(metric: str) -> int:
    """+1 where a larger value of a metric is better, -1 where a smaller one is, 0 for neither.

    Of the functions of --metric a larger value is better, but for edit_distance.
    """
    return 0 if metric in NEITHER else METRICS.get(metric, -1 if metric.endswith("_edit_distance") else 1)


def name_of(metric: str) -> str:
    """The name of a function of --metric, which may be FILE.py:NAME."""
    return metric.rpartition(":")[2]


def metrics_with(functions: Sequence[str]) -> list[str]:
    """Names of all metrics that a run with these functions of --metric has, but those of NEITHER."""
    return [*METRICS, *(f"{decoding}_{name_of(function)}" for function in functions for decoding in DECODINGS)]


def with_se(name: str, values: Sequence[float], weights: Sequence[float] | None = None) -> Row:
    """The ratio sum(values) / sum(weights) under `name`, and its standard error over examples under `name`_se.

    Without weights the ratio is the mean.
    """
    weights = weights or [1.0] * len(values)
    ratio = sum(values) / sum(weights)
    residual = sum((v - ratio * w) ** 2 for v, w in zip(values, weights))
    return {name: ratio, f"{name}_se": math.sqrt(residual) / sum(weights)}


def nearest_edits(text: str, references: list[str]) -> tuple[int, int]:
    """(edit distance, length) of the reference with the lowest error rate, in whitespace tokens."""
    if text in references:
        return 0, max(len(text.split()), 1)
    words = text.split()
    edits = [(edit_distance(words, r.split()), max(len(r.split()), 1)) for r in references]
    return min(edits, key=lambda e: e[0] / e[1])


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Levenshtein distance: insertions, deletions and substitutions that turn `a` into `b`.

    A column of the table of distances is kept as the bits of integers, which say where it rises or falls by 1 from one
    row to the next, so a column takes a few operations on len(a) bits. Source: Myers 1999, as Hyyro 2001 writes it.
    """
    if not a:
        return len(b)
    places: dict[Hashable, int] = {}
    for i, x in enumerate(a):
        places[x] = places.get(x, 0) | 1 << i
    every, last = (1 << len(a)) - 1, 1 << len(a) - 1
    rises, falls, distance = every, 0, len(a)
    for x in b:
        equal = places.get(x, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        more, less = falls | ~(diagonal | rises) & every, rises & diagonal  # than in the column before
        distance += bool(more & last) - bool(less & last)
        more, less = more << 1 | 1, less << 1
        rises, falls = (less | ~(equal | falls | more)) & every, more & (equal | falls) & every
    return distance


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------- metrics that --metric names


def exact(prompt: str, response: str, references: list[str]) -> float:
    """1 where the response is a reference but for case, white space, and punctuation at the end; else 0."""

    def plain(text: str) -> str:
        return " ".join(text.casefold().split()).rstrip(" .,;:!?")

    return float(plain(response) in map(plain, references))


def edit_distance_rate(prompt: str, response: str, references: list[str]) -> float:
    """Edit distance to the nearest reference over its length, in characters."""
    return min(edit_distance(response, reference) / max(len(reference), 1) for reference in references)


def last_number(prompt: str, response: str, references: list[str]) -> float:
    """1 where the last number of the response is that of a reference, as in GSM8K; 0 where it differs or is missing."""
    wanted = {_last_number(reference) for reference in references} - {None}
    return float(_last_number(response) in wanted)


def _last_number(text: str) -> Decimal | None:
    found = re.findall(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?", text)  # a hyphen behind a digit is no sign
    return Decimal(found[-1].replace(",", "")) if found else None


SHIPPED: dict[str, Metric] = {"exact": exact, "edit_distance": edit_distance_rate, "last_number": last_number}
