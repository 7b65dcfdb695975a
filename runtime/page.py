"""report.html: one page for a run, or for several side by side, made from the files of their folders.

The page is one file without scripts, fonts or styles from elsewhere. What it shows is hostile: prompts, responses and
options are text that a model or a stranger wrote. All of it goes through Jinja's autoescape or `html.escape`, the page
has no text in a script, and its content security policy forbids every request.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from runtime import report
from runtime.evaluate import Row, better, sign_of
from runtime.figures import svg
from runtime.options import flag_of
from runtime.panels import (
    Loaded,
    change_of,
    difference,
    equal_entropy_of,
    figures,
    label,
    load,
    metrics_of,
    number,
    shown,
)

PAGE = 950_000  # bytes of a page, at most
PROMPTS = 1000  # in the table of responses, at most
TEXT = 2000  # characters of a text on the page
LEVELS = "0123456789abcdefghijklmnopqrstuvwxyz"  # of a token's -log p in quarters of a nat, and of its length
KINDS = {"better": "got better", "worse": "got worse", "changed": "changed", "same": "unchanged"}

# ---------------------------------------------------------------- what happened, in words


def headline(run: Loaded) -> list[str]:
    """Sentences: which metrics changed beyond two paired standard errors, which did not, and the best iterate."""
    if not run.rows:
        return ["No iterate has been evaluated yet."]
    first, last, metric = run.rows[0], run.rows[-1], run.args.get("best", "nll")
    done, total = last["iterate"], run.args.get("iterations")
    values = {key: [shown(number(row, key), key) for row in (first, last)] for key in metrics_of(run.rows)}
    if not done:
        return [
            "Only the start has been evaluated: " + ", ".join(f"{label(key)} {v}" for key, (v, _) in values.items())
        ]
    sentences = [f"The run is not finished: {done} of {total} iterations."] if done != total else []
    moved, still = [], []
    for key in [key for key in values if sign_of(key) and change_of(last, key)]:
        change, error = change_of(last, key)
        if abs(change) <= 2 * error:
            still.append(label(key))
            continue
        verdict = {1: ", better", -1: ", worse"}.get(sign_of(key) * (1 if change > 0 else -1), "")
        word = "rose" if change > 0 else "fell"
        now = f"from {values[key][0]} to {values[key][1]} ({difference(change, error, key)}{verdict})"
        moved.append(f"{label(key)} {word} {now}")
    if not moved and not still:
        listed = "; ".join(f"{label(key)} from {a} to {b}" for key, (a, b) in values.items())
        return [*sentences, f"{listed}. Paired standard errors are not known for this run."]
    sentences += [f"{_capital('; '.join(moved))}."] if moved else []
    if still:
        names = " and ".join([*([", ".join(still[:-1])] if len(still) > 1 else []), still[-1]])
        sentences.append(f"{_capital(names)} did not change by more than two standard errors.")
    temperature, leads = equal_entropy_of(last)
    if temperature is not None and leads:
        said = ", ".join(f"{label(key)} {difference(*lead, key)}" for key, lead in leads.items())
        sentences.append(f"Against the start at temperature {temperature:.2f}, which has the same entropy: {said}.")
    improved = [row for row in run.rows if change_of(row, metric) and better(row, metric)]
    best = max(improved, key=lambda row: sign_of(metric) * row[metric])["iterate"] if improved else None
    said = f"The best iterate by {label(metric)} is {best}." if best else f"No iterate is better by {label(metric)}."
    return [*sentences, said]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------- responses


@dataclass
class Answer:
    """A text in the table of responses."""

    who: str
    text: str
    tokens: str = ""  # two characters a token: see `encoded`
    logp: str = ""
    right: bool = False


def kind_of(first: Row, last: Row) -> str:
    """Whether the greedy response came nearer to a reference, in edits."""
    if first.get("greedy") == last.get("greedy"):
        return "same"
    before, after = (row.get("values", {}).get("greedy_error", [0])[0] for row in (first, last))
    return "better" if after < before else "worse" if after > before else "changed"


def visible(text: object) -> str:
    """A text without what breaks a page: control characters become their pictures, lone surrogates question marks."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    if len(text) > TEXT:
        text = f"{text[:TEXT]} [... {len(text) - TEXT:,} more characters]"
    pictures = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)} | {127: "\u2421"}
    return text.translate(pictures).encode("utf-8", "replace").decode()


