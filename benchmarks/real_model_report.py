"""What the stored answers of real_model.py say: changes and leads, the rules, tables and figure.

`found` has the facts of every trial, `values` a number of each word, by "model/measure".
"""

from collections.abc import Iterable, Sequence

import measuring
import numpy as np
from documents import Columns, Spot, scatter, table, write_blocks
from evidence_report import normal_errors
from measuring import ROOT, linearised

from evaluate import Row

Values = dict[str, np.ndarray]
Change = tuple[float, float, int]  # (value, its standard error over test words, degrees of freedom of that error)

ARMS = {
    "A": "more supervised training", "B": "SPIN, temperature 1", "C": "SPIN, greedy opponent",
    "D": "supervised, fresh definitions", "F": "DFT", "R": "other words' definitions",
}  # fmt: skip
COLUMNS = {  # measure -> (title, scale, digits)
    "nll": ("NLL", 1, 3), "best_nll": ("NLL at the best T", 1, 3), "summed": ("choice, points", 100, 1),
    "per_token": ("choice per token", 100, 1), "content": ("content F1", 100, 1),
    "content at equal entropy": ("F1 at equal entropy", 100, 1), "length": ("greedy tokens", 1, 1),
    "repeats": ("repeat themselves", 100, 0), "unfinished": ("do not end", 100, 0), "fluency": ("fluency", 1, 2),
}  # fmt: skip
IN_DOCUMENTS = ("nll", "best_nll", "summed", "per_token", "content at equal entropy", "length", "repeats", "unfinished")
QUESTIONS = {"nll": -1, "best_nll": -1, "summed": 1, "per_token": 1}  # 1: larger values are better; -1: smaller ones
SURE = 3.0  # Every seed must lead by so many standard errors, by Student's t.
ENOUGH = 5.0  # Standard errors by which fresh definitions must beat more training, or the test set is too small


def write_all(found: Row, values: Values, size: str) -> None:
    """Writes the tables into the documents, and the figure and a page with all of it beside the results."""
    report = Report(found, values)
    write_blocks(f"smollm2 {size}", report.block)
    if report.trials:
        (ROOT / f"benchmarks/results/smollm2-{size}.svg").write_text(report.figure())
        (ROOT / f"benchmarks/results/smollm2-{size}.md").write_text(report.page())


