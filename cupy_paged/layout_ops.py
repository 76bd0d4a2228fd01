"""Taking tokens out of a paged cache: into rows, or into a cache of another layout."""

from __future__ import annotations

import functools
import math
from typing import Any

from cupy_paged import checked_mode, checks, reference
from cupy_paged.arrays import HOST, META, Array, array
from cupy_paged.compiler import Kernel, cpp, template
from cupy_paged.dtypes import FLOATS, FP8, itemsize, kv_cache_dtype_name
from cupy_paged.graph_breaks import breaks_graphs
from cupy_paged.launch import ParamStruct, cache_strides, launch, scale_fields
from cupy_paged.layouts import LAYOUTS, CacheGeometry, fits_instead, geometry
from cupy_paged.streams import launch_stream, ordered

NUM_THREADS = 128
TILE_TOKENS = 16  # as in kernels/gather_cache.cu
_BYTES_OF_BLOCK = 16 * 1024  # that a thread block moves, about
_WORD = 4  # bytes that a turned tile gives to a row at a time

_MEMORY_BESIDE_JAX = "give it memory of CuPy, torch or NumPy, and share that with JAX by DLPack"

_CODES = ("uint8", *sorted(set(FP8.values())))
_BITS = {1: cpp("uint8"), 2: cpp("uint16"), 4: cpp("uint32")}

GATHER_PARAMS = ParamStruct(
    "GatherParams",
    """
    pointer  key value key_cache value_cache block_tables cu_seq_lens seq_starts
    pointer  k_scale_array v_scale_array
    int64    key_stride_token key_stride_head value_stride_token value_stride_head table_stride
    int64    key_strides.block key_strides.head key_strides.token
    int64    value_strides.block value_strides.head value_strides.token num_tokens num_blocks
    int      num_seqs max_num_blocks_per_seq num_kv_heads heads_of_block
    float    k_scale v_scale
    """,
)

CONVERT_PARAMS = ParamStruct(
    "ConvertLayoutParams",
    """
    pointer  key_cache value_cache new_key_cache new_value_cache
    int64    key_strides.block key_strides.head key_strides.token
    int64    value_strides.block value_strides.head value_strides.token
    int64    new_key_strides.block new_key_strides.head new_key_strides.token
    int64    new_value_strides.block new_value_strides.head new_value_strides.token
    int      num_kv_heads heads_of_block
    """,
)


@functools.lru_cache(maxsize=256)
def gather_kernel(
    cache_dtype: str,
    dtype: str,
    layout: str,
    head_size: int,
    block_size: int,
    key_width: int,
    value_width: int,
) -> Kernel:
    """The gather of rows that may be moved so many elements at a time."""
    same = dtype == cache_dtype
    name = template(
        "gather_cache",
        _BITS[itemsize(cache_dtype)] if same else cpp(cache_dtype),
        _BITS[itemsize(dtype)] if same else cpp(dtype),
        _policy(layout),
        head_size,
        block_size,
        key_width,
        value_width,
        NUM_THREADS,
    )
    return Kernel("gather_cache.cu", name, NUM_THREADS)


@functools.lru_cache(maxsize=256)
def layout_kernel(
    size: int,
    layout: str,
    new_layout: str,
    head_size: int,
    block_size: int,
    key_width: int,
    value_width: int,
    token_width: int,
) -> Kernel:
    """The conversion of caches with elements of `size` bytes, moved so many elements at a time."""
    name = template(
        "convert_layout",
        _BITS[size],
        _policy(layout),
        _policy(new_layout),
        head_size,
        block_size,
        min(block_size, TILE_TOKENS),
        key_width,
        value_width,
        token_width,
        NUM_THREADS,
    )
    return Kernel("convert_layout.cu", name, NUM_THREADS)


