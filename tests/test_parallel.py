"""runtime/parallel.py and runtime/fsdp.py: worlds of one, two and three ranks give the same results."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import flags, rows, tree

from runtime import parallel

# ---------------------------------------------------------------- worlds


def run_in(start, data, **options) -> list[str]:
    """The command line of a run in ./run that has several shards, and micro-batches of a few items."""
    small = dict(prompts=12, eval_limit=2, eval_temperatures=1, max_new_tokens=4, gen_batch=8, shard=4)
    return flags(start, data, "run", **(small | dict(micro_tokens=200, lr=1e-3) | options))


def check(world) -> None:
    """Checks that all ranks ended well, and that rank 0 alone printed."""
    assert set(world.codes) == {0}, world.err
    assert world.out[0] and not any(world.out[1:]) and not any(world.err), world.err


def losses(folder, pattern="steps-*") -> list[float]:
    return [row["loss"] for path in sorted(folder.glob(f"run/{pattern}.jsonl")) for row in rows(path)]


def folders(tmp_path, *names) -> list[Path]:
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


def test_worlds_of_one_two_and_three_write_the_same(launch, start, data, tmp_path):
    """Responses and their log-probabilities are equal, since the shards are. Losses differ by the order of sums.

    The three ranks share no folder: each of them has a host of its own.
    """
    argv = run_in(start, data, epochs=2, batch=7, metric="edit_distance")
    one, two, a, b, c = folders(tmp_path, "one", "two", "a", "b", "c")
    for world in (launch(argv, [one]), launch(argv, [two, two]), launch(argv, [a, b, c])):
        check(world)
    expected = tree(one / "run")
    assert len(losses(one)) == 4
    for folder in (two, a):
        found = tree(folder / "run")
        assert found.keys() == expected.keys() and found["pairs-0.jsonl"] == expected["pairs-0.jsonl"]
        assert losses(folder) == pytest.approx(losses(one), rel=1e-4)
        for here, there in zip(rows(one / "run/metrics.jsonl"), rows(folder / "run/metrics.jsonl"), strict=True):
            assert there.keys() == here.keys() and there["nll"] == pytest.approx(here["nll"], rel=1e-3)
    assert not any(b.iterdir()) and not any(c.iterdir()), "rank 0 alone writes"


def test_some_ranks_may_have_no_work(launch, start, data, tmp_path):
    """There are fewer prompts, shards and items of a batch than ranks."""
    one, three = folders(tmp_path, "one", "three")
    argv = run_in(start, data, prompts=2, shard=1, batch=1, eval_limit=1)
    check(launch(argv, [one]))
    check(launch(argv, [three] * 3))
    assert losses(three) == pytest.approx(losses(one), rel=1e-4)
    assert tree(one)["run/pairs-0.jsonl"] == tree(three)["run/pairs-0.jsonl"]


def test_another_method_on_two_ranks(launch, start, data, tmp_path):
    """The player's weights wait while the start scores; responses of the first iteration are used again."""
    argv = run_in(start, data, iterations=2, rank=0, alpha=0.5, history=0, fsdp=True, loss="sppo")
    one, two = folders(tmp_path, "one", "two")
    check(launch(argv, [one], "family"))
    check(launch(argv, [two, two], "family"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)


# ---------------------------------------------------------------- FSDP


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fsdp_computes_what_a_whole_model_does(launch, start, data, tmp_path, precision):
    """The whole copy scores with the numbers that training computes with, so the first margin is 0 but for rounding.

    In fp32 FSDP samples the same responses, too; in bf16 rounding may turn a token into another one. The widths of
    the layers, 16 and 64, are no multiples of three.
    """
    argv = run_in(start, data, rank=0, precision=precision)
    one, sharded = folders(tmp_path, "one", "sharded")
    check(launch(argv, [one]))
    if precision == "fp32":
        check(launch([*argv, "--fsdp", "--checkpoint"], [sharded] * 3))
    else:
        check(launch([*argv, "--fsdp"], [sharded] * 2))
    eps = torch.finfo(torch.float32 if precision == "fp32" else torch.bfloat16).eps
    # The margin compares log-probabilities of about -20, which other micro-batches may round in another way.
    assert abs(rows(sharded / "run/steps-0.jsonl")[0]["margin"]) < 50 * eps
    assert losses(sharded) == pytest.approx(losses(one), rel=1000 * eps if precision == "fp32" else 20 * eps)
    if precision == "fp32":
        for here, there in zip(*(rows(path / "run/pairs-0.jsonl") for path in (one, sharded)), strict=True):
            assert here["generated_ids"] == there["generated_ids"]
            assert here["opponent_real_logp"] == pytest.approx(there["opponent_real_logp"], rel=50 * eps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU, on which it uses NCCL")
def test_fsdp_in_a_world_of_one_on_cuda(launch, start, data, tmp_path):
    argv = run_in(start, data, rank=0, device="cuda")
    plain, sharded = folders(tmp_path, "plain", "sharded")
    check(launch(argv, [plain]))
    check(launch([*argv, "--fsdp"], [sharded]))
    assert losses(sharded) == pytest.approx(losses(plain), rel=1e-3)


def test_fsdp_resumes_with_another_number_of_ranks(launch, start, data, tmp_path):
    """Rank 1 of two is killed in the second step of the second iteration; two ranks and one resume the run.

    Two ranks write what a run writes that was not killed, byte for byte. One agrees within rounding.
    """
    argv = run_in(start, data, rank=0, fsdp=True, save_minutes=0, iterations=2, batch=8)
    undisturbed, two = folders(tmp_path, "undisturbed", "two")
    check(launch(argv, [undisturbed] * 2))
    killed = launch(argv, [two] * 2, die_in=["step", 1, 4])
    assert len(losses(two, "steps-1")) == 1 and 0 not in killed.codes
    one = shutil.copytree(two, tmp_path / "one")
    for world in ([two, two], [one]):
        check(launch(argv, world))
        assert losses(world[0]) == pytest.approx(losses(undisturbed), rel=1e-4)
    assert tree(two) == tree(undisturbed)


# ---------------------------------------------------------------- how a world ends


def test_a_signal_to_the_launcher_saves_the_same_step_on_all_ranks(launch, start, data, tmp_path):
    """All ranks exit with 143 and print one line in all. The run ends like one that was not stopped, byte for byte."""
    argv = run_in(start, data, rank=0, batch=4)
    undisturbed, stopped = folders(tmp_path, "undisturbed", "stopped")
    check(launch(argv, [undisturbed] * 2))
    world = launch(argv, [stopped] * 2, terminate_in=["step", 1, 2])
    assert world.codes == [143, 143]
    assert "".join(world.err).count("\n") == 1 and "stopped by SIGTERM" in world.err[0]
    assert len(losses(stopped)) == 2, "the step in which the signal arrived was finished and saved"
    check(launch(argv, [stopped] * 2))
    assert tree(stopped) == tree(undisturbed)


def test_killed_ranks_end_the_world_and_the_run_resumes(launch, start, data, tmp_path):
    """SIGKILL hits each of two ranks at a random moment, and the other rank ends, too.

    The run ends like one that was not disturbed, byte for byte, with dropout and the pairs of earlier iterations.
    Which numbers dropout draws depends on the number of ranks, so another number is refused.
    """
    argv = run_in(start, data, save_minutes=0, lora_dropout=0.1, mix_previous=True, iterations=2)
    undisturbed, killed = folders(tmp_path, "undisturbed", "killed")
    world = launch(argv, [undisturbed] * 2)
    check(world)
    rng = random.Random(0)
    for rank in (0, 1):
        died = launch(argv, [killed] * 2, die=[rank, rng.randint(1, world.moments[rank] // 3)])
        assert died.codes[rank] == -9 and died.codes[1 - rank] == 1, died.err
        lines = [line for line in "".join(died.err).splitlines() if line.startswith("spin.py")]  # torch logs more.
        assert ["another rank has ended" in line for line in lines] == [True] * rank, "only the writer reports it"
    alone = launch(argv, [killed])
    assert alone.codes == [2] and "ranks 1: the run in run began with ranks 2" in alone.err[0]
    assert set(launch(argv, [killed] * 2).codes) == {0}
    assert tree(killed) == tree(undisturbed)


def test_bad_input_is_one_line_of_one_rank(launch, start, data, tmp_path):
    """All ranks may find it, or only one of them: here the host of rank 1 has other data, or none."""
    argv = run_in(start, "words.jsonl")
    a, b = folders(tmp_path, "a", "b")
    (a / "words.jsonl").write_text(Path(data).read_text())

    def error_of(argv) -> str:
        world = launch(argv, [a, b])
        error = "".join(world.err)
        assert world.codes == [2, 2] and error.count("\n") == 1, world.err
        assert not (a / "run").exists() and not (b / "run").exists()
        return error

    assert "--lr" in error_of([*argv, "--lr", "x"])
    assert "rank 1: " in error_of(argv) and "words.jsonl" in error_of(argv)
    (b / "words.jsonl").write_text(Path(data).read_text().replace("A", "B"))
    assert "rank 1: --data: not the contents on rank 0" in error_of(argv)


def test_a_dry_run_says_what_each_rank_needs(launch, start, data, tmp_path):
    (folder,) = folders(tmp_path, "a")
    world = launch(run_in(start, data, rank=0, fsdp=True, dry_run=True, batch=4), [folder] * 2)
    check(world)
    assert "2, which share the prompts" in world.out[0] and "sharded across them" in world.out[0]
    assert not tree(folder)


def test_torchrun_restarts_a_world_in_which_a_rank_died(launch, start, data, tmp_path):
    """torchrun has --max-restarts 1: the second world resumes what the first one has finished."""
    (folder,) = folders(tmp_path, "a")
    world = launch(run_in(start, data), [folder] * 2, restarts=1, die_in=["step", 1, 1])
    assert world.codes == [0], world.err
    assert "resuming run: 0 of 1 iterations are finished" in world.out[0]
    assert len(rows(folder / "run/metrics.jsonl")) == 2


# ---------------------------------------------------------------- how work is divided


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shares_are_disjoint_complete_and_balanced(ranks):
    """No rank has more than the mean and one longest item. If all items are equal, counts differ by one at most."""
    rng = random.Random(ranks)
    for _ in range(50):
        tokens = [rng.randint(1, 100) for _ in range(rng.randint(1, 40))]
        parts = parallel.shares(tokens, ranks)
        assert sorted(i for part in parts for i in part) == list(range(len(tokens)))
        assert max(sum(tokens[i] for i in part) for part in parts) <= sum(tokens) / ranks + max(tokens)
        assert parts[0]
    assert [len(part) for part in parallel.shares([5] * 6, ranks)] == [len(range(r, 6, ranks)) for r in range(ranks)]


def test_all_ranks_have_the_same_number_of_micro_batches(monkeypatch):
    """Micro-batches with weight 1 make up the batch, each item once; the others have weight 0."""
    tokens = [90, 10, 10, 10, 10, 10, 10, 30]
    monkeypatch.setenv("WORLD_SIZE", "3")
    seen, counts = [], set()
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        found = list(parallel.micro_batches(tokens, lambda sizes: ([i] for i in range(len(sizes)))))
        seen += [i for group, weight in found for i in group if weight]
        counts.add(len(found))
    assert sorted(seen) == list(range(8)) and len(counts) == 1
    # Rank 2 has no item of a batch that holds one.
    assert list(parallel.micro_batches([7], lambda sizes: [list(range(len(sizes)))] if sizes else [])) == [([0], 0.0)]
