"""Dtypes by name, and exact conversion to and from the storage of those NumPy lacks.

bfloat16 lives in uint16 arrays and fp8 in uint8 arrays: their bits. A code of such a format is a
sign bit over a magnitude, and the magnitudes 0, 1, 2, ... number the non-negative values in
increasing order. Counted from the smallest binade, each binade adds 2**mantissa_bits codes, so

    magnitude = (exponent - min_exponent) * 2**mantissa_bits + significand

holds for normal and subnormal values alike, and a significand that rounds up to the next power
of two carries into the exponent by itself.

Sources: IEEE 754-2019; OCP 8-bit Floating Point Specification 1.0; PTX ISA, `cvt`.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

STORAGE: dict[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float32": np.dtype(np.float32),
    "float8_e4m3fn": np.dtype(np.uint8),
    "float8_e5m2": np.dtype(np.uint8),
    "uint8": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
}
"""The NumPy dtype that holds an array of each dtype."""

FLOATS = ("float16", "bfloat16", "float32")
"""Dtypes of queries, keys, values and outputs."""

FP8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""The dtype behind each quantised `kv_cache_dtype`."""


class _Format(NamedTuple):
    mantissa_bits: int
    min_exponent: int  # of the smallest normal value
    overflow: int  # magnitude that stands for all values too large: inf, or the largest finite
    nan: int  # the NaN that CUDA's conversions produce; its sign is dropped


_FORMATS = {
    "bfloat16": _Format(7, -126, 0x7F80, 0x7FFF),
    "float8_e4m3fn": _Format(3, -6, 0x7E, 0x7F),
    "float8_e5m2": _Format(2, -14, 0x7B, 0x7F),
}


def name_of(dtype: Any) -> Any:
    """The name of a dtype of NumPy, CuPy or torch, or of a type of NumPy's; else what it was."""
    if isinstance(dtype, (np.dtype, type)):
        return np.dtype(dtype).name
    return str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else dtype


def itemsize(dtype: str) -> int:
    """Bytes per element of `dtype`."""
    return STORAGE[dtype].itemsize


def is_fp8(dtype: str) -> bool:
    """Whether `dtype` is an 8-bit float, so that a cache of it carries scales."""
    return dtype in FP8.values()


def decode(bits: np.ndarray, dtype: str, to: DTypeLike = np.float64) -> np.ndarray:
    """Values of a storage array.

    >>> decode(np.array([0x3F80, 0xC000], np.uint16), "bfloat16")
    array([ 1., -2.])

    bits   any shape and strides, STORAGE[dtype]
    to     dtype of the values; float32 too holds every float format here exactly

    Returns a C-contiguous array of the same shape. Infinities and NaNs stay what they are.
    """
    if is_fp8(dtype):
        return _fp8_values(dtype, np.dtype(to)).take(bits)
    if dtype == "bfloat16":
        bits = (bits.astype(np.uint32, order="C") << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # raised by signalling NaNs
        return bits.astype(to, order="C")


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Storage array of the values, each rounded once, to nearest, ties to even.

    >>> encode(np.array([1.0, -2.0]), "bfloat16")
    array([16256, 49152], dtype=uint16)

    values   any shape, float64, or a dtype that float64 holds exactly
    dtype    "float16", "bfloat16", "float32": too large values become infinite;
             "float8_e4m3fn", "float8_e5m2": too large and infinite values become the largest
             finite ones, +-448 and +-57344, and any NaN becomes 0x7F

    Raises ValueError for another dtype.
    """
    if dtype not in FLOATS and dtype not in _FORMATS:
        raise ValueError(f"dtype: cannot encode {dtype!r}, needs one of {[*FLOATS, *_FORMATS]}")
    if dtype not in _FORMATS:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return np.asarray(values).astype(STORAGE[dtype])

    mantissa_bits, min_exponent, overflow, nan = _FORMATS[dtype]
    values = np.asarray(values, np.float64)
    # A power of two beyond every format stands in for infinity and NaN, which have no exponent.
    finite = np.fmin(np.abs(values), 2.0**129)
    exponent = np.frexp(np.maximum(finite, 2.0**min_exponent))[1] - 1
    significand = np.rint(np.ldexp(finite, mantissa_bits - exponent)).astype(np.int32)
    magnitude = ((exponent - min_exponent) << mantissa_bits) + significand
    sign = np.signbit(values) * (1 << (8 * itemsize(dtype) - 1))
    code = np.where(np.isnan(values), nan, np.minimum(magnitude, overflow) | sign)
    return code.astype(STORAGE[dtype])


def kv_cache_dtype_name(
    kv_cache_dtype: str, array_dtype: str, query_dtype: str, name: str = "key_cache"
) -> str:
    """Name of the dtype that a cache array holds.

    >>> kv_cache_dtype_name("fp8", "uint8", "float16")
    'float8_e4m3fn'

    kv_cache_dtype   "auto": what the array's own dtype says, which is the query's dtype or a
                     float8 one; "float16", "bfloat16", "float32": that dtype, unquantised;
                     "fp8", "fp8_e4m3", "fp8_e5m2": that fp8, in a uint8 or float8 array
    array_dtype      dtype of key_cache
    query_dtype      dtype of the unquantised operand (query, or the key to be written)
    name             the argument that key_cache was given for, for errors

    Raises ValueError for a `kv_cache_dtype` that is unknown, contradicts the array, or leaves the
    meaning of uint8 open; TypeError for an array that can hold no cache of these queries.
    """
    if not isinstance(kv_cache_dtype, str):
        raise TypeError(f"kv_cache_dtype: got {type(kv_cache_dtype).__name__}, needs a str")
    if kv_cache_dtype in FP8:
        dtype = FP8[kv_cache_dtype]
        if array_dtype not in ("uint8", dtype):
            raise TypeError(
                f"{name}: dtype {array_dtype} cannot hold {kv_cache_dtype!r}, "
                f"needs uint8 or {dtype}"
            )
        return dtype
    if kv_cache_dtype not in ("auto", *FLOATS):
        raise ValueError(
            f"kv_cache_dtype: unknown {kv_cache_dtype!r}, needs one of {['auto', *FLOATS, *FP8]}"
        )
    if kv_cache_dtype == "auto" and array_dtype == "uint8":
        raise ValueError(
            f"kv_cache_dtype: 'auto' does not say what a uint8 {name} holds, needs one of {[*FP8]}"
        )
    if kv_cache_dtype == "auto" and is_fp8(array_dtype):
        return array_dtype
    if array_dtype != query_dtype:
        raise TypeError(
            f"{name}: dtype {array_dtype}, needs {query_dtype} as in the query or key, or fp8"
        )
    if kv_cache_dtype not in ("auto", array_dtype):
        raise ValueError(
            f"kv_cache_dtype: {kv_cache_dtype!r} does not match {name}'s {array_dtype}"
        )
    return array_dtype


@cache
def _fp8_values(dtype: str, to: np.dtype) -> np.ndarray:
    """Value of each of the 256 codes."""
    mantissa_bits, min_exponent, overflow, _ = _FORMATS[dtype]
    magnitude = np.arange(128)
    binade = np.maximum(magnitude >> mantissa_bits, 1) - 1
    significand = magnitude - (binade << mantissa_bits)
    values = np.ldexp(significand.astype(np.float64), binade + min_exponent - mantissa_bits)
    values[overflow + 1 :] = np.nan
    if dtype == "float8_e5m2":
        values[overflow + 1] = np.inf
    return np.concatenate([values, -values]).astype(to)
