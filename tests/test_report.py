"""report/ but the page: tables, what the console prints, warnings of degeneration, and what is drawn on which axes."""

from xml.etree import ElementTree

import pytest

from report import console, figures, panels, tables
from report.figures import Mark, Panel

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> set[str]:
    return {text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}


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
    """Signs are more than 0.1 nats per token lost by real responses, over 5% more cut responses, and skipped steps."""
    before = {"iterate": 1, "nll": 1.0, "truncated": 0.02, "skipped": 0}
    found = console.warnings([before, before | {"iterate": 2} | now])
    assert len(found) == bool(said) and all(text in found[0] for text in said)
    start = {"iterate": 0, "nll": 1.0}  # The start has no share of cut responses.
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
    """Exact match is 0 for long answers; a metric that is 0 for some iterates stays. Metrics of --metric come last."""
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


# ---------------------------------------------------------------- figures


def test_the_plot_has_a_panel_for_each_metric_with_a_mark_for_each_value():
    rows = [
        {"iterate": 0, "nll": 1.5, "nll_se": 0.1},
        {"iterate": 1, "nll": 1.0, "loss": 0.5, "accuracy": None, "pairs": 3},
        {"iterate": 2, "nll": 1.0, "margin": 0.5, "pairs": 3},
    ]
    svg = panels.plot(rows, "a <title> & more")
    assert {"a <title> & more", "NLL", "loss"} <= texts(svg) and not {"pairs", "accuracy"} & texts(svg)
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    assert [sum(p.get("stroke") == "none" for p in g) for g in groups] == [3, 1, 1], "nll, loss, margin"


def test_an_axis_spans_twelve_paired_standard_errors():
    """A change of one error takes a twelfth of the axis; a large change fills it; a share never goes below 0."""
    rows = [
        {"iterate": 0, "sampled": 0.30, "sampled_se": 0.02, "nll": 2.0, "nll_se": 0.1},
        {"iterate": 1, "sampled": 0.31, "sampled_se": 0.02, "nll": 1.0, "nll_se": 0.1}
        | {"since_start": {"sampled": [0.01, 0.01], "nll": [-1.0, 0.01]}},
    ]
    sampled, nll = panels.held_out_panels([rows])
    low, high = figures.span(sampled)
    assert high - low == pytest.approx(0.12) and (low + high) / 2 == pytest.approx(0.31, abs=0.006)
    low, high = figures.span(nll)
    assert high - low < 1.2 and low < 0.99 and high > 2
    zero = Panel("truncated", [[Mark(0, 0.0, 0.0, 0.0), Mark(1, 0.0, 0.0, 0.0)]], ".1%", least=0.05)
    assert figures.span(zero) == (0, pytest.approx(0.05))


def test_gains_at_equal_entropy_have_a_panel_of_their_own():
    """The start is at 0, and a bar is the standard error of the gain."""
    rows = [
        {"iterate": 0, "sampled": 0.3, "sampled_se": 0.02, "entropy": 4.0},
        {"iterate": 1, "sampled": 0.36, "sampled_se": 0.02, "entropy": 3.5}
        | {"at_equal_entropy": {"temperature": 0.875, "sampled": [0.013, 0.004]}},
    ]
    gains = panels.equal_entropy_panel("sampled", [rows])
    assert gains.series == [[(0, 0.0, 0.0, 0.0), (1, 0.013, 0.009, pytest.approx(0.017))]] and gains.better == 1
    assert gains.note == "change from the start: +1.3% \u00b1 0.4%"
    assert "sampled, equal entropy" in texts(panels.plot(rows, "title"))


def test_ticks_are_round_numbers_inside_the_axis():
    assert figures.ticks(0, 3) == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert figures.ticks(0.487, 0.523) == pytest.approx([0.49, 0.5, 0.51, 0.52])


def test_curves_keep_mean_and_extremes():
    rows = [{"loss": loss} for loss in (1.0, 3.0, None, 5.0, -5.0)]
    assert panels.bins(rows, "loss", 3) == [(1.5, 2.0, 1.0, 3.0), (4.5, 0.0, -5.0, 5.0)]
    many = panels.bins([{"loss": 0.0}] * 10_000, "loss", 10_000 / panels.BINS)
    assert len(many) <= panels.BINS + 1


def test_runs_keep_their_colours_and_points_stand_side_by_side():
    marks = [Mark(0, 1.0, 0.9, 1.1), Mark(1, 2.0, 1.9, 2.1)]
    drawn = figures.svg(Panel("NLL", [marks, [], marks], ".4f"))
    groups = [*ElementTree.fromstring(drawn).iter(f"{SVG}g")]
    assert [group.get("class") for group in groups] == ["s0", "s2"]
    first, third = (float(group[0].get("d")[1:].partition(" ")[0]) for group in groups)
    assert third - first == pytest.approx(12)
