"""runtime/data.py: what is encoded, where a response ends, which layouts and tokenizers are read, what is held out."""

import json

import pytest
from helpers import ROOT

from runtime.data import Example, encode, fit_context, held_out, load_examples, load_tokenizer


def tokenizer_of(start):
    """(tokenizer, id of its end-of-sequence token)"""
    eos = json.loads((start / "config.json").read_text())["eos_token_id"]
    return load_tokenizer(start, eos, 10**6), eos


def test_prompt_and_response_are_encoded_apart(start):
    """'H' at the end of the prompt and 'H' at the start of the response would merge into 'HH' (TRL #1679)."""
    tokenizer, eos = tokenizer_of(start)
    assert len(tokenizer.encode("HH", add_special_tokens=False).ids) == 1
    example = Example("x", 1, "H", "H", ["H"])
    encode([example], tokenizer, "{prompt}", eos)
    assert example.prompt_ids + example.real_ids == [*tokenizer.encode("H").ids * 2, eos]


@pytest.mark.parametrize("text", ["HH AH0", "HH AH0<|endoftext|>", "HH AH0<|endoftext|><|endoftext|>"])
def test_real_responses_end_with_exactly_one_eos(start, text):
    tokenizer, eos = tokenizer_of(start)
    example = Example("x", 1, "a", text, [text])
    encode([example], tokenizer, "{prompt}", eos)
    assert example.real_ids == [*tokenizer.encode("HH AH0").ids, eos]


def test_eos_inside_a_response_is_refused(start):
    tokenizer, eos = tokenizer_of(start)
    with pytest.raises(ValueError, match=r"x:7: .*end-of-sequence token inside"):
        encode([Example("x", 7, "a", "HH<|endoftext|>AH0", [])], tokenizer, "{prompt}", eos)


def test_over_long_examples_are_an_error_or_counted(start):
    tokenizer, eos = tokenizer_of(start)
    examples = [Example("f", 1, "ab", "HH", []), Example("f", 2, "a" * 60, "HH", [])]
    encode(examples, tokenizer, "{prompt}", eos)
    with pytest.raises(ValueError, match=r"f:2: needs 68 tokens .*context is 64"):
        fit_context(examples, 64, 8, "error")
    kept, skipped = fit_context(examples, 64, 8, "skip")
    assert [e.where for e in kept] == ["f:1"]
    assert skipped == 1
    assert examples[1].real_ids[-1] == eos, "nothing was cut"


def test_official_layout_equals_the_plain_one(tmp_path):
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "q", "response": "a"}\n\n')
    official = tmp_path / "official.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    official.write_text(json.dumps({"real": turns, "generated": turns}) + "\n")
    (a,), (b,) = load_examples(plain), load_examples(official)
    assert (a.prompt, a.response, a.references) == (b.prompt, b.response, b.references) == ("q", "a", ["a"])


def test_gpt2_style_tokenizer_equals_tokenizer_json(tmp_path):
    """vocab.json + merges.txt in a directory gives the ids that transformers' GPT-2 tokenizer gives."""
    from transformers import GPT2TokenizerFast

    tokenizer = json.loads((ROOT / "pronounce/start/tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"] | {"<|endoftext|>": len(tokenizer["model"]["vocab"])}
    merges = ["#version: 0.2"] + [" ".join(m) if isinstance(m, list) else m for m in tokenizer["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n")
    ours = load_tokenizer(tmp_path, vocab["<|endoftext|>"], len(vocab))
    theirs = GPT2TokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for text in ("HH AH0 L OW1", "### Instruction: x\n\n### Response: ", "caf\u00e9 \u4f60 12", " <|endoftext|>"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


def test_the_held_out_share_is_the_share_asked_for():
    share = sum(held_out(f"word{i}", 0.1) for i in range(20_000)) / 20_000
    assert abs(share - 0.1) < 0.01
