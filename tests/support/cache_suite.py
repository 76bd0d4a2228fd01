"""What holds for the cache operators with the arrays of any framework that can be written."""

import ml_dtypes
import numpy as np
import pytest

import cupy_paged
from support import compare, ops, oracle
from support.data import DTYPES, Case, empty_caches, poison

LAYOUTS = pytest.mark.parametrize("layout", ["vllm", "HND", "NHD"])
EVERY_STORAGE = pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"),
    [
        (dtype, kv_cache_dtype)
        for dtype in ("float16", "bfloat16", "float32")
        for kv_cache_dtype in ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")
    ],
)


def tokens(rng, case, num_tokens, width=40.0):
    """(key, value) [num_tokens, num_kv_heads, head_size] as slices of a poisoned packed QKV."""
    num_heads, head_size = case.num_kv_heads, case.head_size
    packed = poison((num_tokens, 4 * num_heads * head_size), DTYPES[case.dtype], rng)
    packed = packed.reshape(num_tokens, 4, num_heads, head_size)
    packed[:, 2:] = (width * rng.standard_normal((num_tokens, 2, num_heads, head_size))).astype(
        packed.dtype
    )
    return packed[:, 2], packed[:, 3]


def slots(rng, case, num_tokens, num_blocks, skipped=0.2):
    """Distinct slots in any order, some of them negative."""
    found = rng.permutation(num_blocks * case.block_size)[:num_tokens].astype(np.int64)
    skip = rng.random(num_tokens) < skipped
    found[skip] = rng.choice([-1, -2, -(2**63)], skip.sum())
    return found


def write(case, key, value, caches, slot_mapping, arrays, **changes):
    """The caches after the operator of `case.layout`, as NumPy arrays of their own dtype."""
    made = [arrays.array(ops.cache_bytes(cache)) for cache in caches]
    given = {"k_scale": case.given_scales[0], "v_scale": case.given_scales[1], **changes}
    positional = [
        arrays.array(key),
        arrays.array(value),
        *made,
        arrays.array(slot_mapping),
        case.kv_cache_dtype,
        given.pop("k_scale"),
        given.pop("v_scale"),
    ]
    if case.layout == "vllm":
        assert cupy_paged.reshape_and_cache(*positional, **given) is None
    else:
        given = {"layout": case.layout, **given}
        assert cupy_paged.reshape_and_cache_flash(*positional, **given) is None
    return [
        arrays.numpy(array).view(cache.dtype) for array, cache in zip(made, caches, strict=True)
    ]


def check(case, key, value, caches, slot_mapping, arrays, **changes):
    expected = oracle.reshape_and_cache(
        key,
        value,
        *caches,
        slot_mapping,
        layout=case.layout,
        block_size=case.block_size,
        kv_cache_dtype=case.kv_cache_dtype,
        k_scale=case.scales[0],
        v_scale=case.scales[1],
    )
    found = write(case, key, value, caches, slot_mapping, arrays, **changes)
    for got, want, name in zip(found, expected, ("key_cache", "value_cache"), strict=True):
        compare.bitwise(got, want, name)


