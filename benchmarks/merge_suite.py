"""merge_attn_states, against the time of reading as many bytes as it reads and writes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import cupy_paged
from benchmarks.check import relative_error
from benchmarks.data import ALIGNMENT, num_sets
from benchmarks.floor import Floors
from benchmarks.frameworks import Torch
from benchmarks.prepared import Prepared
from benchmarks.results import Measurement
from benchmarks.runner import Runner
from benchmarks.shapes import matches
from benchmarks.timing import time_replays

CHECKED_TOKENS = 128
LOG2_E = math.log2(math.e)


class MergeShape(NamedTuple):
    """bfloat16 states, float32 log-sum-exps."""

    num_tokens: int
    num_heads: int = 32
    head_size: int = 128

    @property
    def name(self) -> str:
        return "x".join(map(str, self))

    @property
    def state(self) -> tuple[int, int, int]:
        return tuple(self)

    @property
    def state_bytes(self) -> int:
        return 2 * math.prod(self)

    @property
    def lse_bytes(self) -> int:
        return 4 * self.num_tokens * self.num_heads

    @property
    def moved_bytes(self) -> int:
        return 3 * (self.state_bytes + self.lse_bytes)


SHAPES = tuple(MergeShape(n) for n in (512, 4096, 16384))


class MergeSets:
    """Data sets one after the other: prefix, suffix, output, and the log-sum-exp of each."""

    def __init__(self, device: Any, shape: MergeShape) -> None:
        self.shape = shape
        self.num_sets = num_sets(shape.moved_bytes)
        self._set_bytes = math.ceil(shape.moved_bytes / ALIGNMENT) * ALIGNMENT
        self.memory = device.memory(self.num_sets * self._set_bytes)
        for i in range(self.num_sets):
            start, states = i * self._set_bytes, 3 * shape.state_bytes
            device.fill(self.memory[start : start + states], "bfloat16", 2 * i)
            end = start + shape.moved_bytes
            device.fill(self.memory[start + states : end], "float32", 2 * i + 1)

    def states(self, arrays: Any, i: int) -> list[Any]:
        """prefix, suffix, output: bfloat16 [num_tokens, num_heads, head_size]"""
        start, size = i * self._set_bytes, self.shape.state_bytes
        return [
            arrays.view(self.memory, "bfloat16", self.shape.state, offset=start + n * size)
            for n in range(3)
        ]

    def lses(self, arrays: Any, i: int, tokens_first: bool = False) -> list[Any]:
        """Of prefix, suffix and output: float32 [num_heads, num_tokens], or the other way."""
        start = i * self._set_bytes + 3 * self.shape.state_bytes
        shape = self.shape.num_heads, self.shape.num_tokens
        return [
            arrays.view(
                self.memory,
                "float32",
                shape[::-1] if tokens_first else shape,
                offset=start + n * self.shape.lse_bytes,
            )
            for n in range(3)
        ]

    def expected(self, host: Any, tokens_first: bool = False) -> np.ndarray:
        """NumPy's result for the first tokens of the last data set."""
        prefix, suffix, _ = self.states(host, self.num_sets - 1)
        lses = self.lses(host, self.num_sets - 1, tokens_first)[:2]
        states = [host.floats(a[:CHECKED_TOKENS], "bfloat16") for a in (prefix, suffix)]
        weights = []
        for lse in lses:
            first = lse[:CHECKED_TOKENS] if tokens_first else lse[:, :CHECKED_TOKENS]
            weight = np.exp(host.floats(first, "float32"))
            weights.append((weight if tokens_first else weight.T)[..., None])
        return (states[0] * weights[0] + states[1] * weights[1]) / (weights[0] + weights[1])


def prepare_ours(sets: MergeSets, arrays: Any) -> Prepared:
    def call(i: int) -> Callable[[], Any]:
        prefix, suffix, output = sets.states(arrays, i)
        prefix_lse, suffix_lse, output_lse = sets.lses(arrays, i)
        return lambda: cupy_paged.merge_attn_states(
            output, prefix, prefix_lse, suffix, suffix_lse, output_lse
        )

    last = sets.states(arrays, sets.num_sets - 1)[2]
    return Prepared(
        arrays,
        [call(i) for i in range(sets.num_sets)],
        lambda: arrays.floats(last[:CHECKED_TOKENS], "bfloat16"),
    )


def prepare_flashinfer(sets: MergeSets) -> Prepared:
    import flashinfer

    arrays = Torch()
    merged: list[Any] = [None] * sets.num_sets

    def call(i: int) -> Callable[[], Any]:
        prefix, suffix, _ = sets.states(arrays, i)
        # Its log-sum-exps are to the base 2, and tokens come first.
        lses = [lse * LOG2_E for lse in sets.lses(arrays, i, tokens_first=True)[:2]]

        def run() -> None:
            merged[i] = flashinfer.merge_state(prefix, lses[0], suffix, lses[1])[0]

        return run

    return Prepared(
        arrays,
        [call(i) for i in range(sets.num_sets)],
        lambda: arrays.floats(merged[-1][:CHECKED_TOKENS], "bfloat16"),
    )


def run(
    runner: Runner,
    globs: Sequence[str],
    systems: Sequence[str],
    replays: int | None = None,
    shapes: Sequence[MergeShape] = SHAPES,
) -> None:
    floors = Floors(runner.device, runner.host, replays)
    for shape in shapes:
        if matches(shape.name, globs):
            _run_shape(runner, shape, systems, replays, floors)
            runner.device.release()


def _run_shape(
    runner: Runner,
    shape: MergeShape,
    systems: Sequence[str],
    replays: int | None,
    floors: Floors,
) -> None:
    blank = Measurement(
        suite="merge",
        shape=shape.name,
        dtypes="bf16",
        problem=shape.name,
        moved_bytes=shape.moved_bytes,
        num_sets=num_sets(shape.moved_bytes),
        system="",
        op="",
    )
    sets = functools.cache(lambda: MergeSets(runner.device, shape))  # when something is measured
    floor: float | None = None

    def time_floor(blank: Measurement) -> Measurement:
        found = floors.time(sets().memory, shape.moved_bytes, sets().num_sets)
        return dataclasses.replace(blank.timed(found.timing), note=str(found.variant))

    def timed(blank: Measurement, prepared: Prepared, tokens_first: bool) -> Measurement:
        timing = time_replays(prepared.arrays.capture(prepared.calls), replays)
        expected = sets().expected(runner.host, tokens_first)
        return blank.timed(timing, floor).checked(relative_error(prepared.output(), expected))

    if "floor" in systems:
        row = dataclasses.replace(blank, system="floor", op="streaming read")
        floor = runner.measure(row, time_floor).time
    if "ours" in systems:
        row = dataclasses.replace(
            blank, system="ours", op="merge_attn_states", arrays=runner.arrays.name
        )
        runner.measure(row, lambda b: timed(b, prepare_ours(sets(), runner.arrays), False))
    if "flashinfer" in systems:
        row = dataclasses.replace(blank, system="flashinfer", op="merge_state")
        runner.measure(row, lambda b: timed(b, prepare_flashinfer(sets()), True))
