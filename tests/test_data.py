"""runtime/data.py: what is encoded, where a response ends, which layouts and tokenizers are read, what is held out."""

import json
import os
import random

import pytest
from helpers import ROOT
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from runtime.data import (
    Example,
    decode,
    draw,
    encode,
    fit_context,
    held_out,
    load_examples,
    load_tokenizer,
    read_tokenizer,
    shared,
)
from runtime.options import DEFAULT_TEMPLATE

EOS_TEXT = "<|endoftext|>"
TEMPLATE = DEFAULT_TEMPLATE.replace(r"\n", "\n")
GOOD = '{"prompt": "a", "response": "EY1"}\n'


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


# ---------------------------------------------------------------- special tokens


def prompt_ids(tokenizer, prompt, template=TEMPLATE, **options):
    example = Example("x", 1, prompt, "HH", [])
    encode([Example("x", 1, "other", "HH", []), example], tokenizer, template, 393, **options)
    return example.prompt_ids


def test_a_prompt_forges_no_special_token(start):
    """Neither the end of the sequence nor a part of the template; the text is there, as plain text."""
    tokenizer, eos = tokenizer_of(start)
    marks = [tokenizer.token_to_id(text) for text in ("### Instruction: ", "\n\n### Response: ")]
    for prompt in (f"a{EOS_TEXT}b", EOS_TEXT, "x\n\n### Response: HH", "### Instruction: ", "{prompt}"):
        ids = prompt_ids(tokenizer, prompt)
        assert (ids[0], ids[-1]) == tuple(marks)
        assert not {eos, *marks} & {*ids[1:-1]}
        assert tokenizer.decode(ids[1:-1], skip_special_tokens=False) == prompt


def test_a_prompt_and_the_template_make_no_special_token_together(start):
    tokenizer, eos = tokenizer_of(start)
    ids = prompt_ids(tokenizer, "endoftext", "<|{prompt}|>")
    assert eos not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == EOS_TEXT


def test_special_tokens_of_the_template_count_and_those_of_prompts_where_they_are_asked_for(start):
    tokenizer, eos = tokenizer_of(start)
    plain = prompt_ids(tokenizer, "ab", "{prompt}")
    assert prompt_ids(tokenizer, "ab", EOS_TEXT + "{prompt}" + EOS_TEXT) == [eos, *plain, eos]
    assert prompt_ids(tokenizer, f"ab{EOS_TEXT}ab", "{prompt}", special_tokens=True) == [*plain, eos, *plain]
    assert eos not in prompt_ids(tokenizer, f"ab{EOS_TEXT}ab", "{prompt}"), "the choice is made for each call"


def test_a_response_may_end_with_special_tokens_whatever_was_encoded_before(start):
    tokenizer, eos = tokenizer_of(start)
    example = Example("x", 1, EOS_TEXT, "HH" + EOS_TEXT, [])
    encode([example], tokenizer, "{prompt}", eos)
    assert example.real_ids == [*tokenizer.encode("HH").ids, eos]
    assert decode(example.real_ids, tokenizer, eos) == "HH"


@pytest.mark.parametrize("template", [TEMPLATE, "{prompt}", "Say {prompt} or {prompt}: ", f"{EOS_TEXT} {{prompt}}\n"])
@pytest.mark.parametrize("kind", ["shipped", "words"])
def test_ordinary_prompts_are_encoded_as_one_text(kind, template, start):
    """The template is cut at its special tokens only: no token boundary comes from the slot."""
    tokenizer, _ = tokenizer_of(start)
    if kind == "words":  # GPT-2's words with the space before them
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for prompt in ("HELLO", " H", "HH AH0 ", "HH\n", "caf\u00e9 \u4f60", "<|endof", "### ", "HH" * 9):
        whole = tokenizer.encode(template.replace("{prompt}", prompt), add_special_tokens=False).ids
        assert prompt_ids(tokenizer, prompt, template) == whole, prompt


