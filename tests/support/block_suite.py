"""What holds for the operators that copy whole blocks, with any framework's arrays.

An operator writes into part of a larger array, of which all that it must leave alone is compared,
too.
"""

import numpy as np
import pytest

import cupy_paged
from support import compare, ops, oracle
from support.cache_suite import EVERY_STORAGE, LAYOUTS
from support.data import Case, middle, owners, random_bits


def pairs(rng, num_blocks, num_pairs, skipped=0.2):
    """Pairs that do not depend on each other, int64 [num_pairs, 2], some with a negative block."""
    blocks = rng.permutation(num_blocks)
    destinations, sources = blocks[:num_pairs], blocks[num_pairs:]
    found = np.stack([rng.choice(sources, num_pairs), destinations], axis=1)
    skip = rng.random(num_pairs) < skipped
    found[skip, rng.integers(2, size=skip.sum())] = rng.choice([-1, -(2**63)], skip.sum())
    return found


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
