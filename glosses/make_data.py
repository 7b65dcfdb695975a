"""Makes the data, the tokenizer and the config of the second task from WordNet's database files.

    python glosses/make_data.py /usr/share/wordnet        (the folder of data.noun, in Debian's package wordnet-base)

Writes, beside this script:
- glosses.jsonl.gz: {"prompt": "acrodont, reptile", "response": the gloss}: a sample of nouns, each with its kind;
- start/tokenizer.json and start/config.json: a byte-level BPE learned from the sample, and a small GPT-Neo.
"""

import gzip
import hashlib
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from model import GPTNeoConfig  # noqa: E402

COUNT, VOCABULARY = 30_000, 2048
WORDS = range(3, 16)  # of a gloss
EOS = "<|endoftext|>"
TEMPLATE_PIECES = ["### Instruction: ", "\n\n### Response: "]  # one token each, as in pronounce/


def read_nouns(path: Path) -> list[dict[str, str]]:
    """Every noun synset with one parent: its first word, its parent's first word, and its gloss up to the first ';'.

    The format is that of wndb(5): offset, file, type, number of words in hex, the words with ids, pointers, | gloss.
    """
    synsets = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue  # the licence
        fields, _, gloss = line.partition(" | ")
        offset, _, _, count, *rest = fields.split()
        after = rest[2 * int(count, 16) :]
        pointers = [after[i : i + 4] for i in range(1, 1 + 4 * int(after[0]), 4)]
        parents = [target for symbol, target, _, _ in pointers if symbol in ("@", "@i")]
        synsets[offset] = (rest[0].replace("_", " "), parents, gloss.partition(";")[0].strip())
    return [
        {"prompt": f"{word}, {synsets[parents[0]][0]}", "response": gloss}
        for word, parents, gloss in synsets.values()
        if len(parents) == 1 and len(gloss.split()) in WORDS and '"' not in gloss
    ]


def main() -> None:
    records = {record["prompt"]: record for record in read_nouns(Path(sys.argv[1]) / "data.noun")}
    chosen = sorted(records, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())[:COUNT]
    lines = [json.dumps(records[prompt], separators=(",", ":"), ensure_ascii=False) + "\n" for prompt in sorted(chosen)]
    # mtime=0: the same database gives the same bytes
    (HERE / "glosses.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in [EOS, *TEMPLATE_PIECES]]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((text for prompt in chosen for text in records[prompt].values()), trainer)
    (HERE / "start").mkdir(exist_ok=True)
    tokenizer.save(str(HERE / "start/tokenizer.json"))
    end = tokenizer.token_to_id(EOS)
    config = GPTNeoConfig(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=128, hidden_size=96, num_layers=2, num_heads=4,
        attention_types=((("global", "local"), 1),), window_size=16, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    (HERE / "start/config.json").write_text(config.to_json())
    print(f"{len(records)} nouns, of which {len(chosen)} are kept; {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
