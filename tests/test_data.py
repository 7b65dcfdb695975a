"""data/examples.py: what is encoded, where a response ends, which tokenizers are read, and what is held out."""

import json
import random
from dataclasses import replace

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data.examples import Example, digest, draw, encode, held_out, load_tokenizer
from data.templates import DEFAULT_TEMPLATE

POINTER = "version git-lfs/v1\nsize 9\n"
EMPTY = Tokenizer(models.BPE()).to_str()
EOS_TEXT = "<|endoftext|>"
TEMPLATE = DEFAULT_TEMPLATE.replace(r"\n", "\n")


@pytest.fixture
def tokenizer(start):
    """The tokenizer of the embedded task, in which 393 is the end-of-sequence token."""
    return load_tokenizer(start, 393, 10**6)


def encoded(tokenizer, prompt, response="HH", template="{prompt}", eos=393):
    """The example after encoding, beside another one."""
    example = Example("x:7", 7, prompt, response, [])
    encode([Example("x", 1, "other", "HH", []), example], tokenizer, template, eos)
    return example


def prompt_ids(tokenizer, prompt, template=TEMPLATE):
    return encoded(tokenizer, prompt, template=template).prompt_ids


def test_prompt_and_response_are_encoded_apart(tokenizer):
    """'H' at the end of the prompt and 'H' at the start of the response would merge into 'HH' (TRL #1679)."""
    assert len(tokenizer.encode("HH", add_special_tokens=False).ids) == 1
    example = encoded(tokenizer, "H", "H")
    assert example.prompt_ids + example.real_ids == [*tokenizer.encode("H").ids * 2, 393]


def test_eos_inside_a_response_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"x:7: the response .*end-of-sequence token inside"):
        encoded(tokenizer, "a", "HH<|endoftext|>AH0")


def test_the_digest_is_that_of_the_contents():
    """The place of the file does not count. The line does, since --history knows a record by its line."""
    example = Example("f:1", 1, "p", "r", ["r"], "g", (0.9, 0.1), [1], [2], [3])
    changes = [{"prompt_ids": [3]}, {"real_ids": [3]}, {"generated_ids": [2]}, {"wins": (0.9, 0.2)}, {"line": 2}]
    changes += [{"references": ["r", "s"]}, {"where": "g:1"}]
    digests = [digest([replace(example, **change)]) for change in changes]
    assert len({*digests}) == len(changes) and digests[-1] == digest([example])


# ---------------------------------------------------------------- special tokens


@pytest.mark.parametrize("template", [TEMPLATE, "{prompt}", "Say {prompt} or {prompt}: ", f"{EOS_TEXT} {{prompt}}\n"])
@pytest.mark.parametrize("kind", ["shipped", "words"])
def test_ordinary_prompts_are_encoded_as_one_text(kind, template, tokenizer):
    """The template is cut at its special tokens only: the slot itself makes no token boundary."""
    if kind == "words":  # GPT-2 joins a word with the space before it.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for prompt in ("HELLO", " H", "HH AH0 ", "HH\n", "caf\u00e9 \u4f60", "<|endof", "### ", "HH" * 9):
        whole = tokenizer.encode(template.replace("{prompt}", prompt), add_special_tokens=False).ids
        assert prompt_ids(tokenizer, prompt, template) == whole, prompt