class CacheSuite:
    @EVERY_STORAGE
    @LAYOUTS
    @pytest.mark.parametrize("strides", ["contiguous", "interleaved"])
    def test_writes_the_tokens_and_nothing_else(
        self, arrays, rng, layout, dtype, kv_cache_dtype, strides
    ):
        case = Case(dtype, kv_cache_dtype, layout, strides=strides, num_kv_heads=3)
        key, value = tokens(rng, case, 50)
        check(case, key, value, empty_caches(case, 7, rng), slots(rng, case, 50, 7), arrays)

    @LAYOUTS
    @pytest.mark.parametrize(
        ("kv_cache_dtype", "num_kv_heads", "head_size", "block_size"),
        [
            ("auto", 1, 16, 1),
            ("fp8", 5, 80, 3),
            ("fp8", 71, 64, 16),
            ("auto", 64, 128, 8),
            ("fp8", 2, 512, 100),
            ("auto", 3, 112, 256),
        ],
    )
    def test_shapes(self, arrays, rng, layout, kv_cache_dtype, num_kv_heads, head_size, block_size):
        case = Case(
            kv_cache_dtype=kv_cache_dtype,
            layout=layout,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            block_size=block_size,
        )
        key, value = tokens(rng, case, 9)
        check(case, key, value, empty_caches(case, 12, rng), slots(rng, case, 9, 12), arrays)

    @LAYOUTS
    @pytest.mark.parametrize("head_size", [8, 24, 40])
    def test_head_sizes_that_are_no_multiple_of_sixteen(self, arrays, rng, layout, head_size):
        case = Case(layout=layout, head_size=head_size)
        key, value = tokens(rng, case, 20)
        check(case, key, value, empty_caches(case, 3, rng), slots(rng, case, 20, 3), arrays)

    @LAYOUTS
    def test_key_may_be_longer_than_slot_mapping(self, arrays, rng, layout):
        case = Case(layout=layout)
        key, value = tokens(rng, case, 20)
        check(case, key, value, empty_caches(case, 3, rng), slots(rng, case, 13, 3), arrays)

    @LAYOUTS
    @pytest.mark.parametrize("num_tokens", [0, 20])
    def test_skipped_tokens_change_nothing(self, arrays, rng, layout, num_tokens):
        case = Case(layout=layout)
        key, value = tokens(rng, case, num_tokens)
        caches = empty_caches(case, 3, rng)
        slot_mapping = slots(rng, case, num_tokens, 3, skipped=1.0)
        for got, want in zip(
            write(case, key, value, caches, slot_mapping, arrays), caches, strict=True
        ):
            compare.bitwise(got, want)

    @LAYOUTS
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_unquantised_bits_are_kept(self, arrays, rng, layout, dtype):
        case = Case(dtype=dtype, layout=layout)
        unsigned = np.dtype(f"u{DTYPES[dtype].itemsize}")
        shape = 2, 20, case.num_kv_heads, case.head_size
        key, value = rng.integers(0, 2 ** (8 * unsigned.itemsize), shape, unsigned).view(
            DTYPES[dtype]
        )
        check(case, key, value, empty_caches(case, 3, rng), slots(rng, case, 20, 3), arrays)

    @LAYOUTS
    @pytest.mark.parametrize("shape", [(1,), ()])
    def test_scales_as_one_element_arrays(self, arrays, rng, layout, shape):
        case = Case(kv_cache_dtype="fp8_e5m2", layout=layout)
        key, value = tokens(rng, case, 20)
        k_scale, v_scale = (arrays.array(np.full(shape, s, np.float32)) for s in case.scales)
        check(
            case, key, value, empty_caches(case, 3, rng), slots(rng, case, 20, 3), arrays,
            k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip

    @pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2"])
    def test_quantised_infinities_saturate_and_nan_stays(self, arrays, rng, kv_cache_dtype):
        case = Case(kv_cache_dtype=kv_cache_dtype, num_kv_heads=1, head_size=8)
        row = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 65504.0, -65504.0, 2e-6], np.float16)
        key = value = row.reshape(1, 1, 8)
        caches = empty_caches(case, 2, rng)
        key_cache, _ = write(case, key, value, caches, np.array([5]), arrays)
        limit = float(ml_dtypes.finfo(case.cache_dtype).max)
        found = key_cache[0, 0, 5].astype(float)
        np.testing.assert_array_equal(found[:2], [limit, -limit])
        assert np.isnan(found[2])
        np.testing.assert_array_equal(np.signbit(found[3:5]), [False, True])

    def test_quotients_that_are_ties_round_to_even(self, arrays, rng):
        # 1 / 0.984375 is inexact: multiplying by it, in place of dividing, leaves every tie.
        case, scale = Case(kv_cache_dtype="fp8", num_kv_heads=1), 63 / 64
        ties = (np.arange(8, 16) + 0.5) * 2.0 ** np.arange(-4, 4)[:, None]
        key = (ties.reshape(1, 1, 64) * scale).astype(np.float16)
        caches = empty_caches(case, 2, rng)
        key_cache, _ = write(
            case, key, key, caches, np.array([7]), arrays, k_scale=scale, v_scale=scale
        )
        compare.bitwise(key_cache[0, 0, 7], oracle.quantise(key[0, 0], scale, "fp8"))

    def test_written_tokens_are_attended(self, arrays, rng):
        case = Case(kv_cache_dtype="fp8", layout="vllm", num_kv_heads=1, group=1)
        key, value = tokens(rng, case, 30, width=1.0)
        key_cache, value_cache = empty_caches(case, 2, rng)
        slot_mapping = np.arange(30)
        key_cache, value_cache = write(
            case, key, value, (key_cache, value_cache), slot_mapping, arrays
        )
        query = rng.standard_normal((1, 1, 64)).astype(np.float16)
        out = cupy_paged.paged_attention(
            *(arrays.array(ops.cache_bytes(a)) for a in (query, key_cache, value_cache)),
            arrays.array(np.array([[0, 1]], np.int32)),
            arrays.array(np.array([30], np.int32)),
            kv_cache_dtype="fp8",
            k_scale=case.scales[0],
            v_scale=case.scales[1],
        )
        k = oracle.quantise(key[:, 0], case.scales[0], "fp8").astype(float) * case.scales[0]
        v = oracle.quantise(value[:, 0], case.scales[1], "fp8").astype(float) * case.scales[1]
        expected, *_ = oracle.softmax_sum(64**-0.5 * (k @ query[0, 0].astype(float)), v)
        compare.close(arrays.numpy(out), expected[None, None], "float16")


