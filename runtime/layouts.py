"""From a record to a prompt and its response, whatever its fields are called.

| fields | where they are found |
|---|---|
| prompt, response (or completion) | plain pairs of texts; TRL's, where both may be lists of messages |
| instruction, input, output | Alpaca: the input, where there is one, follows the instruction behind a blank line |
| question, answer | GSM8K |
| messages | the format of chats: a list of {"role", "content"} |
| conversations | ShareGPT: a list of {"from", "value"} |
| real, generated | the official code of SPIN: two lists of messages with one prompt |
| prompt, chosen, rejected | preference pairs, as texts or messages; the prompt may be the messages that both share |

Of messages all before the last assistant turn are the prompt, and what follows that turn is left out. A field "system"
beside the others is a system turn. `--fields prompt=question` names a field that is called otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.options import shown

PROMPTS = ("prompt", "instruction", "question")
RESPONSES = ("response", "completion", "output", "answer")
CHATS = ("messages", "conversations", "conversation")
LAYOUTS = (
    "prompt/response, prompt/completion, instruction/input/output, question/answer, messages, conversations, real, "
    "or prompt/chosen/rejected; --fields prompt=NAME,response=NAME names others"
)
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip

Turn = tuple[str, str]  # (role, text); a role is "system", "user" or "assistant"


@dataclass(slots=True)
class Parts:
    """What a record says."""

    prompt: str  # one text, by which prompts are compared: a single user's turn as it is, several with their roles
    response: str  # "" for a prompt without an answer
    turns: tuple[Turn, ...] = ()  # of the prompt, where it consists of messages
    references: list[str] = field(default_factory=list)
    generated: str | None = None  # the worse response of a pair, which may be empty
    wins: tuple[float, float] = (1.0, 0.0)


def parts_of(where: str, record: Any, layout: str, fields: Sequence[str] = ()) -> Parts:
    """Reads a record. `where` is its file and line, `layout` as in `load_examples`, `fields` the value of --fields.

    Raises: ValueError naming the record, the field, and, where one is missing, those found and those accepted.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
    # Columns of a table are null where a record does not have them.
    record = _renamed(where, {name: value for name, value in record.items() if value is not None}, fields)
    pairs = layout == "pairs"
    generated = None
    if "real" in record:
        turns, response = conversation(where, record, "real")
        if pairs:
            other, generated = conversation(where, record, "generated")
            _same_prompt(where, turns, other, "'real' and 'generated'")
    elif "chosen" in record:
        turns, response = _side(where, record, "chosen")
        if pairs:
            other, generated = _side(where, record, "rejected")
            _same_prompt(where, turns, other, "'chosen' and 'rejected'")
    elif name := next((name for name in CHATS if name in record), ""):
        turns, response = conversation(where, record, name, answered=layout != "prompts")
        generated = text_of(where, record, "generated", blank=True) if pairs else None
    else:
        turns = _prompt(where, record)
        if layout != "prompts" or any(name in record for name in RESPONSES):
            response = _answer(where, record, next((n for n in RESPONSES if n in record), "response"))
        else:
            response = ""
        if pairs:
            generated = _answer(where, record, "rejected" if "rejected" in record else "generated", blank=True)
    turns = _with_system(where, record, turns)
    only = len(turns) == 1 and turns[0][0] in ("", "user")
    prompt = turns[0][1] if only else "\n\n".join(f"{role}: {text}" for role, text in turns)
    parts = Parts(prompt, response, () if turns[0][0] == "" else turns, _references(where, record, response), generated)
    if pairs:
        parts.wins = _wins(where, record)
    return parts


