"""runtime/setup.py: models and their end token, numbers in bf16, which examples are held out, what counts as right."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from helpers import begin, die_at, flags, refused, rows
from safetensors.torch import load_file, save_file

import lora
import spin
from data.examples import draw
from model import GPTNeo
from runtime.export import CHANGED, COPIED
from runtime.resume import digest_of_model
from runtime.run import Run
from runtime.setup import end_token


def test_no_held_out_word_is_ever_trained_on(start, data, tmp_path):
    """Supervised fine-tuning and self-play hold out the same prompts of the same data."""
    _, examples, run = begin(start, data, tmp_path / "a")
    _, sft_examples, sft_run = begin(start, data, tmp_path / "b", command="sft", from_scratch=True, rank=0, beta=None)
    assert not {e.prompt for e in examples} & {e.prompt for e in run.work.heldout}
    assert [e.prompt for e in run.work.heldout] == [e.prompt for e in sft_run.work.heldout]
    assert [e.prompt for e in examples] == [e.prompt for e in sft_examples]


@pytest.mark.parametrize("rank", [4, 0])
def test_bf16_run_keeps_small_updates(start, data, tmp_path, rank):
    """bf16: the frozen base is bf16 under LoRA, everything trained is fp32, in full-parameter training too.

    final/ is the fp32 base as it is on disk with the adapter merged into it, not the bf16 copy that was trained on.
    """
    player, _, _ = begin(start, data, tmp_path / "run", rank=rank, precision="bf16")
    assert player.dtype == torch.bfloat16
    trained = {p.dtype for p in player.model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in player.model.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    assert frozen == ({torch.bfloat16} if rank else set())
    argv = flags(start, data, tmp_path / "main", rank=rank, precision="bf16", lr=1e-4, prompts=8, eval_limit=2)
    assert spin.main(argv) == 0
    first = rows(tmp_path / "main/steps-0.jsonl")[0]
    assert first["loss"] == pytest.approx(0.693147, abs=5e-3)
    if rank:
        expected = GPTNeo.from_pretrained(start)
        lora.load_adapter(expected, tmp_path / "main/iterate-1")
        lora.merge(expected)
        lora.remove_lora(expected)
        final = GPTNeo.from_pretrained(tmp_path / "main/final")
        for name, parameter in final.named_parameters():
            torch.testing.assert_close(parameter, expected.get_parameter(name), msg=name)
        wte = final.transformer["wte"].weight
        assert not torch.equal(wte, wte.bfloat16().float()), "else nothing would be lost in bf16"


def test_model_may_be_a_hub_id(start, data, tmp_path, monkeypatch):
    """Without safetensors, .bin files are asked for. A resumed run asks for the commit that it began with."""
    asked, commit = [], "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(start, tmp_path / commit)

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision, [p for p in allow_patterns if "model" in p]))
        assert {"config.json", "tokenizer.json", *COPIED, *CHANGED} <= {*allow_patterns}
        return str(tmp_path / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    die_at(Run, "evaluate", flags("owner/gpt-neo.tiny", data, tmp_path / "run"))
    assert json.loads((tmp_path / "run/run.json").read_text())["revision"] == commit
    begin("owner/gpt-neo.tiny", data, tmp_path / "run")
    begin("owner/gpt-neo.tiny@v2", data, tmp_path / "other")
    weights = ["model*.safetensors*"]
    assert asked == [("owner/gpt-neo.tiny", revision, weights) for revision in (None, commit, "v2")]
    (tmp_path / commit / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        begin("owner/old", data, tmp_path / "again")
    assert asked[-1] == ("owner/old", commit, ["pytorch_model*.bin*"])


# ---------------------------------------------------------------- held-out data


@pytest.mark.parametrize("own_file", [False, True])
def test_the_limit_draws_held_out_examples(own_file, start, data, tmp_path):
    options = dict(eval_data=data) if own_file else dict(eval_share=0.5)
    _, _, whole = begin(start, data, tmp_path / "a", eval_limit=0, **options)
    _, _, run = begin(start, data, tmp_path / "b", eval_limit=8, **options)
    assert [e.line for e in run.work.heldout] == [e.line for e in draw(whole.work.heldout, 8)]
    assert run.work.heldout != whole.work.heldout[:8]


def test_held_out_prompts_that_are_trained_on_are_counted(start, data, tmp_path, capsys):
    lines = data.read_text().splitlines()
    (tmp_path / "eval.jsonl").write_text("\n".join([*lines[:3], *lines[:2], '{"prompt": "new", "response": "N"}']))
    begin(start, data, tmp_path / "run", eval_data=tmp_path / "eval.jsonl", eval_limit=0)
    line = "held-out data: 3 of its prompts are training prompts, too; metrics may flatter\n"
    assert line in capsys.readouterr().out
    (tmp_path / "data.jsonl").write_text("\n".join(lines * 2))
    begin(start, tmp_path / "data.jsonl", tmp_path / "run")
    assert "held-out data" not in capsys.readouterr().out, "records of one prompt are on one side"


def test_what_was_read_is_shown_before_the_run(start, data, tmp_path, capsys):
    """One line says what was taken and left out, and the first example is shown as the model sees it."""
    path = tmp_path / "x.jsonl"
    records = [json.loads(line) | {"id": 3} for line in data.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    _, (example, *_), _ = begin(start, path, tmp_path / "run")
    taken = "prompt -> prompt, references -> references, response -> response; left out: id"
    prompt = rf"### Instruction: {example.prompt}\n\n### Response: "
    shown = f'first prompt: "{prompt}"\nfirst response: "{example.response}<|endoftext|>"\n'
    assert capsys.readouterr().out == f"{path}: {taken}\n{shown}"


def test_special_tokens_in_prompts_count_where_the_option_says_so(start, data, tmp_path):
    record = {"prompt": "a<|endoftext|>b", "response": "HH"}
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    for asked in (None, True):
        _, (example,), _ = begin(start, tmp_path / "x.jsonl", tmp_path / "run", eval_data=data, special_tokens=asked)
        assert (393 in example.prompt_ids) == bool(asked)


# ---------------------------------------------------------------- models


@pytest.fixture
def chat(start, tmp_path):
    """A start whose tokenizer_config.json says that "### Instruction: ", id 394, ends responses."""
    path = shutil.copytree(start, tmp_path / "chat")
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "### Instruction: "}}))
    return path


def test_the_end_token_is_chosen(chat, data, tmp_path):
    """Without --eos the end token is that of config.json, whatever tokenizer_config.json says."""
    _, examples, run = begin(chat, data, tmp_path / "run")
    assert (run.work.eos_token_id, examples[0].real_ids[-1]) == (393, 393)
    for eos in ("### Instruction: ", "394"):
        player, examples, run = begin(chat, data, tmp_path / "run", eos=eos, template="{prompt}")
        assert (run.work.eos_token_id, player.eos_token_id, examples[0].real_ids[-1]) == (394, 394, 394)


def test_the_first_of_several_end_tokens_is_used_and_responses_may_end_with_each(chat, data, tmp_path):
    """config.json may list several end tokens, as that of Llama 3 does, or leave them to generation_config.json."""
    (chat / "generation_config.json").write_text('{"eos_token_id": [394, 393]}')
    assert [end_token(chat, ids, "") for ids in ([395, 393], None, 393)] == [395, 394, 393]
    _, (example, *_), run = begin(chat, data, tmp_path / "run", template="{prompt}")
    assert example.real_ids[-1] == 394
    assert run.work.text([*example.real_ids[:-1], 393]) == run.work.text(example.real_ids) == example.response


def test_a_model_without_an_end_token_needs_the_option(chat, data, tmp_path, capsys):
    config = json.loads((chat / "config.json").read_text())
    (chat / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    out = tmp_path / "run"
    error = refused(flags(chat, data, out), out, capsys)
    assert "config.json: eos_token_id is missing, and responses could not end; --eos names the end token" in error
    _, _, run = begin(chat, data, out, eos="393")
    assert run.work.eos_token_id == 393


@pytest.mark.parametrize("eos", ["nope", "396", "9" * 9, "9" * 5000, "-1", "\u0661"])
def test_an_end_token_that_is_none(eos, start, data, tmp_path, capsys):
    error = refused(flags(start, data, tmp_path / "run", eos=eos), tmp_path / "run", capsys)
    assert "tokenizer.json has no such token" in error or f"and eos_token_id {eos};" in error
    assert len(error) < 500


def test_an_adapter_given_as_the_model(start, data, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    error = refused(flags(adapter, data, tmp_path / "run"), tmp_path / "run", capsys)
    assert f"--model {adapter}: this is an adapter: give it as --adapter and its base as --model" in error
    shutil.copytree(start, adapter, dirs_exist_ok=True)
    begin(adapter, data, tmp_path / "run")


def test_a_model_that_is_missing(start, data, here, monkeypatch, capsys):
    def offline(name, **options):
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    error = refused(flags("models/other", data, here / "run"), here / "run", capsys)
    assert "--model models/other: no such" in error and "no network" in error
    assert "neither a directory nor a hub id" in refused(flags("a b", data, "run"), here / "run", capsys)


def test_the_digest_of_a_model_covers_what_final_is_made_of(chat):
    """The weights that are read count, although an adapter in the model's folder is in safetensors."""
    (chat / "tokenizer_config.json").unlink()
    os.mkfifo(chat / "merges.txt")  # Nothing reads this file.
    tensors = load_file(chat / "model.safetensors")
    (chat / "model.safetensors").unlink()
    save_file({"x": torch.zeros(1)}, chat / "adapter_model.safetensors")
    digests = set()
    for value in (0, 1):
        tensors["transformer.ln_f.bias"][0] = value
        torch.save(tensors, chat / "pytorch_model.bin")
        digests.add(digest_of_model(chat))
    names = {*COPIED, *CHANGED} - {"merges.txt"}
    for name in names:
        (chat / name).write_text("{}")
        digests.add(digest_of_model(chat))
    assert len(digests) == len(names) + 2


