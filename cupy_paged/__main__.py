"""`python -m cupy_paged`: one subcommand per module that has an `add_parser`."""

import argparse
import sys
from collections.abc import Sequence

from cupy_paged import __version__, info, size

COMMANDS = (info, size)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cupy_paged", description="Paged attention kernels for any GPU array."
    )
    parser.add_argument("--version", action="version", version=f"cupy-paged {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "run"):
        parser.print_help()
        return 0
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
