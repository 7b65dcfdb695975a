"""Held-out metrics of an iterate, each with its standard error over examples."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

# Metric by metric: +1 if a larger value is better, -1 if a smaller one is.
METRICS = {"nll": -1, "greedy": 1, "sampled": 1, "greedy_error": -1, "sampled_error": -1}

Row = dict[str, Any]


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
    nll: negative log-probability of the real response in nats, weighted by its tokens.
    kl: log p_0(y) - log p(y) in nats, of the start's response y: a sample of KL(theta_0 || player).
    """
    heldout = run.heldout
    rows: list[Row] = [{"prompt": e.prompt, "references": e.references, "values": {}, "tokens": {}} for e in heldout]
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        # The same random numbers for every iterate make the difference between two iterates less noisy.
        greedy = name == "greedy"
        responses = run.respond(player, heldout, name, run.seed(0, "evaluate"), temperature, with_logps=greedy)
        for row, example, (ids, _, *logps) in zip(rows, heldout, responses):
            row[name] = text = run.text(ids)
            if greedy and logps:
                row["tokens"]["greedy"] = run.pieces(ids, *logps)
            edits, length = nearest_edits(text, example.references)
            row["values"] |= {
                name: (float(text in example.references), 1.0),
                f"{name}_error": (float(edits), float(length)),
            }
    real = run.logps(player, [(e.prompt_ids, e.real_ids) for e in heldout], "nll", by_token=True)
    now = run.logps(player, start.sequences, "kl")
    for row, example, real_logps, before, (after,) in zip(rows, heldout, real, start.logps, now):
        row["values"] |= {"nll": (-math.fsum(real_logps), float(len(example.real_ids))), "kl": (before - after, 1.0)}
        if len(real_logps) == len(example.real_ids):
            row["tokens"]["real"] = run.pieces(example.real_ids, real_logps)
    return rows


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
    return METRICS[metric] * change > 2 * error


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


def edit_distance(a: list[str], b: list[str]) -> int:
    """Levenshtein distance: insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