class Report:
    def __init__(self, found: Row, values: Values) -> None:
        self.found, self.values, self.size = found, values, found["size"]
        self.trials: list[Row] = [{"key": key} | row for key, row in found["trials"].items()]

    def block(self, name: str) -> str:
        """A block of a document."""
        return {"about": self.about, "table": self.changes, "verdict": self.verdict}[name]()

    def page(self) -> str:
        """What is known of all trials: every column, and what the first trials of all arms wrote."""
        title = "# SmolLM2-135M after further training, minus its start\n"
        return "\n".join([title, self.about(), self.changes(COLUMNS), self.verdict(), self.answers()])

    def about(self) -> str:
        size, lengths = self.size, {name: f"{share:.0%}" for name, share in self.found["lengths"].items()}
        done = sum(row["iterate"] == size["iterations"] for row in self.trials)
        again = sum(len(self.rates(arm)) for arm in ARMS) * (size["seeds"] - 1)
        kinds = len(set(self.of_words("start", "kinds")))
        return (
            f"{done} trials, {size['rates'] * len(ARMS) + again - done} not run; {size['train']:,} definitions to "
            f"train on, {size['test']:,} for the NLL, {size['choice']:,} choices of {kinds} kinds "
            f"(the true one is the longest in {lengths['longest']}, the shortest in {lengths['shortest']}, with ties), "
            f"{size['written']} to write; {self.found['machine']}, commit {self.found['commit']}.\n"
        )

    # ------------------------------------------------------------ changes

    def of_words(self, model: str, measure: str, tuning: bool = False) -> np.ndarray:
        """Values of the test words, or of the `tuning` words, whose mean is a model's measure; NLLs per token."""
        values, first = self.values[f"{model}/{measure}"], self.size["tuning"]
        if measure in (*QUESTIONS, "tokens", "kinds"):
            values = values[:first] if tuning else values[first:]
        return linearised(values, self.of_words(model, "tokens", tuning)) if "nll" in measure else values

    def change(self, before: str, now: str, measure: str) -> Change | None:
        """The change of a measure from one model to another on test words."""
        if measure == "content at equal entropy":
            both = [self.values[f"{model}/frontier"] for model in (now, before)]
            if not (shared := measuring.reached(*both)):
                return None
            changes = measuring.lead(*both, "content", shared)
        else:
            changes = self.of_words(now, measure) - self.of_words(before, measure)
        is_choice = measure in ("summed", "per_token")
        return float(changes.mean()), *error_of(changes, self.of_words(now, "kinds") if is_choice else None)

    def changes(self, measures: Iterable[str] = IN_DOCUMENTS) -> str:
        """Every trial, minus the start; trials that differ in the seed share a line."""
        lines: dict[str, list[str]] = {}
        for row in sorted(self.trials, key=lambda row: (row["arm"], row["rate"], row["iterate"], row["seed"])):
            name = f"{row['arm']}, {row['rate'].replace('--', '')}"
            name += f", iterate {row['iterate']}" if self.size["iterations"] > 1 else ""
            lines.setdefault(name, []).append(row["key"])
        columns: Columns = {"minus the start": lambda line: line[0]}
        for measure in measures:
            columns[COLUMNS[measure][0]] = lambda line, measure=measure: of_seeds(
                [change for key in line[1] if (change := self.change("start", key, measure))], measure
            )
        return table(lines.items(), columns)

    # ------------------------------------------------------------ verdicts

    def best(self, arm: str, measure: str) -> Row | None:
        """The trial of the first seed that is best on the tuning words."""
        first = [row for row in self.trials if row["arm"] == arm and row["seed"] == 0]
        sign = QUESTIONS[measure]
        return max(first, key=lambda row: sign * self.of_words(row["key"], measure, tuning=True).mean(), default=None)

    def rates(self, arm: str) -> list[str]:
        """Those at which an arm is best in any of the questions."""
        return list(dict.fromkeys(row["rate"] for measure in QUESTIONS if (row := self.best(arm, measure))))

    def chosen(self, arm: str, measure: str, seed: int) -> str:
        """The trial of a seed at the rate and iterate of the best one, or ""."""
        best = self.best(arm, measure)
        key = best and f"{arm} | {best['rate']} | {seed} | {best['iterate']}"
        return key if key in self.found["trials"] else ""

    def leads(self, arm: str, control: str, measure: str) -> list[Change]:
        """Of an arm over another one or the start, by seed; positive if the arm is better."""
        result = []
        for seed in range(self.size["seeds"]):
            mine = self.chosen(arm, measure, seed)
            theirs = control if control == "start" else self.chosen(control, measure, seed)
            if mine and theirs:
                lead, *error = self.change(theirs, mine, measure)
                result.append((QUESTIONS[measure] * lead, *error))
        return result

    def verdict(self) -> str:
        """Leads of the trials that the tuning words chose, and what the rules say."""
        columns: Columns = {"": " over ".join}
        rulings = []
        for measure in QUESTIONS:
            title = COLUMNS[measure][0]
            columns[title] = lambda pair, measure=measure: of_seeds(self.leads(*pair, measure), measure)
            for arm in "BC":
                over = {control: self.leads(arm, control, measure) for control in ("start", "A", "R")}
                if ruled := ruling(over, self.size["seeds"]):
                    rulings.append(f"{title}, {arm}: {ruled}.")
        pairs = [("D", "A"), ("B", "A"), ("B", "R"), ("C", "A"), ("C", "R")]
        text = table([pair for pair in pairs if self.leads(*pair, "nll")], columns)  # An arm may not have run.
        enough = "large enough" if better(self.leads("D", "A", "nll"), ENOUGH) else "too small"
        first = f"the test set is {enough}" if self.chosen("D", "nll", 0) else "D is missing"
        return f"{text}\nBy the rules {first}. {' '.join(rulings) or 'SPIN is supported in no question.'}\n"

    # ------------------------------------------------------------ to be seen

    def answers(self) -> str:
        """Twelve greedy definitions of the start and of the first trial of each arm. The order of words is random."""
        first = {row["arm"]: row["texts"] for row in reversed(self.trials)}
        texts = {"start": self.found["models"]["start"]["texts"]} | dict(sorted(first.items()))
        columns = {name: lambda i, some=some: some[i].replace("|", "/") for name, some in texts.items()}
        return table(range(min(12, self.size["written"])), columns)

    def figure(self) -> str:
        """Every trial minus the start: the NLL at the best temperature, and the choice. Lines go through the rates."""
        spots: dict[str, list[Spot]] = {}
        for row in sorted(self.trials, key=lambda row: (row["arm"], float(row["rate"].split()[1]))):
            (x, dx, _), (y, dy, _) = (self.change("start", row["key"], measure) for measure in ("best_nll", "summed"))
            others = f"{row['rate'].split()[2:]} {row['seed']} {row['iterate']}"  # what trials of a line share
            spot = Spot(row["key"], x, 100 * y, dx, 100 * dy, others)
            spots.setdefault(f"{row['arm']}: {ARMS[row['arm']]}", []).append(spot)
        title = "SmolLM2-135M after further training, minus its start"
        axes = "NLL, nats per token at the best temperature: worse", "choice of the true definition, points: better"
        return scatter(title, *axes, spots)


def error_of(changes: np.ndarray, kinds: np.ndarray | None) -> tuple[float, int]:
    """The standard error of a mean over test words, and its degrees of freedom.

    Questions of one kind share wrong answers. Of the error over words and the one over kinds the larger one counts,
    since the second is itself uncertain if kinds are few.
    """
    centred = changes - changes.mean()
    sums = [centred] if kinds is None else [centred, np.bincount(np.unique(kinds, return_inverse=True)[1], centred)]
    return max((float((some**2).sum() ** 0.5 / len(changes)), len(some) - 1) for some in sums)


def of_seeds(leads: Sequence[Change], measure: str) -> str:
    """The lead of every seed, with the largest of their standard errors."""
    _, scale, digits = COLUMNS[measure]
    values = ", ".join(f"{scale * value:+.{digits}f}" for value, *_ in leads)
    return f"{values} ± {scale * max(error for _, error, _ in leads):.{digits}f}" if leads else ""


def better(leads: Sequence[Change], by: float = SURE) -> bool:
    return bool(leads) and all(normal_errors(*lead) > by for lead in leads)


def ruling(over: dict[str, Sequence[Change]], seeds: int) -> str:
    """What the rules say about an arm of SPIN, from its leads over the start, A and R."""
    if not better(over["start"]):
        return ""
    if not better(over["A"]):
        return "better than the start"
    done = min(len(over["start"]), len(over["A"]))
    proved = "supported" if done == seeds > 1 else f"supported by {done} of {max(seeds, 2)} seeds"
    if not over["R"]:
        return f"SPIN is {proved}; R was not run"
    return f"SPIN is {proved}" + (", and so is the opponent" if better(over["R"]) else ", its opponent is not")
