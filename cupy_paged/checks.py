"""Checks of arguments, before any launch. An error names the argument, what it got and needs."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupy_paged.arrays import HOST, Array, array, is_array
from cupy_paged.dtypes import itemsize
from cupy_paged.overlap import sharing

CACHE_BESIDE_JAX = "keep the cache in a CuPy, torch or NumPy array, and share it with JAX by DLPack"
CACHE_OF_JAX = f"{CACHE_BESIDE_JAX}, or let cupy_paged.interop.jax_ops write it"
"""What to do instead of writing into memory of JAX's, for `is_writable`."""

FLOAT32_MAX = float(np.finfo(np.float32).max)
_LARGEST_INTS = 2**31 - 1, 2**63 - 1
_LEAST_SCALE = np.finfo(np.float32).tiny  # kernels take what is below for 0, and divide by it


def is_shape(a: Array, expected: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError unless `a` has the shape; `meaning` spells it, such as "[num_seqs]"."""
    if a.shape != expected:
        raise ValueError(f"{a.name}: shape {a.shape}, needs {meaning} = {expected}")


def has_dims(a: Array, meaning: str) -> None:
    """Raises ValueError unless `a` has as many dimensions as `meaning` spells."""
    dims = meaning.count(",") + 1
    if len(a.shape) != dims:
        raise ValueError(
            f"{a.name}: shape {a.shape} has {len(a.shape)} dimensions, needs {meaning}"
        )


def is_dtype(a: Array, *allowed: str) -> None:
    """Raises TypeError unless `a` has one of the dtypes."""
    if a.dtype not in allowed:
        needs = " or ".join(allowed)
        if a.framework == "jax" and (a.dtype, needs) == ("int32", "int64"):
            needs += ", which JAX has with jax_enable_x64; cupy_paged.interop.jax_ops takes int32"
        raise TypeError(f"{a.name}: dtype {a.dtype}, needs {needs}")


def is_packed(a: Array, first_dim: int = 0) -> None:
    """Raises ValueError unless the dimensions from `first_dim` on are C-contiguous."""
    if not a.is_packed(first_dim):
        which = "" if first_dim == 0 else f" in its dimensions from {first_dim} on"
        raise ValueError(
            f"{a.name}: strides {a.strides} of shape {a.shape}, needs to be contiguous{which}"
        )


def is_writable(a: Array, instead: str) -> None:
    """Raises unless `a` may be written and no two of its elements share memory.

    instead    what to do with an immutable JAX array
    """
    if a.framework == "jax":
        raise TypeError(f"{a.name}: is a jax.Array, which is immutable; {instead}")
    if not a.writable:
        raise ValueError(f"{a.name}: is read-only, needs a writable array")
    if not _are_separate(a.shape, a.strides):
        raise ValueError(
            f"{a.name}: strides {a.strides} of shape {a.shape} make elements share memory "
            "or run backwards, needs separate elements"
        )


@functools.lru_cache(maxsize=256)  # the caches of all layers are alike
def _are_separate(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    extent = 0  # of the dimensions so far, from the innermost, in elements
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride <= extent:
                return False
            extent += (size - 1) * stride
    return True


def is_aligned(a: Array, elements: int) -> None:
    """Raises ValueError unless the array's address is a multiple of so many elements."""
    needed = elements * itemsize(a.dtype)
    if a.pointer % needed:
        raise ValueError(f"{a.name}: address {a.pointer:#x}, needs a multiple of {needed} bytes")


def are_apart(written: Sequence[Array], read: Sequence[Array] = ()) -> None:
    """Raises ValueError if an array that is to be written shares memory with one of the others."""
    if found := sharing(written, read):
        one, other = found
        raise ValueError(f"{one.name}: shares memory with {other.name}, needs its own")


def runs_forward(a: Array) -> None:
    """Raises ValueError for negative strides."""
    if min(a.strides, default=0) < 0:
        raise ValueError(
            f"{a.name}: negative strides {a.strides}, needs an array that runs forward"
        )


def same_place(arrays: list[Array], leader: Array) -> None:
    """Raises ValueError unless all arrays are where `leader` is."""
    for a in arrays:
        if a.device != leader.device:
            raise ValueError(f"{a.name}: is on {a.place}, but {leader.name} is on {leader.place}")


def _spelled(value: Any) -> str:
    """A value for a message: arrays by their type alone, whose contents may be on a device."""
    return (
        repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__
    )


def is_int(value: Any, name: str, at_least: int = -(2**31), at_most: int = 2**31 - 1) -> int:
    """The value as an int; raises TypeError for anything else, ValueError out of bounds."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {_spelled(value)}, needs an int")
    if not at_least <= value <= at_most:
        raise ValueError(f"{name}: got {value}, needs {_range(value, at_least, at_most)}")
    return int(value)


def _range(value: numbers.Integral, at_least: int, at_most: int) -> str:
    """The bounds, for a message; where the upper one is a C type's, only that which is crossed."""
    if at_most in _LARGEST_INTS:
        return f"at least {at_least}" if value < at_least else f"at most {at_most}"
    return str(at_most) if at_least == at_most else f"{at_least} to {at_most}"


def is_finite(value: Any, name: str) -> float:
    """The value as a float; raises TypeError for no number, ValueError beyond float32's range."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {_spelled(value)}, needs a number")
    if not abs(value) <= FLOAT32_MAX:
        raise ValueError(f"{name}: got {value}, needs a finite float32")
    return float(value)


def scale(x: Any, name: str, stream: int) -> float | Array:
    """A quantisation scale: a positive number, or a one-element float32 array.

    What an array on a device holds is not looked into. Raises ValueError or TypeError.
    """
    value = x
    if is_array(x):
        value = read = array(x, name, stream)
        is_dtype(read, "float32")
        if math.prod(read.shape) != 1:
            raise ValueError(f"{name}: shape {read.shape}, needs one element")
        if read.device is not HOST:
            return read
        value = host_scale(read)
    if np.float32(is_finite(value, name)) < _LEAST_SCALE:
        raise ValueError(f"{name}: got {value}, needs a positive float32 that is not subnormal")
    return read if is_array(x) else value


def host_scale(scale: float | Array) -> float:
    """The number that a scale on the host is."""
    return scale.bits.item() if isinstance(scale, Array) else float(scale)
