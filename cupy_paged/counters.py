"""Counters in device memory that a kernel finds at zero and leaves at zero.

Kernels on one stream may share them, one after the other. A graph gets counters of its own, for
good: nobody knows when it will run.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

from cupy_paged import gpu

SIZE = 4  # bytes of a counter
SLAB = 2**20  # counters that are allocated, and set to zero, at a time
FEWEST = 2**12  # that a stream gets

_lock = threading.Lock()
_kept: list[Any] = []
"""All memory: graphs and queued kernels hold addresses, so that none of it can ever go back."""
_slabs: dict[int, tuple[int, int]] = {}
"""By device: the address of counters, and how many of them are taken."""
_of_streams: dict[tuple[int, int, int], tuple[int, int]] = {}
"""By device, stream and thread: the address of counters, and how many there are."""

_numbers = itertools.count(1)
_thread = threading.local()


def _thread_number() -> int:
    """Of this thread, and never of another: Python's identifiers come back when a thread is gone,
    whose work may still be queued."""
    if not hasattr(_thread, "number"):
        _thread.number = next(_numbers)
    return _thread.number


@contextlib.contextmanager
def counters(device: int, stream: int, count: int) -> Iterator[int]:
    """Address of `count` counters at zero, 32 bits each, for a kernel queued inside the `with`."""
    if not gpu.is_capturing(device, stream):
        yield of_stream(device, stream, count)
        return
    address = _for_graph(device, count)
    if address:
        yield address
        return
    with gpu.memory_nodes(device, stream, count * SIZE) as address:
        gpu.clear(device, stream, address, count * SIZE)
        yield address


def of_stream(device: int, stream: int, count: int) -> int:
    """Address of `count` counters at zero, for a kernel on a stream that is not being captured."""
    # The per-thread default stream has one address and is another stream in every thread.
    thread = _thread_number() if stream == gpu.PER_THREAD_DEFAULT_STREAM else 0
    found = _of_streams.get((device, stream, thread))
    if found is None or found[1] < count:
        # By powers of two, or a batch that grows row by row would leave counters behind each time.
        size = max(FEWEST, 1 << (count - 1).bit_length())
        with _lock:
            found = _of_streams[device, stream, thread] = _take(device, size), size
    if _slabs[device][1] > SLAB // 2:
        with _lock:
            _take(device, 0)  # room for graphs, which can allocate none
    return found[0]


def _take(device: int, count: int) -> int:
    """Counters from a slab of which no more than half is taken before."""
    address, taken = _slabs.get(device, (0, SLAB))
    if taken + count > SLAB // 2:
        memory = gpu.zeros(device, max(SLAB, count) * SIZE)
        _kept.append(memory)
        address, taken = memory.ptr, 0
    _slabs[device] = address, taken + count
    return address + taken * SIZE


def _for_graph(device: int, count: int) -> int | None:
    """None if there is no room; nothing can be allocated and set to zero during a capture."""
    with _lock:
        address, taken = _slabs.get(device, (0, SLAB))
        if taken + count > SLAB:
            return None
        _slabs[device] = address, taken + count
        return address + taken * SIZE
