"""Tables and figures of benchmarks/results/evidence.json, in the documents and beside it. No dependencies."""

import math
import re
from collections.abc import Sequence
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
    special = [
        f"## {name}\n\n{block_of(name, found)}" for name in ("starts", "gradients", "capacity", "exponents", "answers")
    ]
    texts = special + [f"## {name}\n\n{regime(found, name, True)}" for name in found["regimes"]]
    (root / EVERY_COLUMN).write_text("\n".join(texts))


def filled(text: str, found: dict) -> str:
    """A document with its blocks `<!-- evidence: NAME -->` ... `<!-- end -->` made from the results."""

    pattern = re.compile(r"(<!-- evidence: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + block_of(match[2], found) + match[3], text)


def block_of(name: str, found: dict) -> str:
    """Raises: KeyError for a block that is not known."""
    special = {
        "about": about, "verdict": verdict, "starts": starts, "gradients": gradients, "exponents": exponents,
        "sequences": sequences, "first gradients": first_gradients, "optimum": optimum, "answers": answers,
        "capacity": capacity,
    }  # fmt: skip
    if name in special:
        return special[name](found)
    if name not in found["regimes"]:
        raise KeyError(name)
    return regime(found, name)


def table(lines: Sequence[Sequence[str]]) -> str:
    title, *rows = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in [title, ["---"] * len(title), *rows])


def signed(value: Sequence[float] | None, scale: float, digits: int) -> str:
    return f"{scale * value[0]:+.{digits}f} ± {scale * value[1]:.{digits}f}" if value else ""


def compared(row: Row) -> bool:
    """Whether a row shares entropies with both controls."""
    return all(measure_of(row["start"])[0] in row.get(over, {}) for over in OVER)


def self_play(found: dict) -> list[Row]:
    """The settings of self-play that can be judged; "demonstrations" compares other ways to learn with it."""
    return [row for row in found["summary"] if compared(row) and row["regime"] != "demonstrations"]


def is_control(row: Row) -> bool:
    return row["name"].startswith("supervised")


def lead_of(row: Row, over: str) -> list[float]:
    """[lead, standard error, degrees of freedom] of what a row is judged by; positive is better."""
    return row[over][measure_of(row["start"])[0]]


def sign(row: Row, over: str) -> int:
    """1 or -1 if a lead is as unlikely by chance as one of more than SURE standard errors of a known size, else 0."""
    found = normal_errors(*lead_of(row, over))
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
    start, supervised = ({1: "above", 0: "level", -1: "below"}[sign(row, over)] for over in OVER)
    return start if start == supervised else f"{start}, {supervised}"


def about(found: dict) -> str:
    rows = [row for part in ("starts", "runs") for row in found[part].values()]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return (
        f"`{found['command']}`, {'commits' if ',' in commits else 'commit'} {commits}, {found['machine']}: "
        f"{len(found['runs'])} runs, {sum(row['seconds'] for row in rows) / 60:.0f} minutes of CPU time for training.\n"
    )


def verdict(found: dict) -> str:
    rows = [row for row in self_play(found) if row["iterate"] == row["iterations"]]
    wins = [row for row in rows if judged(row) == "above"]
    ahead = [row for row in rows if sign(row, "over start") > 0]
    below = [row for row in rows if sign(row, "over start") < 0 or sign(row, "over supervised") < 0]
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


def starts(found: dict) -> str:
    lines = [["start", "greedy", "sampled", "sampled error", "NLL", "entropy", "CPU s"]]
    for name, row in found["starts"].items():
        i = found["temperatures"].index(1.0)
        cells = [f"{100 * value:.1f}%" for value in (row["greedy"], row["sampled"][i], row["sampled_error"][i])]
        lines.append([name, *cells, f"{row['nll'][i]:.4f}", f"{row['entropy'][i]:.2f}", f"{row['seconds']:.0f}"])
    return table(lines)


