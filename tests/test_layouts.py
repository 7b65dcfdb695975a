"""data/layouts.py: every layout gives the same prompt and response, and other records are refused with a reason."""

import json
from types import SimpleNamespace

import pytest
from helpers import write_rows

from data.examples import load_examples
from data.layouts import LAYOUTS, Reader


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def said(*turns):
    """Turns in the format of ShareGPT."""
    return [{"from": role, "value": text} for role, text in turns]


def read(record, layout="responses", fields=()):
    return SimpleNamespace(**Reader(layout, fields).parts(record))


TEXTS = [  # (record, --fields)
    ({"prompt": "q", "completion": "a", "id": 3, "label": True}, ()),
    ({"instruction": "q", "input": "", "output": "a", "text": "x"}, ()),
    ({"question": "q", "answer": "a"}, ()),
    ({"prompt": "q", "completion": [assistant("a")]}, ()),
    ({"prompt": "q", "chosen": "a", "rejected": [assistant("b")]}, ()),
    ({"prompt": "q", "response": "a", "system": float("nan"), "references": None, "messages": None, "answer": ""}, ()),
    ({"Prompt": "q", "RESPONSE": "a", "system": " "}, ()),
    ({"query": "q", "response": "a"}, ()),
    ({"question": "q", "prompt": "q", "answer": "a", "response": "a", "context": {"title": "t"}}, ()),
    ({"frage": "q", "antwort": "a"}, ("prompt=frage", "response=antwort")),
    ({"frage": "q", "answer": "a", "prompt": "other", "messages": []}, ("prompt=frage",)),
    ({"prompt": "q", "text": "a", "output": "other"}, ("response=text",)),
    ({"prompt": "q", "response": "a"}, ("prompt=frage", "response=antwort")),  # Other data of the same run.
]
MESSAGES = [
    {"messages": [{"role": "system", "content": ""}, user("q"), assistant("a"), user("thanks")]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, assistant("a")]},
    {"conversations": said(("human", "q"), ("gpt", "a"))},
    {"conversation": [user("q"), assistant("a")]},
    {"real": [user("q"), assistant("a")], "generated": [user("q"), assistant("b")]},
    {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
    {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
    {"prompt": [user("q")], "completion": [assistant("a")]},
    {"prompt": [user("q")], "response": "a"},
    {"messages": json.dumps([user("q"), assistant("a")])},
    {"messages": [user(["q", ""]), assistant("a")]},
    {"messages": [user("q"), assistant("a"), user("p"), assistant("BAD") | {"weight": 0}]},
    {"messages": [user("q"), assistant("a") | {"weight": 1}], "chosen": [user("q"), assistant("a")], "prompt": "q"},
    {"messages": [{"role": "developer", "content": ""}, user("q"), assistant("a") | {"reasoning_content": "r"}]},
]


@pytest.mark.parametrize(
    "record, fields, turns",
    [*((*text, ()) for text in TEXTS), *((record, (), (("user", "q"),)) for record in MESSAGES)],
)
def test_texts_and_messages(record, fields, turns):
    parts = read(record, fields=fields)
    assert (parts.prompt, parts.response, parts.turns, parts.references) == ("q", "a", turns, ["a"])


@pytest.mark.parametrize(
    "record",
    [
        {"question": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "response": "a", "generated": "b"},
        {"messages": [user("q"), assistant("a")], "generated": "b"},
        *(record for record in MESSAGES if "rejected" in record or "generated" in record),
    ],
)  # fmt: skip
def test_pairs(record):
    parts = read(record, "pairs")
    assert (parts.prompt, parts.response, parts.generated, parts.wins) == ("q", "a", "b", (1.0, 0.0))


def test_several_turns_and_a_system_turn():
    """All turns before the last assistant turn are the prompt."""
    turns = (("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"))
    texts = [{"role": role, "content": text} for role, text in turns]
    shared = [("system", "s"), ("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2")]
    for record in (
        {"messages": [*texts, assistant("a2")]},
        {"messages": [*texts[1:], assistant("a2")], "system": "s"},
        {"conversations": said(*shared)},
        {"prompt": texts, "completion": [assistant("a2")]},
        {"chosen": [*texts, assistant("a2")]},
        {"messages": [*texts, assistant("a2")], "system": "s"},
    ):
        parts = read(record)
        assert (parts.turns, parts.response) == (turns, "a2")
        assert parts.prompt == "system: s\n\nuser: q1\n\nassistant: a1\n\nuser: q2"
    assert read({"prompt": "q", "response": "a", "system": "s"}).turns == (("system", "s"), ("user", "q"))


def test_context_and_history_belong_to_the_prompt():
    """SQuAD and Dolly have a context, Alpaca an input, LLaMA-Factory a history; --fields keeps all three."""
    for record, fields in (
        ({"question": "q", "context": "c", "answer": "a"}, ()), ({"instruction": "q", "input": "c", "output": "a"}, ()),
        ({"instruction": "q", "input": "c", "output": "a", "prompt": "q c a"}, ("prompt=instruction",)),
    ):  # fmt: skip
        assert read(record, fields=fields).prompt == "q\n\nc"
    turns = (("user", "p"), ("assistant", "b"), ("user", "q"))
    assert read({"instruction": "q", "output": "a", "history": [["p", "b"]]}).turns == turns


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completion": "BAD", "label": False}, {"prompt": "q", "completion": "BAD", "label": "False"},
        *({"messages": [user("q"), assistant("BAD") | mark]} for mark in ({"weight": 0}, {"train": False})),
    ],
)  # fmt: skip
def test_what_is_marked_as_not_to_be_trained_on_is_left_out_and_counted(record):
    reader = Reader()
    assert reader.parts(record) is None
    assert reader.summary().endswith("; left out: records marked as not to be trained on: 1")


