"""Reads records from JSON Lines, a JSON array, CSV or TSV (each plain or gzipped), Parquet and data sets of the hub.

A record is a dictionary of the fields that the data has; layouts.py says what they mean. A JSON object may wrap the
array, as {"data": [...]} does.
"""

import contextlib
import csv
import gzip
import itertools
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data.files import lfs_hint, parse_json, shown

SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")  # The files that are read from a directory.
GZIP, PARQUET, BOM = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"  # The first bytes of files.
HUB_ID = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]+)(?=:))?(:(?P<split>.+))?"
)
HINT = "; expected a JSON object per line or a JSON array, or a name that ends in .csv, .tsv or .parquet"

WRAPPERS = ("data", "train", "examples", "records", "rows")  # Names of the list in a JSON object that wraps it.

Record = tuple[int, Any]  # (number, content); the number is that of a line, or counts records if there are no lines.


def files_of(name: str) -> list[str]:
    """Returns the files that --data names: a directory stands for the data files in it, sorted by name."""
    path = Path(name)
    if path.is_dir():
        inside = sorted(str(file) for file in path.iterdir() if kind_of(file) in SUFFIXES and file.is_file())
        if not inside:
            raise ValueError(f"{name}: a directory without data, expected files that end in {', '.join(SUFFIXES)}")
        return inside
    if not path.is_file() and not is_hub_id(name):
        found = "not a regular file" if path.exists() else "no such file, directory or hub id (owner/name)"
        raise FileNotFoundError(f"{shown(name)}: {found}")
    return [name]


def kind_of(path: Path) -> str:
    """Returns a file's suffix without that of its compression: ".csv" for x.csv.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def is_hub_id(name: str) -> bool:
    """Tells whether a name may be a data set of the hub, such as owner/name, rather than folder/file.jsonl."""
    like_a_file = any(kind_of(Path(part)) in SUFFIXES for part in name.split("/"))
    return bool(HUB_ID.fullmatch(name)) and not like_a_file and not os.path.exists(os.path.dirname(name))


def read(name: str) -> Iterator[Record]:
    """Yields the records of one file or data set."""
    if not os.path.exists(name):
        yield from _hub(name)
        return
    path = Path(name)
    if hint := lfs_hint(path):
        raise ValueError(f"{path}: no data{hint}")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == PARQUET:
        yield from _parquet(path)
        return
    try:
        with (gzip.open if magic.startswith(GZIP) or path.suffix == ".gz" else open)(path, "rb") as file:
            first = file.peek(4096)[:4096].removeprefix(BOM).lstrip()[:1]
            lines = _texts(file, path)
            if first == b"[":
                yield from enumerate(parse_json("".join(lines), path, HINT), 1)
            elif first != b"{" and kind_of(path) in (".csv", ".tsv"):
                yield from _csv(lines, path)
            else:
                yield from _objects(lines, path)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: not readable as gzip ({error})") from None


def _texts(file: BinaryIO, path: Path) -> Iterator[str]:
    """Yields the lines of a file. They are decoded one by one, so that an error names its line."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not readable as UTF-8 text ({error})") from None


def _objects(lines: Iterable[str], path: Path) -> Iterator[Record]:
    """Reads a JSON object per line, or the only one of a .json file, which may wrap a list of records."""
    if kind_of(path) == ".json":
        lines = list(lines)
        with contextlib.suppress(ValueError):
            value = parse_json("".join(lines), path)
            names = [name for name in WRAPPERS if isinstance(value, dict) and isinstance(value.get(name), list)]
            yield from enumerate(value[names[0]] if names else [value], 1)
            return
    for number, line in enumerate(lines, 1):
        if line := line.strip():
            yield number, parse_json(line, f"{path}:{number}", HINT)


def _csv(lines: Iterator[str], path: Path) -> Iterator[Record]:
    """Reads rows below a header, which shows the separator. The number of a row is that of its last line."""
    header = next(lines, "")
    separator = "\t" if kind_of(path) == ".tsv" else max(",;\t", key=header.count)
    csv.field_size_limit(2**24)  # The default of 2**17 characters is too small for long documents.
    rows = csv.DictReader(itertools.chain([header], lines), delimiter=separator, strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(f"{path}:{rows.line_num}: expected {len(rows.fieldnames)} values, as in the header")
            yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.reader.line_num}: not valid CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet requires a library: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=256)
            yield from enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet ({shown(error)})") from None


def _hub(name: str) -> Iterator[Record]:
    """Reads a data set of the hub, named owner/name[@revision][:config][:split]; the default split is "train"."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name}: no such file; hub data sets require a library: pip install datasets") from None
    found = HUB_ID.fullmatch(name)
    split = found["split"] or "train"
    try:
        rows = datasets.load_dataset(found["name"], found["config"], split=split, revision=found["revision"])
    except Exception as error:  # The hub, the network and the data set raise many kinds of errors.
        raise ValueError(f"{name}: no such file, and the hub says: {error}; :CONFIG:SPLIT chooses a part") from None
    yield from enumerate(rows, 1)
