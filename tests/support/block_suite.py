"""What holds for the operators that move blocks and gather tokens, with any framework's arrays.

An operator writes into part of a larger array, of which all that it must leave alone is compared,
too.
"""

import ml_dtypes
import numpy as np
import pytest

import cupy_paged
from support import cache_suite, compare, ops, oracle
from support.cache_suite import EVERY_STORAGE, LAYOUTS
from support.data import DTYPES, WILD_IDS, Case, empty_caches, poison, store, tables_of

GUARD_ROWS = 110  # after the last one that may be gathered into

CHANGES = pytest.mark.parametrize(
    ("layout", "new_layout"),
    [(old, new) for old in ("vllm", "HND", "NHD") for new in ("vllm", "HND", "NHD") if old != new],
)


def random_bits(rng, shape, dtype):
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    return rng.integers(0, 2 ** (8 * unsigned.itemsize), shape, unsigned).view(dtype)


def block_shapes(case):
    """The shapes of a block of keys and of one of values."""
    return [cache.shape[1:] for cache in empty_caches(case, 1, np.random.default_rng(0))]


def owners(case, num_blocks, rng):
    """Two arrays [num_blocks, 3, ...]: the middle of each is a cache, blocks and all at random."""
    return [
        random_bits(rng, (num_blocks, 3, *shape), case.cache_dtype) for shape in block_shapes(case)
    ]


def pairs(rng, num_blocks, num_pairs, skipped=0.2):
    """Pairs that do not depend on each other, int64 [num_pairs, 2], some with a negative block."""
    blocks = rng.permutation(num_blocks)
    destinations, sources = blocks[:num_pairs], blocks[num_pairs:]
    found = np.stack([rng.choice(sources, num_pairs), destinations], axis=1)
    skip = rng.random(num_pairs) < skipped
    found[skip, rng.integers(2, size=skip.sum())] = rng.choice([-1, -(2**63)], skip.sum())
    return found


def middle(owner):
    return owner[:, 1]


