"""sft.py: supervised fine-tuning minimises the loss that it logs."""

import pytest
from helpers import begin, flags, rows

import sft


def test_sft_minimises_the_mean_token_loss(start, data, tmp_path):
    """The logged loss of the first step is the NLL of its batch over the mean length; training lowers held-out NLL."""
    out = tmp_path / "run"
    assert sft.main(flags(start, data, out, rank=0, epochs=5, lr=1e-2, batch=500, beta=None)) == 0
    player, examples, _ = begin(start, data, tmp_path / "again", command="sft", rank=0, beta=None)
    logps = [logp for (logp,) in player.logps([(e.prompt_ids, e.real_ids) for e in examples])]
    tokens = sum(len(e.real_ids) for e in examples)
    assert rows(out / "steps-0.jsonl")[0]["loss"] == pytest.approx(-sum(logps) / tokens, rel=1e-5)
    before, after = rows(out / "metrics.jsonl")
    assert after["nll"] < before["nll"] - 0.1
