"""Bad input: one clear line on stderr, exit code 2, no traceback, nothing written or overwritten."""

import gzip
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_spin import flags

import spin

GOOD = '{"prompt": "a", "response": "EY1"}\n'


def refused(argv, out, capsys) -> str:
    """The one line that a refused command prints; checks the exit code and that no file was written."""
    assert spin.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("spin.py: error: ") and error.count("\n") == 1, error
    assert not out.exists() or not any(out.iterdir())
    return error


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
def test_data(content, names, start, tmp_path, capsys):
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


def test_out_that_the_plot_could_not_name(start, data, tmp_path, capsys):
    """A path that is not UTF-8 would end the run in its last line."""
    assert "--out '\\udcff': expected a path in UTF-8" in refused(flags(start, data, "\udcff"), tmp_path / "x", capsys)


def test_eval_data_is_checked_like_data(start, data, tmp_path, capsys):
    (tmp_path / "eval.jsonl").write_text(GOOD + "{}\n")
    argv = flags(start, data, tmp_path / "out", eval_data=tmp_path / "eval.jsonl")
    assert "eval.jsonl:2: field 'prompt' is missing" in refused(argv, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("beta", "0"), ("beta", "nan"), ("beta", "x"), ("beta", "0.1,0.2"), ("lr", "-1"), ("lr", "1e-4,1e-4"),
        ("lr", ""), ("epochs", "0"), ("epochs", "1.5"), ("temperature", "-1"), ("temperature", "nan"),
        ("top_p", "0"), ("top_k", "-1"),
        ("rank", "-1"), ("rank", "x"), ("lora_alpha", "0"), ("alpha", "2"), ("alpha", "nan"), ("loss", "dpo"),
        ("history", "0"), ("history", "x"), ("scorer", "f"), ("scorer", "none.py:f"), ("min_win", "0.5"),
        ("lora_dropout", "1"), ("lora_targets", "nolayer"),
        ("lora_targets", "wte"), ("optimizer", "sgd"), ("precision", "fp16"), ("device", "tpu"), ("device", "cuda:99"),
        ("batch", "0"), ("micro_tokens", "-1"), ("gen_batch", "0"), ("max_new_tokens", "0"), ("iterations", "0"),
        ("template", "no slot"), ("overlong", "maybe"), ("unfinished", "maybe"), ("eval_share", "1"),
        ("eval_share", "0"),
        ("warmup", "2"), ("clip", "0"), ("prompts", "-1"), ("eval_limit", "-1"), ("seed", "x"), ("weight_decay", "-1"),
        ("temperature", "1e-38"), ("rank", "17"), ("batch", "1" + "0" * 20), ("device", "cuda:99999999999999"),
    ],
)  # fmt: skip
def test_flag_values(flag, value, start, data, tmp_path, capsys):
    """The message names the flag (or the target that matches nothing) and the value."""
    error = refused(flags(start, data, tmp_path / "out", **{flag: value}), tmp_path / "out", capsys)
    assert f"--{flag.replace('_', '-')}" in error or value in error


