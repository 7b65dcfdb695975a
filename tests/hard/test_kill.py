"""Runs that are killed with SIGKILL, which no process can prepare for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import flags, rows, small, small_sft, tree

from methods import seft

PROGRAM = Path(__file__).with_name("kill_and_resume.py")


@pytest.mark.parametrize(
    "seed, script, options",
    [
        (0, "spin", {"unfinished": "cut"}),
        # whose weights wait on disk in scoring, whose responses are drawn from several files
        (2, "family", {"rank": 0, "lr": 1e-3, "alpha": 0.5, "history": 0, "save_minutes": 0.0005,
                       "optimizer": "rmsprop", "loss": "iris", "adaptive_order": True}),
    ],
)  # fmt: skip
def test_killed_at_random_moments_ends_bit_identical(start, data, tmp_path, seed, script, options):
    """SIGKILL in every phase; all files at the end are those of a run that was never stopped."""
    options |= dict(prompts=24, eval_limit=6, micro_tokens=200, shard=12)
    killed = killed_again_and_again(small(start, data, **options), seed, script, tmp_path)
    assert len(killed) >= 13, "of three phases of the start, five of each iteration and one of the end"
    assert {"generate", "score", "train", "evaluate", "finish_iterate", "finish"} <= {name for _, name in killed}


def test_seft_killed_at_random_moments_ends_bit_identical(start, data, tmp_path):
    """A policy that evolves by a reviser's revisions, which has a phase of its own."""
    template, reviser = "{prompt}{response}:", str(tmp_path / "reviser")
    argv = flags(start, data, reviser, beta=None, revise_template=template, rank=0, epochs=4, eval_limit=4)
    assert seft.main(argv) == 0
    options = dict(revise_template=template, reviser=reviser, prompts=24, eval_limit=6, gen_batch=24)
    killed = killed_again_and_again(small_sft(start, data, **options), 3, "seft", tmp_path)
    phases = {"sample_start", "revise", "train", "evaluate", "finish_iterate", "finish"}
    assert phases == {name for _, name in killed}


def killed_again_and_again(argv, seed, script, tmp_path) -> list[tuple[int, str]]:
    """Checks that the killed run ends like the undisturbed one. Returns (round, phase) of every kill."""
    del argv[argv.index("--out") : argv.index("--out") + 2]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(seed), script, *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    killed = [json.loads(line) for line in done.stdout.splitlines()]
    whole, ended = tree(tmp_path / "whole"), tree(tmp_path / "killed")
    # A kill between the last rename and the next write may leave an older line of the same file.
    sums = [
        {line[66:]: line[:64] for line in files.pop("run/checksums").decode().splitlines()} for files in (whole, ended)
    ]
    assert ended == whole and sums[0] == sums[1]
    assert len(rows(tmp_path / "killed/run/metrics.jsonl")) == 3
    assert not any("resume" in name or ".tmp" in name for name in whole)
    return killed