@breaks_graphs
def gather_cache(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    block_tables: Any,
    cu_seq_lens: Any,
    seq_starts: Any = None,
    kv_cache_dtype: str = "auto",
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
    *,
    layout: str,
    stream: Any = None,
) -> None:
    """Gathers keys and values of sequences out of a paged cache, one sequence after the other.

    >>> import numpy as np
    >>> key_cache = value_cache = np.arange(48.0, dtype=np.float32).reshape(3, 2, 1, 8)
    >>> key, value = (np.zeros((4, 1, 8), np.float32) for _ in range(2))
    >>> block_tables, cu_seq_lens = np.array([[2, 0], [1, -1]], np.int32), np.int32([0, 3, 4])
    >>> seq_starts = np.int32([1, 0])
    >>> gather_cache(
    ...     key, value, key_cache, value_cache, block_tables, cu_seq_lens, seq_starts, layout="NHD"
    ... )
    >>> (key[:, 0, 0] // 8).tolist()  # the rows of the cache
    [5.0, 0.0, 1.0, 2.0]

    key, value       [num_tokens, num_kv_heads, head_size], written in place, so not JAX's; of the
                     caches' dtype: the bits are kept; float16, bfloat16 or float32 where the caches
                     are fp8: codes become code * scale. Tokens and heads may be any distance apart;
                     no element shares memory with one of another array
    key_cache,       in `layout`, see cupy_paged.layouts
    value_cache
    block_tables     int32 [num_seqs, max_num_blocks_per_seq]
    cu_seq_lens      int32 [num_seqs + 1], not decreasing: sequence s is gathered into rows
                     cu_seq_lens[s] to cu_seq_lens[s + 1]. Rows past the end of key are left out,
                     rows of no sequence are left as they are
    seq_starts       int32 [num_seqs], the first token to take of each sequence; None: 0
    kv_cache_dtype   "auto": the caches' own dtype; "fp8" = "fp8_e4m3", "fp8_e5m2": how to read
                     uint8 caches. Not asked for where the bits are kept
    k_scale,         floats, or one-element float32 arrays: used where fp8 becomes float
    v_scale
    layout           "vllm", "HND" or "NHD"
    stream           CUDA stream to run on; by default the current one of key's framework

    Only slots of the tokens asked for are read. A token that block_tables has no column for, or
    whose block the cache does not have, is an IndexError on the host, and is left out on a GPU.

    Raises ValueError or TypeError, before anything is written, for arguments that do not fit.
    Source: vLLM's csrc/cache_kernels.cu, gather_and_maybe_dequant_cache and cp_gather_cache.
    """
    on = launch_stream(key, stream)
    rows = array(key, "key", on), array(value, "value", on)
    caches = array(key_cache, "key_cache", on), array(value_cache, "value_cache", on)
    tables = array(block_tables, "block_tables", on)
    ends = array(cu_seq_lens, "cu_seq_lens", on)
    starts = None if seq_starts is None else array(seq_starts, "seq_starts", on)
    scales = [checks.scale(x, n, on) for x, n in ((k_scale, "k_scale"), (v_scale, "v_scale"))]
    given = [a for a in (*rows, *caches, tables, ends, starts, *scales) if isinstance(a, Array)]
    checks.same_place(given, rows[0])
    for a in given:
        checks.runs_forward(a)

    checks.has_dims(rows[0], "[num_tokens, num_kv_heads, head_size]")
    checks.is_shape(rows[1], rows[0].shape, "the shape of key")
    for a in rows:
        checks.is_dtype(a, *FLOATS, *_CODES)
        checks.is_writable(a, _MEMORY_BESIDE_JAX)
        checks.is_packed(a, 2)
    if rows[1].dtype != rows[0].dtype:
        raise TypeError(f"value: dtype {rows[1].dtype} does not match key's {rows[0].dtype}")
    if caches[1].dtype != caches[0].dtype:
        raise TypeError(
            f"value_cache: dtype {caches[1].dtype} does not match key_cache's {caches[0].dtype}"
        )
    dtype, cache_dtype = _gathered(rows[0].dtype, caches[0].dtype, kv_cache_dtype)
    cache = geometry(layout, *caches, cache_dtype)
    if rows[0].shape[1:] != (cache.num_kv_heads, cache.head_size):
        raise ValueError(
            f"key: shape {rows[0].shape} does not match key_cache, needs "
            f'[num_tokens, {cache.num_kv_heads}, {cache.head_size}] in layout "{layout}"'
            + fits_instead(caches[0], lambda heads: rows[0].shape[1:] == (heads, cache.head_size))
        )
    checks.has_dims(tables, "[num_seqs, max_num_blocks_per_seq]")
    checks.is_packed(tables, 1)
    num_seqs = tables.shape[0]
    checks.is_shape(ends, (num_seqs + 1,), "[num_seqs + 1]")
    if starts is not None:
        checks.is_shape(starts, (num_seqs,), "[num_seqs]")
    for a in (tables, ends, starts):
        if a is not None:
            checks.is_dtype(a, "int32")
    for a in (ends, starts):
        if a is not None:
            checks.is_packed(a)
    checks.are_apart(rows, given[2:])
    if rows[0].shape[0] == 0 or num_seqs == 0 or rows[0].device == META:
        return
    if checked_mode.is_on():
        checked_mode.check_gathered(
            ends, starts, tables, cache.block_size, cache.num_blocks, on, rows[0].framework
        )
    if rows[0].device is HOST:
        reference.gather_cache(
            *(a.bits for a in (*rows, *caches, tables, ends)),
            None if starts is None else starts.bits,
            layout=layout,
            dtype=dtype,
            cache_dtype=cache_dtype,
            k_scale=checks.host_scale(scales[0]),
            v_scale=checks.host_scale(scales[1]),
        )
        return
    _gather_on_gpu(*rows, *caches, tables, ends, starts, cache, dtype, cache_dtype, *scales, on)


