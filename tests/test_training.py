"""runtime/training.py: checkpoints of training, steps whose loss or gradient is not finite; the loss of sft.py."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import begin, die_at, failed, flags, rows, small, spy

import sft
import spin
from runtime.folder import Folder
from runtime.run import Run
from runtime.training import Training

FIVE = dict(prompts=40, batch=8, eval_limit=2, eval_temperatures=1)  # a run of five steps


def test_a_trained_player_is_not_trained_again(start, data, here, monkeypatch):
    """A checkpoint follows the last step, however long --save-minutes is; a finished iterate's are removed."""
    argv = small(start, data, save_minutes=1000)
    die_at(Run, "evaluate", argv, lambda run, player: run.iterate == 2)
    assert [p.name for p in sorted((here / "run/resume").iterdir())] == ["iterate-0", "iterate-2"]
    monkeypatch.setattr(Training, "step", None)
    assert spin.main(argv) == 0


def test_every_epoch_has_all_items_in_an_order_of_its_own():
    def order(t: int) -> list[list[int]]:
        args = SimpleNamespace(epochs=(2, 2), batch=7)
        training = SimpleNamespace(args=args, items=range(20), t=t, seed=lambda t, purpose: t)
        indices = torch.cat(list(Training._order(training))).tolist()
        return [indices[:20], indices[20:]]

    epochs = order(0) + order(1)
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(map(tuple, [*epochs, range(20)]))) == 5 and order(0) == epochs[:2]


def test_signals_are_means_over_the_last_tenth_of_the_steps_that_were_taken():
    log = [{"iteration": 0, "step": n, "loss": float(n), "skipped": n % 2 == 1} for n in range(40)]
    assert Training.signals(SimpleNamespace(log=log)) == {"loss": (36 + 38) / 2, "skipped": 20}


@pytest.mark.parametrize("save_minutes, checkpoints", [(0, 5), (1000, 1)])
def test_checkpoints_follow_every_step_or_the_last_one(start, data, tmp_path, monkeypatch, save_minutes, checkpoints):
    """The log on disk is never behind the checkpoint. Dropout draws other numbers in every step."""
    logs, seeds = [], []

    def look(args, _):
        folder, _, _, steps = args
        log = rows(folder.path / "steps-0.jsonl")
        assert log == steps
        logs.append(len(log))

    spy(monkeypatch, Folder, "save_training", look)
    spy(monkeypatch, Training, "step", lambda *args: seeds.append(torch.initial_seed()))
    assert spin.main(flags(start, data, tmp_path / "run", save_minutes=save_minutes, **FIVE)) == 0
    assert logs == [1, 2, 3, 4, 5][-checkpoints:] and len({*seeds}) == 5


def test_three_steps_that_are_not_finite_stop_the_run(start, data, tmp_path, capsys):
    """A first step that makes all weights huge makes the second step's loss NaN. What was written before stays."""
    diverge = dict(rank=0, lr=1e3, weight_decay=1e30, warmup=0, **FIVE)
    error = failed(flags(start, data, tmp_path / "out", **diverge), capsys, 1)
    assert "iteration 0, steps 2 to 4 of 5: loss or gradient is not finite" in error
    assert not (tmp_path / "out/iterate-1").exists()
    steps = rows(tmp_path / "out/steps-0.jsonl")
    assert [step["skipped"] for step in steps] == [False, True, True, True], "the way there is logged"
    assert steps[-1]["loss"] is None, "NaN is not JSON"
    assert len(rows(tmp_path / "out/metrics.jsonl")) == 1


def test_a_run_of_fewer_steps_none_of_which_is_finite_stops_too(start, data, tmp_path, capsys, monkeypatch):
    real = spin.pair_loss
    monkeypatch.setattr(spin, "pair_loss", lambda *args: (values := real(*args)) | {"loss": values["loss"] * math.nan})
    error = failed(flags(start, data, tmp_path / "out", **FIVE | dict(prompts=16)), capsys, 1)
    assert "iteration 0, steps 1 to 2 of 2: loss or gradient is not finite" in error


def test_one_step_that_is_not_finite_is_skipped_and_counted(start, data, tmp_path, capsys, monkeypatch):
    """The weights stay as they were, the next step starts from there, and a warning counts it."""
    weights, real = [], spin.pair_loss

    def spoiled(player, *args):
        weights.append(next(p for p in player.model.parameters() if p.requires_grad).detach().clone())
        values = real(player, *args)
        return values | {"loss": values["loss"] * (math.nan if len(weights) == 2 else 1)}

    monkeypatch.setattr(spin, "pair_loss", spoiled)
    assert spin.main(flags(start, data, tmp_path / "out", micro_tokens=10**6, **FIVE)) == 0
    steps = rows(tmp_path / "out/steps-0.jsonl")
    assert [step["skipped"] for step in steps] == [False, True, False, False, False]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3])
    assert "steps skipped, since their loss or gradient was not finite: 1" in capsys.readouterr().err
    row = rows(tmp_path / "out/metrics.jsonl")[-1]
    assert row["skipped"] == 1 and row["loss"] == steps[-1]["loss"]


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


def test_a_tie_counts_as_wrong():
    """accuracy is the share of margins above 0, so it is 0 if all margins are 0."""
    player = SimpleNamespace(device="cpu", response_logps=lambda items: torch.zeros(2, len(items)))
    pair = spin.Pair([1], [2], [[3]], True, "", 0.0, [0.0])
    values = spin.pair_loss(player, [pair], 1.0)
    assert (values["margin"].item(), values["accuracy"].item()) == (0.0, 0.0)
