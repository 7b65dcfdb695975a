"""One page for a run, or for several side by side.

    python -m report runs/spin                            rewrites runs/spin/report.html
    python -m report runs/spin runs/sft --out page.html   compares runs on one page, by default report.html
    python -m report runs/spin --figures figures/         also writes each figure as an SVG file

A run writes its own page after every iterate. The page is one file that needs no network.
"""

import argparse
import itertools
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from report.figures import svg
from report.files import RunFiles
from report.page import page
from report.panels import figures


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"report: error: {message}; --help lists all options\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the run, or here for several runs")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also write every figure as SVG into this folder")
    args = parser.parse_args(argv)
    try:
        runs = [RunFiles(folder) for folder in args.runs]
        out = args.out or (args.runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
        out.write_text(page(runs), encoding="utf-8")
        print(f"The page is {out}.")
        if args.figures:
            args.figures.mkdir(parents=True, exist_ok=True)
            for panel in itertools.chain(*figures(runs).values()):
                name = "".join(c if c.isalnum() else "-" for c in panel.name)
                (args.figures / f"{name}.svg").write_text(svg(panel), encoding="utf-8")
            print(f"The figures are in {args.figures}.")
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # In `python -m report ... | true` the shell sees the exit code 141.
    sys.exit(main())
