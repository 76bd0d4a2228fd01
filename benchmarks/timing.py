"""The time of one call: median over replays of something that holds one call per data set."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

WARM_UP = 10_000.0  # microseconds of replays before the first that counts
TARGET = 40_000.0  # microseconds of replays that count
FEWEST, MOST = 5, 200


class Clock(Protocol):
    """Takes stamps in the order of the device's work."""

    def stamp(self) -> Any: ...

    def microseconds(self, first: Any, second: Any) -> float: ...

    def wait(self) -> None: ...


class Replay(Protocol):
    """Work that can be queued again and again: `count` calls at a time."""

    count: int
    clock: Clock

    def launch(self) -> None: ...


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call; low and high are the quartiles."""

    median: float
    low: float
    high: float
    least: float
    most: float
    replays: int


def summarise(samples: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, min(samples), max(samples), len(samples))


def replays_for(microseconds: float) -> int:
    """How many replays of such a length make a measurement."""
    return min(max(math.ceil(TARGET / max(microseconds, 1e-3)), FEWEST), MOST)


def estimate(replay: Replay, launches: int = 3) -> float:
    """Microseconds of one replay, roughly."""
    replay.launch()
    replay.clock.wait()
    # Stamped behind work, so that the way from the host to an idle device is not counted.
    replay.launch()
    first = replay.clock.stamp()
    for _ in range(launches):
        replay.launch()
    last = replay.clock.stamp()
    replay.clock.wait()
    return replay.clock.microseconds(first, last) / launches


def time_replays(replay: Replay, replays: int | None = None) -> Timing:
    """Times back-to-back replays; `replays` of them, or as many as the length asks for."""
    length = estimate(replay)
    for _ in range(min(math.ceil(WARM_UP / max(length, 1e-3)), MOST)):
        replay.launch()
    replay.clock.wait()
    clock, stamps = replay.clock, []
    for _ in range(1 + (replays or replays_for(length))):
        replay.launch()
        stamps.append(clock.stamp())
    clock.wait()
    spans = [clock.microseconds(a, b) for a, b in itertools.pairwise(stamps)]
    return summarise([span / replay.count for span in spans])


class CudaClock:
    """Events on one stream, by its pointer."""

    def __init__(self, stream: int) -> None:
        import cupy

        self._cuda, self._stream = cupy.cuda, stream

    def stamp(self) -> Any:
        event = self._cuda.Event()
        self._cuda.runtime.eventRecord(event.ptr, self._stream)
        return event

    def microseconds(self, first: Any, second: Any) -> float:
        return 1000 * self._cuda.get_elapsed_time(first, second)

    def wait(self) -> None:
        self._cuda.runtime.streamSynchronize(self._stream)


class WallClock:
    """For work that only its framework can wait for; a stamp waits."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait

    def stamp(self) -> float:
        self.wait()
        return time.perf_counter()

    def microseconds(self, first: float, second: float) -> float:
        return (second - first) * 1e6