def regime(found: dict, name: str, every_column: bool = False) -> str:
    """Every case of a regime: its metrics at temperature 1, and its leads over both controls."""
    rows = [row for row in found["summary"] if row["regime"] == name]
    if not every_column and name != "iterations":
        rows = [row for row in rows if row["iterate"] == row["iterations"]]
        group = ("start", "prompts", "iterations")
        chosen = [[row.get("control"), *(row[name] for name in group)] for row in found["summary"]]
        rows = [r for r in rows if not is_control(r) or [r["name"], *(r[name] for name in group)] in chosen]
    waiting = [f"{setting} ({', '.join(starts)})" for setting, starts in found["waiting"].get(name, {}).items()]
    text = f"Not run yet: {'; '.join(waiting)}.\n" if waiting else ""
    if not rows:
        return text
    metric, measure = measure_of(rows[0]["start"])
    leads_shown, some = {metric: (100, 2), "best_nll": (1000, 1)}, {}  # points, thousandths of a nat
    if every_column:
        some = {"greedy": ("greedy", 100, 1), "sampled": ("sampled", 100, 1), "error": ("sampled_error", 100, 1)}
        some |= {"NLL": ("nll", 1, 4), "entropy": ("entropy", 1, 2)}
        leads_shown["greedy"] = (100, 2)
    several_starts = len({row["start"] for row in rows}) > 1
    words = {"best_nll": "NLL", metric: measure}
    title = ["start"] * several_starts + ["setting", *some]
    shown = [(over, lead) for over in OVER for lead in leads_shown]
    if not every_column:
        shown.remove(("over supervised", "best_nll"))
    title += [f"{words.get(lead, lead)} {over}" for over, lead in shown]
    lines = [[*title, *["CPU s"] * every_column, "verdict"]]
    for row in rows:
        cells = [row["start"]] * several_starts + [label_of(found, row)]
        cells += [f"{scale * row[key]:.{digits}f}" for key, scale, digits in some.values()]
        cells += [signed(row.get(over, {}).get(lead), *leads_shown[lead]) for over, lead in shown]
        cells += [f"{row['seconds']:.0f}"] * every_column
        lines.append([*cells, verdict_of(row)])
    return table(lines) + ("\n" + text if text else "")


def verdict_of(row: Row) -> str:
    if is_control(row):
        return ""
    if compared(row):
        return judged(row)
    return "no common entropy" if "control" in row else "supervised: not run yet"


def several(found: dict, row: Row) -> bool:
    """Whether several iterates of one run are shown."""
    same = ("regime", "start", "name", "prompts", "iterations")
    return len([r for r in found["summary"] if all(r[k] == row[k] for k in same)]) > 1


def label_of(found: dict, row: Row) -> str:
    """A setting's name, with what tells it from others of the same name in its regime."""
    others = [r for r in found["summary"] if all(r[k] == row[k] for k in ("regime", "start", "name"))]
    text = row["name"] + (f", iterate {row['iterate']}" if several(found, row) else "")
    for key in ("prompts", "iterations"):
        if any(r[key] != row[key] for r in others):
            text += f", {row[key]:,} {key}"
    return text


def gradients(found: dict) -> str:
    title = ["start", "supervised norm²", "self-play norm², times 4", "of the generated responses alone"]
    lines = [[*title, "greedy opponent, times 4", "its cosine", "noise of an example", "noise of a pair, times 4"]]
    for name, row in found["theory"].items():
        cells = [signed(row[key], scale, 4) for key, scale in (("real", 1), ("spin", 4), ("generated", 1))]
        cells += [signed(row.get("greedy"), 4, 2), ""]
        if "greedy" in row and row["real"][0] > 0:
            cells[-1] = f"{row['real and greedy'][0] / (row['real'][0] * row['greedy'][0]) ** 0.5:+.2f}"
        lines.append([name, *cells, f"{row['noise_real']:.1f}", f"{4 * row['noise_spin']:.1f}"])
    return table(lines)


def exponents(found: dict) -> str:
    """Last iterates of one temperature and beta other than temperature 1, from the converged start."""
    lines = [["setting", "iterate", "one choice", "measured", "1 / T of the start at equal entropy"]]
    for row in found["summary"]:
        if "optimum" in row and row["iterate"] == row["iterations"]:
            cells = [row["name"], str(row["iterate"]), f"{row['optimum']:.3f}"]
            inverse = row.get("inverse temperature")
            lines.append([*cells, f"{row['exponent']:.3f}", f"{inverse:.3f}" if inverse else ""])
    return table(lines)


def sequences(found: dict) -> str:
    names = {"by token": 1, "by response": 1, "slope": 0, "slope at equal length": 0, "nats per token": 0}
    title = ["T", "beta", "iterate", "KL from the data tempered by token", "by response", "slope"]
    lines = [[*title, "slope at equal length", "nats per further token"]]
    for game in found["sequences"]:
        for t, row in enumerate(game["iterates"]):
            if t in (0, 1, len(game["iterates"]) - 1):
                cells = [
                    f"{row[name]:.2g}" if small else f"{abs(row[name]) * (1 if row[name] > -0.0005 else -1):.3f}"
                    for name, small in names.items()
                ]
                lines.append([str(game["temperature"]), str(game["beta"]), str(t), *cells])
    return table(lines)


def first_gradients(found: dict) -> str:
    sampled, greedy = ([row for row in found["first gradients"] if row["temperature"] == t] for t in (1, 0))
    title = ["start", "supervised norm", "cosine, sampled", "norm, sampled", "cosine, greedy", "norm, greedy"]
    lines = [title]
    for one, zero in zip(sampled, greedy):
        cells = [one["start"], f"{one['supervised']:.3f}"]
        for row in (one, zero):  # the data has no supervised gradient, so no cosine
            cells += ["" if row["start"] == "data" else f"{row['cosine']:+.2f}", f"{row['spin']:.3f}"]
        lines.append(cells)
    return table(lines)