class CopyBlocksSuite:
    def check(self, arrays, key_owners, value_owners, block_mapping, cut=middle, **given):
        """Copies blocks in the parts that `cut` takes out of the owners."""
        made = [
            [arrays.array(ops.cache_bytes(owner)) for owner in owners]
            for owners in (key_owners, value_owners)
        ]
        mapping = given.pop("mapping", None)
        mapping = arrays.array(block_mapping) if mapping is None else mapping
        caches = [[cut(owner) for owner in owners] for owners in made]
        assert cupy_paged.copy_blocks(*caches, mapping, **given) is None
        for owner, array in zip([*key_owners, *value_owners], [*made[0], *made[1]], strict=True):
            expected = owner.copy()
            cut(expected)[...] = oracle.copy_blocks(cut(owner), block_mapping)
            compare.bitwise(arrays.numpy(array).view(owner.dtype), expected)

    @EVERY_STORAGE
    @LAYOUTS
    def test_copies_the_blocks_of_all_layers_and_nothing_else(
        self, arrays, rng, layout, dtype, kv_cache_dtype
    ):
        case = Case(dtype, kv_cache_dtype, layout, num_kv_heads=3)
        layers = [owners(case, 9, rng) for _ in range(3)]
        self.check(arrays, *zip(*layers, strict=True), pairs(rng, 9, 4))

    @LAYOUTS
    @pytest.mark.parametrize("on_host", [False, True])
    def test_layouts_are_checked_where_they_are_named(self, arrays, rng, layout, on_host):
        case = Case(layout=layout)
        block_mapping = pairs(rng, 9, 4)
        given = {"mapping": block_mapping} if on_host else {}
        keys, values = ([owner] for owner in owners(case, 9, rng))
        self.check(arrays, keys, values, block_mapping, layout=layout, **given)

    @pytest.mark.parametrize("num_bytes", [1, 2, 3, 24, 2048, 2050, 4100, 5000, 70000])
    @pytest.mark.parametrize("first", [0, 1, 8])
    def test_any_number_of_bytes_at_any_address(self, arrays, rng, num_bytes, first):
        # Blocks that are whole words apart, and blocks that are not.
        for gap in (first, 16 - num_bytes % 16):
            owner = random_bits(rng, (11, first + num_bytes + gap), np.uint8)
            self.check(
                arrays, [owner], [], pairs(rng, 11, 5),
                cut=lambda owner: owner[:, first : first + num_bytes],
            )  # fmt: skip

    def test_more_layers_and_pairs_than_one_launch_takes(self, arrays, rng):
        keys, values = random_bits(rng, (2, 90, 300, 3, 5), np.int32)
        block_mapping = pairs(rng, 300, 140)
        self.check(arrays, list(keys), list(values), block_mapping)
        self.check(arrays, list(keys), list(values), block_mapping, mapping=block_mapping)

    def test_layers_whose_blocks_are_differently_far_apart(self, arrays, rng):
        keys = [random_bits(rng, (8, 3, 32), np.float16), random_bits(rng, (8, 5, 32), np.float16)]
        self.check(arrays, keys, [], pairs(rng, 8, 4))

    def test_blocks_whose_dimensions_are_in_another_order(self, arrays, rng):
        owner = random_bits(rng, (8, 3, 2, 5, 4), np.float32)
        self.check(
            arrays, [owner], [], pairs(rng, 8, 4), cut=lambda owner: owner.swapaxes(2, 3)[:, 1]
        )

    @pytest.mark.parametrize("on_host", [False, True])
    def test_all_layers_of_one_allocation(self, arrays, rng, on_host):
        owner = random_bits(rng, (9, 3, 2, 40), np.float16)
        block_mapping = pairs(rng, 9, 4)
        made = arrays.array(owner)
        mapping = block_mapping if on_host else arrays.array(block_mapping)
        keys, values = ([made[:, layer, part] for layer in range(3)] for part in range(2))
        cupy_paged.copy_blocks(keys, values, mapping)
        compare.bitwise(arrays.numpy(made), oracle.copy_blocks(owner, block_mapping))

    @pytest.mark.parametrize("on_host", [False, True])
    def test_a_cache_that_layers_share_is_copied_once(self, arrays, rng, on_host):
        owner, own = random_bits(rng, (2, 9, 3, 40), np.float16)
        block_mapping = pairs(rng, 9, 4)
        shared, alone = arrays.array(owner), arrays.array(own)
        mapping = block_mapping if on_host else arrays.array(block_mapping)
        cupy_paged.copy_blocks([shared, alone, shared], [shared] * 3, mapping)
        for made, before in ((shared, owner), (alone, own)):
            compare.bitwise(arrays.numpy(made), oracle.copy_blocks(before, block_mapping))

    @pytest.mark.parametrize("block_mapping", [np.zeros((0, 2), np.int64), np.full((3, 2), -1)])
    def test_nothing_to_copy(self, arrays, rng, block_mapping):
        self.check(arrays, [random_bits(rng, (4, 3, 16), np.uint8)], [], block_mapping)

    def test_one_source_for_many(self, arrays, rng):
        block_mapping = np.array([[2, 0], [2, 1], [2, 3], [5, 5]])
        owner = random_bits(rng, (6, 3, 16), np.uint8)
        self.check(arrays, [owner], [], block_mapping, mapping=block_mapping)


