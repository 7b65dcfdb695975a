"""Disks damage files. A resumed run computes a damaged shard or checkpoint again, and stops at a damaged result.

No damage may lead to a silently different result, or to a traceback.
"""

import contextlib
import random
import re
import shutil

import pytest
from helpers import die_at, small, tree

import spin
from runtime import storage
from runtime.run import Run


def flipped(content: bytes, rng: random.Random) -> bytes:
    position, bit = rng.randrange(len(content)), rng.randrange(8)
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def another_digit(content: bytes, rng: random.Random) -> bytes:
    digits = [match.start() for match in re.finditer(rb"[0-9]", content)]
    if not digits:
        return flipped(content, rng)
    position = rng.choice(digits)
    return content[:position] + bytes([48 + (content[position] - 47) % 10]) + content[position + 1 :]


def doubled_last_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join([*lines, lines[-1]])


DAMAGES = {
    "a flipped bit": flipped,
    "another digit": another_digit,
    "cut": lambda content, rng: content[: rng.randrange(len(content))],
    "empty": lambda content, rng: b"",
    "a doubled last line": doubled_last_line,
    "zeros": lambda content, rng: bytes(len(content)),
}


CLOCK = ("report.html", "times.jsonl")  # hold times, so they have no checksum
# What a run that died in iteration 1 has no need of: metrics.jsonl has the evaluation of the start; pages and plots are
# drawn anew after every iterate.
NOT_READ = tuple(f"resume/iterate-0/{name}" for name in ("greedy", "sampled", "entropy", "nll", "kl")) + (
    "metrics.svg",
    *CLOCK,
)


@pytest.fixture(scope="module")
def died(start, data, tmp_path_factory):
    """(folder with a run that died in iteration 1's training, files of the same run if nothing disturbs it)."""
    whole, folder = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("died")
    with contextlib.chdir(whole):
        assert spin.main(small(start, data)) == 0
    with contextlib.chdir(folder):
        die_at(spin, "take_step", small(start, data), fatal=lambda *args: len(steps_of(folder)) >= 3)
    return folder / "run", tree(whole / "run")


def steps_of(folder) -> list[str]:
    """The log of iteration 1's steps so far."""
    log = folder / "run/steps-1.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def names_of(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_no_damage_to_any_file_is_silent(died, start, data, here, capsys):
    """Every file that a resumed run finds, damaged in two ways: the same end as without damage, or one line."""
    folder, whole = died
    names = names_of(folder)
    read = [name for name in names if not name.startswith(("steps-0", "iterate-0"))]
    assert {"run.json", "checksums.json", "metrics.jsonl", "pairs-0.jsonl", "resume/iterate-2/train.safetensors"} < {
        *read
    }
    rng = random.Random(0)
    ends = []
    for name in read:
        for damage, spoil in rng.sample(list(DAMAGES.items()), 2):
            shutil.rmtree(here / "run", ignore_errors=True)
            shutil.copytree(folder, here / "run")
            path = here / "run" / name
            content = path.read_bytes()
            path.write_bytes(spoil(content, rng))
            changed = path.read_bytes() != content
            code = spin.main(small(start, data))
            captured = capsys.readouterr()
            told = captured.err.strip().splitlines()
            told = [line for line in told if "warning" not in line]
            if code:
                assert len(told) == 1 and ("run/" in told[0] or "--out run" in told[0]), (name, damage, told)
            else:
                assert tree(here / "run") == whole, (name, damage)
                unread = name.startswith(NOT_READ) or (name == "steps-1.jsonl" and damage == "a doubled last line")
                assert not changed or told or unread, (name, damage, "not a word")
            ends.append(code)
    assert ends.count(0) > 5 and len(ends) - ends.count(0) > 5, "one of the two kinds is hardly tested"


def test_a_missing_file_is_noticed(died, start, data, here, capsys):
    """Of finished results; shards and the checkpoint are made again."""
    folder, whole = died
    for name in names_of(folder):
        shutil.rmtree(here / "run", ignore_errors=True)
        shutil.copytree(folder, here / "run")
        (here / "run" / name).unlink()
        code = spin.main(small(start, data))
        captured = capsys.readouterr()
        if code:
            assert captured.err.count("\n") == 1, (name, captured.err)
        else:
            assert tree(here / "run") == whole, name


def test_a_finished_run_has_all_its_files(start, data, here, capsys):
    """One missing or changed file of a finished run, final/ and earlier iterates included: exit code 2, one line."""
    assert spin.main(small(start, data)) == 0
    for name in names_of(here / "run"):
        if name in CLOCK:
            continue
        path = here / "run" / name
        content = path.read_bytes()
        for spoilt in (None, content[:-2]):
            path.unlink() if spoilt is None else path.write_bytes(spoilt)
            assert spin.main(small(start, data)) == 2, name
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and ("run/" in error or "--out run" in error), error
            path.write_bytes(content)
    assert spin.main(small(start, data)) == 0


def test_a_shard_of_another_place_is_not_taken(tmp_path):
    """A shard copied over another of the same length has a valid checksum, but not for its name."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        storage.write_shard(tmp_path / name / "x-0-2.jsonl", [name, name])
    shutil.copy(tmp_path / "a/x-0-2.jsonl", tmp_path / "b/x-0-2.jsonl")
    assert storage.read_shard(tmp_path / "a/x-0-2.jsonl", 2) == ["a", "a"]
    assert storage.read_shard(tmp_path / "b/x-0-2.jsonl", 2) is None


def test_a_run_that_is_removed_stays_removed(start, data, here, monkeypatch, capsys):
    """`rm -r` of --out during a run: the run ends with code 1, and makes no incomplete folder of the same name."""
    original = Run.evaluate

    def evaluate(run, player):
        row = original(run, player)
        if run.iterate == 1:
            shutil.rmtree(here / "run")
        return row

    monkeypatch.setattr(Run, "evaluate", evaluate)
    assert spin.main(small(start, data)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "run/" in error
    assert not (here / "run").exists()


def test_a_planted_link_is_not_followed(start, data, here):
    """--out that holds a symbolic link named like a temporary file: its target stays as it is."""
    (here / "precious").write_text("precious")
    (here / "run").mkdir()
    (here / "run/.tmp-x").symlink_to(here / "precious")
    assert spin.main(small(start, data, iterations=1)) in (0, 2)
    assert (here / "precious").read_text() == "precious"


def test_leftovers_of_a_killed_process_are_removed(died, start, data, here):
    folder, whole = died
    shutil.copytree(folder, here / "run")
    for place in ("", "resume/iterate-2", "iterate-1"):
        leftover = here / "run" / place / ".tmp-abc"
        leftover.mkdir()
        (leftover / "model.safetensors").write_bytes(b"x" * 100)
    assert spin.main(small(start, data)) == 0
    assert tree(here / "run") == whole