def optimum(found: dict) -> str:
    """Starts whose optimum against a hot opponent was computed on their own responses."""
    lines = [["start", "slope", "slope at equal length", "nats per further token"]]
    for name, row in found["starts"].items():
        if "optimum" in row:
            lines.append([name, *(f"{value:.3f}" for value in row["optimum"].values())])
    return table(lines) if len(lines) > 1 else "Not run yet.\n"


def capacity(found: dict) -> str:
    count = len(found["capacity"][0]["nats"])
    lines = [["temperature", "beta", "start", *(f"iterate {t}" for t in range(1, count))]]
    for row in found["capacity"]:
        lines.append([str(row["temperature"]), str(row["beta"]), *(f"{value:.2g}" for value in row["nats"])])
    return table(lines)


def answers(found: dict) -> str:
    """Greedy responses of the start, the control and self-play, of seed 0, to the same held-out prompts."""
    rows = [row for row in self_play(found) if "answers" in row]
    if not rows:
        return "Not run yet.\n"
    best = max(rows, key=lambda row: lead_of(row, "over start")[0])
    control = next(row for row in found["summary"] if row["name"] == best["control"] and row["start"] == best["start"])
    models = [("the start", found["starts"][best["start"]]), (control["name"], control), (best["name"], best)]
    lines = [["prompt", "written by a person", *(name for name, _ in models)]]
    for i, (prompt, reference, _) in enumerate(best["answers"]):
        lines.append([prompt, reference, *(row["answers"][i][2] for _, row in models)])
    return table([[cell.replace("|", "/") for cell in line] for line in lines])


# ---------------------------------------------------------------- the figure

COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b0548b", "#8a6d00", "#56b4e9", "#444444", "#c0a000", "#7a4ad0")
STYLE = "text{font:12px sans-serif;fill:#333}.axis{stroke:#999}.small{font-size:10px}.bold{font-weight:bold}"


def label(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def settings(found: dict) -> str:
    """A mark for every setting of self-play: its leads over both controls at equal entropy, in standard errors."""
    rows = [row for row in self_play(found) if row["iterate"] == row["iterations"]]
    most = 8.0  # marks beyond lie on the edge

    def at(row: Row, over: str) -> float:
        return normal_errors(*lead_of(row, over))

    def x(value: float) -> float:
        return 60 + 380 * (value + most) / (2 * most)

    def y(value: float) -> float:
        return 430 - 380 * (value + most) / (2 * most)

    title = "Every setting of self-play beside both controls, at equal entropy, in standard errors"
    edge, side = x(most) - x(SURE), x(SURE) - x(-SURE)
    body = label(20, 22, title, kind="bold")
    body += f'<rect x="{x(SURE):.1f}" y="50" width="{edge:.1f}" height="{edge:.1f}" fill="#dcefdc"/>'
    body += label(x((SURE + most) / 2), 66, "self-play wins", "middle", "small")
    body += f'<rect x="{x(-SURE):.1f}" y="{y(SURE):.1f}" width="{side:.1f}" height="{side:.1f}" fill="#eee"/>'
    body += label(x(0), y(SURE) + 14, "level, within the noise", "middle", "small")
    for value in (-6, -3, 0, 3, 6):
        body += f'<line class="axis" x1="{x(value):.1f}" y1="430" x2="{x(value):.1f}" y2="434"/>'
        body += f'<line class="axis" x1="56" y1="{y(value):.1f}" x2="60" y2="{y(value):.1f}"/>'
        body += label(x(value), 446, f"{value:g}", "middle", "small")
        body += label(52, y(value) + 4, f"{value:g}", "end", "small")
    body += '<path class="axis" fill="none" d="M60 50V430H440"/>'
    body += label(460, 430, "Marks on the edge lie beyond it.", kind="small")
    body += label(250, 464, "better than the start \u2192", "middle", "small")
    upwards = label(24, 240, "better than supervised training \u2192", "middle", "small")
    body += f'<g transform="rotate(-90 24 240)">{upwards}</g>'
    for i, name in enumerate(dict.fromkeys(row["start"] for row in rows)):
        colour, mine = COLOURS[i % len(COLOURS)], [row for row in rows if row["start"] == name]
        for row in mine:
            place = f'cx="{x(at(row, OVER[0])):.1f}" cy="{y(at(row, OVER[1])):.1f}" r="4"'
            title = f"<title>{escape(name)}: {escape(row['name'])}</title>"
            body += f'<circle {place} fill="{colour}" fill-opacity="0.75">{title}</circle>'
        body += f'<circle cx="470" cy="{66 + 20 * i}" r="4" fill="{colour}"/>'
        body += label(480, 70 + 20 * i, f"{name} ({len(mine)})", kind="small")
    size = 'width="660" height="480" viewBox="0 0 660 480"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>'
    return f'{head}<rect width="100%" height="100%" fill="white"/>{body}</svg>\n'
