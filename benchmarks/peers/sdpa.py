"""torch's scaled_dot_product_attention over a dense cache of the same bytes: no paging at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.data import DataSets, dense_tables
from benchmarks.frameworks import Torch
from benchmarks.prepared import Like, Prepared, Unsupported
from cupy_paged.dtypes import is_fp8

VARIANTS = ("",)
ARRANGEMENT = "dense"


def version() -> str:
    return Torch().torch.__version__


def prepare(variant: str, sets: DataSets, device: Any) -> Prepared:
    shape = sets.shape
    if is_fp8(sets.kv_dtype):
        raise Unsupported("fp8 caches")
    if shape.is_ragged or shape.max_seq_len % shape.block_size:
        raise Unsupported("sequences of different lengths")
    arrays = Torch()
    attend = arrays.torch.nn.functional.scaled_dot_product_attention
    dense = sets.num_sets, shape.batch, shape.num_kv_heads, shape.max_seq_len, shape.head_size
    keys = arrays.view(sets.pool, sets.kv_dtype, dense)
    values = arrays.view(sets.pool, sets.kv_dtype, dense, offset=sets.pool.size // 2)
    queries = sets.query_views(arrays).unsqueeze(3)
    outs: list[Any] = [None] * sets.num_sets

    def call(i: int) -> Callable[[], Any]:
        query, key, value = queries[i], keys[i], values[i]

        def run() -> None:
            # Results stay where the capture put them, and are held, so that nobody else gets it.
            outs[i] = attend(query, key, value, enable_gqa=shape.num_heads != shape.num_kv_heads)

        return run

    return Prepared(
        arrays,
        [call(i) for i in range(sets.num_sets)],
        lambda: arrays.floats(outs[-1].squeeze(2), sets.dtype),
        Like(ARRANGEMENT, dense_tables(shape, sets.num_sets), shape.default_scale),
    )
