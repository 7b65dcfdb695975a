"""Tables and figure of benchmarks/results/evidence.json, in the documents and beside it."""

import math
from collections.abc import Sequence
from functools import cache, partial
from statistics import NormalDist

from documents import Columns, Spot, scatter, table, write_blocks
from evidence_cases import CASES, STARTS
from measuring import ROOT

from evaluate import Row

FIGURE = ROOT / "benchmarks/results/evidence-settings.svg"
FULL_TABLES = ROOT / "runs/evidence-tables.md"
OVER = ("over start", "over supervised")
SURE = 3.3  # standard errors: one of 77 settings that change nothing is beyond them by chance with probability 7%
MOST = 8.0  # standard errors at the edge of the figure
MEASURES = {"sampled_error": "error", "sampled": "F1", "content": "content F1"}  # metrics; points if scaled by 100

# Settings that say what their neighbours say, by words in start and label. The documents leave them out if they are
# level with both controls; FULL_TABLES has them.
LEFT_OUT = {
    "temperature and beta": ("T 1.2", "T 1.5, beta 3"),
    "few words": ("alpha", "lr 3e-5", "LoRA 16, lr 1e-4", "four iterations"),
    "start": ("wide", "narrow: lr 1e-4"), "definitions": ("lr 3e-4",), "hot definitions": ("lr 3e-5",),
    "pairs": ("625",), "adapters": ("LoRA 4",), "greedy opponent": ("lr 1e-5",),
    "methods": ("hinge", "SPACE", "SPIF", "IRIS", "NLL term", "alpha", "SPPO", "IPO", "fictitious", "four"),
}  # fmt: skip


def write_all(found: Row) -> None:
    """Replaces what stands between the markers of the documents, and writes the figure and the tables in full."""
    write_blocks("evidence", partial(block, found))
    FIGURE.write_text(settings(found))
    FULL_TABLES.parent.mkdir(exist_ok=True)
    names = dict.fromkeys(case.regime for case in CASES)
    FULL_TABLES.write_text("\n".join(f"## {name}\n\n{regimes(found, [name], True)}" for name in names))


def block(found: Row, name: str) -> str:
    """A block of a document: a special one, or one or several regimes with " + " between them, which share a table."""
    special = {
        "about": about, "verdict": verdict, "starts": starts, "placebo": placebo,
        "capacity": capacity, "sequences": sequences, "first gradients": first_gradients,
    }  # fmt: skip
    return special[name](found) if name in special else regimes(found, name.split(" + "))


# ---------------------------------------------------------------- verdicts


def prepared(found: Row) -> list[Row]:
    """The rows of all cases with what tables show of them.

    "verdict" tells what the leads at equal entropy say about self-play, over the start and over supervised training; it
    is empty for controls, and if one of the two does not reach the entropies.
    """
    rows = []
    for row in found["summary"]:
        by, (start, supervised) = STARTS[row["start"]].measure, (row.get(over, {}) for over in OVER)
        judged = [start[by], supervised[by]] if by in start and by in supervised else []
        signs = [{1: "above", 0: "level", -1: "below"}[sign(lead)] for lead in judged]
        rows.append(row | {
            "from": row["start"].removesuffix(", again"), "label": label_of(found, row), "by": by,
            "is control": row["name"].startswith("supervised"), "judged": judged,
            "verdict": ", ".join(dict.fromkeys(signs)),
            "ahead of start": cell(start.get(by), 100, 2), "NLL ahead of start": cell(start.get("best_nll"), 1000, 1),
            "ahead": cell(supervised.get(by), 100, 2), "NLL ahead": cell(supervised.get("best_nll"), 1000, 1),
        })  # fmt: skip
    return rows


def cell(lead: Sequence[float] | None, scale: float, digits: int) -> str:
    """A lead with its error, bold if chance makes none as large."""
    text = f"{scale * lead[0]:+.{digits}f} ± {scale * lead[1]:.{digits}f}" if lead else ""
    return f"**{text}**" if lead and sign(lead) else text


def sign(lead: Sequence[float]) -> int:
    """1 or -1 if a lead is as unlikely by chance as one of more than SURE standard errors of a known size, else 0."""
    found = normal_errors(*lead)
    return (found > SURE) - (found < -SURE)


