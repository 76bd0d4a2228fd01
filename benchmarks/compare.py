"""`python -m benchmarks compare`: what became slower between two results. Exits 1 if anything did.

A time of ours is a regression if it grew by more than the tolerance and the quartiles of the two
runs do not overlap; where they do, it is within the noise. An op of ours that no longer gives a
right result is a regression as well. The floor and the peers are no code of ours: where their times
changed, the machine did.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import FAILED, OK, SKIPPED, WRONG_RESULT, Measurement, Result, read

TOLERANCE = 0.05
OURS = "ours"


class Pair(NamedTuple):
    old: Measurement
    new: Measurement

    @property
    def ratio(self) -> float:
        """New time over old time: below 1 is faster."""
        return self.new.time / self.old.time

    @property
    def overlaps(self) -> bool:
        return self.new.low <= self.old.high and self.old.low <= self.new.high

    def __str__(self) -> str:
        old, new = self.old, self.new
        words = f"{self.ratio:.3f}  {new.name}: {old.time:.1f} -> {new.time:.1f} us"
        if old.efficiency and new.efficiency:
            words += f", efficiency {old.efficiency:.3f} -> {new.efficiency:.3f}"
        return words


class Comparison(NamedTuple):
    """
    pairs      all that were timed in both
    others     of them, the changed ones that are not ours
    broken     ours that were right in the old result alone
    """

    pairs: list[Pair]
    regressions: list[Pair]
    noise: list[Pair]
    others: list[Pair]
    broken: list[Measurement]
    missing: list[Measurement]
    added: list[Measurement]

    @property
    def is_worse(self) -> bool:
        return bool(self.regressions or self.broken)


def compare(old: Result, new: Result, tolerance: float = TOLERANCE) -> Comparison:
    before = {m.key: m for m in old.measurements if m.status == OK}
    after = {m.key: m for m in new.measurements}
    pairs, broken, missing = [], [], []
    for key, measurement in before.items():
        again = after.get(key)
        if again is None or again.status == SKIPPED:
            missing.append(measurement)
        elif again.status in (FAILED, WRONG_RESULT) and again.system == OURS:
            broken.append(again)
        elif again.status == OK:
            pairs.append(Pair(measurement, again))
    slower = [pair for pair in pairs if pair.new.system == OURS and pair.ratio > 1 + tolerance]
    others = [pair for pair in pairs if pair.new.system != OURS]
    return Comparison(
        pairs,
        [pair for pair in slower if not pair.overlaps],
        [pair for pair in slower if pair.overlaps],
        [p for p in others if not 1 / (1 + tolerance) < p.ratio < 1 + tolerance and not p.overlaps],
        broken,
        missing,
        [m for key, m in after.items() if key not in before and m.status == OK],
    )


def report(old: Result, new: Result, found: Comparison, tolerance: float) -> str:
    lines = []
    devices = old.environment.get("device"), new.environment.get("device")
    if devices[0] != devices[1]:
        lines.append(f"WARNING: other devices: {devices[0]} and {devices[1]}")
    lines += [str(pair) for pair in found.pairs]
    groups: dict[str, list[float]] = {}
    for pair in found.pairs:
        groups.setdefault(f"{pair.new.suite} {pair.new.system}", []).append(pair.ratio)
    lines += ["", "New time over old time, geometric means:"]
    lines += [
        f"{statistics.geometric_mean(r):.3f}  {name}, {len(r)} times" for name, r in groups.items()
    ]
    beyond = f"slower by more than {tolerance:.0%}"
    for title, listed in (
        (f"Regressions, {beyond}:", found.regressions),
        ("No longer right:", found.broken),
        (f"Within the noise, though {beyond}:", found.noise),
        ("Not ours, but changed: was it the same machine?", found.others),
    ):
        if listed:
            lines += ["", title, *(f"  {entry}" for entry in listed)]
    lines.append("")
    lines.append(
        f"{len(found.missing)} measurements only in the old result, {len(found.added)} new"
    )
    verdict = len(found.regressions) + len(found.broken)
    lines.append(f"{verdict} regressions" if verdict else "No regression.")
    return "\n".join(lines)


def command(arguments: argparse.Namespace) -> int:
    old, new = read(arguments.old), read(arguments.new)
    found = compare(old, new, arguments.tolerance)
    print(report(old, new, found, arguments.tolerance))
    if not found.pairs and not found.broken:
        print("The two results have no time in common.")
        return 1
    return int(found.is_worse)


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "compare", help="list what became slower; exit 1 if anything did", description=__doc__
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="%(default)s")
    parser.set_defaults(command=command)
