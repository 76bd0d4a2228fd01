"""Memory that ops allocate: results in the caller's framework, scratch as the stream allows."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, NamedTuple

import numpy as np

from cupy_paged import gpu
from cupy_paged.arrays import HOST, Array, array
from cupy_paged.dtypes import STORAGE


def empty(leader: Array, name: str, shape: tuple[int, ...], dtype: str, stream: int) -> Array:
    """An uninitialised array beside `leader`, to be returned through `hand_over`.

    JAX and unknown producers cannot be written to: they get NumPy or CuPy memory until then.
    """
    if leader.framework == "torch":
        torch = sys.modules["torch"]
        kind = getattr(torch, dtype)
        with _torch_stream(leader, stream):
            made = torch.empty(shape, dtype=kind, device=leader.owner.device)
    elif leader.device is HOST:
        made = np.empty(shape, _numpy_dtype(dtype))
    else:
        with gpu.using(leader.device, stream):
            made = gpu.cupy().empty(shape, _numpy_dtype(dtype))
    return array(made, name, stream)._replace(framework=leader.framework)


def hand_over(made: Array, stream: int) -> Any:
    """The array that `empty` made, as its framework's own type."""
    if made.framework != "jax":
        return made.owner
    import jax

    if made.device is HOST:
        return jax.numpy.asarray(made.owner)
    with gpu.using(made.device, stream):
        return jax.dlpack.from_dlpack(made.owner)


class Scratch(NamedTuple):
    """Device memory that lives as long as `owner` does."""

    owner: Any
    pointer: int


def scratch_memory(leader: Array, num_bytes: int, stream: int) -> Scratch:
    """Device memory for use on `stream`, free for others after the work queued there.

    Torch's allocator gives a capturing graph memory of its own by itself. CuPy's pool would lend
    it to somebody else while the graph still writes there, so a graph captured with CuPy gets
    memory nodes.
    """
    if leader.framework == "torch":
        torch = sys.modules["torch"]
        with _torch_stream(leader, stream):
            made = torch.empty(num_bytes, dtype=torch.uint8, device=leader.owner.device)
        return Scratch(made, made.data_ptr())
    cupy = gpu.cupy()
    with gpu.using(leader.device, stream):
        if gpu.is_capturing(stream):
            memory = cupy.cuda.malloc_async(num_bytes)
        else:
            memory = cupy.cuda.alloc(num_bytes)
    return Scratch(memory, memory.ptr)


def _torch_stream(leader: Array, stream: int) -> contextlib.AbstractContextManager[Any]:
    """Makes a stream torch's current one, so that its allocator knows who will use the memory."""
    cuda = sys.modules["torch"].cuda
    if leader.device is HOST or cuda.current_stream(leader.device).cuda_stream == stream:
        return contextlib.nullcontext()
    return cuda.stream(cuda.ExternalStream(stream, leader.device))


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