def test_an_adapter_brings_its_settings_and_one_that_is_missing_is_named(start, data, tmp_path, capsys):
    model = GPTNeo.from_pretrained(start)
    lora.add_lora(model, 3, 7, 0.25)
    lora.save_adapter(model, tmp_path / "adapter")
    _, _, run = begin(start, data, tmp_path / "run", adapter=tmp_path / "adapter", rank=None)
    assert (run.args.rank, run.args.lora_alpha, run.args.lora_dropout) == (3, 7, 0.25)
    argv = flags(start, data, tmp_path / "out", adapter=tmp_path / "adaptor", rank=None)
    error = refused(argv, tmp_path / "out", capsys)
    assert f"--adapter {tmp_path}/adaptor: no such directory" in error


def test_given_pairs_need_no_room_for_a_generated_response(start, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "ABCDEFGH", "chosen": "B", "rejected": "D"}\n')
    (tmp_path / "eval.jsonl").write_text('{"prompt": "A", "response": "B"}\n')
    options = dict(pairs=tmp_path / "pairs.jsonl", eval_data=tmp_path / "eval.jsonl", template="{prompt}")
    _, (example,), _ = begin(start, None, tmp_path / "run", command="family", max_new_tokens=60, **options)
    assert len(example.prompt_ids) > 4, "else it would fit the context of 64 tokens"
