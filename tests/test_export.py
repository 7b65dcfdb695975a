"""runtime/export.py: transformers reads an exported model as the run did, and nothing of the start is lost."""

import gzip
import itertools
import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from helpers import ROOT, flags, player_of, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import respond
import spin
from data.examples import decode, encode, load_examples, load_tokenizer
from data.templates import DEFAULT_TEMPLATE, jinja_of
from model import GPTNeo, GPTNeoConfig
from runtime.export import export, side_files

TEMPLATE = DEFAULT_TEMPLATE.replace(r"\n", "\n")
CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>\r\n{% endfor %}"


def gpt2_start(path):
    """A start with GPT-2's kind of tokenizer files, vocab.json and merges.txt, of the shipped vocabulary."""
    tokens = read(ROOT / "pronounce/start/tokenizer.json")["model"]
    vocab = tokens["vocab"] | {"<|endoftext|>": len(tokens["vocab"])}
    merges = ["#version: 0.2", *(" ".join(m) if isinstance(m, list) else m for m in tokens["merges"])]
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("\n".join(merges) + "\n")
    random_model(len(vocab), vocab["<|endoftext|>"], max_position_embeddings=128).save_pretrained(path)
    return path


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json", "GPT2Tokenizer"])
def test_transformers_gives_the_same_ids_nll_and_greedy_text(kind, tmp_path):
    """The start is the embedded task's, also naming the class that replaces its pre-tokenizer, or has GPT-2's files."""
    own = kind == "vocab.json"
    start = gpt2_start(tmp_path) if own else shutil.copytree(ROOT / "pronounce/start", tmp_path / "s")
    if kind == "GPT2Tokenizer":
        (start / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    model = GPTNeo.from_pretrained(start).eval()
    eos = model.config.eos_token_id
    tokenizer = load_tokenizer(start, eos, model.config.vocab_size)
    export(model, model.config, tmp_path / "final", start, tokenizer)
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    files |= {"vocab.json", "merges.txt"} if own else set()
    assert {path.name for path in (tmp_path / "final").iterdir()} == files
    tokens = read(tmp_path / "final/tokenizer_config.json")
    assert tokens["clean_up_tokenization_spaces"] is False, "older versions of transformers: True"
    with gzip.open(ROOT / "pronounce/cmudict.jsonl.gz", "rt") as file:
        (tmp_path / "some.jsonl").write_text("".join(itertools.islice(file, 5000, 100_000, 20_000)))
    ours = load_examples(tmp_path / "some.jsonl")
    encode(ours, tokenizer, TEMPLATE, eos)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "final")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    assert (theirs.eos_token, theirs.eos_token_id, theirs.model_max_length) == ("<|endoftext|>", eos, 128)
    assert other.dtype == torch.float32
    player = player_of(model, max_new_tokens=24)
    responses = player.respond([e.prompt_ids for e in ours], 0, temperature=0.0)
    for example, (ids, _) in zip(ours, responses):
        prompt = theirs(TEMPLATE.replace("{prompt}", example.prompt))["input_ids"]
        real = [*theirs(example.response)["input_ids"], theirs.eos_token_id]
        assert (prompt, real) == (example.prompt_ids, example.real_ids)
        labels = torch.tensor([[-100] * len(prompt) + real])
        with torch.no_grad():
            nll = other(torch.tensor([prompt + real]), labels=labels).loss.item()
            logp = player.response_logps([(example.prompt_ids, example.real_ids)]).item()
        assert nll == pytest.approx(-logp / len(real), abs=1e-4)
        mask = torch.ones(1, len(prompt))
        settings = dict(attention_mask=mask, do_sample=False, max_new_tokens=24, pad_token_id=eos)
        written = other.generate(torch.tensor([prompt]), **settings)
        text = theirs.decode(written[0, len(prompt) :], skip_special_tokens=True).strip()
        assert text == decode(ids, tokenizer, eos)


@pytest.fixture
def chat(start, tmp_path):
    """A start with all files that a chat model comes with; its tokenizer, unlike config.json, ends with <|im_end|>."""
    path = shutil.copytree(start, tmp_path / "chat")
    tokenizer = read(path / "tokenizer.json")
    tokenizer["added_tokens"][1] |= {"content": "<|im_start|>"}
    tokenizer["added_tokens"][2] |= {"content": "<|im_end|>"}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|im_start|>",
            "model_max_length": 10**30, "padding_side": "left", "auto_map": {"AutoTokenizer": ["code.X", None]},
        },
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": "<|im_start|>"},
        "generation_config.json": {"eos_token_id": 395, "pad_token_id": 394, "temperature": 0.6},
        "added_tokens.json": {"<|im_end|>": 395},
        "config.json": read(path / "config.json") | {
            "pad_token_id": 394, "use_cache": True, "torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "code.X"},
        },
    }  # fmt: skip
    for name, value in files.items():
        (path / name).write_text(json.dumps(value))
    (path / "chat_template.jinja").write_bytes(CHAT.encode())
    return path


def exported(path, folder, eos):
    model = GPTNeo.from_pretrained(path).eval()
    config = replace(model.config, eos_token_id=eos)
    export(model, config, folder, path, load_tokenizer(path, eos, config.vocab_size))
    return folder


