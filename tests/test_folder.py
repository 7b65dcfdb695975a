"""runtime/folder.py: files written whole and synced, their checksums, and shards."""

import errno
import os
import shutil
import subprocess

import pytest
from helpers import tree
from safetensors.torch import save_file

from runtime import folder
from runtime.folder import Folder, in_shards
from runtime.stopping import Stopped


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


# ---------------------------------------------------------------- files


def test_content_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    """The file is synced, then renamed, then the directory that names it is synced; its checksum comes before."""
    calls, replace = [], os.replace
    spy_on_fsync(monkeypatch, calls)
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append(a[1].name), replace(*a)))
    Folder(tmp_path).write_rows("x", [1])
    x, checksums, directory = (identity(tmp_path / name) for name in ("x", "checksums", ""))
    assert calls == [x, checksums, "checksums", directory, "x", directory]


def test_folders_appear_as_a_whole_and_are_synced(tmp_path, monkeypatch):
    """A folder takes the place of an old one with other files; a reader never finds a part of it."""
    synced, run = [], Folder(tmp_path)
    spy_on_fsync(monkeypatch, synced)
    run.write_folder("it", lambda place: [(place / name).write_text(name) for name in "ab"])
    with pytest.raises(OSError, match="run out") as caught:
        run.write_folder("it", lambda place: ((place / "c").write_text("c"), broken())[0])
    assert caught.value.filename == str(tmp_path / "it") and tree(tmp_path / "it") == {"a": b"a", "b": b"b"}
    run.check(["it/a", "it/b"])
    run.write_folder("it", lambda place: (place / "c").write_text("c"))
    assert tree(tmp_path / "it") == {"c": b"c"} and {identity(tmp_path / "it"), identity(tmp_path / "it/c")} < {*synced}
    assert [line[66:] for line in (tmp_path / "checksums").read_text().splitlines()] == ["it/c"]
    run.remove("it")
    assert not (tmp_path / "it").exists() and (tmp_path / "checksums").read_text() == ""


def broken():
    raise OSError(errno.ENOSPC, "run out")


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch, name):
    """The error names the file and not the temporary one, which is removed. The old content is still valid."""
    run = Folder(tmp_path)
    run.write_rows("x", ["before"])

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            run.write_rows("x", ["after"])
    assert caught.value.filename == str(tmp_path / "x") and caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checksums", "x"] and run.read_rows("x") == ["before"]


def test_files_replace_links_and_are_as_readable_as_others_of_the_user(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "x").symlink_to(tmp_path / "precious")
    folder.write(tmp_path / "x", lambda place: save_file({}, place))
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "x").is_symlink()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "precious").stat().st_mode


# ---------------------------------------------------------------- checksums


def test_rows_are_read_as_they_were_written_or_not_at_all(tmp_path):
    """Floats keep every bit; not even the first row of a damaged or missing file is given out."""
    run = Folder(tmp_path)
    values = [0.1, 1 / 3, 1e-320, -0.0, [None, True], {"a": "\u2028"}]
    run.write_rows("x.jsonl", values)
    assert list(map(repr, run.read_rows("x.jsonl"))) == list(map(repr, values))
    with pytest.raises(Stopped, match="none: missing"):
        run.read_rows("none")
    (tmp_path / "x.jsonl").write_text((tmp_path / "x.jsonl").read_text().replace("0.1", "0.2"))
    with pytest.raises(Stopped, match=r"x\.jsonl: damaged"):
        run.read_rows("x.jsonl")


