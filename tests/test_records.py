"""runtime/records.py: one set of records from every kind of file, and what a file that is none of them is told."""

import csv
import gzip
import io
import json
import sys
import types

import pytest

from runtime import records
from runtime.data import load_examples

RECORDS = [{"prompt": f'caf\u00e9 {i}, "x"', "response": f"line\nof {i};\ttab"} for i in range(3)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
BOM = b"\xef\xbb\xbf"


def as_csv(separator):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["response", "prompt"], delimiter=separator)
    writer.writeheader()
    writer.writerows(RECORDS)
    return file.getvalue().encode()


def zstd_file(path, content):
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(content)


FILES = {
    "x.jsonl": LINES,
    "lines.json": LINES,
    "bom.jsonl": BOM + LINES,
    "blank.jsonl": b"\n\n" + LINES.replace(b"\n", b"\r\n\r\n"),
    "array.json": json.dumps(RECORDS).encode(),
    "indented.json": b"\n " + json.dumps(RECORDS, indent=4, ensure_ascii=False).encode() + b"\n",
    "bom.json": BOM + json.dumps(RECORDS).encode(),
    "array.jsonl": json.dumps(RECORDS).encode(),
    "x.csv": as_csv(","),
    "semicolon.csv": as_csv(";"),
    "bom.csv": BOM + as_csv(","),
    "x.tsv": as_csv("\t"),
    "x.jsonl.gz": gzip.compress(LINES),
    "two-parts.jsonl.gz": gzip.compress(LINES[:50]) + gzip.compress(LINES[50:]),
    "gzip-without-its-suffix.jsonl": gzip.compress(LINES),
    "x.csv.gz": gzip.compress(as_csv(",")),
    "x.json.gz": gzip.compress(json.dumps(RECORDS).encode()),
}


