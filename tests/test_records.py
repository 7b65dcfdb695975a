"""data/records.py: every kind of file gives the same records, and a file that cannot be read is named with its line."""

import csv
import gzip
import io
import json
import os
import sys
import types

import pytest

from data import records
from data.examples import load_examples

RECORDS = [{"prompt": f'caf\u00e9 {i}, "x"', "response": f"line\nof {i};\ttab"} for i in range(3)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
BOM = b"\xef\xbb\xbf"
POINTER = b"version git-lfs/v1\noid sha256:0\nsize 9\n"
GOOD = '{"prompt": "a", "response": "b"}'


def as_csv(separator):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["response", "prompt"], delimiter=separator)
    writer.writeheader()
    writer.writerows(RECORDS)
    return file.getvalue().encode()


FILES = {
    "x.jsonl": LINES,
    "lines.json": LINES,
    "bom.jsonl": BOM + LINES,
    "blank.jsonl": b"\n\n" + LINES.replace(b"\n", b"\r\n\r\n"),
    "array.json": json.dumps(RECORDS).encode(),
    "indented.json": b"\n " + json.dumps(RECORDS, indent=4, ensure_ascii=False).encode() + b"\n",
    "bom.json": BOM + json.dumps(RECORDS).encode(),
    "array.jsonl": json.dumps(RECORDS).encode(),
    "wrapped.json": json.dumps({"version": "1", "data": RECORDS}, indent=1).encode(),
    "x.csv": as_csv(","),
    "semicolon.csv": as_csv(";"),
    "bom.csv": BOM + as_csv(","),
    "x.tsv": as_csv("\t"),
    "x.jsonl.gz": gzip.compress(LINES, mtime=0),
    "two-parts.jsonl.gz": gzip.compress(LINES[:50], mtime=0) + gzip.compress(LINES[50:], mtime=0),
    "gzip-without-its-suffix.jsonl": gzip.compress(LINES, mtime=0),
    "x.csv.gz": gzip.compress(as_csv(",")),
}


def contents(path):
    return [content for _, content in records.read(str(path))]


