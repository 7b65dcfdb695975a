"""report.html: one page for a run, or for several side by side, made from the files of their folders.

The page is one file that loads nothing. Prompts, responses and options may hold hostile text, so all of it goes
through Jinja's autoescape or `html.escape`, and the content security policy forbids every request.
"""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evaluate import Row, best_of, column, verdict
from report import console
from report.card import card
from report.figures import svg
from report.files import RunFiles
from report.panels import figures, plot
from report.tables import Table, held_out, number, signals, table_of, telling, title_of

METRICS = "held-out metrics and training signals"  # the title of metrics.svg
PROMPTS = 300  # the most prompts in the table of responses
TEXT = 2000  # the most characters of a text on the page
LEAST = -9.0  # log-probability of a token with the strongest shade
ENVIRONMENT = jinja2.Environment(  # It compiles the template once, though a run writes its page after every iterate.
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
KINDS = {"better": "got better", "worse": "got worse", "changed": "changed", "same": "unchanged"}
PICTURES = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)} | {127: "\u2421"}


class Page:
    """The observer that keeps metrics.svg and report.html up to date, and writes the cards of exported models.

    A page that cannot be written is a warning: it must end no run. `write_text(path, text)` must replace a file at
    once, since somebody may be reading it.
    """

    def __init__(self, out: Path, write_text: Callable[[Path, str], object]) -> None:
        self.out, self.write_text = out, write_text

    def iterate(self, rows: list[Row], answers: Mapping[int, list[Row]], note: str) -> None:
        try:
            self.write_text(self.out / "metrics.svg", plot(rows, f"{self.out}: {METRICS}"))
            self.write_text(self.out / "report.html", page([RunFiles(self.out)]))
        except Exception as error:
            text = f"warning: {self.out}: metrics.svg or report.html: not written ({type(error).__name__}: {error})"
            print(text, file=sys.stderr, flush=True)

    def exported(self, folder: Path, iterate: int, rows: list[Row], record: Row) -> None:
        self.write_text(folder / "README.md", card(iterate, rows, record))
        self.write_text(folder / "metrics.svg", plot(rows, METRICS.capitalize()))

    def finish(self, rows: list[Row], record: Row) -> None:
        """A process that died after the last iterate may have left the files as they were before it."""
        self.iterate(rows, {}, "")


def headline(run: RunFiles) -> list[str]:
    """Sentences: which metrics changed beyond the noise (`verdict`), which did not, and the best iterate."""
    if len(run.rows) < 2:
        return ["Only the start has been evaluated." if run.rows else "No iterate has been evaluated yet."]
    first, last = run.rows[0], run.rows[-1]
    done, total, metric = last["iterate"], run.args["iterations"], run.args["best"]
    sentences = [f"The run is not finished: {done} of {total} iterations."] if done != total else []
    judged = {name: verdict(last, name) for name in telling(run.rows) if column(name).better}
    beyond = [
        f"{title_of(name)} from {number(name, first[name])} to {number(name, last[name])} "
        f"({number(name, *last['since_start'][name])}, {'better' if sign > 0 else 'worse'})"
        for name, sign in judged.items()
        if sign
    ]
    within = [title_of(name) for name, sign in judged.items() if not sign]
    sentences += [f"Changed beyond the noise: {'; '.join(beyond)}."] if beyond else []
    sentences += [f"Not changed beyond the noise: {', '.join(within)}."] if within else []
    if equal := dict(last.get("at_equal_entropy", {})):
        start = f"the start at temperature {equal.pop('temperature'):.2f}, which has the same entropy"
        leads = ", ".join(f"{title_of(name)} {number(name, *lead)}" for name, lead in equal.items())
        sentences.append(f"Against {start}: {leads}.")
    best, name = best_of(run.rows, metric), title_of(metric)
    return [*sentences, f"The best iterate by {name} is {best}." if best else f"No iterate is better by {name}."]


# ---------------------------------------------------------------- responses


