"""runtime/cli.py: every way in which a run can end is an exit code and at most one line on stderr.

tests/test_options.py has what is wrong with single flags and recipes.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch
from helpers import ROOT, failed, flags, refused, small, tree
from safetensors.torch import load_file, save_file

import respond
import sft
import spin
from runtime import cli
from runtime.stopping import Interrupted, Stopped

GOOD = '{"prompt": "a", "response": "EY1"}\n'
LONG = json.dumps({"prompt": "a" * 60, "response": "b"})
ARGV = ["--model", "m", "--data", "d", "--out", "o"]
RESUMES = "; what is finished is kept in o; the same command resumes"
REMEDY = "out of memory; lower --micro-tokens or --gen-tokens, or give --checkpoint"

# ---------------------------------------------------------------- how a run ends


@pytest.fixture
def play(monkeypatch, capsys):
    """Calls main with a run that does nothing but note what is asked of it. Returns (exit code, stderr, events)."""

    def run(argv=(), setup_error=None, method_error=None, finished=False):
        events = []

        def fail(error, event):
            events.append(event)
            if error:
                raise error

        game = MagicMock(tell=events.append)
        game.begin.side_effect = lambda: events.append("begin")
        game.finish.side_effect = lambda: events.append("finish")

        def setup(args, command, model_class):
            fail(setup_error, command)
            return None if finished else "model", [], game

        monkeypatch.setattr(cli, "setup", setup)
        monkeypatch.setattr(cli, "observers", lambda *args: [])
        monkeypatch.setattr(cli.plan, "describe", lambda *args: "the plan")
        monkeypatch.setattr(cli.plan, "dry_run", lambda *args: events.append("dry run"))
        method = lambda *args: fail(method_error, "method")  # noqa: E731
        code = cli.main("spin", method, MagicMock(), spin.SpinOptions, [*ARGV, *argv])
        output = capsys.readouterr()
        assert ("the plan" in output.out) == ("begin" in events or "dry run" in events)
        return code, output.err, events

    return run


def test_a_run_that_ends_well_begins_plays_finishes_and_takes_leave_of_its_observers(play):
    assert play() == (0, "", ["spin", "begin", "method", "finish", "close"])
    assert play(["--dry-run"]) == (0, "", ["spin", "dry run"])
    assert play(finished=True) == (0, "", ["spin", "finish"])


@pytest.mark.parametrize(
    "where, error, code, line",
    [
        ("setup", ValueError("the value"), 2, "the value"),
        ("setup", FileNotFoundError("no\nfile \x1b[2J"), 2, r"no file \x1b[2J"),
        ("setup", Stopped("damaged"), 2, "damaged"),
        ("setup", Interrupted(15), 143, "stopped by SIGTERM"),
        ("setup", MemoryError("no more"), 2, f"{REMEDY} (no more)"),
        ("method", Stopped("no pair is left"), 1, "no pair is left"),
        ("method", OSError("the disk is full"), 1, f"the disk is full{RESUMES}"),
        ("method", Interrupted(2), 130, f"stopped by SIGINT{RESUMES}"),
        ("method", MemoryError("no more"), 1, f"{REMEDY} (no more){RESUMES}"),
        ("method", torch.OutOfMemoryError("2 GiB.\nmore lines"), 1, f"{REMEDY} (2 GiB.){RESUMES}"),
        ("method", RuntimeError("[] can't allocate memory: x"), 1, f"{REMEDY} ([] can't allocate memory: x){RESUMES}"),
    ],
)
def test_what_is_wrong_before_the_run_begins_is_bad_input_and_later_a_line_says_that_it_resumes(
    play, where, error, code, line
):
    events = ["spin"] if where == "setup" else ["spin", "begin", "method", "close"]
    assert play(**{f"{where}_error": error}) == (code, f"spin.py: error: {line}\n", events)


@pytest.mark.parametrize("argv, out", [([], "runs/sft"), (["--out", "o"], "o")])
def test_the_default_folder_of_a_run_has_the_name_of_its_script(argv, out, monkeypatch, capsys):
    def setup(args, command, class_of):
        raise ValueError(args.out)

    monkeypatch.setattr(cli, "setup", setup)
    assert sft.main(["--model", "m", "--data", "d", *argv]) == 2
    assert capsys.readouterr().err == f"sft.py: error: {out}\n"


@pytest.mark.parametrize("where, error", [
    ("method_error", ValueError("a bug")), ("method_error", RuntimeError("shapes")), ("setup_error", KeyError("x")),
    ("setup_error", RuntimeError("shapes")),
])  # fmt: skip
def test_bugs_keep_their_traceback(play, where, error):
    with pytest.raises(type(error)):
        play(**{where: error})


# ---------------------------------------------------------------- as a process


def process(argv, cwd, **options) -> subprocess.CompletedProcess:
    """A script as a process of its own, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=environment, **options)