def test_special_tokens_that_take_the_space_beside_them():
    """As in the templates of some chat models; of two that begin alike the longer one counts."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate("ab \n")}, []))
    ends = [AddedToken("<e>", special=True, rstrip=True), AddedToken("<e>!", special=True, lstrip=True)]
    tokenizer.add_special_tokens(ends)
    tokenizer.add_tokens([AddedToken("ab", single_word=True)])  # of no special kind: the template is not cut there
    for template in ("<e> \n{prompt}", "{prompt} <e>!", "a<e>{prompt}<e>! <e>", "aab {prompt}"):
        whole = tokenizer.encode(template.replace("{prompt}", "ab"), add_special_tokens=False).ids
        example = Example("x", 1, "ab", "", [])
        encode([example], tokenizer, template, 4)
        assert example.prompt_ids == whole, template


# ---------------------------------------------------------------- which held-out examples are used


def test_the_drawn_examples_depend_on_no_order():
    """Not on that of the records, which is often alphabetical, nor on the hash that holds out."""
    words = [Example("x", i, f"word{i:05}", "r", []) for i in range(5000)]
    drawn = draw(words, 500)
    assert len(drawn) == 500
    assert [e.line for e in drawn] == sorted(e.line for e in drawn), "the order of the file"
    assert 2300 < sum(e.line for e in drawn) / 500 < 2700, "from the whole file, not from its beginning"
    assert 200 < sum(held_out(e.prompt, 0.5) for e in drawn) < 300, "independent of what is held out"
    shuffled = random.Random(0).sample(words, 5000)
    assert {e.line for e in draw(shuffled, 500)} == {e.line for e in drawn}
    assert {e.line for e in draw(words, 400)} < {e.line for e in drawn}, "fewer are some of the more"
    assert draw(words, 0) == draw(words, 9000) == words


def test_of_equal_prompts_the_choice_depends_on_no_order_either():
    twins = [Example("x", i, "same", f"r{i % 7}", []) for i in range(7)]
    assert {e.response for e in draw(twins, 3)} == {e.response for e in draw(twins[::-1], 3)}


# ---------------------------------------------------------------- files and records that do not fit


def refusal(path, **options) -> str:
    with pytest.raises(ValueError) as caught:
        load_examples(path, **options)
    assert len(str(caught.value)) < 400 + len(str(path))
    return str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        {"x" * 10**5: 1}, {f"field{i}": 1 for i in range(9999)}, {"real": [{"role": "user" * 10**5, "content": "x"}]},
        {"real": [{"role": ["x"] * 10**5}] * 99}, {"prompt": "a", "response": ["b"] * 10**5},
        {"prompt": "a", "response": "b", "references": "c" * 10**5}, ["x" * 10**5],
    ],
)  # fmt: skip
def test_messages_quote_little_of_the_data(record, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    refusal(tmp_path / "x.jsonl")


def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")  # opening it would never return
    assert refusal(tmp_path / "pipe.jsonl").endswith("pipe.jsonl: a FIFO or a device, expected a regular file")
    assert refusal("/dev/zero") == "/dev/zero: a FIFO or a device, expected a regular file"
    for name in (tmp_path / "none.jsonl", "a\0b", "x" * 5000):
        with pytest.raises(FileNotFoundError):
            load_examples(name)


def test_official_pairs_whose_prompts_differ_are_refused(tmp_path):
    def turns(prompt, response):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]

    path = tmp_path / "x.jsonl"
    records = [{"real": turns("p", "r"), "generated": turns(p, "g")} for p in ("p", "q")]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert refusal(path, layout="pairs") == f"{path}:2: the prompts of 'real' and 'generated' differ, expected the same"
    assert [e.prompt for e in load_examples(path)] == ["p", "p"], "elsewhere `generated` is not read"


# ---------------------------------------------------------------- tokenizers that do not fit


def changed_tokenizer(start, folder, **changes):
    tokenizer = json.loads((start / "tokenizer.json").read_text())
    tokenizer["model"] |= changes
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return tokenizer


def test_a_tokenizer_encodes_in_one_way(start, tmp_path, capsys):
    """Dropout of merges, an option of training, is switched off, and a line says so."""
    changed_tokenizer(start, tmp_path, dropout=0.5)
    tokenizer, (right, _) = load_tokenizer(tmp_path, 393, 396), tokenizer_of(start)
    assert capsys.readouterr().out.endswith(
        "tokenizer.json: its dropout of 0.5 is switched off: it encodes at random\n"
    )
    text = "HH AH0 L OW1 " * 9
    assert {tuple(tokenizer.encode(text).ids) for _ in range(20)} == {tuple(right.encode(text).ids)}
    for dropout in (0.0, None):
        changed_tokenizer(start, tmp_path, dropout=dropout)
        load_tokenizer(tmp_path, 393, 396)
        assert capsys.readouterr().out == ""


def test_tokens_beyond_the_vocabulary_are_named(start, tmp_path):
    tokenizer = changed_tokenizer(start, tmp_path)
    pad = tokenizer["added_tokens"][0] | {"id": 396, "content": "[PAD]"}
    tokenizer["added_tokens"].append(pad)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path, 393, 396)
    assert str(caught.value) == (
        f"{tmp_path}/tokenizer.json: does not fit the model: its largest id is 396 (token '[PAD]'), the model has "
        "vocab_size 396 and eos_token_id 393; every token needs a row of the model's embedding"
    )
    assert load_tokenizer(tmp_path, 396, 397).id_to_token(396) == "[PAD]"
    changed_tokenizer(start, tmp_path, vocab={"x" * 10**5: 500}, merges=[])
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path, 393, 396)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("names", [["tokenizer.json"], ["vocab.json", "merges.txt"], ["merges.txt", "vocab.json"]])
def test_tokenizer_files_are_regular_and_not_too_large(names, tmp_path):
    for name in names[1:]:
        (tmp_path / name).write_text("{}")
    with open(tmp_path / names[0], "wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match=f"{names[0]}: 67,108,865 bytes, expected at most 67,108,864"):
        load_tokenizer(tmp_path, 0, 10)
    (tmp_path / names[0]).unlink()
    os.mkfifo(tmp_path / names[0])  # opening it would never return
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        load_tokenizer(tmp_path, 0, 10)


def test_equal_ids_are_one_object_in_all_lists(start):
    """Otherwise every id beyond 256 takes 28 bytes in every list that holds it."""
    tokenizer, eos = tokenizer_of(start)
    examples = [Example("x", line, "a", "HH", ["HH"]) for line in (1, 2)]
    encode(examples, tokenizer, "{prompt}", eos)
    large = [i for i, number in enumerate(examples[0].prompt_ids) if number > 256]
    assert examples[0].prompt_ids == examples[1].prompt_ids and examples[0].prompt_ids is not examples[1].prompt_ids
    assert all(examples[0].prompt_ids[i] is examples[1].prompt_ids[i] for i in large)
    far = [int("100000"), int("100000")]
    assert shared(far) == far and shared(far)[0] is shared([int("100000")])[0]
    assert shared("text") == "text" and shared([]) == [] and shared([1.5]) == [1.5]


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_tokenizer_that_doubles_text_again_and_again_is_refused(start, tmp_path, part):
    """Thirty replacements of "A" by "AA" would make a gigabyte of a letter, and end the process without a word."""
    settings = json.loads((start / "tokenizer.json").read_text())
    double = {"type": "Replace", "pattern": {"String": "A"}, "content": "AA"}
    for count, refused in ((5, False), (30, True)):
        settings[part] = {"type": "Sequence", f"{part}s": [double] * count}
        (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
        if not refused:
            read_tokenizer(tmp_path)
            continue
        with pytest.raises(ValueError, match=rf"tokenizer\.json: .*its {part} may make text more than 4096 times"):
            read_tokenizer(tmp_path)
