"""From the turns of a prompt to one text: a text with {prompt} in it, or the chat template of the tokenizer.

A chat template comes with a model, so it is code of a stranger. It runs in Jinja's sandbox, where it reaches neither
files nor Python's objects; it could still waste time or memory. It has no clock: a prompt must be the same tomorrow.

Special tokens in the text of turns are plain text. A turn that holds one, or could make one together with the text
around it, is rendered with placeholders, which `pieces` puts back after the text is cut at its special tokens.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from runtime.files import read_object, read_text, token_text
from runtime.layouts import Turn
from runtime.options import DEFAULT_TEMPLATE, shown

LONGEST_PROMPT = 2**26  # characters of a rendered prompt
MAX_TEMPLATE = 2**20  # characters of a chat template
OPEN, CLOSE = "\ue0f0", "\ue0f1"  # around the number of a placeholder; of no meaning in Unicode
PLACEHOLDER = re.compile(f"{OPEN}([0-9]{{1,9}}){CLOSE}")

Piece = tuple[str, bool]  # (text, whether special tokens in it count)


class Template:
    """Writes the prompt of a conversation.

    Args:
        source: a text with {prompt}, or the Jinja source of a chat template where `variables` are given.
        tokenizer: its special tokens are those that a turn must not forge.
        variables: what a chat template may use beside the messages: bos_token and others.
        special_tokens: special tokens in turns count.
        name: of the template, for messages.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        variables: dict[str, str] | None = None,
        special_tokens: bool = False,
        name: str = "--template",
    ) -> None:
        self.source, self.variables, self.special_tokens, self.name = source, variables, special_tokens, name
        special = [t for t in tokenizer.get_added_tokens_decoder().values() if t.special and not special_tokens]
        special.sort(key=lambda token: len(token.content), reverse=True)  # the tokenizer prefers the longest, too
        self.tokens = [token.content for token in special]
        patterns = [r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in special]
        self.cut = re.compile(f"({'|'.join(patterns)})") if patterns else None
        self.chat = None if variables is None else _compiled(source, name)
        self.forged = self._forgeries()

    def pieces(self, where: str, prompt: str, turns: Sequence[Turn] = ()) -> list[Piece]:
        """The prompt in pieces, each of which is encoded apart: special tokens of the template, and plain text.

        Args:
            where: the record, for messages.
            prompt, turns: of a record; no turns stand for one of the user.

        Raises: ValueError where a chat template refuses the turns.
        """
        turns = turns or (("user", prompt),)
        hidden: list[str] = []
        if not self.special_tokens:
            turns = [(role, self._guarded(text, hidden)) for role, text in turns]
        text = self._filled(turns) if self.chat is None else self._rendered(where, turns)
        pieces = []

        def shown_again(found: re.Match) -> str:
            return hidden[int(found[1])] if int(found[1]) < len(hidden) else found[0]

        for i, part in enumerate(self.cut.split(text) if self.cut else [text]):
            plain = not i % 2 and not self.special_tokens  # odd ones are the special tokens
            part = PLACEHOLDER.sub(shown_again, part) if hidden else part
            pieces += [(part, not plain)] if part else []
        return pieces

    def _filled(self, turns: Sequence[Turn]) -> str:
        """Every user's turn by the text template; the other turns each with a blank line behind it."""
        return "".join(
            self.source.replace("{prompt}", text) if role == "user" else f"{text}\n\n" for role, text in turns
        )

    def _rendered(self, where: str, turns: Sequence[Turn]) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        chunks, length = [], 0
        try:
            for chunk in self.chat.generate(messages=messages, add_generation_prompt=True, **self.variables):
                chunks.append(chunk)
                length += len(chunk)
                if length > LONGEST_PROMPT:
                    raise ValueError(f"the text is longer than {LONGEST_PROMPT:,} characters")
        except Exception as error:  # Jinja's, and whatever Python raises while the template runs
            raise ValueError(f"{where}: {self.name} cannot write the prompt ({shown(error)})") from None
        return "".join(chunks)

    def _guarded(self, text: str, hidden: list[str]) -> str:
        """The text with placeholders for what could be, or become, a special token."""

        def hide(part: str) -> str:
            hidden.append(part)
            return f"{OPEN}{len(hidden) - 1}{CLOSE}"

        if self.chat is None or any(text in token for token in self.tokens):  # a text template does not look at it
            return hide(text)
        return self.forged.sub(lambda found: hide(found[0]), text) if self.forged else text

    def _forgeries(self) -> re.Pattern | None:
        """Special tokens, the beginning of one at a text's end, the end of one at its beginning, and our own marks."""
        starts = {token[:n] for token in self.tokens for n in range(1, len(token)) if token[:n].strip()}
        ends = {token[n:] for token in self.tokens for n in range(1, len(token)) if token[n:].strip()}

        def alternatives(texts: Sequence[str] | set[str]) -> str:
            return "|".join(re.escape(text) for text in sorted(texts, key=lambda text: (-len(text), text)))

        parts = [alternatives([*self.tokens, OPEN, CLOSE])]
        parts += [rf"\A(?:{alternatives(ends)})"] if ends else []
        parts += [rf"(?:{alternatives(starts)})\Z"] if starts else []
        return re.compile("|".join(parts))


