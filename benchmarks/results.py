"""The result of a run: one JSON document, valid at every moment while it grows."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.check import WRONG
from benchmarks.timing import Timing

FORMAT = 1
OK, WRONG_RESULT, UNSUPPORTED, FAILED, SKIPPED = "ok", "wrong", "unsupported", "failed", "skipped"


@dataclass(frozen=True)
class Measurement:
    """One time, or the reason why there is none. Times are microseconds of one call.

    op          what was called, or which variant of a peer
    arrays      the framework of the arguments
    moved_bytes live keys and values; for a merge, all that is read or written
    low, high   the quartiles
    floor       of the same bytes, in the same process
    error       relative: ours against NumPy, a peer against ours
    """

    suite: str
    shape: str
    system: str
    op: str
    dtypes: str = ""
    layout: str = ""
    arrays: str = ""
    problem: str = ""
    moved_bytes: int | None = None
    num_sets: int | None = None
    status: str = OK
    time: float | None = None
    low: float | None = None
    high: float | None = None
    least: float | None = None
    most: float | None = None
    replays: int | None = None
    floor: float | None = None
    efficiency: float | None = None
    error: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What makes it the same measurement in another run."""
        return (
            self.suite, self.shape, self.dtypes, self.layout, self.system, self.op, self.arrays
        )  # fmt: skip

    @property
    def name(self) -> str:
        return " ".join(filter(None, self.key))

    def timed(self, timing: Timing, floor: float | None = None) -> Measurement:
        return dataclasses.replace(
            self,
            time=timing.median,
            low=timing.low,
            high=timing.high,
            least=timing.least,
            most=timing.most,
            replays=timing.replays,
            floor=floor,
            efficiency=floor and floor / timing.median,
        )

    def checked(self, error: float) -> Measurement:
        """With its error; a wrong result keeps its time, but is marked."""
        if not math.isfinite(error):
            return dataclasses.replace(self, status=WRONG_RESULT, note="the result is not finite")
        return dataclasses.replace(self, error=error, status=OK if error < WRONG else WRONG_RESULT)

    def without_time(self, status: str, note: str) -> Measurement:
        return dataclasses.replace(self, status=status, note=note)

    def __str__(self) -> str:
        if self.time is None:
            return f"{self.name}: {self.status}: {self.note}"
        words = [f"{self.name}: {self.time:.1f} us"]
        if self.efficiency is not None:
            words.append(f"({self.efficiency:.3f})")
        if self.error is not None:
            words.append(f"error {self.error:.1e}")
        return " ".join([*words, *([] if self.status == OK else [self.status.upper()])])


@dataclass
class Result:
    """
    environment    device, versions, date, commit
    options        of the command
    systems        each system that was asked for: its version, or why it was not run
    finished       False while the run goes on, and for ever if it was cut short
    """

    environment: Mapping[str, Any]
    options: Mapping[str, Any]
    systems: dict[str, str]
    measurements: list[Measurement]
    finished: bool = False

    def write(self, path: Path) -> None:
        document = {"format": FORMAT, **dataclasses.asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        # In one step, so that whoever reads it meets the old or the new document.
        os.replace(beside, path)


def read(path: Path) -> Result:
    """Raises ValueError for a document of another format."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: is no benchmark result of format {FORMAT}")
    measurements = [Measurement(**fields) for fields in document.pop("measurements")]
    return Result(**document, measurements=measurements)
