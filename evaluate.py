"""Held-out metrics of a player with their standard errors, and the table of all columns that a run reports.

This module imports nothing else of this repository: what it asks of a run is the protocol `Run` below.
"""

import itertools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple, Protocol

Row = dict[str, Any]
Metric = Callable[[str, str, list[str]], float]  # a function of --metric: (prompt, response, references) -> number
DECODINGS = {"greedy": 0.0, "sampled": 1.0}  # the ways in which every iterate responds, with their temperatures


class Column(NamedTuple):
    """A number that a run reports by iterate or by step."""

    name: str  # its key in metrics.jsonl or steps-<t>.jsonl
    kind: str  # "metric" on held-out prompts, "signal" of training, "step" if shown by step only, or "key" of a row
    format: str
    better: int = 0  # 1 if a larger value is better, -1 if a smaller one is, 0 if neither is
    label: str = ""  # its name on the report page; default: `name` with spaces


COLUMNS = {
    column.name: column
    for column in (
        Column("iterate", "key", "d"),
        Column("temperature", "key", ".2f"),
        Column("greedy", "metric", ".1%", 1, "greedy accuracy"),
        Column("sampled", "metric", ".1%", 1, "sampled accuracy"),
        Column("greedy_error", "metric", ".1%", -1),
        Column("sampled_error", "metric", ".1%", -1),
        Column("nll", "metric", ".4f", -1, "NLL"),
        Column("kl", "metric", ".2f", 0, "KL"),
        Column("entropy", "metric", ".2f"),
        Column("pairs", "signal", "d"),
        Column("identical", "signal", "d"),
        Column("truncated", "signal", ".2%"),
        Column("real_length", "signal", ".1f"),
        Column("generated_length", "signal", ".1f"),
        Column("loss", "signal", ".4f"),
        Column("margin", "signal", ".3f"),
        Column("accuracy", "signal", ".1%"),
        Column("real_logp", "signal", ".3f"),
        Column("generated_logp", "signal", ".3f"),
        Column("grad_norm", "signal", ".2f"),
        Column("lr", "step", ".3g"),
    )
}


def column(name: str) -> Column:
    """The column of any name. One that the table lacks comes from a function of --metric or from another method."""
    function = name.partition("_")[2]
    better = -1 if function == "edit_distance" else 1
    return COLUMNS.get(name) or Column(name, "metric", ".1%" if function in SHIPPED else ".3f", better)


def name_of(metric: str) -> str:
    """The name of a function of --metric, which may be given as FILE.py:NAME."""
    return metric.rpartition(":")[2]


def metrics_with(functions: Sequence[str]) -> list[str]:
    """Names of the metrics with a better direction, in a run that has these functions of --metric."""
    ours = [name for name, column in COLUMNS.items() if column.kind == "metric" and column.better]
    return ours + [f"{decoding}_{name_of(function)}" for function in functions for decoding in DECODINGS]


class Run(Protocol):
    """What evaluation asks of a run, which asks the player, and keeps the answers under `name` for a resumed run."""

    args: Any  # its eval_temperatures are read
    heldout: Sequence[Any]  # examples with `prompt`, `references`, `prompt_ids` and `real_ids`
    metrics: Mapping[str, Metric]  # the functions of --metric

    # Gives (ids, whether the response ended) per example, and log p of each token in nats if `with_logps`.
    def respond(self, player, examples, name, seed, temperature=1.0, *, with_logps=False) -> list[tuple]: ...
    # Gives [log p of the response], in nats, per item (prompt ids, response ids), or log p of each of its tokens.
    def logps(self, player, items, name, temperature=1.0, by_token=False) -> list[list[float]]: ...
    # Gives the values of a function of --metric per row, one for each decoding.
    def measure(self, name, rows, decodings=tuple(DECODINGS), where="") -> list[list[float]]: ...
    def seed(self, t: int, purpose: str) -> int: ...
    def text(self, ids: list[int]) -> str: ...
    def pieces(self, ids: list[int], logps: Sequence[float]) -> list[tuple[str, float]]: ...  # (text, log p) of tokens


class StartSamples(NamedTuple):
    """Responses that theta_0 sampled to the held-out prompts, and its log-probabilities of them in nats.

    They estimate KL(theta_0 || theta_t) = E[log p_0(y) - log p_t(y)] over y ~ theta_0 without a second model.
    """

    sequences: list[tuple[list[int], list[int]]]  # (prompt ids, response ids)
    logps: list[float]