def test_a_shell_sees_exit_code_2_and_one_line(tmp_path):
    done = process(["-m", "methods.family", "--temprature=1"], tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("python -m methods.family: error: ") and list(tmp_path.iterdir()) == []


SHORT = dict(prompts=8, eval_limit=2, max_new_tokens=2)


def test_a_terminal_that_knows_ascii_only(start, data, here, monkeypatch):
    """ "\u00b1" becomes "?"."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert spin.main(flags(start, data, "run", **SHORT)) == 0
    printed = terminal.buffer.getvalue()
    assert b"nll" in printed and b"?" in printed


def test_streams_that_are_closed(start, data, here, monkeypatch):
    """Output and error are closed, so Python has None for both: the run does its work."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert spin.main(flags(start, data, "run", **SHORT)) == 0 and (here / "run/final/model.safetensors").is_file()


@contextlib.contextmanager
def unread_pipe():
    """The writing end of a pipe whose reader has gone, as under `| true`."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.mark.parametrize("buffered", [True, False])
def test_a_pipe_whose_reader_has_gone(buffered, start, data, whole, here, monkeypatch, capsys):
    """The exit code is 141, that of SIGPIPE; at most one line is printed, and what is finished stays finished."""

    def unread(main, *argv) -> str:
        with unread_pipe() as write, monkeypatch.context() as patch:
            raw = io.FileIO(write, "w", closefd=False)
            binary = io.BufferedWriter(raw) if buffered else raw
            patch.setattr(sys, "stdout", io.TextIOWrapper(binary, write_through=not buffered))
            try:
                code = main([*argv])
            except SystemExit as end:
                code = end.code
        error = capsys.readouterr().err
        assert code == 141 and "Traceback" not in error and error.count("\n") <= 1, error
        return error

    assert "Broken pipe" in unread(spin.main, *small(start, data, out="other"))
    shutil.copytree(whole, here / "run")
    unread(spin.main, *small(start, data))
    assert tree(here / "run") == tree(whole)
    unread(spin.main, "--help")
    unread(respond.main, "run", "--prompt", "AB", "--out", "answers")


def test_an_unread_pipe_of_a_process(tmp_path):
    """Python itself flushes at the end, which would be a second line."""
    with unread_pipe() as write:
        done = process([ROOT / "spin.py", "--help"], tmp_path, stdout=write)
    assert done.returncode == 141 and done.stderr.count("\n") <= 1


def test_pip_install_is_refused_in_words(tmp_path):
    """This project is a folder of scripts: an installation would contain nothing."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    argv = ["-m", "pip", "install", "--no-index", "--disable-pip-version-check", "--target", "t", "."]
    done = process(argv, tmp_path)
    assert done.returncode != 0 and not (tmp_path / "t").exists()
    assert "SPIN is not installed as a package" in done.stdout + done.stderr


# ---------------------------------------------------------------- bad input: one line, exit code 2, nothing written


@pytest.mark.parametrize("line, says", [("{oops", ": not valid JSON"), (LONG, ": needs 70 tokens")])
def test_data_that_is_wrong_is_named_by_file_and_line(line, says, start, data, tmp_path, capsys):
    path, out = tmp_path / "data.jsonl", tmp_path / "out"
    path.write_text(GOOD)
    assert "too few records to hold out" in refused(flags(start, path, out), out, capsys)
    path.write_text(f"{GOOD}{line}\n")
    assert f"{path}:2{says}" in refused(flags(start, path, out), out, capsys)
    assert f"{path}:2{says}" in refused(flags(start, data, out, eval_data=path), out, capsys)


@pytest.mark.parametrize(
    "given, names",
    [
        ({"data": None}, "--data is missing"), ({"start": None}, "--model is missing"),
        ({"start": "a.gguf"}, "neither a directory nor a hub id of the form owner/name[@revision]; smollm2/convert.py"),
        ({"lora_targets": "nolayer"}, "--lora-targets: target 'nolayer'"), ({"device": "cuda:99"}, "cuda:99"),
        ({"fields": "prompt=qestion"}, "--fields prompt=qestion: no record of"),
    ],
)  # fmt: skip
def test_flags_are_checked_against_the_model_the_machine_and_each_other(given, names, start, data, tmp_path, capsys):
    argv = flags(**{"start": start, "data": data, "out": tmp_path / "out"} | given)
    assert names in refused(argv, tmp_path / "out", capsys)


def test_a_model_without_weights_or_with_another_tokenizer(start, data, tmp_path, capsys):
    from tokenizers import Tokenizer, models

    model, out = shutil.copytree(start, tmp_path / "model"), tmp_path / "out"
    eos = json.loads((model / "config.json").read_text())["eos_token_id"]
    words = {f"w{i}": i for i in range(eos)} | {"<|endoftext|>": eos}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(model / "tokenizer.json"))
    assert "the tokenizer cannot encode the data" in refused(flags(model, data, out), out, capsys)
    shutil.copy(start / "tokenizer.json", model)
    (model / "model.safetensors").unlink()
    assert str(model) in refused(flags(model, data, out), out, capsys)


def test_an_output_directory_with_something_in_it_is_left_alone(start, data, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    assert "holds other files" in failed(flags(start, data, out), capsys)
    assert [p.name for p in out.iterdir()] == ["precious"] and (out / "precious").read_text() == "x"
    assert spin.main(flags(start, data, out / "precious")) == 2


def test_weights_that_are_not_finite(start, data, tmp_path, capsys):
    """The run begins, since only the first response shows it: exit code 1 and one line."""
    model = shutil.copytree(start, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] = torch.nan
    save_file(tensors, model / "model.safetensors")
    assert "the model's logits are not finite" in failed(flags(model, data, tmp_path / "out"), capsys, 1)


def test_python_without_docstrings(capsys):
    """python -OO has no docstring to begin --help with."""
    with pytest.raises(SystemExit):
        cli.main("spin", None, None, spin.SpinOptions, ["--help"], about=None)
    assert capsys.readouterr().out.startswith("usage: spin.py [@RECIPE")