def encoded(pieces: Any, text: str) -> str:
    """Length and -log p of every token, a character each; "" where the tokens do not make up the text.

    A token of more characters than a digit can say takes several places.
    """
    try:
        pieces = [(str(piece), max(0.0, -float(logp))) for piece, logp in pieces]
    except (TypeError, ValueError):
        return ""
    whole = "".join(piece for piece, _ in pieces)
    if whole.strip() != text or len(text) > TEXT:
        return ""
    skip, left, out = len(whole) - len(whole.lstrip()), len(text), []
    for piece, loss in pieces:
        cut = min(skip, len(piece))
        skip, size = skip - cut, min(len(piece) - cut, left)
        left -= size
        level = LEVELS[min(round(4 * loss), len(LEVELS) - 1)] if math.isfinite(loss) else LEVELS[-1]
        out += [LEVELS[min(35, size - at)] + level for at in range(0, size, 35)]
    return "".join(out)


def block(said: dict[str, Row]) -> dict[str, Any]:
    """A prompt with its reference and the responses by who gave them; equal ones in a row are one line."""
    first, last = next(iter(said.values())), list(said.values())[-1]
    references = [r for r in first.get("references") or [] if isinstance(r, str)]
    pieces = last.get("tokens", {}).get("real")
    real = "".join(str(piece[0]) for piece in pieces or []).strip() or (references or [""])[0]
    scores = [row.get("values", {}).get("nll", [None])[0] for row in said.values()]
    change = None if None in (scores[0], scores[-1]) else scores[0] - scores[-1]
    logp = "" if change is None else f"{-scores[0]:.2f} \u2192 {-scores[-1]:.2f}"
    answers = [Answer("reference", visible(real), encoded(pieces, real), logp)]
    answers += [Answer("also right", visible(" | ".join(r for r in references if r != real)))] if references[1:] else []
    groups: list[list[str]] = []
    for who, row in said.items():
        text = row.get("greedy", "")
        if groups and said[groups[-1][-1]].get("greedy", "") == text:
            groups[-1].append(who)
        else:
            groups.append([who])
    for group in groups:
        row = said[group[-1]]
        text, pieces = row.get("greedy", ""), row.get("tokens", {}).get("greedy")
        who = group[0] if len(group) == 1 else f"{group[0]} \u2026 {group[-1]}"
        logp = f"{sum(p[1] for p in pieces):.2f}" if pieces and encoded(pieces, text) else ""
        answers.append(Answer(who, visible(text), encoded(pieces, text), logp, text in references))
    prompt = first.get("prompt", "")
    return {"prompt": visible(prompt), "kind": kind_of(first, last), "change": change, "answers": answers}


def responses(runs: Sequence[Loaded]) -> dict[str, Row]:
    """The rows to lay side by side, by who answered: the iterates of a run, or the last iterates of several."""
    if len(runs) == 1:
        names = {t: f"iterate {t}" if t else "start" for t in runs[0].heldout}
        return {name: runs[0].heldout[t] for t, name in names.items()}
    last = {run.name: run.heldout[max(run.heldout)] for run in runs if run.heldout}
    prompts = [[row.get("prompt") for row in rows] for rows in last.values()]
    return last if prompts and all(some == prompts[0] for some in prompts) else {}


# ---------------------------------------------------------------- tables


def times_table(run: Loaded) -> list[list[str]]:
    """Seconds and peak memory of every phase, by iterate."""
    phases = list(dict.fromkeys(phase for row in run.times.values() for phase in row.get("seconds", {})))
    lines = [["iterate", *phases]]
    for t, row in sorted(run.times.items(), key=lambda item: str(item[0])):
        seconds, memory = row.get("seconds", {}), row.get("memory", {})
        cells = [f"{seconds[p]:.1f} s, {memory.get(p, 0) / 2**20:,.0f} MiB" if p in seconds else "-" for p in phases]
        lines.append([str(t), *cells])
    return lines if phases else []


def metrics_table(run: Loaded) -> list[list[str]]:
    """Every metric by iterate, with its change against the start."""
    lines = [["iterate", *map(label, metrics_of(run.rows))]]
    for row in run.rows:
        cells = []
        for key in metrics_of(run.rows):
            value, error, change = number(row, key), number(row, f"{key}_se"), change_of(row, key)
            text = shown(value, key) + (f" \u00b1 {shown(error, key)}" if error is not None else "")
            cells.append(text + (f" ({difference(*change, key)})" if change else ""))
        lines.append([str(row["iterate"]), *cells])
    return lines


