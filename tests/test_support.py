"""The tests' own tools: the oracle against plain softmax, and inputs that bite."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest

from cupy_paged import gpu
from cupy_paged.arrays import array
from cupy_paged.attention_kernels import HeadProblem, attention_plan
from cupy_paged.layouts import geometry
from scoreboard.rows import NUM_STORAGES
from support import cases, compare, data, frameworks, oracle
from support.data import Case, build, needles


def plain(problem):
    """Attention over the dense tokens that the pools were filled from, by the naive formula."""
    case = problem.case
    out = np.zeros(problem.query.shape)
    for seq, (key, value) in enumerate(problem.dense):
        for head in range(case.num_heads) if len(key) else ():
            k = oracle.values(key[:, head // case.group]) * case.scales[0]
            v = oracle.values(value[:, head // case.group]) * case.scales[1]
            weight = np.exp(problem.scale * (k @ oracle.values(problem.query[seq, head])))
            out[seq, head] = weight / weight.sum() @ v
    return out


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("strides", cases.STRIDES)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3", "fp8_e5m2"])
def test_oracle_reads_the_cache_that_was_written(layout, strides, kv_cache_dtype):
    case = Case(layout=layout, strides=strides, kv_cache_dtype=kv_cache_dtype)
    problem = build(case)
    np.testing.assert_allclose(problem.expected[0], plain(problem), rtol=1e-12, atol=1e-14)
    for cache in problem.key_cache, problem.value_cache:
        assert cache.flags.c_contiguous == (strides == "contiguous")
    assert np.isnan(problem.key_cache.astype(float)).any(), "the pool should be poisoned"


def test_oracle_partitions_combine_to_its_output():
    problem = build(Case(seq_lens=(100, 0, 16, 33), alibi=True))
    out, lse = problem.expected
    parts = problem.expected_partitions(16, 7)
    with np.errstate(divide="ignore"):
        log_sums = np.where(parts.exp_sums > 0, parts.max_logits + np.log(parts.exp_sums), -np.inf)
    np.testing.assert_allclose(np.logaddexp.reduce(log_sums, axis=-1), lse, rtol=1e-12)
    weight = np.exp(log_sums - np.where(np.isinf(lse), 0.0, lse)[..., None])
    combined = np.einsum("shn,shnd->shd", weight, parts.tmp_out)
    np.testing.assert_allclose(combined, out, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("head_size", [8, 64, 256])
def test_a_dropped_or_shifted_needle_shows(head_size, group):
    length, tokens = 1025, [0, 15, 16, 511, 512, 1024]
    problem = needles(Case(head_size=head_size, group=group, seq_lens=()), length, tokens)
    out, _ = problem.expected
    for seq, token in enumerate(tokens):
        row = problem.rows([seq])
        rules = {**row.rules}
        for head, logits, value, mask in oracle.heads_of(
            row.query[0], row.key_cache, row.value_cache, row.block_tables[0], length, **rules
        ):
            size = np.linalg.norm(out[seq, head])
            mask[token] = False
            dropped, *_ = oracle.softmax_sum(logits[mask], value[mask])
            shifted, *_ = oracle.softmax_sum(logits, np.roll(value, 1, axis=0))
            for wrong in (dropped, shifted):
                assert np.linalg.norm(wrong - out[seq, head]) > 0.5 * size


WRONG_KERNELS = {
    "right": lambda logits, value, scale: oracle.softmax_sum(logits, value)[0],
    "queries and keys are not read": lambda logits, value, scale: value.mean(axis=0),
    "the scale is left out": lambda logits, value, scale: oracle.softmax_sum(logits / scale, value)[
        0
    ],
    "a page of values is the next one": lambda logits, value, scale: oracle.softmax_sum(
        logits, np.concatenate([value[16:32], value[16:]])
    )[0],
    "only zeros are written": lambda logits, value, scale: 0 * value[0],
}


@pytest.mark.parametrize("length", [32, 512, 4096, 57_600])
@pytest.mark.parametrize("fault", WRONG_KERNELS)
def test_a_wrong_kernel_is_seen_at_every_length(fault, length):
    problem = build(Case(num_kv_heads=1, group=1, block_size=16, seq_lens=(length,)))
    row = problem.query[0], problem.key_cache, problem.value_cache, problem.block_tables[0]
    ((_, logits, value, _),) = oracle.heads_of(*row, length, **problem.rules)
    found = WRONG_KERNELS[fault](logits, value, problem.scale).astype(np.float16)
    seen = pytest.raises(AssertionError, match="relative error")
    with contextlib.nullcontext() if fault == "right" else seen:
        compare.close(found[None, None], problem.expected[0], "float16")


def test_stretched_logits_reach_their_size():
    problem = build(Case(seq_lens=(300, 7)), logits=80.0)
    for seq, seq_len in enumerate(problem.case.seq_lens):
        row = problem.query[seq], problem.key_cache, problem.value_cache
        for _, logits, _, _ in oracle.heads_of(
            *row, problem.block_tables[seq], seq_len, **problem.rules
        ):
            assert 79.0 < np.abs(logits).max() < 81.0


def test_block_sparse_rule_by_hand():
    # 40 tokens, pages of 4, sparse blocks of 8: the newest token lies in block 4.
    rule = oracle.BlockSparse(1, 3, 8, 1, 0)
    for head, blocks in ((0, {2, 4}), (1, {1, 4}), (2, {0, 3, 4})):
        mask = oracle.attended(40, head, 4, 2, 4, rule)
        assert set(np.flatnonzero(mask) // 8) == blocks
    # A negative step slides on KV heads: heads 0 and 1 share one, and rank 1 starts at KV head 2.
    rule = oracle.BlockSparse(0, 4, 8, -1, 1)
    masks = [oracle.attended(40, head, 4, 2, 4, rule) for head in range(4)]
    assert [set(np.flatnonzero(m) // 8) for m in masks] == [{1}, {1}, {0, 4}, {0, 4}]


@pytest.mark.parametrize("arrays", frameworks.host(), ids=lambda arrays: arrays.name)
@pytest.mark.parametrize("dtype", data.DTYPES)
def test_frameworks_keep_bits_and_strides(arrays, dtype):
    codes = np.arange(240, dtype=np.uint8)
    array = codes.view(data.DTYPES[dtype])[: 240 // data.DTYPES[dtype].itemsize].reshape(2, 5, -1)
    array = array[:, 1:4:2]
    made = arrays.array(array)
    assert arrays.owns(made)
    compare.bitwise(arrays.numpy(made), array)
    if arrays.name == "torch":
        assert [s * made.element_size() for s in made.stride()] == list(array.strides)
    if arrays.name == "numpy":
        assert made.strides == array.strides


def test_comparison_finds_one_wrong_element():
    want = np.random.default_rng(0).standard_normal((3, 4, 16))
    right = want.astype(np.float32)
    compare.close(right, want, "float32")
    for wrong_value, message in ((np.nan, "NaN"), (np.inf, "inf"), (9.0, r"\(2, 1\).*element 7")):
        wrong = right.copy()
        wrong[2, 1, 7] = wrong_value
        with pytest.raises(AssertionError, match=message):
            compare.close(wrong, want, "float32")
    off = right.copy()
    off[0, 3, 2] = np.nextafter(off[0, 3, 2], 9)
    with pytest.raises(AssertionError, match=r"\(0, 3, 2\)"):
        compare.bitwise(off, right)
    with pytest.raises(AssertionError, match="dtype float32"):
        compare.close(right, want, "float16")


def test_sums_may_be_off_by_what_their_logits_were_rounded_by():
    want, max_logits = np.array([[2.0, 3.0]]), np.array([[-2000.0, 5.0]])
    factor = 1 + 2e-4
    compare.close_sums((want * [[factor, 1.0]]).astype(np.float32), want, max_logits)
    with pytest.raises(AssertionError, match=r"exp_sums: 1 of 2 wrong, first at \(0, 1\)"):
        compare.close_sums((want * factor).astype(np.float32), want, max_logits)


def test_rows_may_be_off_by_what_their_logits_were_rounded_by():
    want = np.ones((100, 4))
    got, rounding = want.astype(np.float32), np.zeros(100)
    got[7] *= 1 + 3e-4
    for row, is_off in (7, False), (8, True):
        rounding[:] = 0.0
        rounding[row] = 1.5e-4
        found = pytest.raises(AssertionError, match="1 of 100 rows")
        with found if is_off else contextlib.nullcontext():
            compare.close(got, want, "float32", tolerance=1e-4, row_rounding=rounding)


def test_counts_of_partitions_without_a_logit():
    want, max_logits = np.array([[16.0]]), np.array([[np.finfo(np.float32).min]], float)
    compare.close_sums(want.astype(np.float32), want, max_logits)
    with pytest.raises(AssertionError, match="exp_sums: 1 of 1 wrong"):
        compare.close_sums(np.zeros((1, 1), np.float32), want, max_logits)


@pytest.mark.parametrize("drawn", [cases.HOST, cases.GPU], ids=["host", "gpu"])
def test_every_axis_of_the_cases_is_covered(drawn):
    assert {case.head_size for case in drawn} >= set(cases.HEAD_SIZES)
    assert {case.block_size for case in drawn} >= set(cases.BLOCK_SIZES)
    assert {case.group for case in drawn} >= set(cases.GROUPS)
    assert {case.layout for case in drawn} == set(cases.LAYOUTS)
    assert {(case.dtype, case.cache_dtype.name) for case in drawn} >= {
        (dtype, cache)
        for dtype in cases.DTYPES
        for cache in ("float8_e4m3fn", "float8_e5m2", dtype)
    }


def test_every_dtype_is_run_from_every_cache_in_every_layout():
    storages = {(case.dtype, case.cache_dtype.name, case.layout) for case in cases.GPU}
    assert len(storages) == NUM_STORAGES


def test_every_axis_of_the_cases_for_tensor_cores_is_covered():
    drawn = cases.TENSOR_CORES
    assert {case.head_size for case in drawn} == set(cases.TENSOR_HEAD_SIZES)
    assert {case.block_size for case in drawn} >= set(cases.TENSOR_BLOCK_SIZES)
    assert {case.group for case in drawn} == set(cases.TENSOR_GROUPS)
    assert {(case.layout, case.cache_dtype.itemsize, case.alibi) for case in drawn} == {
        (layout, size, alibi) for layout in cases.LAYOUTS for size in (1, 2) for alibi in (0, 1)
    }
    assert {(case.dtype, case.cache_dtype.name) for case in drawn} == {
        (dtype, cache)
        for dtype in ("float16", "bfloat16")
        for cache in ("float8_e4m3fn", "float8_e5m2", dtype)
    }


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("case", cases.TENSOR_CORES, ids=str)
def test_the_cases_for_tensor_cores_reach_them(case, sm):
    problem = build(replace(case, seq_lens=(3,)))
    keys, values = (array(a, "cache") for a in (problem.key_cache, problem.value_cache))
    cache = geometry(case.layout, keys, values, case.cache_dtype.name)
    head = HeadProblem(
        case.dtype,
        case.cache_dtype.name,
        case.layout,
        case.head_size,
        case.block_size,
        case.group,
        cache.key_alignment,
        cache.value_alignment,
        query_alignment=16,
        has_alibi=case.alibi,
        is_block_sparse=False,
    )
    plan = attention_plan(head, sm, gpu.shared_bytes_of(sm), "float32")
    assert plan.kernel.source == "paged_attention_mma.cu"
