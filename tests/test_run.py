"""runtime/run.py: iterations that resume, the record and the lock of a run, its random numbers, best and final."""

import contextlib
import errno
import io
import itertools
import json
import math
import shutil

import pytest
import torch
from helpers import SCRIPTS, begin, die_at, failed, flags, rows, small, small_sft, spy, tree

import evaluate
import lora
import sft
import spin
from evaluate import at_equal_entropy
from methods import family
from model import GPTNeo, GPTNeoConfig
from player import Player
from runtime import cli
from runtime.folder import Folder
from runtime.run import Run
from runtime.training import Training
from runtime.work import seed_of


@pytest.fixture(scope="module")
def died(start, data, tmp_path_factory):
    """A folder with a run that has died after its first iteration."""
    folder = tmp_path_factory.mktemp("died")
    with contextlib.chdir(folder):
        die_at(Run, "prompts", small(start, data), lambda run, examples, t: t == 1)
    return folder


@pytest.fixture
def begun(died, here):
    """A working directory with a copy of that run."""
    shutil.copytree(died / "run", here / "run")
    return here


FEW = dict(prompts=8, eval_limit=2, eval_temperatures=1)


# ---------------------------------------------------------------- random numbers


def test_random_numbers_are_private_to_seed_iteration_and_purpose(start, data, tmp_path):
    """Seeds differ in every one of the three, and a run's generators begin with them."""
    seeds = {seed_of(seed, t, purpose) for seed in (0, 1) for t in (0, 1) for purpose in ("generate", "shuffle")}
    assert len(seeds) == 8
    _, _, run = begin(start, data, tmp_path / "run", seed=1)
    assert run.seed(1, "x") == run.generator(1, "x").initial_seed() == seed_of(1, 1, "x")


def test_responses_depend_on_the_seed_and_the_number_of_the_prompt_and_not_on_its_shard(start, data, tmp_path):
    found = []
    for shard, seed in ((5, 0), (12, 0), (12, 1)):
        player, examples, run = begin(start, data, tmp_path / "run", shard=shard, seed=seed)
        found.append(run.sample(player, examples[:1] * 12, 0, "generate"))
    assert found[0] == found[1] != found[2] and len({tuple(ids) for ids, _ in found[0]}) == 12


# ---------------------------------------------------------------- a run that died


def test_a_run_resumes_at_the_step_and_the_shard_it_had_reached(start, data, here, monkeypatch):
    """What is finished is not computed again: neither steps nor responses, which might differ with other --gen-batch.

    Shards keep the size that the run began with.
    """
    steps, prompts = [], []
    take = Training.step

    def step(*args):
        steps.append(1)
        if len(steps) == 5:  # There are 3 steps in the first iteration and 6 in the second.
            raise OSError(errno.EIO, "the disk has gone")
        return take(*args)

    monkeypatch.setattr(Training, "step", step)
    spy(monkeypatch, Player, "respond", lambda args, _: prompts.append(len(args[1])))
    assert spin.main(small(start, data, shard=0)) == 1
    assert spin.main(small(start, data, shard=0, gen_batch=3)) == 0
    assert len(steps) == 3 + 6 + 1
    evaluations = 1 + 2 * 3 + 1  # KL; greedy and sampled by three iterates; the start at another temperature
    assert sum(prompts) == 2 * 24 + evaluations * 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", [4, 0])
def test_a_run_on_cuda_resumes(start, data, here, rank):
    """The end is not bit-identical, but nothing is lost or doubled, and the random numbers of dropout are in place."""
    argv = small(start, data, device="cuda", rank=rank, lr=1e-3, alpha=0.5, history=0)
    steps = itertools.count(1)
    die_at(Training, "step", argv, lambda *args: next(steps) == 8, script=family)
    assert family.main(argv) == 0
    first = {name: rows(here / f"run/{name}") for name in ("metrics.jsonl", "steps-1.jsonl")}
    shutil.rmtree(here / "run")
    assert family.main(argv) == 0
    for name, lines in first.items():
        again = rows(here / f"run/{name}")
        assert [line.get("step") for line in lines] == [line.get("step") for line in again]
        assert lines[-1]["loss"] == pytest.approx(again[-1]["loss"], rel=0.05)


