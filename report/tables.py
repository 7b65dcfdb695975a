"""The tables of a run's numbers: the terminal, the report page and model cards write the same ones."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evaluate import COLUMNS, Row, column


@dataclass
class Table:
    """Cells of text. `text` aligns them for a terminal or a card, and page.html writes them as HTML."""

    title: str
    heads: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        """The title, if there is one, and aligned columns."""
        lines = [self.heads, *self.rows]
        widths = [max(map(len, cells)) for cells in zip(*lines)]
        aligned = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
        return "\n".join([self.title, *aligned] if self.title else aligned)


def table_of(title: str, rows: Sequence[Row], names: Sequence[str]) -> Table:
    """A table with a line per row. A column that no row has is left out."""
    names = [name for name in names if any(name in row for row in rows)]
    heads = [name.replace("_", " ") for name in names]
    return Table(title, heads, [[cell(row, name) for name in names] for row in rows])


def cell(row: Row, name: str) -> str:
    """A row's value with its standard error, if there is one, or a change, which is a pair of both."""
    value = row.get(name)
    if value is None or isinstance(value, str):
        return value or "-"
    return number(name, *value) if isinstance(value, Sequence) else number(name, value, row.get(f"{name}_se"), sign="")


def number(name: str, value: float, error: float | None = None, sign: str = "+") -> str:
    """A value in the format of its column: "32.0%", or, with its standard error, "+2.0% \u00b1 0.3%"."""
    fmt = column(name).format
    return f"{value:{fmt}}" if error is None else f"{value:{sign}{fmt}} \u00b1 {error:{fmt}}"


def title_of(name: str) -> str:
    """A column's name on the page."""
    return column(name).label or name.replace("_", " ")


def line(row: Row, names: Sequence[str]) -> str:
    """One row as running text."""
    return ", ".join(f"{name.replace('_', ' ')} {cell(row, name)}" for name in names if name in row)


def ordered(names: Iterable[str]) -> list[str]:
    """Names in the order of the table of columns; those of --metric come last."""
    names = dict.fromkeys(names)
    return [name for name in COLUMNS if name in names] + [name for name in names if name not in COLUMNS]


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Names of the held-out metrics in any of the rows."""
    return ordered(name for row in rows for name in row if f"{name}_se" in row)


def telling(rows: Sequence[Row]) -> list[str]:
    """The held-out metrics without those that are 0 throughout, as an exact match of long answers is."""
    return [name for name in metrics_of(rows) if any(row.get(name) or row.get(f"{name}_se") for row in rows)]


def held_out(rows: Sequence[Row]) -> list[Table]:
    """Held-out metrics by iterate, and their changes against the start and against the start at equal entropy."""
    names = telling(rows)
    tables = [table_of("Held-out metrics \u00b1 one standard error", rows, ["iterate", *names])]
    for key, title in (
        ("since_start", "Changes against the start \u00b1 one paired standard error"),
        ("at_equal_entropy", "The same against the start at the temperature that gives it equal entropy"),
    ):
        changed = [{"iterate": row["iterate"]} | row[key] for row in rows if row.get(key)]
        tables += [table_of(title, changed, ["iterate", "temperature", *names])] if changed else []
    return tables


def signals(rows: Sequence[Row]) -> Table:
    """Training signals by iterate."""
    names = ["iterate", *(name for name, column in COLUMNS.items() if column.kind == "signal")]
    return table_of("Training signals, means over the last tenth of an iteration's steps", rows[1:], names)


def text_of(rows: Sequence[Row]) -> str:
    """All tables of a run's rows, as a terminal and a model card show them."""
    tables = [*held_out(rows), signals(rows)] if len(rows) > 1 else held_out(rows)
    return "\n\n".join(table.text() for table in tables)
