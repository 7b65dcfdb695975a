#!/usr/bin/env python3
"""One page for a run, or for several side by side.

    python report.py runs/spin                            rewrites runs/spin/report.html
    python report.py runs/spin runs/sft --out page.html   compares runs on one page, by default report.html
    python report.py runs/spin --figures figures/         each figure as a file, too; --png needs `pip install cairosvg`

A run writes its page by itself after every iterate. The page is one file that needs no network.
"""

import argparse
import sys
from pathlib import Path

from runtime import cli, figures, page, panels, storage


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


def write_figures(folders: list[Path], folder: Path, png: bool) -> int:
    """Every panel of the page as <name>.svg, and as <name>.png with `png`. Returns their number.

    Raises: ValueError where cairosvg is not installed.
    """
    if png:
        try:
            import cairosvg
        except (ImportError, OSError):  # OSError: the cairo library itself is missing
            raise ValueError("--png: expected cairosvg, which `pip install cairosvg` installs") from None
    folder.mkdir(parents=True, exist_ok=True)
    runs = panels.load(folders)
    sections = panels.figures(runs)
    drawn = {one.file: figures.svg(one, standalone=True) for some in sections.values() for one in some}
    drawn["metrics.svg"] = figures.sheet("Held-out metrics", sections["metrics"], [run.name for run in runs])
    for name, text in drawn.items():
        storage.write_text(folder / name, text)
        if png:
            cairosvg.svg2png(text.encode(), write_to=str(folder / name.replace(".svg", ".png")), scale=3)
    return len(drawn)


def main(argv: list[str] | None = None) -> int:
    cli.prepare_streams()
    parser = Parser(prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the run, or here for several runs")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write every figure as SVG into this folder, too")
    parser.add_argument("--png", action="store_true", help="with --figures: as PNG, too")
    try:
        args = parser.parse_args(argv)
        if args.png and not args.figures:
            raise ValueError("--png: expected --figures DIR with it")
        out = args.out or (args.runs[0] / "report.html" if len(args.runs) == 1 else Path("report.html"))
        try:
            text = page.page(args.runs)
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            names = ", ".join(map(str, args.runs))
            raise ValueError(f"{names}: a file has other values than a run writes ({error!r})") from None
        storage.write_text(out, text)
        print(f"The page is {out}.")
        if args.figures:
            print(f"{write_figures(args.runs, args.figures, args.png)} figures are in {args.figures}.")
    except (ValueError, OSError) as error:
        return cli.fail("report.py", error, 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
