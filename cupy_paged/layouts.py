"""Cache layouts by name: what the dimensions of a key and a value cache mean.

`"vllm"`   key [num_blocks, num_kv_heads, head_size / x, block_size, x], x elements in 16 bytes;
           value [num_blocks, num_kv_heads, head_size, block_size]
`"HND"`    [num_blocks, num_kv_heads, block_size, head_size]
`"NHD"`    [num_blocks, block_size, num_kv_heads, head_size]

A block of a head must lie as its layout says; blocks, heads and tokens may be any distance apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cupy_paged.arrays import Array
from cupy_paged.dtypes import itemsize

LAYOUTS = ("vllm", "HND", "NHD")
MAX_HEAD_SIZE = 512
MAX_BLOCK_SIZE = 256

_HEAD_DIMS = {"HND": 1, "NHD": 2}
"""Of the layouts with the same four dimensions."""


class CacheGeometry(NamedTuple):
    """Sizes of two caches; strides of [block, head, token] in elements, alignment in bytes."""

    layout: str
    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_size: int
    key_strides: tuple[int, int, int]
    value_strides: tuple[int, int, int]
    key_alignment: int
    value_alignment: int


def infer_layout(key_cache: Array, num_heads: int) -> str:
    """The only layout that the shapes allow for `num_heads` query heads.

    Raises ValueError where HND and NHD are both possible, or nothing is.
    """
    if len(key_cache.shape) == 5:
        return "vllm"
    if len(key_cache.shape) != 4:
        raise ValueError(
            f"key_cache: shape {key_cache.shape} has {len(key_cache.shape)} dimensions, "
            'needs 4 ("HND", "NHD") or 5 ("vllm")'
        )
    fits = _fitting(key_cache, lambda num_kv_heads: num_heads % num_kv_heads == 0)
    if len(fits) != 1:
        either = "either" if fits else "neither"
        raise ValueError(
            f'layout: key_cache of shape {key_cache.shape} may be {either} "HND" or "NHD" '
            f"with {num_heads} query heads; say which: "
            "HND is [num_blocks, num_kv_heads, block_size, head_size], "
            "NHD is [num_blocks, block_size, num_kv_heads, head_size]"
        )
    return fits[0]


def fits_instead(key_cache: Array, fits: Callable[[int], bool]) -> str:
    """The end of an error for a layout that does not fit: the other one, if the shape allows that.

    fits    whether the call may have so many KV heads
    """
    if len(key_cache.shape) != 4:
        return ""
    return "".join(
        f'; {key_cache.name}\'s shape {key_cache.shape} fits layout "{layout}"'
        for layout in _fitting(key_cache, fits)
    )


def _fitting(key_cache: Array, fits: Callable[[int], bool]) -> list[str]:
    sizes = {layout: key_cache.shape[dim] for layout, dim in _HEAD_DIMS.items()}
    return [layout for layout, size in sizes.items() if size and fits(size)]


def geometry(layout: str, key_cache: Array, value_cache: Array, dtype: str) -> CacheGeometry:
    """Reads a pair of caches as `layout`; `dtype` is what they hold.

    Raises ValueError where the two do not fit the layout, each other, or the supported sizes.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: unknown {layout!r}, needs one of {', '.join(LAYOUTS)}")
    found = (
        _vllm(key_cache, value_cache, dtype)
        if layout == "vllm"
        else _rows(layout, key_cache, value_cache)
    )
    if found.head_size % 8 or not 8 <= found.head_size <= MAX_HEAD_SIZE:
        padded = -(-found.head_size // 8) * 8
        advice = (
            f" (pad query, keys and values with zeros, here to {padded}, and give the scale of the "
            "true head_size)"
        )
        raise ValueError(
            f"{key_cache.name}: head_size {found.head_size} is not supported, needs a "
            f"multiple of 8 from 8 to {MAX_HEAD_SIZE}"
            + (advice if found.head_size < padded <= MAX_HEAD_SIZE else "")
        )
    if not 1 <= found.block_size <= MAX_BLOCK_SIZE:
        raise ValueError(
            f"{key_cache.name}: block_size {found.block_size} is not supported, "
            f"needs 1 to {MAX_BLOCK_SIZE}"
        )
    if found.num_kv_heads < 1:
        raise ValueError(f"{key_cache.name}: shape {key_cache.shape} has no KV heads")
    return found


def _match(name: str, key_cache: Array, expected: int, value_cache: Array, got: int) -> None:
    if got != expected:
        raise ValueError(
            f"{value_cache.name}: {name} {got} does not match {key_cache.name}'s {expected}"
        )


def _needs_dims(a: Array, dims: int, layout: str) -> None:
    if len(a.shape) != dims:
        is_pair = len(a.shape) == dims + 1 and a.shape[0] == 2  # as vLLM has them
        raise ValueError(
            f"{a.name}: shape {a.shape} has {len(a.shape)} dimensions, "
            f'needs {dims} in layout "{layout}"'
            + ("; keys and values in one array? give kv[0] and kv[1]" if is_pair else "")
        )


def _needs_packed(a: Array, first_dim: int, layout: str, what: str) -> None:
    if not a.is_packed(first_dim):
        raise ValueError(
            f"{a.name}: strides {a.strides} scatter {what}, "
            f'which must be contiguous in layout "{layout}"'
        )


def _vllm(key_cache: Array, value_cache: Array, dtype: str) -> CacheGeometry:
    _needs_dims(key_cache, 5, "vllm")
    _needs_dims(value_cache, 4, "vllm")
    num_blocks, num_kv_heads, chunks, block_size, x = key_cache.shape
    if x != 16 // itemsize(dtype):
        raise ValueError(
            f"{key_cache.name}: x (the last dimension) is {x}, needs {16 // itemsize(dtype)} "
            f"elements of {dtype} in 16 bytes"
        )
    head_size = chunks * x
    _match("num_blocks", key_cache, num_blocks, value_cache, value_cache.shape[0])
    _match("num_kv_heads", key_cache, num_kv_heads, value_cache, value_cache.shape[1])
    _match("head_size", key_cache, head_size, value_cache, value_cache.shape[2])
    _match("block_size", key_cache, block_size, value_cache, value_cache.shape[3])
    _needs_packed(key_cache, 2, "vllm", "the keys of a head's block")
    _needs_packed(value_cache, 2, "vllm", "the values of a head's block")
    return CacheGeometry(
        "vllm",
        num_blocks,
        num_kv_heads,
        block_size,
        head_size,
        (*key_cache.strides[:2], x),
        (*value_cache.strides[:2], 1),
        key_cache.alignment(range(2), x),
        value_cache.alignment(range(2), block_size),
    )


def _rows(layout: str, key_cache: Array, value_cache: Array) -> CacheGeometry:
    _needs_dims(key_cache, 4, layout)
    _needs_dims(value_cache, 4, layout)
    head_dim = _HEAD_DIMS[layout]
    token_dim = 3 - head_dim
    names = {0: "num_blocks", head_dim: "num_kv_heads", token_dim: "block_size", 3: "head_size"}
    for dim, name in sorted(names.items()):
        _match(name, key_cache, key_cache.shape[dim], value_cache, value_cache.shape[dim])
    for cache in (key_cache, value_cache):
        _needs_packed(cache, 3, layout, "the channels of a token")

    def strides(cache: Array) -> tuple[int, int, int]:
        return cache.strides[0], cache.strides[head_dim], cache.strides[token_dim]

    return CacheGeometry(
        layout,
        key_cache.shape[0],
        key_cache.shape[head_dim],
        key_cache.shape[token_dim],
        key_cache.shape[3],
        strides(key_cache),
        strides(value_cache),
        key_cache.alignment(range(3), key_cache.shape[3]),
        value_cache.alignment(range(3), key_cache.shape[3]),
    )