class ConvertSuite:
    @pytest.mark.parametrize("kv_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("scale", [1.0, 0.37])
    def test_every_code_to_float(self, arrays, kv_dtype, dtype, scale):
        codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
        output = ops.empty(codes.shape, dtype, arrays, ops.SENTINEL)
        cupy_paged.convert_fp8(output, arrays.array(codes), scale, kv_dtype)
        value = codes.view(oracle.FP8[kv_dtype]).astype(np.float32) * np.float32(scale)
        with np.errstate(over="ignore"):
            expected = value.astype(DTYPES[dtype])
        compare.bitwise(arrays.numpy(output), expected, any_nan=True)

    @pytest.mark.parametrize("kv_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("scale", [1.0, 0.37, 300.0])
    def test_every_half_to_float8(self, arrays, kv_dtype, dtype, scale):
        halves = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype]).reshape(256, 256)
        output = arrays.array(np.zeros(halves.shape, np.uint8))
        cupy_paged.convert_fp8(output, arrays.array(halves), scale, kv_dtype)
        expected = oracle.quantise(halves, scale, kv_dtype)
        compare.bitwise(arrays.numpy(output).view(expected.dtype), expected, any_nan=True)

    def test_float32_is_rounded_once(self, arrays):
        # Just beside the ties of e4m3, where a step through float16 would round twice.
        ties = (np.arange(8, 16) + 0.5) * 2.0 ** np.arange(-6, 5)[:, None]
        values = np.concatenate([ties * (1 + 2**-20), ties, ties * (1 - 2**-20)]).astype(np.float32)
        output = arrays.array(np.zeros(values.shape, np.uint8))
        cupy_paged.convert_fp8(output, arrays.array(values))
        compare.bitwise(
            arrays.numpy(output).view(oracle.FP8["fp8"]), oracle.quantise(values, 1.0, "fp8")
        )

    def test_an_empty_array(self, arrays):
        output = ops.empty((0, 8), "float16", arrays)
        cupy_paged.convert_fp8(output, arrays.array(np.zeros((0, 8), np.uint8)))


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
        slot_mapping = slots(rng, case, num_tokens - 3, num_blocks)
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
