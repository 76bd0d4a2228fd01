"""One run of the benchmarks: what it may use, how long it may take, and where results go."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.prepared import Unsupported
from benchmarks.results import FAILED, SKIPPED, UNSUPPORTED, Measurement, Result

NOTE_LENGTH = 200


class DeviceLost(Exception):
    """A kernel left the device in a state in which nothing runs any more."""


class Runner:
    """
    device    benchmarks.device.Device, or what stands in for it
    arrays    the framework whose arrays our ops are given
    host      arrays that results are checked by, on the same memory: CuPy's
    path      of the JSON document
    budget    seconds, after which nothing new begins
    """

    def __init__(
        self,
        device: Any,
        arrays: Any,
        host: Any,
        result: Result,
        path: Path,
        budget: float | None = None,
        show: Callable[[str], None] = print,
    ) -> None:
        self.device, self.arrays, self.host = device, arrays, host
        self.result, self.path, self._budget, self._show = result, path, budget, show
        self._start = time.monotonic()

    @property
    def is_over(self) -> bool:
        return self._budget is not None and time.monotonic() - self._start > self._budget

    def add(self, measurement: Measurement) -> None:
        self.result.measurements.append(measurement)
        self.result.write(self.path)
        self._show(f"{time.monotonic() - self._start:6.1f} s  {measurement}")

    def measure(
        self, blank: Measurement, action: Callable[[Measurement], Measurement]
    ) -> Measurement:
        """Adds what `action` makes of a blank measurement; what goes wrong is a result, too."""
        if self.is_over:
            measured = blank.without_time(SKIPPED, "the time budget was spent")
        else:
            try:
                measured = action(blank)
            except Unsupported as error:
                measured = blank.without_time(UNSUPPORTED, str(error))
            except Exception as error:
                measured = blank.without_time(FAILED, _first_line(error))
        self.add(measured)
        if measured.status == FAILED:
            try:
                self.device.synchronize()
            except Exception as error:
                raise DeviceLost(f"after {measured.name}: {_first_line(error)}") from error
        return measured


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:NOTE_LENGTH]
