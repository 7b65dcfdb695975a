"""Tables and figure of benchmarks/results/evidence.json, in the documents and beside it. No dependencies."""

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import NormalDist
from typing import Any

Row = dict[str, Any]

FIGURE = "benchmarks/results/evidence-settings.svg"
DOCUMENTS = ("docs/evidence.md", "README.md")
EVERY_COLUMN = "runs/evidence-tables.md"
OVER = ("over start", "over supervised")
SURE = 3.3  # standard errors: one of 60 settings that change nothing is beyond them by chance with probability 5%

# By what a case is judged: many definitions are good ones, and short ones have a low edit distance.
MEASURE = {"glosses": ("sampled", "F1")}
MEASURE |= dict.fromkeys(("glosses, other prompts", "glosses, again"), ("content", "content F1"))

# Settings that say what their neighbours say, by words in start and label. The documents leave them out if they are
# level with both controls; EVERY_COLUMN has them.
LEFT_OUT = {
    "temperature and beta": ("T 1.2", "T 1.5, beta 3"),
    "few words": ("alpha", "lr 3e-5", "LoRA 16, lr 1e-4", "four iterations"),
    "start": ("wide", "narrow: lr 1e-4"), "definitions": ("lr 3e-4",), "hot definitions": ("lr 3e-5",),
    "pairs": ("625",), "adapters": ("LoRA 4",),
    "methods": ("hinge", "SPACE", "SPIF", "IRIS", "NLL term", "alpha", "SPPO", "IPO", "fictitious", "four"),
}  # fmt: skip


def measure_of(start: str) -> tuple[str, str]:
    """(metric, its name) of a start's task, both in points if scaled by 100."""
    return MEASURE.get(start, ("sampled_error", "error"))


# ---------------------------------------------------------------- documents


def write_all(found: dict, root: Path) -> None:
    """Replaces what stands between the markers of the documents, and writes the figure and the tables in full."""
    for name in DOCUMENTS:
        path = root / name
        path.write_text(filled(path.read_text(), found))
    (root / FIGURE).write_text(settings(found))
    (root / EVERY_COLUMN).parent.mkdir(exist_ok=True)
    texts = [f"## {name}\n\n{regimes(found, [name], True)}" for name in found["regimes"]]
    (root / EVERY_COLUMN).write_text("\n".join(texts))


def filled(text: str, found: dict) -> str:
    """A document with its blocks `<!-- evidence: NAME -->` ... `<!-- end -->` made from the results.

    A name is one of `special`, or one or several regimes with " + " between them, which share a table.
    """
    special = {
        "about": about, "verdict": verdict, "starts": starts, "placebo": placebo,
        "capacity": capacity, "sequences": sequences, "first gradients": first_gradients,
    }  # fmt: skip

    def block(name: str) -> str:
        return special[name](found) if name in special else regimes(found, name.split(" + "))

    return with_blocks(text, "evidence", block)


def with_blocks(text: str, kind: str, block: Callable[[str], str]) -> str:
    """A document with block(NAME) between each of its markers `<!-- KIND: NAME -->` and `<!-- end -->`."""
    pattern = re.compile(rf"(<!-- {kind}: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + block(match[2]) + match[3], text)


def table(lines: Sequence[Sequence[str]]) -> str:
    title, *rows = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in [title, ["---"] * len(title), *rows])


def signed(value: Sequence[float] | None, scale: float, digits: int) -> str:
    return f"{scale * value[0]:+.{digits}f} ± {scale * value[1]:.{digits}f}" if value else ""


# ---------------------------------------------------------------- verdicts


def compared(row: Row) -> bool:
    """Whether a row shares entropies with both controls."""
    return all(measure_of(row["start"])[0] in row.get(over, {}) for over in OVER)


def self_play(found: dict) -> list[Row]:
    """The last iterates of the settings that can be judged; "demonstrations" compares other ways to learn with it."""
    rows = [row for row in found["summary"] if compared(row) and row["regime"] != "demonstrations"]
    return [row for row in rows if row["iterate"] == row["iterations"]]


def is_control(row: Row) -> bool:
    return row["name"].startswith("supervised")


def lead_of(row: Row, over: str) -> list[float]:
    """[lead, standard error, degrees of freedom] of what a row is judged by; positive is better."""
    return row[over][measure_of(row["start"])[0]]


def sign(lead: Sequence[float]) -> int:
    """1 or -1 if a lead is as unlikely by chance as one of more than SURE standard errors of a known size, else 0."""
    found = normal_errors(*lead)
    return (found > SURE) - (found < -SURE)


