"""The bit codecs, over every code of every format, against ml_dtypes and against plain order."""

import ml_dtypes
import numpy as np
import pytest

from cupy_paged import dtypes

PEERS = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
LARGEST = {"float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120, "float32": 2.0**128 - 2.0**104}
LARGEST |= {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}

narrow = pytest.mark.parametrize("dtype", PEERS)
fp8 = pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])


def all_codes(dtype: str) -> np.ndarray:
    """Every bit pattern, as a storage array."""
    bits = np.uint16 if dtypes.itemsize(dtype) == 2 else np.uint8
    return np.arange(np.iinfo(bits).max + 1, dtype=bits).view(dtypes.STORAGE[dtype])


def peer_values(codes: np.ndarray, dtype: str, to: type = np.float64) -> np.ndarray:
    """What ml_dtypes (NumPy for float16) makes of a storage array."""
    with np.errstate(invalid="ignore"):
        return codes.view(PEERS[dtype]).astype(to)


def finite_magnitudes(dtype: str) -> np.ndarray:
    """Storage of the finite values >= 0, in increasing order."""
    codes = all_codes(dtype)
    codes = codes[: len(codes) // 2]
    return codes[np.isfinite(peer_values(codes, dtype))]


def negated(codes: np.ndarray) -> np.ndarray:
    """Storage with the sign bits flipped."""
    bits = np.uint16 if codes.itemsize == 2 else np.uint8
    sign = bits(1 << (8 * codes.itemsize - 1))
    return (codes.view(bits) ^ sign).view(codes.dtype)


def assert_same_codes(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("int64", 8)])
def test_itemsize(dtype: str, size: int) -> None:
    assert dtypes.itemsize(dtype) == size


@narrow
@pytest.mark.parametrize("to", [np.float64, np.float32])
def test_decode_every_code(dtype: str, to: type) -> None:
    codes = all_codes(dtype)
    got = dtypes.decode(codes, dtype, to)
    expected = peer_values(codes, dtype, to)
    number = ~np.isnan(expected)
    assert got.dtype == to
    assert np.array_equal(np.isnan(got), ~number)
    assert got[number].tobytes() == expected[number].tobytes()


@pytest.mark.parametrize("dtype", [*PEERS, "float32"])
def test_decode_makes_strided_views_contiguous(dtype: str) -> None:
    codes = np.arange(24).astype(dtypes.STORAGE[dtype]).reshape(2, 3, 4)
    view = codes.transpose(2, 0, 1)[::-2]
    got = dtypes.decode(view, dtype)
    assert got.flags.c_contiguous
    assert np.array_equal(got, dtypes.decode(codes, dtype).transpose(2, 0, 1)[::-2])


@narrow
def test_encode_inverts_decode(dtype: str) -> None:
    codes = all_codes(dtype)
    values = dtypes.decode(codes, dtype)
    codes = codes[np.isfinite(values)]
    assert_same_codes(dtypes.encode(values[np.isfinite(values)], dtype), codes)


@narrow
def test_encode_rounds_once_to_nearest_even(dtype: str) -> None:
    """At every midpoint between neighbours, and one float64 step to either side of it.

    That step is far below the resolution of float32, so going by way of it would round twice.
    """
    codes = finite_magnitudes(dtype)
    values = peer_values(codes, dtype)
    middle = (values[:-1] + values[1:]) / 2
    below, above = codes[:-1], codes[1:]
    even = np.where(np.arange(len(middle)) % 2 == 0, below, above)
    for values, expected in (
        (middle, even),
        (np.nextafter(middle, 0), below),
        (np.nextafter(middle, np.inf), above),
    ):
        assert_same_codes(dtypes.encode(values, dtype), expected)
        assert_same_codes(dtypes.encode(-values, dtype), negated(expected))