def contents(path):
    return [content for _, content in records.read(str(path))]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_records(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    assert contents(tmp_path / name) == RECORDS


@pytest.mark.parametrize("content", [LINES, json.dumps(RECORDS).encode()])
def test_zstd(content, tmp_path):
    zstd_file(tmp_path / "x.jsonl.zst", content)
    assert contents(tmp_path / "x.jsonl.zst") == RECORDS
    damaged = bytearray((tmp_path / "x.jsonl.zst").read_bytes())
    damaged[12:30] = b"\xff" * 18
    (tmp_path / "x.jsonl.zst").write_bytes(damaged)
    assert refusal(tmp_path / "x.jsonl.zst").startswith(f"{tmp_path}/x.jsonl.zst:1: not readable as UTF-8 text (")


def test_parquet(tmp_path):
    """Lists of messages and missing values, too; a damaged file is one line."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [r | {"messages": [{"role": "user", "content": "hi"}], "system": None} for r in RECORDS * 200]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert contents(tmp_path / "x.parquet") == rows
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-9])
    assert refusal(tmp_path / "cut.parquet").startswith(f"{tmp_path}/cut.parquet:1: not readable as Parquet (")


@pytest.mark.parametrize("module, name", [("pyarrow", "x.parquet"), ("datasets", "owner/name")])
def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(module, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)  # what Python does where a module cannot be found
    assert f"pip install {module}" in refusal(name)


def test_zstd_without_any_library_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes(records.ZSTD + b"x")
    for module in ("compression", "zstandard", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install zstandard" in refusal(tmp_path / "x.jsonl")


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """owner/name[@revision][:config][:split]; the hub is not asked for names of files."""
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
    """Line numbers stay those of the files, while records keep distinct numbers."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "b.csv").write_bytes(as_csv(","))
    (folder / "a.jsonl").write_bytes(b"\n" + LINES)
    (folder / "README.md").write_text("words")
    (tmp_path / "c.json").write_bytes(FILES["array.json"])
    examples = load_examples([str(folder), str(tmp_path / "c.json")])
    assert capsys.readouterr().out == f"{folder}: reading a.jsonl, b.csv\n"
    assert [e.prompt for e in examples] == [r["prompt"] for r in RECORDS] * 3
    names = [f"{folder}/a.jsonl", f"{folder}/b.csv", f"{tmp_path}/c.json"]
    assert [e.where for e in examples] == [f"{n}:{i}" for n, lines in zip(names, ("234", "246", "123")) for i in lines]
    assert len({e.line for e in examples}) == 9 and [e.line for e in examples] == sorted(e.line for e in examples)
    (folder / "empty.jsonl").write_text("\n")
    assert refusal(folder).startswith(f"{folder}/empty.jsonl: holds no records; accepted are prompt/response, ")


def test_an_item_larger_than_what_is_read_at_once(tmp_path):
    rows = [{"prompt": "\u00e9" * n, "response": "b"} for n in (3, 3 * 2**19, 5)]
    (tmp_path / "x.json").write_text(json.dumps(rows, ensure_ascii=False))
    assert contents(tmp_path / "x.json") == rows


# ---------------------------------------------------------------- what is refused


def refusal(path) -> str:
    with pytest.raises(ValueError) as caught:
        load_examples([str(path)])
    assert len(str(caught.value)) < 500 + len(str(path))
    return str(caught.value)


GOOD = '{"prompt": "a", "response": "b"}'


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("x.csv", "prompt,response\na,b\nc\n", "x.csv:3: 1 values, the header has 2 columns"),
        ("x.csv", "prompt,response\na,b\n\"c,d\n", "x.csv:3: not valid CSV (unexpected end of data)"),
        ("x.csv", "prompt,prompt\na,b\n", "x.csv:1: two columns have one name: prompt, prompt"),
        ("x.csv", "prompt\na\n", "x.csv:2: field 'response' is missing; the fields are 'prompt'; accepted are "),
        ("x.csv", "", "x.csv: holds no records"),
        ("x.csv", b"prompt,response\na,\xff\n", "x.csv:2: not readable as UTF-8 text ("),
        ("x.csv", "prompt,response\na,\n", "x.csv:2: field 'response' is empty"),
        ("x.json", f"[{GOOD}, {{oops}}]", "x.json:2: not valid JSON (Expecting property name"),
        ("x.json", f"[{GOOD}", "x.json:2: not valid JSON (the array has no end)"),
        ("x.json", f"[{GOOD} {GOOD}]", "x.json:2: not valid JSON (expected , or ] behind item 1 of the array)"),
        ("x.json", f"[{GOOD}] {GOOD}", "x.json:2: not valid JSON (something behind the array)"),
        ("x.json", f"[{GOOD}, 3]", "x.json:2: expected a JSON object, found int"),
        ("x.json", "[]", "x.json: holds no records"),
        ("x.json", f"[{GOOD},]", "x.json:2: not valid JSON (Expecting value"),
        ("x.json", "[" * 10**5, "x.json:1: not valid JSON ("),
        ("x.json", b'[{"prompt": "\xff"}]', "x.json:1: not readable as UTF-8 text ("),
        ("x.jsonl", "prompt,response\na,b\n", "the file looks like CSV: its name should end in .csv or .tsv"),
        ("x.jsonl", "prompt\tresponse\r\na\tb\r\n", "the file looks like CSV: its name should end in .csv or .tsv"),
        ("x.json", '{\n  "prompt": "a"\n}\n', "looks like indented JSON: expected JSON Lines, a JSON array, CSV"),
        ("x.jsonl", b"PK\3\4\0\0", "looks like a zip archive: expected JSON Lines"),
        ("x.jsonl", GOOD.encode("utf-16"), "looks like UTF-16: expected JSON Lines"),
        ("x.jsonl", b"PAR1\x15\x04\xff\n", "x.jsonl:1: not readable as Parquet"),
        ("x.jsonl.gz", gzip.compress(b"PAR1\x15\x04\xff\n", mtime=0), "Parquet has its own compression"),
        ("x.gz", GOOD, "x.gz:1: not readable as UTF-8 text (Not a gzipped file"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_by_file_and_record(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert says in refusal(tmp_path / name)


@pytest.mark.parametrize("content", ["{oops\n", f"{GOOD}\na,b\n", "x", "some words\n", f"{GOOD}\n[1]\n", GOOD + "\n\\"])
def test_json_lines_with_an_error_are_not_taken_for_something_else(content, tmp_path):
    for name, written in (("x.jsonl", content.encode()), ("x.jsonl.gz", gzip.compress(content.encode()))):
        (tmp_path / name).write_bytes(written)
        assert "looks like" not in refusal(tmp_path / name)


@pytest.mark.parametrize("start", [b'{"prompt": "', b'[{"prompt": "', b'prompt,response\n"'])
def test_a_record_without_end_is_refused_before_it_fills_the_memory(start, tmp_path):
    name = "x.csv.gz" if start.startswith(b"p") else "x.json.gz"
    (tmp_path / name).write_bytes(gzip.compress(start + b"a" * (2**25 + 2**20), 1))
    assert refusal(tmp_path / name).startswith(f"{tmp_path}/{name}:")


def test_names_of_data_that_are_nearly_right(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(LINES)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*/train\.jsonl\?"):
        load_examples([str(tmp_path / "trian.jsonl")])
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").startswith(f"{tmp_path}/empty: a directory without data, expected files that")
