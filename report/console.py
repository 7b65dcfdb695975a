"""What a run prints for people: metrics, changes, examples, warnings and, at its end, tables."""

import itertools
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluate import Row
from report.tables import line, metrics_of, number, ordered, text_of

FALL = 0.1  # Warn if held-out real responses lose more nats per token than this in one iteration.
CUT = 0.05  # Warn if the share of responses that are cut at the length limit rises by more than this in one iteration.
EXAMPLES = 3  # held-out prompts that are shown with their responses after every evaluation
WIDTH = 120  # characters of a line if the terminal's width is not known
REMEDY = (
    "If nll rises, try a lower --lr or, for pairs, a larger --beta; if little changes, try a larger --lr or more "
    "--epochs; if most pairs are identical, there is little to learn. docs/guide.md has more."
)


class Console:
    """The observer that prints. `script` is the program's name, `out` the folder of the run."""

    def __init__(self, script: str, out: Path) -> None:
        self.script, self.out = script, out

    def iterate(self, rows: list[Row], answers: Mapping[int, list[Row]], note: str) -> None:
        row = rows[-1]
        print("\n".join([line(row, ["iterate", *metrics_of(rows)]) + note, *changes(row)]), flush=True)
        if row["iterate"] in answers:
            names = {f"iterate {t}" if t else "start": answers[t] for t in sorted(answers)}
            print(examples(names), flush=True)
        for text in warnings(rows[-2:]):
            print(f"{self.script}: warning: {text}", file=sys.stderr, flush=True)

    def finish(self, rows: list[Row], record: Row) -> None:
        best, metric = record["best"]["iterate"], record["best"]["metric"]
        name = metric.replace("_", " ")
        print(f"\n{text_of(rows)}\n")
        if best:
            folder = self.out / ("final" if best == rows[-1]["iterate"] else "best")
            change = number(metric, *rows[best]["since_start"][metric])
            print(f"Best by {name}: iterate {best} ({folder}), {name} {change} against the start.")
        else:
            print(f"No iterate is better than the start by {name} (more than two standard errors). {REMEDY}")
        print(f"The plot is {self.out}/metrics.svg, the last iterate {self.out}/final.")


def changes(row: Row) -> list[str]:
    """One line each on the changes against the start, the iterate before, and the start at equal entropy."""
    last = row["iterate"] - 1
    found = {"the start": row.get("since_start", {})}
    if last > 0:
        found[f"iterate {last}"] = row.get("since_last", {})
    if equal := dict(row.get("at_equal_entropy", {})):
        found[f"the start at temperature {equal.pop('temperature'):.2f}, of equal entropy"] = equal
    return [f"  against {name}: {line(some, ordered(some))}" for name, some in found.items() if some]


def examples(answers: Mapping[str, Sequence[Row]]) -> str:
    """Some held-out prompts with their references and the greedy responses of several iterates below each other.

    Texts are cut to the terminal's width. `answers` are rows of `evaluate.answers` by the iterate's name.
    """
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    first = next(iter(answers.values()))
    blocks = []
    for i in sorted({n * len(first) // EXAMPLES for n in range(EXAMPLES)}):
        texts = {"prompt": first[i]["prompt"], "reference": " | ".join(first[i]["references"])}
        texts |= {name: rows[i]["greedy"] for name, rows in answers.items()}
        margin = max(map(len, texts)) + 4
        blocks.append("\n".join(f"  {name:{margin - 2}}{_cut(text, width - margin)}" for name, text in texts.items()))
    return "\n\n".join(blocks) + "\n"


def _cut(text: str, width: int) -> str:
    """The text in one line of printable characters, with a space for each run of white space."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    return text if len(text) <= width else text[: max(width - 4, 1)] + " ..."


def warnings(rows: Sequence[Row]) -> list[str]:
    """Signs of degeneration from each row to the next, with a remedy."""
    texts = []
    for before, now in itertools.pairwise(rows):
        name, lost = f"iterate {now['iterate']}", now["nll"] - before["nll"]
        cut = [row.get("truncated") for row in (before, now)]  # None at the start
        if lost > FALL:
            texts.append(
                f"{name}: held-out real responses lost {lost:.2f} nats per token: the player unlearns the data; try a "
                "lower --lr, fewer --epochs or a larger --beta"
            )
        if None not in cut and cut[1] - cut[0] > CUT:
            texts.append(
                f"{name}: the share of responses cut at the length limit rose from {cut[0]:.0%} to {cut[1]:.0%}: the "
                "opponent no longer ends them; try --unfinished drop or cut, or a lower --lr"
            )
        if skipped := now["skipped"]:
            texts.append(
                f"{name}: steps skipped, since their loss or gradient was not finite: {skipped}; try a lower --lr"
            )
    return texts
