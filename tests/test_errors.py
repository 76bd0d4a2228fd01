"""Wrong calls: the error names the argument, what it got and what it needs, and nothing is written."""

# ruff: noqa: E501  (one bad call a line, as a table)

import numpy as np
import pytest

import cupy_paged
from support import compare, ops
from support.bad_calls import (
    GOOD,
    attention_arguments,
    bad_ints,
    bad_memory,
    bad_numbers,
    bad_scales,
    caches,
    halves,
    not_arrays,
    off_by,
    overlapping,
    read_only,
    strided,
    table,
    to,
    v1_arguments,
    v2_arguments,
    via,
)

SPARSE = {"blocksparse_vert_stride": 4, "blocksparse_local_blocks": 1}


def sparse(**changes):
    return to(**{**SPARSE, **changes})


def sharing(dtype, **shapes):
    """Arrays of these shapes in one buffer, each beginning one head before the last one ends."""
    starts, stop = {}, 0
    for name, shape in shapes.items():
        starts[name] = max(stop - shape[-1], 0)
        stop = starts[name] + int(np.prod(shape))
    memory = np.ones(stop, dtype)
    return {
        name: memory[starts[name] : starts[name] + int(np.prod(shape))].reshape(shape)
        for name, shape in shapes.items()
    }


def gathered(length, start):
    """The first of two sequences of a block each is asked for `length` tokens."""
    starts = None if start is None else np.array([start, 0], np.int32)
    return to(
        **{name: halves(20, 2, 64, fill=7) for name in ("key", "value")},
        block_tables=np.array([[2], [1]], np.int32),
        cu_seq_lens=np.array([0, length, length + 3], np.int32),
        seq_starts=starts,
    )


def wide_heads(head_size, **changes):
    """Query, out and caches of another head_size."""
    return to(
        query=halves(2, 4, head_size),
        out=halves(2, 4, head_size),
        key_cache=halves(3, 2, 16, head_size),
        value_cache=halves(3, 2, 16, head_size),
        **changes,
    )


def vllm(key_shape, value_shape):
    return to(layout="vllm", key_cache=halves(*key_shape), value_cache=halves(*value_shape))


