"""Element offsets past 2**31 and 2**32: of blocks, strides, slots, scratch, states and codes."""

from dataclasses import replace

import cupy
import numpy as np
import pytest

import cupy_paged
from support import compare, frameworks, merge_suite, ops, oracle
from support.data import DTYPES, Case, build

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


def far_apart(memory, first, shape, apart):
    """A view that begins at element `first`, its rows that many elements apart."""
    inner = [int(np.prod(shape[i + 1 :])) for i in range(1, len(shape))]
    strides = tuple(memory.itemsize * stride for stride in (apart, *inner))
    return cupy.lib.stride_tricks.as_strided(memory[first:], shape, strides)


def put(array, rows):
    """Fills an array, row by row: nothing rests on offsets that CuPy's own kernels make."""
    for i, row in enumerate(rows):
        array[i] = cupy.asarray(row)


def taken(array):
    return np.stack([row.get() for row in array])


def around(boundary, size, rng):
    """Places on both sides of `boundary`, at both ends of what has `size` of them, and anywhere."""
    ends = 0, 1, boundary - 1, boundary, boundary + 1, size - 2, size - 1
    return np.unique([*ends, *rng.integers(0, size, 20)])


def check_rows(array, places, want, elsewhere):
    """Check the rows of a large array at `places`, and that all others are full of `elsewhere`."""
    for i, place in enumerate(places.tolist()):
        found = array[place : place + 1]
        compare.bitwise(found.get(), want[i : i + 1], f"row {place}")
        found[...] = elsewhere
    flat = array.reshape(-1)
    for start in range(0, flat.size, 2**28):
        some = flat[start : start + 2**28]
        assert (some == elsewhere).all(), f"an element from {start} on is not {elsewhere}"


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
        check_rows(pool, ids, want, 0x7F)


def test_slots_of_latents_past_as_many_elements(rng):
    rank, pe_dim, block_size, num_tokens = 512, 64, 16, 4
    width = rank + pe_dim
    near = BOUNDARY // (block_size * width)
    num_blocks = near + 10
    tokens = rng.standard_normal((num_tokens, width)).astype(np.float16)
    # What is read lies far apart, too: the last token past 2**31 elements.
    apart = BOUNDARY // (num_tokens - 1) // 8 * 8 + 8
    memory = cupy.empty((num_tokens - 1) * apart + width, np.float16)
    put(far_apart(memory, 0, (num_tokens, width), apart), tokens)
    kv_c = far_apart(memory, 0, (num_tokens, rank), apart)
    k_pe = far_apart(memory, rank, (num_tokens, pe_dim), apart)

    ids = np.array([0, near - 1, near, num_blocks - 1])
    order, offsets = rng.permutation(num_tokens), np.array([0, 15, 15, 3])
    slots = CUPY.array((ids * block_size + offsets)[order])
    cache = cupy.full((num_blocks, block_size, width), 0x7F, np.uint8)
    cupy_paged.concat_and_cache_mla(kv_c, k_pe, cache, slots, "fp8", 0.75)
    expected = oracle.concat_and_cache_mla(
        tokens[:, :rank],
        tokens[:, rank:],
        np.full((num_tokens, block_size, width), 0x7F, np.uint8),
        (np.arange(num_tokens) * block_size + offsets)[order],
        kv_cache_dtype="fp8",
        scale=0.75,
    )
    check_rows(cache, ids, expected, 0x7F)


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


@pytest.mark.parametrize("head_size", [64, 1])  # where it is 1, there are as many rows
def test_states_of_more_elements(head_size, rng):
    num_heads = 8
    near = BOUNDARY // (num_heads * head_size)
    num_tokens = near + 100
    shape = num_tokens, num_heads, head_size
    # One side is in all memory that this takes, and replaced; of the other each token has the same.
    output = cupy.ones(shape, np.float16)
    suffix = cupy.broadcast_to(cupy.full(shape[1:], 2, np.float16), shape)
    lse = cupy.broadcast_to(cupy.zeros((num_heads, 1), np.float32), (num_heads, num_tokens))
    tokens = around(near, num_tokens, rng)
    needles = rng.integers(2, 1000, (len(tokens), num_heads, head_size)).astype(np.float16)
    for token, needle in zip(tokens.tolist(), needles, strict=True):
        output[token] = cupy.asarray(needle)
    cupy_paged.merge_attn_states(output, output, lse, suffix, lse)
    check_rows(output, tokens, needles / 2 + 1, 1.5)  # whole halves, which are exact


def test_states_far_apart(rng):
    shape = num_tokens, num_heads, head_size = 3, 3, 64
    apart = BOUNDARY // 2 + 8  # tokens of outputs, and heads of log-sum-exps: the third lies past
    memory = cupy.empty(2 * apart + 4096, np.float32)
    outputs = [far_apart(memory, first, shape, apart) for first in (0, 1024, 2048)]
    lses = [
        far_apart(memory, first, (num_heads, num_tokens), apart) for first in (3072, 3088, 3104)
    ]
    given = merge_suite.states(rng, "float32", num_tokens, num_heads, head_size)
    read = outputs[0], lses[0], outputs[1], lses[1]
    for array, rows in zip(read, given, strict=True):
        put(array, rows)
    cupy_paged.merge_attn_states(outputs[2], *read, lses[2])
    output, lse = oracle.merge_attn_states(*given)
    compare.close(taken(outputs[2]), output, "float32")
    compare.close_lse(taken(lses[2]), lse)


@pytest.mark.parametrize("kind", ["to_fp8", "from_fp8"])
def test_conversions_of_more_elements(kind, rng):
    size, scale = BOUNDARY + 5000, 0.5
    places = around(BOUNDARY, size, rng)
    # All different, and none like the others, which are ones.
    one = np.ones(1, DTYPES["float8_e4m3fn"]).view(np.uint8)
    needles = rng.permutation(np.arange(1, one[0], dtype=np.uint8))[: len(places)]

    def floats(codes):
        return (codes.view(DTYPES["float8_e4m3fn"]).astype(np.float32) * scale).astype(np.float16)

    codes, numbers = (needles, one), (floats(needles), floats(one))
    before, after = (numbers, codes) if kind == "to_fp8" else (codes, numbers)
    source = cupy.full(size, before[1][0], before[1].dtype)
    for place, needle in zip(places.tolist(), before[0], strict=True):
        source[place] = needle
    output = cupy.zeros(size, after[0].dtype)
    cupy_paged.convert_fp8(output, source, scale)
    check_rows(output, places, after[0], after[1][0])
