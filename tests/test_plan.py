"""runtime/plan.py: memory and disk by arithmetic, what is refused for lack of them, and the plan of --dry-run."""

import shutil

import pytest
import torch
from helpers import begin, flags, small, small_sft

import sft
import spin
from runtime import plan
from runtime.plan import duration, gib
from sampling import KVCache

FREE = shutil._ntuple_diskusage(10**6, 10**6, 1000)  # total, used, free


# ---------------------------------------------------------------- needs


def test_needs_on_hand_computed_numbers():
    """A model of 100 parameters, 60 of them trained, 3 iterations of 50 tokens; two layers, one with a window."""
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Parameter(torch.zeros(60)), torch.nn.Parameter(torch.zeros(40), requires_grad=False)
    model.config = type("Config", (), dict(hidden_size=8, window_size=4, attention_layers=["global", "local"]))
    settings = dict(optimizer_slots=2, cache_tokens=100, batch_size=5, row_tokens=10, iterations=3, pair_tokens=50)
    got = plan.needs(model, bf16=False, **settings)
    cache = 5 * (10 + 4) * 2 * 8
    assert got[:4] == (100, 60, 400 + 60 * 3 * 4, 400 + cache * 4)
    assert got.disk == 3 * (240 + 600) + 2 * 400 + 2 * 60 * 3 * 4 + 600
    assert got.optimizer == 60 * 2 * 4
    assert plan.needs(model, bf16=True, **settings)[2:4] == (240 + 80 + 720, 240 + 80 + 120 + cache * 2)
    more = plan.needs(model, bf16=False, **settings, keeps_responses=True, swaps_weights=True)
    assert more.disk == got.disk + 3 * 600 + 400
    assert more[:4] == got[:4]


def test_disk_that_a_run_may_use_is_free_space_and_its_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: FREE)
    (tmp_path / "x").write_bytes(b"x" * 24)
    assert plan.disk_left_for(tmp_path) == 1024 and plan.disk_left_for(tmp_path / "none") == 1000


def test_needs_are_what_a_run_holds(start, data, tmp_path):
    """Weights, gradients, optimizer state and cache, to the byte; the disk, as an upper bound that is not far off."""
    for rank, optimizer in ((0, "adamw"), (4, "rmsprop")):
        player, examples, run = begin(start, data, tmp_path / str(rank), rank=rank, optimizer=optimizer)
        parameters = [p for p in player.model.parameters() if p.requires_grad]
        player.response_logps([(e.prompt_ids, e.real_ids) for e in examples[:4]]).sum().backward()
        adam = spin.make_optimizer(parameters, run.args)
        adam.step()
        weights = sum(p.numel() * 4 for p in player.model.parameters())
        state = sum(v.numel() * 4 for state in adam.state.values() for v in state.values() if v.dim())
        assert run.needs.training == weights + sum(p.grad.numel() * 4 for p in parameters) + state
        assert run.needs.optimizer == state
        assert run.needs.parameters == sum(p.numel() for p in player.model.parameters())
        assert run.needs.trained == sum(p.numel() for p in parameters)
        everything = examples + run.heldout
        room = max(len(e.prompt_ids) for e in everything) + run.args.max_new_tokens
        cache = KVCache(player.model, min(64, len(everything)), room)
        assert run.needs.generation == weights + sum(t.numel() * 4 for t in (*cache.keys, *cache.values))
        out = tmp_path / str(rank)
        assert spin.main(flags(start, data, out, rank=rank, optimizer=optimizer)) == 0
        used = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        assert used / 4 < run.needs.disk, "the tokenizer, the tables and the headers are small for real models only"


