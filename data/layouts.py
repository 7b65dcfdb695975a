"""Reads a prompt and its response from a record, whatever its fields are called; docs/runs.md lists the layouts.

Every layout is first read as a list of turns. The last assistant turn that may be trained on is the response, and all
turns before it are the prompt.
"""

from collections.abc import Sequence
from typing import Any

from data.files import parse_json, shown

# The names of fields by what they hold. "instruction" and "output" are Alpaca's, "question" and "answer" GSM8K's,
# "real" is that of SPIN's official code, "conversations" ShareGPT's.
PROMPTS = ("prompt", "instruction", "question", "query")
MORE = ("input", "context")  # They follow a prompt that is a text, after a blank line.
CONVERSATIONS = ("real", "messages", "conversations", "conversation")
RESPONSES = ("real", "chosen", *CONVERSATIONS[1:], "response", "completion", "output", "answer")
NAMES = {*PROMPTS, *MORE, *RESPONSES, "rejected", "generated", "system", "history", "references", "wins", "label"}
# The fields that a name in --fields replaces. A name that is not listed here replaces the field of its own name.
REPLACED = {"prompt": (*PROMPTS, *CONVERSATIONS), "response": RESPONSES, "messages": RESPONSES}
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"} | dict.fromkeys(
    ("assistant", "gpt", "chatgpt", "model"), "assistant"
)
MARKS = ("weight", "train", "training")  # If one of them is 0 or false, the turn must not be trained on.
NO_TARGET = "no target"  # The role that such a turn gets.
LAYOUTS = (
    "prompt/response, prompt/completion, instruction/input/output, question/answer, messages, conversations, real, "
    "or prompt/chosen/rejected; --fields prompt=NAME response=NAME names others"
)

Turn = tuple[str, str]  # (role, text); the role is "system", "user" or "assistant".


