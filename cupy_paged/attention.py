"""Decode attention over a paged KV cache: `paged_attention`, and vLLM's two ops of that name."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cupy_paged import checks, gpu, reference
from cupy_paged.arrays import HOST, Array, array
from cupy_paged.attention_kernels import (
    PARAMS,
    PARTITION_SIZE,
    HeadProblem,
    attention_plan,
    combine_kernel,
)
from cupy_paged.dtypes import FLOATS, decode, encode, is_fp8, kv_cache_dtype_name
from cupy_paged.launch import cache_strides, launch, scale_fields
from cupy_paged.layouts import CacheGeometry, geometry, infer_layout
from cupy_paged.masks import BlockSparse
from cupy_paged.results import empty, hand_over, scratch_memory
from cupy_paged.streams import Ordering, launch_stream

MAX_PARTITION_SIZE = 2**20
MAX_TOKENS = 2**31 - MAX_PARTITION_SIZE
"""Longest sequence: token numbers are 32-bit on the device, and partitions may end later."""

_INTO_NEW = "paged_attention without out= returns a new array"


class _Call(NamedTuple):
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


def paged_attention(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    *,
    scale: float | None = None,
    layout: str | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
    alibi_slopes: Any = None,
    max_seq_len: int | None = None,
    tp_rank: int = 0,
    blocksparse_local_blocks: int = 0,
    blocksparse_vert_stride: int = 0,
    blocksparse_block_size: int = 64,
    blocksparse_head_sliding_step: int = 0,
    out: Any = None,
    return_lse: bool = False,
    stream: Any = None,
) -> Any:
    """Attention of one query token per sequence over the keys and values in its cache blocks.

    >>> import numpy as np
    >>> query = np.ones((2, 4, 8), np.float32)
    >>> key_cache = value_cache = np.ones((5, 2, 16, 8), np.float32)
    >>> block_tables = np.array([[3, 0], [1, 0]], np.int32)
    >>> seq_lens = np.array([20, 7], np.int32)
    >>> paged_attention(query, key_cache, value_cache, block_tables, seq_lens, layout="HND").shape
    (2, 4, 8)

    All arrays are in one place: on one CUDA device, or on the host, where a NumPy reference runs.

    query            [num_seqs, num_heads, head_size], float16, bfloat16 or float32; heads and
                     sequences may be any distance apart
    key_cache,       paged caches in `layout`, of the query's dtype or fp8; the blocks, heads and
    value_cache      tokens of a layout may be any distance apart
    block_tables     int32 [num_seqs, max_num_blocks_per_seq]; entries past a sequence's last
                     block are never read
    seq_lens         int32 [num_seqs], tokens in the cache, the query's own included; a sequence
                     with 0 or fewer gives zeros, and lse -inf; one with more than its table or
                     `max_seq_len` holds gives NaN
    scale            of the logits; head_size ** -0.5 if None
    layout           "vllm", "HND" or "NHD" (see cupy_paged.layouts); None where the shapes leave
                     no doubt
    kv_cache_dtype   "auto": the caches' own dtype; "fp8" = "fp8_e4m3", "fp8_e5m2": how to read
                     uint8 caches
    k_scale,         what a cached 1.0 stands for: floats, or one-element float32 arrays, read on
    v_scale          the device; used for fp8 caches only
    alibi_slopes     float32 [num_heads]; adds slope * (token - seq_len + 1) to the logits
    max_seq_len      upper bound on seq_lens; bounds scratch memory where block_tables is wide
    blocksparse_*,   vLLM's block-sparse attention (cupy_paged.masks.BlockSparse), used where
    tp_rank          blocksparse_vert_stride > 1
    out              like query; allocated in the query's framework if None
    return_lse       also return lse, float32 [num_seqs, num_heads], natural logarithm
    stream           CUDA stream to run on; by default the current one of the query's framework

    head_size is a multiple of 8 up to 512 (16-bit and 8-bit caches in layout "vllm": also of the
    16 bytes they group), block_size is 1 to 256, num_heads a multiple of num_kv_heads.

    A sequence's result depends on that sequence alone, to the bit: not on the batch, its order or
    the device's size. Nothing synchronises with the host, and the call can be captured into a CUDA
    graph and replayed with other contents of all arrays.

    Returns out, or (out, lse).
    Raises ValueError or TypeError, before anything runs, for arguments that do not fit; IndexError,
    on the host, for a live block outside the caches; ImportError for GPU arrays without CuPy.
    Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with
    PagedAttention, arXiv:2309.06180.
    """
    call = _check(
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        scale=scale,
        layout=layout,
        kv_cache_dtype=kv_cache_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
        alibi_slopes=alibi_slopes,
        max_seq_len=max_seq_len,
        sparse=(
            tp_rank,
            blocksparse_local_blocks,
            blocksparse_vert_stride,
            blocksparse_block_size,
            blocksparse_head_sliding_step,
        ),
        stream=stream,
    )
    if out is None:
        target = empty(call.query, "out", call.query.shape, call.query.dtype, call.stream)
    else:
        target = _check_out(call, out)
    lse = empty(call.query, "lse", call.state_shape, "float32", call.stream) if return_lse else None
    _attend(call, target, lse)
    result = hand_over(target, call.stream) if out is None else out
    return (result, hand_over(lse, call.stream)) if lse is not None else result


def paged_attention_v1(
    out: Any,
    query: Any,
    key_cache: Any,
    value_cache: Any,
    num_kv_heads: int,
    scale: float,
    block_tables: Any,
    seq_lens: Any,
    block_size: int,
    max_seq_len: int,
    alibi_slopes: Any,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    tp_rank: int = 0,
    blocksparse_local_blocks: int = 0,
    blocksparse_vert_stride: int = 0,
    blocksparse_block_size: int = 64,
    blocksparse_head_sliding_step: int = 0,
    *,
    layout: str | None = None,
    stream: Any = None,
) -> None:
    """vLLM's op of this name: writes the attention of each sequence's newest token into `out`.

    Arguments in vLLM's order, with the meaning they have in `paged_attention`; num_kv_heads and
    block_size must be those of the caches. There is no limit on max_seq_len: long sequences are
    split, with scratch of our own. Arrays that it writes may not be JAX's.

    Raises as `paged_attention` does.
    Source: vLLM's csrc/attention/paged_attention_v1.cu.
    """
    call = _check(
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        scale=scale,
        layout=layout,
        kv_cache_dtype=kv_cache_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
        alibi_slopes=alibi_slopes,
        max_seq_len=checks.is_int(max_seq_len, "max_seq_len", at_least=0, at_most=2**63 - 1),
        sparse=(
            tp_rank,
            blocksparse_local_blocks,
            blocksparse_vert_stride,
            blocksparse_block_size,
            blocksparse_head_sliding_step,
        ),
        stream=stream,
    )
    _check_named_sizes(call, num_kv_heads, block_size)
    _attend(call, _check_out(call, out), None)


def paged_attention_v2(
    out: Any,
    exp_sums: Any,
    max_logits: Any,
    tmp_out: Any,
    query: Any,
    key_cache: Any,
    value_cache: Any,
    num_kv_heads: int,
    scale: float,
    block_tables: Any,
    seq_lens: Any,
    block_size: int,
    max_seq_len: int,
    alibi_slopes: Any,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    tp_rank: int = 0,
    blocksparse_local_blocks: int = 0,
    blocksparse_vert_stride: int = 0,
    blocksparse_block_size: int = 64,
    blocksparse_head_sliding_step: int = 0,
    *,
    partition_size: int | None = None,
    layout: str | None = None,
    stream: Any = None,
) -> None:
    """vLLM's op of this name: `paged_attention_v1`, with the caller's scratch for partitions.

    exp_sums,         float32 [num_seqs, num_heads, max_num_partitions]
    max_logits
    tmp_out           [num_seqs, num_heads, max_num_partitions, head_size], the query's dtype, or
                      float32, which rounds nothing and gives the bits of `paged_attention`
    partition_size    tokens of a partition, a multiple of 16 up to 2**20. If None: 512, or, where
                      max_seq_len does not fit into max_num_partitions of that, the next power of
                      two with which it does

    Leaves behind, for each partition that has tokens: the largest logit in natural units, the sum
    of exp(logit - largest), and the partition's normalised output. A partition hidden whole by the
    block-sparse mask leaves -FLT_MAX, its number of tokens, and zeros. Others are not written; what
    is left of a sequence that is too long is not specified.

    Raises as `paged_attention` does.
    Source: vLLM's csrc/attention/paged_attention_v2.cu.
    """
    call = _check(
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        scale=scale,
        layout=layout,
        kv_cache_dtype=kv_cache_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
        alibi_slopes=alibi_slopes,
        max_seq_len=checks.is_int(max_seq_len, "max_seq_len", at_least=0, at_most=2**63 - 1),
        sparse=(
            tp_rank,
            blocksparse_local_blocks,
            blocksparse_vert_stride,
            blocksparse_block_size,
            blocksparse_head_sliding_step,
        ),
        stream=stream,
    )
    _check_named_sizes(call, num_kv_heads, block_size)
    target = _check_out(call, out)
    scratch = _check_scratch(call, target, exp_sums, max_logits, tmp_out)
    num_partitions = scratch.exp_sums.shape[2]
    if partition_size is None:
        partition_size = _partition_size_of(num_partitions, max_seq_len)
    elif checks.is_int(partition_size, "partition_size", 16, MAX_PARTITION_SIZE) % 16:
        raise ValueError(f"partition_size: got {partition_size}, needs a multiple of 16")
    call = call._replace(capacity=min(call.capacity, num_partitions * partition_size))
    _attend(call, target, None, scratch, partition_size)


# ---- checks ----


def _check(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    *,
    scale: float | None,
    layout: str | None,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    alibi_slopes: Any,
    max_seq_len: int | None,
    sparse: tuple[int, int, int, int, int],
    stream: Any,
) -> _Call:
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
            f"{cache.num_kv_heads}"
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
    return _Call(
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
        mask=_block_sparse(*sparse, cache.block_size),
        capacity=capacity,
        stream=on,
    )


def _block_sparse(
    tp_rank: int,
    local_blocks: int,
    vert_stride: int,
    sparse_block_size: int,
    head_sliding_step: int,
    block_size: int,
) -> BlockSparse | None:
    if checks.is_int(vert_stride, "blocksparse_vert_stride", at_least=0) <= 1:
        return None
    checks.is_int(sparse_block_size, "blocksparse_block_size", at_least=1)
    if sparse_block_size % block_size:
        raise ValueError(
            f"blocksparse_block_size: got {sparse_block_size}, needs a multiple of key_cache's "
            f"block_size {block_size}"
        )
    return BlockSparse(
        checks.is_int(local_blocks, "blocksparse_local_blocks", at_least=0),
        vert_stride,
        sparse_block_size,
        checks.is_int(head_sliding_step, "blocksparse_head_sliding_step"),
        checks.is_int(tp_rank, "tp_rank", at_least=0),
    )


def _check_out(call: _Call, out: Any) -> Array:
    target = array(out, "out", call.stream)
    checks.is_writable(target, _INTO_NEW)
    checks.same_place([target], call.query)
    checks.is_shape(target, call.query.shape, "the shape of query")
    checks.is_dtype(target, call.query.dtype)
    checks.is_packed(target, 2)
    return target


def _check_named_sizes(call: _Call, num_kv_heads: int, block_size: int) -> None:
    for name, given, cached in (
        ("num_kv_heads", num_kv_heads, call.geometry.num_kv_heads),
        ("block_size", block_size, call.geometry.block_size),
    ):
        if checks.is_int(given, name) != cached:
            raise ValueError(f"{name}: {given} does not match key_cache's {cached}")


class _Scratch(NamedTuple):
    exp_sums: Array
    max_logits: Array
    tmp_out: Array


def _check_scratch(
    call: _Call, out: Array, exp_sums: Any, max_logits: Any, tmp_out: Any
) -> _Scratch:
    scratch = _Scratch(
        array(exp_sums, "exp_sums", call.stream),
        array(max_logits, "max_logits", call.stream),
        array(tmp_out, "tmp_out", call.stream),
    )
    checks.same_place([*scratch], call.query)
    for a in scratch:
        checks.is_writable(a, _INTO_NEW)
        checks.is_packed(a)
    checks.are_apart([out, *scratch])
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


def _partition_size_of(num_partitions: int, max_seq_len: int) -> int:
    """512, or as much more as it takes for `max_seq_len` to fit.

    Never less: with spare partitions, the size must not follow this batch's `max_seq_len`.
    """
    size = PARTITION_SIZE
    while size * num_partitions < max_seq_len and size < MAX_PARTITION_SIZE:
        size *= 2
    if size * num_partitions < max_seq_len:
        raise ValueError(
            f"exp_sums: {num_partitions} partitions, of {size} tokens at most, cannot hold "
            f"max_seq_len {max_seq_len}"
        )
    return size


# ---- the two backends ----


def _attend(
    call: _Call,
    out: Array,
    lse: Array | None,
    scratch: _Scratch | None = None,
    partition_size: int = PARTITION_SIZE,
) -> None:
    if call.query.shape[0] == 0:
        return
    backend = _attend_on_host if call.query.device is HOST else _attend_on_gpu
    backend(call, out, lse, scratch, partition_size)


def _attend_on_host(
    call: _Call, out: Array, lse: Array | None, scratch: _Scratch | None, partition_size: int
) -> None:
    lens = call.seq_lens.bits
    arguments = {
        "query": decode(call.query.bits, call.query.dtype),
        "key_cache": call.key_cache.bits,
        "value_cache": call.value_cache.bits,
        "block_tables": call.block_tables.bits,
        "seq_lens": lens,
        "scale": call.scale,
        "layout": call.geometry.layout,
        "cache_dtype": call.cache_dtype,
        "k_scale": checks.host_scale(call.k_scale),
        "v_scale": checks.host_scale(call.v_scale),
        "alibi_slopes": None if call.alibi_slopes is None else call.alibi_slopes.bits,
        "mask": call.mask,
        "max_seq_len": call.capacity,
    }
    longest = min(call.capacity, int(lens.max()))
    if scratch is None and longest <= partition_size:
        result, result_lse = reference.paged_attention(**arguments)
    else:
        if scratch is not None:
            num_partitions = scratch.exp_sums.shape[2]
        else:
            num_partitions = -(-longest // partition_size)
        *states, live = reference.paged_attention_partitions(
            **arguments, partition_size=partition_size, num_partitions=num_partitions
        )
        result, result_lse = reference.combine_partitions(*states, live)
        for target, state in zip(scratch or (), states, strict=False):
            written = np.broadcast_to(live[:, None], state.shape[:3])
            target.bits[written] = encode(state[written], target.dtype)
    out.bits[...] = encode(result, out.dtype)
    if lse is not None:
        lse.bits[...] = result_lse


def _attend_on_gpu(
    call: _Call, out: Array, lse: Array | None, scratch: _Scratch | None, partition_size: int
) -> None:
    query, cache, stream = call.query, call.geometry, call.stream
    num_seqs, num_heads, head_size = query.shape
    if scratch is not None:
        max_partitions, scratch_dtype = scratch.exp_sums.shape[2], scratch.tmp_out.dtype
    else:
        max_partitions, scratch_dtype = max(-(-call.capacity // partition_size), 1), "float32"
    direct = scratch is None and max_partitions == 1

    limits = gpu.device_limits(query.device, gpu.emulated_sm())
    problem = HeadProblem(
        query.dtype,
        call.cache_dtype,
        cache.layout,
        head_size,
        cache.block_size,
        num_heads // cache.num_kv_heads,
        cache.key_alignment,
        cache.value_alignment,
        call.alibi_slopes is not None,
        call.mask is not None,
    )
    plan = attention_plan(
        problem, limits.sm, limits.shared_bytes, None if direct else scratch_dtype
    )

    own_scratch = None
    pointers = dict.fromkeys(("tmp_out", "exp_sums", "max_logits"), 0)
    if scratch is not None:
        pointers = {name: getattr(scratch, name).pointer for name in pointers}
    elif not direct:
        slots = num_seqs * num_heads * max_partitions
        own_scratch = scratch_memory(query, 4 * slots * (head_size + 2), stream)
        tmp_out = own_scratch.pointer
        exp_sums = tmp_out + 4 * slots * head_size
        pointers = {"tmp_out": tmp_out, "exp_sums": exp_sums, "max_logits": exp_sums + 4 * slots}

    mask = call.mask or BlockSparse(0, 1, 1, 0)
    params = PARAMS.pack(
        pointers
        | {name: a.pointer for name, a in zip(call._fields, call[:5], strict=False)}
        | scale_fields("k_scale", call.k_scale if is_fp8(call.cache_dtype) else 1.0)
        | scale_fields("v_scale", call.v_scale if is_fp8(call.cache_dtype) else 1.0)
        | cache_strides("key_strides", cache.key_strides)
        | cache_strides("value_strides", cache.value_strides)
        | {
            "out": out.pointer,
            "lse": 0 if lse is None else lse.pointer,
            "alibi_slopes": 0 if call.alibi_slopes is None else call.alibi_slopes.pointer,
            "query_stride_seq": query.strides[0],
            "query_stride_head": query.strides[1],
            "out_stride_seq": out.strides[0],
            "out_stride_head": out.strides[1],
            "block_tables_stride": call.block_tables.strides[0],
            "num_seqs": num_seqs,
            "num_heads": num_heads,
            "num_kv_heads": cache.num_kv_heads,
            "partition_size": partition_size,
            "max_partitions": max_partitions,
            "max_seq_len": call.capacity,
            "scale": call.scale,
            "sparse_local_blocks": mask.local_blocks,
            "sparse_vert_stride": mask.vert_stride,
            "sparse_block_size": mask.block_size,
            "sparse_head_sliding_step": mask.head_sliding_step,
            "tp_rank": mask.tp_rank,
        }
    )
    written = [a for a in (out, lse, *(scratch or ())) if a is not None]
    ordering = Ordering(stream, query.device, query.framework, [*call.arrays, *written])
    ordering.before()
    work = num_seqs * max_partitions * cache.num_kv_heads * plan.tiles_per_group
    launch(plan.kernel, query.device, stream, work, params, resident=True)
    if not direct:
        combine = combine_kernel(query.dtype, scratch_dtype, head_size)
        launch(combine, query.device, stream, num_seqs * num_heads, params)
    ordering.after()
