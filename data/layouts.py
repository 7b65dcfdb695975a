"""Reads a prompt and its response from a record, whatever its fields are called; docs/runs.md lists the layouts.

Every layout is first read as a list of turns. The last assistant turn is the response, all turns before it are the
prompt, and what follows it is left out.
"""

from collections.abc import Sequence
from typing import Any

from data.files import shown

# The names of fields in order of precedence: the first one that a record has is read. "instruction" and "output" are
# Alpaca's, "question" and "answer" GSM8K's, "real" is that of SPIN's official code, "conversations" ShareGPT's.
PROMPTS = ("prompt", "instruction", "question")
CONVERSATIONS = ("real", "messages", "conversations", "conversation")
RESPONSES = ("real", "chosen", *CONVERSATIONS[1:], "response", "completion", "output", "answer")
# The fields that a name in --fields takes the place of; any other name takes the place of itself.
REPLACED = {"prompt": (*PROMPTS, *CONVERSATIONS), "response": RESPONSES, "messages": RESPONSES}
ROLES = {"system": "system", "user": "user", "human": "user"} | dict.fromkeys(
    ("assistant", "gpt", "chatgpt", "model"), "assistant"
)
LAYOUTS = (
    "prompt/response, prompt/completion, instruction/input/output, question/answer, messages, conversations, real, "
    "or prompt/chosen/rejected; --fields prompt=NAME,response=NAME names others"
)

Turn = tuple[str, str]  # (role, text); the role is "system", "user" or "assistant".


def parts_of(record: Any, layout: str = "responses", fields: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a record; `layout` and `fields` are those of `load_examples`.

    Returns: the fields of an Example that describe its texts: prompt, turns, response, references, generated, wins.
    Raises: ValueError naming the field and, if one is missing, the fields that the record has and those accepted.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    # In a table, a column is null for the records that lack it.
    record = _renamed({name: value for name, value in record.items() if value is not None}, fields)
    name = next((name for name in RESPONSES if name in record), "response")
    turns = [] if layout == "prompts" and name not in record else _turns(record, name, "assistant")
    messages = name in CONVERSATIONS or "user" in _roles(turns)
    if not messages:
        asked = next((name for name in PROMPTS if name in record), "prompt")
        messages = isinstance(record.get(asked), list)
        turns = _turns(record, asked, "user") + turns
    turns, response = _split(turns, name, answered=layout != "prompts")
    generated, wins = None, (1.0, 0.0)
    if layout == "pairs":
        worse = "rejected" if "chosen" in record or "rejected" in record else "generated"
        others = _turns(record, worse, "assistant", blank=True)
        others, generated = _split(others if "user" in _roles(others) else turns + others, worse)
        if others != turns:
            raise ValueError(f"the prompts of {name!r} and {worse!r} differ, expected the same")
        wins = _wins(record)
    system = text_of(record, "system", blank=True) if "system" in record else ""
    if system.strip() and turns[0][0] != "system":
        turns, messages = [("system", system), *turns], True
    prompt = turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {text}" for role, text in turns)
    references = record.get("references", [response] if response else [])
    if not isinstance(references, list) or ("references" in record and not references):
        raise ValueError("field 'references' must be a list of texts")
    references = [text_of({"references": text}, "references") for text in references]
    parts = dict(prompt=prompt, response=response, references=references, generated=generated, wins=wins)
    return parts | dict(turns=tuple(turns) if messages else ())


def _renamed(record: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Returns the record under our names. A record that has none of the fields in --fields stays as it is."""
    names = dict(pair.split("=", 1) for pair in fields)
    if not any(theirs in record for theirs in names.values()):
        return record
    for ours, theirs in names.items():
        if theirs not in record:
            found = shown(", ".join(map(repr, record)))
            raise ValueError(f"field {theirs!r} of --fields {ours}={theirs} is missing; the fields are {found}")
    replaced = {name for ours in names for name in REPLACED.get(ours, (ours,))}
    kept = {name: value for name, value in record.items() if name not in replaced}
    return kept | {ours: record[theirs] for ours, theirs in names.items()}


def _turns(record: dict[str, Any], name: str, role: str, blank: bool = False) -> list[Turn]:
    """Reads a field as turns: a list of messages, or a text, which is one turn of the role."""
    value = record.get(name)
    if not isinstance(value, list) and name not in CONVERSATIONS:
        text = text_of(record, name, blank)
        more = text_of(record, "input", blank=True) if name == "instruction" and "input" in record else ""
        return [(role, f"{text}\n\n{more}" if more.strip() else text)]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"field {name!r} must be a list of {{'role', 'content'}}")
    turns = [_turn(message, name) for message in value]
    return [(role, text) for role, text in turns if text.strip() or role != "system"]


def _turn(message: dict[str, Any], name: str) -> Turn:
    """Reads {"role", "content"} or {"from", "value"}; the content may be a list of texts."""
    given = message.get("role", message.get("from"))
    role = ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        expected = "'system', 'user' or 'assistant'"
        raise ValueError(f"field {name!r} has a turn of the role {shown(repr(given))}, expected {expected}")
    key = "value" if "value" in message and "content" not in message else "content"
    content = message.get(key)
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        message = {key: "".join(str(part.get("text", "")) for part in content)}
    return role, text_of(message, key, blank=role == "system")


def _roles(turns: Sequence[Turn]) -> list[str]:
    return [role for role, _ in turns]


def _split(turns: list[Turn], name: str, answered: bool = True) -> tuple[list[Turn], str]:
    """Returns (turns before the last assistant turn, its text). Unless `answered`, the last turn may be a user's."""
    roles = _roles(turns)
    if not answered and roles[-1:] == ["user"]:
        return turns, ""
    last = max((i for i, role in enumerate(roles) if role == "assistant"), default=0)
    if "user" not in roles[:last]:
        raise ValueError(f"field {name!r} has the roles {shown(roles)}, expected a 'user' before an 'assistant'")
    return turns[:last], turns[last][1]


def _wins(record: dict[str, Any]) -> tuple[float, float]:
    wins = record.get("wins", (1.0, 0.0))
    two = isinstance(wins, list | tuple) and len(wins) == 2
    if not two or not all(type(win) in (int, float) and 0 <= win <= 1 for win in wins):
        raise ValueError("field 'wins' must be two probabilities, of the response and of the generated one")
    return float(wins[0]), float(wins[1])


def text_of(record: dict[str, Any], name: str, blank: bool = False) -> str:
    """Returns a field that must be a text, and must not be blank unless `blank` is set."""
    if name not in record:
        found = shown(", ".join(map(repr, record))) or "none"
        raise ValueError(f"field {name!r} is missing; the fields are {found}; accepted are {LAYOUTS}")
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {type(value).__name__}, expected text")
    if not (blank or value.strip()):
        raise ValueError(f"field {name!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, which is no character.
        raise ValueError(f"field {name!r} has half a surrogate pair, which is no text") from None
    return value