def jinja_of(text: str) -> str:
    """The chat template that writes what the text template does."""

    def quoted(part: str) -> str:
        return "{{ " + json.dumps(part, ensure_ascii=False) + " }}" if part else ""

    user = "{{ message['content'] }}".join(map(quoted, text.split("{prompt}")))
    other = "{{ message['content'] }}" + quoted("\n\n")
    branch = "{% if message['role'] == 'user' %}" + user + "{% else %}" + other + "{% endif %}"
    return "{% for message in messages %}" + branch + "{% endfor %}"


def choose(
    option: str, directory: Path, tokenizer: Tokenizer, messages: bool, special_tokens: bool = False
) -> Template:
    """The template of --template. "auto" takes that of the tokenizer for messages, where it has one.

    Raises: ValueError where there is none to choose, or where it is no template.
    """
    if option in ("auto", "chat") and (option == "chat" or messages):
        source, variables, file = read_chat(directory)
        if source:
            return Template(source, tokenizer, variables, special_tokens, str(file))
        if option == "chat":
            raise ValueError(
                f"--template chat: {directory} has no chat template, neither chat_template.jinja nor one in "
                "tokenizer_config.json; expected a text with {prompt}"
            )
    text = DEFAULT_TEMPLATE if option == "auto" else option
    return Template(text.replace(r"\n", "\n"), tokenizer, special_tokens=special_tokens)


def read_chat(directory: Path) -> tuple[str, dict[str, str], Path]:
    """(source, variables, file) of a model's chat template; "" where it has none.

    Raises: ValueError naming the file.
    """
    config = read_object(directory / "tokenizer_config.json")
    file = directory / "chat_template.jinja"
    if file.is_file():
        source: Any = read_text(file)
    else:
        file = directory / "tokenizer_config.json"
        source = config.get("chat_template") or ""
        if isinstance(source, list):  # several by name
            named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
            source = named.get("default", "")
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE:
        raise ValueError(f"{file}: its chat template is no text of at most {MAX_TEMPLATE:,} characters")
    fields = read_object(directory / "special_tokens_map.json") | config
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
    texts = {name: token_text(fields.get(name)) for name in names}
    return source, {name: text for name, text in texts.items() if isinstance(text, str)}, file


def _compiled(source: str, name: str) -> Any:
    """The template in Jinja's sandbox, with what transformers offers to templates, but without a clock."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %} marks what a model wrote. Nothing is done with it here."""

        tags = frozenset(["generation"])

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:  # Jinja's own escapes for HTML
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{name}: its chat template is not valid ({shown(error)})") from None
