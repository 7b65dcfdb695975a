"""Disks that are full or limited: one line, nothing half-written, and the same command resumes."""

import contextlib
import resource

import pytest
from helpers import small, tree

import spin


@contextlib.contextmanager
def largest_file(size: int):
    """The kernel refuses to write more than so many bytes into one file."""
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
    error = "".join(line for line in lines if "report.html: not written" not in line)  # of the page a warning
    assert error.count("\n") == 1 and error.startswith("spin.py: error: ") and "run/" in error, error
    assert not [name for name in tree(here) if ".tmp" in name]
    assert spin.main(small(start, data)) == 0
    assert tree(here / "run") == tree(whole)
