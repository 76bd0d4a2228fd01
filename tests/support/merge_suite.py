"""What holds for `merge_attn_states` with the arrays of any framework that can be written."""

import functools

import ml_dtypes
import numpy as np
import pytest

import cupy_paged
from support import compare, ops, oracle
from support.data import DTYPES, Case, build

INF = np.inf
EVERY_DTYPE = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])


def states(rng, dtype, num_tokens=37, num_heads=5, head_size=64, spread=3.0):
    """(prefix_output, prefix_lse, suffix_output, suffix_lse), as NumPy arrays."""
    output = rng.standard_normal((2, num_tokens, num_heads, head_size)).astype(DTYPES[dtype])
    lse = (spread * rng.standard_normal((2, num_heads, num_tokens))).astype(np.float32)
    return output[0], lse[0], output[1], lse[1]


def empty_some(rng, given):
    """Make some states empty, on one side or on both, with NaN in the output of most of them."""
    prefix_output, prefix_lse, suffix_output, suffix_lse = given
    for output, lse in (prefix_output, prefix_lse), (suffix_output, suffix_lse):
        empty = rng.random(lse.shape) < 0.4
        lse[empty] = rng.choice([-INF, INF], empty.sum())
        output[(empty & (rng.random(lse.shape) < 0.8)).T] = np.nan
    return given


def merge(given, arrays, dtype, **changes):
    """(output, output_lse) of `merge_attn_states`, as NumPy arrays."""
    made = [arrays.array(array) for array in given]
    output = ops.empty(given[0].shape, dtype, arrays)
    output_lse = ops.empty(given[1].shape, "float32", arrays)
    result = cupy_paged.merge_attn_states(output, *made, output_lse=output_lse, **changes)
    assert result is None
    return arrays.numpy(output), arrays.numpy(output_lse)


