"""report.html: one page for a run, or for several side by side, made from the files of their folders.

The page is one file that loads nothing. Prompts, responses and options may hold hostile text, so all of it goes
through Jinja's autoescape or `html.escape`, and the content security policy forbids every request.
"""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evaluate import Row, best_of, column, verdict
from report import console
from report.figures import svg
from report.files import RunFiles, load
from report.panels import figures, plot
from report.tables import Table, difference, held_out, plain, signals, table_of, telling, title_of

PROMPTS = 300  # the most prompts in the table of responses
TEXT = 2000  # the most characters of a text on the page
LEAST = -9.0  # log-probability of a token with the strongest shade
KINDS = {"better": "got better", "worse": "got worse", "changed": "changed", "same": "unchanged"}
PICTURES = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)} | {127: "\u2421"}


class Page:
    """The observer that keeps metrics.svg and report.html up to date. A failure is a warning: it must end no run.

    `write_text(path, text)` must replace a file at once, since somebody may be reading it.
    """

    def __init__(self, out: Path, write_text: Callable[[Path, str], object]) -> None:
        self.out, self.write_text = out, write_text

    def iterate(self, rows: list[Row], answers: Mapping[int, list[Row]], note: str) -> None:
        for name, make in {
            "metrics.svg": lambda: plot(rows, f"{self.out}: held-out metrics and training signals"),
            "report.html": lambda: page([self.out]),
        }.items():
            try:
                self.write_text(self.out / name, make())
            except Exception as error:
                text = f"warning: {self.out / name}: not written ({type(error).__name__}: {error})"
                print(text, file=sys.stderr, flush=True)

    def finish(self, rows: list[Row], record: Row) -> None:
        """A process that died after the last iterate may have left the files as they were before it."""
        self.iterate(rows, {}, "")


def headline(run: RunFiles) -> list[str]:
    """Sentences: which metrics changed beyond the noise (`verdict`), which did not, and the best iterate."""
    if not run.rows:
        return ["No iterate has been evaluated yet."]
    first, last, names = run.rows[0], run.rows[-1], telling(run.rows)
    if len(run.rows) == 1:
        return [f"Only the start has been evaluated: {', '.join(f'{title_of(n)} {plain(first, n)}' for n in names)}."]
    done, total, metric = last["iterate"], run.args["iterations"], run.args["best"]
    sentences = [f"The run is not finished: {done} of {total} iterations."] if done != total else []
    beyond, within = [], []
    for name in [name for name in names if column(name).better]:
        judged = {1: "better", -1: "worse"}.get(verdict(last, name))
        if judged:
            change = f"{difference(name, last['since_start'][name])}, {judged}"
            beyond.append(f"{title_of(name)} from {plain(first, name)} to {plain(last, name)} ({change})")
        else:
            within.append(title_of(name))
    sentences += [f"Changed beyond the noise: {'; '.join(beyond)}."] if beyond else []
    sentences += [f"Not changed beyond the noise: {', '.join(within)}."] if within else []
    equal = last.get("at_equal_entropy")
    if equal:
        leads = ", ".join(f"{title_of(n)} {difference(n, lead)}" for n, lead in equal.items() if n != "temperature")
        start = f"the start at temperature {equal['temperature']:.2f}, which has the same entropy"
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
    at, numbers = len(whole.lstrip()) - len(whole), []
    for piece, logp in pieces:
        begin, end = (min(max(place, 0), len(text)) for place in (at, at + len(piece)))
        numbers += [end - begin, round(-4 * max(logp, LEAST))]
        at += len(piece)
    return " ".join(map(str, numbers))


def answer(who: str, text: str, tokens: str = "", logp: str = "", right: bool = False) -> dict[str, Any]:
    """A line of the table of responses, as page.html shows it."""
    return {"who": who, "text": visible(text), "tokens": tokens, "logp": logp, "right": right}


def block(names: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    """A prompt with its reference and the responses. Equal responses one after the other share a line."""
    first, last = rows[0], rows[-1]
    pieces = last["tokens"]["real"]
    real = "".join(piece for piece, _ in pieces).strip()
    before, after = (row["values"]["nll"][0] for row in (first, last))
    answers = [answer("reference", real, encoded(pieces, real), f"{-before:.2f} \u2192 {-after:.2f}")]
    others = [text for text in first["references"] if text != real]
    answers += [answer("also right", " | ".join(others))] if others else []
    for text, group in itertools.groupby(zip(names, rows), lambda said: said[1]["greedy"]):
        group = list(group)
        pieces = group[-1][1]["tokens"]["greedy"]
        tokens = encoded(pieces, text)
        logp = f"{sum(logp for _, logp in pieces):.2f}" if tokens else ""
        who = " \u2026 ".join(dict.fromkeys([group[0][0], group[-1][0]]))
        answers.append(answer(who, text, tokens, logp, text in first["references"]))
    before_edits, edits = (row["values"]["greedy_error"][0] for row in (first, last))
    kind = "better" if edits < before_edits else "worse" if edits > before_edits else "changed"
    kind = "same" if first["greedy"] == last["greedy"] else kind
    return {"prompt": visible(first["prompt"]), "kind": kind, "change": before - after, "answers": answers}


def responses(runs: Sequence[RunFiles]) -> tuple[list[str], list[tuple[Row, ...]]]:
    """Names, and for every prompt as many rows: of a run's iterates, or of the last iterates of several runs.

    There are no rows if the runs were evaluated on different prompts.
    """
    said = {f"iterate {t}" if t else "start": rows for t, rows in enumerate(runs[0].heldout)}
    if len(runs) > 1:
        said = {run.name: run.heldout[-1] for run in runs if run.heldout}
    prompts = [[row["prompt"] for row in rows] for rows in said.values()]
    return list(said), list(zip(*said.values())) if all(some == prompts[0] for some in prompts) else []


# ---------------------------------------------------------------- tables


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


# ---------------------------------------------------------------- the page


def page(folders: Iterable[Path]) -> str:
    """The page as HTML. Raises: ValueError if a folder holds no run or a damaged file."""
    runs = load(folders)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    names, prompts = responses(runs)
    blocks = [block(names, rows) for rows in prompts]
    kinds = Counter(block["kind"] for block in blocks)
    settings = settings_table(runs)
    warned = [[text for n in range(len(run.rows)) for text in console.warnings(run.rows[: n + 1])] for run in runs]
    values = {
        "runs": [(run.name, headline(run), texts) for run, texts in zip(runs, warned)],
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "panels": {name: [Markup(svg(one)) for one in panels] for name, panels in figures(runs).items()},
        "metrics": [(run.name, held_out(run.rows)) for run in runs if run.rows],
        "signals": [(run.name, [signals(run.rows)]) for run in runs],
        "times": [(run.name, [times_table(run)]) for run in runs if run.times],
        "settings": settings,
        "differing": Table("", settings.heads, [line for line in settings.rows if len(set(line[1:])) > 1]),
        "commands": [(run.name, visible(f"{run.record['command']}.py {run.record['settings']}")) for run in runs],
        "kinds": [(kind, name, kinds[kind]) for kind, name in KINDS.items()],
        "kind_names": KINDS,
        "count": len(blocks),
        "blocks": sorted(blocks, key=lambda block: block["kind"] == "same")[:PROMPTS],
    }
    text = environment.get_template("page.html").render(values)
    return text.encode("utf-8", "replace").decode()  # A lone surrogate becomes a question mark.
