"""From data to token ids: reads examples and a tokenizer, encodes, holds out a share, and draws.

`encode` is the only place in which prompts become token ids, so generation and training cannot disagree on the
template.
"""

import copy
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from data.files import lfs_hint, read_object, shown, token_text
from data.layouts import LAYOUTS, Reader, Turn
from data.records import files_of, read
from data.templates import SPECIAL_TOKENS, Piece, Template

ENCODED_TOGETHER = 4096  # Texts per call: the tokenizer's own results take far more memory than the ids.
FIRST = b'"prepend_scheme":"first"'  # The setting of a pre-tokenizer that puts a space before the beginning of a text.
NEVER = FIRST.replace(b"first", b"never")


@dataclass(slots=True)
class Example:
    """A prompt and its human response; a given pair also has the other response. `encode` fills in the ids."""

    where: str  # The place of the record, for messages: file:line.
    line: int  # Identifies the record. Numbering continues across input files.
    prompt: str  # The text without the template; a conversation is written as text.
    response: str  # "" if the prompt has no answer.
    references: list[str]  # All texts that count as right in evaluation.
    generated: str | None = None  # The worse response of a given pair.
    wins: tuple[float, float] = (1.0, 0.0)  # For a given pair: the probabilities that each response is preferred.
    prompt_ids: list[int] = field(default_factory=list)  # The ids of the prompt with the template.
    real_ids: list[int] = field(default_factory=list)  # These ids end with exactly one end-of-sequence token.
    generated_ids: list[int] = field(default_factory=list)  # These ids end like real_ids.
    turns: tuple[Turn, ...] = ()  # The turns of the prompt if the data has messages.

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.real_ids) + len(self.generated_ids)

    @property
    def asked(self) -> str | list[dict[str, str]]:
        """The prompt as the data has it: a text, or a list of messages."""
        return [{"role": role, "content": text} for role, text in self.turns] or self.prompt


# ---------------------------------------------------------------- reading


def load_examples(
    names: str | Path | Sequence[str], layout: str = "responses", fields: Sequence[str] = (), *,
    quiet: bool = False, needs_fields: bool = False,
) -> list[Example]:  # fmt: skip
    """Reads files, directories and data sets of the hub in order. records.py and layouts.py say what they may hold.

    Prints which files were read, what was taken from them and what was left out, unless `quiet`.

    Args:
        layout: "responses"; "pairs" if a record must also hold the worse response, as "generated" or "rejected", and
            may hold "wins": [P, P']; "prompts" if a record may lack the response.
        fields: the names of fields in the data, as in --fields: "prompt=question". A record that has none of them is
            read by its own names; with `needs_fields`, it is an error if no record has one.
    """
    examples: list[Example] = []
    names, reader = [str(names)] if isinstance(names, str | Path) else names, Reader(layout, fields)
    for name in names:
        files = files_of(name)
        if files != [name] and not quiet:
            print(f"{name}: reading {', '.join(Path(file).name for file in files)}", flush=True)
        for file in files:
            count, before = len(examples), examples[-1].line if examples else 0
            for number, record in read(file):
                try:
                    parts = reader.parts(record)
                except ValueError as error:
                    raise ValueError(f"{file}:{number}: {error}") from None
                if parts:
                    examples.append(Example(f"{file}:{number}", before + number, **parts))
            if len(examples) == count:
                raise ValueError(f"{file}: holds no records to train on; accepted are {LAYOUTS}")
            _refuse_leaks(examples[count:])
    if needs_fields and fields and not reader.fields_used:
        raise ValueError(f"--fields {' '.join(fields)}: no record of {', '.join(names)} has a field of these names")
    if not quiet:
        print(f"{', '.join(names)}: {reader.summary()}", flush=True)
    return examples


def _refuse_leaks(examples: list[Example]) -> None:
    """Refuses prompts that end with their own response, as whole rendered texts do.

    A few may do so by chance ("Yes or no?" "no"), so more than half of the distinct responses must.
    """
    leaks = [e for e in examples if e.response and e.prompt.rstrip().endswith(e.response.strip())]
    if 2 * len({e.response for e in leaks}) > len({e.response for e in examples}):
        raise ValueError(f"{leaks[0].where}: the prompt ends with its own response; --fields prompt=NAME names another")


