"""From files to records: JSON Lines, a JSON array, CSV, Parquet, data sets of the hub; plain, gzip or zstd.

A record is a dictionary of the fields that stand in the file; layouts.py says what they mean. Records are read one
after the other, so a large file needs little memory. Every error is a ValueError that names the file and the record.
"""

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from runtime.options import check_file, near_files, shown

LONGEST_LINE = 2**24  # bytes of a line or a record; a compressed file may hold a line without end
SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")  # what is read of a directory
COMPRESSED = (".gz", ".zst")
GZIP, ZSTD, PARQUET, BOM = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"\xef\xbb\xbf"
KINDS = "JSON Lines, a JSON array, CSV or Parquet"
OTHER_KINDS = {  # beginnings of files that are not read
    b"PK\3\4": "a zip archive", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"{\n": "indented JSON",
}  # fmt: skip
HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]+))?(:(?P<split>.+))?")

Record = tuple[int, Any]  # (number of its line, or of the record where a file has no lines; its content)


def files_of(name: str) -> list[str]:
    """The files that a name of data stands for: itself, a hub id too, or those in a directory, in order.

    Raises: FileNotFoundError naming what lies nearby; ValueError where a directory holds no data.
    """
    path = Path(name)
    if os.path.isdir(name):
        inside = sorted(str(file) for file in path.iterdir() if kind_of(file) in SUFFIXES and file.is_file())
        if not inside:
            raise ValueError(f"{name}: a directory without data, expected files that end in {', '.join(SUFFIXES)}")
        return inside
    if not os.path.lexists(name) and not is_hub_id(name):  # False too for names that no file can have
        raise FileNotFoundError(f"{name}: no such file, directory or hub id (owner/name){near_files(path)}")
    return [name]


def kind_of(path: Path) -> str:
    """The suffix of a file without that of its compression: ".csv" of x.csv.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_hub_id(name: str) -> bool:
    """Whether a name that is no file here may be a data set of the hub: owner/name, not folder/file.jsonl."""
    found = HUB_ID.fullmatch(name)
    like_a_file = any(kind_of(Path(part)) in SUFFIXES for part in name.split("/"))
    return bool(found) and not like_a_file and not os.path.exists(os.path.dirname(name))


def read(name: str) -> Iterator[Record]:
    """Yields (number, content) of every record of one file or data set. Raises: ValueError; OSError."""
    if not os.path.lexists(name) and is_hub_id(name):
        yield from _hub(name)
        return
    path = Path(name)
    check_file(path)
    with open(path, "rb") as raw:
        if raw.read(4) == PARQUET:
            yield from _parquet(path)
            return
        raw.seek(0)
        number = 0
        try:
            file = _decompressed(path, raw)
            head = file.peek(4096)[:4096].removeprefix(BOM)
            if head.startswith(PARQUET):
                raise ValueError("Parquet has its own compression; decompress the file first")
            if kind_of(path) in (".csv", ".tsv") and head.lstrip()[:1] not in (b"{", b"["):
                records = _csv(file, path)
            elif head.lstrip()[:1] == b"[":
                records = _array(file, path)
            else:
                records = _lines(file, path)
            for number, content in records:
                yield number, content
        except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{number + 1}: not readable as UTF-8 text ({error}){_looks_like(path)}") from None


def _decompressed(path: Path, raw: BinaryIO) -> io.BufferedReader:
    """The content of a file that its first bytes show to be compressed, or that is not."""
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(GZIP) or path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if magic != ZSTD:
        return raw
    try:
        from compression import zstd  # of Python 3.14

        return io.BufferedReader(zstd.ZstdFile(raw))
    except ImportError:
        pass
    try:
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    except ImportError:
        pass
    try:
        import pyarrow

        return io.BufferedReader(_Zstd(pyarrow.CompressedInputStream(raw, "zstd")))
    except ImportError:
        raise ValueError(f"{path}: compressed by zstd, which needs a library: pip install zstandard") from None


class _Zstd(io.RawIOBase):
    """pyarrow's stream, which raises OSError where content is damaged, as a file of Python."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self.stream.read(len(buffer))
        except OSError as error:
            raise EOFError(shown(error)) from None
        buffer[: len(content)] = content
        return len(content)


# ---------------------------------------------------------------- kinds of files


def _lines(file: BinaryIO, path: Path) -> Iterator[Record]:
    """JSON Lines; blank lines are skipped."""
    for number, line in enumerate(_raw_lines(file, path), 1):
        if not (line := line.strip()):
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not readable as UTF-8 text ({error}){_looks_like(path)}") from None
        try:
            yield number, json.loads(text)
        except (ValueError, RecursionError) as error:  # RecursionError: nesting too deep to read
            raise ValueError(f"{path}:{number}: not valid JSON ({error}){_looks_like(path)}") from None


