"""report/figures.py and report/panels.py: what is drawn, on which axes."""

from xml.etree import ElementTree

import pytest

from report import figures, panels
from report.figures import Mark, Panel, Series

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> set[str]:
    return {text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}


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
    zero = Panel("truncated", [Series([Mark(0, 0.0), Mark(1, 0.0)])], ".1%", least=0.05)
    assert figures.span(zero) == (0, pytest.approx(0.05))


def test_iterates_are_drawn_beside_the_line_of_the_start():
    """The line is the polynomial through the start's temperatures, as far as those around the iterates' entropies."""
    points = [{"temperature": t, "entropy": 4 * t, "sampled": 0.5 - 0.2 * t**2} for t in (0.5, 0.75, 1.0, 1.5)]
    rows = [
        {"iterate": 0, "sampled": 0.3, "sampled_se": 0.02, "entropy": 4.0, "frontier": points},
        {"iterate": 1, "sampled": 0.36, "sampled_se": 0.02, "entropy": 3.5}
        | {"at_equal_entropy": {"temperature": 0.875, "sampled": [0.013, 0.004]}},
    ]
    panel = panels.frontier_panel("sampled", [rows])
    line, iterates = panel.series
    assert panel.x == (3.0, 6.0) == (line.marks[0].x, line.marks[-1].x)
    assert [mark.y for mark in line.marks] == pytest.approx([0.5 - 0.2 * (mark.x / 4) ** 2 for mark in line.marks])
    assert [(m.x, m.y, m.bar) for m in iterates.marks] == [(4.0, 0.3, ()), (3.5, 0.36, (0.356, 0.364))]
    assert figures.svg(panel).count('stroke="none"') == 2, "points of the iterates, none of the line"
    gains = panels.equal_entropy_panel("sampled", [rows])
    assert [(m.x, m.y) for m in gains.series[0].marks] == [(0, 0.0), (1, 0.013)]
    assert gains.note == "change from the start: +1.3% \u00b1 0.4%"
    assert "sampled, equal entropy" in texts(panels.plot(rows, "title"))
    assert panels.near([(4.0, 0.3)], [4.0]) == [] == panels.near([(4.0, 0.3), (4.0, 0.4)], [4.0])


def test_ticks_are_round_numbers_inside_the_axis():
    assert figures.ticks(0, 3) == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert figures.ticks(0.487, 0.523) == pytest.approx([0.49, 0.5, 0.51, 0.52])


def test_curves_keep_mean_and_extremes_and_distributions_their_quantiles():
    marks = figures.bins([(0, 1.0), (1, 3.0), (2, 5.0), (3, -5.0)], 2)
    assert [(m.x, m.y, m.bar) for m in marks] == [(0.5, 2.0, (1.0, 3.0)), (2.5, 0.0, (-5.0, 5.0))]
    assert len(figures.bins([(i, 0.0) for i in range(10_000)], 10_000 / figures.BINS)) <= figures.BINS + 1
    mark = figures.quantiles(7, [*range(101)])
    assert (mark.x, mark.y, mark.bar, mark.thick) == (7, 50, (5, 95), (25, 75))
