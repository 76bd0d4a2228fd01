"""JAX's Pallas kernel. No graph is captured: the time is the host's clock over chains of calls."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.data import DataSets
from benchmarks.frameworks import Jax
from benchmarks.prepared import Like, Prepared, Unsupported
from cupy_paged.dtypes import is_fp8

VARIANTS = ("",)
ARRANGEMENT = "heads first"
SPLITS = 16  # the kernel's own default
MOST_PAGES = 8  # in a compute block, likewise


def version() -> str:
    arrays = Jax()
    importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")  # not in every JAX
    return arrays.jax.__version__


def padded(tables: np.ndarray) -> np.ndarray:
    """Tables of a width that SPLITS divides; the kernel masks what lies past a sequence's end."""
    return np.pad(tables, ((0, 0), (0, 0), (0, -tables.shape[2] % SPLITS)))


def pages_per_compute_block(width: int) -> int:
    """The largest power of two, up to MOST_PAGES, that divides the pages of a split."""
    pages = MOST_PAGES
    while width // SPLITS % pages:
        pages //= 2
    return pages


def prepare(variant: str, sets: DataSets, device: Any) -> Prepared:
    shape = sets.shape
    if is_fp8(sets.kv_dtype):
        raise Unsupported("fp8 caches without a scale for each token")
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    arrays = Jax()
    pages = shape.num_kv_heads, sets.num_blocks, shape.block_size, shape.head_size
    key = arrays.view(sets.pool, sets.kv_dtype, pages)
    value = arrays.view(sets.pool, sets.kv_dtype, pages, offset=sets.pool.size // 2)
    queries = arrays.view(sets.queries, sets.dtype, sets.query_shape)
    tables, seq_lens = padded(sets.tables), arrays.array(sets.seq_lens)
    attend = arrays.jax.jit(
        lambda *given: paged_attention(
            *given,
            k_splits=SPLITS,
            pages_per_compute_block=pages_per_compute_block(tables.shape[2]),
        )
    )
    last: list[Any] = []

    def call(i: int) -> Callable[[], Any]:
        query, table = queries[i], arrays.array(tables[i])

        def run() -> Any:
            last[:] = [attend(query, key, value, table, seq_lens)]
            return last[0]

        return run

    return Prepared(
        arrays,
        [call(i) for i in range(sets.num_sets)],
        lambda: arrays.floats(last[0], sets.dtype),
        # The kernel knows no scale.
        Like(ARRANGEMENT, sets.tables, 1.0),
    )
