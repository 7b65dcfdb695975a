"""Disks damage files, and are full. A resumed run computes a damaged shard or checkpoint again, or stops in one line.

No damage may lead to a silently different result, or to a traceback.
"""

import contextlib
import itertools
import random
import re
import resource
import shutil

import pytest
from helpers import die_at, failed, rows, small, tree

import spin
from runtime.run import Run
from runtime.training import Training


def flipped(content: bytes, rng: random.Random) -> bytes:
    position, bit = rng.randrange(len(content)), rng.randrange(8)
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def another_digit(content: bytes, rng: random.Random) -> bytes:
    position = rng.choice([match.start() for match in re.finditer(rb"[0-9]", content)])
    return content[:position] + bytes([48 + (content[position] - 47) % 10]) + content[position + 1 :]


DAMAGES = (
    flipped,
    another_digit,
    lambda content, rng: content[: rng.randrange(len(content))],
    lambda content, rng: content + content[content[:-1].rfind(b"\n") + 1 :],  # a doubled last line
    lambda content, rng: bytes(len(content)),
    None,  # no file at all
)
# A run that died in iteration 1 does not need these: pages and plots are drawn anew, the checkpoint has the log of the
# steps, metrics.jsonl has the evaluation of the start, and `checksums` has lines of files that are not read again.
EVALUATION = "resume/iterate-0/(greedy|sampled|entropy|nll|kl)"
NOT_READ = re.compile(f"metrics.svg|report.html|times|steps-1|(.*/)?checksums|{EVALUATION}")


@pytest.fixture(scope="module")
def died(start, data, tmp_path_factory):
    """The folder of a run that died in iteration 1's training."""
    folder = tmp_path_factory.mktemp("died")
    log = folder / "run/steps-1.jsonl"
    with contextlib.chdir(folder):
        die_at(Training, "step", small(start, data), fatal=lambda *args: log.exists() and len(rows(log)) == 3)
    return folder / "run"


def spoil(path, damage, rng) -> bool:
    """Damages or removes the file. Returns whether that made a difference."""
    content = path.read_bytes()
    path.unlink() if damage is None else path.write_bytes(damage(content, rng))
    return damage is None or path.read_bytes() != content


def test_no_damage_to_any_file_is_silent(died, whole, start, data, here, capsys):
    """Every third file that a resumed run finds is damaged: the end is that without damage, or one line is printed."""
    expected, rng = tree(whole), random.Random(0)
    ends = []
    for name, damage in zip(sorted(tree(died))[::3], itertools.cycle(DAMAGES)):  # every third file: it takes long
        shutil.rmtree(here / "run", ignore_errors=True)
        shutil.copytree(died, here / "run")
        changed = spoil(here / "run" / name, damage, rng)
        ends.append(spin.main(small(start, data)))
        told = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
        if ends[-1]:
            assert len(told) == 1 and "run" in told[0], (name, told)
        else:
            assert tree(here / "run") == expected, name
            assert told or not changed or damage is None or NOT_READ.match(name), (name, "not a word")
    assert min(ends.count(0), len(ends) - ends.count(0)) > 1, "one of the two ends is hardly tested"


def test_a_finished_run_has_all_its_files(whole, start, data, here, capsys):
    """A finished run misses any removed or changed file, of final/ and earlier iterates, too: exit code 2, one line."""
    shutil.copytree(whole, here / "run")
    files = {name: content for name, content in tree(here / "run").items() if name != "metrics.svg"}
    for (name, content), damage in zip(files.items(), itertools.cycle((None, flipped))):
        spoil(here / "run" / name, damage, random.Random(0))
        assert "run" in failed(small(start, data), capsys)
        (here / "run" / name).write_bytes(content)
    assert spin.main(small(start, data)) == 0


def test_a_run_that_is_removed_stays_removed(start, data, here, monkeypatch, capsys):
    """`rm -r` of --out during a run: the run ends with code 1, and makes no incomplete folder of the same name."""
    original = Run.evaluate

    def evaluate(run, player):
        row = original(run, player)
        if run.iterate == 1:
            shutil.rmtree(here / "run")
        return row

    monkeypatch.setattr(Run, "evaluate", evaluate)
    assert "run/" in failed(small(start, data), capsys, 1)
    assert not (here / "run").exists()


# ---------------------------------------------------------------- disks that are full or limited


@contextlib.contextmanager
def largest_file(size: int):
    """The kernel refuses to write more than `size` bytes into one file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [200, 9000, None])
def test_files_that_cannot_be_written(start, data, here, whole, capsys, size):
    """The limit is met in run.json, in a shard, in pairs or the state of training, and in the largest file of all.

    One line is printed, no temporary file is left, and the same command ends as if undisturbed.
    """
    with largest_file(size or max(map(len, tree(whole).values())) - 1):
        code = spin.main(small(start, data))
    assert code == (2 if size == 200 else 1)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    error = "".join(line for line in lines if "report.html: not written" not in line)  # The page gets a warning.
    assert error.count("\n") == 1 and error.startswith("spin.py: error: ") and "run/" in error, error
    assert not [name for name in tree(here) if ".tmp" in name]
    assert spin.main(small(start, data)) == 0
    assert tree(here / "run") == tree(whole)