def test_special_tokens_that_take_the_space_beside_them():
    """Templates of some chat models have tokens that take spaces. Of two that begin alike, the longer one counts."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate("aboterhHsx \n")}, []))
    ends = [AddedToken("<e>", special=True, rstrip=True), AddedToken("<e>!", special=True, lstrip=True)]
    tokenizer.add_special_tokens(ends)
    tokenizer.add_tokens([AddedToken("ab", single_word=True)])  # "ab" is not special: no template is cut there.
    for template in ("<e> \n{prompt}", "{prompt} <e>!", "a<e>{prompt}<e>! <e>", "aab {prompt}"):
        whole = tokenizer.encode(template.replace("{prompt}", "ab"), add_special_tokens=False).ids
        assert encoded(tokenizer, "ab", "", template).prompt_ids == whole, template


# ---------------------------------------------------------------- which examples are held out and drawn


def test_the_drawn_examples_depend_on_no_order():
    """The drawn examples depend neither on the order of records, often alphabetical, nor on the hash of `held_out`."""
    words = [Example("x", i, f"word{i:05}", "r", []) for i in range(5000)]
    drawn = draw(words, 500)
    assert len(drawn) == 500
    assert [e.line for e in drawn] == sorted(e.line for e in drawn), "the order of the file"
    assert 2300 < sum(e.line for e in drawn) / 500 < 2700, "from the whole file, not from its beginning"
    assert 200 < sum(held_out(e.prompt, 0.5) for e in drawn) < 300, "independent of what is held out"
    shuffled = random.Random(0).sample(words, 5000)
    assert {e.line for e in draw(shuffled, 500)} == {e.line for e in drawn}
    assert {e.line for e in draw(words, 400)} < {e.line for e in drawn}, "a smaller draw is part of a larger one"
    assert draw(words, 0) == draw(words, 9000) == words
    twins = [Example("x", i, "same", f"r{i % 7}", []) for i in range(7)]
    assert {e.response for e in draw(twins, 3)} == {e.response for e in draw(twins[::-1], 3)}


# ---------------------------------------------------------------- tokenizers


def changed_tokenizer(start, folder, tokens=(), **changes):
    """Writes the tokenizer with further tokens, and with changes of its model."""
    settings = json.loads((start / "tokenizer.json").read_text())
    settings["model"] |= changes
    settings["added_tokens"] += [settings["added_tokens"][0] | token for token in tokens]
    (folder / "tokenizer.json").write_text(json.dumps(settings))


MARK = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
NEW = {"<|im_start|>": 396, "<|im_end|>": 397, "<tool>": 398}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": NEW, "special_tokens_map.json": {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}},
        {"tokenizer_config.json": {"added_tokens_decoder": {
            str(number): {"content": text, "special": text != "<tool>"} | MARK for text, number in NEW.items()}}},
        {"added_tokens.json": dict(reversed(NEW.items())), "special_tokens_map.json": {"pad_token": "HH"}},
    ],
)  # fmt: skip
def test_added_tokens_outside_the_tokenizers_file_count_as_in_transformers(files, start, tmp_path):
    from transformers import PreTrainedTokenizerFast

    changed_tokenizer(start, tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    ours, theirs = load_tokenizer(tmp_path, 393, 400), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("<|im_start|>user\nHH<|im_end|> <tool>", "HH", "<|im_", "HH AH0 <|endoftext|>"):
        assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False), text
    assert ours.encode("<|im_start|><tool>").ids == [396, 398]
    special = {token.content for token in ours.get_added_tokens_decoder().values() if token.special}
    assert special == {token.content for token in theirs.added_tokens_decoder.values() if token.special}


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_pieces_get_the_space_at_the_beginning_that_the_whole_text_gets(scheme, wrapped):
    """Llama's tokenizers put a space before a text, which some of them put before its first word only."""
    vocabulary = {letter: i for i, letter in enumerate(["\u2581", *"abc\n:", "\u2581a", "bc", "<unk>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u2581", "a"), ("b", "c")], unk_token="<unk>"))
    space = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([space]) if wrapped else space
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    end = tokenizer.token_to_id("</s>")
    for template in ("<s>a{prompt}<s>\n", "{prompt}<s>", "<s> {prompt} b:<s>", "b<s>{prompt}</s>a:"):
        whole = template.replace("{prompt}", "abc")
        assert encoded(tokenizer, "abc", "", template).prompt_ids == tokenizer.encode(whole).ids, template
    example = encoded(tokenizer, "abc", "bc a", "<s>{prompt}<s>", eos=end)
    assert example.prompt_ids + example.real_ids == tokenizer.encode("<s>abc<s>bc a</s>").ids
    assert tokenizer.encode("abc").ids == Tokenizer.from_str(tokenizer.to_str()).encode("abc").ids, "it is as it was"


def test_a_tokenizer_encodes_in_one_way(start, tokenizer, tmp_path, capsys):
    """Dropout of merges, an option for training, is switched off, in exports too, with a line that says so."""
    changed_tokenizer(start, tmp_path, dropout=0.5)
    steady = load_tokenizer(tmp_path, 393, 396)
    said = "tokenizer.json: its dropout of 0.5 is switched off: it encodes at random\n"
    assert capsys.readouterr().out.endswith(said)
    assert json.loads(steady.to_str())["model"]["dropout"] is None, "as `side_files` writes it"
    text = "HH AH0 L OW1 " * 9
    assert {tuple(steady.encode(text).ids) for _ in range(20)} == {tuple(tokenizer.encode(text).ids)}


def test_tokens_beyond_the_vocabulary_are_named(start, tmp_path):
    changed_tokenizer(start, tmp_path, tokens=[{"id": 396, "content": "[PAD]"}])
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path, 393, 396)
    assert str(caught.value) == (
        f"{tmp_path}/tokenizer.json: does not fit the model: its largest id is 396 (token '[PAD]'), the model has "
        "vocab_size 396 and eos_token_id 393; every token needs a row of the model's embedding"
    )
    assert load_tokenizer(tmp_path, 396, 397).id_to_token(396) == "[PAD]"


@pytest.mark.parametrize(
    "files, error, says",
    [
        ({"vocab.json": "{}"}, FileNotFoundError, ": no tokenizer, expected tokenizer.json, or vocab.json and merges"),
        ({"tokenizer.json": "{"}, ValueError, "/tokenizer.json: not a readable tokenizer (EOF while parsing"),
        ({"tokenizer.json": POINTER}, ValueError, "; it is a pointer of Git LFS: run git lfs pull ("),
        ({"vocab.json": "{}", "merges.txt": POINTER}, ValueError, "; it is a pointer of Git LFS: run git lfs pull ("),
        ({"tokenizer.json": EMPTY, "added_tokens.json": '{"a": "x", "b": 3}'}, ValueError, ": the added tokens of its"),
        ({"vocab.json": "{}", "merges.txt": "a b"}, ValueError, "/vocab.json and merges.txt: not a readable tokenizer"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_read_is_named(files, error, says, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error) as caught:
        load_tokenizer(tmp_path, 393, 396)
    assert str(tmp_path) in str(caught.value) and says in str(caught.value)
