"""Call the operators on a `data.Problem` with the arrays of one framework.

Outputs and scratch start as `SENTINEL` or NaN, so that what an operator leaves unwritten shows.
"""

import numpy as np

import cupy_paged
from support import compare
from support.data import DTYPES
from support.oracle import BlockSparse

SENTINEL = 60000.0
POSITIONAL = (
    "query",
    "key_cache",
    "value_cache",
    "num_kv_heads",
    "scale",
    "block_tables",
    "seq_lens",
    "block_size",
    "max_seq_len",
    "alibi_slopes",
    "kv_cache_dtype",
    "k_scale",
    "v_scale",
    "tp_rank",
    "blocksparse_local_blocks",
    "blocksparse_vert_stride",
    "blocksparse_block_size",
    "blocksparse_head_sliding_step",
)


def cache_bytes(cache):
    """A float8 cache as the uint8 array that every framework has."""
    return cache.view(np.uint8) if cache.dtype.itemsize == 1 else cache


def sparse_arguments(sparse):
    if sparse is None:
        return {}
    return {
        "tp_rank": sparse.tp_rank,
        "blocksparse_local_blocks": sparse.local_blocks,
        "blocksparse_vert_stride": sparse.vert_stride,
        "blocksparse_block_size": sparse.block_size,
        "blocksparse_head_sliding_step": sparse.head_sliding_step,
    }


def arguments(problem, arrays, **changes):
    """The arguments of `paged_attention`, by name, some of them changed."""
    case, names = problem.case, ("query", "key_cache", "value_cache", "block_tables", "seq_lens")
    slopes = problem.alibi_slopes
    return {
        **{
            name: arrays.array(cache_bytes(array))
            for name, array in zip(names, problem.inputs, strict=True)
            if name not in changes
        },
        "scale": problem.scale,
        "layout": case.layout,
        "kv_cache_dtype": case.kv_cache_dtype,
        "k_scale": case.given_scales[0],
        "v_scale": case.given_scales[1],
        "alibi_slopes": None if slopes is None else arrays.array(slopes),
        "max_seq_len": problem.max_seq_len,
        **sparse_arguments(case.sparse),
        **changes,
    }


def paged_attention(problem, arrays, **changes):
    """(out, lse) of `paged_attention`, as NumPy arrays."""
    given = arguments(problem, arrays, **{"return_lse": True, **changes})
    out, lse = cupy_paged.paged_attention(**given)
    assert arrays.owns(out) and arrays.owns(lse)
    return arrays.numpy(out), arrays.numpy(lse)


def empty(shape, dtype, arrays, fill=np.nan):
    return arrays.array(np.full(shape, fill).astype(DTYPES[dtype]))


def positional(problem, arrays, **changes):
    """The arguments of `paged_attention_v1` from `query` on, in vLLM's order, and the keywords."""
    named = {"num_kv_heads": problem.case.num_kv_heads, "block_size": problem.case.block_size}
    dense = sparse_arguments(BlockSparse(0, 0, 64, 0))
    given = {**dense, **arguments(problem, arrays, **{**named, **changes})}
    if given["max_seq_len"] is None:
        given["max_seq_len"] = problem.capacity
    return [given.pop(name) for name in POSITIONAL], given


def paged_attention_v1(problem, arrays, **changes):
    """(out,) of `paged_attention_v1`, as a NumPy array."""
    out = empty(problem.query.shape, problem.case.dtype, arrays)
    tail, keywords = positional(problem, arrays, **changes)
    assert cupy_paged.paged_attention_v1(out, *tail, **keywords) is None
    return (arrays.numpy(out),)


def paged_attention_v2(problem, arrays, num_partitions=None, scratch="float32", **changes):
    """(out, exp_sums, max_logits, tmp_out) of `paged_attention_v2`, as NumPy arrays."""
    num_seqs, num_heads, head_size = shape = problem.query.shape
    if num_partitions is None:
        num_partitions = partitions_needed(problem)
    out = empty(shape, problem.case.dtype, arrays)
    shape = num_seqs, num_heads, num_partitions
    exp_sums, max_logits = (empty(shape, "float32", arrays, SENTINEL) for _ in range(2))
    tmp_out = empty((*shape, head_size), scratch, arrays, SENTINEL)
    tail, keywords = positional(problem, arrays, **changes)
    written = out, exp_sums, max_logits, tmp_out
    assert cupy_paged.paged_attention_v2(*written, *tail, **keywords) is None
    return tuple(map(arrays.numpy, written))


def partitions_needed(problem, partition_size=512):
    capacity = problem.capacity if problem.max_seq_len is None else problem.max_seq_len
    return -(-capacity // partition_size)


def check_attention(problem, arrays, scratches=("float32",)):
    """Check `paged_attention`, v1, and v2 with scratch of each dtype, against the oracle."""
    expected, expected_lse = problem.expected
    dtype = problem.case.dtype
    out, lse = paged_attention(problem, arrays)
    compare.close(out, expected, dtype, "paged_attention")
    compare.close_lse(lse, expected_lse, "paged_attention lse")
    (out,) = paged_attention_v1(problem, arrays)
    compare.close(out, expected, dtype, "paged_attention_v1")
    for scratch in scratches:
        out, *_ = paged_attention_v2(problem, arrays, scratch=scratch)
        compare.close(out, expected, dtype, f"paged_attention_v2 with {scratch} scratch")


def check_scratch(problem, arrays, partition_size, num_partitions, scratch="float32", named=True):
    """Check what `paged_attention_v2` leaves in its scratch, and what it leaves alone.

    Unless `named`, the operator has to find out the partition size by itself.
    """
    changes = {"partition_size": partition_size} if named else {}
    expected = problem.expected_partitions(partition_size, num_partitions)
    out, exp_sums, max_logits, tmp_out = paged_attention_v2(
        problem, arrays, num_partitions, scratch, **changes
    )
    compare.close(out, problem.expected[0], problem.case.dtype)
    live = np.repeat(expected.live[:, None], problem.case.num_heads, axis=1)
    compare.close_sums(exp_sums[live], expected.exp_sums[live], expected.max_logits[live])
    compare.close_lse(max_logits[live], expected.max_logits[live], "max_logits")
    # Tensor cores round the weights to the query's dtype, whatever tmp_out holds.
    tolerance = compare.TOLERANCE[problem.case.dtype]
    rounding = compare.rounding_of(expected.max_logits[live])
    compare.close(tmp_out[live], expected.tmp_out[live], scratch, "tmp_out", tolerance, rounding)
    for name, array in ("exp_sums", exp_sums), ("max_logits", max_logits), ("tmp_out", tmp_out):
        kept = np.asarray(SENTINEL).astype(array.dtype)
        assert (array[~live] == kept).all(), f"{name}: a partition that is not live was written"
