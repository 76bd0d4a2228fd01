"""Decode attention: our ops in every layout, the floor, and the peers, case by case."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import check, data, ours, peers
from benchmarks.data import DataSets
from benchmarks.floor import Floors
from benchmarks.prepared import Like, Prepared
from benchmarks.results import Measurement
from benchmarks.runner import Runner
from benchmarks.shapes import Case
from benchmarks.timing import time_replays


def run(
    runner: Runner,
    cases: Sequence[Case],
    systems: Sequence[str],
    ops: Sequence[str] = ours.OPS,
    replays: int | None = None,
    scatter: str = "pool",
    load_peer: Callable[[str], Any] = peers.load,
) -> None:
    floors = Floors(runner.device, runner.host, replays)
    for case in cases:
        _CaseRun(runner, case, replays, scatter).run(systems, ops, floors, load_peer)
        runner.device.release()


class _CaseRun:
    """All measurements of one case. Its data lives as long as this object."""

    def __init__(self, runner: Runner, case: Case, replays: int | None, scatter: str) -> None:
        self.runner, self.case, self.replays, self.scatter = runner, case, replays, scatter
        self.sets: DataSets | None = None
        self.expected: dict[str, np.ndarray] = {}  # by layout
        self.floor: float | None = None
        kv_bytes = case.shape.kv_bytes(case.dtypes)
        self.blank = Measurement(
            suite=case.suite,
            shape=case.shape.name,
            dtypes=case.dtypes,
            problem=str(case.shape),
            moved_bytes=kv_bytes,
            num_sets=data.num_sets(kv_bytes),
            system="",
            op="",
        )

    def run(
        self,
        systems: Sequence[str],
        ops: Sequence[str],
        floors: Floors,
        load_peer: Callable[[str], Any],
    ) -> None:
        if "floor" in systems:
            blank = self._blank(system="floor", op="streaming read")
            self.floor = self.runner.measure(blank, lambda b: self._time_floor(b, floors)).time
        if "ours" in systems:
            for layout in self.case.layouts:
                for op in ops:
                    blank = self._blank(
                        system="ours", op=op, layout=layout, arrays=self.runner.arrays.name
                    )
                    self.runner.measure(blank, self._time_ours)
        for name in systems:
            if name in peers.MODULES:
                self._run_peer(name, load_peer(name))

    def _run_peer(self, name: str, peer: Any) -> None:
        for variant in peer.VARIANTS:
            blank = self._blank(system=name, op=variant, layout=peer.ARRANGEMENT)
            self.runner.measure(blank, lambda b: self._time_peer(b, peer))
            self.runner.device.release()

    def _blank(self, **fields: Any) -> Measurement:
        return dataclasses.replace(self.blank, **fields)

    def _data(self) -> DataSets:
        # Made by the first measurement that wants it, so that a failure is one of a measurement.
        if self.sets is None:
            self.sets = data.build(self.runner.device, self.case, self.scatter)
        return self.sets

    def _time_floor(self, blank: Measurement, floors: Floors) -> Measurement:
        sets = self._data()
        floor = floors.time(sets.pool, sets.kv_bytes, sets.num_sets)
        return dataclasses.replace(blank.timed(floor.timing), note=str(floor.variant))

    def _time_ours(self, blank: Measurement) -> Measurement:
        sets = self._data()
        prepared = ours.prepare(
            blank.op, sets, blank.layout, self.runner.device, self.runner.arrays
        )
        timed = self._timed(blank, prepared)
        if blank.layout not in self.expected:
            self.expected[blank.layout] = check.expected_sample(
                sets, self.runner.host, blank.layout
            )
        found = check.found_sample(prepared.output(), sets)
        return timed.checked(check.relative_error(found, self.expected[blank.layout]))

    def _time_peer(self, blank: Measurement, peer: Any) -> Measurement:
        sets = self._data()
        prepared = peer.prepare(blank.op, sets, self.runner.device)
        timed = self._timed(blank, prepared)
        like: Like = prepared.like
        expected = check.ours_like(like, sets, self.runner.host)
        return timed.checked(check.relative_error(prepared.output(), expected))

    def _timed(self, blank: Measurement, prepared: Prepared) -> Measurement:
        replay = prepared.arrays.capture(prepared.calls)
        return blank.timed(time_replays(replay, self.replays), self.floor)
