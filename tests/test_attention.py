"""The attention operators on host arrays, against the oracle."""

from dataclasses import replace

import numpy as np
import pytest

import cupy_paged
from support import cases, compare, frameworks, ops
from support.attention_suite import AttentionSuite
from support.data import Case, build


@pytest.fixture(params=frameworks.writable(frameworks.host()), ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


@pytest.mark.parametrize("case", cases.HOST, ids=str)
def test_matches_oracle(case):
    ops.check_attention(build(case), frameworks.NumPy(), scratches=("float32", case.dtype))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_lengths_around_partitions(layout, dtype, arrays):
    case = Case(dtype=dtype, layout=layout, seq_lens=cases.around_partitions(16), alibi=True)
    ops.check_attention(build(case), arrays)


@pytest.mark.parametrize("block", [-1, -(2**31), 2**31 - 1, 8])
def test_a_live_block_outside_the_cache_is_named(block, arrays):
    problem = build(Case(seq_lens=(40, 17)))
    assert len(problem.key_cache) == 8
    problem.block_tables[1, 0] = block
    out = ops.empty(problem.query.shape, "float16", arrays, ops.SENTINEL)
    with pytest.raises(IndexError, match=rf"^block_tables\[1, 0\]: .*{block}.*8"):
        ops.paged_attention(problem, arrays, out=out)
    assert (arrays.numpy(out) == np.float16(ops.SENTINEL)).all()


@pytest.mark.parametrize("max_seq_len", [0, 1, 40, 512])
def test_what_an_estimate_leaves_out_is_nan_and_the_rest_is_whole(max_seq_len, arrays):
    problem = build(Case(seq_lens=(5, 41, 40, 600, 1, 0)))
    too_long = problem.seq_lens > max_seq_len
    estimated = replace(problem, max_seq_len=max_seq_len)
    for call in ops.paged_attention, ops.paged_attention_v1:
        for got, want in zip(call(estimated, arrays), call(problem, arrays), strict=True):
            assert np.isnan(got[too_long]).all()
            compare.bitwise(got[~too_long], want[~too_long], call.__name__)
    out, *_ = ops.paged_attention_v2(estimated, arrays, num_partitions=1)
    assert np.isnan(out[too_long]).all()
    compare.close(out[~too_long], problem.expected[0][~too_long], "float16")


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_one_token_gives_its_value_bit_by_bit(dtype, arrays):
    """Whatever is added to a sum of weights so that it cannot be 0 would show."""
    problem = build(Case(dtype, seq_lens=(1, 1, 1)))
    (found,) = ops.paged_attention_v1(problem, arrays)
    for row, (_, values) in zip(found, problem.dense, strict=True):
        compare.bitwise(row, np.repeat(values[0], problem.case.group, axis=0))


@pytest.mark.parametrize("step", [0, 7, 2**40])
def test_the_stride_of_a_dimension_of_one_says_nothing(step):
    """Where frameworks put it they agree on nothing."""
    case = Case(num_kv_heads=1, group=1, seq_lens=(11,), strides="padded")
    problem = build(case)
    problem = replace(problem, block_tables=problem.block_tables[:, :1])
    given = ops.arguments(problem, frameworks.NumPy())
    given["out"] = np.full(problem.query.shape, np.nan, np.float16)
    for name, x in given.items():
        if isinstance(x, np.ndarray):
            strides = [
                step * x.itemsize if n == 1 else stride
                for n, stride in zip(x.shape, x.strides, strict=True)
            ]
            given[name] = np.lib.stride_tricks.as_strided(x, x.shape, strides)
    cupy_paged.paged_attention(**given)
    compare.close(given["out"], problem.expected[0], "float16")


class TestAttention(AttentionSuite):
    pass