def normal_errors(lead: float, error: float, freedom: float) -> float:
    """The standard errors at which a normal variable is as unlikely as Student's t at lead / error; at most 8.

    Few seeds say little about the spread over seeds, so a lead must exceed more of their errors: 32 with two degrees of
    freedom instead of 3.3. The density of t at sqrt(freedom) tan(angle) is cos(angle)^(freedom - 1),
    up to a constant; the areas are sums over midpoints.
    """
    if not error:
        return 0.0

    def area(begin: float, end: float, parts: int = 2000) -> float:
        width = (end - begin) / parts
        return width * sum(math.cos(begin + (i + 0.5) * width) ** (freedom - 1) for i in range(parts))

    angle = math.atan(abs(lead) / error / math.sqrt(freedom))
    beyond = area(angle, math.pi / 2) / (2 * area(0.0, math.pi / 2))
    return math.copysign(min(8.0, -NormalDist().inv_cdf(max(beyond, 1e-17))), lead)


def judged(row: Row) -> str:
    """What the leads at equal entropy say about a row of self-play: over the start, over supervised training."""
    if is_control(row) or not compared(row):
        return ""
    start, supervised = ({1: "above", 0: "level", -1: "below"}[sign(lead_of(row, over))] for over in OVER)
    return start if start == supervised else f"{start}, {supervised}"


def about(found: dict) -> str:
    rows = [row for part in ("starts", "runs") for row in found[part].values()]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return (
        f"`{found['command']}`, {'commits' if ',' in commits else 'commit'} {commits}, {found['machine']}: "
        f"{len(found['runs'])} runs, {sum(row['seconds'] for row in rows) / 60:.0f} minutes of CPU time for training.\n"
    )


def verdict(found: dict) -> str:
    rows = self_play(found)
    wins = [row for row in rows if judged(row) == "above"]
    ahead = [row for row in rows if judged(row).startswith("above")]
    below = [row for row in rows if "below" in judged(row)]
    text = (
        f"Of {len(rows)} settings of self-play, each over two to five seeds, **{counted(wins)} better than both "
        f"controls at equal entropy** by more than {SURE} standard errors, {counted(ahead)} better than the start, and "
        f"{counted(below)} worse than one of the controls or both by as much."
    )
    for row in wins:
        over_start, over_supervised = (signed(lead_of(row, over), 100, 2) for over in OVER)
        name = measure_of(row["start"])[1]
        text += f"\n- {row['start']}: {row['name']} ({over_start} points of {name} over the start, "
        text += f"{over_supervised} over supervised training)"
    return text + "\n"


def counted(rows: Sequence[Row]) -> str:
    return "none is" if not rows else "one is" if len(rows) == 1 else f"{len(rows)} are"


# ---------------------------------------------------------------- tables


def regimes(found: dict, names: Sequence[str], every_column: bool = False) -> str:
    """The cases of regimes: their leads over both controls, bold if chance makes none as large."""
    rows, notes = [row for row in found["summary"] if row["regime"] in names], []
    metrics: dict[str, tuple[int, int]] = {}  # scale and digits; the lead "" is in what a case is judged by
    leads = [(OVER[0], "", 100, 2), (OVER[0], "best_nll", 1000, 1), (OVER[1], "", 100, 2)]
    if every_column:
        metrics = {"greedy": (100, 1), "sampled": (100, 1), "sampled_error": (100, 1), "nll": (1, 4), "entropy": (1, 2)}
        metrics |= {"frequent": (1, 2), "seconds": (1, 0)}
        leads += [(OVER[1], "best_nll", 1000, 1), *((over, "greedy", 100, 2) for over in OVER)]
    else:
        shown = [row for row in rows if row["iterate"] in (1, row["iterations"]) and is_chosen(found, row)]
        rows = [row for row in shown if not left_out(found, row)]
        if more := sum(not is_control(row) for row in shown) - sum(not is_control(row) for row in rows):
            notes.append(f"{more} more are level with both controls (full tables).")
        notes += [note for name in names if (note := waiting(found, name))]
    several_starts = len({row["start"] for row in rows}) > 1
    words = {"": " or ".join(dict.fromkeys(measure_of(row["start"])[1] for row in rows)), "best_nll": "NLL"}
    title = ["start"] * several_starts + ["setting", *metrics]
    for over, lead, _, _ in leads:
        title.append(words.get(lead, lead) + (f" {over}" if over == OVER[1] or every_column else ""))
    lines = [title + ["verdict"] * every_column]
    for row in rows:
        cells = [row["start"].removesuffix(", again")] * several_starts + [label_of(found, row)]
        cells += [f"{scale * row[key]:.{digits}f}" if key in row else "" for key, (scale, digits) in metrics.items()]
        for over, lead, scale, digits in leads:
            cells.append(bold(row.get(over, {}).get(lead or measure_of(row["start"])[0]), scale, digits))
        lines.append(cells + [judged(row)] * every_column)
    return "\n".join([table(lines)] * bool(rows) + [" ".join(notes) + "\n"] * bool(notes))