@pytest.mark.parametrize(
    "command, changed, options",
    [
        ("spin", "model", {}),
        ("family", "model", {"rank": 0, "alpha": 0.5, "lr": 1e-3}),
        ("family", "adapter", {"rank": None, "alpha": 0.5, "adapter": "adapter"}),
    ],
)
def test_a_start_that_changes_during_the_run_is_noticed(start, data, here, capsys, command, changed, options):
    """The start is read again: with LoRA for final/, with --alpha as the base policy, if it is not the model below."""
    script, original = SCRIPTS[command], SCRIPTS[command].score
    shutil.copytree(start, here / "model")
    model = GPTNeo.from_pretrained(start)
    lora.add_lora(model, 2, 4.0)
    lora.save_adapter(model, here / "adapter")

    def change() -> None:
        if changed == "adapter":
            lora.add_lora(other := GPTNeo.from_pretrained(start), 2, 4.0)
            lora.save_adapter(other, here / "adapter")
        else:
            GPTNeo(GPTNeoConfig.from_json(start / "config.json")).init_weights().save_pretrained(here / "model")

    argv = flags(here / "model", data, "run", **FEW, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "score", lambda *args: (change(), original(*args))[1])
        error = failed(argv, capsys, 1, script)
    assert f"--{changed} " in error and ": has changed since the run began" in error
    shutil.copytree(start, here / "model", dirs_exist_ok=True)
    lora.save_adapter(model, here / "adapter")
    assert script.main(argv) == 0


def test_dropout_of_the_config_is_off_unless_asked_for(start, data, tmp_path):
    """The opponent is scored without dropout: the first loss is ln 2 and every margin 0. --dropout keeps dropout."""
    model = shutil.copytree(start, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"embed_dropout": 0.3, "attention_dropout": 0.3, "resid_dropout": 0.3}
    (model / "config.json").write_text(json.dumps(config))
    for dropout in (None, True):
        out = tmp_path / str(dropout)
        assert spin.main(flags(model, data, out, rank=0, lr=1e-3, dropout=dropout, **FEW)) == 0
        first = rows(out / "steps-0.jsonl")[0]
        rounding = 50 * torch.finfo(torch.float32).eps  # rounding of log-probabilities near -20 in other batches
        assert (abs(first["loss"] - math.log(2)) < rounding) == (dropout is None)
        assert json.loads((out / "final/config.json").read_text())["embed_dropout"] == 0.3, "final/ is as the start"


# ---------------------------------------------------------------- the same run, or another


@pytest.mark.parametrize(
    "name, value, old",
    [
        ("seed", 1, "0"), ("beta", (1, 2), "1.0"), ("iterations", 1, "2"), ("template", "{prompt}", "auto"),
        ("precision", "bf16", "fp32"), ("mix_previous", None, "True"),
    ],
)  # fmt: skip
def test_options_that_would_change_the_outcome_are_refused(begun, start, data, capsys, name, value, old):
    """Which options may change is in test_options.py."""
    before = tree(begun)
    error = failed(small(start, data, **{name: value}), capsys)
    assert f"--{name.replace('_', '-')} " in error and old in error
    assert tree(begun) == before


def test_memory_speed_and_places_of_inputs_may_change(begun, start, data, capsys):
    """The outcome differs by rounding at most, so the run resumes; another torch is warned of."""
    moved = shutil.copytree(start, begun / "moved")
    (begun / "words.jsonl").write_text(data.read_text())
    folder = Folder(begun / "run")
    folder.write_record(folder.record() | {"torch": "1.0"})
    changes = dict(gen_batch=4, gen_tokens=500, checkpoint=True, save_minutes=5, best="sampled")
    changes |= dict(precision="auto")  # auto is fp32 on a CPU, as before.
    assert spin.main(small(moved, begun / "words.jsonl", **changes)) == 0
    printed = capsys.readouterr().out
    assert "resuming run: 1 of 2 iterations are finished" in printed and "the run began with torch 1.0" in printed
    assert json.loads((begun / "run/run.json").read_text())["best"]["metric"] == "sampled"


def test_micro_batches_may_change_unless_there_is_dropout(begun, start, data, capsys):
    """Which numbers dropout draws depends on how a batch is cut, so the outcome would change."""
    error = failed(small(start, data, micro_tokens=100), capsys)
    assert "--micro-tokens 100: the run in run began with --micro-tokens 800" in error
    argv = dict(lora_dropout=0, out="without", **FEW)
    die_at(Training, "step", small(start, data, **argv))
    die_at(Training, "step", small(start, data, micro_tokens=100, **argv))