def test_old_and_new_content_are_valid_if_a_process_dies_between_checksum_and_rename(tmp_path, monkeypatch):
    """In all other cases only the new content is valid, and no file in place of another."""
    run = Folder(tmp_path)
    run.write_rows("x", [1])
    shutil.copy(tmp_path / "x", tmp_path / "old")
    run.write_rows("y", [3])
    replace = os.replace
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", lambda old, new: broken() if new.name == "x" else replace(old, new))
        run.write_rows("x", [2])
    run.check(["x", "y"])
    (tmp_path / "x").write_text("2\n")
    run.check(["x", "y"])
    run.write_rows("x", [2])
    assert [line[66:] for line in (tmp_path / "checksums").read_text().splitlines()] == ["y", "x"]
    for other in ("old", "y"):
        shutil.copy(tmp_path / other, tmp_path / "x")
        with pytest.raises(Stopped, match="x: damaged"):
            run.check(["x", "y"])


def test_a_run_that_died_before_its_first_row_begins_again_but_lost_rows_are_missed(tmp_path):
    run = Folder(tmp_path)
    assert run.finished() == []
    run.write_rows("heldout-0.jsonl", [0])
    run.write_rows("metrics.jsonl", [{"iterate": 0}])
    (tmp_path / "metrics.jsonl").unlink()
    assert run.finished() == []
    run.write_folder("iterate-1", lambda place: (place / "weights").write_text("w"))
    with pytest.raises(Stopped, match=r"metrics\.jsonl: missing"):
        run.finished()


def test_files_of_an_iterate_count_as_soon_as_it_is_finished(tmp_path):
    """A resumed run computes those anew that follow the metrics; in a finished run all must be there."""
    run = Folder(tmp_path)
    run.write_record({"finished": False})
    for name in ("a", "metrics.jsonl", "b"):
        run.write_rows(name, [{"iterate": 0}])
    (tmp_path / "b").unlink()
    run.check()
    run.write_record({"finished": True})
    with pytest.raises(Stopped, match="b: missing"):
        run.check()


def test_sha256sum_reads_the_checksums_of_a_run(whole):
    """The checksums name all files once, apart from pages and plots that are drawn anew."""
    names = [line[66:] for line in (whole / "checksums").read_text().splitlines()]
    assert sorted(names) == sorted(tree(whole).keys() - {"checksums", "metrics.svg"})
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--strict", "checksums"], cwd=whole, check=True)


# ---------------------------------------------------------------- shards


def test_shards_are_read_or_computed_but_never_mixed_up(tmp_path, capsys):
    """Each range is worked on once; another size finds nothing to read; a damaged shard is computed again."""
    asked = []

    def work(items):
        asked.append(items)
        return [[i, i / 3, [None, True]] for i in items]

    expected = [[i, i / 3, [None, True]] for i in range(7)]
    assert in_shards(None, "x", 7, 3, work) == expected and len(asked) == 3
    run = Folder(tmp_path)
    assert in_shards(run, "x", 7, 3, work) == expected and len(asked) == 6
    assert not any(tmp_path.iterdir()), "outside an iterate nothing is written"
    run.enter(1)
    place = run.resume
    assert in_shards(run, "x", 7, 3, work) == expected and len(asked) == 9
    (place / "x-3-6.jsonl").unlink()
    assert in_shards(run, "x", 7, 3, work) == expected and asked[9:] == [range(3, 6)]
    assert in_shards(run, "x", 7, 4, work) == expected and len(asked) == 12
    assert in_shards(run, "y", 0, 4, work) == []
    assert capsys.readouterr().err == ""
    shutil.copy(place / "x-3-6.jsonl", place / "x-0-3.jsonl")  # The shard is intact, but belongs elsewhere.
    assert in_shards(run, "x", 7, 3, work) == expected and asked[12:] == [range(0, 3)]
    assert "x-0-3.jsonl: damaged" in capsys.readouterr().err
    assert in_shards(run, "x", 7, 3, work) == expected and len(asked) == 13
    kept = shutil.copy(place / "x-0-3.jsonl", tmp_path)
    run.enter(2)
    assert not place.exists(), "the iterate before is finished"
    shutil.copy(kept, run.resume)
    assert in_shards(run, "x", 3, 3, work) == expected[:3] and len(asked) == 14
