"""Decode attention over a paged KV cache: `paged_attention`, and vLLM's two ops of that name."""

from __future__ import annotations

from typing import Any

from cupy_paged import checked_mode
from cupy_paged.arrays import HOST, Array
from cupy_paged.attention_checks import (
    Call,
    Scratch,
    SparseArguments,
    check_call,
    check_named_sizes,
    check_out,
    check_partition_size,
    check_scratch,
)
from cupy_paged.attention_gpu import attend_on_gpu
from cupy_paged.attention_host import attend_on_host
from cupy_paged.attention_kernels import BY_LENGTH
from cupy_paged.graph_breaks import breaks_graphs
from cupy_paged.prepared import keep, repeat
from cupy_paged.prepared_call import PreparedCall
from cupy_paged.results import empty, hand_over


@breaks_graphs
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
    out              like query, in memory of its own; allocated in the query's framework if None
    return_lse       also return lse, float32 [num_seqs, num_heads], natural logarithm
    stream           CUDA stream to run on; by default the current one of the query's framework

    head_size is a multiple of 8 up to 512 (16-bit and 8-bit caches in layout "vllm": also of the
    16 bytes they group), block_size is 1 to 256, num_heads a multiple of num_kv_heads.

    A sequence's result depends on that sequence alone, to the bit, on chips of one kind: not on the
    batch, its order or the number of multiprocessors. Nothing synchronises with the host, and the
    call can be captured into a CUDA graph and replayed with other contents of all arrays.

    Returns out, or (out, lse).
    Raises ValueError or TypeError, before anything runs, for arguments that do not fit; IndexError,
    on the host, for a live block outside the caches; ImportError for GPU arrays without CuPy.
    Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with
    PagedAttention, arXiv:2309.06180.
    """
    sparse = (
        tp_rank, blocksparse_local_blocks, blocksparse_vert_stride, blocksparse_block_size,
        blocksparse_head_sliding_step,
    )  # fmt: skip
    settings = (
        "paged_attention", scale, layout, kv_cache_dtype, max_seq_len, bool(return_lse), *sparse,
    )  # fmt: skip
    arrays = (
        out, None, query, key_cache, value_cache, block_tables, seq_lens, alibi_slopes, k_scale,
        v_scale,
    )  # fmt: skip
    made = repeat(query, settings, arrays, stream)
    if made is not None:
        result = made[0] if out is None else out
        return (result, made[-1]) if return_lse else result
    call = check_call(
        query, key_cache, value_cache, block_tables, seq_lens, scale, layout, kv_cache_dtype,
        k_scale, v_scale, alibi_slopes, max_seq_len, SparseArguments(*sparse), stream,
    )  # fmt: skip
    if out is None:
        target = empty(call.query, "out", call.query.shape, call.query.dtype, call.stream)
    else:
        target = check_out(call, out)
    lse = empty(call.query, "lse", call.state_shape, "float32", call.stream) if return_lse else None
    keep(query, settings, arrays, attend(call, target, lse, makes_out=out is None))
    result = hand_over(target, call.query, call.stream) if out is None else out
    return (result, hand_over(lse, call.query, call.stream)) if lse is not None else result


@breaks_graphs
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
    sparse = (
        tp_rank, blocksparse_local_blocks, blocksparse_vert_stride, blocksparse_block_size,
        blocksparse_head_sliding_step,
    )  # fmt: skip
    settings = (
        "paged_attention_v1", num_kv_heads, block_size, scale, layout, kv_cache_dtype, max_seq_len,
        *sparse,
    )  # fmt: skip
    arrays = (
        out, None, query, key_cache, value_cache, block_tables, seq_lens, alibi_slopes, k_scale,
        v_scale,
    )  # fmt: skip
    if repeat(query, settings, arrays, stream) is not None:
        return
    call = check_call(
        query, key_cache, value_cache, block_tables, seq_lens, scale, layout, kv_cache_dtype,
        k_scale, v_scale, alibi_slopes, max_seq_len, SparseArguments(*sparse), stream,
    )  # fmt: skip
    check_named_sizes(call, num_kv_heads, block_size, max_seq_len)
    keep(query, settings, arrays, attend(call, check_out(call, out), None))


@breaks_graphs
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
                      float32, which rounds nothing
    partition_size    tokens of a partition, a multiple of 16 up to 2**20. If None: 512, or, where
                      max_seq_len does not fit into max_num_partitions of that, the next power of
                      two with which it does

    `paged_attention` cuts sequences into partitions of 512 tokens, those of 32768 tokens and more
    into 1024, those of 65536 and more into 2048. With partitions of the same size, and float32
    scratch, a sequence gets the same bits here.

    Leaves behind, for each partition that has tokens: the largest logit in natural units, the sum
    of exp(logit - largest), and the partition's normalised output. A partition hidden whole by the
    block-sparse mask leaves -FLT_MAX, its number of tokens, and zeros. Others are not written; what
    is left of a sequence that is too long is not specified.

    Raises as `paged_attention` does.
    Source: vLLM's csrc/attention/paged_attention_v2.cu.
    """
    sparse = SparseArguments(
        tp_rank,
        blocksparse_local_blocks,
        blocksparse_vert_stride,
        blocksparse_block_size,
        blocksparse_head_sliding_step,
    )
    call = check_call(
        query, key_cache, value_cache, block_tables, seq_lens, scale, layout, kv_cache_dtype,
        k_scale, v_scale, alibi_slopes, max_seq_len, sparse, stream,
    )  # fmt: skip
    check_named_sizes(call, num_kv_heads, block_size, max_seq_len)
    target = check_out(call, out)
    scratch = check_scratch(call, target, exp_sums, max_logits, tmp_out)
    num_partitions = scratch.exp_sums.shape[2]
    partition_size = check_partition_size(partition_size, num_partitions, max_seq_len)
    call = call._replace(capacity=min(call.capacity, num_partitions * partition_size))
    attend(call, target, None, scratch=scratch, partition_size=partition_size)


def attend(
    call: Call,
    out: Array,
    lse: Array | None,
    *,
    makes_out: bool = False,
    scratch: Scratch | None = None,
    partition_size: int = BY_LENGTH,
    workspace: int = 0,
) -> PreparedCall | None:
    """Runs a checked call; returns what calls like it can use, if anything.

    workspace    address of `workspace_bytes` on the call's device; 0: the op sees to them
    """
    if call.query.shape[0] == 0:
        return None
    if checked_mode.is_on():
        cache = call.geometry
        checked_mode.check_sequences(
            call.seq_lens, call.block_tables, call.capacity, cache.block_size, cache.num_blocks,
            call.stream, call.query.framework,
        )  # fmt: skip
    if call.query.device is HOST:
        attend_on_host(call, out, lse, scratch, partition_size)
        return None
    return attend_on_gpu(call, out, lse, makes_out, scratch, partition_size, workspace)
