"""A stand-in for CuPy whose streams run later, side by side, in any order that events allow.

The device's memory is the host's. What is queued on a stream runs when `run` is called, one piece
after the other; between streams, chance decides which comes first. So work that was not made to
wait for other work is sooner or later done before it.
"""

import ctypes
from collections import deque
from types import SimpleNamespace

import numpy as np

from support.fake_cupy import FakeCuPy


class LateCuPy(FakeCuPy):
    """`random` decides; `waits` lists (stream, stream that it was made to wait for)."""

    def __init__(self, random):
        super().__init__()
        self.random = random
        self.waits = []
        self.copies = []  # (stream, bytes of a row, rows)
        self._streams = {}  # its work, in order
        self._last = {}  # record: (stream, done) by event
        late = self

        class Event:
            def __init__(self, disable_timing):
                assert disable_timing
                self.ptr = id(self)
                self._record = None

            @property
            def done(self):
                return late._last[self.ptr].done

            def synchronize(self):
                while not self.done:
                    late.run(1)

        class Stream:
            def __init__(self, non_blocking):
                assert non_blocking
                self.ptr = 1000 + len(late._streams)
                late._streams[self.ptr] = deque()

        class PinnedMemory:
            def __init__(self, num_bytes):
                self._memory = np.full(num_bytes, 0xFF, np.uint8)
                self.ptr = self._memory.ctypes.data

        def record(event, stream):
            made = late._last[event] = SimpleNamespace(stream=stream, done=False)
            late.queue(stream, lambda: setattr(made, "done", True))

        def wait(stream, event):
            record = late._last[event]
            late.waits.append((stream, record.stream))
            late.queue(stream, record)

        def memcpy(to, source, num_bytes, kind, stream):
            memcpy2d(to, num_bytes, source, num_bytes, num_bytes, 1, kind, stream)

        def memcpy2d(to, to_pitch, source, pitch, width, height, kind, stream):
            assert width <= min(to_pitch, pitch)
            late.copies.append((stream, width, height))
            for row in range(height):
                move = to + row * to_pitch, source + row * pitch, width
                late.queue(stream, lambda move=move: ctypes.memmove(*move))

        self.cuda.Event, self.cuda.Stream, self.cuda.PinnedMemory = Event, Stream, PinnedMemory
        self.cuda.alloc_pinned_memory = bytearray
        runtime = self.cuda.runtime
        runtime.eventRecord, runtime.streamWaitEvent = record, wait
        runtime.memcpyAsync, runtime.memcpy2DAsync = memcpy, memcpy2d
        runtime.memcpyDefault = 4

    def queue(self, stream, work):
        """Gives a stream a function to be called, or a record to wait for."""
        self._streams.setdefault(stream, deque()).append(work)

    def run(self, most=None, first=None):
        """Does so many pieces of queued work, or all of it; that of one stream first if it can."""
        while most is None or most > 0:
            ready = [on for on, work in self._streams.items() if work and self._is_ready(work[0])]
            if not ready:
                assert not any(self._streams.values()), "streams wait for each other"
                return
            stream = first if first in ready else self.random.choice(ready)
            work = self._streams[stream].popleft()
            if callable(work):
                work()
            most = most and most - 1

    @staticmethod
    def _is_ready(work):
        return callable(work) or work.done