def refusal(path) -> str:
    with pytest.raises(ValueError) as caught:
        load_examples([str(path)])
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_records(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    assert contents(tmp_path / name) == RECORDS


def test_parquet(tmp_path):
    """Parquet may hold lists of messages and missing values."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [r | {"messages": [{"role": "user", "content": "hi"}], "system": None} for r in RECORDS * 200]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert contents(tmp_path / "x.parquet") == rows
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-9])
    assert refusal(tmp_path / "cut.parquet").startswith(f"{tmp_path}/cut.parquet: not readable as Parquet (")


@pytest.mark.parametrize("module, name", [("pyarrow", "x.parquet"), ("datasets", "owner/name")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(module, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)  # Python does this for a module that it cannot find.
    assert f"pip install {module}" in refusal(name)


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """Names are owner/name[@revision][:config][:split]; the hub is not asked for names of files."""
    asked = []

    def load_dataset(name, config, split, revision):
        asked.append((name, config, split, revision))
        if name == "owner/none":
            raise OSError("no such data set\nmore")
        return RECORDS

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for name in ("owner/name", "owner/name@v1:test", "openai/gsm8k:main:train[:10%]"):
        assert contents(name) == RECORDS
        assert [e.where for e in load_examples([name])] == [f"{name}:{n}" for n in (1, 2, 3)]
    assert asked[::2] == [
        ("owner/name", None, "train", None), ("owner/name", None, "test", "v1"),
        ("openai/gsm8k", "main", "train[:10%]", None),
    ]  # fmt: skip
    assert "owner/none: no such file, and the hub says: no such data set" in refusal("owner/none")
    del asked[:]
    for name in ("data/train", "nowhere/train.jsonl", "x"):
        with pytest.raises(FileNotFoundError, match="no such file, directory or hub id"):
            load_examples([name])
    assert not asked


def test_a_directory_and_several_files_are_read_in_order(tmp_path, capsys):
    """Messages use the line numbers of each file, while `line` continues across files."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "b.csv").write_bytes(as_csv(","))
    (folder / "a.jsonl").write_bytes(b"\n" + LINES)
    (folder / "README.md").write_text("words")
    (tmp_path / "c.json").write_bytes(FILES["array.json"])
    examples = load_examples([str(folder), str(tmp_path / "c.json")])
    assert capsys.readouterr().out == (
        f"{folder}: reading a.jsonl, b.csv\n"
        f"{folder}, {tmp_path}/c.json: prompt -> prompt, response -> response; left out: nothing\n"
    )
    assert [e.prompt for e in examples] == [r["prompt"] for r in RECORDS] * 3
    names = [f"{folder}/a.jsonl", f"{folder}/b.csv", f"{tmp_path}/c.json"]
    assert [e.where for e in examples] == [f"{n}:{i}" for n, lines in zip(names, ("234", "357", "123")) for i in lines]
    assert [e.line for e in examples] == [2, 3, 4, 7, 9, 11, 12, 13, 14]
    (folder / "empty.jsonl").write_text("\n")
    assert refusal(folder).startswith(
        f"{folder}/empty.jsonl: holds no records to train on; accepted are prompt/response, "
    )


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("x.csv", "prompt,response\na,b\nc\n", "x.csv:3: expected 2 values, as in the header"),
        ("x.csv", "prompt,response\na,b\n\"c,d\n", "x.csv:3: not valid CSV (unexpected end of data)"),
        ("x.csv", "prompt\na\n", "x.csv:2: field 'response' is missing; the fields are 'prompt'; accepted are "),
        ("x.csv", b"prompt,response\na,\xff\n", "x.csv:2: not readable as UTF-8 text ("),
        ("x.csv", "prompt,response\na,\n", "x.csv:2: field 'response' is empty"),
        ("x.json", f"[{GOOD},\n{{oops}}]",
         "x.json: not valid JSON (Expecting property name enclosed in double quotes: line 2"),
        ("x.json", f"[{GOOD}, 3]", "x.json:2: expected a JSON object, found int"),
        ("x.json", b'[{"prompt":\n"\xff"}]', "x.json:2: not readable as UTF-8 text ("),
        ("x.jsonl", f"{GOOD}\n{{oops\n", "x.jsonl:2: not valid JSON (Expecting property name"),
        ("x.jsonl", GOOD.encode() + b"\n\xff" + GOOD.encode(), "x.jsonl:2: not readable as UTF-8 text ("),
        ("x.jsonl", GOOD + '\n{"a":' * 5000, "x.jsonl:2: "), ("x.jsonl", f"{GOOD}\n{'9' * 5000}", "x.jsonl:2: "),
        ("x.jsonl", "prompt,response\na,b\n", "expected a JSON object per line or a JSON array, or a name that ends"),
        ("x.json", '{\n  "prompt" "a"\n}\n', "x.json:1: not valid JSON (Expecting property name"),
        ("x.jsonl", b"PAR1\x15\x04\xff\n", "x.jsonl: not readable as Parquet"),
        ("x.jsonl", POINTER, "x.jsonl: no data; it is a pointer of Git LFS: run git lfs pull"),
        ("x.gz", GOOD, "x.gz: not readable as gzip (Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "x.jsonl.gz: not readable as gzip (Compressed file ended"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_by_file_and_line(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refusal(tmp_path / name)
    assert says in error and "\n" not in error


def test_names_of_data_that_are_nearly_right(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(LINES)
    os.mkfifo(tmp_path / "pipe.jsonl")  # Opening it would wait for a writer.
    names = ("trian.jsonl", "pipe.jsonl", "a\0b")
    for name, says in zip(names, ("no such file, directory or hub id", "not a regular file", "no such file")):
        with pytest.raises(FileNotFoundError, match=says):
            load_examples([str(tmp_path / name)])
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").startswith(f"{tmp_path}/empty: a directory without data, expected files that")
