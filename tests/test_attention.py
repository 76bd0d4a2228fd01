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
