"""report/figures.py and report/panels.py: what is drawn, on which axes."""

from xml.etree import ElementTree

import pytest

from report import figures, panels
from report.figures import Mark, Panel

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
