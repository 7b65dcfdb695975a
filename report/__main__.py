"""One page for a run, or for several side by side.

    python -m report runs/spin                            rewrites runs/spin/report.html
    python -m report runs/spin runs/sft --out page.html   compares runs on one page, by default report.html
    python -m report runs/spin --figures figures/         also writes each figure as a file; --png adds PNG

A run writes its own page after every iterate. The page is one file that needs no network.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from report.figures import sheet, svg
from report.files import load
from report.page import page
from report.panels import figures


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")


def write_figures(folders: Sequence[Path], folder: Path, png: bool) -> int:
    """Writes every panel of the page as <name>.svg, and with `png` as <name>.png. Returns the number of panels."""
    runs = load(folders)
    sections = figures(runs)
    texts = {"metrics": sheet("Held-out metrics", sections["metrics"], [run.name for run in runs])}
    for panel in [panel for panels in sections.values() for panel in panels]:
        texts["".join(c if c.isalnum() else "-" for c in panel.name)] = svg(panel, standalone=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write(folder / f"{name}.svg", text)
        if png:
            import cairosvg

            cairosvg.svg2png(text.encode(), write_to=str(folder / f"{name}.png"), scale=3)
    return len(texts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the run, or here for several runs")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also write every figure as SVG into this folder")
    parser.add_argument("--png", action="store_true", help="with --figures: also as PNG; needs `pip install cairosvg`")
    args = parser.parse_args(argv)
    if args.png and not args.figures:
        parser.error("--png requires --figures DIR")
    try:
        out = args.out or (args.runs[0] / "report.html" if len(args.runs) == 1 else Path("report.html"))
        write(out, page(args.runs))
        print(f"The page is {out}.")
        if args.figures:
            print(f"{write_figures(args.runs, args.figures, args.png)} figures are in {args.figures}.")
    except (ValueError, OSError, ImportError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