class SwapBlocksSuite:
    """`sides` makes the two arrays: see `check` for how it is used."""

    def check(self, sides, source_owner, destination_owner, block_mapping, cut=middle):
        source, destination = sides.source(source_owner), sides.destination(destination_owner)
        cut_source, cut_destination = cut(source), cut(destination)
        assert cupy_paged.swap_blocks(cut_source, cut_destination, block_mapping) is None
        expected = destination_owner.copy()
        for start, end in block_mapping.tolist():
            if min(start, end) >= 0:
                cut(expected)[end] = cut(source_owner)[start]
        compare.bitwise(sides.numpy(source).view(source_owner.dtype), source_owner, "source")
        compare.bitwise(sides.numpy(destination).view(expected.dtype), expected, "destination")

    def mapping(self, rng, num_sources, num_destinations, num_pairs):
        """Pairs in any order, some that follow each other on both sides, some to be skipped."""
        found = np.stack(
            [
                rng.integers(num_sources, size=num_pairs),
                rng.permutation(num_destinations)[:num_pairs],
            ],
            axis=1,
        )
        found[: num_pairs // 2] = np.arange(num_pairs // 2)[:, None] + [1, 2]
        rest = np.setdiff1d(np.arange(num_destinations), found[: num_pairs // 2, 1])
        found[num_pairs // 2 :, 1] = rng.permutation(rest)[: num_pairs - num_pairs // 2]
        found[rng.random(num_pairs) < 0.2, 0] = -1
        return rng.permutation(found)

    @EVERY_STORAGE
    @LAYOUTS
    def test_copies_the_blocks_and_nothing_else(self, sides, rng, layout, dtype, kv_cache_dtype):
        case = Case(dtype, kv_cache_dtype, layout)
        sources, destinations = owners(case, 12, rng), owners(case, 15, rng)
        for start, end in zip(sources, destinations, strict=True):
            start, end = ops.cache_bytes(start), ops.cache_bytes(end)
            self.check(sides, start, end, self.mapping(rng, 12, 15, 10))

    @pytest.mark.parametrize("num_bytes", [1, 3, 2050])
    def test_contiguous_blocks(self, sides, rng, num_bytes):
        start, end = random_bits(rng, (2, 40, num_bytes), np.uint8)
        block_mapping = self.mapping(rng, 40, 40, 30)
        self.check(sides, start, end, block_mapping, cut=lambda owner: owner)

    @pytest.mark.parametrize("num_bytes", [40, 4096])
    def test_many_blocks_of_other_steps(self, sides, rng, num_bytes):
        """More than a kernel is given at a time, further apart on one side than on the other."""
        order = np.stack([rng.permutation(1100), rng.permutation(1100)], axis=1)
        apart = random_bits(rng, (1100, 3, num_bytes), np.uint8)
        padded = random_bits(rng, (1100, num_bytes + 8), np.uint8)

        def cut(owner):
            return owner[:, 1] if owner.ndim == 3 else owner[:, 4:-4]

        self.check(sides, apart, padded, order, cut)
        self.check(sides, padded, apart, order, cut)

    def test_all_blocks_at_once(self, sides, rng):
        start, end = random_bits(rng, (2, 40, 3, 8), np.float16)
        block_mapping = np.stack([np.arange(40)] * 2, axis=1)
        self.check(sides, start, end, block_mapping)
        self.check(sides, start, end, block_mapping, cut=lambda owner: owner)

    @pytest.mark.parametrize("block_mapping", [np.zeros((0, 2), np.int64), np.full((3, 2), -1)])
    def test_nothing_to_copy(self, sides, rng, block_mapping):
        start, end = random_bits(rng, (2, 4, 3, 8), np.float16)
        self.check(sides, start, end, block_mapping)


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


class LayoutSuite:
    def check(self, arrays, rng, case, new_layout, num_blocks=5):
        caches = empty_caches(case, num_blocks, rng)
        for cache in caches:
            cache[...] = random_bits(rng, cache.shape, cache.dtype)
        new_case = Case(**{**case.__dict__, "layout": new_layout, "strides": "contiguous"})
        new = owners(new_case, num_blocks, rng)
        made = [arrays.array(ops.cache_bytes(owner)) for owner in new]
        cupy_paged.convert_layout(
            *(arrays.array(ops.cache_bytes(cache)) for cache in caches),
            case.layout,
            *map(middle, made),
            new_layout,
        )
        block_size = case.block_size
        slots = np.arange(num_blocks * block_size)
        where = {"block_size": block_size, "layout": case.layout}
        tokens = oracle.gather_cache(*caches, [np.arange(num_blocks)], [len(slots)], [0], **where)
        rewritten = oracle.reshape_and_cache(
            *tokens, *map(middle, new), slots, layout=new_layout, block_size=block_size
        )
        for got, owner, cache in zip(made, new, rewritten, strict=True):
            middle(owner)[...] = cache
            compare.bitwise(arrays.numpy(got).view(owner.dtype), owner)

    @EVERY_STORAGE
    @CHANGES
    def test_keeps_every_bit(self, arrays, rng, layout, new_layout, dtype, kv_cache_dtype):
        case = Case(dtype, kv_cache_dtype, layout, num_kv_heads=3)
        self.check(arrays, rng, case, new_layout)

    @CHANGES
    @pytest.mark.parametrize("strides", ["padded", "misaligned", "interleaved"])
    def test_strides(self, arrays, rng, layout, new_layout, strides):
        self.check(arrays, rng, Case(layout=layout, strides=strides), new_layout)

    @CHANGES
    @pytest.mark.parametrize(
        ("dtype", "kv_cache_dtype", "num_kv_heads", "head_size", "block_size"),
        [
            ("float16", "auto", 1, 16, 1),
            ("float32", "auto", 2, 24, 7),
            ("float16", "fp8", 5, 80, 24),
            ("bfloat16", "auto", 33, 112, 100),
            ("float16", "fp8", 1, 512, 256),
        ],
    )
    def test_shapes(
        self, arrays, rng, layout, new_layout, dtype, kv_cache_dtype, num_kv_heads, head_size,
        block_size,
    ):  # fmt: skip
        case = Case(dtype, kv_cache_dtype, layout, num_kv_heads, 1, head_size, block_size)
        self.check(arrays, rng, case, new_layout, num_blocks=2)

    @CHANGES
    @pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
    def test_keys_and_values_take_turns_in_one_allocation(
        self, arrays, rng, layout, new_layout, kv_cache_dtype
    ):
        cases = [
            Case("float16", kv_cache_dtype, name, num_kv_heads=3) for name in (layout, new_layout)
        ]
        num_blocks, dtype = 5, cases[0].cache_dtype
        (old_shapes, new_shapes) = map(block_shapes, cases)
        elements = int(np.prod(new_shapes[0]))
        old, new = random_bits(rng, (2, num_blocks, 2, elements), dtype)
        made = [arrays.array(ops.cache_bytes(owner)) for owner in (old, new)]

        def turns(owner, shapes):
            return [owner[:, i].reshape(num_blocks, *shape) for i, shape in enumerate(shapes)]

        cupy_paged.convert_layout(
            *turns(made[0], old_shapes), layout, *turns(made[1], new_shapes), new_layout
        )
        block_size = cases[0].block_size
        slots = np.arange(num_blocks * block_size)
        tokens = oracle.gather_cache(
            *turns(old, old_shapes), [np.arange(num_blocks)], [len(slots)], [0],
            block_size=block_size, layout=layout,
        )  # fmt: skip
        rewritten = oracle.reshape_and_cache(
            *tokens, *turns(new, new_shapes), slots, layout=new_layout, block_size=block_size
        )
        for i, cache in enumerate(rewritten):
            new[:, i] = cache.reshape(num_blocks, elements)
        compare.bitwise(arrays.numpy(made[1]).view(dtype), new)

    def test_no_blocks(self, arrays, rng):
        self.check(arrays, rng, Case(), "NHD", num_blocks=0)


class MlaSuite:
    def check(self, arrays, rng, dtype, kv_cache_dtype, rank, pe_dim, gap=16, scale=None):
        """`scale` is an array of 0.75, which is a number if that is None."""
        num_tokens, num_blocks, block_size = 30, 4, 9
        packed = 20 * rng.standard_normal((num_tokens, rank + pe_dim + gap))
        packed = packed.astype(DTYPES[dtype])
        kv_c, k_pe = packed[:, :rank], packed[:, rank : rank + pe_dim]
        stored = np.dtype(oracle.FP8.get(kv_cache_dtype, DTYPES[dtype]))
        owner = poison((num_blocks, block_size + 1, rank + pe_dim + gap), stored, rng)
        case = Case(block_size=block_size)
        slot_mapping = cache_suite.slots(rng, case, num_tokens - 3, num_blocks)
        made = arrays.array(ops.cache_bytes(owner))
        cut = (slice(None), slice(block_size), slice(rank + pe_dim))
        cupy_paged.concat_and_cache_mla(
            arrays.array(kv_c), arrays.array(k_pe), made[cut], arrays.array(slot_mapping),
            kv_cache_dtype, 0.75 if scale is None else scale,
        )  # fmt: skip
        expected = owner.copy()
        expected[cut] = oracle.concat_and_cache_mla(
            kv_c, k_pe, owner[cut], slot_mapping, kv_cache_dtype=kv_cache_dtype, scale=0.75
        )
        compare.bitwise(arrays.numpy(made).view(stored), expected)

    @EVERY_STORAGE
    @pytest.mark.parametrize(("rank", "pe_dim", "gap"), [(512, 64, 0), (512, 64, 16), (7, 3, 1)])
    def test_writes_the_tokens_and_nothing_else(
        self, arrays, rng, dtype, kv_cache_dtype, rank, pe_dim, gap
    ):
        self.check(arrays, rng, dtype, kv_cache_dtype, rank, pe_dim, gap=gap)

    def test_a_scale_as_a_one_element_array(self, arrays, rng):
        scale = arrays.array(np.full(1, 0.75, np.float32))
        self.check(arrays, rng, "float16", "fp8", 512, 64, scale=scale)

    def test_infinities_saturate_and_nan_stays(self, arrays):
        row = np.array([[np.inf, -np.inf, np.nan, 1.0]], np.float16)
        cache = arrays.array(np.zeros((1, 1, 8), np.uint8))
        cupy_paged.concat_and_cache_mla(
            arrays.array(row), arrays.array(row), cache, arrays.array(np.array([0])), "fp8", 1.0
        )
        found = arrays.numpy(cache).view(ml_dtypes.float8_e4m3fn)[0, 0].astype(float)
        np.testing.assert_array_equal(found, [448, -448, np.nan, 1] * 2)