def test_too_little_disk_or_memory_is_an_error_before_anything_is_loaded(start, data, here, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(plan.shutil, "disk_usage", lambda path: FREE)
        assert spin.main(small(start, data)) == 2
    error = capsys.readouterr().err
    assert "--out run: the run may need" in error and "0 MiB are free" in error
    monkeypatch.setattr(plan, "memory_of", lambda device: 10_000)
    assert spin.main(small(start, data)) == 2
    assert "training needs more than" in capsys.readouterr().err
    monkeypatch.setattr(plan, "memory_of", lambda device: 10**5)
    assert spin.main(small(start, data, gen_batch=64)) == 2
    assert "lower --gen-tokens or --gen-batch" in capsys.readouterr().err
    assert not list(here.iterdir())


# ---------------------------------------------------------------- the plan


def test_every_run_begins_with_its_plan(start, data, here, capsys):
    """Without times, which only a rehearsal knows; and with what the command line says otherwise than its recipe."""
    (here / "a.args").write_text("--lr 1e-3 --checkpoint --seed 0")
    argv = ["@a.args", *small(start, data, lr=1e-2, iterations=1, seed=0), "--no-checkpoint"]
    assert spin.main(argv) == 0
    plan, _, rest = capsys.readouterr().out.partition("\n\n")
    assert "68 examples to train on, 12 held out" in plan and "steps: 5" in plan and "training " in plan
    assert "\ntime        told as soon as" in plan and "iterate 0" in rest and "iterate 0" not in plan
    assert plan.splitlines()[-1] == "options     --lr 0.01 (recipe: 0.001), --no-checkpoint (recipe: --checkpoint)"


def test_dry_run_prints_the_plan_and_writes_nothing(start, data, here, capsys):
    assert spin.main(small(start, data, dry_run=True, beta="1,2", rank=0, epochs="1,3")) == 0
    printed = capsys.readouterr().out
    for text in (
        "parameters", "(all parameters)", "68 examples to train on, 12 held out", "steps: 5, 27", "memory", "disk",
        "an iteration if responses are as long as the real ones (generate", "longer than --max-new-tokens 8",
    ):  # fmt: skip
        assert text in printed, printed
    assert not list(here.iterdir())
    assert sft.main(small_sft(start, data, dry_run=True)) == 0
    assert "generate" not in capsys.readouterr().out
    assert spin.main(small(start, data, dry_run=True, batch=0)) == 2
    assert not list(here.iterdir())


@pytest.mark.parametrize("command", ["spin", "sft"])
def test_rehearsal_measures_every_phase_and_leaves_the_weights_as_they_are(start, data, here, command):
    """Seconds a token are positive, the peak of memory is above the weights; no gradient stays."""
    beta = 1.0 if command == "spin" else None
    player, examples, run = begin(start, data, "run", command, beta=beta, gen_batch=4)
    before = [p.detach().clone() for p in player.model.parameters()]
    seconds, peak = plan.rehearse(player, examples, run)
    assert seconds.keys() == {"generate", "score", "train"} and all(s > 0 for s in seconds.values())
    assert peak > run.needs.optimizer + sum(p.numel() * 4 for p in before)
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(player.model.parameters(), before))
    assert not list(here.iterdir())


def test_times_of_the_plan_add_up(start, data, tmp_path):
    """Token by token: each prompt generated once, scored twice with --alpha, trained on once and then three times.

    No generated response is longer than --max-new-tokens, as some real ones are.
    """
    options = dict(rank=0, alpha=0.5, epochs="1,3", iterations=2, mix_previous=True, eval_limit=4, max_new_tokens=5)
    _, examples, run = begin(start, data, tmp_path / "run", command="family", **options)
    text = plan.describe(examples, run, (), {"generate": 0.1, "score": 0.01, "train": 0.02}, peak=2**31)
    real = sum(len(e.real_ids) for e in examples)
    prompts = sum(len(e.prompt_ids) for e in examples)
    written = sum(min(len(e.real_ids), 5) for e in examples)
    assert written < 0.9 * real
    pair = prompts + real + written
    expected = {
        "generate": 0.1 * written,
        "score": 2 * 0.01 * (pair + 2 * pair) / 2,  # pairs of the previous iteration from the second on
        "train": 0.02 * (pair + 3 * 2 * pair) / 2,
        "evaluate": 2 * 4 * (0.1 * written + 0.01 * (prompts + real)) / len(examples),
    }
    for phase, seconds in expected.items():
        assert f"{phase} {duration(seconds)}" in text
    assert f"about {duration(sum(expected.values()))} an iteration" in text
    assert "about 2.0 GiB of" in text and f"{run.needs.parameters:,} parameters" in text


def test_sizes_and_durations_are_written_in_units_of_their_size():
    assert [gib(n) for n in (0, 10 * 2**20, 2**29, 3 * 2**30)] == ["0 MiB", "10 MiB", "0.5 GiB", "3.0 GiB"]
    assert [duration(s) for s in (0.4, 119, 120, 7199, 7200)] == ["0 s", "119 s", "2 min", "120 min", "2.0 h"]
