"""runtime/parallel.py and runtime/fsdp.py: worlds of one, two and three ranks give the same results."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, flags, rows, tree

import spin
from runtime import parallel

# ---------------------------------------------------------------- worlds


@pytest.fixture(scope="module")
def launch():
    """launch(script, argv, ranks, folder, ...) runs a world; see ranks.py. Returns codes, moments, out and err."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("ranks.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def request(argv, folders, script="spin", **more):
        value = dict(script=script, argv=[str(word) for word in argv], folders=[str(folder) for folder in folders])
        server.stdin.write(json.dumps(value | more) + "\n")
        server.stdin.flush()
        return SimpleNamespace(**json.loads(server.stdout.readline()))

    yield request
    server.stdin.close()
    server.wait()


def run_in(start, data, **options) -> list[str]:
    """A run in ./run with many shards, and micro-batches of a few items."""
    return flags(start, data, "run", **(dict(gen_batch=8, shard=16, micro_tokens=200) | options))


def whole(world) -> None:
    """Checks that a world ended well, and that rank 0 alone printed."""
    assert set(world.codes) == {0}, world.err
    assert world.out[0] and not any(world.out[1:]) and not any(world.err), world.err


def losses(folder) -> list[float]:
    return [row["loss"] for path in sorted(folder.glob("run/steps-*.jsonl")) for row in rows(path)]


def folders(tmp_path, *names) -> list[Path]:
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


@pytest.mark.parametrize("rank", [4, 0])
def test_worlds_of_one_two_and_three_write_the_same(launch, start, data, tmp_path, rank):
    """LoRA and all parameters. While the weights are the same, pairs and their log-probabilities are, byte for byte.

    Losses of 20 steps agree within 1e-5 relative; the metrics are those of all held-out examples. Ranks of the world of
    three share no folder: each has a host of its own.
    """
    argv = run_in(start, data, rank=rank, lr=1e-3, epochs=4, batch=14, metric="edit_distance")
    one, two, a, b, c = folders(tmp_path, "one", "two", "a", "b", "c")
    for world in (launch(argv, [one]), launch(argv, [two, two]), launch(argv, [a, b, c])):
        whole(world)
    expected = tree(one / "run")
    assert len(losses(one)) == 20
    for folder in (two, a):
        found = tree(folder / "run")
        assert found.keys() == expected.keys()
        assert found["pairs-0.jsonl"] == expected["pairs-0.jsonl"]
        assert losses(folder) == pytest.approx(losses(one), rel=1e-5)
        for here, there in zip(rows(one / "run/metrics.jsonl"), rows(folder / "run/metrics.jsonl"), strict=True):
            for point, other in zip(here.pop("frontier", []), there.pop("frontier", []), strict=True):
                assert other == pytest.approx(point, rel=1e-3, abs=1e-4)
            for name in ("since_start", "since_last", "at_equal_entropy"):
                for metric, change in here.pop(name, {}).items():
                    assert there[name][metric] == pytest.approx(change, rel=1e-3, abs=1e-4)
                there.pop(name, None)
            assert there == pytest.approx(here, rel=1e-3, abs=1e-4)
    assert sorted(tree(b / "run")) == ["run.json"], "a host of its own keeps the record and no shards"


@pytest.mark.parametrize("options", [dict(prompts=2, shard=1, batch=1), dict(prompts=1, shard=64), dict(eval_limit=1)])
def test_ranks_without_work_do_no_harm(launch, start, data, tmp_path, options):
    """Fewer prompts, shards or items of a batch than ranks."""
    one, three = folders(tmp_path, "one", "three")
    argv = run_in(start, data, lr=1e-3, **options)
    whole(launch(argv, [one]))
    whole(launch(argv, [three] * 3))
    assert losses(three) == pytest.approx(losses(one), rel=1e-5)
    assert tree(one)["run/pairs-0.jsonl"] == tree(three)["run/pairs-0.jsonl"]


