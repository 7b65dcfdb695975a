"""What both reports of evidence share: blocks of the documents, and tables."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from measuring import ROOT

DOCUMENTS = ("docs/evidence.md", "README.md")
Columns = dict[str, str | Callable[[Any], str]]  # by title: a function of a row, or a format string of its fields


def write_blocks(kind: str, block: Callable[[str], str]) -> None:
    for name in DOCUMENTS:
        (ROOT / name).write_text(with_blocks((ROOT / name).read_text(), kind, block))


def with_blocks(text: str, kind: str, block: Callable[[str], str]) -> str:
    """A document with block(NAME) between each of its markers `<!-- KIND: NAME -->` and `<!-- end -->`."""
    pattern = re.compile(rf"(<!-- {kind}: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + block(match[2]) + match[3], text)


def table(rows: Iterable[Any], columns: Columns) -> str:
    lines = [[*columns], ["---"] * len(columns)]
    lines += [[text(row) if callable(text) else text.format(**row) for text in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