def test_data_and_weights_must_be_the_same(begun, start, data, capsys):
    def refused(name, model=start, words=data, **options):
        error = failed(small(model, words, **options), capsys)
        assert f"--{name}: not the contents that the run in run began with (sha256" in error

    refused("data", eval_data=data)  # None of the data is held out then.
    lines = data.read_text().splitlines(keepends=True)
    (begun / "changed.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    refused("data", words=begun / "changed.jsonl")
    other = shutil.copytree(start, begun / "other")
    GPTNeo(GPTNeoConfig.from_json(start / "config.json")).init_weights().save_pretrained(other)
    refused("model", model=other)
    shutil.copy(start / "model.safetensors", other)
    tokens = json.loads((start / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokens | {"decoder": None}))
    refused("model", model=other)


def test_a_run_of_one_script_is_not_resumed_by_another(begun, start, data, capsys):
    before = tree(begun)
    for script, argv in ((sft, small_sft(start, data, gen_batch=None)), (family, small(start, data))):
        assert "--out run: holds a run of spin; give another --out" in failed(argv, capsys, script=script)
    assert tree(begun) == before


# ---------------------------------------------------------------- the record and the lock


def test_two_processes_do_not_share_a_directory(begun, start, data, capsys):
    with Folder(begun / "run").locked():
        assert "--out run: another process is at work in it" in failed(small(start, data), capsys)


def test_files_of_a_process_that_ran_while_this_one_loaded_are_not_taken_over(start, data, here, monkeypatch, capsys):
    """The other process ran with other options in the same folder, and ended before this one took the lock."""
    original = cli.setup

    def setup(*args):
        loaded = original(*args)
        monkeypatch.setattr(cli, "setup", original)
        die_at(Run, "evaluate", small(start, data, seed=1))
        return loaded

    monkeypatch.setattr(cli, "setup", setup)
    assert "another process was at work in it a moment ago" in failed(small(start, data), capsys)
    assert json.loads((here / "run/run.json").read_text())["args"]["seed"] == 1


def test_a_process_that_died_in_its_first_write_has_left_an_empty_folder(start, data, here):
    (here / "run/.tmp-abc").mkdir(parents=True)
    die_at(Run, "evaluate", small(start, data))
    assert not (here / "run/.tmp-abc").exists()


@pytest.mark.parametrize("text", ["{}", "not JSON"])
def test_a_folder_with_another_run_json_is_refused(start, data, here, capsys, text):
    (here / "run").mkdir()
    (here / "run/run.json").write_text(text)
    assert "run/run.json: damaged, or of another version" in failed(small(start, data), capsys)
    assert tree(here) == {"run/run.json": text.encode()}


# ---------------------------------------------------------------- the end of a run


def test_iterations_of_a_finished_run_may_grow(start, data, here, capsys):
    """A grown run ends like one that had all iterations at first, also if it dies on the way; other options stay."""

    def argv(**options):
        return small(start, data, **(FEW | dict(rank=0) | options))

    assert spin.main(argv(lr=(1e-2, 1e-3))) == 0
    longer = argv(lr=(1e-2, 1e-3, 1e-2), iterations=3)
    assert spin.main([*longer, "--seed", "1"]) == 2
    assert spin.main(argv(lr=(1e-3, 1e-3, 1e-2), iterations=3)) == 2
    die_at(Training, "step", longer)
    capsys.readouterr()
    assert spin.main(longer) == 0
    assert "2 of 3 iterations are finished" in capsys.readouterr().out
    grown = tree(here / "run")
    shutil.rmtree(here / "run")
    assert spin.main(longer) == 0
    assert tree(here / "run") == grown


def test_pairs_of_an_iteration_that_has_none_are_an_empty_file(start, data, here, monkeypatch):
    """With --mix-previous such an iteration trains on pairs of the one before; the next iteration finds none to add."""
    generate = spin.generate

    def some(opponent, examples, t, run):
        pairs, counts = generate(opponent, examples, t, run)
        return ([] if t == 1 else pairs), counts

    monkeypatch.setattr(spin, "generate", some)
    assert spin.main(small(start, data, iterations=3, **FEW)) == 0
    assert [len(rows(here / f"run/pairs-{t}.jsonl")) for t in range(3)] == [8, 0, 8]
    assert [len(rows(here / f"run/steps-{t}.jsonl")) for t in range(3)] == [1, 1, 1]


def test_a_finished_run_says_so(start, data, whole, here, capsys):
    """The same command changes nothing (uclaml #10: duplicate rows), a command with other options is refused."""
    shutil.copytree(whole, here / "run")
    (here / "run/resume").mkdir()  # A process that died in its last line left this folder.
    assert spin.main(small(start, data)) == 0
    assert "run: this run is finished" in capsys.readouterr().out
    assert tree(here / "run") == tree(whole) and not (here / "run/resume").exists()
    assert "--seed 7" in failed(small(start, data, seed=7), capsys)
    assert tree(here / "run") == tree(whole)


@pytest.fixture(scope="module")
def spoiled(start, data, tmp_path_factory):
    """(folder, stdout, stderr) of a run whose second iteration spoils the player by its learning rate."""
    folder, out, err = tmp_path_factory.mktemp("spoiled"), io.StringIO(), io.StringIO()
    options = dict(prompts=0, eval_limit=0, batch=16, lr=(1e-2, 1), eval_temperatures=(0.5, 2))
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert spin.main(small(start, data, **options)) == 0
    return folder / "run", out.getvalue(), err.getvalue()


def test_the_best_iterate_is_kept_and_named(spoiled, start):
    run, printed, errors = spoiled
    nll = [row["nll"] for row in rows(run / "metrics.jsonl")]
    assert nll.index(min(nll)) == 1, nll
    assert "Best by nll: iterate 1 (run/best), nll -0.5" in printed and (run / "iterate-1").is_dir()
    assert json.loads((run / "run.json").read_text())["best"] == {"iterate": 1, "metric": "nll"}
    assert "spin.py: warning: iterate 2: held-out real responses lost" in errors
    model = GPTNeo.from_pretrained(run / "best")
    lora.load_adapter(expected := GPTNeo.from_pretrained(start), run / "iterate-1")
    lora.merge(expected)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model.logits(model(ids)), expected.logits(expected(ids)), atol=1e-5, rtol=0)