def signals_table(run: Loaded) -> list[list[str]]:
    keys = [key for key in report.SIGNALS if any(key in row for row in run.rows[1:])]
    lines = [[key.replace("_", " ") for key in keys]]
    return lines + [[shown(number(row, key), key) for key in keys] for row in run.rows[1:]] if len(keys) > 1 else []


def settings_table(runs: Sequence[Loaded], differing: bool) -> list[list[str]]:
    """Options, hashes and environment of all runs; `differing`: only where runs have different ones."""

    def flat(run: Loaded) -> dict[str, str]:
        values = {flag_of(name): value for name, value in run.args.items()}
        values |= {f"sha256 of {name}": value for name, value in (run.record.get("digests") or {}).items()}
        values |= {name: run.record.get(name) for name in ("command", "torch", "ranks", "revision", "template")}
        values["machine"] = ", ".join(dict.fromkeys(str(row.get("machine")) for row in run.times.values()))
        return {name: cell(value) for name, value in values.items()}

    found = [flat(run) for run in runs]
    names = list(dict.fromkeys(name for values in found for name in values))
    lines = [[name, *(values.get(name, "-") for values in found)] for name in names]
    if differing:
        lines = [line for line in lines if len(set(line[1:])) > 1]
    return [["", *(run.name for run in runs)], *lines]


def cell(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)
    return visible(text)[:500]


# ---------------------------------------------------------------- the page


def page(folders: Iterable[Path]) -> str:
    """The page as HTML. Raises: ValueError where a folder holds no run."""
    runs = load(folders)
    one = runs[0] if len(runs) == 1 else None
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    panels = {name: [Markup(svg(panel)) for panel in some] for name, some in figures(runs).items()}
    said = responses(runs)
    count = min(map(len, said.values()), default=0)
    kinds = Counter(kind_of(*(list(said.values())[n][i] for n in (0, -1))) for i in range(count)) if count else {}
    apart = not one and not said and any(run.heldout for run in runs)
    other = ["the responses side by side: the runs were evaluated on different prompts"] if apart else []
    rest = {
        "runs": [(run.name, headline(run), warnings(run)) for run in runs],
        "title": one.name if one else f"{len(runs)} runs",
        "panels": panels,
        "tables": {
            "metrics": [(run.name, metrics_table(run)) for run in runs if run.rows],
            "signals": [(run.name, signals_table(run)) for run in runs],
            "times": [(run.name, times_table(run)) for run in runs],
            "settings": settings_table(runs, differing=False),
            "differing": [] if one else settings_table(runs, differing=True),
        },
        "commands": [(run.name, visible(run.command)) for run in runs],
        "kinds": [(kind, name, kinds.get(kind, 0)) for kind, name in KINDS.items()],
        "count": count,
        "missing": [f"{run.name}: {line}" for run in runs for line in run.missing] + other,
        "kind_names": KINDS,
        "levels": LEVELS,
    }
    template = environment.get_template("page.html")
    without = template.make_module(rest | {"blocks": []})
    left = PAGE - len(str(without).encode("utf-8", "replace"))
    blocks = chosen(said, count, without.prompt_block, left)
    return template.render(rest, blocks=blocks).encode("utf-8", "replace").decode()


def chosen(said: dict[str, list[Row]], count: int, render: Callable, left: int) -> list[Markup]:
    """As many prompts as fit into so many bytes: those with a changed response first, in the order of the data."""
    kinds = [kind_of(*(list(said.values())[n][i] for n in (0, -1))) for i in range(count)]
    order = sorted(range(count), key=lambda i: (kinds[i] == "same", i))[:PROMPTS]
    blocks = []
    for i in order:
        text = render(block({who: rows[i] for who, rows in said.items()}))
        left -= len(text.encode())
        if left < 0:
            break
        blocks.append(text)
    return blocks


def warnings(run: Loaded) -> list[str]:
    """Signs of degeneration in any iterate."""
    found = []
    for n in range(2, len(run.rows) + 1):
        try:
            found += report.warnings_of(run.rows[:n])
        except (KeyError, TypeError):  # rows of another version
            continue
    return found