@pytest.mark.parametrize(
    "options",
    [
        dict(rank=0, alpha=0.5, history=0),  # the player's weights wait on disk; responses of earlier iterations
        dict(rank=0, alpha=0.5, fsdp=True, loss="sppo"),
    ],
)
def test_the_other_methods_on_two_ranks(launch, start, data, tmp_path, options):
    argv = run_in(start, data, lr=1e-3, iterations=2, **options)
    one, two = folders(tmp_path, "one", "two")
    whole(launch(argv, [one], "family"))
    whole(launch(argv, [two, two], "family"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="lists threads by /proc")
def test_leaving_ends_the_threads_of_the_process_group():
    """One that is alive when the interpreter ends may abort the process (SIGABRT, exit code -6).

    Optimizers import modules of torch.distributed that would keep the group alive.
    """
    program = """if True:
        from pathlib import Path
        import torch
        from runtime import parallel

        def threads():
            return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]

        parallel.join(on_gpu=False, alone=True)
        torch.distributed.all_reduce(torch.ones(1))
        assert "pt_gloo_runloop" in threads()
        torch.optim.AdamW([torch.ones(1, requires_grad=True)])
        parallel.leave()
        assert not [name for name in threads() if "gloo" in name], threads()
    """
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# ---------------------------------------------------------------- FSDP


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fsdp_computes_what_a_whole_model_does(launch, start, data, tmp_path, precision):
    """Pairs are identical; in bf16, too, the first step's margin is 0: scoring and training see the same numbers."""
    argv = run_in(start, data, rank=0, lr=1e-3, precision=precision)
    one, two, three = folders(tmp_path, "one", "two", "three")
    whole(launch(argv, [one]))
    whole(launch([*argv, "--fsdp"], [two, two]))
    whole(launch([*argv, "--fsdp", "--checkpoint"], [three] * 3))
    for folder in (two, three):
        assert tree(folder)["run/pairs-0.jsonl"] == tree(one)["run/pairs-0.jsonl"]
        assert rows(folder / "run/steps-0.jsonl")[0]["margin"] == 0
        assert losses(folder) == pytest.approx(losses(one), rel=1e-5 if precision == "fp32" else 0.05)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fsdp_in_a_world_of_one(launch, start, data, tmp_path, device):
    """On a GPU through NCCL."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    argv = run_in(start, data, rank=0, lr=1e-3, device=device)
    plain, cut = folders(tmp_path, "plain", "cut")
    whole(launch(argv, [plain]))
    whole(launch([*argv, "--fsdp"], [cut]))
    assert losses(cut) == pytest.approx(losses(plain), rel=1e-5 if device == "cpu" else 1e-3)


def test_fsdp_resumes_with_another_number_of_ranks(launch, start, data, tmp_path):
    """Begun on two, killed in the training of the second iteration, resumed on two, three and one.

    On two the end is that of a run that was not stopped, byte for byte; on the others it agrees within rounding.
    """
    argv = run_in(start, data, rank=0, lr=1e-3, fsdp=True, save_minutes=0, iterations=2, batch=24)
    undisturbed, two, three, one = folders(tmp_path, "undisturbed", "two", "three", "one")
    whole(launch(argv, [undisturbed] * 2))
    for folder, ranks in ((two, 2), (three, 3), (one, 1)):
        killed = die_in_training(launch, argv, folder)
        assert len(losses_so_far(folder, 1)) == 1 and set(killed.codes) != {0}
        again = launch(argv, [folder] * ranks)
        assert set(again.codes) == {0}, again.err
        assert losses(folder) == pytest.approx(losses(undisturbed), rel=1e-5)
    assert tree(two) == tree(undisturbed)


def losses_so_far(folder, t) -> list[float]:
    path = folder / f"run/steps-{t}.jsonl"
    return [row["loss"] for row in rows(path)] if path.exists() else []


def die_in_training(launch, argv, folder):
    """Kills rank 1 in the second of the second iteration's three steps."""
    return launch(argv, [folder] * 2, die_in=["take_step", 1, 5])


def test_a_damaged_part_of_an_fsdp_checkpoint_is_noticed(launch, start, data, tmp_path):
    argv = run_in(start, data, rank=0, lr=1e-3, fsdp=True, save_minutes=0, iterations=2, batch=24)
    undisturbed, folder = folders(tmp_path, "undisturbed", "damaged")
    whole(launch(argv, [undisturbed] * 2))
    die_in_training(launch, argv, folder)
    (parts,) = (folder / "run/resume/iterate-2").glob("train-*/")
    part = next(parts.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    again = launch(argv, [folder] * 2)
    assert set(again.codes) == {0} and "damaged" in again.err[0] and not again.err[1]
    assert tree(folder) == tree(undisturbed)


# ---------------------------------------------------------------- the end of a world


def test_a_signal_to_the_launcher_saves_the_same_step_on_all_ranks(launch, start, data, tmp_path):
    """All end with 143 and one line in all; the end is that of a run that was not stopped, byte for byte."""
    argv = run_in(start, data, rank=0, lr=1e-3)
    undisturbed, stopped = folders(tmp_path, "undisturbed", "stopped")
    whole(launch(argv, [undisturbed] * 2))
    world = launch(argv, [stopped] * 2, terminate_in=["take_step", 1, 3])
    assert world.codes == [143, 143]
    assert "".join(world.err).count("\n") == 1 and "stopped by SIGTERM" in "".join(world.err)
    assert len(losses_so_far(stopped, 0)) == 3, "the step in which it came was finished and saved"
    assert set(launch(argv, [stopped] * 2).codes) == {0}
    assert tree(stopped) == tree(undisturbed)


def test_killed_ranks_end_the_world_and_the_run_resumes(launch, start, data, tmp_path):
    """SIGKILL of one of two ranks at ten random moments: each time the other ends, too, with one line.

    The end is that of a run that was not stopped, byte for byte. With a log at every step, dropout and earlier pairs.
    """
    argv = run_in(start, data, save_minutes=0, lora_dropout=0.1, mix_previous=True, iterations=2)
    undisturbed, killed = folders(tmp_path, "undisturbed", "killed")
    world = launch(argv, [undisturbed] * 2)
    whole(world)
    rng = random.Random(0)
    kills = 0
    while kills < 10:
        rank = rng.randrange(2)
        moment = rng.randint(1, max(2, world.moments[rank] // 12))
        died = launch(argv, [killed] * 2, die=[rank, moment])
        if died.codes == [0, 0]:
            break
        kills += 1
        assert died.codes[rank] == -9 and died.codes[1 - rank] == 1, died.err
        lines = [line for line in died.err[1 - rank].splitlines() if line.startswith("spin.py")]
        assert len(lines) == 1 and "another rank has ended" in lines[0], died.err  # beside those of torch's own log
    assert kills == 10
    assert set(launch(argv, [killed] * 2).codes) == {0}
    assert tree(killed) == tree(undisturbed)


def test_bad_input_is_one_line_of_one_rank(launch, start, data, tmp_path):
    """Whether all ranks find it or only one: here rank 1's host has other data, or none."""
    argv = run_in(start, "words.jsonl")
    a, b = folders(tmp_path, "a", "b")
    (a / "words.jsonl").write_text(Path(data).read_text())

    def error_of(argv) -> str:
        world = launch(argv, [a, b])
        error = "".join(world.err)
        assert world.codes == [2, 2] and error.count("\n") == 1, world.err
        assert not (a / "run").exists() and not (b / "run").exists()
        return error

    assert "--lr x: expected comma-separated numbers" in error_of([*argv[:-2], "--lr", "x"])
    assert "rank 1: " in error_of(argv) and "words.jsonl" in error_of(argv)
    (b / "words.jsonl").write_text(Path(data).read_text().replace("A", "B"))
    assert "rank 1: --data: not the contents on rank 0" in error_of(argv)


def test_dropout_needs_the_number_of_ranks_that_the_run_began_with(launch, start, data, tmp_path):
    argv = run_in(start, data, lora_dropout=0.1)
    (folder,) = folders(tmp_path, "a")
    launch(argv, [folder] * 2, die_in=["take_step", 1, 3])
    world = launch(argv, [folder])
    assert world.codes == [2] and "1 ranks: the run in run began with 2" in world.err[0]


def test_a_dry_run_says_what_each_rank_needs(launch, start, data, tmp_path):
    (folder,) = folders(tmp_path, "a")
    world = launch(run_in(start, data, rank=0, fsdp=True, dry_run=True), [folder] * 2)
    whole(world)
    assert "for each rank" in world.out[0] and "2, which share 5 shards of prompts" in world.out[0]
    assert not tree(folder)


def test_torchrun_restarts_a_world_in_which_a_rank_died(start, data, tmp_path):
    """torchrun --max-restarts 1: the second world resumes what the first has finished."""
    program = tmp_path / "dies_once.py"
    program.write_text(
        f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import spin
take_step = spin.take_step
def step(*args):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(*args)
spin.take_step = step
sys.exit(spin.main())
"""
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "--max-restarts", "1", str(program), *run_in(start, data, iterations=1)],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resuming run: 0 of 1 iterations are finished" in done.stdout
    assert len(rows(tmp_path / "run/metrics.jsonl")) == 2


# ---------------------------------------------------------------- how work is cut


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shares_are_disjoint_complete_and_balanced(ranks):
    """No rank has more than the mean and one longest item; of equal items each rank gets as many, give or take one."""
    rng = random.Random(ranks)
    for _ in range(50):
        tokens = [rng.randint(1, 100) for _ in range(rng.randint(1, 40))]
        parts = parallel.shares(tokens, ranks)
        assert sorted(i for part in parts for i in part) == list(range(len(tokens)))
        assert max(sum(tokens[i] for i in part) for part in parts) <= sum(tokens) / ranks + max(tokens)
        assert parts[0]
    assert [len(part) for part in parallel.shares([5] * 6, ranks)] == [len(range(r, 6, ranks)) for r in range(ranks)]


def test_all_ranks_have_as_many_micro_batches(monkeypatch):
    """Those beyond a rank's own have the weight 0; the others make up the batch, each item once."""
    tokens = [90, 10, 10, 10, 10, 10, 10, 30]
    monkeypatch.setenv("WORLD_SIZE", "3")
    seen, counts = [], set()
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        found = list(parallel.micro_batches(tokens, lambda sizes: ([i] for i in range(len(sizes)))))
        seen += [i for group, weight in found for i in group if weight]
        counts.add(len(found))
    assert sorted(seen) == list(range(8)) and len(counts) == 1
    monkeypatch.setenv("RANK", "2")  # a batch of one item: rank 2 has none
    assert list(parallel.micro_batches([7], lambda sizes: [list(range(len(sizes)))] if sizes else [])) == [([0], 0.0)]


def test_a_world_of_one_sums_nothing():
    values = {"loss": torch.tensor(1.0)}
    assert parallel.sum_gradients([], values) is values
    assert spin.parallel.whole(values["loss"]) is values["loss"]
