"""The ops that move whole blocks, against a copy of as many bytes by the driver."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import cupy_paged
from benchmarks.data import num_sets
from benchmarks.prepared import Prepared
from benchmarks.results import Measurement
from benchmarks.runner import Runner
from benchmarks.shapes import LAYOUTS, matches
from benchmarks.timing import time_replays
from cupy_paged.cache_memory import cache_shapes
from cupy_paged.dtypes import STORAGE, decode

DTYPE, ITEM = "bfloat16", 2
BLOCK_SIZE, HEADS, HEAD_SIZE = 16, 8, 128
BLOCK_BYTES = ITEM * BLOCK_SIZE * HEADS * HEAD_SIZE
CHECKED_BLOCKS = 16

DEVICE, TO_HOST, FROM_HOST = "device", "to host", "from host"


class Move(NamedTuple):
    """One op on keys and values of `num_bytes` in all, which it reads and writes once."""

    op: str
    num_bytes: int
    way: str = DEVICE
    layout: str = "HND"
    new_layout: str = ""
    scattered: bool = True  # block after block, each from and to anywhere

    @property
    def name(self) -> str:
        return "_".join([self.op, *self.words.replace('"', "").replace(",", "").split()])

    @property
    def words(self) -> str:
        to = f' to "{self.new_layout}"' if self.new_layout else ""
        how = (
            ""
            if self.way == DEVICE
            else f" {self.way}, {'' if self.scattered else 'not '}scattered"
        )
        return f'{self.num_bytes >> 20} MiB "{self.layout}"{to}{how}'

    @property
    def num_blocks(self) -> int:
        """Of the keys, and of the values."""
        return self.num_bytes // (2 * BLOCK_BYTES)


def moves(sizes: Sequence[int] = (64 << 20, 512 << 20)) -> Iterator[Move]:
    for size in sizes:
        yield Move("copy_blocks", size)
        for layout in LAYOUTS:
            yield Move("gather_cache", size, layout=layout)
        for layout, new_layout in (("HND", "NHD"), ("HND", "vllm"), ("vllm", "NHD")):
            yield Move("convert_layout", size, layout=layout, new_layout=new_layout)
        for way in TO_HOST, FROM_HOST:
            for scattered in False, True:
                yield Move("swap_blocks", size, way=way, scattered=scattered)


def tokens(blocks: np.ndarray, layout: str, is_key: bool) -> np.ndarray:
    """Blocks of a layout as [num_blocks, block_size, num_kv_heads, head_size]."""
    if layout == "NHD":
        return blocks
    if layout == "HND":
        return blocks.swapaxes(1, 2)
    if is_key:
        return blocks.transpose(0, 3, 1, 2, 4).reshape(len(blocks), BLOCK_SIZE, HEADS, HEAD_SIZE)
    return blocks.transpose(0, 3, 1, 2)


class MoveSets:
    """Data sets one after the other: what is read, then what is written; keys, then values."""

    def __init__(self, device: Any, move: Move) -> None:
        self.move = move
        self.num_sets = num_sets(2 * move.num_bytes)
        self.memory = device.memory(2 * self.num_sets * move.num_bytes)
        device.fill(self.memory, DTYPE, 0)
        self.pinned = None
        if move.way != DEVICE:
            self.pinned = device.pinned(move.num_bytes)
            self.pinned[:] = np.random.default_rng(0).integers(0, 0x7F, move.num_bytes, np.uint8)
        self.order = np.random.default_rng(1).permutation(move.num_blocks)

    def offset(self, i: int, is_target: bool) -> int:
        return (2 * i + is_target) * self.move.num_bytes

    def caches(self, arrays: Any, i: int, is_target: bool, layout: str) -> list[Any]:
        """Keys and values of a data set."""
        shapes = cache_shapes(layout, self.move.num_blocks, HEADS, HEAD_SIZE, BLOCK_SIZE, DTYPE)
        start, half = self.offset(i, is_target), self.move.num_bytes // 2
        return [
            arrays.view(self.memory, DTYPE, shape, offset=start + n * half)
            for n, shape in enumerate(shapes)
        ]

    def rows(self, arrays: Any, i: int) -> list[Any]:
        """The target of a gather: keys and values, [num_tokens, num_kv_heads, head_size]."""
        shape = self.move.num_blocks * BLOCK_SIZE, HEADS, HEAD_SIZE
        start, half = self.offset(i, True), self.move.num_bytes // 2
        return [arrays.view(self.memory, DTYPE, shape, offset=start + n * half) for n in range(2)]


def _copy(sets: MoveSets, arrays: Any) -> Prepared:
    """Blocks of a data set's first half go to its second half, which is all of one cache."""
    count = 2 * sets.move.num_blocks
    order = np.random.default_rng(2).permutation(count)
    pairs = arrays.array(np.stack([order, count + np.roll(order, 1)], 1).astype(np.int64))

    def cache(i: int) -> Any:
        return arrays.view(
            sets.memory, DTYPE, (2 * count, BLOCK_BYTES // ITEM), offset=sets.offset(i, False)
        )

    checked = slice(0, CHECKED_BLOCKS)
    last = sets.num_sets - 1

    def output() -> np.ndarray:
        return arrays.floats(cache(last), DTYPE, count + np.roll(order, 1)[checked])

    def call(i: int) -> Callable[[], Any]:
        made = cache(i)
        return lambda: cupy_paged.copy_blocks([made], [], pairs)

    calls = [call(i) for i in range(sets.num_sets)]
    expected = arrays.floats(cache(last), DTYPE, order[checked])
    return Prepared(arrays, calls, lambda: output() - expected)


def _gather(sets: MoveSets, arrays: Any) -> Prepared:
    layout, order = sets.move.layout, sets.order
    tables = arrays.array(order[None].astype(np.int32))
    ends = arrays.array(np.array([0, order.size * BLOCK_SIZE], np.int32))

    def call(i: int) -> Callable[[], Any]:
        caches, rows = sets.caches(arrays, i, False, layout), sets.rows(arrays, i)
        return lambda: cupy_paged.gather_cache(*rows, *caches, tables, ends, layout=layout)

    def output() -> np.ndarray:
        last, found = sets.num_sets - 1, []
        caches, rows = sets.caches(arrays, last, False, layout), sets.rows(arrays, last)
        count = min(CHECKED_BLOCKS, order.size)
        for n in range(2):
            want = tokens(arrays.floats(caches[n], DTYPE, order[:count]), layout, n == 0)
            got = arrays.floats(rows[n], DTYPE, np.arange(count * BLOCK_SIZE))
            found.append(got.reshape(want.shape) - want)
        return np.stack(found)

    return Prepared(arrays, [call(i) for i in range(sets.num_sets)], output)


def _convert(sets: MoveSets, arrays: Any) -> Prepared:
    layout, new = sets.move.layout, sets.move.new_layout

    def caches(i: int) -> tuple[list[Any], list[Any]]:
        return sets.caches(arrays, i, False, layout), sets.caches(arrays, i, True, new)

    def call(i: int) -> Callable[[], Any]:
        old, made = caches(i)
        return lambda: cupy_paged.convert_layout(*old, layout, *made, new)

    def output() -> np.ndarray:
        some = sets.order[:CHECKED_BLOCKS]
        old, made = caches(sets.num_sets - 1)
        return np.stack(
            [
                tokens(arrays.floats(made[n], DTYPE, some), new, n == 0)
                - tokens(arrays.floats(old[n], DTYPE, some), layout, n == 0)
                for n in range(2)
            ]
        )

    return Prepared(arrays, [call(i) for i in range(sets.num_sets)], output)


def _swap(sets: MoveSets, arrays: Any) -> Prepared:
    count = 2 * sets.move.num_blocks
    rng = np.random.default_rng(3)
    first, second = (
        rng.permutation(count) if sets.move.scattered else np.arange(count) for _ in range(2)
    )
    pairs = np.stack([first, second], 1).astype(np.int64)
    kept = sets.pinned.reshape(count, BLOCK_BYTES)
    to_host = sets.move.way == TO_HOST

    def blocks(i: int) -> Any:
        return arrays.view(
            sets.memory, "uint8", (count, BLOCK_BYTES), offset=sets.offset(i, not to_host)
        )

    def call(i: int) -> Callable[[], Any]:
        here = blocks(i)
        ends = (here, kept) if to_host else (kept, here)
        return lambda: cupy_paged.swap_blocks(*ends, pairs)

    def output() -> np.ndarray:
        some = slice(0, CHECKED_BLOCKS)
        here, there = (first, second) if to_host else (second, first)
        last = sets.offset(sets.num_sets - 1, not to_host)
        rows = arrays.view(sets.memory, DTYPE, (count, BLOCK_BYTES // ITEM), offset=last)
        old = decode(kept[there[some]].view(STORAGE[DTYPE]), DTYPE, np.float32)
        return arrays.floats(rows, DTYPE, here[some]) - old

    return Prepared(arrays, [call(i) for i in range(sets.num_sets)], output)


PREPARE = {
    "copy_blocks": _copy, "gather_cache": _gather, "convert_layout": _convert, "swap_blocks": _swap,
}  # fmt: skip


def _driver_copies(runner: Runner, sets: MoveSets) -> list[Callable[[], Any]]:
    size = sets.move.num_bytes

    def call(i: int) -> Callable[[], Any]:
        source, target = (
            sets.memory[(start := sets.offset(i, is_target)) : start + size]
            for is_target in (False, True)
        )
        if sets.move.way == TO_HOST:
            target = sets.pinned
        if sets.move.way == FROM_HOST:
            source = sets.pinned
        return lambda: runner.device.copy(target, source)

    return [call(i) for i in range(sets.num_sets)]


def run(
    runner: Runner,
    globs: Sequence[str],
    systems: Sequence[str],
    replays: int | None = None,
    chosen: Sequence[Move] | None = None,
) -> None:
    for move in moves() if chosen is None else chosen:
        if matches(move.name, globs):
            _run_move(runner, move, systems, replays)
            runner.device.release()


def _run_move(runner: Runner, move: Move, systems: Sequence[str], replays: int | None) -> None:
    blank = Measurement(
        suite="moves",
        shape=move.name,
        dtypes="bf16",
        problem=f"{move.op}, {move.words}",
        moved_bytes=2 * move.num_bytes,
        num_sets=num_sets(2 * move.num_bytes),
        system="",
        op="",
    )
    sets = functools.cache(lambda: MoveSets(runner.device, move))  # when something is measured
    floor: float | None = None

    def time_copy(blank: Measurement) -> Measurement:
        calls = _driver_copies(runner, sets())
        return blank.timed(time_replays(runner.host.capture(calls), replays))

    def time_ours(blank: Measurement) -> Measurement:
        prepared = PREPARE[move.op](sets(), runner.host)
        timing = time_replays(prepared.arrays.capture(prepared.calls), replays)
        difference = prepared.output()
        worst = float(np.abs(difference).max()) if np.isfinite(difference).all() else math.inf
        return blank.timed(timing, floor).checked(worst)

    if "floor" in systems:
        row = dataclasses.replace(blank, system="floor", op="driver's copy")
        floor = runner.measure(row, time_copy).time
    if "ours" in systems:
        row = dataclasses.replace(blank, system="ours", op=move.op, arrays=runner.host.name)
        runner.measure(row, time_ours)