ATTENTION = [
    *not_arrays("query", "key_cache", "value_cache", "block_tables", "seq_lens"),
    *bad_memory("query", "key_cache", "value_cache", "block_tables", "seq_lens", "alibi_slopes", "out"),
    ("query has 2 dimensions", via("query", lambda a: a[0]), ValueError, r"^query: shape \(4, 64\) has 2 dimensions, needs \[num_seqs, num_heads, head_size\]"),
    ("query has 4 dimensions", via("query", lambda a: a[None]), ValueError, r"^query: shape \(1, 2, 4, 64\) has 4 dimensions"),
    ("query is float64", via("query", np.float64), TypeError, "^query: dtype float64 .*float16"),
    ("query is int32", via("query", np.int32), TypeError, "^query: dtype int32, needs float16"),
    ("query is complex", via("query", np.complex64), TypeError, "^query: dtype complex64"),
    ("query is uint8", via("query", np.uint8), TypeError, "^query: dtype uint8, needs float16"),
    ("query has no heads", to(query=halves(2, 0, 64)), ValueError, r"^query: shape \(2, 0, 64\) has no heads"),
    ("query has another head_size", to(query=halves(2, 4, 128)), ValueError, "^query: head_size 128 does not match key_cache's 64"),
    ("query has 3 heads for 2", to(query=halves(2, 3, 64)), ValueError, '^query: num_heads 3 .*num_kv_heads 2 in layout "HND"$'),
    ("query has strided channels", via("query", strided), ValueError, r"^query: strides \(.* 2\) .*contiguous"),
    ("query runs backwards", via("query", lambda a: a[::-1]), ValueError, "^query: negative strides"),
    ("caches have 3 dimensions", caches(3, 16, 64), ValueError, r"^key_cache: shape \(3, 16, 64\) has 3 dimensions, needs 4"),
    ("caches have 3 dimensions, no layout", lambda g: {**caches(3, 16, 64)(g), "layout": None}, ValueError, r"^key_cache: .* 3 dimensions"),
    ("head_size is 100", wide_heads(100), ValueError, r"^key_cache: head_size 100 is not supported, needs a multiple of 8 from 8 to 512 \(pad .*, here to 104, and"),
    ("head_size is 4", wide_heads(4), ValueError, "^key_cache: head_size 4 is not supported.*, here to 8, and"),
    ("head_size is 511", wide_heads(511), ValueError, "^key_cache: head_size 511 is not supported.*, here to 512, and"),
    ("head_size is 513", wide_heads(513), ValueError, "^key_cache: head_size 513 is not supported, needs a multiple of 8 from 8 to 512$"),
    ("head_size is 520", wide_heads(520), ValueError, "^key_cache: head_size 520 is not supported, needs a multiple of 8 from 8 to 512$"),
    ("head_size is 0", wide_heads(0), ValueError, "^key_cache: head_size 0 is not supported, needs a multiple of 8 from 8 to 512$"),
    ("block_size is 257", caches(3, 2, 257, 64), ValueError, "^key_cache: block_size 257 is not supported, needs 1 to 256"),
    ("block_size is 0", caches(3, 2, 0, 64), ValueError, "^key_cache: block_size 0 is not supported"),
    ("caches have no KV heads", caches(3, 0, 16, 64), ValueError, r"^key_cache: shape \(3, 0, 16, 64\) has no KV heads"),
    ("x is 4", vllm((3, 2, 16, 16, 4), (3, 2, 64, 16)), ValueError, r"^key_cache: x .* is 4, needs 8 .*float16"),
    ("a vllm key_cache has 4 dimensions", to(layout="vllm"), ValueError, '^key_cache: .* 4 dimensions, needs 5 .*"vllm"'),
    ("keys and values are one array", lambda g: {**caches(2, 3, 2, 16, 64)(g), "layout": None}, ValueError, r'^value_cache: .* 5 dimensions, needs 4 in layout "vllm"; .* give kv\[0\] and kv\[1\]$'),
    ("keys and values are one array, of HND", caches(2, 3, 2, 16, 64), ValueError, r"^key_cache: .* needs 4 .* give kv\[0\] and kv\[1\]$"),
    ("caches have 5 dimensions", caches(3, 2, 8, 16, 8), ValueError, '^key_cache: .* 5 dimensions, needs 4 in layout "HND"$'),
    ("a vllm value_cache has 5", vllm((3, 2, 8, 16, 8), (3, 2, 8, 16, 8)), ValueError, "^value_cache: .* 5 dimensions, needs 4"),
    ("vllm block sizes differ", vllm((3, 2, 8, 16, 8), (3, 2, 64, 32)), ValueError, "^value_cache: block_size 32 does not match key_cache's 16"),
    ("vllm head sizes differ", vllm((3, 2, 8, 16, 8), (3, 2, 72, 16)), ValueError, "^value_cache: head_size 72 does not match key_cache's 64"),
    ("a vllm block is scattered", to(layout="vllm", key_cache=strided(halves(3, 2, 8, 16, 8)), value_cache=halves(3, 2, 64, 16)), ValueError, "^key_cache: strides .* contiguous"),
    ("key_cache has strided channels", via("key_cache", strided), ValueError, "^key_cache: strides .* contiguous"),
    ("value_cache has strided channels", via("value_cache", strided), ValueError, "^value_cache: strides .* contiguous"),
    ("key_cache runs backwards", via("key_cache", lambda a: a[::-1]), ValueError, "^key_cache: negative strides"),
    ("value_cache runs backwards", via("value_cache", lambda a: a[:, ::-1]), ValueError, "^value_cache: negative strides"),
    ("caches are float32", caches(3, 2, 16, 64, dtype=np.float32), TypeError, "^key_cache: dtype float32, needs float16"),
    ("caches are int8", caches(3, 2, 16, 64, dtype=np.int8), TypeError, "^key_cache: dtype int8, needs float16"),
    ("value_cache alone is float32", via("value_cache", np.float32), TypeError, "^value_cache: dtype float32 does not match key_cache's float16"),
    ("caches differ in blocks", via("value_cache", lambda a: a[1:]), ValueError, "^value_cache: num_blocks .* does not match key_cache's"),
    ("caches differ in heads", via("value_cache", lambda a: a[:, :1]), ValueError, "^value_cache: num_kv_heads 1 does not match key_cache's 2"),
    ("caches differ in block_size", via("value_cache", lambda a: np.repeat(a, 2, axis=2)), ValueError, "^value_cache: block_size 32 does not match key_cache's 16"),
    ("caches differ in head_size", via("value_cache", lambda a: a[..., :32].copy()), ValueError, "^value_cache: head_size 32 does not match key_cache's 64"),
    ("block_tables has 1 dimension", via("block_tables", lambda a: a[0]), ValueError, r"^block_tables: .* 1 dimensions, needs \[num_seqs, max_num_blocks_per_seq\]"),
    ("block_tables is int64", via("block_tables", np.int64), TypeError, "^block_tables: dtype int64, needs int32"),
    ("block_tables is float32", via("block_tables", np.float32), TypeError, "^block_tables: dtype float32, needs int32"),
    ("block_tables has 3 rows", to(block_tables=np.zeros((3, 5), np.int32)), ValueError, "^block_tables: 3 rows .* 2 sequences"),
    ("block_tables has strided columns", via("block_tables", strided), ValueError, "^block_tables: strides .*contiguous"),
    ("block_tables runs backwards", via("block_tables", lambda a: a[::-1]), ValueError, "^block_tables: negative strides"),
    ("seq_lens has 2 dimensions", via("seq_lens", lambda a: a[:, None]), ValueError, r"^seq_lens: shape \(2, 1\), needs \[num_seqs\] = \(2,\)"),
    ("seq_lens has 3 entries", to(seq_lens=np.ones(3, np.int32)), ValueError, r"^seq_lens: shape \(3,\), needs \[num_seqs\]"),
    ("seq_lens is int64", via("seq_lens", np.int64), TypeError, "^seq_lens: dtype int64, needs int32"),
    ("seq_lens is strided", via("seq_lens", strided), ValueError, "^seq_lens: strides .*contiguous"),
    ("alibi_slopes is a list", to(alibi_slopes=[1.0] * 4), TypeError, "^alibi_slopes: .*list.*array"),
    ("alibi_slopes has 3 entries", to(alibi_slopes=np.ones(3, np.float32)), ValueError, r"^alibi_slopes: shape \(3,\), needs \[num_heads\]"),
    ("alibi_slopes has 2 dimensions", to(alibi_slopes=np.ones((2, 4), np.float32)), ValueError, r"^alibi_slopes: shape \(2, 4\)"),
    ("alibi_slopes is float64", to(alibi_slopes=np.ones(4)), TypeError, "^alibi_slopes: dtype float64"),
    ("alibi_slopes is float16", to(alibi_slopes=halves(4)), TypeError, "^alibi_slopes: dtype float16, needs float32"),
    ("alibi_slopes is strided", to(alibi_slopes=strided(np.ones(4, np.float32))), ValueError, "^alibi_slopes: strides .*contiguous"),
    *bad_scales("k_scale"),
    *bad_scales("v_scale"),
    *bad_numbers("scale", positive=False),
    ("layout is unknown", to(layout="BHND"), ValueError, "^layout: .*'BHND'.*vllm, HND, NHD"),
    ("layout is the other one", to(layout="NHD"), ValueError, r'^query: num_heads 4 .*num_kv_heads 16 in layout "NHD"; key_cache.s shape \(8, 2, 16, 64\) fits layout "HND"$'),
    ("layout is the other one's other", lambda g: {**caches(3, 16, 2, 64)(g), "layout": "HND"}, ValueError, r'num_kv_heads 16 in layout "HND"; key_cache.s shape \(3, 16, 2, 64\) fits layout "NHD"$'),
    ("layout is empty", to(layout=""), ValueError, "^layout: .*''"),
    ("layout is in small letters", to(layout="hnd"), ValueError, "^layout: .*'hnd'"),
    ("layout is in doubt", lambda g: {**caches(3, 2, 4, 64)(g), "layout": None}, ValueError, r'^layout: key_cache of shape \(3, 2, 4, 64\) .*"HND" or "NHD"'),
    ("no layout fits", lambda g: {**caches(3, 5, 16, 64)(g), "layout": None}, ValueError, r"^layout: key_cache of shape \(3, 5, 16, 64\)"),
    ("kv_cache_dtype is unknown", to(kv_cache_dtype="fp4"), ValueError, "^kv_cache_dtype: .*'fp4'.*fp8_e5m2"),
    ("kv_cache_dtype is None", to(kv_cache_dtype=None), TypeError, "^kv_cache_dtype: got NoneType, needs a str"),
    ("kv_cache_dtype is an array", via("kv_cache_dtype", lambda _: np.ones(4)), TypeError, "^kv_cache_dtype: got ndarray, needs a str"),
    ("kv_cache_dtype is a dtype", to(kv_cache_dtype=np.float16), TypeError, "^kv_cache_dtype: got type, needs a str"),
    ("kv_cache_dtype contradicts the caches", to(kv_cache_dtype="bfloat16"), ValueError, "^kv_cache_dtype: 'bfloat16' does not match key_cache's float16"),
    ("float16 caches are called fp8", to(kv_cache_dtype="fp8"), TypeError, "^key_cache: dtype float16 .*'fp8', needs uint8"),
    ("bytes without a kv_cache_dtype", caches(3, 2, 16, 64, dtype=np.uint8), ValueError, "^kv_cache_dtype: 'auto' .*uint8"),
    *bad_ints("max_seq_len", at_least=0),
    *bad_ints("blocksparse_vert_stride", at_least=0, too_large=2**40),
    ("blocksparse_block_size cuts blocks", sparse(blocksparse_block_size=24), ValueError, "^blocksparse_block_size: .*24.*multiple.*16"),
    ("blocksparse_block_size is 0", sparse(blocksparse_block_size=0), ValueError, "^blocksparse_block_size: .*0.*at least 1"),
    ("blocksparse_block_size is 2**40", sparse(blocksparse_block_size=2**40), ValueError, f"^blocksparse_block_size: .*{2**40}.*at most"),
    ("blocksparse_local_blocks is 2**40", sparse(blocksparse_local_blocks=2**40), ValueError, f"^blocksparse_local_blocks: .*{2**40}.*at most"),
    ("blocksparse_head_sliding_step is 2**40", sparse(blocksparse_head_sliding_step=2**40), ValueError, f"^blocksparse_head_sliding_step: .*{2**40}.*at most"),
    ("tp_rank is 2**40", sparse(tp_rank=2**40), ValueError, f"^tp_rank: .*{2**40}.*at most"),
    ("blocksparse_local_blocks is -1", sparse(blocksparse_local_blocks=-1), ValueError, "^blocksparse_local_blocks: .*-1.*at least 0"),
    ("blocksparse_head_sliding_step is 0.5", sparse(blocksparse_head_sliding_step=0.5), TypeError, "^blocksparse_head_sliding_step: .*0.5.*int"),
    ("tp_rank is -1", sparse(tp_rank=-1), ValueError, "^tp_rank: .*-1.*at least 0"),
    ("out is a list", to(out=[1.0]), TypeError, "^out: .*list.*array"),
    ("out has another shape", to(out=halves(2, 4, 32)), ValueError, r"^out: shape \(2, 4, 32\), needs the shape of query = \(2, 4, 64\)"),
    ("out is float32", via("out", np.float32), TypeError, "^out: dtype float32, needs float16"),
    ("out is read-only", via("out", read_only), ValueError, "^out: is read-only"),
    ("out has strided channels", via("out", strided), ValueError, "^out: strides .*contiguous"),
    ("out runs backwards", via("out", lambda a: a[::-1]), ValueError, "^out: strides .*backwards"),
    ("rows of out overlap", via("out", overlapping), ValueError, "^out: strides .*share memory"),
    ("stream is text", to(stream="0"), TypeError, "^stream: got str, needs"),
]  # fmt: skip

