"""`python -m benchmarks render`: the tables and the chart of a result, anew."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import chart, tables
from benchmarks.results import Result, read


def write(result: Result, path: Path) -> None:
    """Writes the Markdown and the chart beside the JSON document at `path`."""
    picture = path.with_suffix(".png")
    try:
        drawn = chart.draw(result, picture)
    except ImportError:
        print("no chart: matplotlib is not installed, the bench extra has it")
        drawn = False
    text = tables.markdown(result, title=path.stem, picture=picture.name if drawn else None)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"written: {path.with_suffix('.md')}")


def command(arguments: argparse.Namespace) -> int:
    write(read(arguments.result), arguments.result)
    return 0


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "render", help="write NAME.md and NAME.png anew from NAME.json", description=__doc__
    )
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.set_defaults(command=command)
