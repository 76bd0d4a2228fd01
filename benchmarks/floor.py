"""The floor: the time of a kernel that does nothing but read so many bytes, once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.timing import Timing, estimate, time_replays

PROBES = 6  # replays by which one variant is chosen


class Variant(NamedTuple):
    """A way to spread the loads over the device; which is fastest depends on the bytes."""

    threads: int
    loads: int  # of 16 bytes, in flight a thread
    blocks_per_sm: int  # 0: one piece a thread block, as many thread blocks as that takes
    far_prefetch: bool = False  # into the L2, to the end of 256 bytes; from sm_80 on

    @property
    def kernel(self) -> str:
        return f"streaming_read<{self.loads}, {str(self.far_prefetch).lower()}>"

    def grid(self, count: int, num_multiprocessors: int) -> int:
        """Thread blocks for `count` loads."""
        pieces = max(math.ceil(count / (self.threads * self.loads)), 1)
        return min(pieces, self.blocks_per_sm * num_multiprocessors or pieces)

    def __str__(self) -> str:
        many = f"{self.blocks_per_sm} thread blocks an SM" if self.blocks_per_sm else "one piece"
        prefetch = ", prefetch" if self.far_prefetch else ""
        return f"{self.threads} threads x {self.loads} loads, {many}{prefetch}"


VARIANTS = (
    Variant(256, 1, 0),
    Variant(256, 2, 0),
    Variant(256, 4, 0),
    Variant(512, 4, 0),
    Variant(256, 8, 0),
    Variant(256, 4, 8),
    Variant(512, 4, 4),
    Variant(512, 8, 2),
    Variant(1024, 4, 2),
    Variant(256, 16, 2),
    Variant(256, 4, 0, True),
    Variant(512, 4, 4, True),
)


def variants(sm: int) -> tuple[Variant, ...]:
    return tuple(v for v in VARIANTS if sm >= 80 or not v.far_prefetch)


class Floor(NamedTuple):
    timing: Timing
    variant: Variant


class Floors:
    """Measures each number of bytes once, in the way of the ops: one graph node a data set."""

    def __init__(self, device: Any, arrays: Any, replays: int | None) -> None:
        self._device, self._arrays, self._replays = device, arrays, replays
        self._known: dict[int, Floor] = {}

    def time(self, memory: Any, num_bytes: int, num_sets: int) -> Floor:
        """The floor of `num_bytes`, read from `num_sets` different places in `memory`."""
        if num_bytes not in self._known:
            self._known[num_bytes] = self._measure(memory, num_bytes, num_sets)
        return self._known[num_bytes]

    def _measure(self, memory: Any, num_bytes: int, num_sets: int) -> Floor:
        def replay(variant: Variant) -> Any:
            return self._arrays.capture(calls(variant))

        def calls(variant: Variant) -> list[Callable[[], None]]:
            return [
                lambda start=i * num_bytes: self._device.read(variant, memory, start, num_bytes)
                for i in range(num_sets)
            ]

        candidates = variants(self._device.sm)
        best = min(candidates, key=lambda variant: estimate(replay(variant), PROBES))
        return Floor(time_replays(replay(best), self._replays), best)
