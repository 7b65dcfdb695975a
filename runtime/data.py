"""From data on disk to token ids: JSON Lines, the prompt template, the tokenizer, the held-out share.

`encode` is the only place where prompts become token ids, so generation and training cannot disagree on the template.
"""

import hashlib
import json
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from runtime.files import LARGEST_FILE
from runtime.layouts import LAYOUTS, Turn, parts_of
from runtime.options import check_file, shown
from runtime.records import files_of, read
from runtime.template import Piece, Template

MOST_GROWTH = 4096  # of a text by a tokenizer's replacements; those of real ones have a few characters
ENCODED_TOGETHER = 4096  # texts; the tokenizer's own results take far more memory than the ids


@dataclass(slots=True)
class Example:
    """A prompt and its human response; with given pairs also the other response. `encode` fills in the ids."""

    path: str  # of the file, for messages
    line: int  # by which a record is known wherever its file lies; counted on from the files before
    prompt: str  # without the template; a conversation is written as text
    response: str  # "" for a prompt without an answer
    references: list[str]  # every text that counts as right in evaluation; the response is one of them
    generated: str | None = None  # the worse response of a given pair
    wins: tuple[float, float] = (1.0, 0.0)  # of a given pair: see Pair
    prompt_ids: list[int] = field(default_factory=list)  # with the template
    real_ids: list[int] = field(default_factory=list)  # ends with exactly one end-of-sequence token
    generated_ids: list[int] = field(default_factory=list)  # likewise
    turns: tuple[Turn, ...] = ()  # of the prompt, where it consists of messages
    before: int = 0  # lines of the files before

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.real_ids) + len(self.generated_ids)

    @property
    def asked(self) -> str | list[dict[str, str]]:
        """The prompt as data has it: a text, or a list of messages."""
        return [{"role": role, "content": text} for role, text in self.turns] or self.prompt

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line - self.before}"


@dataclass(slots=True)
class Pair:
    """A prompt with its real and its generated response; `score` fills in the opponent's log-probabilities."""

    prompt_ids: list[int]
    real_ids: list[int]
    generated_ids: list[int]
    finished: bool  # the opponent sampled the end-of-sequence token
    opponent_real_logp: float | None = None  # nats, summed over the response
    opponent_generated_logp: float | None = None
    wins: tuple[float, float] = (1.0, 0.0)  # probability that each response is preferred to an opponent's (SPPO)
    more_ids: Sequence[list[int]] = ()  # further responses, for methods that have them
    opponent_more_logps: Sequence[float] = ()
    prompt: str | list[dict[str, str]] = ""  # as data has it, for whoever reads the file of the pairs

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.real_ids) + len(self.generated_ids) + sum(map(len, self.more_ids))


def load_examples(
    names: str | Path | Sequence[str], layout: str = "responses", fields: Sequence[str] = ()
) -> list[Example]:
    """Reads files, directories and data sets of the hub, one after the other; records.py and layouts.py say which.

    Args:
        layout: "responses"; "pairs", where a record must also hold the worse response as "generated" or "rejected",
            and may hold "wins": [P, P']; "prompts", where a record may lack the response.
        fields: names of fields in the data, as --fields has them: "prompt=question".

    Raises: ValueError naming file and line, FileNotFoundError, or another OSError.
    """
    examples: list[Example] = []
    names = [str(names)] if isinstance(names, str | Path) else names
    for name in names:
        files = files_of(name)
        if files != [name]:
            print(f"{name}: reading {', '.join(Path(file).name for file in files)}", flush=True)
        for file in files:
            before = last = examples[-1].line if examples else 0  # in the files before
            for number, record in read(file):
                parts = parts_of(f"{file}:{number}", record, layout, fields)
                examples.append(Example(
                    file, before + number, parts.prompt, parts.response, parts.references, parts.generated, parts.wins,
                    turns=parts.turns, before=before,
                ))  # fmt: skip
            if not examples or examples[-1].line == last:
                raise ValueError(f"{file}: holds no records; accepted are {LAYOUTS}")
    return examples