@cache
def normal_errors(lead: float, error: float, freedom: float) -> float:
    """The standard errors at which a normal variable is as unlikely as Student's t at lead / error; at most MOST.

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
    return math.copysign(min(MOST, -NormalDist().inv_cdf(max(beyond, 1e-17))), lead)


def self_play(found: Row) -> list[Row]:
    """The last iterates of the settings that can be judged; "demonstrations" compares other ways to learn with it."""
    rows = [row for row in prepared(found) if row["verdict"] and row["regime"] != "demonstrations"]
    return [row for row in rows if row["iterate"] == row["iterations"]]


def about(found: Row) -> str:
    rows = [row for part in ("starts", "runs") for row in found[part].values()]
    commits = len({row["commit"] for row in rows})
    return (
        f"`{found['command']}` at {commits} commits (benchmarks/results/evidence.json has them), {found['machine']}: "
        f"{len(found['runs'])} runs, {sum(row['seconds'] for row in rows) / 60:.0f} minutes of CPU time for training.\n"
    )


def verdict(found: Row) -> str:
    rows = self_play(found)
    wins = [row for row in rows if row["verdict"] == "above"]
    ahead = [row for row in rows if row["verdict"].startswith("above")]
    below = [row for row in rows if "below" in row["verdict"]]
    counts = [{0: "none is", 1: "one is"}.get(len(some), f"{len(some)} are") for some in (wins, ahead, below)]
    text = (
        f"Of {len(rows)} settings of self-play, each over two to five seeds, **{counts[0]} better than both "
        f"controls at equal entropy**, as surely as {SURE} standard errors of a normal variable; {counts[1]} better "
        f"than the start, and {counts[2]} worse than one of the controls or both."
    )
    for row in wins:
        over_start, over_supervised = (row[name].strip("*") for name in ("ahead of start", "ahead"))
        text += f"\n- {row['from']}: {row['name']} ({over_start} points of {MEASURES[row['by']]} over the start, "
        text += f"{over_supervised} over supervised training)"
    return text + "\n"


# ---------------------------------------------------------------- tables of cases


def regimes(found: Row, names: Sequence[str], everything: bool = False) -> str:
    """The cases of regimes: their leads over both controls. Without `everything`, only those that documents show."""
    rows, notes = [row for row in prepared(found) if row["regime"] in names], []
    if not everything:
        shown = [row for row in rows if row["iterate"] in (1, row["iterations"]) and is_chosen(found, row)]
        rows = [row for row in shown if not left_out(row)]
        if more := sum(not row["is control"] for row in shown) - sum(not row["is control"] for row in rows):
            notes.append(f"{more} more are level with both controls (full tables).")
        notes += [note for name in names if (note := waiting(found, name))]
    measures = " or ".join(dict.fromkeys(MEASURES[row["by"]] for row in rows))
    columns: Columns = {"start": "{from}"} if len({row["start"] for row in rows}) > 1 else {}
    columns |= {"setting": "{label}", measures: "{ahead of start}", "NLL": "{NLL ahead of start}"}
    columns[f"{measures} over supervised"] = "{ahead}"
    if everything:
        columns |= {"NLL over supervised": "{NLL ahead}", "greedy": "{greedy:.1%}", "sampled": "{sampled:.1%}"}
        columns |= {"NLL at T 1": "{nll:.4f}", "entropy": "{entropy:.2f}", "CPU s": "{seconds:.0f}"}
        columns["verdict"] = "{verdict}"
    return "\n".join([table(rows, columns)] * bool(rows) + [" ".join(notes) + "\n"] * bool(notes))


def left_out(row: Row) -> bool:
    """Whether the documents leave a row out: see LEFT_OUT. Supervised training that changes nothing has no row."""
    said = any(word in f"{row['start']}: {row['label']}" for word in LEFT_OUT.get(row["regime"], ()))
    if row["is control"]:
        return said or "*" not in row["ahead of start"] + row["NLL ahead of start"]
    return said and row["verdict"] == "level"


def is_chosen(found: Row, row: Row) -> bool:
    """Whether a row is one of self-play, or the control of one."""
    same = [other for other in found["summary"] if all(other[k] == row[k] for k in ("start", "prompts", "iterations"))]
    return not row["is control"] or row["name"] in [other.get("control") for other in same]


def waiting(found: Row, regime: str) -> str:
    """The cases of self-play in a regime that lack a run."""
    starts_of: dict[str, list[str]] = {}
    for case in CASES:
        if case.regime == regime and not case.is_control and not case.runs.keys() <= found["runs"].keys():
            starts_of.setdefault(case.name, []).append(case.start.removesuffix(", again"))
    text = "; ".join(f"{name} from *{'*, *'.join(missing)}*" for name, missing in starts_of.items())
    return text and f"Not run yet: {text}."


def label_of(found: Row, row: Row) -> str:
    """A setting's name, with what tells it from others of the same name in its regime."""
    others = [r for r in found["summary"] if all(r[k] == row[k] for k in ("regime", "start", "name"))]
    text = row["name"].removeprefix("SPIN, ")
    for key in ("iterate", "prompts", "iterations"):
        if len({r[key] for r in others if key != "iterate" or r["iterations"] == row["iterations"]}) > 1:
            text += f", iterate {row[key]}" if key == "iterate" else f", {key} {row[key]:,}"
    return text


