"""Element offsets past 2**31 and 2**32: of blocks, of strides, of slots and of scratch."""

from dataclasses import replace

import cupy
import numpy as np
import pytest

import cupy_paged
from support import compare, frameworks, ops, oracle
from support.data import Case, build

CUPY = frameworks.device()[0]
BOUNDARY = 2**31


@pytest.fixture(autouse=True)
def free_memory():
    yield
    cupy.get_default_memory_pool().free_all_blocks()


def spread_over(pool_shape, cache, ids, fill, apart=None):
    """A large pool full of `fill`, with the blocks of `cache` at `ids`.

    With `apart`, blocks are that many elements apart and the pool is a view.
    """
    unsigned = np.dtype(f"u{cache.dtype.itemsize}")
    block = int(np.prod(pool_shape[1:]))
    apart = block if apart is None else apart
    flat = cupy.full((pool_shape[0] - 1) * apart + block, fill, unsigned)
    inner = [int(np.prod(pool_shape[i + 1 :])) for i in range(1, len(pool_shape))]
    strides = tuple(unsigned.itemsize * stride for stride in (apart, *inner))
    pool = cupy.lib.stride_tricks.as_strided(flat, pool_shape, strides)
    for source, target in enumerate(ids.tolist()):
        pool[target] = cupy.asarray(np.ascontiguousarray(cache[source]).view(unsigned))
    return pool if unsigned.itemsize == 1 else pool.view(cache.dtype)


def enlarge(problem, num_blocks, ids, fill, apart=None):
    """(key_cache, value_cache, block_tables) with block i of `problem` moved to ids[i]."""
    caches = [
        spread_over((num_blocks, *cache.shape[1:]), cache, ids, fill, apart)
        for cache in (problem.key_cache, problem.value_cache)
    ]
    live = (problem.block_tables >= 0) & (problem.block_tables < len(problem.key_cache))
    tables = np.where(live, ids[np.where(live, problem.block_tables, 0)], 2**31 - 1)
    return *caches, CUPY.array(tables.astype(np.int32))


