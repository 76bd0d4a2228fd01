"""What tests count while they run, for the scoreboard of docs/RELIABILITY.md.

A test asks for the fixture `tally`, and says what it has shown once it has shown it:

    tally("hand-offs", 1000)                       added up over all tests
    tally.most("tokens of a sequence", 2**20)      the largest of all tests
    tally.each("head sizes", 64)                   the different ones, of all tests together

A test that fails counts nothing. What a test says travels as a property of its report, which
pytest-xdist brings from its workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import receipt

PROPERTY = "tally"


def _union(values: list[str], more: list[str]) -> list[str]:
    return sorted({*values, *more}, key=lambda value: (len(value), value))


COMBINE = {"sum": lambda a, b: a + b, "most": max, "each": _union}
"""By the kind of a figure: how what two tests say becomes one figure."""


class Tally:
    """What the fixture is."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def __call__(self, name: str, count: int) -> None:
        self._record(PROPERTY, ("sum", name, int(count)))

    def most(self, name: str, size: int) -> None:
        self._record(PROPERTY, ("most", name, int(size)))

    def each(self, name: str, value: object) -> None:
        self._record(PROPERTY, ("each", name, [str(value)]))


class Figures:
    """What the tests of one session say, by the reports of those that passed."""

    def __init__(self) -> None:
        self._said: dict[str, list[Any]] = {}
        self.failed: set[str] = set()

    def add(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.passed and report.when == "call":
            said = [value for name, value in report.user_properties if name == PROPERTY]
            self._said[report.nodeid] = said

    def totals(self) -> dict[str, dict[str, Any]]:
        """By kind and by name."""
        totals: dict[str, dict[str, Any]] = {kind: {} for kind in COMBINE}
        for test in sorted(self._said.keys() - self.failed):
            for kind, name, value in self._said[test]:
                known = totals[kind]
                known[name] = COMBINE[kind](known[name], value) if name in known else value
        return totals


class HostFigures:
    """Watches one session and writes what the tests that need no GPU have counted: a line of JSON.

    Those that need one leave theirs in the receipt.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._stamp = receipt.stamp("figures", "CPU")
        self._figures = Figures()
        self._result = "not written: the run was stopped"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.nodeid.startswith(f"{receipt.GPU_TESTS.as_posix()}/"):
            self._figures.add(report)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return
        now = receipt.stamp("figures", "CPU")
        if any(now[name] != self._stamp[name] for name in ("sources", "tests")):
            self._result = "not written: the sources changed during the run"
            return
        written = {
            "figures": self._figures.totals(),
            "failed": len(self._figures.failed),
            **self._stamp,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(written) + "\n")
        self._result = f"written to {self._path}"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"figures: {self._result}")