def test_a_run_that_does_not_help_says_so_and_names_no_best_iterate(start, data, here, capsys):
    """So small a learning rate changes nothing that two standard errors would show."""
    assert spin.main(small(start, data, lr=1e-12, iterations=1, prompts=8)) == 0
    printed = capsys.readouterr().out
    assert "No iterate is better than the start by nll" in printed and "try a larger --lr" in printed
    assert json.loads((here / "run/run.json").read_text())["best"] == {"iterate": 0, "metric": "nll"}
    assert (here / "run/final").is_dir() and not (here / "run/best").exists()


def test_held_out_responses_are_kept_and_shown(spoiled):
    """heldout-<t>.jsonl has all of them, from which every metric can be computed; three are printed, aligned."""
    run, printed, _ = spoiled
    metrics = rows(run / "metrics.jsonl")
    for t, row in enumerate(metrics):
        lines = rows(run / f"heldout-{t}.jsonl")
        assert len(lines) == 12 and all(line["references"] for line in lines)
        for name in ("greedy", "sampled"):
            right = [line[name] in line["references"] for line in lines]
            assert [line["values"][name] for line in lines] == [[float(one), 1.0] for one in right]
        values, weights = zip(*(line["values"]["nll"] for line in lines))
        assert row["nll"] == sum(values) / sum(weights)
        if t:
            assert row["since_start"]["nll"][0] == row["nll"] - metrics[0]["nll"]
            assert row["since_last"]["nll"][0] == row["nll"] - metrics[t - 1]["nll"]
            equal = at_equal_entropy(rows(run / "heldout-0.jsonl"), lines)
            assert (equal or t == 2) and row["at_equal_entropy"] == json.loads(json.dumps(equal))
        for i in (0, 4, 8):
            assert f"  prompt     {lines[i]['prompt']}\n  reference  {lines[i]['references'][0]}" in printed
    assert printed.count("  start      ") == 9 and printed.count("  iterate 1  ") == 6
    assert "against the start: " in printed and "against iterate 1: " in printed and "of equal entropy: " in printed
    assert [point["temperature"] for point in metrics[0]["frontier"]] == [0.5, 1.0, 2.0]


def test_best_of_a_full_run_is_a_copy_of_its_iterate_and_goes_where_it_is_not_wanted(start, data, here, monkeypatch):
    """A process that dies at the end, then another --best: a best/ that no longer holds is removed."""
    argv = flags(start, data, "run", rank=0, iterations=2, **FEW)
    monkeypatch.setattr(evaluate, "best_of", lambda rows, metric: 1)
    die_at(Folder, "write_record", argv, lambda folder, content: content.get("finished"))
    best, iterate = tree(here / "run/best"), tree(here / "run/iterate-1")
    assert {name: best[name] for name in iterate} == iterate
    assert best.keys() - iterate.keys() == {"README.md", "metrics.svg"}
    monkeypatch.setattr(evaluate, "best_of", lambda rows, metric: 2)
    assert spin.main(argv) == 0
    assert not (here / "run/best").exists() and tree(here / "run/final").keys() == best.keys()
