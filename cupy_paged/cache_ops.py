"""Writing keys and values into a paged cache, and converting between fp8 and wider floats."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from cupy_paged import checked_mode, checks, reference
from cupy_paged.arrays import HOST, META, Array, array
from cupy_paged.compiler import Kernel, cpp, template
from cupy_paged.dtypes import (
    FLOATS,
    FP8,
    decode,
    encode,
    is_fp8,
    itemsize,
    kv_cache_dtype_name,
)
from cupy_paged.graph_breaks import breaks_graphs
from cupy_paged.launch import ParamStruct, cache_strides, prepare, scale_fields
from cupy_paged.layouts import CacheGeometry, fits_instead, geometry
from cupy_paged.prepared import keep, repeat
from cupy_paged.prepared_call import PreparedCall
from cupy_paged.streams import launch_stream

NUM_THREADS = 128

WRITE_PARAMS = ParamStruct(
    "WriteParams",
    """
    pointer  key value key_cache value_cache slot_mapping k_scale_array v_scale_array
    int64    key_stride_token key_stride_head value_stride_token value_stride_head
    int64    key_strides.block key_strides.head key_strides.token
    int64    value_strides.block value_strides.head value_strides.token num_slots
    int      num_kv_heads
    float    k_scale v_scale
    """,
)

CONVERT_PARAMS = ParamStruct(
    "ConvertParams",
    """
    pointer  output input scale_array
    int64    num_elements
    float    scale
    """,
)


@breaks_graphs
def reshape_and_cache(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    *,
    stream: Any = None,
) -> None:
    """Writes keys and values into their slots of a cache in layout "vllm".

    key, value       [num_tokens, num_kv_heads, head_size], float16, bfloat16 or float32; tokens and
                     heads may be any distance apart; may have more tokens than slot_mapping
    key_cache,       of the same dtype, or fp8, in layout "vllm" (see cupy_paged.layouts);
    value_cache      written in place, so not JAX's; in memory of their own
    slot_mapping     int64 [num_tokens], block * block_size + offset; negative: skip the token. A
                     slot past the end of the cache is an IndexError on the host, and is skipped on
                     a GPU
    kv_cache_dtype   "auto": the caches' own dtype; "fp8" = "fp8_e4m3", "fp8_e5m2": how to fill
                     uint8 caches
    k_scale,         floats, or one-element float32 arrays: an fp8 cache stores
    v_scale          saturate(x / scale); any other keeps the bits
    stream           CUDA stream to run on; by default the current one of key's framework

    If a slot is named twice, either token may be the one that is kept.
    Raises ValueError or TypeError, before anything is written, for arguments that do not fit.
    Source: vLLM's csrc/cache_kernels.cu.
    """
    _reshape_and_cache(
        key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale,
        "vllm", stream,
    )  # fmt: skip


@breaks_graphs
def reshape_and_cache_flash(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    *,
    layout: str = "NHD",
    stream: Any = None,
) -> None:
    """Writes keys and values into their slots of a cache in layout "NHD" or "HND".

    >>> import numpy as np
    >>> key = value = np.ones((2, 1, 8), np.float32)
    >>> key_cache, value_cache = np.zeros((2, 3, 4, 1, 8), np.float32)  # 3 blocks of 4 tokens
    >>> slot_mapping = np.array([5, -1])
    >>> reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, "auto", 1.0, 1.0)
    >>> np.argwhere(key_cache[..., 0, 0]).tolist()
    [[1, 1]]

    layout    that of vLLM's op, "NHD", if not given. Caches in "HND" with as many KV heads as
              tokens in a block have the same shape: nobody can see then that it was left out

    Other arguments and errors as in `reshape_and_cache`.
    """
    if layout not in ("NHD", "HND"):
        raise ValueError(
            f'layout: got {layout!r}, needs "NHD" or "HND"; reshape_and_cache writes "vllm"'
        )
    _reshape_and_cache(
        key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale,
        layout, stream,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def write_kernel(
    dtype: str,
    cache_dtype: str,
    layout: str,
    head_size: int,
    block_size: int,
    key_width: int,
    value_width: int,
) -> Kernel:
    """The writer for rows that may be moved so many elements at a time."""
    name = template(
        "reshape_and_cache",
        cpp(dtype),
        cpp(cache_dtype),
        cpp("Vllm" if layout == "vllm" else "Rows"),
        head_size,
        block_size,
        key_width,
        value_width,
        NUM_THREADS,
    )
    return Kernel("reshape_and_cache.cu", name, NUM_THREADS)


def _reshape_and_cache(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    layout: str,
    stream: Any,
) -> None:
    settings = ("reshape_and_cache", kv_cache_dtype, layout)
    arrays = key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale
    if repeat(key, settings, arrays, stream) is not None:
        return
    on = launch_stream(key, stream)
    key, value = array(key, "key", on), array(value, "value", on)
    caches = array(key_cache, "key_cache", on), array(value_cache, "value_cache", on)
    slots = array(slot_mapping, "slot_mapping", on)
    scales = [checks.scale(x, n, on) for x, n in ((k_scale, "k_scale"), (v_scale, "v_scale"))]
    given = [a for a in (key, value, *caches, slots, *scales) if isinstance(a, Array)]
    checks.same_place(given, key)
    for a in given:
        checks.runs_forward(a)

    checks.has_dims(key, "[num_tokens, num_kv_heads, head_size]")
    checks.is_shape(value, key.shape, "the shape of key")
    for a in (key, value):
        checks.is_dtype(a, *FLOATS)
        checks.is_packed(a, 2)
    if value.dtype != key.dtype:
        raise TypeError(f"value: dtype {value.dtype} does not match key's {key.dtype}")
    cache_dtype = kv_cache_dtype_name(kv_cache_dtype, caches[0].dtype, key.dtype)
    if caches[1].dtype != caches[0].dtype:
        raise TypeError(
            f"value_cache: dtype {caches[1].dtype} does not match key_cache's {caches[0].dtype}"
        )
    for a in caches:
        checks.is_writable(a, checks.CACHE_OF_JAX)
    cache = geometry(layout, *caches, cache_dtype)
    if key.shape[1:] != (cache.num_kv_heads, cache.head_size):
        raise ValueError(
            f"key: shape {key.shape} does not match key_cache, needs "
            f'[num_tokens, {cache.num_kv_heads}, {cache.head_size}] in layout "{cache.layout}"'
            + fits_instead(caches[0], lambda heads: key.shape[1:] == (heads, cache.head_size))
        )
    checks.has_dims(slots, "[num_tokens]")
    checks.is_dtype(slots, "int64")
    checks.is_packed(slots)
    if slots.shape[0] > key.shape[0]:
        raise ValueError(
            f"slot_mapping: {slots.shape[0]} slots for key's {key.shape[0]} tokens, needs no more"
        )
    checks.are_apart(caches, [key, value, *given[4:]])
    if slots.shape[0] == 0 or key.device == META:
        return
    if checked_mode.is_on():
        num_slots = cache.num_blocks * cache.block_size
        checked_mode.check_slots(slots, num_slots, on, key.framework)
    if key.device is not HOST:
        prepared = _write_on_gpu(key, value, *caches, slots, cache, cache_dtype, *scales, on)
        keep(arrays[0], settings, arrays, prepared)
        return
    reference.reshape_and_cache(
        key.bits,
        value.bits,
        *(a.bits for a in caches),
        slots.bits,
        layout=layout,
        dtype=key.dtype,
        cache_dtype=cache_dtype,
        k_scale=checks.host_scale(scales[0]),
        v_scale=checks.host_scale(scales[1]),
    )


def _write_on_gpu(
    key: Array,
    value: Array,
    key_cache: Array,
    value_cache: Array,
    slots: Array,
    cache: CacheGeometry,
    cache_dtype: str,
    k_scale: float | Array,
    v_scale: float | Array,
    stream: int,
) -> PreparedCall:
    def width(source: Array, cache_alignment: int) -> int:
        elements = source.alignment(range(2), cache.head_size) // itemsize(source.dtype)
        return math.gcd(elements, cache_alignment // itemsize(cache_dtype), cache.head_size)

    # Values of layout "vllm" are scattered one by one; only their reading can be wide.
    value_alignment = 16 if cache.layout == "vllm" else cache.value_alignment
    kernel = write_kernel(
        key.dtype,
        cache_dtype,
        cache.layout,
        cache.head_size,
        cache.block_size,
        width(key, cache.key_alignment),
        width(value, value_alignment),
    )
    params = WRITE_PARAMS.template(
        cache_strides("key_strides", cache.key_strides)
        | cache_strides("value_strides", cache.value_strides)
        | scale_fields("k_scale", k_scale)
        | scale_fields("v_scale", v_scale)
        | {
            "key_stride_token": key.strides[0],
            "key_stride_head": key.strides[1],
            "value_stride_token": value.strides[0],
            "value_stride_head": value.strides[1],
            "num_slots": cache.num_blocks * cache.block_size,
            "num_kv_heads": cache.num_kv_heads,
        }
    )
    prepared = PreparedCall(key, [prepare(kernel, key.device, stream, slots.shape[0])], params)
    # In the order of WRITE_PARAMS.
    given = (key, value, key_cache, value_cache, slots, k_scale, v_scale)
    prepared.first(key, given, stream)
    return prepared


@functools.lru_cache(maxsize=64)
def convert_kernel(input_dtype: str, output_dtype: str) -> Kernel:
    """The conversion between an fp8 and a wider float."""
    name = template("convert_fp8", cpp(input_dtype), cpp(output_dtype), NUM_THREADS)
    return Kernel("convert_fp8.cu", name, NUM_THREADS)


@breaks_graphs
def convert_fp8(
    output: Any, input: Any, scale: Any = 1.0, kv_dtype: str = "fp8", *, stream: Any = None
) -> None:
    """Converts an array to fp8 or back; the dtypes say which way.

    >>> import numpy as np
    >>> codes = np.zeros(3, np.uint8)
    >>> convert_fp8(codes, np.array([1.0, -2.0, 1e9], np.float32), scale=2.0)
    >>> back = np.zeros(3, np.float32)
    >>> convert_fp8(back, codes, scale=2.0)
    >>> back.tolist()
    [1.0, -2.0, 896.0]

    output     any shape, C-contiguous, written in place
    input      the same shape, C-contiguous; one of the two is float16, bfloat16 or float32, the
               other uint8 or float8
    scale      float, or one-element float32 array: saturate(x / scale) to fp8, x * scale from it
    kv_dtype   "fp8" = "fp8_e4m3", or "fp8_e5m2"
    stream     CUDA stream to run on; by default the current one of input's framework

    Raises ValueError or TypeError, before anything is written, for arguments that do not fit.
    Source: vLLM's csrc/cache_kernels.cu.
    """
    settings, arrays = ("convert_fp8", kv_dtype), (output, input, scale)
    if repeat(input, settings, arrays, stream) is not None:
        return
    on = launch_stream(input, stream)
    source, target = array(input, "input", on), array(output, "output", on)
    scale = checks.scale(scale, "scale", on)
    checks.same_place([a for a in (target, scale) if isinstance(a, Array)], source)
    checks.is_writable(target, checks.CACHE_BESIDE_JAX)
    checks.is_shape(target, source.shape, "the shape of input")
    for a in (source, target):
        checks.runs_forward(a)
        checks.is_packed(a)
    if kv_dtype not in FP8:
        raise ValueError(f"kv_dtype: unknown {kv_dtype!r}, needs one of {', '.join(FP8)}")
    checks.are_apart([target], [a for a in (source, scale) if isinstance(a, Array)])
    codes, floats = (target, source) if source.dtype in FLOATS else (source, target)
    checks.is_dtype(floats, *FLOATS)
    checks.is_dtype(codes, "uint8", FP8[kv_dtype])

    dtype = {codes.name: FP8[kv_dtype], floats.name: floats.dtype}
    if math.prod(source.shape) == 0:
        return
    if source.device is HOST:
        values = decode(source.bits, dtype["input"], np.float32)
        factor = np.float32(checks.host_scale(scale))
        with np.errstate(over="ignore", invalid="ignore"):
            values = values / factor if is_fp8(dtype["output"]) else values * factor
        target.bits[...] = encode(values, dtype["output"])
        return
    num_elements = math.prod(source.shape)
    kernel = convert_kernel(dtype["input"], dtype["output"])
    work = -(-num_elements // NUM_THREADS)
    prepared = PreparedCall(
        source,
        [prepare(kernel, source.device, on, work, resident=True)],
        CONVERT_PARAMS.template(scale_fields("scale", scale) | {"num_elements": num_elements}),
    )
    prepared.first(source, (target, source, scale), on)  # in the order of CONVERT_PARAMS
    keep(input, settings, arrays, prepared)
