"""Small host arrays on their way to fixed addresses of a device, without waiting for the device."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from cupy_paged import gpu, in_flight

NUM_SLOTS = 4
"""How many sendings may be on their way before the next waits for the first of them."""

_ALIGNMENT = 16
_HOST_TO_DEVICE = 1  # cudaMemcpyKind


class Piece(NamedTuple):
    """Rows to send: `rows` [height, width], C-contiguous, to `pointer`, `pitch` bytes apart."""

    rows: np.ndarray
    pointer: int
    pitch: int


class Staging:
    """Pinned memory of its own, from which a device copies while the host goes on.

    A copy out of pageable memory may wait for all that its stream was given before.

    num_bytes    most that one sending may have, see `num_bytes`
    targets      what owns the memory that is sent to, for as long as something is on its way
    """

    def __init__(self, device: int, num_bytes: int, targets: Iterable[Any] = ()) -> None:
        self._device = device
        with gpu.on(device):
            pinned = [gpu.cupy().cuda.alloc_pinned_memory(num_bytes) for _ in range(NUM_SLOTS)]
        self._memory = [np.frombuffer(memory, np.uint8, num_bytes) for memory in pinned]
        self._sent: list[Any] = [None] * NUM_SLOTS
        self._slots = itertools.cycle(range(NUM_SLOTS))
        # Pools lend both memories again at once, when the last reference to them goes.
        end = weakref.finalize(self, _keep_until_sent, self._sent, [*pinned, *targets])
        end.atexit = False

    @staticmethod
    def num_bytes(*arrays: tuple[int, np.dtype]) -> int:
        """What a sending of arrays of so many elements needs."""
        return sum(-(-size * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for size, dtype in arrays)

    def send(self, stream: int, pieces: list[Piece]) -> None:
        """Queues one copy for each piece; the caller may change the rows at once."""
        slot = next(self._slots)
        if self._sent[slot] is not None:
            self._sent[slot].synchronize()
        memory, start = self._memory[slot], 0
        runtime = gpu.cupy().cuda.runtime
        for rows, pointer, pitch in pieces:
            if rows.size == 0:
                continue
            staged = memory[start : start + rows.nbytes].view(rows.dtype).reshape(rows.shape)
            staged[...] = rows
            width = rows.shape[1] * rows.itemsize
            with gpu.on(self._device):
                runtime.memcpy2DAsync(
                    pointer, pitch, staged.ctypes.data, width, width, rows.shape[0],
                    _HOST_TO_DEVICE, stream,
                )  # fmt: skip
            start += self.num_bytes((rows.size, rows.dtype))
        self._sent[slot] = gpu.record(self._device, stream)


def _keep_until_sent(sent: list[Any], owners: list[Any]) -> None:
    for event in sent:
        if event is not None and not event.done:
            in_flight.keep_until(event, owners)
