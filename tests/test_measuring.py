"""benchmarks/measuring.py: frontiers, their differences at equal entropy, and the standard errors of those."""

import measuring
import numpy as np
import pytest
from helpers import set_temperature

from evaluate import evaluate, sample_start


def synthetic(rng: np.random.Generator, n: int, better=0.0, hotter=0.0, tie=0.0, steep=0.0):
    """A frontier of six temperatures whose accuracy falls, in a curve, with entropy. Examples differ in both; `tie` is
    the slope between the two over examples, and with `steep` the curve's own slope differs from knot to knot."""
    temperatures = np.linspace(0.5, 1.2, 6)[:, None] + hotter
    noise = rng.normal(size=(6, n)) * 0.5
    entropy = 3 * temperatures**2 + noise
    curve = 0.6 - 0.05 * temperatures**3 - steep * (3 * temperatures**2 - 2) ** 2
    sampled = curve + better + rng.normal(size=(6, n)) * 0.2 + tie * noise
    return np.stack([entropy, sampled, 1 - sampled, entropy / 5], 1)


def lead(mine: np.ndarray, control: np.ndarray) -> np.ndarray:
    return measuring.lead(mine, control, "sampled", measuring.reached(mine, control))


def test_a_frontier_leads_by_what_it_is_better_not_by_being_colder():
    rng = np.random.default_rng(0)
    control = synthetic(rng, 200_000)
    ahead = lead(synthetic(rng, 200_000, 0.03, -0.05), control)
    level = lead(synthetic(rng, 200_000, 0.0, -0.05), control)
    assert ahead.mean() == pytest.approx(0.03, abs=2e-3) and level.mean() == pytest.approx(0.0, abs=2e-3)
    assert not measuring.reached(synthetic(rng, 200, 0.03, 5.0), control[..., :200])


@pytest.mark.parametrize("tie, steep", [(-0.5, 0.0), (0.0, 0.5)])
def test_the_standard_error_of_a_lead_is_its_spread(tie, steep):
    """The spread is over 200 data sets. Both entropies' noise counts: by accuracy's tie to it, by each knot's slope."""
    rng = np.random.default_rng(1)
    frontiers = [[synthetic(rng, 400, 0, hotter, tie, steep) for hotter in (-0.05, 0)] for _ in range(200)]
    values = [lead(*pair) for pair in frontiers]
    errors = [value.std() / np.sqrt(400) for value in values]
    assert np.std([value.mean() for value in values]) == pytest.approx(np.mean(errors), rel=0.1)


def test_linearised_values_have_mean_and_error_of_the_ratio():
    rng = np.random.default_rng(2)
    weights = rng.integers(1, 9, 300).astype(float)
    values = 2 * weights + rng.normal(size=300)
    index = rng.integers(300, size=(4000, 300))
    spread = (values[index].sum(1) / weights[index].sum(1)).std()
    found = measuring.linearised(values, weights)
    assert found.mean() == pytest.approx(values.sum() / weights.sum())
    assert found.std() / np.sqrt(300) == pytest.approx(spread, rel=0.1)


def test_the_frontier_of_a_model(start, data):
    """At temperature 1 a run reports the frontier. A model whose logits are divided has the same frontier elsewhere."""
    player, run = measuring.ruler(str(start), str(data), "--max-new-tokens", "32")
    player.model.load_weights(start)
    row = evaluate(player, sample_start(player, run), run)
    points = measuring.frontier(player, run, (0.8, 1.0))
    assert points.shape == (2, len(measuring.MEASURED), len(run.heldout))
    for name, values in zip(measuring.MEASURED, points[1]):
        assert values.mean() == pytest.approx(row[name], rel=1e-5), name
    set_temperature(player, 0.8)
    np.testing.assert_allclose(measuring.frontier(player, run, (1.0,))[0], points[0], rtol=1e-4, atol=1e-5)


def test_the_overlap_is_the_f1_of_words():
    """Two of three words are two of four in the reference: 2 * 2 / (3 + 4). A word counts as often as both have it."""
    assert measuring.overlap("a b x", ["a b c d"]) == pytest.approx(4 / 7)
    assert measuring.overlap("a a a", ["a b"]) == pytest.approx(2 / 5)
    assert measuring.overlap("a b", ["c", "b a"]) == 1 and measuring.overlap("", ["a"]) == 0
