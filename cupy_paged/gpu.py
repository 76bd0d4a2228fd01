"""CuPy, imported when a GPU array first needs it, and the few CUDA facts that others ask for."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

from cupy_paged import kernel_cache
from cupy_paged.driver import driver_cuda_version
from cupy_paged.requirements import (
    OLDEST_CUPY,
    driver_remedy,
    is_too_old,
    major_of,
    remedy,
)

_INITIALIZATION_ERROR = 3
"""What CUDA answers in a process forked from one that has used it."""
_pid = os.getpid()


@functools.cache
def cupy() -> ModuleType:
    """The CuPy module.

    Raises ImportError, with the command that mends it, if CuPy is missing or too old, and
    RuntimeError if the driver is too old for it, or CUDA was used before this process was forked.
    """
    try:
        with _importing.lock, kernel_cache.lets_cupy_in():
            import cupy
    except ImportError as error:
        raise ImportError(
            f"GPU arrays need CuPy {OLDEST_CUPY} or newer: {_install_hint()}"
        ) from error
    if is_too_old(cupy.__version__):
        raise ImportError(
            f"CuPy {cupy.__version__} is too old, {OLDEST_CUPY} or newer is needed: "
            f"{_install_hint()}"
        )
    if os.getpid() != _pid:
        _refuse_cuda_of_parent(cupy.cuda)
    _refuse_old_driver(cupy.cuda.runtime)
    return cupy


def in_forked_process(forget: Callable[[], None]) -> None:
    """Has `forget` called in each process that is forked: CUDA and its objects stay behind."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)


class _Importing:
    """Lets one thread at a time import CuPy, with an environment that is made up for it."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self.lock = threading.Lock()


_importing = _Importing()

in_forked_process(cupy.cache_clear)
in_forked_process(_importing.renew)  # another thread of the parent may have held it


def _install_hint() -> str:
    return f"{remedy()}; `python -m cupy_paged info` lists what else is missing"


def _refuse_old_driver(runtime: ModuleType) -> None:
    newest, built_for = driver_cuda_version(), runtime.runtimeGetVersion() // 1000
    if newest is None or major_of(newest) >= built_for:  # None: no driver, and so no GPU
        return
    raise RuntimeError(
        f"CuPy is for CUDA {built_for}, and this machine's driver runs CUDA {newest} at most: "
        f"{driver_remedy(built_for)}"
    )


def _refuse_cuda_of_parent(cuda: ModuleType) -> None:
    try:
        cuda.runtime.getDeviceCount()  # starts CUDA, where that was not done before the fork
        cuda.driver.ctxGetCurrent()  # the runtime may answer from its memory
    except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError) as error:
        if error.status == _INITIALIZATION_ERROR:
            raise RuntimeError(
                "CUDA was used before this process was forked, and cannot be used in it: start "
                'processes with multiprocessing.get_context("spawn"), or fork before the first '
                "array on a GPU"
            ) from error


# ---- devices ----


class DeviceLimits(NamedTuple):
    """What kernels are fitted to."""

    sm: int  # compute capability, times ten
    shared_bytes: int  # shared memory that one thread block can have
    num_multiprocessors: int


@functools.cache
def emulated_sm() -> int | None:
    """The older chip whose code is to run, from CUPY_PAGED_EMULATE_SM; a means of testing.

    Read once, because every call asks.
    """
    value = os.environ.get("CUPY_PAGED_EMULATE_SM")
    return int(value) if value else None


def shared_bytes_of(sm: int) -> int:
    """Shared memory that one thread block can have, in bytes, by compute capability.

    Source: CUDA C++ Programming Guide, technical specifications per compute capability.
    """
    by_sm = {70: 96, 72: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227}
    return by_sm.get(sm, 99) * 1024


@functools.cache
def device_limits(device: int, sm: int | None = None) -> DeviceLimits:
    """Limits of a CUDA device, or of compute capability `sm` on it where that is given."""
    attributes = cupy().cuda.Device(device).attributes
    shared_bytes = attributes["MaxSharedMemoryPerBlockOptin"]
    own_sm = int(cupy().cuda.Device(device).compute_capability)
    if sm is not None:
        shared_bytes = min(shared_bytes, shared_bytes_of(sm))
    return DeviceLimits(sm or own_sm, shared_bytes, attributes["MultiProcessorCount"])


def device_of_pointer(pointer: int) -> int:
    """The CUDA device that holds an address; the current one for 0, where an empty array is."""
    if not pointer:
        return cupy().cuda.runtime.getDevice()
    return cupy().cuda.runtime.pointerGetAttributes(pointer).device


_NOTHING = contextlib.nullcontext()
_contexts: dict[int, int] = {}
"""By device: its primary context, which CUDA's runtime and all frameworks share."""


def on(device: int) -> contextlib.AbstractContextManager[Any]:
    """Makes a device the current one, which takes next to no time where it already is.

    Asks the driver, not the runtime: a library that sets contexts by itself, as JAX does, leaves
    one current in its threads that the runtime may not know of.
    """
    if cupy().cuda.driver.ctxGetCurrent() == _contexts.get(device):
        return _NOTHING
    return _on(device)


