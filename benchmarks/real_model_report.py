"""Tables and figure of benchmarks/results/smollm2-<size>.json, in the documents and beside it. No dependencies."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence_report import COLOURS, Plot, table, with_blocks

Row = dict[str, Any]

DOCUMENTS = ("docs/evidence.md", "README.md")
ARMS = {
    "A": "more supervised training", "B": "SPIN, temperature 1", "C": "SPIN, greedy opponent",
    "D": "supervised, fresh definitions", "R": "other words' definitions", "F": "DFT",
}  # fmt: skip
COLUMNS = {  # measure -> (title, scale, digits)
    "nll": ("NLL", 1, 3), "best_nll": ("NLL at the best T", 1, 3), "summed": ("choice, points", 100, 1),
    "per_token": ("choice per token", 100, 1), "content": ("content F1", 100, 1),
    "content at equal entropy": ("F1 at equal entropy", 100, 1), "length": ("greedy tokens", 1, 1),
    "repeats": ("repeat themselves", 100, 0), "unfinished": ("do not end", 100, 0), "fluency": ("fluency", 1, 2),
}  # fmt: skip
IN_DOCUMENTS = ("nll", "best_nll", "summed", "per_token", "content at equal entropy", "length")
READ = ("A", "B", "C", "R")  # arms whose definitions stand beside the start's
LONGEST = 44  # letters of a definition in a document
SURE = 3.0  # Every seed must lead by so many standard errors.
ENOUGH = 5.0  # Standard errors by which fresh definitions must beat more training, or the test set is too small


def write_all(found: Row, root: Path, size: str) -> None:
    """Writes the tables into the documents, the figure, and the table of every column."""
    for name in DOCUMENTS:
        (root / name).write_text(filled((root / name).read_text(), found, size))
    if found["summary"]:
        (root / f"benchmarks/results/smollm2-{size}.svg").write_text(figure(found))
        (root / "runs").mkdir(exist_ok=True)
        (root / f"runs/smollm2-{size}-tables.md").write_text(changes(found, tuple(COLUMNS)))


def filled(text: str, found: Row, size: str) -> str:
    """A document with its blocks `<!-- smollm2 SIZE: NAME -->` ... `<!-- end -->` made from the results."""
    blocks = {"about": about, "table": changes, "verdict": verdict, "answers": answers}
    return with_blocks(text, f"smollm2 {size}", lambda name: blocks[name](found))


def about(found: Row) -> str:
    size, lengths = found["size"], {name: f"{share:.0%}" for name, share in found["lengths"].items()}
    whole = [row["seconds"] for row in found["trials"].values() if row["iterate"] == size["iterations"]]
    return (
        f"{len(found['summary'])} iterates, {sum(whole) / 60:.0f} minutes of training, {len(found['left'])} trials not "
        f"run; {size['train']:,} definitions to train on, {size['test']:,} for the NLL, {size['choice']:,} choices "
        f"(the true one is the longest in {lengths['longest']}, the shortest in {lengths['shortest']}, with ties), "
        f"{size['written']} to write; {found['machine']}, commit {found['commit']}.\n"
    )


def of_seeds(leads: Sequence[Sequence[float] | None], scale: float, digits: int) -> str:
    """The lead of every seed, with the largest of their standard errors."""
    known = [lead for lead in leads if lead]
    if not known:
        return ""
    values = ", ".join(f"{scale * value:+.{digits}f}" for value, _ in known)
    return f"{values} ± {scale * max(error for _, error in known):.{digits}f}"


def changes(found: Row, measures: Sequence[str] = IN_DOCUMENTS) -> str:
    """Every trial, minus the start; trials that differ in the seed share a line."""
    rows = [["minus the start", *(COLUMNS[measure][0] for measure in measures)]]
    trials: dict[tuple, list[Row]] = {}
    for row in sorted(found["summary"], key=lambda row: (row["arm"], row["rate"], row["iterate"], row["seed"])):
        trials.setdefault((row["arm"], row["rate"], row["iterate"]), []).append(row)
    for (arm, rate, iterate), some in trials.items():
        name = f"{arm}, {rate.replace('--', '')}"
        name += f", iterate {iterate}" if found["size"]["iterations"] > 1 else ""
        rows.append([name, *(of_seeds([row[m] for row in some], *COLUMNS[m][1:]) for m in measures)])
    return table(rows)


def verdict(found: Row) -> str:
    """Leads of the rates and iterates that the tuning words chose, positive if better, and what the rules say."""
    questions = list(dict.fromkeys(row["measure"] for row in found["contrasts"]))
    rows = [["", *(COLUMNS[measure][0] for measure in questions)]]
    for arm, control in (("D", "A"), ("B", "A"), ("B", "R"), ("C", "A"), ("C", "R")):
        of_arm = {row["measure"]: row["over"][control] for row in found["contrasts"] if row["arm"] == arm}
        rows.append([f"{arm} over {control}", *(of_seeds(of_arm.get(m, []), *COLUMNS[m][1:]) for m in questions)])
    rulings = {row["arm"] + row["measure"]: ruling(row, found["size"]["seeds"]) for row in found["contrasts"]}
    lines = [
        f"{COLUMNS[key[1:]][0]}, {key[0]}: {text}." for key, text in rulings.items() if text and key[0] in "BC"
    ] or ["SPIN is supported in no question."]
    return table(rows) + f"\nBy the rules {rulings.get('Dnll') or 'D is missing'}. {' '.join(lines)}\n"


def ruling(row: Row, seeds: int) -> str:
    def better(control: str, by: float = SURE) -> bool:
        return bool(row["over"][control]) and all(lead > by * error for lead, error in row["over"][control])

    if row["arm"] == "D" and row["measure"] == "nll":
        return "the test set is large enough" if better("A", ENOUGH) else "the test set is too small"
    if row["arm"] not in "BC" or not better("start"):
        return ""
    if not better("A"):
        return "better than the start"
    done = min(len(row["over"]["start"]), len(row["over"]["A"]))
    proved = "supported" if done == seeds > 1 else f"supported by {done} of {max(seeds, 2)} seeds"
    if not row["over"]["R"]:
        return f"SPIN is {proved}; R was not run"
    return f"SPIN is {proved}" + (", and so is the opponent" if better("R") else ", its opponent is not")


def answers(found: Row) -> str:
    """The beginnings of twelve greedy definitions of the start and of the first trial of each arm of READ."""
    trials = {row["arm"]: row for row in reversed(found["trials"].values())}
    models = {"start": found["models"]["start"]} | {arm: trials[arm] for arm in READ if arm in trials}
    lines = zip(*(model["texts"][:12] for model in models.values()))
    return table([list(models), *([shortened(text.replace("|", "/")) for text in line] for line in lines)])


def shortened(text: str) -> str:
    return textwrap.shorten(text, LONGEST, placeholder=" ...")


def figure(found: Row) -> str:
    """Every trial: the change of the NLL at the best temperature, to the right, and of the choice, upwards."""
    points = {row["key"]: (row["best_nll"], [100 * value for value in row["summed"]]) for row in found["summary"]}
    ends = [[0.0, *(v - e for v, e in some), *(v + e for v, e in some)] for some in zip(*points.values())]
    ticks = [(min(some), max(*some, 1e-9)) for some in ends]
    plot = Plot(*ticks)
    plot.marks = f'<path class="axis" fill="none" d="M{plot.x(0):.1f} 50V430M60 {plot.y(0):.1f}H440"/>'
    for colour, arm in zip(COLOURS, sorted({row["arm"] for row in found["summary"]}), strict=False):
        rows = [row for row in found["summary"] if row["arm"] == arm]
        rows.sort(key=lambda row: float(row["rate"].split()[1]))
        lines: dict[tuple, list[str]] = {}
        for row in rows:
            (nll, nll_error), (won, error) = points[row["key"]]
            line = row["seed"], row["iterate"], row["rate"].partition("--beta")[2]
            lines.setdefault(line, []).append(f"{plot.x(nll):.1f} {plot.y(won):.1f}")
            bars = f"M{plot.x(nll - nll_error):.1f} {plot.y(won):.1f}H{plot.x(nll + nll_error):.1f}"
            bars += f"M{plot.x(nll):.1f} {plot.y(won - error):.1f}V{plot.y(won + error):.1f}"
            plot.marks += f'<path d="{bars}" stroke="{colour}" stroke-opacity="0.5"/>'
            plot.mark(nll, won, colour, row["key"])
        for line in lines.values():
            plot.marks += f'<path fill="none" stroke="{colour}" d="M{"L".join(line)}"/>'
        plot.explain(colour, f"{arm}: {ARMS[arm]}")
    title = "SmolLM2-135M after further training, against its start"
    across = "NLL at the best temperature, nats per token: worse"
    return plot.svg(title, across, "choice of the true definition, points: better", ticks, "+.2g")