def load_tokenizer(directory: str | Path, eos_token_id: int, vocab_size: int) -> Tokenizer:
    """Reads a model's tokenizer for a run: it always encodes a text in the same way, and neither cuts nor pads it."""
    tokenizer, source = read_tokenizer(directory)
    eos = tokenizer.id_to_token(eos_token_id) if 0 <= eos_token_id < vocab_size else None
    if source.name == "vocab.json" and eos:
        tokenizer.add_special_tokens([AddedToken(eos, special=True)])
    if getattr(tokenizer.model, "dropout", None):
        print(f"{source}: its dropout of {tokenizer.model.dropout} is switched off: it encodes at random", flush=True)
        tokenizer.model.dropout = None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    last, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocab_size or eos is None:
        raise ValueError(
            f"{source}: does not fit the model: its largest id is {largest} (token '{shown(last)}'), the model has "
            f"vocab_size {vocab_size} and eos_token_id {eos_token_id}; every token needs a row of the model's embedding"
        )
    return tokenizer


def read_tokenizer(directory: str | Path) -> tuple[Tokenizer, Path]:
    """Reads (tokenizer, its file): tokenizer.json, or GPT-2's vocab.json and merges.txt. The model is not looked at."""
    path = Path(directory)
    source, vocab, merges = path / "tokenizer.json", path / "vocab.json", path / "merges.txt"
    if source.is_file():
        with _named(f"{source}: not a readable tokenizer{lfs_hint(source)}"):
            tokenizer = Tokenizer.from_file(str(source))
    elif vocab.is_file() and merges.is_file():
        source = vocab
        with _named(f"{vocab} and merges.txt: not a readable tokenizer{lfs_hint(vocab) or lfs_hint(merges)}"):
            tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        raise FileNotFoundError(f"{path}: no tokenizer, expected tokenizer.json, or vocab.json and merges.txt")
    _add_tokens(tokenizer, path)
    return tokenizer, source


def _add_tokens(tokenizer: Tokenizer, path: Path) -> None:
    """Adds the tokens that only other files of the model define, in the order of their ids, as transformers does.

    Tokens of the vocabulary become special if those files name them as special.
    """
    config = read_object(path / "special_tokens_map.json") | read_object(path / "tokenizer_config.json")
    added = read_object(path / "added_tokens.json")
    with _named(f"{path}: the added tokens of its tokenizer are not readable"):
        names = [config.get(name) for name in SPECIAL_TOKENS]
        names += [*(config.get("additional_special_tokens") or ()), *(config.get("extra_special_tokens") or ())]
        special = [token_text(token) for token in names if token]
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokens = {
            int(number): {"content": text, "special": text in special, "normalized": text not in special}
            for text, number in added.items()
            if text not in known
        } | {int(number): token for number, token in (config.get("added_tokens_decoder") or {}).items()}
        tokenizer.add_tokens([AddedToken(**tokens[number]) for number in sorted(tokens)])
        known |= {token["content"] for token in tokens.values()}
        new = [text for text in special if text not in known and tokenizer.token_to_id(text) is not None]
        tokenizer.add_special_tokens(new)


