"""runtime/layouts.py: the same prompt and response, whatever a record calls them, and what other records are told."""

import json

import pytest

from runtime.data import load_examples
from runtime.layouts import LAYOUTS, parts_of


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def said(*turns):
    """ShareGPT's turns."""
    return [{"from": role, "value": text} for role, text in turns]


PLAIN = [  # record, --fields
    ({"prompt": "q", "response": "a"}, ()),
    ({"prompt": "q", "completion": "a", "id": 3}, ()),
    ({"instruction": "q", "input": "", "output": "a"}, ()),
    ({"instruction": "q", "output": "a", "text": "x"}, ()),
    ({"question": "q", "answer": "a"}, ()),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, ()),
    ({"prompt": "q", "response": "a", "system": " "}, ()),
    ({"prompt": "q", "response": "a", "messages": None}, ()),
    ({"frage": "q", "antwort": "a"}, ("prompt=frage", "response=antwort")),
    ({"frage": "q", "answer": "a", "prompt": "other", "messages": []}, ("prompt=frage",)),
    ({"prompt": "q", "text": "a", "output": "other"}, ("response=text",)),
    ({"prompt": "q", "response": "a"}, ("prompt=frage", "response=antwort")),  # other data of the same run
]
MESSAGES = [
    {"messages": [user("q"), assistant("a")]},
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
]


@pytest.mark.parametrize("record, fields", PLAIN)
def test_texts(record, fields):
    parts = parts_of("x:1", record, "responses", fields)
    assert (parts.prompt, parts.response, parts.turns, parts.references) == ("q", "a", (), ["a"])


@pytest.mark.parametrize("record", MESSAGES)
def test_messages(record):
    parts = parts_of("x:1", record, "responses")
    assert (parts.prompt, parts.response, parts.turns, parts.references) == ("q", "a", (("user", "q"),), ["a"])


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "response": "a", "generated": "b"},
        {"question": "q", "chosen": "a", "rejected": "b"}, {"messages": [user("q"), assistant("a")], "generated": "b"},
        *(record for record in MESSAGES if "rejected" in record or "generated" in record),
    ],
)  # fmt: skip
def test_pairs(record):
    parts = parts_of("x:1", record, "pairs")
    assert (parts.prompt, parts.response, parts.generated, parts.wins) == ("q", "a", "b", (1.0, 0.0))


def test_several_turns_and_a_system_turn():
    """All before the last assistant turn is the prompt."""
    turns = (("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"))
    texts = [{"role": role, "content": text} for role, text in turns]
    shared = [("system", "s"), ("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2")]
    for record in (
        {"messages": [*texts, assistant("a2")]},
        {"messages": [*texts[1:], assistant("a2")], "system": "s"},
        {"conversations": said(*shared)},
        {"prompt": texts, "completion": [assistant("a2")]},
        {"chosen": [*texts, assistant("a2")]},
    ):
        parts = parts_of("x:1", record, "responses")
        assert (parts.turns, parts.response) == (turns, "a2")
        assert parts.prompt == "system: s\n\nuser: q1\n\nassistant: a1\n\nuser: q2"
    parts = parts_of("x:1", {"prompt": "q", "response": "a", "system": "s"}, "responses")
    assert parts.turns == (("system", "s"), ("user", "q"))
    parts = parts_of("x:1", {"instruction": "Add.", "input": "1, 2", "output": "3"}, "responses")
    assert (parts.prompt, parts.turns) == ("Add.\n\n1, 2", ())


def test_prompts_without_an_answer():
    for record in ({"prompt": "q"}, {"question": "q"}, {"messages": [user("q")]}, {"prompt": [user("q")]}):
        parts = parts_of("x:1", record, "prompts")
        assert (parts.prompt, parts.response, parts.references) == ("q", "", [])
    parts = parts_of("x:1", {"messages": [user("p"), assistant("b"), user("q")]}, "prompts")
    assert parts.turns == (("user", "p"), ("assistant", "b"), ("user", "q"))


@pytest.mark.parametrize(
    "record, layout, fields, says",
    [
        ({"text": "a"}, "responses", (), f"field 'prompt' is missing; the fields are 'text'; accepted are {LAYOUTS}"),
        ({"prompt": "a", "text": "b"}, "responses", (), "field 'response' is missing; the fields are 'prompt', 'text'"),
        ({"prompt": None, "answer": "b"}, "responses", (), "field 'prompt' is missing; the fields are 'answer'"),
        ({}, "responses", (), "field 'prompt' is missing; the fields are none"),
        ({"prompt": "a", "response": "b"}, "pairs", (), "field 'generated' is missing"),
        ({"prompt": "a", "chosen": "b"}, "pairs", (), "field 'rejected' is missing"),
        ({"chosen": "b", "rejected": "c"}, "pairs", (), "field 'prompt' is missing"),
        ({"frage": "q"}, "responses", ("prompt=frage", "response=antwort"),
         "field 'antwort' of --fields response=antwort is missing; the fields are 'frage'"),
        ({"instruction": "q", "input": 3, "output": "a"}, "responses", (), "field 'input' is int, expected text"),
        ({"messages": "x"}, "responses", (), "field 'messages' must be a list of {'role', 'content'}"),
        ({"messages": []}, "responses", (), "field 'messages' has the roles [], expected a 'user' and an 'assistant'"),
        ({"messages": [user("q")]}, "responses", (), "has the roles ['user'], expected a 'user' and an 'assistant'"),
        ({"messages": [assistant("q")]}, "responses", (), "has the roles ['assistant'], expected a 'user'"),
        ({"messages": [{"role": "tool", "content": "q"}]}, "responses", (), "a turn of the role 'tool', expected"),
        ({"messages": [{"role": ["x"], "content": "q"}]}, "responses", (), "a turn of the role ['x'], expected"),
        ({"messages": [{"content": "q"}]}, "responses", (), "a turn of the role None, expected 'system', 'user' or"),
        ({"messages": [user("q"), {"role": "assistant"}]}, "responses", (), "field 'content' is missing"),
        ({"messages": [user("q"), assistant(None)]}, "responses", (), "field 'content' is NoneType, expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, assistant("a")]}, "responses", (),
         "field 'content' is list, expected text"),
        ({"prompt": [user("q")], "completion": [user("a")]}, "responses", (), "has the roles ['user'], expected ['ass"),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("a")]}, "pairs", (),
         "the prompts of 'chosen' and 'rejected' differ, expected the same"),
        ({"prompt": [], "response": "a"}, "responses", (), "field 'prompt' has the roles [], expected a 'user'"),
        ([1], "responses", (), "expected a JSON object, found list"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_the_fields_that_were_found_and_the_layouts(record, layout, fields, says):
    with pytest.raises(ValueError) as caught:
        parts_of("x.jsonl:7", record, layout, fields)
    assert str(caught.value).startswith("x.jsonl:7: ") and says in str(caught.value)


def test_files_may_differ_in_their_layouts(tmp_path):
    for name, record in (("a", {"question": "q", "answer": "a"}), ("b", {"messages": [user("q"), assistant("a")]})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    one, two = load_examples([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert (one.prompt, one.response) == (two.prompt, two.response) and one.turns == () and two.turns
