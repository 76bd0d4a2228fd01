"""Memory that ops allocate: results in the caller's framework, scratch as the stream allows."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
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
    if device is HOST and framework != "torch":
        made = np.empty(shape, _numpy_dtype(dtype))
    else:
        with working_on(framework, device, stream):
            _, made = array_maker(framework, leader.owner, shape, dtype)()
    return array(made, name, stream)._replace(framework=framework)


Maker = Callable[[], tuple[int, Any]]
"""Makes memory for the framework's current stream: its address, and what owns it."""


def array_maker(framework: str, beside: Any, shape: tuple[int, ...], dtype: str) -> Maker:
    """Makes torch's or CuPy's uninitialised arrays of this shape, where `beside` is."""
    if framework == "torch":
        torch = sys.modules["torch"]
        empty = functools.partial(
            torch.empty, *shape, dtype=getattr(torch, dtype), device=beside.device
        )

        def make() -> tuple[int, Any]:
            made = empty()
            return made.data_ptr(), made
    else:
        ndarray, dtype = gpu.cupy().ndarray, _numpy_dtype(dtype)

        def make() -> tuple[int, Any]:
            made = ndarray(shape, dtype)
            return made.data.ptr, made

    return make


class _Lent:
    """Memory of torch's pool without a tensor around it."""

    __slots__ = ("address", "give_back")

    def __init__(self, address: int, give_back: Callable[[int], None]) -> None:
        self.address, self.give_back = address, give_back

    def __del__(self) -> None:
        self.give_back(self.address)


def scratch_maker(framework: str, device: int, beside: Any, num_bytes: int) -> Maker:
    """Lends memory of a framework's pool until its owner goes.

    Only for a stream that is not being captured, while the device is the current one.
    """
    if framework == "torch":
        make_tensor = array_maker(framework, beside, (num_bytes,), "uint8")
        torch = sys.modules["torch"]
        torch.cuda.init()  # an array that torch only borrowed may be all it knows of CUDA
        # As torch.cuda.caching_allocator_alloc, which sets the device first, for longer than that.
        current_device, current_stream = (
            torch._C._cuda_getDevice,
            torch._C._cuda_getCurrentRawStream,
        )
        alloc = torch._C._cuda_cudaCachingAllocator_raw_alloc
        delete = torch._C._cuda_cudaCachingAllocator_raw_delete

        def lend() -> tuple[int, Any]:
            if current_device() != device:  # torch may remember another one than CUDA does
                return make_tensor()
            address = alloc(num_bytes, current_stream(device))
            return address, _Lent(address, delete)

        return lend
    alloc = gpu.cupy().cuda.alloc

    def lend() -> tuple[int, Any]:
        memory = alloc(num_bytes)
        return memory.ptr, memory

    return lend


def hand_over(made: Array, leader: Array, stream: int) -> Any:
    """The array that `empty` made beside `leader`, as its framework's own type."""
    if made.framework != "jax":
        return made.owner
    import jax

    if made.device is HOST:
        # JAX's default device is another one where it has a GPU.
        (device,) = leader.owner.devices()
        return jax.device_put(made.owner, device)
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
        framework, device = leader.framework, leader.device
        with gpu.on(device), working_on(framework, device, stream):
            pointer, memory = scratch_maker(framework, device, leader.owner, num_bytes)()
        yield pointer
        del memory  # not before


_NOTHING = contextlib.nullcontext()


def working_on(
    framework: str, device: int | None, stream: int
) -> contextlib.AbstractContextManager[Any]:
    """Makes a stream the framework's current one: its allocator knows who will use the memory."""
    return torch_stream(device, stream) if framework == "torch" else gpu.using(device, stream)


def torch_stream(device: int | None, stream: int) -> contextlib.AbstractContextManager[Any]:
    """Makes a stream torch's current one."""
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
            "bfloat16 arrays of NumPy and CuPy need ml_dtypes: pip install ml_dtypes"
        ) from error
    return np.dtype(ml_dtypes.bfloat16)