@narrow
def test_encode_agrees_with_ml_dtypes_on_float32(dtype: str) -> None:
    """Random bit patterns: all exponents, subnormals of float32 among them."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    values = bits.view(np.float32)
    values = values[np.abs(values) <= LARGEST[dtype]]
    expected = values.astype(PEERS[dtype]).view(dtypes.STORAGE[dtype])
    assert_same_codes(dtypes.encode(values, dtype), expected)


def test_encode_float32_rounds_once() -> None:
    values = np.array([1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-52, 1 + 3 * 2.0**-24])
    assert dtypes.encode(values, "float32").tolist() == [1.0, 1 + 2.0**-23, 1 + 2.0**-22]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_encode_overflows_to_infinity(dtype: str) -> None:
    largest = LARGEST[dtype]
    digits = {"float16": 11, "bfloat16": 8, "float32": 24}[dtype]
    tie = largest + 2.0 ** (np.frexp(largest)[1] - digits - 1)
    values = np.array([largest, np.nextafter(tie, 0), tie, 1e300, np.inf])
    expected = [largest, largest, np.inf, np.inf, np.inf]
    assert dtypes.decode(dtypes.encode(values, dtype), dtype).tolist() == expected
    assert dtypes.decode(dtypes.encode(-values, dtype), dtype).tolist() == [-x for x in expected]


@fp8
def test_encode_saturates_fp8(dtype: str) -> None:
    largest = LARGEST[dtype]
    values = np.array([largest, largest * 1.01, largest * 1.5, 2.0**128, 2.0**129, 1e300, np.inf])
    for sign in (1.0, -1.0):
        got = dtypes.decode(dtypes.encode(sign * values, dtype), dtype)
        assert got.tolist() == [sign * largest] * len(values)


@narrow
def test_encode_underflows_to_signed_zero(dtype: str) -> None:
    smallest = dtypes.decode(finite_magnitudes(dtype), dtype)[1]
    values = np.array([smallest / 2, 5e-324, 0.0])
    zeros = dtypes.decode(dtypes.encode(np.concatenate([values, -values]), dtype), dtype)
    assert zeros.tolist() == [0.0] * 6
    assert np.signbit(zeros).tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("dtype", [*PEERS, "float32"])
def test_encode_keeps_nan(dtype: str) -> None:
    codes = dtypes.encode(np.array([np.nan, -np.nan]), dtype)
    assert np.isnan(dtypes.decode(codes, dtype)).all()
    if dtypes.is_fp8(dtype):
        assert codes.tolist() == [0x7F, 0x7F]


@pytest.mark.parametrize("dtype", [*PEERS, "float32"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3)])
def test_shapes_are_kept(dtype: str, shape: tuple[int, ...]) -> None:
    codes = dtypes.encode(np.ones(shape, np.float32), dtype)
    assert codes.shape == shape
    assert codes.dtype == dtypes.STORAGE[dtype]
    assert np.array_equal(dtypes.decode(codes, dtype), np.ones(shape))


def test_encode_refuses_integers() -> None:
    with pytest.raises(ValueError, match="cannot encode 'int8'"):
        dtypes.encode(np.ones(1), "int8")


@pytest.mark.parametrize(
    ("kv_cache_dtype", "array", "query", "expected"),
    [
        ("auto", "float16", "float16", "float16"),
        ("auto", "bfloat16", "bfloat16", "bfloat16"),
        ("auto", "float8_e4m3fn", "float16", "float8_e4m3fn"),
        ("auto", "float8_e5m2", "float32", "float8_e5m2"),
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float32", "float32", "float32"),
        ("fp8", "uint8", "float16", "float8_e4m3fn"),
        ("fp8_e4m3", "uint8", "bfloat16", "float8_e4m3fn"),
        ("fp8_e4m3", "float8_e4m3fn", "bfloat16", "float8_e4m3fn"),
        ("fp8_e5m2", "uint8", "float32", "float8_e5m2"),
        ("fp8_e5m2", "float8_e5m2", "float32", "float8_e5m2"),
    ],
)
def test_kv_cache_dtype_name(kv_cache_dtype: str, array: str, query: str, expected: str) -> None:
    assert dtypes.kv_cache_dtype_name(kv_cache_dtype, array, query) == expected


@pytest.mark.parametrize(
    ("kv_cache_dtype", "array", "query", "error", "message"),
    [
        ("fp4", "uint8", "float16", ValueError, "kv_cache_dtype: unknown 'fp4'"),
        ("auto", "uint8", "float16", ValueError, "kv_cache_dtype: 'auto' does not say"),
        ("auto", "float16", "float32", TypeError, "key_cache: dtype float16, needs float32"),
        ("auto", "int8", "float16", TypeError, "key_cache: dtype int8, needs float16"),
        ("float16", "uint8", "float16", TypeError, "key_cache: dtype uint8, needs float16"),
        ("float16", "float8_e5m2", "float16", TypeError, "key_cache: dtype float8_e5m2"),
        ("float16", "float32", "float32", ValueError, "kv_cache_dtype: 'float16' does not match"),
        ("fp8", "float16", "float16", TypeError, "key_cache: dtype float16 cannot hold 'fp8'"),
        ("fp8", "float8_e5m2", "float16", TypeError, "needs uint8 or float8_e4m3fn"),
        ("fp8_e5m2", "float8_e4m3fn", "float16", TypeError, "needs uint8 or float8_e5m2"),
        ("FP8", "uint8", "float16", ValueError, "kv_cache_dtype: unknown 'FP8'"),
    ],
)
def test_kv_cache_dtype_name_refuses(
    kv_cache_dtype: str, array: str, query: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dtypes.kv_cache_dtype_name(kv_cache_dtype, array, query)
