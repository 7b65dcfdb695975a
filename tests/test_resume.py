"""Nothing is lost: runs that are killed, stopped, out of disk or changed, and what is checked before a run begins."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from test_spin import begin, flags, rows

import plan
import prepare
import report
import resume
import spin
from model import GPTNeo, GPTNeoConfig


def small(start, data, **options) -> list[str]:
    """Flags of a run in ./run, of two iterations, with dropout and the pairs of the iteration before."""
    defaults = dict(iterations=2, lora_dropout=0.1, mix_previous=True, save_minutes=0, gen_batch=2)
    return flags(start, data, "run", **(defaults | options))


def tree(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(start, data, tmp_path_factory) -> dict[str, bytes]:
    """All files that the run of `small` leaves when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        assert spin.main(small(start, data)) == 0
    return tree(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- death


@pytest.mark.parametrize(
    "seed, options",
    [(0, {}), (1, {"rank": 0, "lr": 1e-3, "save_minutes": 0.0005, "optimizer": "rmsprop", "unfinished": "cut"})],
)
def test_killed_at_random_moments_ends_bit_identical(start, data, tmp_path, seed, options):
    """SIGKILL once or twice in every phase; all files at the end are those of a run that was never stopped."""
    argv = [*small(start, data, micro_tokens=200, epochs=2, **options)]
    del argv[argv.index("--out") : argv.index("--out") + 2]
    script = [sys.executable, str(ROOT / "tests/kill_and_resume.py"), str(seed)]
    done = subprocess.run([*script, *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(killed) >= 15
    phases = {name for _, name in killed}
    assert {"generate", "score", "train", "evaluate", "finish_iterate", "finish"} <= phases, killed
    whole = tree(tmp_path / "whole")
    assert tree(tmp_path / "killed") == whole
    assert len(rows(tmp_path / "killed/run/metrics.jsonl")) == 3
    assert not any("resume" in name or name.endswith(".tmp") for name in whole)


def test_a_run_goes_on_from_the_step_and_the_shard_it_had_reached(start, data, here, monkeypatch):
    """What is kept is not computed again: neither responses nor steps."""
    steps, prompts = [], []
    take, sampled = spin.take_step, spin.sample_responses

    def step(*args):
        steps.append(1)
        if len(steps) == 7:  # of 5 steps in the first iteration and 9 in the second
            raise OSError(errno.EIO, "the disk has gone")
        return take(*args)

    monkeypatch.setattr(spin, "take_step", step)
    monkeypatch.setattr(spin, "sample_responses", lambda *a, **k: (prompts.append(len(a[1])), sampled(*a, **k))[1])
    assert spin.main(small(start, data)) == 1
    assert spin.main(small(start, data)) == 0
    _, train_set, heldout, _ = begin(start, data, here / "again")
    assert len(steps) == 5 + 9 + 1
    assert sum(prompts) == 2 * len(train_set) + (1 + 2 * 3) * len(heldout)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", [4, 0])
def test_a_run_on_cuda_goes_on(start, data, here, monkeypatch, rank):
    """Not bit-identical there, but with nothing lost or doubled, and with the random numbers of dropout in place."""
    argv = small(start, data, device="cuda", rank=rank, lr=1e-3, alpha=0.5, history="all")
    take, steps = spin.take_step, []
    monkeypatch.setattr(spin, "take_step", lambda *a: (steps.append(1), 1 / (8 - len(steps)), take(*a))[2])
    with pytest.raises(ZeroDivisionError):
        spin.main(argv)
    assert spin.main(argv) == 0
    first = {name: rows(here / f"run/{name}") for name in ("metrics.jsonl", "steps-1.jsonl")}
    shutil.rmtree(here / "run")
    assert spin.main(argv) == 0
    for name, lines in first.items():
        again = rows(here / f"run/{name}")
        assert [line.get("step") for line in lines] == [line.get("step") for line in again]
        assert lines[-1]["loss"] == pytest.approx(again[-1]["loss"], rel=0.05)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_says_how_to_go_on(start, data, here, whole, number, code):
    """A run at work in its training: code 143 or 130, one line; the same command then ends as if undisturbed."""
    argv = [sys.executable, str(ROOT / "spin.py"), *small(start, data, save_minutes=1000)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    # each step takes 0.2 s longer, so that the signal comes in the middle of one
    slow = "import sys, time, spin; f = spin.take_step; spin.take_step = lambda *a: (time.sleep(0.2), f(*a))[1]; "
    slow += "s = spin.resume.write_rows; sys.exit(spin.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *argv[2:]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=env,
    )  # fmt: skip
    wait_for(lambda: any((here / "run/resume/iterate-1").glob("score-*")))
    time.sleep(0.5)
    assert not (here / "run/resume/iterate-1/train.safetensors").exists(), "saved before it was asked to"
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert f"stopped by {number.name}" in error and "the same command goes on" in error and error.count("\n") == 1
    assert 1 <= len(rows(here / "run/steps-0.jsonl")) < 5
    assert (here / "run/resume/iterate-1/train.safetensors").exists()
    assert subprocess.run(argv, capture_output=True, env=env).returncode == 0
    without = {name: content for name, content in whole.items() if name != "run/run.json"}  # save_minutes differs there
    assert {name: content for name, content in tree(here).items() if name != "run/run.json"} == without


def wait_for(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_second_signal_ends_the_process_at_once(start, data, here):
    """In a step that would last a minute, the first SIGTERM waits and the second does not; the run can go on."""
    slow = "import sys, time, spin; spin.take_step = lambda *a: (open('in_step', 'w'), time.sleep(60)); "
    slow += "sys.exit(spin.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *small(start, data)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for((here / "in_step").exists)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 143 and "stopped at once" in error and "Traceback" not in error
    assert time.monotonic() - began < 30
    assert spin.main(small(start, data)) == 0


def test_a_signal_before_anything_has_begun(start, data, here, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)  # a shell's background processes ignore it
    setup = spin.setup
    monkeypatch.setattr(spin, "setup", lambda *a: (signal.raise_signal(signal.SIGINT), setup(*a))[1])
    assert spin.main(small(start, data)) == 130
    assert capsys.readouterr().err == "spin.py: error: stopped by SIGINT\n" and not list(here.iterdir())
    assert signal.getsignal(signal.SIGINT) is before, "handlers are put back"
    resume.SIGNALS.check()  # nothing is pending in a process that goes on


# ---------------------------------------------------------------- the disk


@contextlib.contextmanager
def largest_file(size: int):
    """The kernel refuses to write more than so many bytes into one file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failed_then_goes_on(start, data, here, whole, capsys) -> None:
    """After a run that could not write: one line, no temporary files, and the same command ends as if undisturbed."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("spin.py: error: ") and "run/" in error, error
    assert not [name for name in tree(here) if name.endswith(".tmp")]
    assert spin.main(small(start, data)) == 0
    assert tree(here) == whole


@pytest.mark.parametrize("size", [200, 3000, 9000, None])
def test_files_that_cannot_be_written(start, data, here, whole, capsys, size):
    """The limit is met in run.json, in a shard, in pairs or the state of training, and in the largest file of all."""
    with largest_file(size or max(map(len, whole.values())) - 1):
        code = spin.main(small(start, data))
    assert code == (2 if size == 200 else 1)
    failed_then_goes_on(start, data, here, whole, capsys)


@pytest.fixture
def mounted(here):
    """./run is a file system of 100 KiB of its own, where this is permitted."""
    (here / "run").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(here / "run")]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield here / "run"
    subprocess.run(["umount", str(here / "run")], check=True)


def remount(folder, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_full_disk(start, data, here, mounted, whole, capsys, monkeypatch):
    monkeypatch.setattr(plan, "disk_left_for", lambda out: 2**40)  # or it would be refused before it begins
    assert spin.main(small(start, data)) == 1
    assert "No space left on device" in capsys.readouterr().err
    state = tree(mounted)
    assert spin.main(small(start, data)) == 1, "still full"
    assert state.keys() <= tree(mounted).keys()
    remount(mounted, "size=10m")
    failed_then_goes_on(start, data, here, whole, capsys)


def test_directory_that_turns_read_only(start, data, here, mounted, whole, capsys, monkeypatch):
    remount(mounted, "size=10m")
    train = spin.train
    monkeypatch.setattr(spin, "train", lambda *a: (remount(mounted, "ro"), train(*a))[1])
    assert spin.main(small(start, data)) == 1
    remount(mounted, "rw")
    monkeypatch.setattr(spin, "train", train)
    failed_then_goes_on(start, data, here, whole, capsys)


@pytest.mark.parametrize("number", [3, 12, 25, 40])
def test_any_rename_may_fail(start, data, here, whole, capsys, monkeypatch, number):
    """The same without mounting anything: rename number 3, 12, ... of the run meets a read-only file system."""
    count, replace = [0], os.replace

    def fail(*args):
        count[0] += 1
        if count[0] == number:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return replace(*args)

    monkeypatch.setattr(os, "replace", fail)
    assert spin.main(small(start, data)) == 1
    monkeypatch.setattr(os, "replace", replace)
    failed_then_goes_on(start, data, here, whole, capsys)


def test_not_enough_disk_or_memory_is_said_before_anything_is_loaded(start, data, here, capsys, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    assert spin.main(small(start, data)) == 2
    error = capsys.readouterr().err
    assert "--out run: the run may need" in error and "0 MiB are free" in error
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(plan, "memory_of", lambda device: 10_000)
    assert spin.main(small(start, data)) == 2
    assert "training needs more than" in capsys.readouterr().err
    monkeypatch.setattr(plan, "memory_of", lambda device: 10**5)
    assert spin.main(small(start, data, gen_batch=64)) == 2
    assert "lower --gen-tokens or --gen-batch" in capsys.readouterr().err
    assert not list(here.iterdir())


def test_what_the_plan_counts_is_what_a_run_holds(start, data, tmp_path):
    """Weights, gradients, optimizer state and cache, to the byte; the disk, as an upper bound that is not far off."""
    from sampling import KVCache

    for rank, optimizer in ((0, "adamw"), (4, "rmsprop")):
        player, train_set, heldout, run = begin(start, data, tmp_path / str(rank), rank=rank, optimizer=optimizer)
        params = [p for p in player.parameters() if p.requires_grad]
        spin.response_logps(player, [(e.prompt_ids, e.real_ids) for e in train_set[:4]], run).sum().backward()
        adam = spin.make_optimizer(params, run.args, 1e-3)
        adam.step()
        held = sum(p.numel() * 4 for p in player.parameters()) + sum(p.grad.numel() * 4 for p in params)
        held += sum(v.numel() * 4 for state in adam.state.values() for v in state.values() if v.dim())
        assert run.needs.training == held
        assert run.needs.trained == sum(p.numel() for p in params)
        room = max(len(e.prompt_ids) for e in train_set + heldout) + run.args.max_new_tokens
        cache = KVCache(player, min(64, len(train_set + heldout)), room)
        weights = sum(p.numel() * 4 for p in player.parameters())
        assert run.needs.generation == weights + sum(t.numel() * 4 for t in (*cache.keys, *cache.values))
        out = tmp_path / str(rank)
        assert spin.main(flags(start, data, out, rank=rank, optimizer=optimizer)) == 0
        used = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        assert used / 4 < run.needs.disk, "the tokenizer, the tables and the headers are small for real models only"


# ---------------------------------------------------------------- the same run, or another


@pytest.fixture(scope="module")
def died(start, data, tmp_path_factory):
    """A folder with a run that has died after its first iteration."""
    folder = tmp_path_factory.mktemp("died")
    original = spin.finish_iterate
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(spin, "finish_iterate", lambda p, r, *a: (original(p, r, *a), 1 / (2 - len(r)))[0])
        with pytest.raises(ZeroDivisionError):
            spin.main(small(start, data))
    return folder


@pytest.fixture
def begun(died, here):
    shutil.copytree(died / "run", here / "run")
    return here


@pytest.mark.parametrize(
    "name, value, old",
    [
        ("seed", 1, "0"), ("lr", 1e-3, "0.01"), ("beta", "1,2", "1.0"), ("iterations", 3, "2"), ("rank", 8, "4"),
        ("optimizer", "rmsprop", "adamw"), ("temperature", 0.5, "1.0"), ("template", "{prompt}", "Instruction"),
        ("precision", "bf16", "fp32"), ("mix_previous", None, "True"), ("max_new_tokens", 9, "8"), ("batch", 8, "16"),
    ],
)  # fmt: skip
def test_options_that_would_change_the_outcome_are_refused(begun, start, data, capsys, name, value, old):
    before = tree(begun)
    assert spin.main(small(start, data, **{name: value})) == 2
    error = capsys.readouterr().err
    assert f"--{name.replace('_', '-')} " in error and old in error and error.count("\n") == 1, error
    assert tree(begun) == before


def test_options_of_memory_and_speed_may_change(begun, start, data, capsys):
    """Another micro-batch, cache and saving interval; the outcome differs by rounding alone, so the run goes on."""
    changes = dict(micro_tokens=100, gen_batch=4, gen_tokens=500, checkpoint=True, save_minutes=5, best="sampled")
    assert spin.main(small(start, data, precision="auto", **changes)) == 0, "fp32 on a CPU, as it was"
    assert "going on in run: 1 of 2 iterations are finished" in capsys.readouterr().out
    assert json.loads((begun / "run/run.json").read_text())["best"]["metric"] == "sampled"


def test_kept_scores_stay_with_the_responses_they_were_computed_for(start, data, here, monkeypatch):
    """Died in training; gone on with another --gen-batch: no response is sampled again, as it might be another one."""
    monkeypatch.setattr(spin, "take_step", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        spin.main(small(start, data))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    sampled, original = [], spin.sample_responses
    monkeypatch.setattr(spin, "sample_responses", lambda *a, **k: (sampled.append(len(a[1])), original(*a, **k))[1])
    assert spin.main(small(start, data, gen_batch=3)) == 0
    assert sum(sampled) == 68 + 2 * 2 * 12  # those of the second iteration, and both evaluations


def test_data_and_weights_must_be_the_same_wherever_they_are(begun, start, data, capsys):
    moved = shutil.copytree(start, begun / "moved")
    (begun / "words.jsonl").write_text(data.read_text())
    assert spin.main(small(start, data, eval_data=data)) == 2
    assert "--data: not the contents" in capsys.readouterr().err, "none of them is held out then"
    (begun / "judge.py").write_text("def judge(prompt, responses):\n    return [1, 0]\n")
    assert spin.main(small(start, data, scorer=begun / "judge.py:judge")) == 2
    assert "--scorer: not the contents" in capsys.readouterr().err
    changed = data.read_text().splitlines(keepends=True)
    (begun / "changed.jsonl").write_text("".join([changed[1], changed[0], *changed[2:]]))
    assert spin.main(small(start, begun / "changed.jsonl")) == 2
    assert "--data: not the contents that the run in run began with (sha256" in capsys.readouterr().err
    other = shutil.copytree(start, begun / "other")
    GPTNeo(GPTNeoConfig.from_json(start / "config.json")).init_weights().save_pretrained(other)
    assert spin.main(small(other, data)) == 2
    assert "--model: not the contents" in capsys.readouterr().err
    tokens = json.loads((start / "tokenizer.json").read_text())
    (other / "model.safetensors").write_bytes((start / "model.safetensors").read_bytes())
    (other / "tokenizer.json").write_text(json.dumps(tokens | {"decoder": None}))
    assert spin.main(small(other, data)) == 2
    assert "--model: not the contents" in capsys.readouterr().err
    assert spin.main(small(moved, begun / "words.jsonl")) == 0
    assert spin.main(small(start, begun / "changed.jsonl")) == 2, "a finished run, but not of these data"
    assert "--data: not the contents" in capsys.readouterr().err


def test_digest_of_the_weights_that_are_read(start, tmp_path):
    """Beside other files in safetensors: an adapter in the model's folder."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(start / "model.safetensors")
    (tmp_path / "config.json").write_text((start / "config.json").read_text())
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    args = spin.parse(small(tmp_path, "data"))[1]
    digests = set()
    for _ in range(2):
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        digests.add(prepare.digest_of_model(tmp_path, args))
        tensors["transformer.ln_f.bias"][0] += 1
    assert len(digests) == 2


def test_given_pairs_must_be_the_same(start, data, here, monkeypatch, capsys):
    """The message names the flag that was given."""
    lines = [json.dumps({"prompt": prompt, "chosen": "B", "rejected": "D"}) for prompt in "ab"]
    (here / "pairs.jsonl").write_text("\n".join(lines))
    argv = flags(start, None, "run", pairs="pairs.jsonl", eval_data=data)
    monkeypatch.setattr(spin, "take_step", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        spin.main(argv)
    (here / "pairs.jsonl").write_text("\n".join(reversed(lines)))
    assert spin.main(argv) == 2
    assert "--pairs: not the contents" in capsys.readouterr().err


def test_sft_does_not_go_on_as_spin(begun, start, data, capsys):
    assert spin.main(["sft", *small(start, data, beta=None, mix_previous=None, gen_batch=None)]) == 2
    assert "command 'sft': the run in run began with 'spin'" in capsys.readouterr().err


def test_sft_goes_on_too(start, data, here, monkeypatch):
    argv = ["sft", *small(start, data, beta=None, mix_previous=None)]
    take, steps = spin.take_step, []
    monkeypatch.setattr(spin, "take_step", lambda *a: (steps.append(1), 1 / (7 - len(steps)), take(*a))[2])
    with pytest.raises(ZeroDivisionError):
        spin.main(argv)
    assert spin.main(argv) == 0
    stopped = tree(here)
    shutil.rmtree(here / "run")
    assert spin.main(argv) == 0
    assert tree(here) == stopped and len(steps) == 2 * 10 + 1


def test_a_finished_run_says_so(start, data, here, capsys):
    assert spin.main(small(start, data, iterations=1)) == 0
    before = tree(here)
    capsys.readouterr()
    assert spin.main(small(start, data, iterations=1)) == 0
    assert "run: this run is finished" in capsys.readouterr().out
    (here / "run/resume").mkdir()  # of a run that died in its last line
    assert spin.main(small(start, data, iterations=1)) == 0
    assert tree(here) == before and not (here / "run/resume").exists()
    assert spin.main(small(start, data, iterations=1, seed=7)) == 2
    assert "--seed 7" in capsys.readouterr().err
    assert tree(here) == before


def test_two_processes_do_not_share_a_directory(begun, start, data, capsys):
    with resume.claimed(begun / "run"):
        assert spin.main(small(start, data)) == 2
    assert "--out run: another process is at work in it" in capsys.readouterr().err


def test_what_is_left_of_a_death_in_the_first_write(start, data, here):
    (here / "run").mkdir()
    (here / "run/run.json.tmp").write_text("{")
    assert spin.main(small(start, data, iterations=1)) == 0
    assert not (here / "run/run.json.tmp").exists()


def test_a_trained_player_is_not_trained_again(start, data, here, monkeypatch):
    """Its state is saved after the last step, however long --save-minutes is; what led to it goes with the iterate."""
    monkeypatch.setattr(spin, "evaluate", lambda *a, f=spin.evaluate, **k: f(*a, **k) if k["iterate"] < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        spin.main(small(start, data, save_minutes=1000))
    assert [p.name for p in sorted((here / "run/resume").iterdir())] == ["iterate-0", "iterate-2"]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(spin, "take_step", None)
    assert spin.main(small(start, data, save_minutes=1000)) == 0


def test_a_process_that_was_there_while_this_one_loaded(start, data, here, monkeypatch, capsys):
    """It began a run of other options in the same folder, and died: its files are not taken for those of this one."""
    original = spin.setup

    def setup(*args):
        loaded = original(*args)
        monkeypatch.setattr(spin, "setup", original)
        assert spin.main(small(start, data, seed=1, iterations=1)) == 0
        return loaded

    monkeypatch.setattr(spin, "setup", setup)
    assert spin.main(small(start, data)) == 2
    assert "another process was at work in it a moment ago" in capsys.readouterr().err
    assert json.loads((here / "run/run.json").read_text())["args"]["seed"] == 1


@pytest.mark.parametrize("text", ["[1]", "{}", '{"args": {}, "digests": {}}', "not JSON"])
def test_a_folder_with_another_run_json(start, data, here, capsys, text):
    (here / "run").mkdir()
    (here / "run/run.json").write_text(text)
    assert spin.main(small(start, data)) == 2
    assert "--out run: holds other files" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.jsonl", "pairs-0.jsonl", "iterate-1/adapter_model.safetensors", "run.json"])
def test_a_damaged_file_is_named(begun, start, data, capsys, name):
    """Disks fail, too: one line with the file's name, or, for the record, that this is no run."""
    path = begun / "run" / name
    path.write_bytes(path.read_bytes()[:-20])
    assert spin.main(small(start, data)) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and (name in error or "--out run" in error), error


def test_pairs_that_are_still_needed_are_missed(begun, start, data, capsys):
    """With --mix-previous the pairs of the iteration before are trained on again: not without a word on none."""
    (begun / "run/pairs-0.jsonl").unlink()
    assert spin.main(small(start, data)) == 1
    assert "No such file or directory: 'run/pairs-0.jsonl'" in capsys.readouterr().err


def test_damaged_state_of_training_and_shard(start, data, here, monkeypatch, capsys):
    monkeypatch.setattr(spin, "evaluate", lambda *a, f=spin.evaluate, **k: f(*a, **k) if k["iterate"] == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        spin.main(small(start, data))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    for path in (here / "run/resume/iterate-1/train.safetensors", next(here.glob("run/resume/iterate-1/score-*"))):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert spin.main(small(start, data)) == 1
        error = capsys.readouterr().err
        assert path.name in error and "damaged" in error and error.count("\n") == 1
        path.write_bytes(content)
    assert spin.main(small(start, data)) == 0


def test_no_pickle_is_kept(start, data, here, monkeypatch):
    """The state of training is tensors and JSON, both data."""
    monkeypatch.setattr(spin, "evaluate", lambda *a, f=spin.evaluate, **k: f(*a, **k) if k["iterate"] == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        spin.main(small(start, data))
    assert {p.suffix for p in (here / "run").rglob("*") if p.is_file()} <= {".json", ".jsonl", ".safetensors"}
    with safe_open(here / "run/resume/iterate-1/train.safetensors", framework="pt") as reader:
        assert len(json.loads(reader.metadata()["log"])) == 5


# ---------------------------------------------------------------- before and after


def test_dry_run_prints_the_plan_and_writes_nothing(start, data, here, capsys):
    assert spin.main(small(start, data, dry_run=True, beta="1,2", rank=0, epochs="1,3")) == 0
    printed = capsys.readouterr().out
    for text in (
        "parameters", "(all parameters)", "68 examples to train on, 12 held out", "steps: 5, 27", "memory", "disk",
        "an iteration if responses are as long as the real ones (generate", "longer than --max-new-tokens 8",
    ):  # fmt: skip
        assert text in printed, printed
    assert not list(here.iterdir())
    sft = ["sft", *small(start, data, dry_run=True, beta=None, mix_previous=None)]
    assert spin.main(sft) == 0
    assert "generate" not in capsys.readouterr().out
    assert spin.main(small(start, data, dry_run=True, batch=0)) == 2


def test_signs_of_degeneration_are_warned_of():
    """Real responses that lose more than 0.1 nats a token; cut responses that become 5% more; both only by more."""
    before = {"iterate": 1, "nll": 1.0, "truncated": 0.02, "skipped": 0}
    assert report.warnings_of([before]) == []
    assert report.warnings_of([before, {"iterate": 2, "nll": 1.09, "truncated": 0.06, "skipped": 0}]) == []
    (lost,) = report.warnings_of([before, {"iterate": 2, "nll": 1.2, "truncated": 0.02, "skipped": 0}])
    assert lost.startswith("iterate 2: ") and "0.20 nats a token" in lost and "--lr" in lost
    (cut,) = report.warnings_of([before, {"iterate": 2, "nll": 1.0, "truncated": 0.2, "skipped": 0}])
    assert "from 2% to 20%" in cut and "--unfinished" in cut
    start = {"iterate": 0, "nll": 1.0}  # without a rate that another could be compared with
    assert report.warnings_of([start, {"iterate": 1, "nll": 1.0, "truncated": 1, "skipped": 0}]) == []


def test_best_iterate_is_kept_and_named(start, data, here, capsys):
    """A learning rate that spoils the player: by KL nothing is asked; by NLL the start may be best, and is named."""
    assert spin.main(small(start, data, lr="1e-2,1")) == 0
    captured = capsys.readouterr()
    nll = [row["nll"] for row in rows(here / "run/metrics.jsonl")]
    best = nll.index(min(nll))
    assert best == 1, nll
    assert "Best by nll: iterate 1 (run/iterate-1)." in captured.out and (here / "run/iterate-1").is_dir()
    assert json.loads((here / "run/run.json").read_text())["best"] == {"iterate": 1, "metric": "nll"}
    assert "spin.py: warning: iterate 2: held-out real responses lost" in captured.err


def test_shards_are_read_or_computed_but_never_mixed_up(tmp_path):
    """Each range is worked on once; another size finds nothing to read; a shard of the wrong length is an error."""
    asked = []

    def work(items):
        asked.append(items)
        return [[i, i / 3, [None, True]] for i in items]

    expected = [[i, i / 3, [None, True]] for i in range(7)]
    assert resume.in_shards(None, "x", 7, 3, work) == expected and len(asked) == 3
    assert resume.in_shards(tmp_path, "x", 7, 3, work) == expected and len(asked) == 6
    (tmp_path / "x-3-6.jsonl").unlink()
    assert resume.in_shards(tmp_path, "x", 7, 3, work) == expected and asked[6:] == [range(3, 6)]
    assert resume.in_shards(tmp_path, "x", 7, 4, work) == expected and len(asked) == 9
    assert resume.in_shards(tmp_path, "y", 0, 4, work) == []
    (tmp_path / "x-0-3.jsonl").write_text("[0]\n")
    with pytest.raises(OSError, match="holds 1 rows, expected 3"):
        resume.in_shards(tmp_path, "x", 7, 3, work)


def spy_on_fsync(monkeypatch, paths):
    fsync = os.fsync

    def spy(handle):
        status = os.fstat(handle)
        paths.append((status.st_dev, status.st_ino))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)


def identity(path):
    return path.stat().st_dev, path.stat().st_ino


def test_content_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    """Synced, renamed, and then the folder that names it: in that order."""
    calls, replace = [], os.replace
    spy_on_fsync(monkeypatch, calls)
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("rename"), replace(*a)))
    resume.write_text(tmp_path / "x", "y")
    assert calls == [identity(tmp_path / "x"), "rename", identity(tmp_path)]


def test_folders_of_iterates_are_synced(start, data, here, monkeypatch):
    synced = []
    spy_on_fsync(monkeypatch, synced)
    assert spin.main(small(start, data)) == 0
    for name in ("iterate-1", "iterate-2", "final"):
        assert identity(here / "run" / name) in synced


def test_an_option_of_another_version_is_refused(begun, start, data, capsys):
    path = begun / "run/run.json"
    record = json.loads(path.read_text())
    record["args"]["gone"] = 1
    path.write_text(json.dumps(record))
    assert spin.main(small(start, data)) == 2
    assert "--gone None: the run in run began with 1" in capsys.readouterr().err


def test_plan_on_hand_computed_numbers(tmp_path, monkeypatch):
    """A model of 100 parameters, 60 of them trained, 3 iterations of 50 tokens; two layers, one with a window."""
    config = type("Config", (), dict(hidden_size=8, window_size=4, attention_layers=["global", "local"]))
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Parameter(torch.zeros(60)), torch.nn.Parameter(torch.zeros(40), requires_grad=False)
    model.config = config
    settings = dict(optimizer_slots=2, cache_tokens=100, batch_size=5, row_tokens=10, iterations=3, pair_tokens=50)
    got = plan.needs(model, bf16=False, **settings)
    cache = 5 * (10 + 4) * 2 * 8
    assert got[:4] == (100, 60, 400 + 60 * 3 * 4, 400 + cache * 4)
    assert got.disk == 3 * (240 + 400) + 400 + 2 * 60 * 3 * 4 + 400
    assert plan.needs(model, bf16=True, **settings)[2:4] == (240 + 80 + 720, 240 + 80 + 120 + cache * 2)
    more = plan.needs(model, bf16=False, **settings, history=True, swapped=True)
    assert more.disk == got.disk + 3 * 400 + 400
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    (tmp_path / "x").write_bytes(b"x" * 24)
    assert plan.disk_left_for(tmp_path) == 1024 and plan.disk_left_for(tmp_path / "none") == 1000


def test_times_of_the_plan_add_up(start, data, tmp_path):
    """Token by token: each prompt generated once, scored twice with --alpha, trained on once and then three times."""
    options = dict(rank=0, alpha=0.5, epochs="1,3", iterations=2, mix_previous=True, eval_limit=4)
    _, train_set, heldout, run = begin(start, data, tmp_path / "run", **options)
    text = plan.describe(train_set, heldout, run, {"generate": 0.1, "score": 0.01, "train": 0.02}, peak=2**31)
    real = sum(len(e.real_ids) for e in train_set)
    prompts = sum(len(e.prompt_ids) for e in train_set)
    pair = prompts + 2 * real
    expected = {
        "generate": 0.1 * real,
        "score": 2 * 0.01 * (pair + 2 * pair) / 2,  # pairs of the iteration before from the second on
        "train": 0.02 * (pair + 3 * 2 * pair) / 2,
        "evaluate": 2 * 4 * (0.1 * real + 0.01 * (prompts + real)) / len(train_set),
    }
    for phase, seconds in expected.items():
        assert f"{phase} {plan.duration(seconds)}" in text
    assert f"about {plan.duration(sum(expected.values()))} an iteration" in text
    assert "about 2.0 GiB of" in text and f"{run.needs.parameters:,} parameters" in text
