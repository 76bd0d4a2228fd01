"""What holds for the change of a cache from one layout to another, with any framework's arrays.

The new cache is part of a larger array, of which all that must be left alone is compared, too.
"""

import numpy as np
import pytest

import cupy_paged
from support import compare, ops, oracle
from support.cache_suite import EVERY_STORAGE
from support.data import Case, block_shapes, empty_caches, middle, owners, random_bits

CHANGES = pytest.mark.parametrize(
    ("layout", "new_layout"),
    [(old, new) for old in ("vllm", "HND", "NHD") for new in ("vllm", "HND", "NHD") if old != new],
)


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