@contextlib.contextmanager
def _on(device: int) -> Iterator[None]:
    runtime, driver = cupy().cuda.runtime, cupy().cuda.driver
    current, context = runtime.getDevice(), driver.ctxGetCurrent()
    runtime.setDevice(device)
    _contexts[device] = driver.ctxGetCurrent()
    try:
        yield
    finally:
        runtime.setDevice(current)
        if context not in (0, driver.ctxGetCurrent()):
            driver.ctxSetCurrent(context)


# ---- streams, by pointer ----
#
# An event belongs to the device that is current when it is made, and the default streams have the
# same pointers on every device: whoever names a stream names its device, too.

LEGACY_DEFAULT_STREAM = (0, 1)
"""Its two names in CUDA's runtime."""
PER_THREAD_DEFAULT_STREAM = 2


def is_capturing(device: int, stream: int) -> bool:
    """Whether a CUDA graph is being captured from the stream.

    Never from the legacy default stream, and asking about it would fail during other captures.
    """
    if stream in LEGACY_DEFAULT_STREAM:
        return False
    with on(device):
        return bool(cupy().cuda.runtime.streamIsCapturing(stream))


def record(device: int, stream: int) -> Any:
    """An event after the work that `stream` has been given so far."""
    with on(device):
        event = cupy().cuda.Event(disable_timing=True)
        cupy().cuda.runtime.eventRecord(event.ptr, stream)
    return event


def synchronize(device: int, stream: int) -> None:
    """Waits for the work that a stream has been given so far."""
    with on(device):
        cupy().cuda.runtime.streamSynchronize(stream)


def wait(device: int, stream: int, other: int) -> None:
    """Lets later work of `stream` wait for the work that `other` has been given so far."""
    event = record(device, other)  # must outlive the next call
    with on(device):
        cupy().cuda.runtime.streamWaitEvent(stream, event.ptr)


@contextlib.contextmanager
def memory_nodes(device: int, stream: int, num_bytes: int) -> Iterator[int]:
    """Address of memory that belongs to the graph being captured from `stream`.

    It is released in the capture, too: a graph that kept it could not be launched twice.
    """
    runtime = cupy().cuda.runtime
    with on(device):
        pointer = runtime.mallocAsync(num_bytes, stream)
        try:
            yield pointer
        finally:
            runtime.freeAsync(pointer, stream)


def zeros(device: int, num_bytes: int) -> Any:
    """Memory of a device, set to zero, as an object with `ptr` that owns it. Waits for that."""
    cuda = cupy().cuda
    with on(device), cuda.Stream(non_blocking=True) as stream:
        memory = cuda.Memory(num_bytes)
        cuda.runtime.memsetAsync(memory.ptr, 0, num_bytes, stream.ptr)
        stream.synchronize()
    return memory


def clear(device: int, stream: int, pointer: int, num_bytes: int) -> None:
    """Queues setting memory to zero."""
    with on(device):
        cupy().cuda.runtime.memsetAsync(pointer, 0, num_bytes, stream)


def using(device: int, stream: int) -> contextlib.AbstractContextManager[Any]:
    """Makes a device and a stream the current ones of CuPy."""
    here = on(device)
    if here is _NOTHING and cupy().cuda.get_current_stream(device).ptr == stream:
        return _NOTHING
    return _using(here, device, stream)


@contextlib.contextmanager
def _using(
    here: contextlib.AbstractContextManager[Any], device: int, stream: int
) -> Iterator[None]:
    with here:
        if cupy().cuda.get_current_stream().ptr == stream:
            yield
        else:
            with external_stream(stream, device):
                yield


class _Foreign(NamedTuple):
    stream: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream


@functools.lru_cache(maxsize=256)
def external_stream(stream: int, device: int) -> Any:
    """CuPy's object for a stream of a device that somebody else owns."""
    with on(device):
        return cupy().cuda.Stream.from_external(_Foreign(stream))


# ---- copies ----

_MAX_PITCH = 2**31 - 1


def is_pinned(pointer: int) -> bool:
    """Whether an address of host memory is one that CUDA can copy from and to by itself."""
    runtime = cupy().cuda.runtime
    return runtime.pointerGetAttributes(pointer).type in (
        runtime.memoryTypeHost,
        runtime.memoryTypeManaged,
    )


def mapped_address(device: int, pointer: int, num_bytes: int) -> int | None:
    """Where kernels of a device find host memory. None if they cannot reach all of it."""
    runtime = cupy().cuda.runtime
    with on(device):
        begin, last = (
            runtime.pointerGetAttributes(at).devicePointer
            for at in (pointer, pointer + num_bytes - 1)
        )
    return begin if begin and last - begin == num_bytes - 1 else None


def copy_rows(
    device: int,
    stream: int,
    target: int,
    target_step: int,
    source: int,
    source_step: int,
    row_bytes: int,
    num_rows: int,
) -> None:
    """Queues a copy of rows, each of so many bytes, that lie so many bytes apart on either side.

    Addresses may be of a device or of pinned host memory.
    """
    runtime = cupy().cuda.runtime
    kind = runtime.memcpyDefault
    with on(device):
        if target_step == source_step == row_bytes or num_rows == 1:
            runtime.memcpyAsync(target, source, num_rows * row_bytes, kind, stream)
        elif max(target_step, source_step) <= _MAX_PITCH:
            runtime.memcpy2DAsync(
                target, target_step, source, source_step, row_bytes, num_rows, kind, stream
            )
        else:
            for row in range(num_rows):
                at = target + row * target_step, source + row * source_step
                runtime.memcpyAsync(*at, row_bytes, kind, stream)
