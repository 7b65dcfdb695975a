"""Malformed data and configs, by table and by seeded mutation: one line that names them, exit code 2.

Each table holds what must be refused. A mutation may stay valid; then it must be accepted as quietly.
"""

import gzip
import json
import random
import shutil
import warnings

import pytest
from helpers import flags

import sft
import spin

GOOD = b'{"prompt": "abc", "response": "EY1 B IY0"}\n'
DATA = b"".join(GOOD.replace(b"abc", bytes([a, b])) for a in b"abcde" for b in b"abcde") + GOOD.replace(
    b"abc", b"a" * 30 + b"!"
)
NONSENSE = (None, True, -1, 0, 10**9, 2**64, 0.5, float("nan"), "", "x", "\0", "\ud800", "\x1b[2J", [], {}, [[]])
EOS = "<|endoftext|>"


def mutated(rng: random.Random, content: bytes) -> bytes:
    """`content` with one to three small damages: bytes replaced, removed, inserted or repeated, or the end cut."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at, n = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 8, 40])
        begin, new = rng.choice([
            (at, rng.randbytes(1)), (at, b""), (at + n, rng.randbytes(n)), (at + n, content[at : at + n] * 2),
            (len(content), b""), (at, rng.choice([b"\0", b'"', b"{", b"}", b"[", b"]", b",", b"-", b"\xff", b"9"])),
        ])  # fmt: skip
        content[at:begin] = new
    return bytes(content)


def mutated_json(rng: random.Random, value: dict) -> bytes:
    """`value` in which one item, at any depth, is gone, has another name or has become nonsense."""
    node = value = json.loads(json.dumps(value))
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
            break
        node = node[key]
    change = rng.randrange(5)
    if change == 0:
        del node[key]
    elif change == 1 and isinstance(node, dict):
        node[str(rng.choice(NONSENSE))] = node.pop(key)
    else:
        node[key] = rng.choice(NONSENSE)
    return json.dumps(value).encode()


# ---------------------------------------------------------------- data and configs


class Accepted(Exception):
    """The input passed every check: the run would begin now."""


@pytest.fixture
def model(start, tmp_path):
    """A copy of the start to break."""
    return shutil.copytree(start, tmp_path / "model")


@pytest.fixture
def end(model, monkeypatch, capfd, tmp_path):
    """Runs a command up to its first response. Returns its one line on stderr, or "" if the input was accepted."""

    def accepted(*_):
        raise Accepted

    def run(script=spin, data=tmp_path / "data.jsonl"):
        out = tmp_path / "out"
        argv = flags(model, data, out, **({"beta": None} if script is sft else {}))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                code = script.main([str(word) for word in argv])
            except Accepted:
                code = 0
                shutil.rmtree(out)
        error = capfd.readouterr().err
        assert not warned and not out.exists() and code == (2 if error else 0), error
        assert not error or (error.startswith(f"{script.__name__}.py: error: ") and error.count("\n") == 1)
        return error

    monkeypatch.setattr(spin, "play", accepted)
    monkeypatch.setattr(sft, "fine_tune", accepted)
    (tmp_path / "data.jsonl").write_bytes(DATA)
    return run


def fuzz(end, path, contents, least: int) -> None:
    """Writes each of `contents` to `path` and runs. At least `least` must be refused, by a line with the folder."""
    refused = 0
    for content in contents:
        path.write_bytes(content)
        error = end()
        assert not error or str(path.parent) in error or "data.jsonl:" in error, (content, error)
        refused += bool(error)
    assert refused >= least, refused


def test_what_the_cases_start_from_is_accepted(end):
    """Or the cases below would prove nothing."""
    assert end() == "" and end(sft) == ""


LINES = [
    b"\0", b"{}", b"null", b'"x"', b"{", b"NaN", b"'a'", b"[" * 5000, b'{"a":' * 5000, GOOD.replace(b":", b"="),
    GOOD.replace(b"abc", b"a\0c"), GOOD.replace(b"\n", b","), GOOD.replace(b"}", b",}"), GOOD.replace(b"abc", b"\\x"),
    GOOD.replace(b"abc", b"\\ud83d"), GOOD.replace(b'"abc"', b"9" * 5000), GOOD.replace(b"abc", b"\xed\xa0\x80"),
    GOOD.replace(b"abc", b"a" * 100_000), b'{"prompt": "abc"}', b'{"response": "EY1"}',
    *(json.dumps({"prompt": "abc", "response": value}).encode() for value in (None, 3, "", " ", [], EOS, "a" * 100)),
    *(json.dumps({"prompt": value, "response": "EY1"}).encode() for value in (None, 3, True, "", {}, ["abc"])),
    *(json.dumps({"prompt": "a", "response": "b", "references": v}).encode() for v in (3, "", {}, [], [""], [None])),
    *(json.dumps({"real": value}).encode() for value in (3, "", {}, [], [None], [{}], [{"role": "user"}])),
]  # fmt: skip


def test_a_line_of_data_that_is_wrong_is_named(end, tmp_path):
    """Also in a compressed file."""
    for number, line in enumerate(LINES):
        content = GOOD + line + b"\n" + DATA
        for name in ("data.jsonl", "data.jsonl.gz"):
            (tmp_path / name).write_bytes(content if name == "data.jsonl" else gzip.compress(content, 1))
            assert f"{name}:2" in end(data=tmp_path / name), (number, line[:100])


def test_mutated_data(end, tmp_path):
    rng = random.Random(0)
    some = DATA[: 8 * len(GOOD)]
    fuzz(end, tmp_path / "data.jsonl", [mutated(rng, some) for _ in range(60)], least=20)
    lines = [mutated_json(rng, json.loads(GOOD)) + b"\n" + DATA for _ in range(40)]
    fuzz(end, tmp_path / "data.jsonl", lines, least=15)


CONFIGS = [
    *({name: value} for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "window_size")
      for value in (None, -1, 0, 0.5, "x", [], {})),
    {"num_heads": 3}, {"hidden_size": 32}, {"num_layers": 1}, {"vocab_size": 395}, {"model_type": "gpt2"},
    *({"attention_types": value} for value in (None, 3, "", [], [[]], [[["sparse"], 2]], [[["global"], 1]])),
    *({"eos_token_id": value} for value in (None, -1, 0.5, "x", [], 396)), {"activation_function": "gelu"},
    {"tie_word_embeddings": False},
]  # fmt: skip


def test_a_config_that_is_wrong_is_named(end, model):
    path = model / "config.json"
    good = json.loads(path.read_text())
    for changes in CONFIGS:
        path.write_text(json.dumps(good | changes))
        assert str(model) in end(), changes
    fuzz(end, path, [b"", b"\0", b"[]", b"null", b"{", b"{}", b"9" * 5000, b"\xff"], least=8)


def test_mutated_config(end, model):
    rng = random.Random(1)
    path = model / "config.json"
    good = path.read_bytes()
    fuzz(end, path, [mutated(rng, good) for _ in range(60)], least=25)
    fuzz(end, path, [mutated_json(rng, json.loads(good)) for _ in range(60)], least=15)