NAMED_SIZES = [
    *bad_ints("num_kv_heads"),
    *bad_ints("block_size"),
    ("num_kv_heads is 4", to(num_kv_heads=4), ValueError, "^num_kv_heads: 4 does not match key_cache's 2"),
    ("block_size is 32", to(block_size=32), ValueError, "^block_size: 32 does not match key_cache's 16"),
    ("max_seq_len is None", to(max_seq_len=None), TypeError, "^max_seq_len: .*None.*int"),
    ("out is None", to(out=None), TypeError, "^out: .*NoneType.*array"),
]  # fmt: skip

V2 = [
    *not_arrays("exp_sums", "max_logits", "tmp_out"),
    *bad_memory("exp_sums", "max_logits", "tmp_out"),
    *bad_ints("partition_size", at_least=16, too_large=2**20 + 16, at_most=2**20),
    ("partition_size is 2**33", to(partition_size=2**33), ValueError, f"^partition_size: got {2**33}, needs 16 to {2**20}$"),
    ("no partition_size is large enough", to(max_seq_len=3 * 2**20 + 1), ValueError, f"^exp_sums: 3 partitions.*{2**20}.*max_seq_len {3 * 2**20 + 1}"),
    ("exp_sums is max_logits", lambda g: {"exp_sums": g["max_logits"]}, ValueError, "^(exp_sums|max_logits): shares memory with (exp_sums|max_logits)"),
    ("exp_sums overlaps max_logits", lambda _: sharing(np.float32, exp_sums=(2, 4, 3), max_logits=(2, 4, 3)), ValueError, "^max_logits: shares memory with exp_sums"),
    ("tmp_out overlaps out", lambda _: sharing(np.float16, out=(2, 4, 64), tmp_out=(2, 4, 3, 64)), ValueError, "^tmp_out: shares memory with out"),
    ("tmp_out is part of key_cache", lambda g: {"tmp_out": g["key_cache"].reshape(-1)[: 2 * 4 * 3 * 64].reshape(2, 4, 3, 64)}, ValueError, "^tmp_out: shares memory with key_cache"),
    ("tmp_out is off by 1 element", via("tmp_out", off_by(2)), ValueError, "^tmp_out: address 0x.*multiple of 8 bytes"),
    ("tmp_out is off by 2 elements", lambda g: {"tmp_out": off_by(8)(g["tmp_out"].astype(np.float32))}, ValueError, "^tmp_out: address 0x.*multiple of 16 bytes"),
    ("partition_size is 24", to(partition_size=24), ValueError, "^partition_size: got 24, needs a multiple of 16"),
    ("exp_sums has 2 dimensions", via("exp_sums", lambda a: a[..., 0].copy()), ValueError, r"^exp_sums: shape \(2, 4\)"),
    ("exp_sums has 3 heads", via("exp_sums", lambda a: a[:, :3].copy()), ValueError, r"^exp_sums: shape \(2, 3, 3\), needs"),
    ("exp_sums is float16", via("exp_sums", np.float16), TypeError, "^exp_sums: dtype float16, needs float32"),
    ("exp_sums is strided", via("exp_sums", strided), ValueError, "^exp_sums: strides .*contiguous"),
    ("exp_sums is read-only", via("exp_sums", read_only), ValueError, "^exp_sums: is read-only"),
    ("max_logits has 4 partitions", to(max_logits=np.ones((2, 4, 4), np.float32)), ValueError, r"^max_logits: shape \(2, 4, 4\), needs .* = \(2, 4, 3\)"),
    ("max_logits is float64", via("max_logits", np.float64), TypeError, "^max_logits: dtype float64"),
    ("max_logits overlaps itself", via("max_logits", overlapping), ValueError, "^max_logits: strides .*share memory"),
    ("tmp_out has another head_size", to(tmp_out=halves(2, 4, 3, 32)), ValueError, r"^tmp_out: shape \(2, 4, 3, 32\), needs"),
    ("tmp_out is int8", via("tmp_out", np.int8), TypeError, "^tmp_out: dtype int8, needs float16 or float32"),
    ("tmp_out is read-only", via("tmp_out", read_only), ValueError, "^tmp_out: is read-only"),
    ("no partitions", lambda g: {name: g[name][:, :, :0].copy() for name in ("exp_sums", "max_logits", "tmp_out")}, ValueError, r"^exp_sums: shape \(2, 4, 0\) has no partitions"),
]  # fmt: skip

MERGE = [
    *not_arrays("prefix_output", "prefix_lse", "suffix_output", "suffix_lse"),
    *bad_memory("prefix_output", "prefix_lse", "suffix_output", "suffix_lse", "output", "output_lse"),
    ("output is a list", to(output=[1.0]), TypeError, "^output: .*list.*array"),
    ("output_lse is a list", to(output_lse=[1.0]), TypeError, "^output_lse: .*list.*array"),
    ("prefix_output has 2 dimensions", via("prefix_output", lambda a: a[0]), ValueError, r"^prefix_output: shape \(4, 64\) has 2 dimensions, needs \[num_tokens, num_heads, head_size\]"),
    ("prefix_output is float64", via("prefix_output", np.float64), TypeError, "^prefix_output: dtype float64"),
    ("prefix_output is uint8", via("prefix_output", np.uint8), TypeError, "^prefix_output: dtype uint8, needs float16"),
    ("prefix_output has strided channels", via("prefix_output", strided), ValueError, "^prefix_output: strides .*contiguous"),
    ("prefix_output runs backwards", via("prefix_output", lambda a: a[::-1]), ValueError, "^prefix_output: negative strides"),
    ("suffix_output has fewer tokens", via("suffix_output", lambda a: a[1:]), ValueError, r"^suffix_output: shape \(5, 4, 64\), needs the shape of prefix_output = \(6, 4, 64\)"),
    ("suffix_output is float32", via("suffix_output", np.float32), TypeError, "^suffix_output: dtype float32 does not match prefix_output's float16"),
    ("suffix_output has strided channels", via("suffix_output", strided), ValueError, "^suffix_output: strides .*contiguous"),
    ("prefix_lse is transposed", via("prefix_lse", lambda a: a.T), ValueError, r"^prefix_lse: shape \(6, 4\) is \[num_tokens, num_heads\].*: prefix_lse\.T$"),
    ("prefix_lse is float16", via("prefix_lse", np.float16), TypeError, "^prefix_lse: dtype float16, needs float32"),
    ("suffix_lse has 1 dimension", via("suffix_lse", lambda a: a[0]), ValueError, r"^suffix_lse: shape \(6,\), needs"),
    ("suffix_lse is float64", via("suffix_lse", np.float64), TypeError, "^suffix_lse: dtype float64"),
    ("suffix_lse runs backwards", via("suffix_lse", lambda a: a[::-1]), ValueError, "^suffix_lse: negative strides"),
    ("output has another shape", to(output=halves(6, 4, 32)), ValueError, r"^output: shape \(6, 4, 32\), needs"),
    ("output is float32", via("output", np.float32), TypeError, "^output: dtype float32, needs float16"),
    ("output is read-only", via("output", read_only), ValueError, "^output: is read-only"),
    ("output overlaps itself", via("output", overlapping), ValueError, "^output: strides .*share memory"),
    ("output has strided channels", via("output", strided), ValueError, "^output: strides .*contiguous"),
    ("output is bytes without a scale", via("output", np.uint8), ValueError, "^output_scale: None, needs a scale"),
    ("output is float16 with a scale", to(output_scale=0.5), TypeError, "^output: dtype float16, needs float8_e4m3fn"),
    ("output_lse is transposed", via("output_lse", lambda a: a.T), ValueError, r"^output_lse: shape \(6, 4\), needs"),
    ("output_lse is float16", via("output_lse", np.float16), TypeError, "^output_lse: dtype float16, needs float32"),
    ("output_lse is read-only", via("output_lse", read_only), ValueError, "^output_lse: is read-only"),
    ("output_lse overlaps itself", via("output_lse", overlapping), ValueError, "^output_lse: strides .*share memory"),
    *bad_ints("prefill_tokens_with_context", at_least=0),
    ("prefill_tokens_with_context is 7", to(prefill_tokens_with_context=7), ValueError, "^prefill_tokens_with_context: got 7, needs at most num_tokens = 6"),
    *(row for row in bad_scales("output_scale") if "None" not in row[0]),
    ("stream is text", to(stream="0"), TypeError, "^stream: got str, needs"),
]  # fmt: skip

