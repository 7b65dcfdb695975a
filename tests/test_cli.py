"""runtime/cli.py: bad input is one clear line on stderr and exit code 2, no traceback, nothing written or overwritten.

tests/test_options.py has what is wrong with single flags and recipes.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, flags, refused
from safetensors.torch import load_file, save_file

import family
import sft
import spin
from runtime import cli

GOOD = '{"prompt": "a", "response": "EY1"}\n'


@pytest.fixture
def model(start, tmp_path):
    """A copy of the start to break."""
    return shutil.copytree(start, tmp_path / "model")


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    "content, names",
    [
        ("", "holds no records"),
        ("\n\n", "holds no records"),
        (GOOD + "{oops\n", "data.jsonl:2: not valid JSON"),
        (GOOD + "\n[1, 2]\n", "data.jsonl:3: expected a JSON object, found list"),
        (GOOD + '{"prompt": "b"}\n', "data.jsonl:2: field 'response' is missing"),
        ('{"response": "b"}\n', "data.jsonl:1: field 'prompt' is missing"),
        (GOOD + '{"prompt": "b", "response": ""}\n', "data.jsonl:2: field 'response' is empty"),
        (GOOD + '{"prompt": "b", "response": "  "}\n', "data.jsonl:2: field 'response' is empty"),
        ('{"prompt": 3, "response": "b"}\n', "data.jsonl:1: field 'prompt' is int"),
        ('{"prompt": "b", "response": "c", "references": "c"}\n', "data.jsonl:1: field 'references'"),
        ('{"real": "x"}\n', "data.jsonl:1: field 'real' must be a list"),
        ('{"real": [{"role": "user", "content": "x"}]}\n', r"data.jsonl:1: field 'real' has the roles ['user']"),
        ('{"real": [{"role": "user", "content": "x"}, {"role": "assistant"}]}\n', "'content' is missing"),
        (GOOD + '{"prompt": "' + "a" * 60 + '", "response": "b"}\n', "data.jsonl:2: needs 70 tokens"),
        (GOOD, "too few records to hold out"),
        ("[" * 100_000 + "\n", "data.jsonl:1: not valid JSON"),
        (b"\xff\xfe\n", "data.jsonl:1: not readable as UTF-8"),
        ('{"prompt": "a", "response": ' + "9" * 5000 + "}\n", "data.jsonl:1: not valid JSON"),
        ('{"prompt": "a", "response": "\\ud800"}\n', "data.jsonl:1: field 'response' has half a surrogate"),
        ('{"prompt": "b", "response": "c", "references": [""]}\n', "data.jsonl:1: field 'references' is empty"),
    ],
)
def test_damaged_records_are_named_by_file_and_line(content, names, start, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert names in refused(flags(start, path, tmp_path / "out"), tmp_path / "out", capsys)


def test_data_that_is_missing_a_folder_or_no_gzip(start, tmp_path, capsys):
    out = tmp_path / "out"
    assert "nothere.jsonl" in refused(flags(start, tmp_path / "nothere.jsonl", out), out, capsys)
    assert str(tmp_path) in refused(flags(start, tmp_path, out), out, capsys)
    (tmp_path / "x.gz").write_text("plain")
    assert "x.gz" in refused(flags(start, tmp_path / "x.gz", out), out, capsys)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(GOOD.encode() * 1000)[:-20])
    assert "cut.gz" in refused(flags(start, tmp_path / "cut.gz", out), out, capsys)
    broken = bytearray(gzip.compress(GOOD.encode() * 1000))
    broken[40:60] = b"x" * 20
    (tmp_path / "broken.gz").write_bytes(broken)
    assert "broken.gz" in refused(flags(start, tmp_path / "broken.gz", out), out, capsys)
    assert "--model is missing" in refused(["--data", tmp_path / "cut.gz", "--out", out], out, capsys)
    assert "--data is missing" in refused(["--model", start, "--out", out], out, capsys)


def test_eval_data_is_checked_like_data(start, data, tmp_path, capsys):
    (tmp_path / "eval.jsonl").write_text(GOOD + "{}\n")
    argv = flags(start, data, tmp_path / "out", eval_data=tmp_path / "eval.jsonl")
    assert "eval.jsonl:2: field 'prompt' is missing" in refused(argv, tmp_path / "out", capsys)


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flag, value",
    [
        # checked against the model, the machine and the other flags
        ("rank", "17"), ("lora_targets", "nolayer"), ("lora_targets", "wte"), ("device", "cuda:99"),
        ("beta", "0.1,0.2"), ("lr", "1e-4,1e-4"),
        # checked alone
        ("lr", "-1"), ("epochs", "0"), ("temperature", "-1"), ("temperature", "1e-38"), ("batch", "1" + "0" * 20),
        ("device", "cuda:99999999999999"), ("optimizer", "sgd"), ("precision", "fp16"), ("overlong", "maybe"),
        ("unfinished", "maybe"),
    ],
)  # fmt: skip
def test_flag_values_are_refused_before_the_run(flag, value, start, data, tmp_path, capsys):
    """The message names the flag (or the target that matches nothing) and the value."""
    error = refused(flags(start, data, tmp_path / "out", **{flag: value}), tmp_path / "out", capsys)
    assert f"--{flag.replace('_', '-')}" in error or value in error


@pytest.mark.parametrize(
    "flag, value",
    [
        ("alpha", "2"), ("alpha", "nan"), ("loss", "dpo"), ("history", "-1"), ("history", "x"), ("scorer", "f"),
        ("scorer", "none.py:f"), ("min_win", "0.5"),
    ],
)  # fmt: skip
def test_values_of_the_flags_of_family_are_refused_before_the_run(flag, value, start, data, tmp_path, capsys):
    argv = flags(start, data, tmp_path / "out", **{flag: value})
    assert f"--{flag.replace('_', '-')} " in refused(argv, tmp_path / "out", capsys, family)


def test_unknown_flags_and_missing_recipes_are_one_line_in_every_script(start, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert "--nonsense" in refused([*flags(start, data, out), "--nonsense", "1"], out, capsys)
    assert "--from-scratch" in refused([*flags(start, data, out), "--from-scratch"], out, capsys)
    assert "--beta" in refused(flags(start, data, out), out, capsys, sft)
    assert "--nonsense" in refused([*flags(start, data, out), "--nonsense"], out, capsys, family)
    assert "recipe" in refused(["@no-such-recipe.args"], out, capsys)
    assert "--mod" in refused(["--mod", start, "--out", out], out, capsys)
    assert r"--a\nb" in refused([*flags(start, data, out), "--a\nb"], out, capsys)
    (tmp_path / "r.args").write_text('--model "unbalanced\n')
    assert "r.args:1: no closing quotation" in refused([f"@{tmp_path}/r.args"], out, capsys)
    scratch = flags(start, data, out, from_scratch=True, beta=None)
    assert "expected 0 with --from-scratch" in refused(scratch, out, capsys, sft)


def test_out_must_be_a_path_that_the_plot_can_name(start, data, tmp_path, capsys):
    """A path that is not UTF-8 would end the run in its last line."""
    error = refused(flags(start, data, "\udcff"), tmp_path / "x", capsys)
    assert "--out '\\udcff': expected a printable path in UTF-8" in error


def test_an_output_directory_with_something_in_it_is_left_alone(start, data, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    assert spin.main(flags(start, data, out)) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["precious"] and (out / "precious").read_text() == "x"
    assert spin.main(flags(start, data, out / "precious")) == 2


# ---------------------------------------------------------------- the model


def test_a_model_that_is_nowhere(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert "neither a directory nor a hub id" in refused(flags(tmp_path / "nowhere", data, out), out, capsys)
    assert "config.json" in refused(flags(tmp_path, data, out), out, capsys)


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', expected 'gpt_neo'"),
        ({"activation_function": "relu"}, "activation_function = 'relu'"),
        ({"eos_token_id": None}, "eos_token_id is missing"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": [1]}, "eos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"num_heads": True}, "num_heads"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon"),
        ({"attention_types": [[[["global"], "local"], 1]]}, "attention_types"),
        ({"eos_token_id": 7000}, "eos_token_id 7000"),
    ],
)
def test_a_config_that_is_wrong_is_named_with_its_field(changes, names, model, data, tmp_path, capsys):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    error = refused(flags(model, data, tmp_path / "out"), tmp_path / "out", capsys)
    assert names in error and str(model) in error


def test_weights_that_are_damaged_misshapen_or_missing(model, data, tmp_path, capsys):
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    argv, out = flags(model, data, tmp_path / "out"), tmp_path / "out"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors: damaged" in refused(argv, out, capsys)
    save_file(tensors | {"transformer.wte.weight": torch.ones(3, 16)}, weights)
    assert "transformer.wte.weight has shape (3, 16)" in refused(argv, out, capsys)
    weights.unlink()
    assert "no weights" in refused(argv, out, capsys)
    (model / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin" in refused(argv, out, capsys)
    (model / "config.json").write_text("[" * 100_000)
    assert "config.json: not valid JSON" in refused(argv, out, capsys)


def test_weights_that_are_not_finite(model, data, tmp_path, capsys):
    """The run begins, since only the first response shows it: exit code 1 and one line."""
    tensors = load_file(model / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] = torch.nan
    save_file(tensors, model / "model.safetensors")
    assert spin.main(flags(model, data, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert "responses for 'start': the model's logits are not finite" in error and error.count("\n") == 1


def test_a_vocabulary_that_does_not_fit(model, data, tmp_path, capsys):
    argv, out = flags(model, data, tmp_path / "out"), tmp_path / "out"
    tokenizer = (model / "tokenizer.json").read_text()
    changed = json.loads(tokenizer)
    changed["model"]["vocab"]["far"] = 5000
    (model / "tokenizer.json").write_text(json.dumps(changed))
    assert "does not fit the model: its largest id is 5000" in refused(argv, out, capsys)
    (model / "tokenizer.json").write_text(tokenizer[:-50])
    assert "tokenizer.json: not a readable tokenizer" in refused(argv, out, capsys)
    (model / "tokenizer.json").unlink()
    assert "no tokenizer, expected tokenizer.json" in refused(argv, out, capsys)


def test_a_tokenizer_that_cannot_encode_the_data(model, data, tmp_path, capsys):
    """A word-level tokenizer without its unknown token; a byte-pair one whose alphabet lacks the prompt's letters."""
    from tokenizers import Tokenizer, models

    out, eos = tmp_path / "out", "<|endoftext|>"
    config = json.loads((model / "config.json").read_text())
    words = {f"w{i}": i for i in range(config["eos_token_id"])} | {eos: config["eos_token_id"]}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(model / "tokenizer.json"))
    assert "the tokenizer cannot encode the data" in refused(flags(model, data, out), out, capsys)
    Tokenizer(models.BPE(words, [])).save(str(model / "tokenizer.json"))
    error = refused(flags(model, data, out, template="{prompt}"), out, capsys)
    assert "words.jsonl:" in error and "no token for the prompt" in error


