"""What the measurements of attention say together: targets missed, and ratios to other systems."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks import published
from benchmarks.results import OK, Measurement

OP = "paged_attention"
"""Which of our ops stands for us beside others."""


class Against(NamedTuple):
    """How many times as fast as another system ours is, over the shapes that both have."""

    other: str
    layout: str
    ratios: dict[str, float]  # by shape

    @property
    def worst(self) -> str:
        return min(self.ratios, key=self.ratios.__getitem__)

    @property
    def geometric_mean(self) -> float:
        return statistics.geometric_mean(self.ratios.values())


def in_order(items: Iterable[str]) -> list[str]:
    """Each once, in the order of its first appearance."""
    return list(dict.fromkeys(items))


def ours(measurements: Sequence[Measurement]) -> list[Measurement]:
    return [m for m in measurements if m.system == "ours" and m.op == OP and m.status == OK]


def below_target(measurements: Sequence[Measurement]) -> list[tuple[Measurement, float]]:
    """Our measurements that miss the efficiency target, with that target."""
    missed = []
    for m in ours(measurements):
        target = published.target_efficiency(m.moved_bytes or 0)
        if m.efficiency is not None and target is not None and m.efficiency < target:
            missed.append((m, target))
    return missed


def against_measured(measurements: Sequence[Measurement]) -> list[Against]:
    """Against the faster variant of each peer in the same run."""
    best: dict[str, dict[str, float]] = {}
    for m in measurements:
        if m.system not in ("ours", "floor") and m.status == OK and m.time:
            times = best.setdefault(m.system, {})
            times[m.shape] = min(m.time, times.get(m.shape, math.inf))
    return _against(
        measurements, {name: {s: 1 / t for s, t in times.items()} for name, times in best.items()}
    )


def against_published(measurements: Sequence[Measurement]) -> list[Against]:
    """Against published times: efficiency over efficiency, as the machine may be another."""
    found = []
    for name, times in published.ATTENTION.items():
        efficiencies = {key: published.FLOORS[key] / time for key, time in times.items()}
        for layout in in_order(m.layout for m in ours(measurements)):
            ratios = {
                m.shape: m.efficiency / efficiencies[m.shape, m.dtypes]
                for m in ours(measurements)
                if m.layout == layout and m.efficiency and (m.shape, m.dtypes) in efficiencies
            }
            if ratios:
                found.append(Against(f"{name}, published", layout, ratios))
    return found


def _against(
    measurements: Sequence[Measurement], speeds: dict[str, dict[str, float]]
) -> list[Against]:
    found = []
    for name, by_shape in speeds.items():
        for layout in in_order(m.layout for m in ours(measurements)):
            ratios = {
                m.shape: 1 / m.time / by_shape[m.shape]
                for m in ours(measurements)
                if m.layout == layout and m.time and m.shape in by_shape
            }
            if ratios:
                found.append(Against(f"{name}, this run", layout, ratios))
    return found