def bold(lead: Sequence[float] | None, scale: float, digits: int) -> str:
    text = signed(lead, scale, digits)
    return f"**{text}**" if lead and sign(lead) else text


def left_out(found: dict, row: Row) -> bool:
    """Whether the documents leave a row out: see LEFT_OUT. Supervised training that changes nothing has no row."""
    said = any(word in f"{row['start']}: {label_of(found, row)}" for word in LEFT_OUT.get(row["regime"], ()))
    if is_control(row):
        return said or not any(sign(row["over start"][name]) for name in ("best_nll", measure_of(row["start"])[0]))
    return said and judged(row) == "level"


def is_chosen(found: dict, row: Row) -> bool:
    """Whether a row is one of self-play, or the control of one."""
    same = [other for other in found["summary"] if all(other[k] == row[k] for k in ("start", "prompts", "iterations"))]
    return not is_control(row) or row["name"] in [other.get("control") for other in same]


def waiting(found: dict, name: str) -> str:
    """The cases of a regime that lack a run."""
    settings: dict[tuple, list[str]] = {}
    for setting, missing in found["waiting"].get(name, {}).items():
        settings.setdefault(tuple(missing), []).append(setting)
    text = "; ".join(f"{' and '.join(names)} from *{'*, *'.join(missing)}*" for missing, names in settings.items())
    return text and f"Not run yet: {text}."


def label_of(found: dict, row: Row) -> str:
    """A setting's name, with what tells it from others of the same name in its regime."""
    others = [r for r in found["summary"] if all(r[k] == row[k] for k in ("regime", "start", "name"))]
    text = row["name"].removeprefix("SPIN, ")
    for key in ("iterate", "prompts", "iterations"):
        if len({r[key] for r in others if key != "iterate" or r["iterations"] == row["iterations"]}) > 1:
            text += f", iterate {row[key]}" if key == "iterate" else f", {key} {row[key]:,}"
    return text


def formatted(rows: Sequence[Row], columns: dict[str, str]) -> str:
    """A table with a line for each row; `columns` has a format string by title."""
    return table([list(columns), *([text.format(**row) for text in columns.values()] for row in rows)])


def starts(found: dict) -> str:
    """Those that are measured several times have one line."""
    rows = [row | {"name": name} for name, row in found["starts"].items()]
    rows = [row for row in rows if row["name"] not in ("shipped", "eight words") and "," not in row["name"]]
    columns = {"start": "{name}", "greedy": "{greedy:.1%}", "sampled error": "{sampled_error[I]:.1%}"}
    columns |= {"NLL": "{nll[I]:.4f}", "entropy": "{entropy[I]:.2f}", "CPU s": "{seconds:.0f}"}
    at_one = str(found["temperatures"].index(1.0))
    return formatted(rows, {title: text.replace("[I]", f"[{at_one}]") for title, text in columns.items()})


def placebo(found: dict) -> str:
    """How far a start lies above itself, sampled again, by what its frontier is made of."""
    lines = [["frontier of the start", "F1", "content F1"]]
    for row in found["summary"]:
        if row["regime"] == "placebo":
            leads = [bold(row["over start"].get(metric), 100, 2) for metric in ("sampled", "content")]
            draws = "four draws at nine temperatures" if "four" in row["start"] else "one draw at five temperatures"
            lines.append([draws, *leads])
    return table(lines) if len(lines) > 1 else "Not run yet: `--only placebo`.\n"


def capacity(found: dict) -> str:
    columns = {"temperature": "{temperature}", "beta": "{beta}", "start": "{nats[0]:.2g}"}
    return formatted(found["capacity"], columns | {f"iterate {t}": f"{{nats[{t}]:.2g}}" for t in (1, 2, 6)})


def sequences(found: dict) -> str:
    """The first and the last iterate at beta 1, and the last of a larger beta."""
    games = [(game, range(1, len(game["iterates"]))) for game in found["sequences"]]
    rows = [game | game["iterates"][t] | {"t": t} for game, ts in games for t in (ts[0], ts[-1])]
    columns = {"beta": "{beta}", "iterate": "{t}", "KL from the data tempered by token": "{by token:.2g}"}
    columns |= {"by response": "{by response:.2g}", "slope": "{slope:.2f}"}
    columns |= {"slope at equal length": "{slope at equal length:.2f}"}
    columns |= {"nats per further token": "{nats per token:.2f}"}
    return formatted([row for row in rows if row["beta"] == 1 or row["t"] > 1], columns)