class Reader:
    """Reads records, and remembers what it took and what it left out. The arguments are those of `load_examples`."""

    def __init__(self, layout: str = "responses", fields: Sequence[str] = ()) -> None:
        self.layout = layout
        self.fields = dict(pair.split("=", 1) for pair in fields)
        self.fields_used = False  # Whether any record has the fields of --fields.
        self.taken: dict[str, str] = {}  # What was read from a field.
        self.left_out: dict[str, None] = {}  # Fields, and what was left out of conversations.
        self.unwanted = 0  # The number of records that are marked as not to be trained on.
        self.names: dict[str, str] = {}  # The data's names of the fields of the present record, keyed by ours.

    def summary(self) -> str:
        """Says what was taken and what was left out, in one line."""
        taken = ", ".join(f"{name} -> {part}" for name, part in sorted(self.taken.items(), key=lambda pair: pair[1]))
        left = [*self.left_out]
        if self.unwanted:
            left.append(f"records marked as not to be trained on: {self.unwanted}")
        return shown(f"{taken}; left out: {', '.join(left) or 'nothing'}", 500)

    def parts(self, record: Any) -> dict[str, Any] | None:
        """Returns the fields of an Example that describe its texts, or None if the record must not be trained on."""
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object, found {type(record).__name__}")
        record = self._named(record)
        label = str(record.get("label")).lower()  # TRL's data for KTO has true or false.
        if label in ("true", "false"):
            del record["label"]
        name = self._one_of(record, "response", RESPONSES) or "response"
        turns = self._turns(record, name, "assistant") if name in record or self.layout != "prompts" else []
        chat = name in CONVERSATIONS or "user" in dict(turns)
        if chat:
            self.taken[self.names[name]] = "prompt and response"
        else:
            question, chat = self._question(record)
            turns = question + turns
        turns, response = self._split(turns, name)
        if response is None or label == "false":
            self.unwanted += 1
            return None
        given = self._given(record, name, turns) if self.layout == "pairs" else {}
        system = text_of(self._take(record, "system", "prompt", ""), "system", blank=True)
        if system.strip() and turns[0][0] != "system":
            turns = [("system", system), *turns]
        prompt = turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {text}" for role, text in turns)
        references = self._take(record, "references", "references") or [response] * bool(response)
        if not isinstance(references, list):
            raise ValueError("field 'references' must be a list of texts")
        references = [text_of(text, "references") for text in references]
        self.left_out |= {self.names[ours]: None for ours, value in record.items() if value not in ("", [], {})}
        parts = {"prompt": prompt, "response": response, "references": references}
        return parts | given | {"turns": tuple(turns) if chat or len(turns) > 1 else ()}

    def _take(self, record: dict[str, Any], name: str, part: str, default: Any = None) -> Any:
        """Removes a field, which holds a part of the example, from the record, and returns its value."""
        if name in record:
            self.taken[self.names[name]] = part
        return record.pop(name, default)

    def _named(self, record: dict[str, Any]) -> dict[str, Any]:
        """Returns the record under our names, without what is missing: null in JSON, NaN in some tables.

        A record that has none of the fields in --fields keeps its names.
        """
        record = {name: value for name, value in record.items() if value is not None and value == value}
        fields = self.fields if any(theirs in record for theirs in self.fields.values()) else {}
        self.fields_used |= bool(fields)
        for ours, theirs in fields.items():
            if theirs not in record:
                found = shown(", ".join(map(repr, record)))
                raise ValueError(f"field {theirs!r} of --fields {ours}={theirs} is missing; the fields are {found}")
        replaced = {name for ours in fields for name in REPLACED.get(ours, (ours,))}
        self.names = dict(fields)
        for name in record:
            lower = name.lower()
            ours = lower if lower in NAMES and lower not in record else name
            if name in fields.values():
                continue
            if ours in replaced or ours in self.names:
                self.left_out[name] = None
            else:
                self.names[ours] = name
        return {ours: record[theirs] for ours, theirs in self.names.items()}

    def _one_of(self, record: dict[str, Any], part: str, names: Sequence[str]) -> str | None:
        """Returns the field that holds a part of the example. Several that hold it must agree."""
        there = [name for name in names if name in record]
        there = [name for name in there if record[name] not in ("", [])] or there
        for other in there[1:]:
            if _last(record[other]) != _last(record[there[0]]):
                one, two = self.names[there[0]], self.names[other]
                raise ValueError(f"{one!r} and {two!r} may both be the {part}; --fields {part}=NAME chooses one")
        return there[0] if there else None

    def _question(self, record: dict[str, Any]) -> tuple[list[Turn], bool]:
        """Returns the prompt of a record whose response stands apart, and whether it is a list of messages."""
        name = self._one_of(record, "prompt", PROMPTS) or "prompt"
        messages = isinstance(record.get(name), list)
        turns = self._turns(record, name, "user")
        if messages:
            return turns, True
        for more in MORE:
            if not isinstance(record.get(more, []), list | dict):
                text = text_of(self._take(record, more, "prompt"), more, blank=True)
                turns = [("user", f"{turns[0][1]}\n\n{text}")] if text.strip() else turns
        history = record.get("history")
        if history and isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            texts = [text_of(text, "history") for pair in self._take(record, "history", "prompt") for text in pair]
            turns = [*zip(("user", "assistant") * len(history), texts), *turns]
        return turns, False

    def _given(self, record: dict[str, Any], name: str, turns: list[Turn]) -> dict[str, Any]:
        """Returns what only a given pair has: the worse response to the same prompt, and who wins."""
        worse = "rejected" if name == "chosen" or "rejected" in record else "generated"
        others = self._turns(record, worse, "assistant", blank=True)
        self.taken[self.names[worse]] = "generated response"
        others, generated = self._split(others if "user" in dict(others) else turns + others, worse)
        if others != turns:
            raise ValueError(f"the prompts of {name!r} and {worse!r} differ, expected the same")
        wins = self._take(record, "wins", "wins", (1.0, 0.0))
        two = isinstance(wins, list | tuple) and len(wins) == 2
        if not two or not all(type(win) in (int, float) and 0 <= win <= 1 for win in wins):
            raise ValueError("field 'wins' must be two probabilities, of the response and of the generated one")
        return {"generated": generated or "", "wins": (float(wins[0]), float(wins[1]))}

    def _turns(self, record: dict[str, Any], name: str, role: str, blank: bool = False) -> list[Turn]:
        """Takes a field as turns: a list of messages, which may be written as JSON, or a text, one turn of the role."""
        if name not in record:
            found = shown(", ".join(map(repr, self.names.values()))) or "none"
            raise ValueError(f"field {name!r} is missing; the fields are {found}; accepted are {LAYOUTS}")
        value = self._take(record, name, "response" if role == "assistant" else "prompt")
        if not isinstance(value, list) and name not in CONVERSATIONS:
            return [(role, text_of(value, name, blank))]
        if isinstance(value, str):
            value = parse_json(value, f"field {name!r}")
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise ValueError(f"field {name!r} must be a list of {{'role', 'content'}}")
        turns = [self._turn(message, name) for message in value]
        return [(role, text) for role, text in turns if text.strip() or role != "system"]

    def _turn(self, message: dict[str, Any], name: str) -> Turn:
        """Reads {"role", "content"} or {"from", "value"}; the content may be a list of texts."""
        given = message.get("role", message.get("from"))
        role = ROLES.get(str(given).lower())
        if role is None:
            expected = "'system', 'user' or 'assistant'; results of tools are not supported"
            raise ValueError(f"field {name!r} has a turn of the role {shown(repr(given))}, expected {expected}")
        if message.get("tool_calls") or message.get("function_call"):
            raise ValueError(f"field {name!r} has a turn with tool calls, which are not supported")
        key = "value" if "value" in message and "content" not in message else "content"
        content = message.get(key)
        if isinstance(content, list):
            texts = [
                part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in content
            ]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"field {name!r} has content that is no text; images are not supported")
            content = "".join(texts)
        no_target = role == "assistant" and any(message.get(mark) == 0 for mark in MARKS)
        for other in message.keys() - {"role", "from", key, *MARKS}:
            if message[other]:
                self.left_out[f"{other} of {self.names.get(name, name)}"] = None
        return NO_TARGET if no_target else role, text_of(content, key, blank=role == "system")

    def _split(self, turns: list[Turn], name: str) -> tuple[list[Turn], str | None]:
        """Returns (turns before the last assistant turn, its text), the text None if no turn may be trained on.

        In the layout "prompts" the last turn may be a user's.
        """
        roles = [role for role, _ in turns]
        targets = [i for i, role in enumerate(roles) if role == "assistant" and "user" in roles[:i]]
        if self.layout == "prompts" and roles[-1:] == ["user"]:
            targets = [len(turns)]
        elif not targets and NO_TARGET in roles:
            return turns, None
        elif not targets:
            raise ValueError(f"field {name!r} has the roles {shown(roles)}, expected a 'user' before an 'assistant'")
        last = targets[-1]
        if turns[last + 1 :]:
            self.left_out["turns behind the response"] = None
        before = [("assistant" if role == NO_TARGET else role, text) for role, text in turns[:last]]
        return before, turns[last][1] if last < len(turns) else ""


def _last(value: Any) -> Any:
    """Returns the text of the last message if a field holds messages, and otherwise what it holds."""
    messages = isinstance(value, list) and value and isinstance(value[-1], dict)
    return value[-1].get("content", value[-1].get("value")) if messages else value


def text_of(value: Any, name: str, blank: bool = False) -> str:
    """Returns the value of a field that must be a text, and must not be blank unless `blank` is set."""
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {type(value).__name__}, expected text")
    if not (blank or value.strip()):
        raise ValueError(f"field {name!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, which is no character.
        raise ValueError(f"field {name!r} has half a surrogate pair, which is no text") from None
    return value
