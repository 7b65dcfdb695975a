"""Disks that are full, read-only or limited: one line, nothing half-written, and the same command resumes."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess

import pytest
from helpers import small, tree

import spin
from runtime import plan


@pytest.fixture
def mounted(here):
    """./run is a file system of 100 KiB of its own, where this is permitted."""
    (here / "run").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(here / "run")]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield here / "run"
    subprocess.run(["umount", str(here / "run")], check=True)


@contextlib.contextmanager
def largest_file(size: int):
    """The kernel refuses to write more than so many bytes into one file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failed_then_resumes(start, data, here, whole, capsys) -> None:
    """After a run that could not write: one line, no temporary files, and the same command ends as if undisturbed."""
    lines = capsys.readouterr().err.splitlines(keepends=True)
    error = "".join(line for line in lines if "report.html: not written" not in line)  # of the page a warning
    assert error.count("\n") == 1 and error.startswith("spin.py: error: ") and "run/" in error, error
    assert not [name for name in tree(here) if ".tmp" in name]
    assert spin.main(small(start, data)) == 0
    assert tree(here / "run") == tree(whole)


@pytest.mark.parametrize("size", [200, 9000, None])
def test_files_that_cannot_be_written(start, data, here, whole, capsys, size):
    """The limit is met in run.json, in a shard, in pairs or the state of training, and in the largest file of all."""
    with largest_file(size or max(map(len, tree(whole).values())) - 1):
        code = spin.main(small(start, data))
    assert code == (2 if size == 200 else 1)
    failed_then_resumes(start, data, here, whole, capsys)


def test_a_full_disk(start, data, here, mounted, whole, capsys, monkeypatch):
    """What was written before stays, also when the command is run again while the disk is still full."""
    monkeypatch.setattr(plan, "disk_left_for", lambda out: 2**40)  # or it would be refused before it begins
    assert spin.main(small(start, data)) == 1
    assert "No space left on device" in capsys.readouterr().err
    state = tree(mounted)
    assert spin.main(small(start, data)) == 1, "still full"
    assert state.keys() <= tree(mounted).keys()
    subprocess.run(["mount", "-o", "remount,size=10m", str(mounted)], check=True)
    failed_then_resumes(start, data, here, whole, capsys)


def test_any_rename_may_fail(start, data, here, whole, capsys, monkeypatch):
    """The same without mounting anything: rename number 50 of the run meets a read-only file system."""
    count, replace = [0], os.replace

    def fail(*args):
        count[0] += 1
        if count[0] == 50:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        assert spin.main(small(start, data)) == 1
    failed_then_resumes(start, data, here, whole, capsys)
