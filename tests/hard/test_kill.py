"""Runs that are killed with SIGKILL, which no process can prepare for."""

import random

import pytest
from helpers import flags, rows, small, small_sft, tree

from examples import seft


@pytest.mark.parametrize(
    "seed, script, options",
    [
        (0, "spin", {"unfinished": "cut"}),
        # Weights wait on disk in scoring; responses are drawn from several files.
        (1, "family", {"rank": 0, "lr": 1e-3, "alpha": 0.5, "history": 0, "save_minutes": 0.0005,
                       "optimizer": "rmsprop", "loss": "iris", "adaptive_order": True}),
        (2, "seft", {"revise_template": "{prompt}{response}:"}),
    ],
)  # fmt: skip
def test_killed_at_random_moments_ends_bit_identical(launch, start, data, tmp_path, seed, script, options):
    """SIGKILL hits a run from the first file to the last ones; all files at the end are those of an undisturbed run.

    The moments are calls: of writes and renames, of checkpoints, of steps of sampling, of scoring and of training.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    options = dict(batch=16, gen_batch=32, micro_tokens=200, shard=12) | options
    if script == "seft":
        options["reviser"] = str(tmp_path / "reviser")
        reviser = dict(beta=None, rank=0, epochs=4, eval_limit=4, revise_template=options["revise_template"])
        assert seft.main(flags(start, data, options["reviser"], **reviser)) == 0
    argv = (small_sft if script == "seft" else small)(start, data, **options)
    world = launch(argv, [whole], script)
    assert world.codes == [0], world.err
    rng, deaths, metrics = random.Random(seed), [], killed / "run/metrics.jsonl"
    while deaths[-1:] != [3]:  # Iterates that were evaluated before each death, of which the last one is in the end.
        death = {"die": [0, rng.randint(1, world.moments[0] // 5)], "die_in": ["finish", 0, 1]}
        assert launch(argv, [killed], script, **death).codes == [-9]
        deaths.append(len(rows(metrics)) if metrics.exists() else 0)
    for moment in (2, 5):
        assert launch(argv, [killed], script, die=[0, moment]).codes == [-9]
    assert {0, 1, 2} < {*deaths} and len(deaths) > 6, deaths
    assert launch(argv, [killed], script).codes == [0]
    assert tree(killed) == tree(whole)
    assert not any("resume" in name or ".tmp" in name for name in tree(whole))