def test_what_came_with_the_start_is_in_the_export(chat, tmp_path):
    final = exported(chat, tmp_path / "final", 393)
    assert (final / "chat_template.jinja").read_bytes() == CHAT.encode()
    assert read(final / "added_tokens.json") == {"<|im_end|>": 395}
    config = read(final / "config.json")
    assert (config["pad_token_id"], config["use_cache"], config["eos_token_id"]) == (394, True, 393)
    assert not {"torch_dtype", "dtype", "auto_map"} & config.keys()
    assert read(final / "generation_config.json") == {"eos_token_id": 393, "pad_token_id": 394, "temperature": 0.6}
    assert read(final / "special_tokens_map.json") == {"eos_token": "<|endoftext|>", "pad_token": "<|im_start|>"}
    tokens = read(final / "tokenizer_config.json")
    assert tokens["model_max_length"] == 10**30 and "auto_map" not in tokens
    theirs = AutoTokenizer.from_pretrained(final)
    assert (theirs.eos_token, theirs.pad_token, theirs.padding_side) == ("<|endoftext|>", "<|im_start|>", "left")
    assert "<|im_start|>hi<|im_end|>" in theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(final)
    assert (model.config.pad_token_id, model.generation_config.temperature) == (394, 0.6)
    assert model.dtype == torch.float32


@pytest.mark.parametrize("rank", [4, 0])
def test_final_of_a_run_has_what_came_with_the_start_and_the_chosen_end_in_every_file(rank, chat, data, tmp_path):
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [393, 395]}))
    options = dict(rank=rank, eos="<|im_end|>", template="{prompt}", prompts=8, eval_limit=2)
    assert spin.main(flags(chat, data, tmp_path / "run", **options)) == 0
    for folder in ("final",) if rank else ("final", "iterate-1"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / folder)
        assert (tokenizer.eos_token_id, tokenizer.pad_token) == (395, "<|im_start|>")
        assert tokenizer.chat_template == CHAT.replace("\r\n", "\n")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / folder)
        assert (model.config.eos_token_id, model.config.pad_token_id) == (395, 394)
        assert model.generation_config.eos_token_id == [395, 393], "ends at both, its own first"


def test_an_export_of_an_export_is_the_same(chat, tmp_path):
    first = exported(chat, tmp_path / "first", 393)
    second = exported(first, tmp_path / "second", 393)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("generation_config.json", b"\xff", "not readable as UTF-8"),
        ("special_tokens_map.json", b"[1]", "expected a JSON object, found list"),
    ],
)
def test_damaged_side_files_are_named(name, content, says, chat):
    model = GPTNeo.from_pretrained(chat)
    (chat / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: .*{says}"):
        side_files(chat, model.config, load_tokenizer(chat, 393, 396))


# ---------------------------------------------------------------- chat templates, the model card, adapters


@pytest.mark.parametrize("template", [TEMPLATE, "chat", ""])
def test_a_text_template_becomes_the_chat_template_of_a_start_without_one(template, start, chat, tmp_path):
    """The start's own template stays. That an exported one writes the same prompts is shown in test_template.py."""
    tokenizer, config = load_tokenizer(start, 393, 396), GPTNeoConfig.from_json(start / "config.json")
    for path in (start, chat):
        export(GPTNeo.from_pretrained(path), config, tmp_path / f"{path.name}-out", path, tokenizer, template)
    assert (tmp_path / "chat-out/chat_template.jinja").read_bytes() == CHAT.encode()
    out = tmp_path / f"{start.name}-out"
    assert (out / "chat_template.jinja").exists() == (template == TEMPLATE)
    assert template != TEMPLATE or AutoTokenizer.from_pretrained(out).chat_template == jinja_of(TEMPLATE)


def test_the_code_in_the_model_card_answers_as_respond_does(whole, capsys, monkeypatch):
    card = (whole / "final/README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace("model.generate(**inputs)", "model.generate(**inputs, do_sample=False, max_new_tokens=8)")
    monkeypatch.chdir(whole / "final")
    exec(code.replace('"..."', '"dog"'), {})
    theirs = capsys.readouterr().out
    assert respond.main([str(whole), "--prompt", "dog", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.removesuffix(" [...]\n").strip() == theirs.strip()


def test_the_model_card_says_where_the_model_comes_from_and_tells_no_folders(whole, start, data):
    card, run = (whole / "final/README.md").read_text(), read(whole / "run.json")
    for text in (
        f"- Base model: `{start.name}`", f"- Training data: `{data.name}`", run["digests"]["data"],
        run["digests"]["model"], "--lr 0.01", "--rank 4", json.dumps(TEMPLATE), "Held-out metrics \u00b1 one",
        "tags: [spin, self-play]", "(metrics.svg)",
    ):  # fmt: skip
        assert text in card, text
    assert str(start.parent) not in card and "base_model:" not in card, "a path is no name on the hub"
    assert (whole / "final/metrics.svg").read_text().startswith("<svg")


def test_pefts_auto_class_loads_an_iterate(whole):
    ids = torch.tensor([[5, 6, 7]])
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(whole / "iterate-2")
    final = AutoModelForCausalLM.from_pretrained(whole / "final")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, final(ids).logits, atol=1e-4, rtol=0)
