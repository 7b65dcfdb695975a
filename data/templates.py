"""Writes the turns of a prompt as text: by a text that contains {prompt}, or by the tokenizer's chat template.

A chat template is code that comes with a model. It runs in Jinja's sandbox, which gives it no files, no network and no
access to Python's objects, though it can waste time. It has no clock either: a prompt must be the same tomorrow.

Special tokens in the text of a turn are plain text, so nobody can end the sequence or forge a part of the template. To
this end, placeholders take their place, and `Template.pieces` puts them back after it has cut the prompt at the
template's own special tokens.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data.files import read_object, read_text, shown, token_text
from data.layouts import Turn

DEFAULT_TEMPLATE = r"### Instruction: {prompt}\n\n### Response: "
SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
OPEN, CLOSE = "\ue0f0", "\ue0f1"  # They enclose the number of a placeholder; Unicode gives them no meaning.

Piece = tuple[str, bool, bool]  # (text, whether special tokens in it count, whether other text is before it)


@dataclass(eq=False)
class Template:
    """Writes prompts."""

    source: str  # A text that contains {prompt}, or, if `variables` are given, the Jinja source of a chat template.
    tokenizer: Tokenizer  # It defines the special tokens that a turn must not forge.
    variables: dict[str, str] | None = None  # What a chat template may use besides the messages, such as bos_token.
    special_tokens: bool = False  # Special tokens in the text of turns count.
    name: str = "--template"  # The name of the template in messages.

    def __post_init__(self) -> None:
        self.chat = None if self.variables is None else _compiled(self.source, self.name)
        special = [token for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
        special.sort(key=lambda token: len(token.content), reverse=True)  # The tokenizer prefers the longest one too.
        patterns = [r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in special]
        self.cut = re.compile(f"({'|'.join(patterns) or '(?!)'})")
        self.hidden = [*(token.content for token in special), OPEN, CLOSE]  # A placeholder holds a number of this list.
        self.forged = re.compile("|".join(map(re.escape, self.hidden)))

    def pieces(self, where: str, turns: Sequence[Turn]) -> list[Piece]:
        """Returns the prompt in pieces that are to be encoded one by one: special tokens, and the text between them.

        `where` names the record in the message if a chat template refuses the turns.
        """
        if not self.special_tokens:
            turns = [(role, self.forged.sub(self._placeholder, text)) for role, text in turns]
        written = self._written(where, turns)
        asked = next((text.strip() for role, text in reversed(turns) if role == "user"), "")
        if asked not in written and json.dumps(asked, ensure_ascii=False)[1:-1] not in written:
            raise ValueError(f"{where}: {self.name} leaves out the user's text: it writes '{shown(written)}'")
        if self.special_tokens:
            return [(written, True, False)]
        parts = self.cut.split(written)  # Every second part is a special token.
        parts = [re.sub(f"{OPEN}([0-9]+){CLOSE}", lambda found: self.hidden[int(found[1])], part) for part in parts]
        first = 0 if parts[0] else 1
        return [(part, i % 2 == 1, i > first) for i, part in enumerate(parts) if part]

    def _placeholder(self, found: re.Match) -> str:
        return f"{OPEN}{self.hidden.index(found[0])}{CLOSE}"

    def turn_end(self) -> int | None:
        """Returns the id of the special token with which a chat template ends an assistant's turn.

        None if there is no such token, or no chat template.
        """
        if self.chat is None:
            return None
        try:
            text = self._written("", (("user", "q"), ("assistant", OPEN)), ask=False)
        except ValueError:  # It expects more than that, such as a system turn.
            return None
        rest = text.partition(OPEN)[2].lstrip()
        tokens = {token.content: number for number, token in self.tokenizer.get_added_tokens_decoder().items()}
        return tokens.get(max(filter(rest.startswith, tokens), key=len, default=""))

    def _written(self, where: str, turns: Sequence[Turn], ask: bool = True) -> str:
        """Returns the text of turns, which `ask` for an answer.

        A text template writes every user turn, and a blank line follows each other turn.
        """
        if self.chat is None:
            return "".join(self.source.replace("{prompt}", t) if role == "user" else f"{t}\n\n" for role, t in turns)
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            return self.chat.render(messages=messages, add_generation_prompt=ask, **self.variables)
        except Exception as error:  # Jinja's errors, and whatever Python raises while the template runs.
            raise ValueError(f"{where}: {self.name} cannot write the prompt ({shown(error)})") from None


def jinja_of(text: str) -> str:
    """Returns the chat template that writes what the text template writes."""

    def quoted(part: str) -> str:
        return "{{ " + json.dumps(part, ensure_ascii=False) + " }}" if part else ""

    user = "{{ message['content'] }}".join(map(quoted, text.split("{prompt}")))
    other = "{{ message['content'] }}" + quoted("\n\n")
    branch = "{% if message['role'] == 'user' %}" + user + "{% else %}" + other + "{% endif %}"
    return "{% for message in messages %}" + branch + "{% endfor %}"


def choose(
    option: str, directory: Path, tokenizer: Tokenizer, messages: bool, special_tokens: bool = False
) -> Template:
    """Returns the template that --template asks for.

    Args:
        option: "chat", a text, or "auto", which uses the chat template if there is one and the data has messages.
        directory: the model's directory.
        messages: whether the data has messages.
    """
    if option == "chat" or (option == "auto" and messages):
        source, variables, file = read_chat(directory)
        if source:
            return Template(source, tokenizer, variables, special_tokens, str(file))
        if option == "chat":
            places = "neither chat_template.jinja nor one in tokenizer_config.json"
            raise ValueError(
                f"--template chat: {directory} has no chat template, {places}; expected a text with {{prompt}}"
            )
        print(f"{directory}: has no chat template; turns of users are written as {DEFAULT_TEMPLATE}", flush=True)
    text = DEFAULT_TEMPLATE if option == "auto" else option
    return Template(text.replace(r"\n", "\n"), tokenizer, special_tokens=special_tokens)


def read_chat(directory: Path) -> tuple[str, dict[str, str], Path]:
    """Returns (source, variables, file) of a model's chat template; the source is "" if the model has none."""
    config, file = read_object(directory / "tokenizer_config.json"), directory / "chat_template.jinja"
    if file.is_file():
        source: Any = read_text(file)
    else:
        file, source = directory / "tokenizer_config.json", config.get("chat_template") or ""
        if isinstance(source, list):  # A list holds several templates by name.
            named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
            source = named.get("default", "")
    if not isinstance(source, str):
        raise ValueError(f"{file}: its chat template is {type(source).__name__}, expected text")
    fields = read_object(directory / "special_tokens_map.json") | config
    texts = {name: token_text(fields.get(name)) for name in SPECIAL_TOKENS}
    return source, {name: text for name, text in texts.items() if isinstance(text, str)}, file


def _compiled(source: str, name: str) -> Any:
    """Returns the template in Jinja's sandbox, with what transformers offers to templates except for the clock."""
    import jinja2
    from jinja2 import sandbox

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:  # Jinja's own filter escapes characters of HTML.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # {% generation %} marks what a model wrote, which a prompt does not need.
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except Exception as error:  # Jinja's errors, and those of Python for absurd templates.
        raise ValueError(f"{name}: its chat template is not valid ({shown(error)})") from None
