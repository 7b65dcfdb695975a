"""runtime/report.py: warnings of degeneration, and the tables."""

from runtime import panels, report


def test_signs_of_degeneration_are_warned_of():
    """Real responses that lose more than 0.1 nats a token; cut responses that become 5% more; both only by more."""
    before = {"iterate": 1, "nll": 1.0, "truncated": 0.02, "skipped": 0}
    assert report.warnings_of([before]) == []
    assert report.warnings_of([before, {"iterate": 2, "nll": 1.09, "truncated": 0.06, "skipped": 0}]) == []
    (lost,) = report.warnings_of([before, {"iterate": 2, "nll": 1.2, "truncated": 0.02, "skipped": 0}])
    assert lost.startswith("iterate 2: ") and "0.20 nats a token" in lost and "--lr" in lost
    (cut,) = report.warnings_of([before, {"iterate": 2, "nll": 1.0, "truncated": 0.2, "skipped": 0}])
    assert "from 2% to 20%" in cut and "--unfinished" in cut
    (skipped,) = report.warnings_of([before, {"iterate": 2, "nll": 1.0, "truncated": 0.02, "skipped": 3}])
    assert skipped.startswith("iterate 2: steps skipped") and ": 3; " in skipped
    start = {"iterate": 0, "nll": 1.0}  # without a rate that another could be compared with
    assert report.warnings_of([start, {"iterate": 1, "nll": 1.0, "truncated": 1, "skipped": 0}]) == []


def test_tables_are_aligned_text_with_standard_errors():
    """A value that is missing is a dash, and a column that no row has is left out."""
    rows = [{"iterate": 0, "nll": 1.5, "nll_se": 0.25}, {"iterate": 10, "nll": None, "kl": 2.0, "loss": 0.5}]
    columns = {"iterate": "d", "nll": ".1f", "kl": ".2f", "sampled": ".1%"}
    assert report.table(rows, columns).splitlines() == [
        "iterate        nll    kl",
        "      0  1.5 \u00b1 0.2     -",
        "     10          -  2.00",
    ]
    assert report.line(rows[0], columns) == "iterate 0, nll 1.5 \u00b1 0.2"
    held_out, signals = report.tables(rows).split("\nTraining signals")
    assert "nll" in held_out and "loss" not in held_out, "metrics of all iterates"
    assert "0.5000" in signals and len(signals.splitlines()) == 3, "signals of all but the start"


def test_metrics_that_are_0_throughout_are_left_out():
    """As exact match is for long answers; one that is 0 for some iterates stays. Those of --metric come last."""
    rows = [
        {"iterate": 0, "greedy": 0, "greedy_se": 0, "sampled": 0, "sampled_se": 0, "greedy_f": 5.0, "greedy_f_se": 1.0},
        {"iterate": 1, "greedy": 0, "greedy_se": 0, "sampled": 0.1, "sampled_se": 0, "greedy_f": 6.0, "nll": 2.0},
    ]
    assert report.telling(rows) == {"iterate": "d", "sampled": ".1%", "nll": ".4f", "greedy_f": ".3f"}
    assert "greedy" in report.columns_of(rows)
    rows[1] |= {"since_start": {"greedy": (0, 0), "sampled": (0.1, 0.1), "greedy_f": (1.0, 0.5)}}
    assert "greedy  " not in report.tables(rows) and "greedy f" in report.tables(rows)
    plot = panels.plot(rows, "title")
    assert ">greedy accuracy<" not in plot and ">sampled accuracy<" in plot and ">greedy f<" in plot
    assert report.change(rows[1], "greedy_f") == "greedy f +1.000 \u00b1 0.500 against the start"


def test_changes_are_written_with_sign_and_paired_standard_error():
    row = {
        "iterate": 2,
        "since_start": {"sampled": (0.02, 0.003), "nll": [-0.5, 0.1]},
        "since_last": {"sampled": (0, 0)},
    }
    assert report.change(row, "sampled") == "sampled +2.0% \u00b1 0.3% against the start"
    assert report.changes(row) == [
        "  against the start: sampled +2.0% \u00b1 0.3%, nll -0.5000 \u00b1 0.1000",
        "  against iterate 1: sampled +0.0% \u00b1 0.0%",
    ]
    assert len(report.changes(row | {"iterate": 1})) == 1, "the start is the iterate before"
    equal = row | {"at_equal_entropy": {"temperature": 0.931, "sampled": [0.004, 0.003]}}
    line = "  against the start at temperature 0.93, of equal entropy: sampled +0.4% \u00b1 0.3%"
    assert report.changes(equal)[-1] == line
    text = report.tables([{"iterate": 0, "sampled": 0.3}, equal | {"sampled": 0.32}, row | {"at_equal_entropy": {}}])
    assert text.split("equal entropy\n")[1].splitlines()[:2] == [
        "iterate  temperature       sampled",
        "      2         0.93  +0.4% \u00b1 0.3%",
    ]
    assert report.changes({"iterate": 0}) == []
    assert "Changes against the start" in report.tables([{"iterate": 0, "nll": 1.0}, row | {"nll": 1.0}])


def test_examples_are_aligned_and_in_one_line_each():
    def said(text):
        return [{"prompt": f"p{i}", "references": ["r", "s"], "greedy": text} for i in range(7)]

    text = report.examples({"start": said("a\nb\x1b" + 50 * "c"), "iterate 1": said("d")}, width=40)
    first, second, third = text.rstrip("\n").split("\n\n")
    assert first.splitlines() == [
        "  prompt     p0",
        "  reference  r | s",
        "  start      a b\\x1bcccccccccccccccc ...",
        "  iterate 1  d",
    ]
    assert "p2" in second and "p4" in third and max(map(len, text.splitlines())) <= 40