def test_unknown_flags_and_flags_of_the_other_command(start, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert "--nonsense" in refused([*flags(start, data, out), "--nonsense", "1"], out, capsys)
    assert "--from-scratch" in refused([*flags(start, data, out), "--from-scratch"], out, capsys)
    assert "--beta" in refused(["sft", *flags(start, data, out)], out, capsys)
    assert "recipe" in refused(["@no-such-recipe.args"], out, capsys)
    assert "--mod" in refused(["--mod", start, "--out", out], out, capsys)
    assert "--a b" in refused([*flags(start, data, out), "--a\nb"], out, capsys)
    (tmp_path / "r.args").write_text('--model "unbalanced\n')
    assert "recipe line '--model \"unbalanced'" in refused([f"@{tmp_path}/r.args"], out, capsys)
    scratch = flags(start, data, out, from_scratch=True, beta=None)
    assert "expected 0 with --from-scratch" in refused(["sft", *scratch], out, capsys)


def test_model_that_is_nowhere(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert "neither a directory nor a hub id" in refused(flags(tmp_path / "nowhere", data, out), out, capsys)
    assert "config.json" in refused(flags(tmp_path, data, out), out, capsys)


@pytest.fixture
def model(start, tmp_path):
    """A copy of the start to break."""
    return shutil.copytree(start, tmp_path / "model")


def change_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


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
def test_config(changes, names, model, data, tmp_path, capsys):
    change_config(model, **changes)
    error = refused(flags(model, data, tmp_path / "out"), tmp_path / "out", capsys)
    assert names in error and str(model) in error


def test_weights(model, data, tmp_path, capsys):
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


def test_vocabulary_that_does_not_fit(model, data, tmp_path, capsys):
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


def test_tokenizer_that_cannot_encode_the_data(model, data, tmp_path, capsys):
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


def test_output_directory_with_something_in_it(start, data, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    assert spin.main(flags(start, data, out)) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["precious"] and (out / "precious").read_text() == "x"
    assert spin.main(flags(start, data, out / "precious")) == 2


@pytest.mark.parametrize("command", ["spin", "sft"])
def test_three_steps_that_are_not_finite_stop_the_run(command, start, data, tmp_path, capsys):
    """A learning rate of 1e30 makes the second step's loss NaN: exit code 1, the steps named, no iterate 1 written."""
    beta = {"beta": None} if command == "sft" else {}
    argv = [command, *flags(start, data, tmp_path / "out", rank=0, lr=1e30, warmup=0, **beta)]
    assert spin.main(argv) == 1
    error = capsys.readouterr().err
    assert "iteration 0, steps 2 to 4 of 5: loss or gradient is not finite" in error and error.count("\n") == 1
    assert not (tmp_path / "out/iterate-1").exists()
    steps = [json.loads(line) for line in (tmp_path / "out/steps-0.jsonl").read_text().splitlines()]
    assert [step["skipped"] for step in steps] == [False, True, True, True], "the way there is kept"
    assert steps[-1]["loss"] is None, "NaN is not JSON"
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 1, "what was written before stays"


def test_one_step_that_is_not_finite_is_skipped_and_counted(start, data, tmp_path, capsys, monkeypatch):
    """The weights stay as they were, the next step goes on from there, and a warning counts it."""
    weights, real = [], spin.spin_loss

    def spoiled(*args):
        weights.append(next(p for p in players[0].parameters() if p.requires_grad).detach().clone())
        return real(*args) * (math.nan if len(weights) == 2 else 1)

    players = []
    original = spin.train
    monkeypatch.setattr(spin, "train", lambda player, *a, **k: (players.append(player), original(player, *a, **k))[1])
    monkeypatch.setattr(spin, "spin_loss", spoiled)
    assert spin.main(flags(start, data, tmp_path / "out", micro_tokens=10**6)) == 0
    steps = [json.loads(line) for line in (tmp_path / "out/steps-0.jsonl").read_text().splitlines()]
    assert [step["skipped"] for step in steps] == [False, True, False, False, False]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3])
    assert "steps skipped, since their loss or gradient was not finite: 1" in capsys.readouterr().err
    row = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert row["skipped"] == 1 and row["loss"] == steps[-1]["loss"]


def test_weights_that_are_not_finite(model, data, tmp_path, capsys):
    tensors = load_file(model / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] = torch.nan
    save_file(tensors, model / "model.safetensors")
    assert spin.main(flags(model, data, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert "responses for 'start': the model's logits are not finite" in error and error.count("\n") == 1


def test_as_a_process(tmp_path):
    """What a shell sees: exit code 2, one line, no traceback."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "spin.py"), "--data", "nothere.jsonl", "--model", str(tmp_path / "x")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
