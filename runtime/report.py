"""What people read about a run in a terminal: tables, examples and warnings."""

import shutil
from collections.abc import Sequence
from typing import Any

from runtime.evaluate import DECODINGS, SHIPPED

Row = dict[str, Any]

# The columns of the two tables, and the format of their values.
COLUMNS = dict(iterate="d", greedy=".1%", sampled=".1%", greedy_error=".1%", sampled_error=".1%", nll=".4f", kl=".2f")
COLUMNS |= dict(entropy=".2f")
SIGNALS = dict(iterate="d", pairs="d", identical="d", truncated=".2%", real_length=".1f", generated_length=".1f")
SIGNALS |= dict(loss=".4f", margin=".3f", accuracy=".1%", real_logp=".3f", generated_logp=".3f", grad_norm=".2f")

FALL = 0.1  # nats a token that held-out real responses may lose in an iteration before a warning
REMEDY = (
    "Where accuracy stays near 50%, try a larger --lr or more --epochs; where nll rises, a lower --lr or a larger "
    "--beta; where most pairs are identical, there is little to learn. docs/guide.md has more."
)
CUT = 0.05  # rise of the share of cut responses, from one iteration to the next, before a warning


EXAMPLES = 3  # held-out prompts that are shown with their responses after every evaluation
WIDTH = 120  # characters of a line where the terminal's width is not known


def tables(rows: Sequence[Row]) -> str:
    """The tables of a finished run: held-out metrics, their changes, also at equal entropy, and training signals."""
    columns = telling(rows)
    found = f"\nHeld-out metrics \u00b1 one standard error\n{table(rows, columns)}\n"
    changed = [{"iterate": row["iterate"]} | _changes(row["since_start"]) for row in rows if "since_start" in row]
    if changed:
        found += f"\nChanges against the start \u00b1 one paired standard error\n{table(changed, signed(columns))}\n"
    equal = [{"iterate": row["iterate"]} | _at_equal_entropy(row) for row in rows if row.get("at_equal_entropy")]
    if equal:
        shown = {"iterate": "d", "temperature": ".2f"} | signed(columns)
        found += f"\nThe same against the start at the temperature that gives it equal entropy\n{table(equal, shown)}\n"
    signals = table(rows[1:], SIGNALS)
    return f"{found}\nTraining signals, means over the last tenth of an iteration's steps\n{signals}"


def columns_of(rows: Sequence[Row]) -> dict[str, str]:
    """The held-out metrics that the rows have, those of --metric last, and the formats of their values."""
    more = [key for row in rows for key in row if f"{key}_se" in row]
    shares = {f"{decoding}_{name}" for decoding in DECODINGS for name in SHIPPED}
    every = COLUMNS | {key: ".1%" if key in shares else ".3f" for key in more if key not in COLUMNS}
    return {key: fmt for key, fmt in every.items() if any(key in row for row in rows)}


def telling(rows: Sequence[Row]) -> dict[str, str]:
    """The columns of held-out metrics, without those that are 0 throughout, as is an exact match of long answers."""

    def tells(key: str) -> bool:
        return any(row.get(key) or row.get(f"{key}_se") for row in rows)

    return {key: fmt for key, fmt in columns_of(rows).items() if key == "iterate" or tells(key)}


def signed(columns: dict[str, str]) -> dict[str, str]:
    """The formats for changes: with + or -."""
    return {key: fmt if key == "iterate" else f"+{fmt}" for key, fmt in columns.items()}