def test_the_reader_says_what_it_took_and_what_it_left_out():
    reader = Reader()
    reader.parts({"Question": "q", "input": "", "answer": "a", "context": "c", "id": 3, "tools": "", "x": None})
    taken = "Question -> prompt, input -> prompt, context -> prompt, answer -> response"
    assert reader.summary() == f"{taken}; left out: id"
    reader = Reader()
    talk = [user("q"), assistant("a") | {"reasoning_content": "r", "name": None}, user("thanks")]
    reader.parts({"messages": talk, "tools": [{}], "prompt": "q"})
    left = "reasoning_content of messages, turns behind the response, tools, prompt"
    assert reader.summary() == f"messages -> prompt and response; left out: {left}"
    reader = Reader(fields=("response=answer",))
    reader.parts({"prompt": "q", "response": "b", "answer": "a"})
    assert reader.summary() == "prompt -> prompt, answer -> response; left out: response"


def test_prompts_without_an_answer():
    for record in ({"prompt": "q"}, {"question": "q"}, {"messages": [user("q")]}, {"prompt": [user("q")]}):
        parts = read(record, "prompts")
        assert (parts.prompt, parts.response, parts.references) == ("q", "", [])
    parts = read({"messages": [user("p"), assistant("b"), user("q")]}, "prompts")
    assert parts.turns == (("user", "p"), ("assistant", "b"), ("user", "q"))


