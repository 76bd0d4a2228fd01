"""Arrays that queued work still uses, kept alive until it has run.

A framework that knows the stream of an op orders the reuse of memory by itself. JAX and producers
known by protocol alone cannot be told: they take memory back with the last reference to it.
"""

from __future__ import annotations

import atexit
import functools
import threading
from collections import deque
from typing import Any

from cupy_paged import gpu

_queues: dict[tuple[int, int], deque[tuple[Any, list[Any]]]] = {}
"""By (device, stream): events, and what the work before each of them uses; no queue is empty."""
_EVENT = -1  # in place of a device: a queue of one event, by its identity
_lock = threading.Lock()


def keep(device: int, stream: int, owners: list[Any]) -> None:
    """Keeps objects until `stream` has done what it was given so far."""
    _clear_at_exit()
    event = gpu.record(device, stream)
    with _lock:
        _queues.setdefault((device, stream), deque()).append((event, owners))


def keep_until(event: Any, owners: list[Any]) -> None:
    """Keeps objects until an event. Takes no lock, so that the end of an object may call it."""
    _clear_at_exit()
    _queues[_EVENT, id(event)] = deque([(event, owners)])


def release_finished(device: int, stream: int) -> None:
    """Lets go of whatever finished work used, on any stream of any device.

    Does nothing while `stream` is being captured: no event may be asked then.
    """
    if not _queues or gpu.is_capturing(device, stream):
        return
    finished = []  # cleared after the lock: nobody knows what else an owner's end sets off
    with _lock:
        for key, queue in list(_queues.items()):
            while queue and queue[0][0].done:
                finished.append(queue.popleft())
            if not queue:
                del _queues[key]
    with gpu.cupy().cuda.Device():  # JAX leaves another one behind where it frees an array
        finished.clear()


@functools.cache
def _clear_at_exit() -> None:
    # Registered with the first array, so that it runs before the exit of the array's framework.
    # Work that is still queued then loses nothing: nobody takes the memory any more.
    atexit.register(_queues.clear)
