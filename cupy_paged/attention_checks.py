"""What a call of the attention ops must be, before anything runs."""

from __future__ import annotations

from typing import Any, NamedTuple

from cupy_paged import checks
from cupy_paged.arrays import Array, array
from cupy_paged.dtypes import FLOATS, kv_cache_dtype_name
from cupy_paged.layouts import CacheGeometry, fits_instead, geometry, infer_layout
from cupy_paged.masks import BlockSparse
from cupy_paged.streams import launch_stream

PARTITION_SIZE = 512
"""Tokens of a partition in the caller's scratch, if nothing speaks against it: vLLM's number."""
MAX_PARTITION_SIZE = 2**20
MAX_TOKENS = 2**31 - MAX_PARTITION_SIZE
"""Longest sequence: token numbers are 32-bit on the device, and partitions may end later."""

_INTO_NEW = "paged_attention without out= returns a new array"


class SparseArguments(NamedTuple):
    """The arguments of block-sparse attention, in vLLM's order and not yet checked."""

    tp_rank: int
    local_blocks: int
    vert_stride: int
    block_size: int
    head_sliding_step: int


class Call(NamedTuple):
    """A checked call: what to attend to, without where the result goes."""

    query: Array
    key_cache: Array
    value_cache: Array
    block_tables: Array
    seq_lens: Array
    geometry: CacheGeometry
    cache_dtype: str
    scale: float
    k_scale: float | Array
    v_scale: float | Array
    alibi_slopes: Array | None
    mask: BlockSparse | None
    capacity: int  # tokens that a sequence may have
    stream: int  # 0 on the host

    @property
    def arrays(self) -> list[Array]:
        candidates = (*self[:5], self.k_scale, self.v_scale, self.alibi_slopes)
        return [a for a in candidates if isinstance(a, Array)]

    @property
    def state_shape(self) -> tuple[int, int]:
        return self.query.shape[0], self.query.shape[1]


def check_call(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    scale: float | None,
    layout: str | None,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    alibi_slopes: Any,
    max_seq_len: int | None,
    sparse: SparseArguments,
    stream: Any,
) -> Call:
    """The call that these arguments of `paged_attention` spell; raises for what does not fit."""
    on = launch_stream(query, stream)

    def read(x: Any, name: str) -> Array:
        return array(x, name, on)

    query, keys, values = (
        read(query, "query"),
        read(key_cache, "key_cache"),
        read(value_cache, "value_cache"),
    )
    tables, lens = read(block_tables, "block_tables"), read(seq_lens, "seq_lens")
    slopes = None if alibi_slopes is None else read(alibi_slopes, "alibi_slopes")
    scales = [checks.scale(x, n, on) for x, n in ((k_scale, "k_scale"), (v_scale, "v_scale"))]
    given = [
        a for a in (query, keys, values, tables, lens, slopes, *scales) if isinstance(a, Array)
    ]
    checks.same_place(given, query)
    for a in given:
        checks.runs_forward(a)

    checks.has_dims(query, "[num_seqs, num_heads, head_size]")
    checks.is_dtype(query, *FLOATS)
    checks.is_packed(query, 2)
    num_seqs, num_heads, head_size = query.shape
    if num_heads == 0:
        raise ValueError(f"query: shape {query.shape} has no heads")
    cache_dtype = kv_cache_dtype_name(kv_cache_dtype, keys.dtype, query.dtype)
    if values.dtype != keys.dtype:
        raise TypeError(
            f"value_cache: dtype {values.dtype} does not match key_cache's {keys.dtype}"
        )
    if layout is None:
        layout = infer_layout(keys, num_heads)
    cache = geometry(layout, keys, values, cache_dtype)
    if cache.head_size != head_size:
        raise ValueError(
            f"query: head_size {head_size} does not match key_cache's {cache.head_size}"
        )
    if num_heads % cache.num_kv_heads:
        raise ValueError(
            f"query: num_heads {num_heads} is no multiple of key_cache's num_kv_heads "
            f'{cache.num_kv_heads} in layout "{layout}"'
            + fits_instead(keys, lambda num_kv_heads: num_heads % num_kv_heads == 0)
        )

    checks.has_dims(tables, "[num_seqs, max_num_blocks_per_seq]")
    checks.is_dtype(tables, "int32")
    checks.is_packed(tables, 1)
    if tables.shape[0] != num_seqs:
        raise ValueError(
            f"block_tables: {tables.shape[0]} rows do not match query's {num_seqs} sequences"
        )
    checks.is_shape(lens, (num_seqs,), "[num_seqs]")
    checks.is_dtype(lens, "int32")
    checks.is_packed(lens)
    if slopes is not None:
        checks.is_shape(slopes, (num_heads,), "[num_heads]")
        checks.is_dtype(slopes, "float32")
        checks.is_packed(slopes)

    capacity = min(tables.shape[1] * cache.block_size, MAX_TOKENS)
    if max_seq_len is not None:
        capacity = min(
            capacity, checks.is_int(max_seq_len, "max_seq_len", at_least=0, at_most=2**63 - 1)
        )
    return Call(
        query,
        keys,
        values,
        tables,
        lens,
        geometry=cache,
        cache_dtype=cache_dtype,
        scale=head_size**-0.5 if scale is None else checks.is_finite(scale, "scale"),
        k_scale=scales[0],
        v_scale=scales[1],
        alibi_slopes=slopes,
        mask=_mask(sparse, cache.block_size),
        capacity=capacity,
        stream=on,
    )