# ---------------------------------------------------------------- as a process


@pytest.mark.parametrize("script", ["spin.py", "sft.py", "family.py", "seft.py"])
def test_a_shell_sees_exit_code_2_and_one_line(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--data", "nothere.jsonl", "--model", str(tmp_path / "x")],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{script}: error: ")
    assert list(tmp_path.iterdir()) == []


def process(argv, cwd, **options) -> subprocess.CompletedProcess:
    """spin.py as a process of its own, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    options = dict(capture_output=True, text=True) | options
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=environment, **options)


def test_a_terminal_that_knows_ascii_only_and_python_without_docstrings(start, data, tmp_path):
    """PYTHONIOENCODING=ascii: "±" becomes "?"; python -OO has no docstring to begin --help with."""
    argv = [str(ROOT / "spin.py"), *flags(start, data, "run")]
    done = process(argv, tmp_path, env={"PYTHONIOENCODING": "ascii", "PYTHONOPTIMIZE": "2"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "nll" in done.stdout and "?" in done.stdout
    assert process(["-OO", str(ROOT / "spin.py"), "--help"], tmp_path).returncode == 0


def test_streams_that_are_closed(start, data, tmp_path):
    """Neither output nor error: the run does its work."""
    command = f"exec {sys.executable} {ROOT}/spin.py {' '.join(flags(start, data, 'run'))} >&- 2>&-"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    assert (tmp_path / "run/final/model.safetensors").is_file()


def test_a_pipe_whose_reader_has_gone(start, data, tmp_path):
    """As under `| head -0`: one line on stderr, exit code 1, no traceback; the same command resumes."""
    read, write = os.pipe()
    os.close(read)
    argv = [str(ROOT / "spin.py"), *flags(start, data, "run")]
    done = process(argv, tmp_path, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 1
    assert "Broken pipe" in done.stderr and "the same command resumes" in done.stderr and done.stderr.count("\n") == 1
    assert process(argv, tmp_path).returncode == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no more"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_exhaustion_is_one_line_with_a_remedy(start, data, tmp_path, capsys, monkeypatch, error):
    """In training: exit code 1; other RuntimeErrors are bugs, whose traceback is wanted."""

    def fail(*args):
        raise error

    monkeypatch.setattr(spin, "take_step", fail)
    assert spin.main(flags(start, data, tmp_path / "run")) == 1
    text = capsys.readouterr().err
    assert "out of memory; lower --micro-tokens" in text and "the same command resumes" in text
    assert text.count("\n") == 1
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        spin.main(flags(start, data, tmp_path / "run"))


def test_no_message_grows_with_the_input(capsys):
    """A message may quote a value of a file, which may be megabytes."""
    assert cli.fail("x.py", "begin " + "y" * 10**6 + " end", 2) == 2
    error = capsys.readouterr().err
    assert len(error) < 700 and error.startswith("x.py: error: begin y") and error.endswith("y end\n")


def test_pip_install_is_refused_in_words(tmp_path):
    """It used to succeed and install nothing."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    argv = ["-m", "pip", "install", "--no-index", "--disable-pip-version-check", "--target", "t", "."]
    done = process(argv, tmp_path)
    assert done.returncode != 0 and not (tmp_path / "t").exists()
    assert "SPIN is not installed as a package" in done.stdout + done.stderr
