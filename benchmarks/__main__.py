"""`python -m benchmarks`: run, compare, render, accuracy."""

import argparse
import sys
from collections.abc import Sequence

from benchmarks import accuracy, compare, render, run

COMMANDS = (run, compare, render, accuracy)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Benchmarks of cupy_paged, and of its peers."
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.command(arguments)
    except FileNotFoundError as error:
        parser.error(f"{error.filename}: no such file")


if __name__ == "__main__":
    sys.exit(main())