@pytest.mark.parametrize(
    "record, options, says",
    [
        ({"text": "a"}, {}, f"field 'response' is missing; the fields are 'text'; accepted are {LAYOUTS}"),
        ({"prompt": None, "answer": "b"}, {}, "field 'prompt' is missing; the fields are 'answer'; accepted are"),
        ({"prompt": "a", "response": "b"}, {"layout": "pairs"}, "field 'generated' is missing"),
        ({"prompt": "a", "chosen": "b"}, {"layout": "pairs"}, "field 'rejected' is missing"),
        ({"chosen": "b", "rejected": "c"}, {"layout": "pairs"}, "field 'prompt' is missing"),
        ({"frage": "q"}, {"fields": ("prompt=frage", "response=antwort")},
         "field 'antwort' of --fields response=antwort is missing; the fields are 'frage'"),
        ({"prompt": " ", "response": "b"}, {}, "field 'prompt' is empty"),
        ({"prompt": "a\ud83d", "response": "b"}, {}, "field 'prompt' has half a surrogate pair"),
        ({"prompt": "a", "response": "b", "references": "b"}, {}, "field 'references' must be a list of texts"),
        ({"prompt": "a", "response": "b", "references": [3]}, {}, "field 'references' is int, expected text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "wins": [1]}, {"layout": "pairs"}, "two probabilities"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "wins": [90, 20]}, {"layout": "pairs"}, "two probabilities"),
        ({"instruction": "q", "input": 3, "output": "a"}, {}, "field 'input' is int, expected text"),
        ({"messages": "x"}, {}, "field 'messages': not valid JSON ("),
        ({"messages": "3"}, {}, "field 'messages' must be a list of {'role', 'content'}"),
        ({"messages": []}, {}, "field 'messages' has the roles [], expected a 'user' before an 'assistant'"),
        ({"messages": [assistant("a"), user("q")]}, {}, "has the roles ['assistant', 'user'], expected"),
        ({"messages": [{"content": "q"}]}, {}, "a turn of the role None, expected 'system', 'user' or 'assistant'"),
        ({"messages": [user("q"), assistant(None)]}, {}, "field 'content' is NoneType, expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "no text; images are not supported"),
        ({"messages": [user("q"), assistant(None) | {"tool_calls": [{}]}]}, {}, "tool calls, which are not supported"),
        ({"question": "q", "answer": "a", "response": "b"}, {},
         "'response' and 'answer' may both be the response; --fields response=NAME chooses one"),
        ({"Instruction": "q", "Prompt": "q a", "output": "a"}, {},
         "'Prompt' and 'Instruction' may both be the prompt; --fields prompt=NAME chooses one"),
        ({"prompt": [user("q")], "completion": [user("a")]}, {}, "field 'completion' has the roles ['user'], expected"),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("a")]}, {"layout": "pairs"},
         "the prompts of 'chosen' and 'rejected' differ, expected the same"),
        ([1], {}, "expected a JSON object, found list"),
        ({f"field{i}": 1 for i in range(9999)}, {}, "field 'response' is missing; the fields are 'field0', "),
    ],
)  # fmt: skip
def test_a_record_that_fits_no_layout_is_refused_with_the_reason(record, options, says):
    with pytest.raises(ValueError) as caught:
        Reader(**options).parts(record)
    assert says in str(caught.value) and len(str(caught.value)) < 400


def test_a_prompt_that_ends_with_its_own_response_is_refused(tmp_path):
    """Whole rendered texts end so, as in derivatives of Alpaca; a choice named last in the question is no error."""

    def load(*pairs):
        return load_examples(write_rows(tmp_path / "x.jsonl", ({"prompt": p, "response": r} for p, r in pairs)))

    with pytest.raises(ValueError, match=r"x\.jsonl:2: the prompt ends with its own response; --fields prompt=NAME"):
        load(("q", "b"), ("### q: c", "c\n"), ("### q: d", " d"))
    assert len(load(("Yes or no", "yes"), ("Yes or no", "no"), ("yes or no", "no"))) == 3


def test_files_may_differ_in_their_layouts(tmp_path):
    records = {"question": "q", "answer": "a"}, {"messages": [user("q"), assistant("a")]}
    one, two = load_examples([str(write_rows(tmp_path / f"{i}.jsonl", [one])) for i, one in enumerate(records)])
    assert (one.prompt, one.response) == (two.prompt, two.response) and one.turns == () and two.turns
