"""Any array -> `Array`, a plain description of its memory. The one door for foreign types.

CuPy, torch, JAX and NumPy arrays are recognised by their type, everything else by the DLPack or
CUDA array interface protocol. No framework is imported that the caller has not imported already.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cupy_paged import gpu
from cupy_paged.dtypes import FLOATS, STORAGE, itemsize
from cupy_paged.graph_breaks import breaks_graphs

HOST = None
"""The device of an array in host memory; others are numbered by CUDA."""
META = -1
"""The device of an array without memory: a call with it is checked, and does nothing."""


class Array(NamedTuple):
    """Memory of an array, and who owns it. Strides count elements."""

    name: str
    owner: Any
    framework: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    pointer: int
    device: int | None
    writable: bool
    bits: np.ndarray | None = None  # host memory as a storage array, see dtypes.STORAGE

    @property
    def place(self) -> str:
        return "the host" if self.device is HOST else f"cuda:{self.device}"

    def is_packed(self, first_dim: int = 0) -> bool:
        """Whether dimensions from `first_dim` on are C-contiguous."""
        if 0 in self.shape:
            return True
        expected = 1
        for size, stride in zip(
            reversed(self.shape[first_dim:]), reversed(self.strides[first_dim:]), strict=True
        ):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def alignment(self, dims: Iterator[int] | range, row: int) -> int:
        """The widest access, 16 bytes at most, at which rows of `row` elements can be read.

        Rows begin at multiples of the strides of `dims` from the array's own address.
        """
        size = itemsize(self.dtype)
        bits = self.pointer | row * size | 16
        for dim in dims:
            if self.shape[dim] > 1:
                bits |= self.strides[dim] * size
        return bits & -bits


@breaks_graphs
def array(x: Any, name: str, stream: int | None = None) -> Array:
    """Describes `x`, without copying it.

    name      the argument that `x` was given for, for errors
    stream    pointer of the CUDA stream that will use a GPU array; a producer known by protocol
              alone is told, so that its pending writes come first

    Raises TypeError for what is no array, or holds a dtype unknown here.
    """
    reader = _reader(type(x))
    if reader is None:
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(
                f"{name}: got MaskedArray, needs an array without a mask: pass x.filled(value)"
            )
        raise TypeError(
            f"{name}: got {type(x).__name__}, needs an array "
            "(NumPy, CuPy, torch, JAX, or anything with __dlpack__ or __cuda_array_interface__)"
        )
    found = reader(x, name, stream)
    if found.pointer % itemsize(found.dtype):
        raise ValueError(
            f"{name}: address {found.pointer:#x} is no multiple of a {found.dtype} element's "
            f"{itemsize(found.dtype)} bytes"
        )
    return found


def meta(dtype: str, shape: tuple[int, ...], pointer: int) -> Array:
    """A packed array without memory, to check calls with.

    pointer    an address of its own, as far as its elements would reach
    """
    strides = _packed_strides(shape)
    return Array("", None, "meta", dtype, shape, strides, pointer, META, True)


def is_array(x: Any) -> bool:
    """Whether `array` would read `x`."""
    return _reader(type(x)) is not None


@breaks_graphs
def location(x: Any) -> tuple[str, int | None]:
    """The framework and the device of an array, before a stream is known on which to read it."""
    reader = _reader(type(x))
    if reader is _from_array:
        return x.framework, x.device
    if reader is _from_cupy:
        return "cupy", x.data.device_id
    if reader is _from_torch:
        return "torch", x.device.index if x.device.type == "cuda" else HOST
    if reader is _from_cuda_array_interface:
        return "dlpack", gpu.device_of_pointer(x.__cuda_array_interface__["data"][0])
    if reader in (_from_dlpack, _from_jax) and not _is_traced(x):
        kind, device = x.__dlpack_device__()
        framework = "jax" if reader is _from_jax else "dlpack"
        return framework, device if kind in (_DL_CUDA, _DL_CUDA_MANAGED) else HOST
    return "numpy", HOST


def _is_traced(x: Any) -> bool:
    return any(base.__name__ == "Tracer" for base in type(x).__mro__)


@functools.cache
def _reader(kind: type) -> Callable[[Any, str, int | None], Array] | None:
    roots = {base.__module__.partition(".")[0] for base in kind.__mro__}
    names = {base.__name__ for base in kind.__mro__}
    if kind is Array:
        return _from_array
    if issubclass(kind, np.ndarray):
        # Whose mask nobody here would look at.
        return None if "MaskedArray" in names else _from_numpy
    if "cupy" in roots and "ndarray" in names:
        return _from_cupy
    if "torch" in roots and "Tensor" in names:
        return _from_torch
    if roots & {"jax", "jaxlib"} and names & {"ArrayImpl", "Array", "Tracer"}:
        return _from_jax
    if hasattr(kind, "__dlpack__"):
        return _from_dlpack
    if hasattr(kind, "__cuda_array_interface__"):
        return _from_cuda_array_interface
    return None


# What arguments of these names take; the others are of floats.
_ONE_DTYPE = {
    "block_tables": "int32", "seq_lens": "int32", "cu_seq_lens": "int32", "seq_starts": "int32",
    "slot_mapping": "int64", "block_mapping": "int64", "alibi_slopes": "float32",
    "scale": "float32", "k_scale": "float32", "v_scale": "float32", "output_scale": "float32",
    "query": ", ".join(FLOATS), "lse": "float32",
}  # fmt: skip


def _checked_dtype(dtype: str, name: str) -> str:
    if dtype not in STORAGE:
        which = name.partition("[")[0]  # of a list, for each layer one
        needs = _ONE_DTYPE.get(which, f"{', '.join(FLOATS)}, or fp8 where the argument allows it")
        raise TypeError(f"{name}: dtype {dtype} is not supported, needs {needs}")
    return dtype


def _element_strides(strides: tuple[int, ...], size: int, name: str) -> tuple[int, ...]:
    if any(stride % size for stride in strides):
        raise ValueError(
            f"{name}: strides {strides} bytes are no multiples of the {size}-byte element"
        )
    return tuple(stride // size for stride in strides)


def _packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _from_array(x: Array, name: str, stream: int | None) -> Array:
    return x._replace(name=name, dtype=_checked_dtype(x.dtype, name))


def _on_host(
    name: str, owner: Any, framework: str, dtype: str, bits: np.ndarray, writable: bool
) -> Array:
    strides = _element_strides(bits.strides, bits.itemsize, name)
    return Array(
        name, owner, framework, dtype, bits.shape, strides, bits.ctypes.data, HOST, writable, bits
    )


@functools.cache
def _numpy_dtype_name(dtype: np.dtype) -> str:
    # NumPy takes microseconds to make up a name; bytes in the other order are another dtype here.
    return dtype.name if dtype.isnative else f"{dtype.name} (byte-swapped)"


def _from_numpy(x: np.ndarray, name: str, stream: int | None) -> Array:
    dtype = _checked_dtype(_numpy_dtype_name(x.dtype), name)
    return _on_host(name, x, "numpy", dtype, x.view(STORAGE[dtype]), x.flags.writeable)


def _from_cupy(x: Any, name: str, stream: int | None) -> Array:
    dtype = _numpy_dtype_name(x.dtype)
    if dtype == "void16":
        raise TypeError(
            f"{name}: dtype V2 hides bfloat16; pass the array that CuPy was given instead"
        )
    return Array(
        name,
        x,
        "cupy",
        _checked_dtype(dtype, name),
        x.shape,
        _element_strides(x.strides, x.itemsize, name),
        x.data.ptr,
        x.data.device_id,
        True,
    )


@functools.cache
def _torch_dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _from_torch(x: Any, name: str, stream: int | None) -> Array:
    try:
        return _from_strided_torch(x, name)
    except RuntimeError as error:  # NotImplementedError is one
        said = str(error).partition("\n")[0]
        raise TypeError(
            f"{name}: a torch tensor without strided memory, as sparse ones are, and those inside "
            f"of torch.func's transforms; needs a dense one, outside of them (torch: {said})"
        ) from error


def _from_strided_torch(x: Any, name: str) -> Array:
    dtype = _checked_dtype(_torch_dtype_name(x.dtype), name)
    if x.device.type == "cpu":
        import torch

        # NumPy knows integers of every size, but not all of torch's floats.
        same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = x.detach().view(same_size[x.element_size()]).numpy().view(STORAGE[dtype])
        return _on_host(name, x, "torch", dtype, bits, True)
    if x.device.type != "cuda":
        raise TypeError(f"{name}: torch device {x.device} is not supported, needs cpu or cuda")
    return Array(
        name, x, "torch", dtype, tuple(x.shape), x.stride(), x.data_ptr(), x.device.index, True
    )


def _from_jax(x: Any, name: str, stream: int | None) -> Array:
    if _is_traced(x):
        raise TypeError(
            f"{name}: is being traced by jax.jit, and this op runs on concrete arrays, outside of "
            "it; cupy_paged.interop.jax_ops has ops for the inside"
        )
    devices = x.devices()
    if len(devices) != 1:
        raise ValueError(f"{name}: is spread over {len(devices)} JAX devices, needs to be on one")
    dtype = _checked_dtype(x.dtype.name, name)
    if next(iter(devices)).platform == "cpu":
        return _on_host(name, x, "jax", dtype, np.asarray(x).view(STORAGE[dtype]), False)
    found = _from_dlpack(x, name, stream, unordered=None)
    return found._replace(framework="jax", dtype=dtype, writable=False)


# ---- DLPack, read without consuming the capsule ----
#
# Importers of other libraries refuse float8, and some bfloat16; only the address is needed here.
# Source: dlpack.h, versions 0.8 and 1.1.


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", _DLTensor),
    )


_DL_CPU, _DL_CUDA, _DL_CUDA_HOST, _DL_CUDA_MANAGED = 1, 2, 3, 13
_DL_READ_ONLY = 1
_DL_DTYPES = {
    (0, 8): "int8",
    (0, 32): "int32",
    (0, 64): "int64",
    (1, 8): "uint8",
    (2, 16): "float16",
    (2, 32): "float32",
    (4, 16): "bfloat16",
    (10, 8): "float8_e4m3fn",
    (12, 8): "float8_e5m2",
}

_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _read_capsule(capsule: Any) -> tuple[_DLTensor, bool]:
    """The tensor in a DLPack capsule, and whether it may be written."""
    name = _capsule_name(capsule)
    pointer = _capsule_pointer(capsule, name)
    if name == b"dltensor_versioned":
        managed = _DLManagedTensorVersioned.from_address(pointer)
        return managed.dl_tensor, not managed.flags & _DL_READ_ONLY
    return _DLTensor.from_address(pointer), True


def _capsule(x: Any, **where: int | None) -> Any:
    """A versioned capsule, which knows whether it is read-only, from a producer that has them."""
    try:
        return x.__dlpack__(max_version=(1, 0), **where)
    except TypeError:  # the producer is older than the argument
        return x.__dlpack__(**where)


def _from_dlpack(x: Any, name: str, stream: int | None, unordered: int | None = -1) -> Array:
    """Describes what a DLPack producer holds.

    unordered    the `stream` that tells the producer to order nothing, for a graph's capture: -1 by
                 the protocol. JAX takes that for a pointer; its None waits on the host instead.
    """
    kind, device = x.__dlpack_device__()
    if kind in (_DL_CUDA, _DL_CUDA_MANAGED):
        # DLPack numbers the legacy default stream 1, where CUDA has the null pointer.
        consumer = stream or 1
        if gpu.is_capturing(device, consumer):
            consumer = unordered
        # torch exports from the current device alone, and stream 1 is each device's own.
        with gpu.on(device):
            capsule = _capsule(x, stream=consumer)
    else:
        capsule = _capsule(x)
    tensor, writable = _read_capsule(capsule)
    shape = tuple(tensor.shape[: tensor.ndim])
    dtype = _DL_DTYPES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        dtype = f"(DLPack code {tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes)"
    _checked_dtype(dtype, name)
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else _packed_strides(shape)
    pointer = (tensor.data or 0) + tensor.byte_offset
    owner = (x, capsule)
    if tensor.device_type in (_DL_CUDA, _DL_CUDA_MANAGED):
        device = tensor.device_id
        return Array(name, owner, "dlpack", dtype, shape, strides, pointer, device, writable)
    if tensor.device_type not in (_DL_CPU, _DL_CUDA_HOST):
        raise TypeError(
            f"{name}: DLPack device type {tensor.device_type} is not supported, needs CPU or CUDA"
        )
    bits = _host_bits(pointer, dtype, shape, strides, writable)
    return Array(name, owner, "dlpack", dtype, shape, strides, pointer, HOST, writable, bits)


def _host_bits(
    pointer: int, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], writable: bool
) -> np.ndarray:
    storage = STORAGE[dtype]
    if 0 in shape:
        return np.empty(shape, storage)
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    memory = (ctypes.c_char * (reach * storage.itemsize)).from_address(pointer)
    flat = np.frombuffer(memory, storage)
    byte_strides = tuple(stride * storage.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(flat, shape, byte_strides, writeable=writable)


def _from_cuda_array_interface(x: Any, name: str, stream: int | None) -> Array:
    interface = x.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise TypeError(f"{name}: has a mask, needs an array of which every element counts")
    dtype = np.dtype(interface["typestr"])
    _checked_dtype(_numpy_dtype_name(dtype), name)
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    pointer, read_only = interface["data"]
    if strides is None:
        strides = _packed_strides(shape)
    else:
        strides = _element_strides(tuple(strides), dtype.itemsize, name)
    device, producer = gpu.device_of_pointer(pointer), interface.get("stream")
    # A capture cannot wait for work outside of it.
    if None not in (producer, stream) and not gpu.is_capturing(device, stream):
        gpu.wait(device, stream, producer)
    return Array(name, x, "dlpack", dtype.name, shape, strides, pointer, device, not read_only)