def _gathered(dtype: str, cache_dtype: str, kv_cache_dtype: str) -> tuple[str, str]:
    """What rows of a dtype hold, and what their cache holds."""
    if dtype in FLOATS:
        return dtype, kv_cache_dtype_name(kv_cache_dtype, cache_dtype, dtype)
    if cache_dtype not in _CODES or (cache_dtype != dtype and "uint8" not in (cache_dtype, dtype)):
        raise TypeError(f"key_cache: dtype {cache_dtype} does not match key's {dtype}")
    if kv_cache_dtype != "auto":
        kv_cache_dtype_name(kv_cache_dtype, cache_dtype, dtype)
    return "uint8", "uint8"


def _gather_on_gpu(
    key: Array,
    value: Array,
    key_cache: Array,
    value_cache: Array,
    tables: Array,
    ends: Array,
    starts: Array | None,
    cache: CacheGeometry,
    dtype: str,
    cache_dtype: str,
    k_scale: float | Array,
    v_scale: float | Array,
    stream: int,
) -> None:
    def width(target: Array, cache_alignment: int) -> int:
        elements = target.alignment(range(2), cache.head_size) // itemsize(dtype)
        return math.gcd(elements, cache_alignment // itemsize(cache_dtype), cache.head_size)

    value_alignment = _WORD if cache.layout == "vllm" else cache.value_alignment
    kernel = gather_kernel(
        cache_dtype,
        dtype,
        cache.layout,
        cache.head_size,
        cache.block_size,
        width(key, cache.key_alignment),
        width(value, value_alignment),
    )
    heads = _heads_of_block(cache, TILE_TOKENS, itemsize(cache_dtype))
    params = GATHER_PARAMS.pack(
        cache_strides("key_strides", cache.key_strides)
        | cache_strides("value_strides", cache.value_strides)
        | scale_fields("k_scale", k_scale)
        | scale_fields("v_scale", v_scale)
        | {
            "key": key.pointer,
            "value": value.pointer,
            "key_cache": key_cache.pointer,
            "value_cache": value_cache.pointer,
            "block_tables": tables.pointer,
            "cu_seq_lens": ends.pointer,
            "seq_starts": 0 if starts is None else starts.pointer,
            "key_stride_token": key.strides[0],
            "key_stride_head": key.strides[1],
            "value_stride_token": value.strides[0],
            "value_stride_head": value.strides[1],
            "table_stride": tables.strides[0],
            "num_tokens": key.shape[0],
            "num_blocks": cache.num_blocks,
            "num_seqs": tables.shape[0],
            "max_num_blocks_per_seq": tables.shape[1],
            "num_kv_heads": cache.num_kv_heads,
            "heads_of_block": heads,
        }
    )
    given = (key, value, key_cache, value_cache, tables, ends, starts, k_scale, v_scale)
    arrays = [a for a in given if isinstance(a, Array)]
    work = -(-key.shape[0] // TILE_TOKENS) * -(-cache.num_kv_heads // heads) * 2
    with ordered(stream, key.device, key.framework, arrays):
        launch(kernel, key.device, stream, work, params)


@breaks_graphs
def convert_layout(
    key_cache: Any,
    value_cache: Any,
    layout: str,
    new_key_cache: Any,
    new_value_cache: Any,
    new_layout: str,
    *,
    stream: Any = None,
) -> None:
    """Copies a paged cache into one of another layout, bit by bit.

    >>> import numpy as np
    >>> key_cache = value_cache = np.arange(64, dtype=np.uint8).reshape(1, 2, 4, 8)
    >>> new_key_cache, new_value_cache = (np.zeros((1, 4, 2, 8), np.uint8) for _ in range(2))
    >>> convert_layout(key_cache, value_cache, "HND", new_key_cache, new_value_cache, "NHD")
    >>> new_key_cache[0, :, :, 0].tolist()
    [[0, 32], [8, 40], [16, 48], [24, 56]]

    key_cache,           of any cache dtype, in `layout`, see cupy_paged.layouts
    value_cache
    new_key_cache,       of the same dtype and sizes, in `new_layout`, written in place, so not
    new_value_cache      JAX's; no element shares memory with one of another array
    layout, new_layout   "vllm", "HND" or "NHD", but not the same one twice
    stream               CUDA stream to run on; by default the current one of key_cache's framework

    All blocks are copied, slots that hold no token included.
    Raises ValueError or TypeError, before anything is written, for arguments that do not fit.
    """
    on = launch_stream(key_cache, stream)
    old = array(key_cache, "key_cache", on), array(value_cache, "value_cache", on)
    new = array(new_key_cache, "new_key_cache", on), array(new_value_cache, "new_value_cache", on)
    checks.same_place([*old, *new], old[0])
    for a in (*old, *new):
        checks.is_dtype(a, *FLOATS, *_CODES)
        checks.runs_forward(a)
        if a.dtype != old[0].dtype:
            raise TypeError(f"{a.name}: dtype {a.dtype} does not match key_cache's {old[0].dtype}")
    for a in new:
        checks.is_writable(a, _MEMORY_BESIDE_JAX)
    if new_layout not in LAYOUTS:
        needed = ", ".join(LAYOUTS)
        raise ValueError(f"new_layout: unknown {new_layout!r}, needs one of {needed}")
    if new_layout == layout:
        raise ValueError(f"new_layout: got {new_layout!r}, needs another one than layout")
    dtype = old[0].dtype
    cache, target = geometry(layout, *old, dtype), geometry(new_layout, *new, dtype)
    for name in ("num_blocks", "num_kv_heads", "block_size", "head_size"):
        got, needed = getattr(target, name), getattr(cache, name)
        if got != needed:
            raise ValueError(f"new_key_cache: {name} {got} does not match key_cache's {needed}")
    checks.are_apart(new, old)
    if cache.num_blocks == 0:
        return
    if old[0].device is HOST:
        reference.convert_layout(
            *(a.bits for a in (*old, *new)), layout=layout, new_layout=new_layout
        )
        return

    size = itemsize(dtype)
    kernel = _layout_kernel(cache, target, size)
    heads = _heads_of_block(cache, min(cache.block_size, TILE_TOKENS), size)
    names = ("key_cache", "value_cache", "new_key_cache", "new_value_cache")
    params = CONVERT_PARAMS.pack(
        cache_strides("key_strides", cache.key_strides)
        | cache_strides("value_strides", cache.value_strides)
        | cache_strides("new_key_strides", target.key_strides)
        | cache_strides("new_value_strides", target.value_strides)
        | {name: a.pointer for name, a in zip(names, (*old, *new), strict=True)}
        | {"num_kv_heads": cache.num_kv_heads, "heads_of_block": heads}
    )
    tiles = cache.num_blocks * -(-cache.block_size // TILE_TOKENS)
    work = tiles * -(-cache.num_kv_heads // heads) * 2
    with ordered(on, old[0].device, old[0].framework, [*old, *new]):
        launch(kernel, old[0].device, on, work, params)


def _layout_kernel(cache: CacheGeometry, target: CacheGeometry, size: int) -> Kernel:
    key_alignment = math.gcd(cache.key_alignment, target.key_alignment)
    value_alignment = math.gcd(cache.value_alignment, target.value_alignment)
    token_width = 1
    if "vllm" in (cache.layout, target.layout):
        # One side has rows, whose words take channels, the other columns, which take tokens.
        rows, columns = (target, cache) if cache.layout == "vllm" else (cache, target)
        value_alignment = math.gcd(rows.value_alignment, max(_WORD, size))
        token_width = math.gcd(columns.value_alignment // size, cache.block_size, TILE_TOKENS)
    return layout_kernel(
        size,
        cache.layout,
        target.layout,
        cache.head_size,
        cache.block_size,
        math.gcd(key_alignment // size, cache.head_size),
        math.gcd(value_alignment // size, cache.head_size),
        token_width,
    )


def _policy(layout: str) -> str:
    return cpp("Vllm" if layout == "vllm" else "Rows")


def _heads_of_block(cache: CacheGeometry, tokens: int, size: int) -> int:
    """Heads that a thread block moves: enough to be worth its start."""
    return max(min(_BYTES_OF_BLOCK // (tokens * cache.head_size * size), cache.num_kv_heads), 1)
