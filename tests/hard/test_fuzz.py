"""Data and configs with small damages, by seeded mutation: one line that names them, exit code 2.

A mutation may stay valid; then it must be accepted as quietly.
"""

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
    """The undamaged input is accepted, or the cases below would prove nothing."""
    assert end() == "" and end(sft) == ""


def test_mutated_data(end, tmp_path):
    rng = random.Random(0)
    some = DATA[: 8 * len(GOOD)]
    fuzz(end, tmp_path / "data.jsonl", [mutated(rng, some) for _ in range(60)], least=20)


def test_mutated_config(end, model):
    rng = random.Random(1)
    path = model / "config.json"
    good = path.read_bytes()
    fuzz(end, path, [mutated(rng, good) for _ in range(60)], least=25)
    fuzz(end, path, [b"", b"\0", b"[]", b"null", b"{", b"{}", b"9" * 5000, b"\xff"], least=8)