@contextmanager
def _named(message: str) -> Iterator[None]:
    """Turns an error of the tokenizer, which is a plain Exception, into a ValueError that begins with `message`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{message} ({shown(error)})") from None


# ---------------------------------------------------------------- encoding


def encode(examples: list[Example], tokenizer: Tokenizer, template: str | Template, eos_token_id: int) -> None:
    """Fills in prompt_ids, real_ids and, for given pairs, generated_ids.

    Prompt and response are encoded separately and joined as ids, so no token spans their boundary (TRL #1679). A
    response ends with exactly one end-of-sequence token, whether or not its text has one. `template` may be a text
    that contains {prompt}.
    """
    if isinstance(template, str):
        template = Template(template, tokenizer)
    for first in range(0, len(examples), ENCODED_TOGETHER):
        some = examples[first : first + ENCODED_TOGETHER]
        prompts = [template.pieces(e.where, e.turns or (("user", e.prompt),)) for e in some]
        answers = [text for e in some for text in (e.response, e.generated or "")]
        with _named(f"{some[0].where} or after it: the tokenizer cannot encode the data"):
            ids = _ids([*itertools.chain(*prompts), *map(_inside, answers)], tokenizer)
        for example, pieces in zip(some, prompts):
            where = example.where
            example.prompt_ids = [number for piece in pieces for number in ids[piece]]
            if not example.prompt_ids:
                raise ValueError(f"{where}: the tokenizer has no token for the prompt")
            if example.response:
                example.real_ids = _ended(ids[_inside(example.response)], eos_token_id, f"{where}: the response")
            if example.generated is not None:
                other = ids[_inside(example.generated)]
                example.generated_ids = _ended(other, eos_token_id, f"{where}: the generated response", True)


def decode(ids: list[int], tokenizer: Tokenizer, *ends: int) -> str:
    """Returns the text of a response without trailing tokens of `ends` and surrounding white space."""
    return tokenizer.decode(_without(ends, ids), skip_special_tokens=False).strip()


def as_decoded(examples: list[Example], tokenizer: Tokenizer, eos_token_id: int) -> None:
    """Rewrites references as `decode` would write them, so that a perfect response equals its reference."""
    with _named(f"{examples[0].where} or after it: the tokenizer cannot encode and decode the references"):
        ids = _ids((_inside(text) for e in examples for text in e.references), tokenizer)
        for e in examples:
            e.references = [decode(ids[_inside(text)], tokenizer, eos_token_id) for text in e.references]


def _inside(response: str) -> Piece:
    """A response as a piece behind a prompt. Special tokens in it count."""
    return response, True, True


def _ids(pieces: Iterable[Piece], tokenizer: Tokenizer) -> dict[Piece, list[int]]:
    """Encodes pieces of texts, each distinct one, such as the template's, once."""
    ids: dict[Piece, list[int]] = {}
    distinct, original = dict.fromkeys(pieces), tokenizer.pre_tokenizer
    for special, inside in itertools.product((False, True), repeat=2):  # At the end special tokens count again.
        group = [piece for piece in distinct if piece[1:] == (special, inside)]
        tokenizer.encode_special_tokens = not special
        if inside and original and FIRST in original.__getstate__():  # Inside a text no space is put before a piece.
            inner = copy.deepcopy(original)
            inner.__setstate__(original.__getstate__().replace(FIRST, NEVER))
            tokenizer.pre_tokenizer = inner
        encodings = tokenizer.encode_batch([text for text, *_ in group], add_special_tokens=False)
        ids |= zip(group, (encoding.ids for encoding in encodings))
        tokenizer.pre_tokenizer = original
    return ids


def _ended(ids: list[int], eos_token_id: int, name: str, blank: bool = False) -> list[int]:
    """Returns a response with exactly one end-of-sequence token. If `blank`, the response may have no other token."""
    ids = _without([eos_token_id], ids)
    if not (ids or blank) or eos_token_id in ids:
        raise ValueError(f"{name} is empty or has an end-of-sequence token inside")
    return [*ids, eos_token_id]


def _without(ends: Sequence[int], ids: list[int]) -> list[int]:
    while ids and ids[-1] in ends:
        ids = ids[:-1]
    return ids


# ---------------------------------------------------------------- choosing


def fit_context(
    examples: list[Example], context: int, max_new_tokens: int, overlong: str, longer: Sequence[Example] = ()
) -> tuple[list[Example], int]:
    """Returns the examples that fit the context, and how many do not.

    An example fits if its prompt does with the longest of its real response, a given generated one, and
    `max_new_tokens` tokens. `longer` are the examples as somebody else reads them, whose lengths then count. With
    `overlong` "error" an example that does not fit is an error, and it always is one if none fits.
    """
    kept = []
    for original, example in zip(examples, longer or examples):
        given = max(len(example.real_ids), len(example.generated_ids))
        need = len(example.prompt_ids) + max(given, max_new_tokens)
        if need <= context:
            kept.append(original)
        elif overlong == "error":
            sizes = f"prompt {len(example.prompt_ids)}, response {given}, --max-new-tokens {max_new_tokens}"
            hint = f"but the model's context is {context}; --overlong skip leaves such examples out"
            raise ValueError(f"{example.where}: needs {need} tokens ({sizes}) {hint}")
    if not kept:
        raise ValueError(f"{examples[0].where} and all after it: no example fits the context of {context} tokens")
    return kept, len(examples) - len(kept)


def held_out(prompt: str, share: float) -> bool:
    """Tells whether a prompt is held out. This depends on its text alone, so it is the same in every run and phase."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") < share * 2**64


def split(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Returns (training, held-out) examples."""
    train = [e for e in examples if not held_out(e.prompt, share)]
    return train, [e for e in examples if held_out(e.prompt, share)]


def draw(examples: list[Example], count: int) -> list[Example]:
    """Returns `count` examples in their order, those whose prompts have the smallest hashes; 0 stands for all.

    The hashes are independent of those of `held_out`.
    """
    ranks = [(hashlib.sha256(f"draw {e.prompt}".encode()).digest(), e.response) for e in examples]
    chosen = sorted(range(len(examples)), key=ranks.__getitem__)[: count or None]
    return [examples[i] for i in sorted(chosen)]


def digest(examples: list[Example]) -> str:
    """Returns the sha256 of lines, ids, references and wins: it depends on data, template and tokenizer."""
    total = hashlib.sha256()
    for e in examples:
        total.update(json.dumps([e.line, e.prompt_ids, e.real_ids, e.generated_ids, e.references, e.wins]).encode())
    return total.hexdigest()