WRITER = [
    *not_arrays("key", "value", "key_cache", "value_cache", "slot_mapping"),
    *bad_memory("key", "value", "key_cache", "value_cache", "slot_mapping"),
    ("key has 2 dimensions", lambda g: {name: g[name][0] for name in ("key", "value")}, ValueError, r"^key: shape \(2, 64\) has 2 dimensions, needs \[num_tokens, num_kv_heads, head_size\]"),
    ("key is float64", via("key", np.float64), TypeError, "^key: dtype float64"),
    ("key is uint8", via("key", np.uint8), TypeError, "^key: dtype uint8, needs float16"),
    ("key has strided channels", via("key", strided), ValueError, "^key: strides .*contiguous"),
    ("key runs backwards", via("key", lambda a: a[::-1]), ValueError, "^key: negative strides"),
    ("key has 3 heads", lambda g: {name: halves(5, 3, 64) for name in ("key", "value")}, ValueError, r"^key: shape \(5, 3, 64\) does not match key_cache, needs \[num_tokens, 2, 64\] in layout .\w+.$"),
    ("value has fewer tokens", via("value", lambda a: a[1:]), ValueError, r"^value: shape \(4, 2, 64\), needs the shape of key = \(5, 2, 64\)"),
    ("value is float32", via("value", np.float32), TypeError, "^value: dtype float32 does not match key's float16"),
    ("value has strided channels", via("value", strided), ValueError, "^value: strides .*contiguous"),
    ("key_cache is float32", via("key_cache", np.float32), TypeError, "^key_cache: dtype float32, needs float16"),
    ("value_cache is float32", via("value_cache", np.float32), TypeError, "^value_cache: dtype float32 does not match key_cache's float16"),
    ("key_cache is read-only", via("key_cache", read_only), ValueError, "^key_cache: is read-only"),
    ("value_cache is read-only", via("value_cache", read_only), ValueError, "^value_cache: is read-only"),
    ("key_cache overlaps itself", via("key_cache", overlapping), ValueError, "^key_cache: strides .*share memory"),
    ("key_cache runs backwards", via("key_cache", lambda a: a[::-1]), ValueError, "^key_cache: (negative )?strides"),
    ("caches differ in blocks", via("value_cache", lambda a: a[1:]), ValueError, "^value_cache: num_blocks 2 does not match key_cache's 3"),
    ("slot_mapping is int32", via("slot_mapping", np.int32), TypeError, "^slot_mapping: dtype int32, needs int64"),
    ("slot_mapping has 2 dimensions", via("slot_mapping", lambda a: a[None]), ValueError, r"^slot_mapping: shape \(1, 5\) has 2 dimensions, needs \[num_tokens\]"),
    ("slot_mapping is longer than key", to(slot_mapping=np.arange(6)), ValueError, "^slot_mapping: 6 slots for key's 5 tokens"),
    ("slot_mapping is strided", via("slot_mapping", strided), ValueError, "^slot_mapping: strides .*contiguous"),
    ("slot_mapping runs backwards", via("slot_mapping", lambda a: a[::-1]), ValueError, "^slot_mapping: negative strides"),
    ("a slot past the cache", to(slot_mapping=np.array([0, 1, 48, 2, 3])), IndexError, "^slot_mapping: .*48"),
    ("kv_cache_dtype is unknown", to(kv_cache_dtype="fp4"), ValueError, "^kv_cache_dtype: .*'fp4'"),
    ("kv_cache_dtype is None", to(kv_cache_dtype=None), TypeError, "^kv_cache_dtype: got NoneType, needs a str"),
    ("float16 caches are called fp8", to(kv_cache_dtype="fp8"), TypeError, "^key_cache: dtype float16 .*'fp8', needs uint8"),
    *bad_scales("k_scale"),
    *bad_scales("v_scale"),
    ("stream is text", to(stream="0"), TypeError, "^stream: got str, needs"),
]  # fmt: skip

VLLM_WRITER = [
    ("x is 4", to(key_cache=halves(3, 2, 16, 16, 4)), ValueError, r"^key_cache: x .* is 4, needs 8"),
    ("key_cache has 4 dimensions", to(key_cache=halves(3, 2, 16, 64)), ValueError, "^key_cache: .* 4 dimensions, needs 5"),
    ("value_cache has another head_size", to(value_cache=halves(3, 2, 32, 16)), ValueError, "^value_cache: head_size 32 does not match key_cache's 64"),
]  # fmt: skip

FLASH_WRITER = [
    ("layout is vllm", to(layout="vllm"), ValueError, "^layout: got 'vllm', needs \"NHD\" or \"HND\""),
    ("layout is None", to(layout=None), ValueError, "^layout: got None, needs"),
    ("layout is the other one", to(layout="HND"), ValueError, r'^key: shape .* needs \[num_tokens, 16, 64\] in layout "HND"; key_cache.s shape \(3, 16, 2, 64\) fits layout "NHD"$'),
    ("rows are wider than the caches", lambda g: {name: halves(5, 2, 72) for name in ("key", "value")}, ValueError, r'^key: shape .* needs \[num_tokens, 2, 64\] in layout "NHD"$'),
    ("caches have 5 dimensions", caches(3, 2, 8, 16, 8), ValueError, "^key_cache: .* 5 dimensions, needs 4"),
    ("head_size is 100", lambda g: {name: halves(*shape, 100) for name, shape in (("key", (5, 2)), ("value", (5, 2)), ("key_cache", (3, 16, 2)), ("value_cache", (3, 16, 2)))}, ValueError, "^key_cache: head_size 100 is not supported"),
]  # fmt: skip

CONVERT = [
    *not_arrays("output", "input"),
    *bad_memory("input"),
    ("shapes differ", via("output", lambda a: a[1:].copy()), ValueError, r"^output: shape \(2, 8\), needs the shape of input = \(3, 8\)"),
    ("two floats", via("output", np.float16), TypeError, "^output: dtype float16, needs uint8"),
    ("two arrays of bytes", via("input", np.uint8), TypeError, "^(input|output): dtype uint8, needs float16"),
    ("input is float64", via("input", np.float64), TypeError, "^input: dtype float64"),
    ("output is int32", via("output", np.int32), TypeError, "^output: dtype int32, needs uint8"),
    ("input is strided", via("input", strided), ValueError, "^input: strides .*contiguous"),
    ("output is strided", via("output", strided), ValueError, "^output: strides .*contiguous"),
    ("output is read-only", via("output", read_only), ValueError, "^output: is read-only"),
    ("kv_dtype is unknown", to(kv_dtype="auto"), ValueError, "^kv_dtype: .*'auto'.*fp8_e5m2"),
    *bad_scales("scale"),
    ("stream is text", to(stream="0"), TypeError, "^stream: got str, needs"),
]  # fmt: skip


