"""Held-out metrics of an iterate, each with its standard error over examples."""

import math
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
    """Metrics on run.heldout; each x comes with x_se, one standard error over examples.

    greedy, sampled: share of responses equal to one of the references, decoded greedily or sampled at temperature 1.
    greedy_error, sampled_error: edit distance to the nearest reference over its length, in whitespace tokens.
    nll: negative log-probability of the real response, nats a token.
    kl: KL(theta_0 || player), nats a response.
    entropy: minus the log-probability of the responses sampled at temperature 1, nats a response. A model that is only
        sharper samples better too, so compare sampled metrics at equal entropy (docs/evidence.md).
    """
    heldout = run.heldout
    row: Row = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        # The same random numbers for every iterate make the difference between two iterates less noisy.
        responses = run.respond(player, heldout, name, run.seed(0, "evaluate"), temperature)
        texts = [run.text(ids) for ids, _ in responses]
        right = [float(text in example.references) for text, example in zip(texts, heldout)]
        row |= with_se(name, right)
        nearest = [nearest_edits(text, example.references) for text, example in zip(texts, heldout)]
        row |= with_se(f"{name}_error", [float(e) for e, _ in nearest], [float(n) for _, n in nearest])
    # One pass for both: `responses` are now the sampled ones, and the prompt is computed once.
    logps = run.logps(player, [(e.prompt_ids, e.real_ids, ids) for e, (ids, _) in zip(heldout, responses)], "nll")
    row |= with_se("nll", [-real for real, _ in logps], [float(len(e.real_ids)) for e in heldout])
    row |= with_se("entropy", [-sampled for _, sampled in logps])
    now = run.logps(player, start.sequences, "kl")
    return row | with_se("kl", [before - after for before, (after,) in zip(start.logps, now)])


def with_se(name: str, values: list[float], weights: list[float] | None = None) -> Row:
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