def sample_start(player: Any, run: Run) -> StartSamples:
    """Lets the player, which must be theta_0, respond to the held-out prompts."""
    responses = run.respond(player, run.heldout, "start", run.seed(0, "kl"))
    sequences = [(e.prompt_ids, ids) for e, (ids, _) in zip(run.heldout, responses)]
    return StartSamples(sequences, [logp for (logp,) in run.logps(player, sequences, "start-logps")])


def evaluate(player: Any, start: StartSamples, run: Run) -> Row:
    """Metrics of the player on run.heldout, as `summary` returns them."""
    return summary(answers(player, start, run))


def answers(player: Any, start: StartSamples, run: Run) -> list[Row]:
    """How the player responds to each held-out prompt: the rows of heldout-<t>.jsonl.

    A row has "prompt", "references", the texts "greedy" and "sampled", and "values": for each metric (value, weight).
    The metric is sum(values) / sum(weights) over all rows. "tokens" holds the greedy and the real response in pieces
    with their log-probabilities, which come from passes that the metrics need anyway.

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
        for row, (ids, _, logps) in zip(rows, responses):
            row[name] = run.text(ids)
            if name == "greedy":
                row["tokens"]["greedy"] = run.pieces(ids, logps)
            else:
                row["values"]["entropy"] = (-math.fsum(logps), 1.0)
            row["values"] |= graded(name, row[name], row["references"])
    real = run.logps(player, [(e.prompt_ids, e.real_ids) for e in heldout], "nll", by_token=True)
    now = run.logps(player, start.sequences, "kl")
    for row, example, real_logps, before, (after,) in zip(rows, heldout, real, start.logps, now):
        row["values"] |= {"nll": (-math.fsum(real_logps), float(len(example.real_ids))), "kl": (before - after, 1.0)}
        row["tokens"]["real"] = run.pieces(example.real_ids, real_logps)
    for name in run.metrics:
        for row, values in zip(rows, run.measure(name, rows)):
            row["values"] |= {f"{decoding}_{name}": (value, 1.0) for decoding, value in zip(DECODINGS, values)}
    return rows


def graded(decoding: str, text: str, references: list[str]) -> dict[str, tuple[float, float]]:
    """(value, weight) of the two metrics that compare a response with the references."""
    edits, length = nearest_edits(text, references)
    return {decoding: (float(text in references), 1.0), f"{decoding}_error": (float(edits), float(length))}


def add_temperatures(player: Any, rows: list[Row], run: Run) -> None:
    """Samples at the temperatures of --eval-temperatures, too, and adds the results to the rows of `answers`.

    "by_temperature" maps a temperature, as text, to the values of the sampled metrics and of the entropy.
    """
    for temperature in sorted({*run.args.eval_temperatures} - {1.0}):
        key = f"{temperature:g}"
        responses = run.respond(player, run.heldout, f"sampled-{key}", run.seed(0, "evaluate"), temperature)
        items = [(e.prompt_ids, ids) for e, (ids, _) in zip(run.heldout, responses)]
        logps = run.logps(player, items, f"entropy-{key}", temperature)
        sampled = [row | {"sampled": run.text(ids)} for row, (ids, _) in zip(rows, responses)]
        measured = {name: run.measure(name, sampled, ("sampled",), f"-{key}") for name in run.metrics}
        for i, (row, answer, (logp,)) in enumerate(zip(rows, sampled, logps)):
            values = graded("sampled", answer["sampled"], row["references"]) | {"entropy": (-logp, 1.0)}
            values |= {f"sampled_{name}": (numbers[i][0], 1.0) for name, numbers in measured.items()}
            row.setdefault("by_temperature", {})[key] = values


# ---------------------------------------------------------------- means, standard errors, equal entropy


def ratio_of(pairs: Iterable[Sequence[float]]) -> tuple[float, float, list[float]]:
    """sum(values) / sum(weights) over the examples' (value, weight), with its standard error.

    The third value is each example's part of the error, which is the root of the sum of their squares.
    """
    values, weights = zip(*pairs)
    total = sum(weights)
    ratio = sum(values) / total
    deviations = [v - ratio * w for v, w in zip(values, weights)]
    return ratio, math.sqrt(sum(d**2 for d in deviations)) / total, [d / total for d in deviations]


def summary(rows: list[Row]) -> Row:
    """Each metric x of `answers`, and x_se, its standard error over examples; "examples" is their number."""
    result: Row = {"examples": len(rows)}
    for name in rows[0]["values"]:
        result[name], result[f"{name}_se"], _ = ratio_of(row["values"][name] for row in rows)
    return result


def changes(before: list[Row], now: list[Row]) -> dict[str, tuple[float, float]]:
    """Each metric's change between two iterates, and its *paired* standard error.

    Both iterates answered the same prompts, so noise that they share cancels: the error is the root of
    sum (e_i now - e_i before)^2, where e_i is an example's part of the error of either ratio.
    """
    result = {}
    for name in now[0]["values"]:
        (old, _, old_parts), (new, _, parts) = (ratio_of(row["values"][name] for row in rows) for rows in (before, now))
        result[name] = (new - old, math.sqrt(sum((b - a) ** 2 for a, b in zip(old_parts, parts))))
    return result


def verdict(row: Row, metric: str) -> int:
    """1 if an iterate is better than the start, -1 if it is worse, 0 if the change may be noise or has no direction.

    If the error is 0 up to rounding, all examples changed alike, which says nothing about other prompts.
    """
    change, error = row.get("since_start", {}).get(metric, (0.0, 0.0))
    if not significant_errors(row.get("examples", math.inf)) * error < abs(change) < 1e9 * error:
        return 0
    return column(metric).better * (1 if change > 0 else -1)


def significant_errors(examples: float) -> float:
    """How many standard errors a change must exceed to be more than noise: 2 with many examples, inf with one.

    It is the quantile of Student's t with examples - 1 degrees of freedom that noise exceeds in 4.55% of all cases, as
    a normal variable exceeds 2. Source: the expansion of Fisher and Cornish 1960 to the fourth order; the fifth term
    makes one degree exact, and the others are within 0.4%.
    """
    if examples < 2:
        return math.inf
    freedom = examples - 1
    quantile = 2 + sum(c / freedom**n for n, c in enumerate((2.5, 3.0625, 2.8594, 1.8441, 1.7017), 1))
    return quantile * math.sqrt(1 + 1 / freedom)  # The errors of `ratio_of` divide by n, those of Student by n - 1.


def best_of(rows: Sequence[Row], metric: str) -> int:
    """Number of the best iterate by a metric, among those that are better than the start; 0 if none is."""
    improved = [row for row in rows if verdict(row, metric) > 0]
    return max(improved, key=lambda row: column(metric).better * row[metric])["iterate"] if improved else 0


def frontier(rows: list[Row]) -> list[Row]:
    """The sampled metrics and the entropy at every temperature, each with its "temperature", in rising order."""
    return [
        {"temperature": temperature} | {name: ratio for name, (ratio, *_) in ratios.items()}
        for temperature, ratios in by_temperature(rows)
    ]


def by_temperature(rows: list[Row]) -> list[tuple[float, dict[str, tuple]]]:
    """(temperature, `ratio_of` the entropy and each sampled metric) in rising order, temperature 1 included."""
    names = ["entropy", *(name for name in rows[0]["values"] if name.startswith("sampled"))]
    values = {1.0: [{name: row["values"][name] for name in names} for row in rows]}
    for key in rows[0].get("by_temperature", {}):
        values[float(key)] = [row["by_temperature"][key] for row in rows]
    return [(t, {name: ratio_of(row[name] for row in values[t]) for name in values[t][0]}) for t in sorted(values)]


def at_equal_entropy(start: list[Row], now: list[Row]) -> Row:
    """How much better an iterate is than the start sampled at the temperature that gives it the iterate's entropy.

    A lower temperature improves sampled metrics without training, so only what is left here has been learned. Between
    its temperatures, the start's metric is the polynomial f(x) = sum_k L_k(x) y_k through all of them, where y_k is the
    metric and e_k the entropy at temperature k, and the L_k are the weights of `interpolation`.

    The change of an iterate with metric y and entropy x is y - f(x). A point whose entropy moves by de_k changes f(x)
    like one whose metric moves by -f'(e_k) de_k, so the squared standard error is, to first order in the noise,

        sum over examples of [dy - f'(x) dx - sum_k L_k(x) (dy_k - f'(e_k) de_k)]^2

    where dy, dx, dy_k and de_k are an example's parts of the errors of y, x, y_k and e_k (see `ratio_of`).

    Returns: {"temperature": the start's, metric: (change, paired standard error)} for the sampled metrics. The result
    is {} if the start's temperatures do not reach the iterate's entropy.
    """
    temperatures, ratios = zip(*by_temperature(start))
    entropies, _, entropy_parts = zip(*(ratio["entropy"] for ratio in ratios))
    entropy, _, own_entropy_parts = ratio_of(row["values"]["entropy"] for row in now)
    # With few examples the entropies may be out of order.
    told_apart = all(a < b for a, b in itertools.pairwise(entropies))
    if not told_apart or not entropies[0] <= entropy <= entropies[-1]:
        return {}

    def at(place: float, points: Sequence[float]) -> float:
        return sum(weight * point for weight, point in zip(interpolation(place, entropies), points))

    step = 1e-4 * (entropies[-1] - entropies[0]) or 1.0  # The slopes are central differences over it.
    weights = interpolation(entropy, entropies)
    result: Row = {"temperature": at(entropy, temperatures)}
    for name in [name for name in ratios[0] if name != "entropy"]:
        points, _, parts = zip(*(ratio[name] for ratio in ratios))
        slope, *slopes = [(at(x + step, points) - at(x - step, points)) / (2 * step) for x in (entropy, *entropies)]
        value, _, own_parts = ratio_of(row["values"][name] for row in now)
        errors = [dy - slope * dx for dy, dx in zip(own_parts, own_entropy_parts)]
        for weight, slope, dys, des in zip(weights, slopes, parts, entropy_parts):
            errors = [error - weight * (dy - slope * de) for error, dy, de in zip(errors, dys, des)]
        result[name] = (value - at(entropy, points), math.sqrt(sum(error**2 for error in errors)))
    return result


def interpolation(place: float, xs: Sequence[float]) -> list[float]:
    """Weights of the values at `xs` that give the polynomial through all of them at one place (Lagrange's formula)."""
    return [math.prod((place - b) / (a - b) for j, b in enumerate(xs) if j != i) for i, a in enumerate(xs)]


# ---------------------------------------------------------------- edit distance, and the metrics that ship


def nearest_edits(text: str, references: list[str]) -> tuple[int, int]:
    """(edit distance, length) of the reference with the lowest error rate, in whitespace tokens."""
    edits = [(edit_distance(text.split(), r.split()), max(len(r.split()), 1)) for r in references]
    return min(edits, key=lambda e: e[0] / e[1])


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Levenshtein distance: insertions, deletions and substitutions that turn `a` into `b`.

    A column of the table of distances is kept as the bits of two integers, which say where it rises or falls by 1 from
    one row to the next, so a column takes a few operations on len(a) bits. Source: Myers 1999, as Hyyro 2001 writes it.
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
        more, less = falls | ~(diagonal | rises) & every, rises & diagonal  # more or less than in the column before
        distance += bool(more & last) - bool(less & last)
        more, less = more << 1 | 1, less << 1
        rises, falls = (less | ~(equal | falls | more)) & every, more & (equal | falls) & every
    return distance


def exact(prompt: str, response: str, references: list[str]) -> float:
    """1 if the response is a reference up to case, white space, and punctuation at the end, else 0."""

    def plain(text: str) -> str:
        return " ".join(text.casefold().split()).rstrip(" .,;:!?")

    return float(plain(response) in map(plain, references))


def edit_distance_rate(prompt: str, response: str, references: list[str]) -> float:
    """Edit distance to the nearest reference divided by its length, in characters."""
    return min(edit_distance(response, reference) / max(len(reference), 1) for reference in references)


def last_number(prompt: str, response: str, references: list[str]) -> float:
    """1 if the last number of the response is that of a reference, as in GSM8K; 0 if it differs or is missing."""
    wanted = {_last_number(reference) for reference in references} - {None}
    return float(_last_number(response) in wanted)


def _last_number(text: str) -> Decimal | None:
    found = re.findall(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?", text)  # a hyphen after a digit is no sign
    return Decimal(found[-1].replace(",", "")) if found else None


SHIPPED: dict[str, Metric] = {"exact": exact, "edit_distance": edit_distance_rate, "last_number": last_number}
