"""Memory that ops allocate: results in the caller's framework, scratch as the stream allows."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from cupy_paged import gpu
from cupy_paged.arrays import HOST, Array, array
from cupy_paged.dtypes import STORAGE
from cupy_paged.streams import current


def empty(leader: Array, name: str, shape: tuple[int, ...], dtype: str, stream: int) -> Array:
    """An uninitialised array beside `leader`, to be returned through `hand_over`.

    JAX and unknown producers cannot be written to: they get NumPy or CuPy memory until then.
    """
    framework, device = leader.framework, leader.device
    made = blank(framework, device, leader.owner, shape, dtype, stream)
    return array(made, name, stream)._replace(framework=framework)


def blank(
    framework: str,
    device: int | None,
    beside: Any,
    shape: tuple[int, ...],
    dtype: str,
    stream: int,
) -> Any:
    """What `empty` makes, as it is: beside an array of that framework on that device."""
    if framework == "torch":
        torch = sys.modules["torch"]
        with torch_stream(device, stream):
            return torch.empty(shape, dtype=getattr(torch, dtype), device=beside.device)
    if device is HOST:
        return np.empty(shape, _numpy_dtype(dtype))
    with gpu.using(device, stream):
        return gpu.cupy().empty(shape, _numpy_dtype(dtype))


def hand_over(made: Array, stream: int) -> Any:
    """The array that `empty` made, as its framework's own type."""
    if made.framework != "jax":
        return made.owner
    import jax

    if made.device is HOST:
        return jax.numpy.asarray(made.owner)
    with gpu.using(made.device, stream):
        return jax.dlpack.from_dlpack(made.owner)


@contextlib.contextmanager
def scratch_memory(leader: Array, num_bytes: int, stream: int) -> Iterator[int]:
    """Address of device memory beside `leader`, for the work queued on `stream` inside the `with`.

    What a pool gets back it lends again: right on a stream, whose later work runs later, wrong for
    a graph, which writes to the same address with every replay. While one is being captured, its
    scratch becomes part of it. Torch's pool is no exception: it keeps the memory of torch's own
    captures apart, but cannot be asked whether this capture is one of them.
    """
    if gpu.is_capturing(leader.device, stream):
        with gpu.memory_nodes(leader.device, stream, num_bytes) as pointer:
            yield pointer
    else:
        pointer, memory = pool_memory(
            leader.framework, leader.device, leader.owner, num_bytes, stream
        )
        yield pointer
        del memory  # not before


def pool_memory(
    framework: str, device: int, beside: Any, num_bytes: int, stream: int
) -> tuple[int, Any]:
    """Address and owner of memory that a framework's pool lends, until the owner goes.

    Only for a stream that is not being captured.
    """
    if framework == "torch":
        made = blank(framework, device, beside, (num_bytes,), "uint8", stream)
        return made.data_ptr(), made
    with gpu.using(device, stream):
        memory = gpu.cupy().cuda.alloc(num_bytes)
    return memory.ptr, memory


_NOTHING = contextlib.nullcontext()


def torch_stream(device: int | None, stream: int) -> contextlib.AbstractContextManager[Any]:
    """Makes a stream torch's current one, so that its allocator knows who will use the memory."""
    if device is HOST or current("torch", device) == stream:
        return _NOTHING
    cuda = sys.modules["torch"].cuda
    return cuda.stream(cuda.ExternalStream(stream, device))


def _numpy_dtype(dtype: str) -> np.dtype:
    """The dtype of an array of NumPy or CuPy, neither of which has a bfloat16 of its own."""
    if dtype != "bfloat16":
        return STORAGE[dtype]
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            "a bfloat16 result needs ml_dtypes: pip install ml_dtypes, or pass out="
        ) from error
    return np.dtype(ml_dtypes.bfloat16)
