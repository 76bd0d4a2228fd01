"""A checked call without its addresses and its stream: kernels, parameters, memory of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cupy_paged import counters, gpu, in_flight
from cupy_paged.arrays import Array
from cupy_paged.launch import Launch, ParamTemplate
from cupy_paged.results import array_maker, scratch_maker, scratch_memory, working_on
from cupy_paged.streams import current_reader, ordered, pointer_of

_NOTHING = contextlib.nullcontext()


class PreparedCall:
    """What queues a call, whatever its addresses and its stream.

    leader        the array whose framework and device run the call
    launches      its kernels, loaded
    params        their parameters, of which the pointers are missing
    made          arrays like those that calls make for their callers, by the place of their pointer
                  among the parameters; before scratch_at
    unread        places of pointers that the kernels are not to see
    scratch       bytes from the beginning of scratch memory to each pointer into it
    scratch_at    place of the first of these pointers
    num_counters  that the kernels need; their pointer is the last one
    """

    def __init__(
        self,
        leader: Array,
        launches: Sequence[Launch],
        params: ParamTemplate,
        *,
        made: Mapping[int, Array] | None = None,
        unread: Iterable[int] = (),
        scratch_bytes: int = 0,
        scratch: tuple[int, ...] = (),
        scratch_at: int = 0,
        num_counters: int = 0,
    ) -> None:
        # No array is kept here, nor what would keep one.
        framework, device = leader.framework, leader.device
        self._framework, self._device = framework, device
        self._launches, self._params = launches, params
        self._made = [
            (place, array_maker(framework, leader.owner, a.shape, a.dtype))
            for place, a in (made or {}).items()
        ]
        self._unread = tuple(unread)
        self._scratch_bytes, self._scratch, self._scratch_at = scratch_bytes, scratch, scratch_at
        self._lend_scratch = None
        if scratch_bytes:
            self._lend_scratch = scratch_maker(framework, device, leader.owner, scratch_bytes)
        self._num_counters = num_counters
        # Each look-up of these would cost about as much as its call.
        cuda = gpu.cupy().cuda
        self._current_context = cuda.driver.ctxGetCurrent
        self._is_capturing = cuda.runtime.streamIsCapturing
        self._current_stream = current_reader(framework)
        with gpu.on(device):
            self._context = self._current_context()

    def first(self, leader: Array, given: Sequence[Any], stream: int, workspace: int = 0) -> None:
        """Queues the call that was checked.

        given        what the call reads and writes, in the order of the pointers, without those
                     into scratch memory and of the counters; what is no `Array` has none
        workspace    address of the caller's memory for scratch and counters; 0: there is none
        """
        arrays = [a for a in given if isinstance(a, Array)]
        pointers = [a.pointer if isinstance(a, Array) else 0 for a in given]
        scratch = work = _NOTHING
        if workspace:
            at = workspace + self._scratch_bytes
            gpu.clear(self._device, stream, at, self._num_counters * counters.SIZE)
            scratch, work = contextlib.nullcontext(workspace), contextlib.nullcontext(at)
        else:
            if self._scratch_bytes:
                scratch = scratch_memory(leader, self._scratch_bytes, stream)
            if self._num_counters:
                work = counters.counters(self._device, stream, self._num_counters)
        with (
            ordered(stream, self._device, self._framework, arrays),
            scratch as scratch_address,
            work as work_address,
            gpu.on(self._device),
        ):
            self._queue(pointers, scratch_address or 0, work_address, stream)

    def again(self, pointers: list[int], stream: Any) -> list[Any] | None:
        """Queues a call like the one that was checked, on the caller's `stream`.

        Returns the arrays that it makes. Returns None, and has done nothing, while the stream is
        being captured: a graph needs memory of its own.
        """
        if stream is None:
            on = self._current_stream(self._device)
            if self._current_context() == self._context:
                return self._again(pointers, on)
        else:
            on = pointer_of(stream)
        allocates = self._made or self._lend_scratch
        with (
            gpu.on(self._device),
            working_on(self._framework, self._device, on) if allocates else _NOTHING,
        ):
            return self._again(pointers, on)

    def _again(self, pointers: list[int], stream: int) -> list[Any] | None:
        if stream not in gpu.LEGACY_DEFAULT_STREAM and self._is_capturing(stream):
            return None
        made = []
        for place, make in self._made:
            pointers[place], array = make()
            made.append(array)
        scratch = work = 0
        if self._lend_scratch is not None:
            scratch, _memory = self._lend_scratch()  # until this returns
        if self._num_counters:
            work = counters.of_stream(self._device, stream, self._num_counters)
        self._queue(pointers, scratch, work, stream)
        in_flight.release_finished(self._device, stream)
        return made

    def _queue(self, pointers: list[int], scratch: int, work: int | None, stream: int) -> None:
        if self._scratch:
            at, offsets = self._scratch_at, self._scratch
            pointers[at:at] = [scratch + offset for offset in offsets] if scratch else offsets
        for place in self._unread:
            pointers[place] = 0
        if work:
            pointers.append(work)
        self._params.queue(self._launches, stream, pointers)
