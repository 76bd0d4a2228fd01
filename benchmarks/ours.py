"""Our attention ops over the data sets of a case."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cupy_paged
from benchmarks.check import kv_cache_dtype
from benchmarks.data import DataSets
from benchmarks.prepared import Prepared
from cupy_paged.dtypes import itemsize

OPS = ("paged_attention", "v1", "v2")
PARTITION_SIZE = 512  # of v2's scratch, as vLLM's contract has it


def empty(device: Any, arrays: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """An array of NaN, in which a missing result shows."""
    memory = device.memory(math.prod(shape) * itemsize(dtype))
    device.spoil(memory)
    return arrays.view(memory, dtype, shape)


def prepare(op: str, sets: DataSets, layout: str, device: Any, arrays: Any) -> Prepared:
    shape = sets.shape
    key, value, _ = sets.caches(arrays, layout)
    queries = sets.query_views(arrays)
    outs = empty(device, arrays, sets.dtype, sets.query_shape)
    tables, seq_lens = arrays.array(sets.tables), arrays.array(sets.seq_lens)
    cache_dtype = kv_cache_dtype(sets.kv_dtype)
    num_partitions = math.ceil(shape.max_seq_len / PARTITION_SIZE)
    state = shape.batch, shape.num_heads, num_partitions
    scratch = ()
    if op == "v2":
        # tmp_out in the query's dtype: what vLLM's callers bring. Calls run one after the other.
        scratch = (
            empty(device, arrays, "float32", state),
            empty(device, arrays, "float32", state),
            empty(device, arrays, sets.dtype, (*state, shape.head_size)),
        )

    def call(i: int) -> Callable[[], Any]:
        query, out, table = queries[i], outs[i], tables[i]
        if op == "paged_attention":
            return lambda: cupy_paged.paged_attention(
                query, key, value, table, seq_lens,
                layout=layout, kv_cache_dtype=cache_dtype, out=out,
            )  # fmt: skip
        tail = (
            query, key, value, shape.num_kv_heads, shape.default_scale, table, seq_lens,
            shape.block_size, shape.max_seq_len, None, cache_dtype, 1.0, 1.0,
        )  # fmt: skip
        if op == "v1":
            return lambda: cupy_paged.paged_attention_v1(out, *tail, layout=layout)
        return lambda: cupy_paged.paged_attention_v2(out, *scratch, *tail, layout=layout)

    return Prepared(
        arrays,
        [call(i) for i in range(sets.num_sets)],
        lambda: arrays.floats(outs[-1], sets.dtype),
    )