def second(name, spoil):
    """A change of the second array of a list, by a function of it."""
    return lambda given: {name: [given[name][0], spoil(given[name][1])]}


def mapping(*pairs, dtype=np.int64):
    return to(block_mapping=np.array(pairs, dtype))


def mapping_in_cache(cache):
    return {"key_caches": [cache], "value_caches": [], "block_mapping": cache[0, :4].reshape(2, 2)}


def interleaved_layers(_):
    """Keys and values that take turns in one allocation, and begin one element too near."""
    memory = np.full(6 * 2 * 2048, 7, np.float16)
    blocks = np.lib.stride_tricks.as_strided(memory, (6, 2048), (2 * 4096, 2))
    later = np.lib.stride_tricks.as_strided(memory[2047:], (6, 2048), (2 * 4096, 2))
    return {"key_caches": [blocks], "value_caches": [later]}


MAPPING = [
    *not_arrays("block_mapping"),
    *bad_memory("block_mapping"),
    ("block_mapping is int32", mapping((0, 1), dtype=np.int32), TypeError, "^block_mapping: dtype int32, needs int64"),
    ("block_mapping has 1 dimension", mapping(0, 1), ValueError, r"^block_mapping: shape \(2,\), needs \[num_pairs, 2\]"),
    ("block_mapping has triples", mapping((0, 1, 2)), ValueError, r"^block_mapping: shape \(1, 3\), needs \[num_pairs, 2\]"),
    ("block_mapping is strided", via("block_mapping", strided), ValueError, "^block_mapping: strides .*contiguous"),
    ("block_mapping runs backwards", via("block_mapping", lambda a: a[::-1]), ValueError, "^block_mapping: negative strides"),
    ("a source past the end", mapping((6, 1)), IndexError, "^block_mapping: source block 6, needs less than 6"),
    ("a destination for two", mapping((0, 1), (2, 1)), ValueError, "^block_mapping: block 1 is the destination of two pairs"),
    ("stream is text", to(stream="0"), TypeError, "^stream: got str, needs"),
]  # fmt: skip

COPY = [
    *MAPPING,
    ("key_caches is an array", to(key_caches=halves(2, 6, 64)), TypeError, "^key_caches: got ndarray, needs a list of arrays"),
    ("value_caches is None", to(value_caches=None), TypeError, "^value_caches: got NoneType, needs a list"),
    ("there are no layers", to(key_caches=[], value_caches=[]), ValueError, "^key_caches: is empty"),
    ("a layer has no values", lambda g: {"value_caches": g["value_caches"][:1]}, ValueError, "^value_caches: 1 layers do not match key_caches' 2"),
    ("a layer is a list", second("key_caches", list), TypeError, r"^key_caches\[1\]: got list, needs an array"),
    ("a layer is read-only", second("value_caches", read_only), ValueError, r"^value_caches\[1\]: is read-only"),
    ("a layer overlaps itself", second("value_caches", overlapping), ValueError, r"^value_caches\[1\]: strides .*share memory"),
    ("a layer runs backwards", second("key_caches", lambda a: a[::-1]), ValueError, r"^key_caches\[1\]: negative strides"),
    ("a layer has fewer blocks", second("key_caches", lambda a: a[1:]), ValueError, r"^key_caches\[1\]: num_blocks 5 does not match key_caches\[0\]'s 6"),
    ("a layer has larger blocks", second("value_caches", np.float32), ValueError, r"^value_caches\[1\]: blocks of 8192 bytes do not match key_caches\[0\]'s 4096"),
    ("blocks are scattered", second("key_caches", strided), ValueError, r"^key_caches\[1\]: strides .* scatter a block"),
    ("a layer is a number", second("key_caches", lambda _: np.float16(1)), TypeError, r"^key_caches\[1\]: got float16, needs an array"),
    ("a layer has no dimensions", second("key_caches", lambda _: np.array(1.0, np.float16)), ValueError, r"^key_caches\[1\]: has no dimensions"),
    ("a destination past the end", mapping((0, 6)), IndexError, "^block_mapping: destination block 6, needs less than 6"),
    ("a chain", mapping((0, 1), (1, 2)), ValueError, "^block_mapping: source block 1 is a destination, too"),
    ("two layers overlap", lambda _: {"key_caches": [*sharing(np.float16, x=(6, 2, 16, 64), y=(6, 2, 16, 64)).values()]}, ValueError, r"^key_caches\[1\]: shares memory with key_caches\[0\]"),
    ("layout is unknown", to(layout="hnd"), ValueError, "^layout: unknown 'hnd'"),
    ("layout is another one", to(layout="vllm"), ValueError, r"^key_caches\[0\]: .* 4 dimensions, needs 5"),
    ("layout without values", to(layout="HND", value_caches=[]), ValueError, "^layout: got 'HND' without value_caches"),
    ("values overlap keys", lambda g: {"value_caches": [a.reshape(-1)[:-1024].reshape(-1, 1024)[1:7] for a in g["key_caches"]], "key_caches": [a.reshape(-1)[: 6 * 1024].reshape(6, 1024) for a in g["key_caches"]]}, ValueError, r"^value_caches\[(\d)\]: shares memory with key_caches\[\1\]"),
    ("interleaved layers touch", interleaved_layers, ValueError, r"^value_caches\[0\]: shares memory with key_caches\[0\]"),
    ("block_mapping is in a cache", lambda _: mapping_in_cache(np.zeros((6, 16), np.int64)), ValueError, r"^key_caches\[0\]: shares memory with block_mapping"),
    ("a layer's dtypes differ", lambda g: {"layout": "HND", **second("value_caches", lambda a: a.view(np.int16))(g)}, TypeError, r"^value_caches\[1\]: dtype int16"),
]  # fmt: skip

SWAP = [
    *MAPPING,
    *not_arrays("source", "destination"),
    *bad_memory("source", "destination"),
    ("a destination past the end", mapping((0, 4)), IndexError, "^block_mapping: destination block 4, needs less than 4"),
    ("a chain in one array", lambda g: {"destination": g["source"], **mapping((0, 1), (1, 2))(g)}, ValueError, "^block_mapping: source block 1 is a destination, too"),
    ("blocks that overlap", lambda g: {"source": g["source"].reshape(-1)[: 5 * 2048].reshape(5, 2, 16, 64), "destination": g["source"].reshape(-1)[1024 : 5 * 2048 + 1024].reshape(5, 2, 16, 64), **mapping((0, 1), (2, 3))(g)}, ValueError, "^block_mapping: source block 2 is a destination, too"),
    ("blocks of other shapes", to(destination=halves(4, 2, 8, 64)), ValueError, r"^destination: blocks of shape \(2, 8, 64\) do not match source's \(2, 16, 64\)"),
    ("another dtype", via("destination", np.float32), TypeError, "^destination: dtype float32 does not match source's float16"),
    ("destination is read-only", via("destination", read_only), ValueError, "^destination: is read-only"),
    ("source runs backwards", via("source", lambda a: a[::-1]), ValueError, "^source: negative strides"),
    ("source's blocks are scattered", via("source", strided), ValueError, "^source: strides .* scatter a block"),
    ("destination's blocks are scattered", via("destination", strided), ValueError, "^destination: strides .* scatter a block"),
    ("blocks in another order", lambda g: {"destination": halves(4, 16, 2, 64).swapaxes(1, 2)}, ValueError, "^destination: strides .* order a block in another way"),
    ("source has no dimensions", to(source=np.array(1.0, np.float16), destination=np.array(1.0, np.float16)), ValueError, "^source: has no dimensions"),
]  # fmt: skip