def _renamed(where: str, record: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The record under our names. Data that has none of the fields that --fields names is read as it is."""
    names = dict(pair.split("=", 1) for pair in fields)
    if not any(theirs in record for theirs in names.values()):
        return record
    for ours, theirs in names.items():
        if theirs not in record:
            found = shown(", ".join(map(repr, record)))
            raise ValueError(
                f"{where}: field {theirs!r} of --fields {ours}={theirs} is missing; the fields are {found}"
            )
    replaced = {*names, "real", "chosen", *CHATS}  # what would be read in place of a field that is named
    for name, others in (("prompt", PROMPTS), ("response", RESPONSES)):
        replaced |= set(others) if name in names else set()
    kept = {name: value for name, value in record.items() if name not in replaced}
    return kept | {ours: record[theirs] for ours, theirs in names.items()}


def _prompt(where: str, record: dict[str, Any]) -> tuple[Turn, ...]:
    """The prompt as turns; a plain text is one turn without a role."""
    name = next((name for name in PROMPTS if name in record), "prompt")
    if isinstance(record.get(name), list):
        turns = _messages(where, record, name)
        if "user" not in [role for role, _ in turns]:
            raise ValueError(f"{where}: field {name!r} has the roles {_roles(turns)}, expected a 'user'")
        return turns
    text = text_of(where, record, name)
    more = record.get("input", "") if name == "instruction" else ""
    if not isinstance(more, str) or more.strip():
        text += "\n\n" + text_of(where, record, "input")
    return (("", text),)


def _answer(where: str, record: dict[str, Any], name: str, blank: bool = False) -> str:
    """A response: a text, or a list with one assistant turn."""
    if not isinstance(record.get(name), list):
        return text_of(where, record, name, blank)
    turns = _messages(where, record, name)
    if [role for role, _ in turns] != ["assistant"]:
        raise ValueError(f"{where}: field {name!r} has the roles {_roles(turns)}, expected ['assistant']")
    return turns[0][1]


def _side(where: str, record: dict[str, Any], name: str) -> tuple[tuple[Turn, ...], str]:
    """(prompt, response) of one side of a preference pair. A list may hold the whole conversation."""
    value = record.get(name)
    if isinstance(value, list) and any(isinstance(turn, dict) and _role(turn) == "user" for turn in value):
        return conversation(where, record, name)
    return _prompt(where, record), _answer(where, record, name)


def conversation(where: str, record: dict[str, Any], name: str, answered: bool = True) -> tuple[tuple[Turn, ...], str]:
    """(turns before the last assistant turn, its text). Unless `answered`, a conversation may end with a user."""
    turns = _messages(where, record, name)
    roles = [role for role, _ in turns]
    if not answered and roles and roles[-1] == "user":
        return turns, ""
    last = max((i for i, role in enumerate(roles) if role == "assistant"), default=-1)
    if "user" not in roles[: max(last, 0)]:
        raise ValueError(
            f"{where}: field {name!r} has the roles {_roles(turns)}, expected a 'user' and an 'assistant' behind it"
        )
    return turns[:last], turns[last][1]


def _messages(where: str, record: dict[str, Any], name: str) -> tuple[Turn, ...]:
    """A list of {"role", "content"} or {"from", "value"}; blank system turns are left out."""
    found = record.get(name)
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        if name not in record:
            raise missing(where, record, name)
        raise ValueError(f"{where}: field {name!r} must be a list of {{'role', 'content'}}")
    turns = []
    for turn in found:
        role = _role(turn)
        if role not in ROLES.values():
            given = shown(repr(turn.get("role", turn.get("from"))))
            expected = "'system', 'user' or 'assistant'"
            raise ValueError(f"{where}: field {name!r} has a turn of the role {given}, expected {expected}")
        key = "value" if "value" in turn and "content" not in turn else "content"
        content = turn.get(key)
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            turn = turn | {key: "".join(str(part.get("text", "")) for part in content)}
        elif role == "system" and isinstance(content, str) and not content.strip():
            continue
        turns.append((role, text_of(where, turn, key)))
    return tuple(turns)


def _role(turn: dict[str, Any]) -> str:
    role = turn.get("role", turn.get("from"))
    return ROLES.get(role.lower(), role) if isinstance(role, str) else ""


def _roles(turns: Sequence[Turn]) -> str:
    return shown([role for role, _ in turns])


def _with_system(where: str, record: dict[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    system = record.get("system", "")
    if (isinstance(system, str) and not system.strip()) or turns[0][0] == "system":
        return turns
    first = turns[0]
    return (("system", text_of(where, record, "system")), (first[0] or "user", first[1]), *turns[1:])


def _same_prompt(where: str, one: tuple[Turn, ...], other: tuple[Turn, ...], names: str) -> None:
    if one != other:
        raise ValueError(f"{where}: the prompts of {names} differ, expected the same")


def _references(where: str, record: dict[str, Any], response: str) -> list[str]:
    references = None if "real" in record else record.get("references")
    if references is None:
        return [response] if response else []
    if not isinstance(references, list) or not references:
        raise ValueError(f"{where}: field 'references' must be a list of texts")
    return [text_of(where, {"references": reference}, "references") for reference in references]


def _wins(where: str, record: dict[str, Any]) -> tuple[float, float]:
    wins = record.get("wins", (1.0, 0.0))
    numbers = isinstance(wins, list | tuple) and [w for w in wins if type(w) in (int, float) and 0 <= w <= 1]
    if not numbers or len(numbers) != 2 or len(wins) != 2:
        raise ValueError(f"{where}: field 'wins' must be two probabilities, of the response and of the generated one")
    return float(wins[0]), float(wins[1])


def text_of(where: str, record: dict[str, Any], name: str, blank: bool = False) -> str:
    """A field that must be text, and not blank unless `blank` is set."""
    value = record.get(name)
    if not isinstance(value, str):
        if name not in record:
            raise missing(where, record, name)
        raise ValueError(f"{where}: field {name!r} is {type(value).__name__}, expected text")
    if not (blank or value.strip()):
        raise ValueError(f"{where}: field {name!r} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{where}: field {name!r} has half a surrogate pair, which is no text")
    return value


def missing(where: str, record: dict[str, Any], name: str) -> ValueError:
    found = shown(", ".join(map(repr, record))) or "none"
    return ValueError(f"{where}: field {name!r} is missing; the fields are {found}; accepted are {LAYOUTS}")
