"""runtime/storage.py: files written whole and synced, shards, and the state of training."""

import errno
import os
import shutil

import pytest
from helpers import die_at, rows, small, tree
from safetensors import safe_open

import spin
from runtime import storage
from runtime.run import Run


def spy_on_fsync(monkeypatch, calls) -> None:
    """Adds to `calls` what is synced, as (device, inode)."""
    fsync = os.fsync

    def spy(handle):
        status = os.fstat(handle)
        calls.append((status.st_dev, status.st_ino))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)


def identity(path):
    return path.stat().st_dev, path.stat().st_ino


def evaluates_a_trained_player(run, player) -> bool:
    return run.iterate == 1


# ---------------------------------------------------------------- files


def test_content_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    """Synced, renamed, and then the folder that names it: in that order."""
    calls, replace = [], os.replace
    spy_on_fsync(monkeypatch, calls)
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("rename"), replace(*a)))
    storage.write_text(tmp_path / "x", "y")
    assert calls == [identity(tmp_path / "x"), "rename", identity(tmp_path)]


def test_folders_of_iterates_are_synced(start, data, here, monkeypatch):
    synced = []
    spy_on_fsync(monkeypatch, synced)
    assert spin.main(small(start, data)) == 0
    for name in ("iterate-1", "iterate-2", "final"):
        assert identity(here / "run" / name) in synced


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch, name):
    """The error names the file and not the temporary one, which is removed."""
    path = tmp_path / "x"
    storage.write_text(path, "before")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        storage.write_text(path, "after")
    assert caught.value.filename == str(path) and caught.value.errno == errno.ENOSPC
    assert [p.name for p in path.parent.iterdir()] == ["x"] and path.read_text() == "before"


def test_rows_are_read_as_they_were_written(tmp_path):
    """Floats to the bit; a missing and a damaged file are named."""
    path = tmp_path / "x.jsonl"
    values = [0.1, 1 / 3, 1e-320, -0.0, [None, True], {"a": "\u2028"}]
    storage.write_rows(path, values)
    assert list(map(repr, storage.read_rows(path))) == list(map(repr, values))
    with pytest.raises(FileNotFoundError, match="none"):
        list(storage.read_rows(tmp_path / "none"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError, match=r"damaged .*x\.jsonl"):
        list(storage.read_rows(path))


# ---------------------------------------------------------------- shards


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    """A run whose folder was removed must not go on in an incomplete one."""
    with pytest.raises(FileNotFoundError, match="gone/x"):
        storage.write_text(tmp_path / "gone/x", "y")
    assert not (tmp_path / "gone").exists()


def test_temporary_files_follow_no_link_and_keep_the_mode_of_the_umask(tmp_path):
    """A link under the file's own name is replaced, not followed; files are as readable as others of the user."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "x").symlink_to(tmp_path / "precious")
    storage.write_text(tmp_path / "x", "y")
    (tmp_path / "plain").write_text("z")
    assert (tmp_path / "precious").read_text() == "precious" and (tmp_path / "x").read_text() == "y"
    assert not (tmp_path / "x").is_symlink()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_shards_are_read_or_computed_but_never_mixed_up(tmp_path, capsys):
    """Each range is worked on once; another size finds nothing to read; a damaged shard is computed again."""
    asked = []

    def work(items):
        asked.append(items)
        return [[i, i / 3, [None, True]] for i in items]

    expected = [[i, i / 3, [None, True]] for i in range(7)]
    assert storage.in_shards(None, "x", 7, 3, work) == expected and len(asked) == 3
    assert storage.in_shards(tmp_path, "x", 7, 3, work) == expected and len(asked) == 6
    (tmp_path / "x-3-6.jsonl").unlink()
    assert storage.in_shards(tmp_path, "x", 7, 3, work) == expected and asked[6:] == [range(3, 6)]
    assert storage.in_shards(tmp_path, "x", 7, 4, work) == expected and len(asked) == 9
    assert storage.in_shards(tmp_path, "y", 0, 4, work) == []
    assert capsys.readouterr().err == ""
    (tmp_path / "x-0-3.jsonl").write_text("[0]\n")
    assert storage.in_shards(tmp_path, "x", 7, 3, work) == expected and asked[9:] == [range(0, 3)]
    assert "x-0-3.jsonl: damaged" in capsys.readouterr().err
    assert storage.in_shards(tmp_path, "x", 7, 3, work) == expected and len(asked) == 10


# ---------------------------------------------------------------- the state of training


def test_a_damaged_checkpoint_or_shard_is_computed_again(start, data, here, capsys):
    """One line with the file's name, and the run ends as it would have without the damage."""
    die_at(Run, "evaluate", small(start, data), evaluates_a_trained_player)
    shutil.copytree(here / "run", here / "died")
    assert spin.main(small(start, data)) == 0
    whole = tree(here / "run")
    for name in ("train.safetensors", "score-0-32.jsonl"):
        shutil.rmtree(here / "run")
        shutil.copytree(here / "died", here / "run")
        path = here / "run/resume/iterate-1" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        capsys.readouterr()
        assert spin.main(small(start, data)) == 0
        error = capsys.readouterr().err
        assert name in error and "damaged" in error and "again" in error and error.count("\n") == 1
        assert tree(here / "run") == whole


def test_nothing_is_saved_by_pickle(start, data, here):
    """The state of training is tensors and JSON, both data."""
    die_at(Run, "evaluate", small(start, data), evaluates_a_trained_player)
    names = {".json", ".jsonl", ".safetensors", ".svg", ".html"}
    assert {p.suffix for p in (here / "run").rglob("*") if p.is_file()} <= names
    with safe_open(here / "run/resume/iterate-1/train.safetensors", framework="pt") as reader:
        metadata = reader.metadata()
    assert metadata.keys() == {"steps", "log", "sha256"} and metadata["steps"] == "5"
    assert all(len(value) <= 64 for value in metadata.values()), "the log itself is in steps-0.jsonl"
    assert len(rows(here / "run/steps-0.jsonl")) == 5