# ---------------------------------------------------------------- other tables


def starts(found: Row) -> str:
    """Starts that are measured several times have one line."""
    rows = [row | {"name": name} for name, row in found["starts"].items()]
    rows = [row for row in rows if row["name"] not in ("shipped", "eight words") and "," not in row["name"]]
    columns: Columns = {"start": "{name}", "greedy": "{greedy:.1%}", "sampled error": "{sampled_error[3]:.1%}"}
    return table(rows, columns | {"NLL": "{nll[3]:.4f}", "entropy": "{entropy[3]:.2f}"})


def placebo(found: Row) -> str:
    """How far a start lies above itself, sampled again, by what its frontier is made of."""
    draws = {"glosses": "one draw at five temperatures", "glosses, four draws": "four draws at nine temperatures"}
    rows = [row for row in prepared(found) if row["regime"] == "placebo"]
    columns: Columns = {"frontier of the start": lambda row: draws[row["from"]]}
    for metric in ("sampled", "content"):
        columns[MEASURES[metric]] = lambda row, metric=metric: cell(row["over start"][metric], 100, 2)
    return table(rows, columns) if rows else "Not run yet: `--only placebo`.\n"


def capacity(found: Row) -> str:
    columns = {"temperature": "{temperature}", "beta": "{beta}", "start": "{nats[0]:.2g}"}
    return table(found["capacity"], columns | {f"iterate {t}": f"{{nats[{t}]:.2g}}" for t in (1, 2, 6)})


def sequences(found: Row) -> str:
    """The first and the last iterate at beta 1, and the last of a larger beta."""
    rows = [game | game["iterates"][t] | {"t": t} for game in found["sequences"] for t in (1, 8)]
    columns: Columns = {
        "beta": "{beta}", "iterate": "{t}", "KL from the data tempered by token": "{by token:.2g}",
        "by response": "{by response:.2g}", "slope": "{slope:.2f}",
        "slope at equal length": "{slope at equal length:.2f}", "nats per further token": "{nats per token:.2f}",
    }  # fmt: skip
    return table([row for row in rows if row["beta"] == 1 or row["t"] > 1], columns)


def first_gradients(found: Row) -> str:
    """Gradients of the greedy opponent. With samples the gradient is that of supervised training: 0 at the data."""
    columns = {"start": "{start}", "supervised norm": "{supervised:.3f}", "norm, greedy": "{spin:.3f}"}
    direction = {"cosine": lambda row: "" if row["start"] == "data" else f"{row['cosine']:+.2f}"}
    return table(found["first gradients"], columns | direction)


def settings(found: Row) -> str:
    """Every setting of self-play: its leads over both controls at equal entropy, in standard errors."""
    spots: dict[str, list[Spot]] = {}
    for row in self_play(found):
        leads = (normal_errors(*lead) for lead in row["judged"])
        spots.setdefault(row["from"], []).append(Spot(f"{row['from']}: {row['label']}", *leads))
    title = f"Every setting of self-play beside both controls, in standard errors (at most {MOST:.0f})"
    return scatter(title, "better than the start", "better than supervised training", spots, SURE)