GATHER = [
    *not_arrays("key", "value", "key_cache", "value_cache", "block_tables", "cu_seq_lens"),
    *bad_memory("key", "value", "key_cache", "value_cache", "block_tables", "cu_seq_lens", "seq_starts"),
    ("key has 2 dimensions", via("key", lambda a: a[0]), ValueError, r"^key: shape \(2, 64\) has 2 dimensions, needs \[num_tokens, num_kv_heads, head_size\]"),
    ("value has fewer tokens", via("value", lambda a: a[1:]), ValueError, r"^value: shape \(6, 2, 64\), needs the shape of key"),
    ("value is float32", via("value", np.float32), TypeError, "^value: dtype float32 does not match key's float16"),
    ("key is int32", via("key", np.int32), TypeError, "^key: dtype int32, needs float16"),
    ("key is read-only", via("key", read_only), ValueError, "^key: is read-only"),
    ("value overlaps itself", via("value", overlapping), ValueError, "^value: strides .*share memory"),
    ("key has strided channels", via("key", strided), ValueError, "^key: strides .*contiguous"),
    ("key has 3 heads", to(key=halves(7, 3, 64), value=halves(7, 3, 64)), ValueError, r'^key: shape \(7, 3, 64\) does not match key_cache, needs \[num_tokens, 2, 64\] in layout "HND"$'),
    ("rows are wider than the caches", lambda g: {name: g[name].astype(np.float32) for name in ("key", "value")}, TypeError, "^key_cache: dtype float16, needs float32"),
    ("rows are codes, caches are not", lambda g: {name: g[name].astype(np.uint8) for name in ("key", "value")}, TypeError, "^key_cache: dtype float16 does not match key's uint8"),
    ("bytes without a kv_cache_dtype", caches(3, 2, 16, 64, dtype=np.uint8), ValueError, "^kv_cache_dtype: 'auto' .*uint8"),
    ("kv_cache_dtype is unknown", to(kv_cache_dtype="fp4"), ValueError, "^kv_cache_dtype: .*'fp4'"),
    ("value_cache alone is float32", via("value_cache", np.float32), TypeError, "^value_cache: dtype float32 does not match key_cache's float16"),
    ("caches differ in blocks", via("value_cache", lambda a: a[1:]), ValueError, "^value_cache: num_blocks 2 does not match key_cache's 3"),
    ("layout is None", to(layout=None), ValueError, "^layout: unknown None"),
    ("layout is the other one", to(layout="NHD"), ValueError, r'^key: shape .* needs \[num_tokens, 16, 64\] in layout "NHD"; key_cache.s shape \(3, 2, 16, 64\) fits layout "HND"$'),
    ("block_tables is int64", via("block_tables", np.int64), TypeError, "^block_tables: dtype int64, needs int32"),
    ("block_tables has 1 dimension", via("block_tables", lambda a: a[0]), ValueError, r"^block_tables: .* needs \[num_seqs, max_num_blocks_per_seq\]"),
    ("block_tables has strided columns", via("block_tables", strided), ValueError, "^block_tables: strides .*contiguous"),
    ("cu_seq_lens has an entry a sequence", via("cu_seq_lens", lambda a: a[1:]), ValueError, r"^cu_seq_lens: shape \(2,\), needs \[num_seqs \+ 1\] = \(3,\)"),
    ("cu_seq_lens is int64", via("cu_seq_lens", np.int64), TypeError, "^cu_seq_lens: dtype int64, needs int32"),
    ("cu_seq_lens decreases", to(cu_seq_lens=np.array([0, 4, 3], np.int32)), ValueError, "^cu_seq_lens: decreases"),
    ("seq_starts has 3 entries", to(seq_starts=np.zeros(3, np.int32)), ValueError, r"^seq_starts: shape \(3,\), needs \[num_seqs\]"),
    ("seq_starts is a list", to(seq_starts=[0, 0]), TypeError, "^seq_starts: .*list.*array"),
    ("seq_starts is negative", to(seq_starts=np.array([-1, 0], np.int32)), IndexError, "^seq_starts: token -1 of sequence 0, needs"),
    ("a token past block_tables", to(seq_starts=np.array([29, 0], np.int32)), IndexError, "^seq_starts: token 32 of sequence 0, needs"),
    ("more tokens than block_tables has columns for", gathered(17, None), IndexError, r"^cu_seq_lens: 17 tokens of sequence 0, needs at most the 16 that"),
    ("more tokens than that, from any start", gathered(17, 3), IndexError, r"^cu_seq_lens: 17 tokens of sequence 0, needs at most the 16 that"),
    ("tokens that no start but 0 has room for", gathered(16, 1), IndexError, r"^seq_starts: token 16 of sequence 0, needs .* < 16$"),
    ("too many tokens from a negative start", gathered(17, -1), IndexError, "^seq_starts: token -1 of sequence 0, needs"),
    ("a block that is not there", to(seq_starts=np.array([0, 14], np.int32)), IndexError, r"^block_tables\[1, 1\]: block -1"),
    ("key is value", lambda g: {"key": g["value"]}, ValueError, "^(key|value): shares memory with (key|value)"),
    ("key overlaps value", lambda _: sharing(np.float16, key=(7, 2, 64), value=(7, 2, 64)), ValueError, "^value: shares memory with key"),
    ("value is in key_cache", lambda g: {"value": g["key_cache"].reshape(-1)[: 7 * 2 * 64].reshape(7, 2, 64)}, ValueError, "^value: shares memory with key_cache"),
    ("key is in block_tables", lambda g: {"block_tables": g["key"].reshape(-1)[:8].view(np.int32).reshape(2, 2)}, ValueError, "^key: shares memory with block_tables"),
    *bad_scales("k_scale"),
    *bad_scales("v_scale"),
    ("stream is text", to(stream="0"), TypeError, "^stream: got str, needs"),
]  # fmt: skip


def touching(*shape):
    """New keys and values that take turns in one allocation, and have one element in common."""
    size = int(np.prod(shape[1:]))
    memory = np.full(2 * shape[0] * size, 7, np.float16)
    keys = memory.reshape(shape[0], 2 * size)[:, :size].reshape(shape)
    values = np.lib.stride_tricks.as_strided(memory[size - 1 :], keys.shape, keys.strides)
    return {"new_key_cache": keys, "new_value_cache": values}


LAYOUT = [
    *not_arrays("key_cache", "value_cache", "new_key_cache", "new_value_cache"),
    *bad_memory("key_cache", "value_cache", "new_key_cache", "new_value_cache"),
    ("layout is unknown", to(layout="hnd"), ValueError, "^layout: unknown 'hnd'"),
    ("new_layout is unknown", to(new_layout=None), ValueError, "^new_layout: unknown None, needs one of"),
    ("new_layout is layout", to(new_layout="HND"), ValueError, "^new_layout: got 'HND', needs another one"),
    ("new_key_cache is read-only", via("new_key_cache", read_only), ValueError, "^new_key_cache: is read-only"),
    ("new_value_cache overlaps itself", via("new_value_cache", overlapping), ValueError, "^new_value_cache: strides .*share memory"),
    ("new_value_cache is float32", via("new_value_cache", np.float32), TypeError, "^new_value_cache: dtype float32 does not match key_cache's float16"),
    ("key_cache is int32", via("key_cache", np.int32), TypeError, "^key_cache: dtype int32, needs float16"),
    ("fewer new blocks", lambda g: {name: g[name][1:] for name in ("new_key_cache", "new_value_cache")}, ValueError, "^new_key_cache: num_blocks 2 does not match key_cache's 3"),
    ("fewer new values", via("new_value_cache", lambda a: a[1:]), ValueError, "^new_value_cache: num_blocks 2 does not match new_key_cache's 3"),
    ("heads and tokens exchanged", to(new_key_cache=halves(3, 2, 16, 64), new_value_cache=halves(3, 2, 16, 64)), ValueError, "^new_key_cache: num_kv_heads 16 does not match key_cache's 2"),
    ("the same memory", lambda g: {"new_key_cache": g["key_cache"].swapaxes(1, 2)}, ValueError, "^(new_)?key_cache: shares memory with (new_)?key_cache"),
    ("new keys lie in old values", lambda g: {"new_key_cache": g["value_cache"].reshape(3, 16, 2, 64)}, ValueError, "^new_key_cache: shares memory with value_cache"),
    ("interleaved and touching", lambda _: touching(3, 16, 2, 64), ValueError, "^new_value_cache: shares memory with new_key_cache"),
    ("the same new memory", lambda g: {"new_key_cache": g["new_value_cache"]}, ValueError, "^new_(key|value)_cache: shares memory"),
    ("stream is text", to(stream="0"), TypeError, "^stream: got str, needs"),
]  # fmt: skip