def load_tokenizer(directory: str | Path, eos_token_id: int, vocab_size: int) -> Tokenizer:
    """Reads tokenizer.json, or GPT-2's vocab.json + merges.txt, from a model's directory.

    Raises: FileNotFoundError, or ValueError naming the file and what does not fit the model.
    """
    tokenizer, source = read_tokenizer(directory)
    eos = tokenizer.id_to_token(eos_token_id)
    if source.name == "vocab.json" and eos:
        tokenizer.add_special_tokens([AddedToken(eos, special=True)])
    if getattr(tokenizer.model, "dropout", None):
        print(f"{source}: its dropout of {tokenizer.model.dropout} is switched off: it encodes at random", flush=True)
        tokenizer.model.dropout = None
    tokenizer.no_truncation()  # the file may carry settings of its last user; `fit_context` checks lengths
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab()
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"{source}: has two tokens of one id")
    last, largest = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocab_size or eos is None:
        raise ValueError(
            f"{source}: does not fit the model: its largest id is {largest} (token '{shown(last)}'), the model has "
            f"vocab_size {vocab_size} and eos_token_id {eos_token_id}; every token needs a row of the model's embedding"
        )
    return tokenizer


def read_tokenizer(directory: str | Path) -> tuple[Tokenizer, Path]:
    """A model's tokenizer as it is on disk, not checked against the model, and its file. Raises: as load_tokenizer."""
    path = Path(directory)
    source, vocab, merges = path / "tokenizer.json", path / "vocab.json", path / "merges.txt"
    if source.is_file():
        check_file(source, LARGEST_FILE)
        with _one_error(f"{source}: not a readable tokenizer"):
            _check_growth(json.loads(source.read_bytes()))
            return Tokenizer.from_file(str(source)), source
    for file in (vocab, merges):
        if not file.is_file():
            raise FileNotFoundError(f"{path}: no tokenizer, expected tokenizer.json, or vocab.json and merges.txt")
        check_file(file, LARGEST_FILE)
    with _one_error(f"{vocab} and merges.txt: not a readable tokenizer"):
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        if tokenizer.get_vocab_size() < len(json.loads(vocab.read_bytes())):  # tokenizers drops them silently
            raise ValueError("a token's id is no integer from 0 to 2^32")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, vocab


def _check_growth(settings: dict[str, Any]) -> None:
    """Raises ValueError where a chain of replacements could make text longer without bound, and exhaust the memory."""
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth, nodes = 1, [settings.get(part)]
        while nodes:
            node = nodes.pop()
            if isinstance(node, dict):
                added = (node.get("content"), node.get("prepend"), node.get("replacement"))
                growth *= math.prod(max(1, len(text)) for text in added if isinstance(text, str))
            nodes += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
            if growth > MOST_GROWTH:
                raise ValueError(f"its {part} may make text more than {MOST_GROWTH} times as long")


def encode(
    examples: list[Example],
    tokenizer: Tokenizer,
    template: str | Template,
    eos_token_id: int,
    special_tokens: bool = False,
) -> None:
    """Fills in prompt_ids, real_ids and, for given pairs, generated_ids.

    Special tokens in the text of a prompt are plain text unless `special_tokens` is set: nobody can forge them.
    Prompt and response are encoded separately and joined as ids, so no token spans their boundary (TRL #1679). A
    response ends with exactly one end-of-sequence token, whether or not its text has one.

    Args:
        template: a Template, which then says itself whether special tokens count, or a text with {prompt}.
    """
    if isinstance(template, str):
        template = Template(template, tokenizer, special_tokens=special_tokens)
    for first in range(0, len(examples), ENCODED_TOGETHER):
        some = examples[first : first + ENCODED_TOGETHER]
        pieces = [template.pieces(e.where, e.prompt, e.turns) for e in some]
        with _one_error(f"{some[0].path}: the tokenizer cannot encode the data"):
            prompts = _ids_of_pieces(pieces, tokenizer)
            responses = _ids([e.response for e in some], tokenizer)
            others = _ids([e.generated or "" for e in some], tokenizer)
        for example, prompt_ids, ids, other in zip(some, prompts, responses, others):
            if not prompt_ids:
                raise ValueError(f"{example.where}: the tokenizer has no token for the prompt")
            example.prompt_ids = prompt_ids
            if example.response:
                example.real_ids = _ended(ids, eos_token_id, f"{example.where}: the response")
            if example.generated is not None:
                example.generated_ids = _ended(other, eos_token_id, f"{example.where}: the generated response", True)


def decode(ids: list[int], tokenizer: Tokenizer, eos_token_id: int) -> str:
    """The text of a response, without trailing end-of-sequence tokens and surrounding white space."""
    return tokenizer.decode(_without_eos(ids, eos_token_id), skip_special_tokens=False).strip()


def as_decoded(examples: list[Example], tokenizer: Tokenizer, eos_token_id: int) -> None:
    """Rewrites references as `decode` would write them, so that a perfect response compares as equal."""
    for example in examples:
        with _one_error(f"{example.where}: the tokenizer cannot encode and decode the references"):
            example.references = [decode(ids, tokenizer, eos_token_id) for ids in _ids(example.references, tokenizer)]


