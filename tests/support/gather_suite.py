"""What holds for gathering the tokens of sequences, with any framework's arrays.

Rows are part of larger arrays, of which all that the operator must leave alone is compared, too.
"""

import numpy as np
import pytest

import cupy_paged
from support import compare, ops, oracle
from support.cache_suite import EVERY_STORAGE, LAYOUTS
from support.data import DTYPES, WILD_IDS, Case, empty_caches, random_bits, store, tables_of

GUARD_ROWS = 110  # after the last one that may be gathered into


def gather_problem(case, starts, lengths, rng):
    """(key_cache, value_cache, block_tables): table entries of no token to gather are wild."""
    ends = [start + length if length else 0 for start, length in zip(starts, lengths, strict=True)]
    num_blocks = sum(-(-end // case.block_size) for end in ends) + 3
    caches = empty_caches(case, num_blocks, rng)
    for cache, scale in zip(caches, case.scales, strict=True):
        values = (20 * rng.standard_normal(cache.shape)).astype(np.float32)
        cache[...] = store(values, case, scale)
    tables = tables_of(ends, case.block_size, num_blocks, rng)
    for table, start in zip(tables, starts, strict=True):
        table[: start // case.block_size] = WILD_IDS[1]
    return *caches, tables


class GatherSuite:
    STARTS = 0, 5, 16, 31, 9, 0, 47
    LENGTHS = 33, 1, 16, 20, 0, 7, 40

    def gather(self, arrays, case, caches, tables, starts, lengths, rows, **given):
        """(key, value) with their surroundings, which `rows` are before."""
        made = [arrays.array(owner) for owner in rows]
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        head_size = case.head_size
        cupy_paged.gather_cache(
            *(owner[:-GUARD_ROWS, :-1, :head_size] for owner in made),
            *(arrays.array(ops.cache_bytes(cache)) for cache in caches),
            arrays.array(tables),
            arrays.array(ends),
            None if starts is None else arrays.array(np.array(starts, np.int32)),
            **{"layout": case.layout, "kv_cache_dtype": case.kv_cache_dtype, **given},
        )
        return [arrays.numpy(array) for array in made]

    def check(
        self, arrays, rng, case, to=None, starts=STARTS, lengths=LENGTHS, spare=5, gap=16, **given
    ):
        """Gathers into rows of dtype `to`; of the caches' bits if that is None."""
        *caches, tables = gather_problem(case, starts, lengths, rng)
        bits = case.cache_dtype if case.cache_dtype.itemsize > 1 else np.dtype(np.uint8)
        dtype = bits if to is None else DTYPES[to]
        num_tokens = sum(lengths) + spare
        shape = num_tokens + GUARD_ROWS, case.num_kv_heads + 1, case.head_size + gap
        rows = [random_bits(rng, shape, dtype) for _ in range(2)]
        found = self.gather(arrays, case, caches, tables, starts, lengths, rows, **given)
        tokens = oracle.gather_cache(
            *caches, tables, lengths, starts, layout=case.layout, block_size=case.block_size
        )
        for got, owner, stored, scale in zip(found, rows, tokens, case.scales, strict=True):
            if to is None:
                stored = ops.cache_bytes(stored)
            else:
                stored = (stored.astype(np.float32) * np.float32(scale)).astype(dtype)
            expected = owner.copy()
            count = min(len(stored), num_tokens)
            expected[:count, :-1, : case.head_size] = stored[:count]
            compare.bitwise(got, expected)

    @EVERY_STORAGE
    @LAYOUTS
    @pytest.mark.parametrize("strides", ["contiguous", "padded"])
    def test_gathers_the_bits(self, arrays, rng, layout, dtype, kv_cache_dtype, strides):
        case = Case(dtype, kv_cache_dtype, layout, num_kv_heads=3, strides=strides)
        self.check(arrays, rng, case)

    @LAYOUTS
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
    def test_dequantises(self, arrays, rng, layout, dtype, kv_cache_dtype):
        case = Case(dtype, kv_cache_dtype, layout, num_kv_heads=3)
        k_scale, v_scale = case.scales
        self.check(arrays, rng, case, dtype, k_scale=k_scale, v_scale=v_scale)

    @LAYOUTS
    @pytest.mark.parametrize("shape", [(1,), ()])
    def test_scales_as_one_element_arrays(self, arrays, rng, layout, shape):
        case = Case("float16", "fp8", layout)
        k_scale, v_scale = (arrays.array(np.full(shape, s, np.float32)) for s in case.scales)
        self.check(arrays, rng, case, "float16", k_scale=k_scale, v_scale=v_scale)

    @LAYOUTS
    @pytest.mark.parametrize(
        ("dtype", "kv_cache_dtype", "num_kv_heads", "head_size", "block_size"),
        [
            ("float16", "auto", 1, 16, 1),
            ("float32", "auto", 2, 24, 5),
            ("float16", "fp8", 5, 80, 3),
            ("float16", "fp8_e5m2", 2, 512, 100),
            ("bfloat16", "auto", 33, 112, 256),
        ],
    )
    def test_shapes(
        self, arrays, rng, layout, dtype, kv_cache_dtype, num_kv_heads, head_size, block_size
    ):
        case = Case(dtype, kv_cache_dtype, layout, num_kv_heads, 1, head_size, block_size)
        self.check(arrays, rng, case)

    @LAYOUTS
    @pytest.mark.parametrize("strides", ["misaligned", "interleaved"])
    def test_strides(self, arrays, rng, layout, strides):
        self.check(arrays, rng, Case(layout=layout, strides=strides), gap=1)

    @LAYOUTS
    @pytest.mark.parametrize("spare", [-1, -30, -100])
    def test_rows_past_the_end_are_left_out(self, arrays, rng, layout, spare):
        self.check(arrays, rng, Case(layout=layout), spare=spare)

    @LAYOUTS
    def test_every_start(self, arrays, rng, layout):
        case = Case(layout=layout, block_size=4, num_kv_heads=1, head_size=8)
        starts = np.repeat(np.arange(9), 9)
        self.check(arrays, rng, case, starts=starts.tolist(), lengths=[*range(9)] * 9)

    @LAYOUTS
    def test_rows_before_the_first_sequence_are_left_as_they_are(self, arrays, rng, layout):
        case, lengths, first = Case(layout=layout), (20, 0, 7), 5
        *caches, tables = gather_problem(case, (0, 0, 0), lengths, rng)
        shape = first + sum(lengths) + 3, case.num_kv_heads, case.head_size
        rows = [random_bits(rng, shape, np.float16) for _ in range(2)]
        made = [arrays.array(owner) for owner in rows]
        ends = (first + np.cumsum([0, *lengths])).astype(np.int32)
        given = [arrays.array(x) for x in (*caches, tables, ends)]
        cupy_paged.gather_cache(*made, *given, layout=layout)
        tokens = oracle.gather_cache(
            *caches, tables, lengths, (0, 0, 0), layout=layout, block_size=case.block_size
        )
        for got, owner, stored in zip(made, rows, tokens, strict=True):
            owner[first : first + len(stored)] = stored
            compare.bitwise(arrays.numpy(got), owner)

    def test_all_begin_at_the_first_token(self, arrays, rng):
        case, lengths = Case(), (33, 0, 5)
        *caches, tables = gather_problem(case, (0, 0, 0), lengths, rng)
        rows = [random_bits(rng, (38 + GUARD_ROWS, 3, 64), np.float16) for _ in range(2)]
        got = self.gather(arrays, case, caches, tables, None, lengths, rows)
        want = self.gather(arrays, case, caches, tables, (0, 0, 0), lengths, rows)
        for found, expected in zip(got, want, strict=True):
            compare.bitwise(found, expected)

    @LAYOUTS
    def test_keys_and_values_take_turns_in_one_allocation(self, arrays, rng, layout):
        case, lengths = Case(layout=layout), (33, 5)
        *caches, tables = gather_problem(case, (0, 0), lengths, rng)
        owner = random_bits(rng, (40, 2, case.num_kv_heads, case.head_size), np.float16)
        made = arrays.array(owner)
        ends = arrays.array(np.array([0, 33, 38], np.int32))
        given = [arrays.array(x) for x in (*caches, tables)]
        cupy_paged.gather_cache(made[:, 0], made[:, 1], *given, ends, layout=layout)
        tokens = oracle.gather_cache(
            *caches, tables, lengths, (0, 0), layout=layout, block_size=case.block_size
        )
        for part, stored in enumerate(tokens):
            owner[:38, part] = stored
        compare.bitwise(arrays.numpy(made), owner)

    @pytest.mark.parametrize("lengths", [(), (0, 0)])
    def test_nothing_to_gather(self, arrays, rng, lengths):
        case = Case()
        caches = empty_caches(case, 2, rng)
        tables = np.full((len(lengths), 2), -1, np.int32)
        rows = [random_bits(rng, (4 + GUARD_ROWS, 3, 64), np.float16) for _ in range(2)]
        got = self.gather(arrays, case, caches, tables, [0] * len(lengths), lengths, rows)
        for found, expected in zip(got, rows, strict=True):
            compare.bitwise(found, expected)