def _raw_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Lines of bounded length, the first without a byte order mark."""
    for number in range(1, 2**63):
        line = file.readline(LONGEST_LINE)
        if len(line) == LONGEST_LINE:
            raise ValueError(f"{path}:{number}: not readable as UTF-8 text (a line of {LONGEST_LINE} bytes or more)")
        if not line:
            return
        yield line.removeprefix(BOM) if number == 1 else line


def _array(file: BinaryIO, path: Path) -> Iterator[Record]:
    """The items of a JSON array, of which only a part is in memory at a time."""
    decoder, parser = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    text, at, number, step = "", 0, 0, 2**20
    expected, more = "[", True
    while True:
        at = re.compile(r"\s*").match(text, at).end()
        where = f"{path}:{number + 1}"
        if at < len(text):
            character = text[at]
            if expected == "the end":
                raise ValueError(f"{where}: not valid JSON (something behind the array)")
            if character == "]" and expected in ("an item or ]", ", or ]"):
                expected, at = "the end", at + 1
                continue
            if expected == "[" or (expected == ", or ]" and character == ","):
                expected, at = ("an item or ]" if expected == "[" else "an item"), at + 1
                continue
            if expected == ", or ]":
                raise ValueError(f"{where}: not valid JSON (expected {expected} behind item {number} of the array)")
            try:
                item, at = parser.raw_decode(text, at)
                number, expected, step = number + 1, ", or ]", 2**20
                yield number, item
                continue
            except (ValueError, RecursionError) as error:  # damaged, or not read to its end
                if not more or len(text) - at > LONGEST_LINE:
                    says = getattr(error, "msg", error)
                    raise ValueError(f"{where}: not valid JSON ({says}, in item {number + 1} of the array)") from None
        elif not more:
            if expected == "the end":
                return
            raise ValueError(f"{where}: not valid JSON (the array has no end)")
        content = file.read(step)
        text, at, more = text[at:] + decoder.decode(content, final=not content), 0, bool(content)
        step = min(2 * step, LONGEST_LINE)  # an item is parsed again until it is whole: few times


def _csv(file: BinaryIO, path: Path) -> Iterator[Record]:
    """Rows under a header line, separated by commas, semicolons or tabs."""
    count = 0  # lines read

    def texts() -> Iterator[str]:
        nonlocal count
        for count, line in enumerate(_raw_lines(file, path), 1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{count}: not readable as UTF-8 text ({error})") from None

    lines = texts()
    header = next(lines, "")
    separator = "\t" if kind_of(path) == ".tsv" else max(",;\t", key=header.count)
    csv.field_size_limit(LONGEST_LINE)

    def both() -> Iterator[str]:
        yield header
        yield from lines

    rows = csv.reader(both(), delimiter=separator, strict=True)
    first = 1
    try:
        names = [name.strip() for name in next(rows, [])]
        if len(set(names)) < len(names):
            raise ValueError(f"{path}:1: two columns have one name: {shown(', '.join(names))}")
        while True:
            first = count + 1
            row = next(rows, None)
            if row is None:
                return
            if len(row) not in (0, len(names)):
                raise ValueError(f"{path}:{first}: {len(row)} values, the header has {len(names)} columns")
            if row:
                yield first, dict(zip(names, row))
    except csv.Error as error:
        raise ValueError(f"{path}:{first}: not valid CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet needs a library: pip install pyarrow") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}:{number + 1}: not readable as Parquet ({shown(error)})") from None


def _hub(name: str) -> Iterator[Record]:
    """The rows of a data set of the hub: owner/name[@revision][:config][:split], by default the split "train"."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name}: no such file; a data set of the hub needs a library: pip install datasets") from None
    found = HUB_ID.fullmatch(name)
    config, split = found["config"], found["split"]
    if split is None:  # one name: of the split
        config, split = None, config or "train"
    try:
        rows = datasets.load_dataset(found["name"], config, split=split, revision=found["revision"])
    except Exception as error:  # the hub, the network and the data set raise many kinds
        raise ValueError(f"{name}: no such file, and the hub says: {error}; :CONFIG:SPLIT chooses a part") from None
    yield from enumerate(rows, 1)


def _looks_like(path: Path) -> str:
    """What a file seems to hold in place of JSON Lines, for the end of a message; "" where there is no guess."""
    with open(path, "rb") as file:
        head = b"{" if kind_of(path) != path.suffix.lower() else file.read(4096).lstrip().replace(b"\r", b"")
    if re.match(rb"[\w ]+[,\t][\w ,\t]+\n", head):
        return "; the file looks like CSV: its name should end in .csv or .tsv"
    kind = next((kind for start, kind in OTHER_KINDS.items() if head.startswith(start)), "")
    return kind and f"; the file looks like {kind}: expected {KINDS}"