def _mask(sparse: SparseArguments, block_size: int) -> BlockSparse | None:
    if checks.is_int(sparse.vert_stride, "blocksparse_vert_stride", at_least=0) <= 1:
        return None
    checks.is_int(sparse.block_size, "blocksparse_block_size", at_least=1)
    if sparse.block_size % block_size:
        raise ValueError(
            f"blocksparse_block_size: got {sparse.block_size}, needs a multiple of key_cache's "
            f"block_size {block_size}"
        )
    return BlockSparse(
        checks.is_int(sparse.local_blocks, "blocksparse_local_blocks", at_least=0),
        sparse.vert_stride,
        sparse.block_size,
        checks.is_int(sparse.head_sliding_step, "blocksparse_head_sliding_step"),
        checks.is_int(sparse.tp_rank, "tp_rank", at_least=0),
    )


def check_out(call: Call, out: Any) -> Array:
    """The caller's output, which shares no memory with what the call reads."""
    target = array(out, "out", call.stream)
    checks.is_writable(target, _INTO_NEW)
    checks.same_place([target], call.query)
    checks.is_shape(target, call.query.shape, "the shape of query")
    checks.is_dtype(target, call.query.dtype)
    checks.is_packed(target, 2)
    checks.are_apart([target], call.arrays)
    return target


def check_named_sizes(call: Call, num_kv_heads: int, block_size: int, max_seq_len: int) -> None:
    """Checks the sizes that vLLM's signatures spell out, where `paged_attention` looks for itself.

    Raises ValueError or TypeError.
    """
    checks.is_int(max_seq_len, "max_seq_len", at_least=0, at_most=2**63 - 1)
    for name, given, cached in (
        ("num_kv_heads", num_kv_heads, call.geometry.num_kv_heads),
        ("block_size", block_size, call.geometry.block_size),
    ):
        if checks.is_int(given, name) != cached:
            raise ValueError(f"{name}: {given} does not match key_cache's {cached}")


class Scratch(NamedTuple):
    """The caller's own memory for the state of partitions."""

    exp_sums: Array
    max_logits: Array
    tmp_out: Array


def check_scratch(call: Call, out: Array, exp_sums: Any, max_logits: Any, tmp_out: Any) -> Scratch:
    """The caller's scratch, which shares no memory with itself, `out` or what the call reads."""
    scratch = Scratch(
        array(exp_sums, "exp_sums", call.stream),
        array(max_logits, "max_logits", call.stream),
        array(tmp_out, "tmp_out", call.stream),
    )
    checks.same_place([*scratch], call.query)
    for a in scratch:
        checks.is_writable(a, _INTO_NEW)
        checks.is_packed(a)
    checks.are_apart(scratch, [out, *call.arrays])
    checks.has_dims(scratch.exp_sums, "[num_seqs, num_heads, max_num_partitions]")
    num_partitions = scratch.exp_sums.shape[2]
    shape = (*call.state_shape, num_partitions)
    for a in scratch[:2]:
        checks.is_shape(a, shape, "[num_seqs, num_heads, max_num_partitions]")
        checks.is_dtype(a, "float32")
    checks.is_shape(
        scratch.tmp_out,
        (*shape, call.geometry.head_size),
        "[num_seqs, num_heads, max_num_partitions, head_size]",
    )
    checks.is_dtype(scratch.tmp_out, *dict.fromkeys((call.query.dtype, "float32")))
    checks.is_aligned(scratch.tmp_out, 4)
    if num_partitions == 0:
        raise ValueError(f"exp_sums: shape {scratch.exp_sums.shape} has no partitions")
    return scratch


def check_partition_size(partition_size: int | None, num_partitions: int, max_seq_len: int) -> int:
    """The caller's `partition_size`; if None, 512, or as much more as `max_seq_len` needs to fit.

    Never less: with spare partitions, the size must not follow this batch's `max_seq_len`.
    """
    if partition_size is not None:
        if checks.is_int(partition_size, "partition_size", 16, MAX_PARTITION_SIZE) % 16:
            raise ValueError(f"partition_size: got {partition_size}, needs a multiple of 16")
        return partition_size
    size = PARTITION_SIZE
    while size * num_partitions < max_seq_len and size < MAX_PARTITION_SIZE:
        size *= 2
    if size * num_partitions < max_seq_len:
        raise ValueError(
            f"exp_sums: {num_partitions} partitions, of {size} tokens at most, cannot hold "
            f"max_seq_len {max_seq_len}"
        )
    return size
