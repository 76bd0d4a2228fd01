"""Which stream an op runs on, and in what order with the streams of the arrays it is given.

An op runs on the current stream of the framework that owns the query. Arrays of another framework
may still be written on that framework's stream, and may be reused there as soon as the op returns:
both streams are made to wait for each other. DLPack producers order the first half by themselves;
their arrays are kept until the op has run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cupy_paged import gpu, in_flight
from cupy_paged.arrays import HOST, Array, location


def current(framework: str, device: int) -> int:
    """Pointer of the framework's current stream on a device.

    JAX and producers known by protocol alone have none to offer; they are served on CuPy's.
    """
    return current_reader(framework)(device)


def current_reader(framework: str) -> Callable[[int], int]:
    """What `current` asks of a framework, for whoever asks often."""
    if framework == "torch":
        return sys.modules["torch"]._C._cuda_getCurrentRawStream
    get = gpu.cupy().cuda.get_current_stream
    return lambda device: get(device).ptr


def pointer_of(stream: Any) -> int:
    """Pointer of a caller's `stream=`: CuPy's, torch's, an int, or anything with __cuda_stream__.

    Raises TypeError for anything else.
    """
    if isinstance(stream, int):
        return stream
    for attribute in ("ptr", "cuda_stream"):
        if hasattr(stream, attribute):
            return getattr(stream, attribute)
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return (protocol() if callable(protocol) else protocol)[1]
    raise TypeError(
        f"stream: got {type(stream).__name__}, needs a CuPy or torch stream, "
        "its address as an int, or an object with __cuda_stream__"
    )


def launch_stream(leader: Any, stream: Any) -> int:
    """Pointer of the stream that an op runs on: `stream`, or the current one of the leader's owner.

    0 on the host, which has no streams. Raises TypeError for a `stream` that is none.
    """
    return held_stream(leader, stream)[0]


def held_stream(leader: Any, stream: Any) -> tuple[int, Any]:
    """`launch_stream`, and what must be kept for it to stay a stream.

    An address has no owner, and torch keeps its streams for good.
    """
    framework, device = location(leader)
    if stream is not None:
        return pointer_of(stream), stream
    if device is HOST:
        return 0, None
    if framework == "torch":
        return current(framework, device), None
    found = gpu.cupy().cuda.get_current_stream(device)
    return found.ptr, found


@contextlib.contextmanager
def ordered(stream: int, device: int, owner: str, arrays: Iterable[Array]) -> Iterator[None]:
    """Orders what is queued on `stream` inside the `with` with the streams of all its arrays.

    While a graph is being captured nothing is added: a capture cannot wait for work outside of it,
    and its replays are ordered by whoever launches them.
    """
    others: set[int] = set()
    kept: list[Any] = []
    arrays = list(arrays)
    frameworks = {owner, *(a.framework for a in arrays)}
    is_alone = len(frameworks) == 1 and owner in ("cupy", "torch", "xla")
    if not is_alone and not gpu.is_capturing(device, stream):
        foreign = (frameworks - {owner}) & {"cupy", "torch"}
        others = {current(framework, device) for framework in foreign} - {stream}
        kept = [a.owner for a in arrays if a.framework in ("jax", "dlpack")]
    for other in others:
        gpu.wait(device, stream, other)
    yield
    for other in others:
        gpu.wait(device, other, stream)
    in_flight.release_finished(device, stream)
    if kept:
        in_flight.keep(device, stream, kept)