def table(rows: Sequence[Row], columns: dict[str, str]) -> str:
    """Aligned text, one line a row. `columns` maps a row's key to the format of its value.

    A value "x" is written with its standard error if the row has an "x_se". A column that no row has is left out.
    """
    columns = {key: fmt for key, fmt in columns.items() if any(key in row for row in rows)}
    body = [[_cell(row, key, fmt) for key, fmt in columns.items()] for row in rows]
    lines = [[_label(key) for key in columns], *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def line(row: Row, columns: dict[str, str]) -> str:
    """One row as running text."""
    return ", ".join(f"{_label(key)} {_cell(row, key, fmt)}" for key, fmt in columns.items() if key in row)


def changes(row: Row) -> list[str]:
    """A line each on what changed against the start, the iterate before, and the start at equal entropy."""
    last = row["iterate"] - 1
    names = [("since_start", "the start"), ("since_last", f"iterate {last}")][: 2 if last > 0 else 1]
    rows = {name: _changes(row[key]) for key, name in names if key in row}
    if row.get("at_equal_entropy"):
        equal = _at_equal_entropy(row)
        rows[f"the start at temperature {equal.pop('temperature'):.2f}, of equal entropy"] = equal
    return [f"  against {name}: {line(row, signed(columns_of([row])))}" for name, row in rows.items()]


def change(row: Row, metric: str) -> str:
    """One metric's change against the start: "sampled +2.0% \u00b1 0.3% against the start"."""
    changed = _changes(row["since_start"])
    return f"{line(changed, {metric: signed(columns_of([changed]))[metric]})} against the start"


def _at_equal_entropy(row: Row) -> Row:
    found = dict(row["at_equal_entropy"])
    return {"temperature": found.pop("temperature")} | _changes(found)


def _changes(since: dict[str, Sequence[float]]) -> Row:
    return {key: value for name, two in since.items() for key, value in zip((name, f"{name}_se"), two)}


def examples(answers: dict[str, Sequence[Row]], width: int = 0) -> str:
    """Some held-out prompts with their references and the greedy responses of several iterates, one above the other.

    `answers` has what `evaluate.answers` returned, by the iterate's name. A text takes one line of `width` characters.
    """
    width = width or shutil.get_terminal_size((WIDTH, 24)).columns
    count = len(next(iter(answers.values())))
    lines = []
    for i in sorted({n * count // EXAMPLES for n in range(EXAMPLES)}):
        shown = {name: rows[i]["greedy"] for name, rows in answers.items()}
        row = next(iter(answers.values()))[i]
        texts = {"prompt": row["prompt"], "reference": " | ".join(row["references"])} | shown
        margin = max(map(len, texts)) + 4
        lines.append("\n".join(f"  {name:{margin - 2}}{_cut(text, width - margin)}" for name, text in texts.items()))
    return "\n\n".join(lines) + "\n"


def _cut(text: str, width: int) -> str:
    """A text in one line: line breaks and other white space become spaces, and what is too long is cut."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    return text if len(text) <= width else text[: max(width - 4, 1)] + " ..."


def _label(key: str) -> str:
    return key.replace("_", " ")


def _cell(row: Row, key: str, fmt: str) -> str:
    if row.get(key) is None:
        return "-"
    se = row.get(f"{key}_se")
    return format(row[key], fmt) + (f" \u00b1 {format(se, fmt.lstrip('+'))}" if se is not None else "")


def warnings_of(rows: Sequence[Row]) -> list[str]:
    """Signs of degeneration in the newest iterate's row, each with a remedy."""
    if len(rows) < 2:
        return []
    before, now = rows[-2:]
    name, texts = f"iterate {now['iterate']}", []
    if now["nll"] - before["nll"] > FALL:
        texts.append(
            f"{name}: held-out real responses lost {now['nll'] - before['nll']:.2f} nats a token, the player unlearns "
            f"the data; try a lower --lr, fewer --epochs or a larger --beta"
        )
    if now.get("truncated", 0) - before.get("truncated", now.get("truncated", 0)) > CUT:
        texts.append(
            f"{name}: the share of responses cut at the length limit rose from {before['truncated']:.0%} to "
            f"{now['truncated']:.0%}, the opponent no longer ends them; try --unfinished drop or cut, or a lower --lr"
        )
    if now["skipped"]:
        texts.append(
            f"{name}: steps skipped, since their loss or gradient was not finite: {now['skipped']}; try a lower --lr"
        )
    return texts
