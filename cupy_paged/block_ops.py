"""Moving whole blocks: within the caches of all layers, and between a GPU and host memory."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from cupy_paged import checked_mode, checks, gpu, in_flight
from cupy_paged.arrays import HOST, META, Array, array, is_array, location
from cupy_paged.block_runs import UNIT, access_width, copy_runs
from cupy_paged.compiler import Kernel, template
from cupy_paged.dtypes import itemsize
from cupy_paged.graph_breaks import breaks_graphs
from cupy_paged.launch import ParamStruct, launch
from cupy_paged.layouts import geometry
from cupy_paged.streams import launch_stream, ordered

NUM_THREADS = 256
MAX_POOLS, MAX_PAIRS = 160, 80  # of one launch, as in kernels/copy_blocks.cu
_MAX_GRID = 2**31 - 1

_POOL_FIELDS = [f"pools[{i}].{field}" for i in range(MAX_POOLS) for field in ("blocks", "stride")]
_PAIR_FIELDS = [
    f"pairs[{i}].{field}" for i in range(MAX_PAIRS) for field in ("source", "destination")
]

COPY_PARAMS = ParamStruct(
    "CopyBlocksParams",
    f"""
    int64    {" ".join(_POOL_FIELDS)}
    int64    {" ".join(_PAIR_FIELDS)}
    pointer  block_mapping
    int64    num_pairs num_blocks block_bytes
    int      num_pools
    """,
)


@functools.cache
def copy_kernel(width: int) -> Kernel:
    """The copy of blocks that may be moved `width` bytes at a time."""
    return Kernel("copy_blocks.cu", template("copy_blocks", width, NUM_THREADS), NUM_THREADS)


@breaks_graphs
def copy_blocks(
    key_caches: list[Any] | tuple[Any, ...],
    value_caches: list[Any] | tuple[Any, ...],
    block_mapping: Any,
    *,
    layout: str | None = None,
    stream: Any = None,
) -> None:
    """Copies blocks onto other blocks of the same cache, in the caches of every layer.

    >>> import numpy as np
    >>> key_cache, value_cache = (np.arange(4.0, dtype=np.float32).reshape(4, 1) for _ in range(2))
    >>> copy_blocks([key_cache], [value_cache], np.array([[3, 0], [3, 1]]))
    >>> key_cache[:, 0].tolist()
    [3.0, 3.0, 2.0, 3.0]

    key_caches,      lists of one array a layer, [num_blocks, ...] of any dtype, written in place,
    value_caches     so not JAX's. All have as many blocks, of as many bytes. Blocks may be any
                     distance apart, with those of other caches between them; each must be
                     contiguous, its dimensions in any order. A cache of several layers is copied
                     once. Where one array holds keys and values (MLA), value_caches is empty
    block_mapping    int64 [num_pairs, 2] of (source, destination), beside the caches or on the
                     host. A pair with a negative block is skipped, and so is, where the pairs are
                     on a GPU, one with a block past the end
    layout           "vllm", "HND" or "NHD" to have the shapes of the caches checked for it
    stream           CUDA stream to run on; by default the current one of the framework of the
                     first cache

    Pairs run in parallel. A block that is the source of one pair and the destination of another
    gets undefined contents, and so does the destination of several; where the pairs are on the host
    both are refused.

    More than 80 layers, or 80 pairs from the host, take several launches. A captured graph keeps
    the addresses of the caches, and pairs from the host by value; it reads those on a GPU anew.

    Raises ValueError or TypeError, and IndexError for pairs on the host that name a block past the
    end, before anything is written, for arguments that do not fit.
    Source: vLLM's csrc/cache_kernels.cu.
    """
    check_layers(key_caches, value_caches)
    on = launch_stream(key_caches[0], stream)
    keys = [array(cache, f"key_caches[{i}]", on) for i, cache in enumerate(key_caches)]
    values = [array(cache, f"value_caches[{i}]", on) for i, cache in enumerate(value_caches)]
    caches = keys + values
    first = caches[0]
    checks.same_place(caches, first)
    for a in caches:
        checks.runs_forward(a)
        checks.is_writable(a, checks.CACHE_OF_JAX)
    sizes = [_block_bytes(a) for a in caches]
    block_bytes = sizes[0]
    for a, size in zip(caches, sizes, strict=True):
        if a.shape[0] != first.shape[0]:
            raise ValueError(
                f"{a.name}: num_blocks {a.shape[0]} does not match {first.name}'s {first.shape[0]}"
            )
        if size != block_bytes:
            raise ValueError(
                f"{a.name}: blocks of {size} bytes do not match {first.name}'s "
                f"{block_bytes}; copy layers of another kind with a call of their own"
            )
    if layout is not None:
        _check_layout(layout, keys, values)
    mapping = _mapping(block_mapping, on)
    if mapping.device is not HOST:
        checks.same_place([mapping], first)
    known = mapping.bits
    if known is None and mapping.device != META and checked_mode.is_on():
        known = checked_mode.values(mapping, on, first.framework)
    pairs = None
    if known is not None:
        pairs = _pairs(known, first.shape[0], first.shape[0])
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        _check_independent(pairs, pairs[:, 0], pairs[:, 1], 1)
    caches = list({_pool(a): a for a in caches}.values())
    checks.are_apart(caches, [mapping])
    if block_bytes == 0 or mapping.shape[0] == 0 or (pairs is not None and not len(pairs)):
        return
    if first.device == META:
        return
    if first.device is HOST:
        for a in caches:
            a.bits[pairs[:, 1]] = a.bits[pairs[:, 0]]
        return
    _copy_on_gpu(caches, block_bytes, mapping, pairs, on)


def check_layers(key_caches: Any, value_caches: Any) -> None:
    """Raises ValueError or TypeError unless these are lists, and of as many layers."""
    for caches, name in ((key_caches, "key_caches"), (value_caches, "value_caches")):
        if not isinstance(caches, list | tuple):
            kind = type(caches).__name__
            raise TypeError(f"{name}: got {kind}, needs a list of arrays, one a layer")
    if not key_caches:
        raise ValueError("key_caches: is empty, needs the array of at least one layer")
    if len(value_caches) not in (0, len(key_caches)):
        raise ValueError(
            f"value_caches: {len(value_caches)} layers do not match key_caches' {len(key_caches)}"
        )


def _check_layout(layout: str, keys: list[Array], values: list[Array]) -> None:
    if not values:
        raise ValueError(f"layout: got {layout!r} without value_caches, needs None")
    for key, value in zip(keys, values, strict=True):
        if value.dtype != key.dtype:
            raise TypeError(
                f"{value.name}: dtype {value.dtype} does not match {key.name}'s {key.dtype}"
            )
        geometry(layout, key, value, key.dtype)


def _copy_on_gpu(
    caches: list[Array], block_bytes: int, mapping: Array, pairs: np.ndarray | None, stream: int
) -> None:
    first = caches[0]
    pools = [_pool(a) for a in caches]
    groups = [(mapping.pointer, mapping.shape[0], [])]
    if pairs is not None:
        some = (pairs[i : i + MAX_PAIRS] for i in range(0, len(pairs), MAX_PAIRS))
        groups = [(0, len(group), group.ravel().tolist()) for group in some]
    width = access_width(block_bytes, *itertools.chain(*pools))
    kernel = copy_kernel(width)
    units_of_block = -(-block_bytes // (UNIT * width))
    arrays = caches if pairs is not None else [*caches, mapping]
    with ordered(stream, first.device, first.framework, arrays):
        for start in range(0, len(pools), MAX_POOLS):
            some_pools = pools[start : start + MAX_POOLS]
            pool_fields = _filled(itertools.chain(*some_pools), len(_POOL_FIELDS))
            for pointer, num_pairs, numbers in groups:
                pair_fields = _filled(numbers, len(_PAIR_FIELDS))
                sizes = num_pairs, first.shape[0], block_bytes, len(some_pools)
                params = COPY_PARAMS.pack_in_order([*pool_fields, *pair_fields, pointer, *sizes])
                units = num_pairs * len(some_pools) * units_of_block
                work = min(-(-units // (NUM_THREADS // 32)), _MAX_GRID)
                launch(kernel, first.device, stream, work, params)


def _pool(a: Array) -> tuple[int, int]:
    """Where blocks are: the address of the first one, and bytes from each to the next."""
    return a.pointer, a.strides[0] * itemsize(a.dtype)


def _filled(numbers: Iterable[int], length: int) -> list[int]:
    """The numbers, with zeros for those that are missing."""
    found = list(numbers)
    return found + [0] * (length - len(found))


@breaks_graphs
def swap_blocks(source: Any, destination: Any, block_mapping: Any, *, stream: Any = None) -> None:
    """Copies blocks from one array to another: of a GPU, or of pinned host memory.

    >>> import numpy as np
    >>> cache, kept = np.arange(4.0, dtype=np.float32).reshape(4, 1), np.zeros((2, 1), np.float32)
    >>> swap_blocks(cache, kept, np.array([[3, 0], [1, 1]]))
    >>> kept[:, 0].tolist()
    [3.0, 1.0]

    source           [num_blocks, ...] of any dtype. Blocks may be any distance apart; each must be
                     contiguous, its dimensions in any order
    destination      [num_blocks, ...] of the same dtype, blocks of the same shape and order;
                     written in place, so not JAX's
    block_mapping    int64 [num_pairs, 2] of (block of source, block of destination), on the host.
                     A pair with a negative block is skipped
    stream           CUDA stream to run on; by default the current one of the framework of the array
                     that is on a GPU

    Between a GPU and the host nothing waits: host memory is read or written when the stream comes
    to it, and must be pinned (cupyx.empty_pinned, torch's pin_memory), since the system may move
    any other. Pairs run in any order. Runs of blocks that follow each other on both sides, of 1 MiB
    and more, are the copy engines' work. Shorter ones are moved by a kernel, 480 blocks a launch;
    one by one by the copy engines, which takes longer, in a capture that is the first to need it.
    Two host arrays are copied at once.

    Raises ValueError or TypeError, and IndexError for a block past the end, before anything is
    written, for arguments that do not fit, for memory that is not pinned, and where a pair would
    write what another one reads or writes.
    Source: vLLM's csrc/cache_kernels.cu.
    """
    leads = [x for x in (source, destination) if is_array(x) and location(x)[1] is not HOST]
    on = launch_stream(leads[0] if leads else source, stream)
    start, end = array(source, "source", on), array(destination, "destination", on)
    checks.is_writable(end, checks.CACHE_BESIDE_JAX)
    for a in (start, end):
        checks.runs_forward(a)
    if end.shape[1:] != start.shape[1:]:
        raise ValueError(
            f"destination: blocks of shape {end.shape[1:]} do not match source's {start.shape[1:]}"
        )
    if end.dtype != start.dtype and not itemsize(end.dtype) == itemsize(start.dtype) == 1:
        raise TypeError(f"destination: dtype {end.dtype} does not match source's {start.dtype}")
    block_bytes = _block_bytes(start)
    _block_bytes(end)
    steps = [
        [stride for stride, n in zip(a.strides[1:], a.shape[1:], strict=True) if n > 1]
        for a in (start, end)
    ]
    if steps[0] != steps[1]:
        raise ValueError(
            f"destination: strides {end.strides} order a block in another way than source's "
            f"{start.strides}; convert_layout does that"
        )
    mapping = _mapping(block_mapping, 0)
    if mapping.device is not HOST:
        raise ValueError(f"block_mapping: is on {mapping.place}, needs to be on the host")
    pairs = _pairs(mapping.bits, start.shape[0], end.shape[0])
    places = _addresses(start, pairs[:, 0]), _addresses(end, pairs[:, 1])
    moving = places[0] != places[1]
    pairs = pairs[moving]
    _check_independent(pairs, places[0][moving], places[1][moving], block_bytes)

    leader = start if start.device is not HOST else end
    if leader.device is HOST:
        end.bits[pairs[:, 1]] = start.bits[pairs[:, 0]]
        return
    hosts = [a for a in (start, end) if a.device is HOST]
    if not hosts:
        checks.same_place([end], start)
    for a in hosts:
        if not gpu.is_pinned(a.pointer):
            raise ValueError(
                f"{a.name}: is pageable host memory, needs pinned memory "
                "(cupyx.empty_pinned, or torch's pin_memory=True)"
            )
    if block_bytes == 0 or not len(pairs):
        return
    with ordered(on, leader.device, leader.framework, [start, end]):
        copy_runs(start, end, pairs, block_bytes, leader.device, on)
    if hosts and not gpu.is_capturing(leader.device, on):
        in_flight.keep(leader.device, on, [a.owner for a in hosts])


# ---- what both ask of their arguments ----


def _mapping(block_mapping: Any, stream: int) -> Array:
    mapping = array(block_mapping, "block_mapping", stream)
    checks.is_dtype(mapping, "int64")
    if len(mapping.shape) != 2 or mapping.shape[1] != 2:
        raise ValueError(f"block_mapping: shape {mapping.shape}, needs [num_pairs, 2]")
    checks.runs_forward(mapping)
    checks.is_packed(mapping)
    return mapping


def _block_bytes(a: Array) -> int:
    """Size of a block; raises ValueError unless it is one piece of memory."""
    if not a.shape:
        raise ValueError(f"{a.name}: has no dimensions, needs [num_blocks, ...]")
    if 0 not in a.shape and not _is_one_piece(a.shape[1:], a.strides[1:]):
        raise ValueError(
            f"{a.name}: strides {a.strides} of shape {a.shape} scatter a block, "
            "which must be contiguous"
        )
    return math.prod(a.shape[1:]) * itemsize(a.dtype)


@functools.lru_cache(maxsize=256)  # the blocks of all layers are alike
def _is_one_piece(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _addresses(a: Array, blocks: np.ndarray) -> np.ndarray:
    return a.pointer + blocks * (a.strides[0] * itemsize(a.dtype))


def _pairs(mapping: np.ndarray, num_sources: int, num_destinations: int) -> np.ndarray:
    """The pairs that copy something, sorted and each once. Raises IndexError past the ends."""
    pairs = mapping[(mapping[:, 0] >= 0) & (mapping[:, 1] >= 0)]
    ends = ("source", num_sources), ("destination", num_destinations)
    for column, (what, end) in enumerate(ends):
        if len(pairs) and (last := pairs[:, column].max()) >= end:
            raise IndexError(f"block_mapping: {what} block {last}, needs less than {end}")
    # As one number each, they are sorted ten times as fast.
    numbers = np.sort(pairs[:, 0] * num_destinations + pairs[:, 1])
    numbers = numbers[np.diff(numbers, prepend=-1) != 0]
    return np.stack(np.divmod(numbers, max(num_destinations, 1)), axis=1)


def _check_independent(
    pairs: np.ndarray, sources: np.ndarray, destinations: np.ndarray, extent: int
) -> None:
    """Raises ValueError where a pair writes what another one reads or writes.

    sources, destinations    int64 [num_pairs], where the blocks begin
    extent                   how far they reach
    """
    begins = np.sort(destinations)
    near = np.flatnonzero(np.diff(begins) < extent)
    if len(near):
        block = pairs[destinations == begins[near[0] + 1], 1][-1]
        raise ValueError(f"block_mapping: block {block} is the destination of two pairs, needs one")
    if not len(pairs) or sources.min() > begins[-1] + extent or sources.max() + extent < begins[0]:
        return
    nearest = np.searchsorted(begins, sources - extent, side="right")
    hit = nearest < len(begins)
    hit[hit] = begins[nearest[hit]] < sources[hit] + extent
    if hit.any():
        block = pairs[np.argmax(hit), 0]
        raise ValueError(
            f"block_mapping: source block {block} is a destination, too; "
            "copy what depends on another copy with a call of its own"
        )
