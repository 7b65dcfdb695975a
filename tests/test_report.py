"""report/tables.py and report/console.py: the tables, changes, examples, and warnings of degeneration."""

import pytest

from report import console, panels, tables


@pytest.mark.parametrize(
    "now, said",
    [
        ({"nll": 1.09, "truncated": 0.06}, ()),
        ({"nll": 1.2}, ("iterate 2: ", "0.20 nats per token", "--lr")),
        ({"truncated": 0.2}, ("iterate 2: ", "from 2% to 20%", "--unfinished")),
        ({"skipped": 3}, ("iterate 2: steps skipped", ": 3; ")),
    ],
)
def test_signs_of_degeneration_are_warned_of(now, said):
    """Real responses that lose more than 0.1 nats per token; cut responses that become 5% more; both only by more."""
    before = {"iterate": 1, "nll": 1.0, "truncated": 0.02, "skipped": 0}
    found = console.warnings([before, before | {"iterate": 2} | now])
    assert len(found) == bool(said) and all(text in found[0] for text in said)
    start = {"iterate": 0, "nll": 1.0}  # which has no share of cut responses
    assert console.warnings([start]) == []
    assert console.warnings([start, {"iterate": 1, "nll": 1.0, "truncated": 1, "skipped": 0}]) == []


def test_a_table_is_aligned():
    """A value that is missing is a dash, and a column that no row has is left out."""
    rows = [{"iterate": 0, "nll": 1.5, "nll_se": 0.25}, {"iterate": 10, "nll": None, "kl": 2.0, "loss": 0.5}]
    table = tables.table_of("Title", rows, ["iterate", "nll", "kl", "sampled"])
    assert table.text().splitlines() == [
        "Title",
        "iterate              nll    kl",
        "      0  1.5000 \u00b1 0.2500     -",
        "     10                -  2.00",
    ]
    assert tables.line(rows[0], ["iterate", "nll", "kl"]) == "iterate 0, nll 1.5000 \u00b1 0.2500"
    held_out, signals = tables.text_of(rows).split("\nTraining signals")
    assert "nll" in held_out and "loss" not in held_out, "metrics of all iterates"
    assert "0.5000" in signals and len(signals.splitlines()) == 3, "signals of all but the start"


def test_metrics_that_are_0_throughout_are_left_out():
    """As exact match is for long answers; one that is 0 for some iterates stays. Those of --metric come last."""
    rows = [
        {"iterate": 0, "greedy_f": 5.0, "greedy_f_se": 1.0, "greedy": 0, "greedy_se": 0, "sampled": 0, "sampled_se": 0},
        {"iterate": 1, "greedy_f": 6.0, "greedy_f_se": 1.0, "greedy": 0, "greedy_se": 0, "sampled": 0.1}
        | {"since_start": {"greedy": (0, 0), "sampled": (0.1, 0.1), "greedy_f": (1.0, 0.5)}},
    ]
    assert tables.telling(rows) == ["sampled", "greedy_f"] and "greedy" in tables.metrics_of(rows)
    assert "greedy  " not in tables.text_of(rows) and "greedy f" in tables.text_of(rows)
    plot = panels.plot(rows, "title")
    assert ">greedy accuracy<" not in plot and ">sampled accuracy<" in plot and ">greedy f<" in plot
    assert tables.number("greedy_f", 1.0, 0.5) == "+1.000 \u00b1 0.500"


def test_changes_are_written_with_sign_and_paired_standard_error():
    row = {
        "iterate": 2,
        "since_start": {"sampled": (0.02, 0.003), "nll": [-0.5, 0.1]},
        "since_last": {"sampled": (0, 0)},
        "at_equal_entropy": {"temperature": 0.931, "sampled": [0.004, 0.003]},
    }
    assert console.changes(row) == [
        "  against the start: sampled +2.0% \u00b1 0.3%, nll -0.5000 \u00b1 0.1000",
        "  against iterate 1: sampled +0.0% \u00b1 0.0%",
        "  against the start at temperature 0.93, of equal entropy: sampled +0.4% \u00b1 0.3%",
    ]
    assert len(console.changes(row | {"iterate": 1})) == 2, "the start is the iterate before"
    assert console.changes({"iterate": 0}) == []
    rows = [{"iterate": 0, "sampled": 0.3, "sampled_se": 0.1}, row | {"sampled": 0.32}, row | {"at_equal_entropy": {}}]
    text = tables.text_of(rows)
    assert "Changes against the start" in text and text.split("equal entropy\n")[1].splitlines()[:2] == [
        "iterate  temperature       sampled",
        "      2         0.93  +0.4% \u00b1 0.3%",
    ]


def test_examples_are_aligned_and_in_one_line_each(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")

    def said(text):
        return [{"prompt": f"p{i}", "references": ["r", "s"], "greedy": text} for i in range(7)]

    text = console.examples({"start": said("a\nb\x1b" + 50 * "c"), "iterate 1": said("d")})
    first, second, third = text.rstrip("\n").split("\n\n")
    assert first.splitlines() == [
        "  prompt     p0",
        "  reference  r | s",
        "  start      a b\\x1bcccccccccccccccc ...",
        "  iterate 1  d",
    ]
    assert "p2" in second and "p4" in third and max(map(len, text.splitlines())) <= 40