def straddling(count, boundary, num_blocks, rng):
    """`count` block ids on both sides of `boundary`, with the first and the last of the pool."""
    near = np.arange(boundary - count // 2 + 1, boundary + count - count // 2 - 1)
    ids = np.array([0, num_blocks - 1, *near])
    assert len(ids) == count == len(set(ids.tolist())) and ids.max() < num_blocks
    return rng.permutation(ids)


def check(problem, key_cache, value_cache, block_tables, **views):
    given = {"key_cache": key_cache, "value_cache": value_cache, "block_tables": block_tables}
    out, lse = ops.paged_attention(problem, CUPY, **given, **views)
    compare.close(out, problem.expected[0], problem.case.dtype)
    compare.close_lse(lse, problem.expected[1])
    out, *_ = ops.paged_attention_v2(problem, CUPY, **given, **views)
    compare.close(out, problem.expected[0], problem.case.dtype, "paged_attention_v2")


@pytest.mark.parametrize(
    ("layout", "boundary"),
    [("vllm", 2**31), ("HND", 2**31), ("NHD", 2**31), ("HND", 2**32)],
)
def test_a_pool_of_more_elements(layout, boundary, rng, tally):
    case = Case("float16", "fp8", layout, 2, 4, 128, 16, seq_lens=(100, 700, 0, 33))
    problem = build(case)
    block = 2 * 128 * 16
    num_blocks = boundary // block + 100
    count = len(problem.key_cache)
    ids = straddling(count, boundary // block, num_blocks, rng)
    check(problem, *enlarge(problem, num_blocks, ids, 0x7F))
    tally.most("elements of a pool", num_blocks * block)
    tally.most("element offset", (num_blocks - 1) * block)


@pytest.mark.parametrize("layout", ["vllm", "HND", "NHD"])
def test_blocks_far_apart(layout, rng):
    case = Case("float16", "auto", layout, 1, 4, 64, 16, seq_lens=(40, 17))
    problem = build(case)
    count = len(problem.key_cache)
    # Two of the views' blocks lie past 2**31 elements, all of them a multiple of 16 bytes apart.
    apart = BOUNDARY // (count - 2) // 8 * 8
    assert (count - 1) * apart > BOUNDARY
    check(problem, *enlarge(problem, count, rng.permutation(count), 0x7E00, apart))


def test_block_ids_around_two_to_the_16(rng):
    case = Case("float16", "auto", "HND", 1, 2, 64, 8, seq_lens=(40, 70, 9))
    problem = build(case)
    ids = straddling(len(problem.key_cache), 65536, 66000, rng)
    check(problem, *enlarge(problem, 66000, ids, 0x7E00))


@pytest.mark.parametrize(
    ("layout", "boundary"),
    [("vllm", 2**31), ("HND", 2**31), ("NHD", 2**31), ("vllm", 2**32)],
)
def test_slots_past_as_many_elements(layout, boundary, rng):
    num_heads, head_size, block_size, num_tokens = 2, 128, 16, 12
    block = num_heads * head_size * block_size
    num_blocks = boundary // block + 10
    key, value = rng.standard_normal((2, num_tokens, num_heads, head_size)).astype(np.float16)
    ids = np.array([0, boundary // block - 1, boundary // block, num_blocks - 1])
    within = rng.permutation(len(ids) * block_size)[:num_tokens]
    slots = ids[within // block_size] * block_size + within % block_size
    shapes = {
        "vllm": [(num_heads, head_size // 16, block_size, 16), (num_heads, head_size, block_size)],
        "HND": 2 * [(num_heads, block_size, head_size)],
        "NHD": 2 * [(block_size, num_heads, head_size)],
    }[layout]
    pools = [cupy.full((num_blocks, *shape), 0x7F, np.uint8) for shape in shapes]
    tail = CUPY.array(key), CUPY.array(value), *pools, CUPY.array(slots), "fp8", 0.75, 0.5
    if layout == "vllm":
        cupy_paged.reshape_and_cache(*tail)
    else:
        cupy_paged.reshape_and_cache_flash(*tail, layout=layout)
    empty = [np.full((len(ids), *shape), 0x7F, np.uint8) for shape in shapes]
    expected = oracle.reshape_and_cache(
        key, value, *empty, within, layout=layout, block_size=block_size,
        kv_cache_dtype="fp8", k_scale=0.75, v_scale=0.5,
    )  # fmt: skip
    for pool, want in zip(pools, expected, strict=True):
        for block, expected_block in zip(ids.tolist(), want, strict=True):
            compare.bitwise(pool[block].get(), expected_block, f"block {block}")
            pool[block] = 0x7F
        flat = pool.reshape(-1)
        for start in range(0, flat.size, 2**28):
            assert (flat[start : start + 2**28] == 0x7F).all(), "something else was written"


def test_scratch_of_more_than_two_to_the_31_elements():
    # Few live tokens; the last sequences' partitions lie past 2**31 elements of tmp_out.
    problem = build(
        Case("float16", "auto", "HND", 4, 16, 128, 16, seq_lens=(5, *[1] * 61, 0, 1100))
    )
    num_partitions = 4200
    width = num_partitions * 512 // 16
    tables = np.full((64, width), -1, np.int32)
    tables[:, : problem.block_tables.shape[1]] = problem.block_tables
    problem = replace(problem, block_tables=tables)
    shape = 64, 64, num_partitions
    exp_sums, max_logits = (cupy.zeros(shape, np.float32) for _ in range(2))
    tmp_out = cupy.empty((*shape, 128), np.float16)
    assert tmp_out.size > BOUNDARY
    out = ops.empty(problem.query.shape, "float16", CUPY)
    tail, keywords = ops.positional(problem, CUPY)
    cupy_paged.paged_attention_v2(out, exp_sums, max_logits, tmp_out, *tail, **keywords)
    compare.close(CUPY.numpy(out), problem.expected[0], "float16")
    (again,) = ops.paged_attention_v1(problem, CUPY)
    compare.close(again, problem.expected[0], "float16", "paged_attention_v1")