MLA = [
    *not_arrays("kv_c", "k_pe", "kv_cache", "slot_mapping"),
    *bad_memory("kv_c", "k_pe", "kv_cache", "slot_mapping"),
    ("kv_c has 3 dimensions", via("kv_c", lambda a: a[None]), ValueError, r"^kv_c: shape \(1, 5, 32\) has 3 dimensions, needs \[num_tokens, kv_lora_rank\]"),
    ("k_pe has fewer tokens", via("k_pe", lambda a: a[1:]), ValueError, r"^k_pe: shape \(4, 8\), needs \[num_tokens, pe_dim\] = \(5, 8\)"),
    ("k_pe is float32", via("k_pe", np.float32), TypeError, "^k_pe: dtype float32 does not match kv_c's float16"),
    ("kv_c is strided", via("kv_c", strided), ValueError, "^kv_c: strides .*contiguous"),
    ("kv_cache is float32", via("kv_cache", np.float32), TypeError, "^kv_cache: dtype float32, needs float16"),
    ("kv_cache has narrow rows", to(kv_cache=halves(3, 16, 32)), ValueError, r"^kv_cache: rows of 32 elements, needs kv_lora_rank \+ pe_dim = 32 \+ 8 = 40"),
    ("kv_cache is read-only", via("kv_cache", read_only), ValueError, "^kv_cache: is read-only"),
    ("kv_cache overlaps itself", via("kv_cache", overlapping), ValueError, "^kv_cache: strides .*share memory"),
    ("kv_c is in kv_cache", lambda g: {"kv_c": g["kv_cache"][0, :5, :32]}, ValueError, "^kv_cache: shares memory with kv_c"),
    ("slot_mapping is in kv_cache", lambda g: {"slot_mapping": g["kv_cache"].reshape(-1)[:20].view(np.int64)}, ValueError, "^kv_cache: shares memory with slot_mapping"),
    ("kv_cache has strided rows", via("kv_cache", strided), ValueError, "^kv_cache: strides .*contiguous"),
    ("kv_cache has empty blocks", to(kv_cache=halves(3, 0, 40)), ValueError, r"^kv_cache: shape \(3, 0, 40\), needs a block_size"),
    ("slot_mapping is int32", via("slot_mapping", np.int32), TypeError, "^slot_mapping: dtype int32, needs int64"),
    ("slot_mapping is longer than kv_c", to(slot_mapping=np.arange(6)), ValueError, "^slot_mapping: 6 slots for kv_c's 5 tokens"),
    ("a slot past the cache", to(slot_mapping=np.array([0, 48])), IndexError, "^slot_mapping: slot 48"),
    ("kv_cache_dtype is fp8_ds_mla", to(kv_cache_dtype="fp8_ds_mla"), ValueError, "^kv_cache_dtype: unknown 'fp8_ds_mla'"),
    *bad_scales("scale"),
    ("stream is text", to(stream="0"), TypeError, "^stream: got str, needs"),
]  # fmt: skip

BAD_CALLS = [
    *table("paged_attention", *ATTENTION),
    *table("paged_attention_v1", *ATTENTION, *NAMED_SIZES),
    *table("paged_attention_v2", *ATTENTION, *NAMED_SIZES, *V2),
    *table("merge_attn_states", *MERGE),
    *table("reshape_and_cache", *WRITER, *VLLM_WRITER),
    *table("reshape_and_cache_flash", *WRITER, *FLASH_WRITER),
    *table("convert_fp8", *CONVERT),
    *table("copy_blocks", *COPY),
    *table("swap_blocks", *SWAP),
    *table("gather_cache", *GATHER),
    *table("convert_layout", *LAYOUT),
    *table("concat_and_cache_mla", *MLA),
]


def ones_in(array):
    """A scale of 1 in the first bytes of an array."""
    scale = array.reshape(-1)[:2].view(np.float32)
    scale[0] = 1
    return scale


def off_by_a_row(given):
    """A query and an out of one buffer, one row apart."""
    memory = np.concatenate([given["query"], given["query"][:1]])
    return {"query": memory[:-1], "out": memory[1:]}


def a_row_before(name):
    """An output and a side of a merge in one buffer, one row apart."""
    memory = halves(7, 4, 64)
    return {"output": memory[:-1], name: memory[1:]}


def halves_of_one():
    """Two arrays [4, 6] that have a row in common."""
    memory = np.zeros((7, 6), np.float32)
    return memory[:4], memory[3:]


# Not repeated by `test_prepared`: calls alike, but for addresses, are not checked again.
INTO_OUT = [
    ("out is query", lambda g: {"out": g["query"]}, ValueError, "^out: shares memory with query"),
    ("out is a row before query", off_by_a_row, ValueError, "^out: shares memory with query"),
    ("out is in key_cache", lambda g: {"out": g["key_cache"].reshape(-1)[:512].reshape(2, 4, 64)}, ValueError, "^out: shares memory with key_cache"),
    ("out is in value_cache", lambda g: {"out": g["value_cache"].reshape(-1)[-512:].reshape(2, 4, 64)}, ValueError, "^out: shares memory with value_cache"),
    ("seq_lens is in out", lambda g: {"seq_lens": g["out"].reshape(-1)[-4:].view(np.int32)}, ValueError, "^out: shares memory with seq_lens"),
    ("block_tables is in out", lambda g: {"block_tables": g["out"].reshape(-1)[:20].view(np.int32).reshape(2, 5)}, ValueError, "^out: shares memory with block_tables"),
    ("alibi_slopes is in out", lambda g: {"alibi_slopes": g["out"].reshape(-1)[:8].view(np.float32)}, ValueError, "^out: shares memory with alibi_slopes"),
    ("k_scale is in out", lambda g: {"k_scale": ones_in(g["out"])}, ValueError, "^out: shares memory with k_scale"),
]  # fmt: skip

INTO_CACHES = [
    ("value_cache is key_cache", lambda g: {"value_cache": g["key_cache"].reshape(g["value_cache"].shape)}, ValueError, "^(key|value)_cache: shares memory with (key|value)_cache"),
    ("key is in key_cache", lambda g: {"key": g["key_cache"].reshape(-1)[:640].reshape(5, 2, 64)}, ValueError, "^key_cache: shares memory with key,"),
    ("value is in key_cache", lambda g: {"value": g["key_cache"].reshape(-1)[-640:].reshape(5, 2, 64)}, ValueError, "^key_cache: shares memory with value,"),
    ("slot_mapping is in value_cache", lambda g: {"slot_mapping": g["value_cache"].reshape(-1)[:20].view(np.int64)}, ValueError, "^value_cache: shares memory with slot_mapping"),
    ("v_scale is in value_cache", lambda g: {"v_scale": ones_in(g["value_cache"])}, ValueError, "^value_cache: shares memory with v_scale"),
]  # fmt: skip

