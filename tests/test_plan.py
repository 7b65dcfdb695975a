"""runtime/plan.py: what is refused for lack of memory or disk, and what --dry-run says."""

import itertools
import shutil

import pytest
from helpers import SCRIPTS, begin, refused, small, small_sft

import spin
from runtime import plan, progress

FREE = shutil._ntuple_diskusage(10**6, 10**6, 1000)  # total, used, free


def test_disk_that_a_run_may_use_is_free_space_and_its_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: FREE)
    (tmp_path / "x").write_bytes(b"x" * 24)
    assert plan.disk_left_for(tmp_path) == 1024 and plan.disk_left_for(tmp_path / "none") == 1000


@pytest.mark.parametrize("rank, optimizer, slots", [(0, "adamw", 2), (4, "rmsprop", 1)])
def test_memory_is_refused_at_the_byte_that_weights_gradients_and_optimizer_need(
    start, data, tmp_path, monkeypatch, rank, optimizer, slots
):
    """The bytes are counted on a model with gradients, and are the limit below which the plan refuses to begin."""
    player, examples, run = begin(start, data, tmp_path / "run", rank=rank, optimizer=optimizer)
    trained = [p for p in player.model.parameters() if p.requires_grad]
    player.response_logps([(e.prompt_ids, e.real_ids) for e in examples[:4]]).sum().backward()
    needed = sum(p.numel() * 4 for p in player.model.parameters()) + sum(p.grad.numel() * 4 for p in trained)
    needed += slots * sum(p.numel() * 4 for p in trained)
    assert run.record["parameters"] == [sum(p.numel() for p in some) for some in (player.model.parameters(), trained)]
    monkeypatch.setattr(plan, "memory_of", lambda device: needed)
    plan.check(player.model, run.args, examples, run.device, start)
    monkeypatch.setattr(plan, "memory_of", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"training needs more than .* of memory, cpu has .*--rank 16 trains adapters"):
        plan.check(player.model, run.args, examples, run.device, start)


def test_too_little_disk_is_an_error_before_anything_is_written(start, data, here, capsys, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: FREE)
    error = refused(small(start, data), here / "run", capsys)
    assert "--out run: the run may need" in error and "0 MiB are free" in error


def test_disk_is_an_upper_bound_of_what_a_run_writes(start, data, here, monkeypatch):
    player, examples, run = begin(start, data, here / "again", rank=0, iterations=2)
    assert spin.main(small(start, data, rank=0, lr=1e-3, prompts=16)) == 0
    used = sum(p.stat().st_size for p in (here / "run").rglob("*.safetensors"))
    monkeypatch.setattr(plan, "disk_left_for", lambda path: used)
    with pytest.raises(ValueError, match="may need"):
        plan.check(player.model, run.args, examples, run.device, start)


@pytest.mark.parametrize("command", ["spin", "sft"])
def test_a_dry_run_tells_the_plan_and_what_two_batches_took(command, start, data, here, capsys, monkeypatch):
    """A dry run writes nothing. Of the peak memory of all phases it tells the largest: here that of the first."""
    sizes = itertools.chain([5 * 2**30], itertools.repeat(2**30))
    monkeypatch.setattr(progress, "peak_memory", lambda device: next(sizes))
    argv = (small_sft if command == "sft" else small)(start, data, lr=(1e-3, 1e-4), dry_run=True)
    assert SCRIPTS[command].main(argv) == 0
    text = capsys.readouterr().out
    phases = {"sft": ("train ", "evaluate ")}.get(command, ("generate ", "score ", "train ", "evaluate "))
    plan = ("LoRA of rank 4", "68 examples, 6 held out", "2, each of 24 prompts", "per iteration (", "memory 5.0 GiB")
    assert all(part in text for part in plan + phases), text
    assert not any(here.iterdir())