def visible(text: Any) -> str:
    """A text, or any other value as JSON, cut, with pictures in place of control characters, which break a page."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    if len(text) > TEXT:
        text = f"{text[:TEXT]} [... {len(text) - TEXT:,} more characters]"
    return text.translate(PICTURES)


def encoded(pieces: Sequence[tuple[str, float]], text: str) -> str:
    """Each token's length in characters and its -log p in quarters of a nat, as numbers with spaces between them.

    It is "" if the tokens do not make up the text on the page.
    """
    whole = "".join(piece for piece, _ in pieces)
    if whole.strip() != text or len(text) > TEXT:
        return ""
    blank = len(whole) - len(whole.lstrip())  # It is not on the page, nor is what follows the text.
    ends = itertools.accumulate((len(piece) for piece, _ in pieces), initial=0)
    lengths = [b - a for a, b in itertools.pairwise(min(max(end - blank, 0), len(text)) for end in ends)]
    return " ".join(f"{n} {round(-4 * max(logp, LEAST))}" for n, (_, logp) in zip(lengths, pieces))


def block(names: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    """A prompt with its reference and the responses. Equal responses one after the other share a line.

    A line is (who, text, tokens, log p, whether the text is a reference), as page.html shows it.
    """
    first, last = rows[0], rows[-1]
    real = "".join(piece for piece, _ in last["tokens"]["real"]).strip()
    before, after = (row["values"]["nll"][0] for row in (first, last))
    logp = f"{-before:.2f} \u2192 {-after:.2f}"
    lines = [("reference", visible(real), encoded(last["tokens"]["real"], real), logp, False)]
    if others := [text for text in first["references"] if text != real]:
        lines.append(("also right", visible(" | ".join(others)), "", "", False))
    for text, group in itertools.groupby(zip(names, rows), lambda pair: pair[1]["greedy"]):
        said = [*group]
        (one, _), (other, row) = said[0], said[-1]
        who = one if one == other else f"{one} \u2026 {other}"
        pieces = row["tokens"]["greedy"]
        logp = f"{sum(logp for _, logp in pieces):.2f}"
        lines.append((who, visible(text), encoded(pieces, text), logp, text in first["references"]))
    edits = [row["values"]["greedy_error"][0] for row in (first, last)]
    kind = "better" if edits[1] < edits[0] else "worse" if edits[1] > edits[0] else "changed"
    kind = "same" if first["greedy"] == last["greedy"] else kind
    return {"prompt": visible(first["prompt"]), "kind": kind, "change": before - after, "lines": lines}


def blocks_of(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """A block for every prompt: of a run's iterates, or of the last iterates of several runs.

    There are none if the runs were evaluated on different prompts.
    """
    said = {f"iterate {t}" if t else "start": rows for t, rows in enumerate(runs[0].heldout)}
    if len(runs) > 1:
        said = {run.name: run.heldout[-1] for run in runs if run.heldout}
    prompts = [[row["prompt"] for row in rows] for rows in said.values()]
    return [block([*said], rows) for rows in zip(*said.values())] if all(p == prompts[0] for p in prompts) else []


# ---------------------------------------------------------------- the page


def times_table(run: RunFiles) -> Table:
    """Seconds and peak memory of every phase by iterate."""
    rows = []
    for row in run.times:
        cells = {phase: f"{s:.1f} s, {row['memory'][phase] / 2**20:,.0f} MiB" for phase, s in row["seconds"].items()}
        rows.append({"iterate": row["iterate"]} | cells)
    return table_of("", rows, list(dict.fromkeys(name for row in rows for name in row)))


def settings_table(runs: Sequence[RunFiles]) -> Table:
    """Options, hashes and environment of all runs."""
    found = []
    for run in runs:
        values = {f"--{name.replace('_', '-')}": value for name, value in run.args.items()}
        values |= {f"sha256 of {name}": value for name, value in run.record["digests"].items()}
        values |= {name: run.record.get(name) for name in ("command", "torch", "ranks", "revision", "template")}
        values["machine"] = ", ".join(dict.fromkeys(row["machine"] for row in run.times))
        found.append({name: visible(value) for name, value in values.items()})
    names = dict.fromkeys(name for values in found for name in values)
    lines = [[name, *(values.get(name, "-") for values in found)] for name in names]
    return Table("", ["", *(run.name for run in runs)], lines)


def page(runs: Sequence[RunFiles]) -> str:
    """The page as HTML."""
    blocks, settings = blocks_of(runs), settings_table(runs)
    kinds = Counter(block["kind"] for block in blocks)
    values = {
        "runs": [(run.name, headline(run), console.warnings(run.rows)) for run in runs],
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "panels": {name: [Markup(svg(panel)) for panel in panels] for name, panels in figures(runs).items()},
        "metrics": [(run.name, held_out(run.rows)) for run in runs if run.rows],
        "signals": [(run.name, [signals(run.rows)]) for run in runs],
        "times": [(run.name, [times_table(run)]) for run in runs if run.times],
        "settings": settings,
        "differing": Table("", settings.heads, [line for line in settings.rows if len(set(line[1:])) > 1]),
        "commands": [(run.name, visible(f"{run.record['command']} {run.record['settings']}")) for run in runs],
        "kinds": {kind: (name, kinds[kind]) for kind, name in KINDS.items()},
        "count": len(blocks),
        "blocks": sorted(blocks, key=lambda block: block["kind"] == "same")[:PROMPTS],
    }
    text = ENVIRONMENT.get_template("page.html").render(values)
    return text.encode("utf-8", "replace").decode()  # A lone surrogate becomes a question mark.