INTO_SIDES = [
    ("output is a row before prefix_output", lambda _: a_row_before("prefix_output"), ValueError, "^output: shares memory with prefix_output"),
    ("output is a row before suffix_output", lambda _: a_row_before("suffix_output"), ValueError, "^output: shares memory with suffix_output"),
    ("output_lse is in output", lambda g: {"output_lse": g["output"].reshape(-1)[:48].view(np.float32).reshape(4, 6)}, ValueError, "^output(_lse)?: shares memory with output"),
    ("suffix_lse is in output", lambda g: {"suffix_lse": g["output"].reshape(-1)[:48].view(np.float32).reshape(4, 6)}, ValueError, "^output: shares memory with suffix_lse"),
    ("output_lse is half of prefix_lse", lambda _: dict(zip(("output_lse", "prefix_lse"), halves_of_one(), strict=True)), ValueError, "^output_lse: shares memory with prefix_lse"),
    ("codes replace their floats", lambda g: {"output": g["prefix_output"].reshape(-1)[:768].view(np.uint8).reshape(6, 4, 64), "output_scale": 1.0}, ValueError, "^output: shares memory with prefix_output"),
]  # fmt: skip

INTO_CODES = [
    ("output is in input", lambda g: {"output": g["input"].reshape(-1)[:12].view(np.uint8).reshape(3, 8)}, ValueError, "^output: shares memory with input"),
    ("scale is in output", lambda g: {"scale": g["output"].reshape(-1)[:4].view(np.float32)}, ValueError, "^output: shares memory with scale"),
]  # fmt: skip

OVERLAPS = [
    *(row for name in ("", "_v1", "_v2") for row in table(f"paged_attention{name}", *INTO_OUT)),
    *(row for name in ("", "_flash") for row in table(f"reshape_and_cache{name}", *INTO_CACHES)),
    *table("convert_fp8", *INTO_CODES),
    *table("merge_attn_states", *INTO_SIDES),
]


@pytest.mark.parametrize("operator", GOOD)
def test_the_good_call_is_good(operator):
    getattr(cupy_paged, operator)(**GOOD[operator]())


@pytest.mark.parametrize("bad", [*BAD_CALLS, *OVERLAPS], ids=str)
def test_a_bad_call_is_refused_and_writes_nothing(bad, tally):
    given = GOOD[bad.operator]()
    given.update(bad.change(given))
    arrays = {
        f"{name} {i}": value
        for name, values in given.items()
        for i, value in enumerate(values if isinstance(values, list) else [values])
        if isinstance(value, np.ndarray)
    }
    before = {name: value.copy() for name, value in arrays.items()}
    with pytest.raises(bad.error, match=bad.message) as caught:
        getattr(cupy_paged, bad.operator)(**given)
    assert type(caught.value) is bad.error
    for name, value in arrays.items():
        compare.bitwise(value, before[name], name)
    tally("wrong calls", 1)


ARRAYS = [
    (operator, name)
    for operator, good in GOOD.items()
    for name, value in good().items()
    if isinstance(value, np.ndarray)
]


@pytest.mark.parametrize(("operator", "name"), ARRAYS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("on the meta device", "torch device meta is not supported, needs cpu or cuda"),
        ("sparse", "a torch tensor without strided memory.*needs a dense one"),
        ("complex", "dtype complex64 is not supported, needs"),
    ],
)
def test_a_torch_tensor_without_numbers_in_memory_is_refused(operator, name, wrong, message, tally):
    torch = pytest.importorskip("torch")
    given = GOOD[operator]()
    tensor = torch.from_numpy(given[name])
    spoil = {
        "on the meta device": lambda: tensor.to("meta"),
        "sparse": tensor.to_sparse,
        "complex": lambda: tensor.to(torch.complex64),
    }
    given[name] = spoil[wrong]()
    with pytest.raises(TypeError, match=f"^{name}: {message}"):
        getattr(cupy_paged, operator)(**given)
    tally("wrong calls", 1)


@pytest.mark.parametrize(("operator", "name"), ARRAYS)
def test_a_traced_jax_array_is_refused(operator, name, tally):
    jax = pytest.importorskip("jax")
    given = GOOD[operator]()
    given[name] = given[name].astype(np.float32)  # without 64-bit integers, which JAX warns of

    def call(traced):
        getattr(cupy_paged, operator)(**{**given, name: traced})

    with pytest.raises(TypeError, match=f"^{name}: is being traced by jax.jit"):
        jax.jit(call)(given[name])
    tally("wrong calls", 1)


@pytest.mark.parametrize(("operator", "name"), ARRAYS)
def test_a_mask_is_not_ignored(operator, name, tally):
    given = GOOD[operator]()
    given[name] = np.ma.masked_array(given[name])
    with pytest.raises(TypeError, match=rf"^{name}: got MaskedArray, .* pass x\.filled\("):
        getattr(cupy_paged, operator)(**given)
    tally("wrong calls", 1)


def test_jax_is_told_how_to_write():
    jnp = pytest.importorskip("jax.numpy")
    given = GOOD["reshape_and_cache_flash"]()
    slots = jnp.asarray(given["slot_mapping"].astype(np.int32))
    words = (
        r"^slot_mapping: dtype int32, needs int64, which JAX has with jax_enable_x64; "
        r"cupy_paged\.interop\.jax_ops takes int32$"
    )
    with pytest.raises(TypeError, match=words):
        cupy_paged.reshape_and_cache_flash(**{**given, "slot_mapping": slots})
    given["key_cache"] = jnp.asarray(given["key_cache"])
    words = r"^key_cache: is a jax\.Array, which is immutable; .* cupy_paged\.interop\.jax_ops "
    with pytest.raises(TypeError, match=words):
        cupy_paged.reshape_and_cache_flash(**given)


def test_flash_caches_of_which_no_shape_tells_the_layout_are_vllms():
    key, value = halves(1, 16, 64), halves(1, 16, 64, fill=2)
    key_cache, value_cache = halves(3, 16, 16, 64, fill=7), halves(3, 16, 16, 64, fill=7)
    caches = key_cache, value_cache
    cupy_paged.reshape_and_cache_flash(key, value, *caches, np.array([18]), "auto", 1.0, 1.0)
    for cache, row in zip(caches, (key, value), strict=True):
        assert (cache[1, 2] == row[0]).all()
        assert (cache == 7).sum() == cache.size - row.size


@pytest.mark.parametrize("first", ["out", *ops.POSITIONAL])
def test_exchanged_arguments_give_short_messages(first):
    for second in ops.POSITIONAL:
        given = {name: 0 for name in ops.POSITIONAL} | v1_arguments()
        given.update({first: given[second], second: given[first]})
        try:
            cupy_paged.paged_attention_v1(**given)
        except (TypeError, ValueError) as error:
            message = str(error)
            assert len(message) < 300 and "array(" not in message, f"{second}: {message}"


def test_the_table_is_long():
    # Counted without those that only repeat a row for another operator of the same checks.
    distinct = {(bad.wrong, bad.message) for bad in [*BAD_CALLS, *OVERLAPS]}
    assert len(distinct) >= 500


def test_a_missing_argument_is_named():
    given = v2_arguments()
    del given["tmp_out"]
    with pytest.raises(TypeError, match="tmp_out"):
        cupy_paged.paged_attention_v2(**given)


@pytest.mark.parametrize("operator", GOOD)
def test_an_unknown_argument_is_named(operator):
    with pytest.raises(TypeError, match="head_dim"):
        getattr(cupy_paged, operator)(**GOOD[operator](), head_dim=64)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("query", "needs float16, bfloat16, float32$"),
        ("key_cache", "needs float16, bfloat16, float32, or fp8"),
        ("seq_lens", "int32$"),
    ],
)
def test_a_dtype_of_no_argument_names_what_this_one_needs(name, needs):
    given = attention_arguments()
    given[name] = given[name].astype(np.float64)
    with pytest.raises(TypeError, match=f"^{name}: dtype float64 is not supported, .*{needs}"):
        cupy_paged.paged_attention(**given)