def first_gradients(found: dict) -> str:
    """Of the greedy opponent. With samples the gradient is that of supervised training, which is 0 at the data."""
    rows = found["first gradients"]
    rows = [row | {"direction": "" if row["start"] == "data" else f"{row['cosine']:+.2f}"} for row in rows]
    columns = {"start": "{start}", "supervised norm": "{supervised:.3f}", "norm, greedy": "{spin:.3f}"}
    return formatted(rows, columns | {"cosine": "{direction}"})


# ---------------------------------------------------------------- the figure

COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b0548b", "#8a6d00", "#56b4e9", "#444444", "#c0a000", "#7a4ad0")
STYLE = "text{font:12px sans-serif;fill:#333}.axis{stroke:#999}.small{font-size:10px}.bold{font-weight:bold}"


def label(x: float, y: float, text: str, anchor: str = "start", kind: str = "small") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


class Plot:
    """A square of marks, with `ends` of both axes, and a legend to its right."""

    def __init__(self, *ends: tuple[float, float]) -> None:
        self.ends, self.marks, self.legend = ends, "", ""

    def x(self, value: float) -> float:
        return self._scaled(value, *self.ends[0])

    def y(self, value: float) -> float:
        return 490 - self._scaled(value, *self.ends[1])

    def _scaled(self, value: float, low: float, high: float) -> float:
        return 60 + 380 * (value - low) / (high - low)

    def mark(self, x: float, y: float, colour: str, title: str) -> None:
        place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="4"'
        self.marks += f'<circle {place} fill="{colour}" fill-opacity="0.75"><title>{escape(title)}</title></circle>'

    def explain(self, colour: str, text: str) -> None:
        y = 66 + 20 * self.legend.count("<circle")
        self.legend += f'<circle cx="470" cy="{y}" r="4" fill="{colour}"/>' + label(480, y + 4, text)

    def svg(self, title: str, across: str, upwards: str, ticks: Sequence[Sequence[float]], style: str) -> str:
        """`ticks`: values along both axes. `style`: how they are written."""
        body = label(20, 22, title, kind="bold") + '<path class="axis" fill="none" d="M60 50V430H440"/>'
        for value in ticks[0]:
            body += f'<path class="axis" d="M{self.x(value):.1f} 430v4"/>'
            body += label(self.x(value), 446, format(value, style), "middle")
        for value in ticks[1]:
            body += f'<path class="axis" d="M56 {self.y(value):.1f}h4"/>'
            body += label(52, self.y(value) + 4, format(value, style), "end")
        upwards = label(16, 240, f"{upwards} \u2192", "middle")
        body += label(250, 464, f"{across} \u2192", "middle") + f'<g transform="rotate(-90 16 240)">{upwards}</g>'
        size = 'width="680" height="480" viewBox="0 0 680 480"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>'
        return f'{head}<rect width="100%" height="100%" fill="white"/>{body}{self.marks}{self.legend}</svg>\n'


def settings(found: dict) -> str:
    """A mark for every setting of self-play: its leads over both controls at equal entropy, in standard errors."""
    most, ticks = 8.0, (-6, -3, 0, 3, 6)  # marks beyond lie on the edge
    plot = Plot((-most, most), (-most, most))
    x, y, edge, side = plot.x, plot.y, plot.x(most) - plot.x(SURE), plot.x(SURE) - plot.x(-SURE)
    plot.marks += f'<rect x="{x(SURE):.1f}" y="{y(most):.1f}" width="{edge:.1f}" height="{edge:.1f}" fill="#dcefdc"/>'
    plot.marks += label(x((SURE + most) / 2), 66, "self-play wins", "middle")
    plot.marks += f'<rect x="{x(-SURE):.1f}" y="{y(SURE):.1f}" width="{side:.1f}" height="{side:.1f}" fill="#eee"/>'
    plot.marks += label(x(0), y(SURE) + 14, "level, within the noise", "middle")
    of_start: dict[str, list[Row]] = {}
    for row in self_play(found):
        of_start.setdefault(row["start"].removesuffix(", again"), []).append(row)
    for colour, (name, rows) in zip(COLOURS, of_start.items(), strict=False):
        for row in rows:
            plot.mark(*(normal_errors(*lead_of(row, over)) for over in OVER), colour, f"{name}: {row['name']}")
        plot.explain(colour, f"{name} ({len(rows)})")
    plot.legend += label(460, 430, "Marks on the edge lie beyond it.")
    title = "Every setting of self-play beside both controls, at equal entropy, in standard errors"
    return plot.svg(title, "better than the start", "better than supervised training", (ticks, ticks), "g")
