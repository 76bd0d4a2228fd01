"""The data of a case: one pool of random keys and values, and as many data sets as it takes.

Every data set is another block table over the same pool, so that all layouts and systems read the
same bytes, each in its own arrangement, and nothing is generated twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.shapes import DTYPES, Case, Shape
from cupy_paged.dtypes import itemsize

MIN_BYTES = 600_000_000
"""Live keys and values of all data sets together: far more than any L2 cache keeps."""

ALIGNMENT = 512


def num_sets(set_bytes: int) -> int:
    return max(2, math.ceil(MIN_BYTES / set_bytes))


def block_tables(shape: Shape, sets: int, scatter: str, seed: int) -> np.ndarray:
    """int32 [sets, batch, max_num_blocks_per_seq]: every block of the pool in one place.

    scatter    "pool": blocks in random order over the whole pool, as in an engine that has run
               for a while; "set": each data set within its own share of the pool
    """
    used = shape.blocks_per_seq
    rng = np.random.default_rng(seed)
    if scatter == "pool":
        order = rng.permutation(sets * sum(used)).reshape(sets, sum(used))
    else:
        order = np.stack([i * sum(used) + rng.permutation(sum(used)) for i in range(sets)])
    tables = np.zeros((sets, shape.batch, max(used)), np.int32)
    live = np.arange(max(used)) < np.array(used)[:, None]
    tables[:, live] = order
    return tables


class View(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None  # in elements; None: contiguous


class Reading(NamedTuple):
    """How caches lie in the two halves of the pool, in the words of one of our layouts."""

    layout: str
    key: View
    value: View


def reading(arrangement: str, shape: Shape, num_blocks: int, kv_dtype: str) -> Reading:
    """
    arrangement    a layout; "heads first" [num_kv_heads, num_blocks, block_size, head_size]; or
                   "dense" [num_sequences, num_kv_heads, seq_len, head_size], whose blocks are
                   numbered as `dense_tables` does
    """
    heads, size, head_size = shape.num_kv_heads, shape.block_size, shape.head_size
    if arrangement == "vllm":
        x = 16 // itemsize(kv_dtype)
        key = View((num_blocks, heads, head_size // x, size, x))
        return Reading("vllm", key, View((num_blocks, heads, head_size, size)))
    if arrangement == "heads first":
        strides = (size * head_size, num_blocks * size * head_size, head_size, 1)
        view = View((num_blocks, heads, size, head_size), strides)
    elif arrangement == "dense":
        # A block of one head is what is counted: heads are whole sequences apart.
        per_seq = max(shape.blocks_per_seq)
        blocks = (num_blocks // per_seq - 1) * heads * per_seq + per_seq
        strides = (size * head_size, shape.max_seq_len * head_size, head_size, 1)
        view = View((blocks, heads, size, head_size), strides)
    elif arrangement == "HND":
        view = View((num_blocks, heads, size, head_size))
    else:
        view = View((num_blocks, size, heads, head_size))
    return Reading("NHD" if arrangement == "NHD" else "HND", view, view)


def dense_tables(shape: Shape, sets: int) -> np.ndarray:
    """The block tables that read a dense cache, as `reading` counts its blocks."""
    per_seq = max(shape.blocks_per_seq)
    sequences = np.arange(sets * shape.batch).reshape(sets, shape.batch, 1)
    return (sequences * shape.num_kv_heads * per_seq + np.arange(per_seq)).astype(np.int32)


@dataclass(frozen=True)
class DataSets:
    shape: Shape
    dtypes: str
    num_sets: int
    pool: Any  # memory: keys in the first half, values in the second
    queries: Any  # memory
    tables: np.ndarray  # [num_sets, batch, max_num_blocks_per_seq]

    @property
    def dtype(self) -> str:
        return DTYPES[self.dtypes][0]

    @property
    def kv_dtype(self) -> str:
        return DTYPES[self.dtypes][1]

    @property
    def kv_bytes(self) -> int:
        return self.shape.kv_bytes(self.dtypes)

    @property
    def num_blocks(self) -> int:
        return self.num_sets * sum(self.shape.blocks_per_seq)

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        shape = self.shape
        return self.num_sets, shape.batch, shape.num_heads, shape.head_size

    @property
    def seq_lens(self) -> np.ndarray:
        return np.array(self.shape.seq_lens, np.int32)

    def query_views(self, arrays: Any) -> Any:
        """[num_sets, batch, num_heads, head_size]"""
        return arrays.view(self.queries, self.dtype, self.query_shape)

    def caches(self, arrays: Any, arrangement: str) -> tuple[Any, Any, str]:
        """Key cache, value cache, and the layout that our ops read them in."""
        found = reading(arrangement, self.shape, self.num_blocks, self.kv_dtype)
        half = self.pool.size // 2
        key = arrays.view(self.pool, self.kv_dtype, *found.key)
        return key, arrays.view(self.pool, self.kv_dtype, *found.value, offset=half), found.layout


def pool_half(shape: Shape, num_blocks: int, kv_dtype: str) -> int:
    """Bytes of keys, a multiple of ALIGNMENT."""
    block = shape.num_kv_heads * shape.block_size * shape.head_size * itemsize(kv_dtype)
    return math.ceil(num_blocks * block / ALIGNMENT) * ALIGNMENT


def build(device: Any, case: Case, scatter: str = "pool", seed: int = 0) -> DataSets:
    shape = case.shape
    dtype, kv_dtype = DTYPES[case.dtypes]
    sets = num_sets(shape.kv_bytes(case.dtypes))
    num_blocks = sets * sum(shape.blocks_per_seq)
    pool = device.memory(2 * pool_half(shape, num_blocks, kv_dtype))
    device.fill(pool, kv_dtype, seed)
    num_queries = sets * shape.batch * shape.num_heads * shape.head_size
    queries = device.memory(num_queries * itemsize(dtype))
    device.fill(queries, dtype, seed + 1)
    tables = block_tables(shape, sets, scatter, seed)
    return DataSets(shape, case.dtypes, sets, pool, queries, tables)
