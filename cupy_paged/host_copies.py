"""Host memory for blocks of all layers, and the copies to it and back, beside the steps.

The copies run on a stream of their own, one after the other, so host blocks need no other order.
They share the device's blocks with the steps, and both wait, on their streams, for each other:

- a copy for all that the steps were given before it, and
- what the steps are given later for the copies whose blocks it touches, and for no others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from cupy_paged import gpu, in_flight
from cupy_paged.arrays import HOST, Array
from cupy_paged.block_runs import runs
from cupy_paged.dtypes import itemsize


class _Copy(NamedTuple):
    """Copies that may still be on their way."""

    finished: Any  # the event after them
    touches: np.ndarray  # bool [num_blocks], of the device's blocks
    is_out: bool


class HostCopies:
    """Room for `num_blocks` blocks on the host, pinned if the cache is on a GPU.

    cache    [num_arrays, num_blocks of the device, ...], contiguous: the same blocks of all arrays
             move together
    """

    def __init__(self, cache: Array, num_blocks: int) -> None:
        num_arrays = cache.shape[0]
        self._cache = cache
        self._step, self._block_bytes = (n * itemsize(cache.dtype) for n in cache.strides[:2])
        self._host_step = num_blocks * self._block_bytes
        self._on_way: list[_Copy] = []
        if cache.device is HOST:
            self._bits = np.empty((num_arrays, num_blocks, *cache.shape[2:]), cache.bits.dtype)
            return
        with gpu.on(cache.device):
            # Not from CuPy's pool, which would never give it back to the system.
            self._pinned = gpu.cupy().cuda.PinnedMemory(num_arrays * self._host_step)
            self._stream = gpu.cupy().cuda.Stream(non_blocking=True)

    def copy_out(self, pairs: Iterable[tuple[int, int]], after: Iterable[int]) -> None:
        """Queues copies of blocks to the host, after all that some streams were given so far.

        pairs    (block of the device, block of the host)
        after    pointers of the streams
        """
        pairs = _sorted(pairs)
        if self._cache.device is HOST:
            self._bits[:, pairs[:, 1]] = self._cache.bits[:, pairs[:, 0]]
        else:
            self._copy(pairs, after, is_out=True)

    def copy_in(self, pairs: Iterable[tuple[int, int]], after: Iterable[int]) -> None:
        """Queues copies back.

        pairs    (block of the host, block of the device)
        """
        pairs = _sorted(pairs)
        if self._cache.device is HOST:
            self._cache.bits[:, pairs[:, 1]] = self._bits[:, pairs[:, 0]]
        else:
            self._copy(pairs, after, is_out=False)

    def be_awaited(self, stream: int, *, reads: np.ndarray, writes: np.ndarray) -> None:
        """Lets later work of a stream wait for the copies that it must not overtake.

        reads, writes    blocks of the device that the work touches, any integers
        """
        self._on_way = [copy for copy in self._on_way if not copy.finished.done]
        for copy in reversed(self._on_way):
            if copy.touches[writes].any() or (not copy.is_out and copy.touches[reads].any()):
                with gpu.on(self._cache.device):
                    gpu.cupy().cuda.runtime.streamWaitEvent(stream, copy.finished.ptr)
                break  # those before it are done first

    def _copy(self, pairs: np.ndarray, after: Iterable[int], *, is_out: bool) -> None:
        cache, stream = self._cache, self._stream.ptr
        ends = (cache.pointer, self._step), (self._pinned.ptr, self._host_step)
        (source, source_step), (target, target_step) = ends if is_out else ends[::-1]
        for other in after:
            gpu.wait(cache.device, stream, other)
        size = self._block_bytes
        try:
            starts, lengths = runs(pairs)
            for (first, to), length in zip(pairs[starts].tolist(), lengths.tolist(), strict=True):
                gpu.copy_rows(
                    cache.device, stream, target + to * size, target_step,
                    source + first * size, source_step, length * size, cache.shape[0],
                )  # fmt: skip
        finally:  # whoever interrupts this leaves copies on their way, too
            finished = gpu.record(cache.device, stream)
            # Neither framework nor pool knows of this stream: the cache's last reference may go.
            in_flight.keep_until(finished, [cache.owner, self._pinned, self._stream])
            touches = np.zeros(cache.shape[1], bool)
            touches[pairs[:, 0 if is_out else 1]] = True
            self._on_way.append(_Copy(finished, touches, is_out))


def _sorted(pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)
