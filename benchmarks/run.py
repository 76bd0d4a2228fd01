"""`python -m benchmarks run`: measures, and writes a JSON document, tables and a chart."""

from __future__ import annotations

import argparse
import datetime
import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    attention_suite,
    compile_suite,
    environment,
    host_suite,
    merge_suite,
    moves_suite,
    ours,
    peers,
    render,
    shapes,
)
from benchmarks.results import SKIPPED, Result
from benchmarks.runner import DeviceLost, Runner

SUITES = ("anchors", "wide", "merge", "moves", "host", "compile")
SYSTEMS = ("ours", "floor", *peers.MODULES)
RESULTS = Path(__file__).parent / "results"


def one_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads a comma-separated list of names."""

    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown) or 'nothing'}: needs some of {','.join(allowed)}"
            )
        return names

    return parse


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: needs a positive number")
    return number


def replay_count(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text}: needs at least 2, or there is no spread")
    return number


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "run",
        help="measure, and write NAME.json, NAME.md and NAME.png",
        description=__doc__,
    )
    parser.add_argument(
        "--suite",
        nargs="+",
        choices=(*SUITES, "all"),
        default=["anchors"],
        help="what to measure; by default anchors",
    )
    parser.add_argument(
        "--shapes", nargs="+", metavar="GLOB", default=[], help="shapes, by name; by default all"
    )
    parser.add_argument(
        "--systems",
        type=one_of(SYSTEMS),
        metavar=",".join(SYSTEMS),
        default=["ours", "floor"],
        help="by default ours,floor; a system that is not installed is said to be so",
    )
    parser.add_argument(
        "--layouts",
        type=one_of(shapes.LAYOUTS),
        metavar=",".join(shapes.LAYOUTS),
        default=[],
        help="of ours, for every shape; by default those of the suite",
    )
    parser.add_argument(
        "--dtypes",
        type=one_of(tuple(shapes.DTYPES)),
        metavar=",".join(shapes.DTYPES),
        default=[],
        help="of the cache, for every shape; by default those of the suite",
    )
    parser.add_argument(
        "--ops",
        type=one_of(ours.OPS),
        metavar=",".join(ours.OPS),
        default=list(ours.OPS),
        help="of ours; by default all",
    )
    parser.add_argument(
        "--arrays",
        choices=("cupy", "torch"),
        default="cupy",
        help="the framework of our arrays, which captures the graph and lends scratch memory; "
        "by default cupy",
    )
    parser.add_argument(
        "--scatter",
        choices=("pool", "set"),
        default="pool",
        help="blocks of a data set: anywhere in the pool (default), or in a part of their own",
    )
    parser.add_argument(
        "--replays",
        type=replay_count,
        metavar="N",
        help="replays of each graph; by default as many as take 40 ms",
    )
    parser.add_argument(
        "--time-budget", type=positive, metavar="SECONDS", help="begin nothing after so long"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=RESULTS, help="by default benchmarks/results"
    )
    parser.add_argument("--name", help="of the files; by default the suites and the time")
    parser.set_defaults(command=command)


def recorded_options(arguments: argparse.Namespace) -> dict[str, object]:
    """What the result says of the command: all but where it was written to."""
    return {k: v for k, v in vars(arguments).items() if k not in ("command", "out", "name")}


def chosen_suites(names: Sequence[str]) -> list[str]:
    return [name for name in SUITES if name in names or "all" in names]


def find_systems(
    names: Sequence[str], load_peer: Callable = peers.load
) -> tuple[list[str], dict[str, str]]:
    """Those that can run, and for each one its version or why it cannot."""
    ready, found = [], {}
    for name in names:
        if name in peers.MODULES:
            try:
                found[name] = load_peer(name).version()
            except Exception as error:  # a broken installation is as good as none
                found[name] = f"not installed: {error}"
                continue
        ready.append(name)
    return ready, found


def measure(runner: Runner, arguments: argparse.Namespace, systems: Sequence[str]) -> None:
    for suite in chosen_suites(arguments.suite):
        if suite in shapes.SUITES:
            cases = [
                case
                for case in shapes.SUITES[suite](arguments.dtypes, arguments.layouts)
                if shapes.matches(case.shape.name, arguments.shapes)
            ]
            attention_suite.run(
                runner, cases, systems, arguments.ops, arguments.replays, arguments.scatter
            )
        elif suite == "merge":
            merge_suite.run(runner, arguments.shapes, systems, arguments.replays)
        elif suite == "moves":
            moves_suite.run(runner, arguments.shapes, systems, arguments.replays)
        elif suite == "host":
            host_suite.run(runner)
        else:
            compile_suite.run(runner)


def command(arguments: argparse.Namespace) -> int:
    from benchmarks.device import Device
    from benchmarks.frameworks import CuPy, Torch

    try:
        device, host = Device(), CuPy()
        arrays = Torch() if arguments.arrays == "torch" else host
    except Exception as error:  # of the import, or of CUDA's own kinds
        print(f"No GPU to measure on: {error}")
        return 2
    systems, found = find_systems(arguments.systems)
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    name = arguments.name or f"{'-'.join(chosen_suites(arguments.suite))}-{stamp}"
    path = arguments.out / f"{name}.json"
    result = Result(environment.describe(), recorded_options(arguments), found, [])
    print(f"{result.environment['device']}: {path}")
    for peer, version in found.items():
        print(f"{peer}: {version}")

    runner = Runner(device, arrays, host, result, path, arguments.time_budget)
    # Whoever ends the run early still gets tables and a chart of what there is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measure(runner, arguments, systems)
        result.finished = not any(m.status == SKIPPED for m in result.measurements)
    except DeviceLost as error:
        print(f"The device is lost {error}")
        return 1
    finally:
        result.write(path)
        render.write(result, path)
    return 0