def ranks(rng, num_ranks, num_heads=3, head_size=64, num_keys=5):
    """States of ranks that each hold some keys of every row, and the state of all keys at once.

    A token for each set of ranks that may be empty. What is empty has NaN for its output, but where
    all of them are.
    """
    shape = num_ranks, 2**num_ranks, num_heads, num_keys
    logits = 3.0 * rng.standard_normal(shape)
    empty = (np.arange(2**num_ranks) >> np.arange(num_ranks)[:, None]) & 1 == 1
    logits[empty] = -INF
    values = rng.standard_normal((*shape, head_size))

    def state(logits, values):
        largest = np.maximum(logits.max(axis=-1, keepdims=True), np.finfo(float).min)
        weights = np.exp(logits - largest)
        total = weights.sum(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            output = np.einsum("...k,...kd->...d", weights, values) / total[..., None]
            return output, (largest[..., 0] + np.log(total)).swapaxes(-1, -2)

    outputs, lse = state(logits, values)
    whole = state(*(np.concatenate(list(parts), axis=2) for parts in (logits, values)))
    outputs[:, -1] = whole[0][-1] = 0.0
    parts = zip(*(array.astype(np.float32, order="C") for array in (outputs, lse)), strict=True)
    return list(parts), whole


def merge_one_by_one(parts, merge_two):
    return functools.reduce(merge_two, parts)


def merge_neighbours(parts, merge_two):
    """As a tree: neighbours first, and then the results."""
    while len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [merge_two(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return parts[0]


def check(given, arrays, dtype, with_context=None):
    expected, expected_lse = oracle.merge_attn_states(*given, with_context)
    output, lse = merge(given, arrays, dtype, prefill_tokens_with_context=with_context)
    compare.close(output, expected, dtype)
    compare.close_lse(lse, expected_lse)
    return output, lse


class MergeSuite:
    @EVERY_DTYPE
    @pytest.mark.parametrize("head_size", [8, 40, 64, 128, 256, 512])
    def test_merges(self, arrays, rng, dtype, head_size):
        check(states(rng, dtype, head_size=head_size), arrays, dtype)

    @pytest.mark.parametrize(
        ("num_tokens", "num_heads"), [(1, 1), (0, 4), (3, 71), (8, 3), (9, 2), (17, 5), (1000, 2)]
    )
    def test_counts(self, arrays, rng, num_tokens, num_heads):
        check(states(rng, "float16", num_tokens, num_heads), arrays, "float16")

    @EVERY_DTYPE
    @pytest.mark.parametrize("with_context", [None, 0, 1, 20, 37])
    def test_tokens_without_context_copy_the_suffix(self, arrays, rng, dtype, with_context):
        given = empty_some(rng, states(rng, dtype))
        output, lse = check(given, arrays, dtype, with_context)
        if with_context is not None:
            copied = slice(with_context, None)
            compare.bitwise(output[copied], given[2][copied], any_nan=True)
            compare.bitwise(lse[:, copied], given[3][:, copied], "lse")

    @EVERY_DTYPE
    def test_an_empty_side_is_selected_away(self, arrays, rng, dtype):
        given = empty_some(rng, states(rng, dtype))
        output, lse = check(given, arrays, dtype)
        prefix_empty, suffix_empty = np.isinf(given[1]).T, np.isinf(given[3]).T
        # Both sides empty counts as the prefix's: its output is emitted unchanged.
        compare.bitwise(output[suffix_empty], given[0][suffix_empty], any_nan=True)
        only_suffix = prefix_empty & ~suffix_empty
        compare.bitwise(output[only_suffix], given[2][only_suffix], any_nan=True)
        assert (lse.T[prefix_empty & suffix_empty] == -INF).all()
        compare.bitwise(
            lse.T[suffix_empty & ~prefix_empty], given[1].T[suffix_empty & ~prefix_empty]
        )

    @pytest.mark.parametrize("offset", [0.0, 80.0, -80.0, 1e4, -1e4, 1e30])
    def test_lse_far_from_zero(self, arrays, rng, offset):
        given = states(rng, "float32")
        for lse in given[1], given[3]:
            lse += np.float32(offset)
        check(given, arrays, "float32")

    @EVERY_DTYPE
    def test_nan_stays_with_its_token_and_head(self, arrays, rng, dtype):
        given = states(rng, dtype)
        wrong = np.zeros(given[1].shape, bool)
        for side, at in (0, (1, 3)), (2, (4, 20)):
            given[side][at[::-1]], given[side + 1][at], wrong[at] = np.nan, np.nan, True
        output, lse = check(given, arrays, dtype)
        np.testing.assert_array_equal(np.isnan(lse), wrong)
        np.testing.assert_array_equal(np.isnan(output.astype(float)).all(-1), wrong.T)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("head_size", [64, 80, 96, 128, 192, 512])
    @pytest.mark.parametrize("into", ["prefix", "suffix"])
    def test_the_result_may_replace_either_side(self, arrays, rng, dtype, head_size, into):
        given = empty_some(rng, states(rng, dtype, 200, 7, head_size))
        expected, expected_lse = merge(given, arrays, dtype)
        for _ in range(5):
            made = [arrays.array(array) for array in given]
            output, lse = made[:2] if into == "prefix" else made[2:]
            cupy_paged.merge_attn_states(output, *made, lse)
            compare.bitwise(arrays.numpy(output), expected, any_nan=True)
            compare.bitwise(arrays.numpy(lse), expected_lse, "lse")

    def test_one_side_far_above_the_other(self, arrays, rng):
        given = states(rng, "float32")
        given[1][:3] += 200.0
        given[3][3:] += 200.0
        output, _ = check(given, arrays, "float32")
        compare.bitwise(output[:, :3], given[0][:, :3])
        compare.bitwise(output[:, 3:], given[2][:, 3:])

    def test_sides_may_be_exchanged(self, arrays, rng):
        prefix_output, prefix_lse, suffix_output, suffix_lse = given = states(rng, "float32")
        exchanged = suffix_output, suffix_lse, prefix_output, prefix_lse
        output, lse = merge(given, arrays, "float32")
        again, lse_again = merge(exchanged, arrays, "float32")
        compare.close(again, output, "float32", tolerance=5e-7)
        compare.close_lse(lse_again, lse, tolerance=5e-7)

    @pytest.mark.parametrize("num_ranks", range(2, 9))
    def test_ranks_of_which_any_may_be_empty_in_any_order(self, arrays, rng, num_ranks, tally):
        parts, (expected, expected_lse) = ranks(rng, num_ranks)
        shuffled = [parts[i] for i in rng.permutation(num_ranks)]

        def merge_two(prefix, suffix):
            return merge((*prefix, *suffix), arrays, "float32")

        for way, order in (
            (merge_one_by_one, parts),
            (merge_one_by_one, parts[::-1]),
            (merge_one_by_one, shuffled),
            (merge_neighbours, parts),
            (merge_neighbours, shuffled),
        ):
            output, lse = way(order, merge_two)
            compare.close(output, expected, "float32", way.__name__)
            compare.close_lse(lse, expected_lse, f"lse of {way.__name__}")
            tally("merges of ranks", 2**num_ranks)

    def test_lse_may_be_transposed_views(self, arrays, rng):
        prefix_output, prefix_lse, suffix_output, suffix_lse = given = states(rng, "float16")
        made = [
            arrays.array(prefix_output),
            arrays.array(prefix_lse.T.copy()).T,
            arrays.array(suffix_output),
            arrays.array(suffix_lse.T.copy()).T,
        ]
        output = ops.empty(prefix_output.shape, "float16", arrays)
        output_lse = ops.empty(prefix_lse.T.shape, "float32", arrays)
        cupy_paged.merge_attn_states(output, *made, output_lse=output_lse.T)
        expected, expected_lse = oracle.merge_attn_states(*given)
        compare.close(arrays.numpy(output), expected, "float16")
        compare.close_lse(arrays.numpy(output_lse).T, expected_lse)

    def test_heads_may_be_padded(self, arrays, rng):
        given = states(rng, "float16")
        num_tokens, num_heads, head_size = shape = given[0].shape
        padded = [
            np.full((num_tokens, num_heads, head_size + 32), np.nan, np.float16) for _ in "ps"
        ]
        for wide, narrow in zip(padded, given[::2], strict=True):
            wide[..., :head_size] = narrow
        prefix_output, suffix_output = (arrays.array(wide)[..., :head_size] for wide in padded)
        prefix_lse, suffix_lse = arrays.array(given[1]), arrays.array(given[3])
        wide = ops.empty((num_tokens, num_heads, head_size + 8), "float16", arrays, ops.SENTINEL)
        cupy_paged.merge_attn_states(
            wide[..., :head_size], prefix_output, prefix_lse, suffix_output, suffix_lse
        )
        found = arrays.numpy(wide)
        expected, _ = oracle.merge_attn_states(*given)
        compare.close(found[..., :head_size].reshape(shape), expected, "float16")
        assert (found[..., head_size:] == np.float16(ops.SENTINEL)).all()

    def test_output_lse_may_be_left_out(self, arrays, rng):
        given = states(rng, "float16")
        output = ops.empty(given[0].shape, "float16", arrays)
        made = [arrays.array(array) for array in given]
        cupy_paged.merge_attn_states(output, *made)
        compare.close(arrays.numpy(output), oracle.merge_attn_states(*given)[0], "float16")

    @EVERY_DTYPE
    @pytest.mark.parametrize("scale", [1.0, 0.37, 0.004])
    @pytest.mark.parametrize("as_array", [False, True])
    def test_float8_output(self, arrays, rng, dtype, scale, as_array):
        given = empty_some(rng, states(rng, dtype))
        made = [arrays.array(array) for array in given]
        output = arrays.array(np.zeros(given[0].shape, np.uint8))
        output_scale = arrays.array(np.array([scale], np.float32)) if as_array else scale
        cupy_paged.merge_attn_states(
            output, *made, prefill_tokens_with_context=30, output_scale=output_scale
        )
        expected, _ = oracle.merge_attn_states(*given, 30)
        exact = expected * float(np.float32(1) / np.float32(scale))
        found = arrays.numpy(output).view(ml_dtypes.float8_e4m3fn)
        compare.rounded(found, exact)
        if scale < 0.01:
            assert (np.abs(found.astype(float)) == 448).any(), "some values should saturate"

    def test_parts_of_a_sequence_merge_to_the_whole(self, arrays):
        case = Case(dtype="float32", seq_lens=(64, 100, 65, 10, 0, 300))
        whole = build(case)
        head, pages = 64, 64 // case.block_size
        prefix, suffix = whole.rows(range(6)), whole.rows(range(6))
        prefix.seq_lens[:] = np.minimum(whole.seq_lens, head)
        suffix.seq_lens[:] = np.maximum(whole.seq_lens - head, 0)
        prefix_state = ops.paged_attention(prefix, arrays)
        tables = arrays.array(np.ascontiguousarray(suffix.block_tables[:, pages:]))
        suffix_state = ops.paged_attention(suffix, arrays, block_tables=tables)
        given = prefix_state[0], prefix_state[1].T, suffix_state[0], suffix_state[1].T
        output, lse = merge(given, arrays, "float32")
        compare.close(output, whole.expected[0], "float32")
        compare.close_lse(lse.T, whole.expected[1])