def _ids_of_pieces(pieces: list[list[Piece]], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of texts in pieces. A piece that many texts have, as those of the template, is encoded once."""
    ids: dict[Piece, list[int]] = {}
    for plain in (False, True):
        texts = list({piece[0]: None for some in pieces for piece in some if piece[1] != plain})
        ids |= zip(((text, not plain) for text in texts), _ids(texts, tokenizer, plain))
    return [[number for piece in some for number in ids[piece]] for some in pieces]


def shared(value: Any) -> Any:
    """A list of token ids with the same numbers as objects that all lists share: a fourth of the memory.

    Anything else is returned as it is.
    """
    if not (isinstance(value, list) and value and type(value[0]) is int):
        return value
    return [_NUMBERS.setdefault(number, number) for number in value]


_NUMBERS: dict[int, int] = {}


def _ids(texts: list[str], tokenizer: Tokenizer, plain: bool = False) -> list[list[int]]:
    """`plain`: special tokens in the texts are encoded like other text."""
    tokenizer.encode_special_tokens = plain
    return [shared(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


@contextmanager
def _one_error(message: str) -> Iterator[None]:
    """Turns whatever tokenizers raises into a ValueError: plain Exceptions, for a missing [UNK] token say, and panics.

    A panic of its Rust code is a BaseException, and Rust itself prints it to file descriptor 2, which is hidden here.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)  # this is descriptor 2 itself if that was closed
    stderr = os.dup(2)
    os.dup2(nowhere, 2)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # an interrupt
        raise ValueError(f"{message} ({shown(str(error).partition(chr(10))[0])})") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _ended(ids: list[int], eos_token_id: int, name: str, blank: bool = False) -> list[int]:
    """`blank`: the response may consist of the end-of-sequence token alone."""
    ids = _without_eos(ids, eos_token_id)
    if not (ids or blank) or eos_token_id in ids:
        raise ValueError(f"{name} is empty or has an end-of-sequence token inside")
    return [*ids, eos_token_id]


def _without_eos(ids: list[int], eos_token_id: int) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == eos_token_id:
        end -= 1
    return ids[:end]


def fit_context(examples: list[Example], context: int, max_new_tokens: int, overlong: str) -> tuple[list[Example], int]:
    """Returns the examples that fit, and how many do not (`overlong` = "skip"; "error" raises ValueError).

    The real response, a given generated one and one of max_new_tokens must each fit behind the prompt.
    """
    kept = []
    for example in examples:
        need = len(example.prompt_ids) + max(len(example.real_ids), len(example.generated_ids), max_new_tokens)
        if need <= context:
            kept.append(example)
        elif overlong == "error":
            raise ValueError(
                f"{example.where}: needs {need} tokens (prompt {len(example.prompt_ids)}, response "
                f"{max(len(example.real_ids), len(example.generated_ids))}, --max-new-tokens {max_new_tokens}) but the "
                f"model's context is {context}; --overlong skip leaves such examples out"
            )
    if not kept:
        raise ValueError(f"{examples[0].path}: no example fits the context of {context} tokens")
    return kept, len(examples) - len(kept)


def held_out(prompt: str, share: float) -> bool:
    """Whether a prompt belongs to the held-out share.

    It depends on the prompt's text alone: the same prompts are held out in every run and phase, and two records of one
    prompt are never on different sides.
    """
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def draw(examples: list[Example], count: int) -> list[Example]:
    """The `count` examples whose prompts have the smallest hashes, others than `held_out`'s, in their order; 0: all."""
    ranks = [(hashlib.sha256(f"draw {e.prompt}".encode()).digest(), e.response) for e in examples]
    chosen = sorted(range(len(examples)), key=ranks.__getitem__)[: count or None]
    return [examples[i] for i in sorted(chosen)]


def split(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples."""
    train = [e for e in examples if not held_out(e.prompt, share)]
    return train, [e for e in examples if held_out(e.prompt, share)]


def digest(examples: list[Example]) -> str:
    """sha256 of lines, ids, references and wins: it changes with the data, the template and the tokenizer."""
    total = hashlib.sha256()
    for e in examples:
        for ids in (e.prompt_ids, e.real_ids, e.generated_ids):
            total.update(array("q", [len(ids), *ids]).tobytes())
        total.update(json.dumps([e.line, e.references, e.wins]).encode())
    return total.hexdigest()
