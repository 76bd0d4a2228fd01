"""The NumPy reference against attention worked out token by token from the formulas.

Inputs are unit-normal, so that scores are peaked; every slot, block and table entry that no live
token uses is poisoned. Errors are relative to the norm of what is expected.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_paged import reference
from cupy_paged.masks import BlockSparse

FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FP8 = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
LOWEST = -float(np.finfo(np.float32).max)
WILD = (-1, -(2**31), 2**31 - 1, 10**6)

layouts = pytest.mark.parametrize("layout", ["vllm", "HND", "NHD"])
cache_dtypes = pytest.mark.parametrize("cache_dtype", [*FLOATS, *FP8])
block_sizes = pytest.mark.parametrize("block_size", [1, 3, 7, 16, 256])
seq_lens_about = {size: (size, 0, size + 1, 1, size - 1, 2 * size + 3) for size in (1, 3, 7, 16)}
seq_lens_about[256] = (255, 0, 257)


def bits(array: np.ndarray) -> np.ndarray:
    """An array as storage: bfloat16 and fp8 by their bits."""
    native = array.dtype in (np.float32, np.float16)
    return array if native else array.view({1: np.uint8, 2: np.uint16}[array.itemsize])


def new_cache(layout, num_blocks, block_size, num_kv_heads, head_size, dtype, fill):
    """A key cache and a value cache, filled with one value."""
    x = 16 // np.dtype(dtype).itemsize
    shapes = {
        "vllm": (
            (num_blocks, num_kv_heads, head_size // x, block_size, x),
            (num_blocks, num_kv_heads, head_size, block_size),
        ),
        "HND": ((num_blocks, num_kv_heads, block_size, head_size),) * 2,
        "NHD": ((num_blocks, block_size, num_kv_heads, head_size),) * 2,
    }
    return [np.full(shape, fill, dtype) for shape in shapes[layout]]


def entry(cache: np.ndarray, layout: str, block: int, offset: int, head: int) -> np.ndarray:
    """View of one key or value, [head_size] or, for "vllm" keys, [head_size/x, x]."""
    if layout == "NHD":
        return cache[block, offset, head]
    if layout == "HND":
        return cache[block, head, offset]
    return cache[block, head, :, offset]


@dataclass
class Case:
    """Sequences in a paged cache, and their keys and values in plain arrays."""

    layout: str
    cache_dtype: str
    block_size: int
    query: np.ndarray  # float32 [num_seqs, num_heads, head_size]
    keys: list[np.ndarray]  # of each sequence, [seq_len, num_kv_heads, head_size] as stored
    values: list[np.ndarray]
    key_cache: np.ndarray
    value_cache: np.ndarray
    block_tables: np.ndarray
    seq_lens: np.ndarray

    def arguments(self) -> dict[str, Any]:
        """What the functions of `reference` take."""
        return {
            "query": self.query,
            "key_cache": bits(self.key_cache),
            "value_cache": bits(self.value_cache),
            "block_tables": self.block_tables,
            "seq_lens": self.seq_lens,
            "layout": self.layout,
            "cache_dtype": self.cache_dtype,
        }

    def entries(self, row: int, token: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of the key and the value that a token has in the cache."""
        block = self.block_tables[row, token // self.block_size]
        where = (self.layout, block, token % self.block_size, head)
        return entry(self.key_cache, *where), entry(self.value_cache, *where)


def make_case(
    seq_lens: Iterable[int],
    layout: str = "NHD",
    cache_dtype: str = "float32",
    *,
    block_size: int = 16,
    num_kv_heads: int = 2,
    group: int = 3,
    head_size: int = 16,
    poison: float = np.nan,
) -> Case:
    """Blocks in random order, two spare ones, and a table two entries wider than needed."""
    rng = np.random.default_rng(0)
    seq_lens = np.array(list(seq_lens), np.int32)
    dtype = np.dtype((FLOATS | FP8)[cache_dtype])
    num_pages = -(-seq_lens // block_size)
    num_blocks = int(num_pages.sum()) + 2
    block_tables = rng.choice(WILD, (len(seq_lens), max(num_pages, default=0) + 2))
    free = rng.permutation(num_blocks).tolist()
    for row, count in enumerate(num_pages):
        block_tables[row, :count] = [free.pop() for _ in range(count)]

    def random_entries():
        return [rng.standard_normal((n, num_kv_heads, head_size)).astype(dtype) for n in seq_lens]

    case = Case(
        layout,
        cache_dtype,
        block_size,
        rng.standard_normal((len(seq_lens), num_kv_heads * group, head_size), np.float32),
        random_entries(),
        random_entries(),
        *new_cache(layout, num_blocks, block_size, num_kv_heads, head_size, dtype, poison),
        block_tables.astype(np.int32),
        seq_lens,
    )
    for row, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        for token, head in np.ndindex(keys.shape[:2]):
            key, value = case.entries(row, token, head)
            key[...] = keys[token, head].reshape(key.shape)
            value[...] = values[token, head]
    return case


def sees(mask: BlockSparse, case: Case, seq_len: int, head: int, token: int) -> bool:
    """vLLM's block-sparse rule, for one token."""
    num_heads, num_kv_heads = case.query.shape[1], case.keys[0].shape[1]
    step = mask.head_sliding_step
    if step >= 0:
        offset = (mask.tp_rank * num_heads + head) * step + 1
    else:
        kv_head = head // (num_heads // num_kv_heads)
        offset = (mask.tp_rank * num_kv_heads + kv_head) * -step + 1
    page_start = token // case.block_size * case.block_size
    block, newest = page_start // mask.block_size, (seq_len - 1) // mask.block_size
    return (block + offset) % mask.vert_stride == 0 or block > newest - mask.local_blocks


def attend(case, row, head, tokens, *, scale, k_scale, v_scale, alibi_slopes, mask):
    """One head over the given tokens: the average value, and the logits."""
    if case.cache_dtype not in FP8:
        k_scale = v_scale = 1.0
    seq_len = len(case.keys[row])
    kv_head = head // (case.query.shape[1] // case.keys[row].shape[1])
    if mask is not None:
        tokens = [t for t in tokens if sees(mask, case, seq_len, head, t)]
    query = case.query[row, head].tolist()
    keys = case.keys[row].astype(np.float64)[:, kv_head]
    values = case.values[row].astype(np.float64)[:, kv_head]
    logits = []
    for token in tokens:
        key = (keys[token] * k_scale).tolist()
        logit = scale * math.fsum(q * k for q, k in zip(query, key, strict=True))
        if alibi_slopes is not None:
            logit += float(alibi_slopes[head]) * (token - (seq_len - 1))
        logits.append(logit)
    if not logits:
        return np.zeros(len(query)), logits
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    average = [
        v_scale * math.fsum(w * v for w, v in zip(weights, channel, strict=True))
        for channel in values[list(tokens)].T.tolist()
    ]
    return np.array(average) / math.fsum(weights), logits


def log_sum_exp(logits: list[float]) -> float:
    if not logits:
        return -math.inf
    highest = max(logits)
    return highest + math.log(math.fsum(math.exp(logit - highest) for logit in logits))


PLAIN = {"scale": 0.8, "k_scale": 1.0, "v_scale": 1.0, "alibi_slopes": None, "mask": None}


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    """Infinities and NaNs in the same places, the rest close by norm."""
    expected = np.asarray(expected)
    assert got.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    assert np.linalg.norm(got[finite] - expected[finite]) <= tolerance * np.linalg.norm(
        expected[finite]
    )


def check(case: Case, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Compare `paged_attention` with `attend` head by head, and return what it gave."""
    options = PLAIN | changes
    out, lse = reference.paged_attention(**case.arguments(), **options)
    assert out.dtype == lse.dtype == np.float64
    assert out.shape == case.query.shape
    assert lse.shape == case.query.shape[:2]
    for row, head in np.ndindex(lse.shape):
        average, logits = attend(case, row, head, range(len(case.keys[row])), **options)
        assert_close(out[row, head], average)
        assert_close(lse[row, head, None], [log_sum_exp(logits)])
    return out, lse


@layouts
@cache_dtypes
def test_layouts_and_dtypes(layout: str, cache_dtype: str) -> None:
    case = make_case(seq_lens_about[16], layout, cache_dtype)
    check(case, k_scale=0.7, v_scale=0.3)


@layouts
@block_sizes
def test_block_sizes(layout: str, block_size: int) -> None:
    check(make_case(seq_lens_about[block_size], layout, block_size=block_size, group=2))


@layouts
@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_gqa(layout: str, group: int, num_kv_heads: int) -> None:
    check(make_case((5, 18), layout, num_kv_heads=num_kv_heads, group=group))


@pytest.mark.parametrize("head_size", [8, 40, 120])
def test_head_sizes(head_size: int) -> None:
    check(make_case((5, 18), "vllm", "float16", head_size=head_size))


def test_empty_sequences() -> None:
    out, lse = check(make_case((0, 3, 0)))
    assert not out[[0, 2]].any()
    assert np.isneginf(lse[[0, 2]]).all()
    case = make_case((3,))
    case.seq_lens[0] = -7
    out, lse = reference.paged_attention(**case.arguments(), scale=1.0)
    assert not out.any()
    assert np.isneginf(lse).all()


def test_empty_batch() -> None:
    case = make_case((3, 4))
    case.query, case.block_tables, case.seq_lens = (
        array[:0] for array in (case.query, case.block_tables, case.seq_lens)
    )
    out, lse = reference.paged_attention(**case.arguments(), scale=1.0)
    assert out.shape == (0, 6, 16)
    assert lse.shape == (0, 6)


def test_scores_of_80() -> None:
    case = make_case((37,))
    case.query *= 20
    _, lse = check(case)
    assert np.abs(lse).max() > 80


def test_long_sequence() -> None:
    check(make_case((5001,), num_kv_heads=1, group=2))


@layouts
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_needles(layout: str, block_size: int) -> None:
    """One key aligned with the query, at each token in turn, brings out that token's value."""
    seq_len = 2 * block_size + 1
    for token in range(seq_len):
        case = make_case((4, seq_len), layout, block_size=block_size, group=1)
        for head in range(2):
            query = case.query[1, head]
            key, _ = case.entries(1, token, head)
            key[...] = (80 / (query @ query) * query).reshape(key.shape)
        out, lse = reference.paged_attention(**case.arguments(), scale=1.0)
        assert_close(out[1], case.values[1][token].astype(np.float64))
        assert_close(lse[1], np.full(2, 80.0), 1e-6)


@layouts
@cache_dtypes
def test_poison_changes_no_bit(layout: str, cache_dtype: str) -> None:
    mask = BlockSparse(1, 3, 16, 1)
    for options in (PLAIN, PLAIN | {"mask": mask}):
        results = [
            reference.paged_attention(**make_case(**kinds, poison=poison).arguments(), **options)
            for kinds in [{"seq_lens": (5, 33, 0), "layout": layout, "cache_dtype": cache_dtype}]
            for poison in (0.0, np.nan, np.inf)
        ]
        for out, lse in results:
            assert np.isfinite(out).all()
            assert out.tobytes() == results[0][0].tobytes()
            assert lse.tobytes() == results[0][1].tobytes()


def test_live_nan_is_not_hidden() -> None:
    case = make_case((20, 20))
    case.entries(0, 3, 0)[0][...] = np.nan
    case.entries(1, 3, 0)[1][...] = np.nan
    out, lse = reference.paged_attention(**case.arguments(), scale=1.0)
    assert np.isnan(out[:, :3]).all()
    assert np.isnan(lse[0, :3]).all()
    assert np.isfinite(out[:, 3:]).all()


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("block", [-1, 7, 2**31 - 1])
def test_live_block_outside_the_cache(row: int, block: int) -> None:
    case = make_case((30, 40))
    case.block_tables[row, 1] = block
    message = rf"block_tables\[{row}, 1\]: block {block} of a live token, needs 0 <= block < 7"
    with pytest.raises(IndexError, match=message):
        reference.paged_attention(**case.arguments(), scale=1.0)


@pytest.mark.parametrize("max_seq_len", [None, 33])
def test_too_long_is_nan(max_seq_len: int | None) -> None:
    case = make_case((5, 33, 34))
    if max_seq_len is None:
        case.block_tables = case.block_tables[:, :2]
        case.seq_lens[1] = 32
    out, lse = reference.paged_attention(**case.arguments(), scale=1.0, max_seq_len=max_seq_len)
    assert np.isfinite(out[:2]).all()
    assert np.isfinite(lse[:2]).all()
    assert np.isnan(out[2]).all()
    assert np.isnan(lse[2]).all()


@pytest.mark.parametrize("max_seq_len", [34, 10**6])
def test_loose_max_seq_len_changes_nothing(max_seq_len: int) -> None:
    case = make_case((5, 33, 34))
    out, lse = reference.paged_attention(**case.arguments(), **PLAIN, max_seq_len=max_seq_len)
    expected_out, expected_lse = check(case)
    assert np.array_equal(out, expected_out)
    assert np.array_equal(lse, expected_lse)


def strided(cache: np.ndarray) -> np.ndarray:
    """A copy whose blocks lie apart, NaN between them."""
    interleaved = np.full((len(cache), 2, *cache.shape[1:]), np.nan, cache.dtype)
    interleaved[:, 1] = cache
    return interleaved[:, 1]


@layouts
def test_strided_views(layout: str) -> None:
    case = make_case((5, 33), layout)
    expected, _ = check(case)
    case.key_cache, case.value_cache = strided(case.key_cache), strided(case.value_cache)
    case.query = np.concatenate([case.query, case.query], axis=1)[:, :6]
    case.block_tables = np.repeat(case.block_tables, 2, axis=1)[:, ::2]
    case.seq_lens = np.repeat(case.seq_lens, 3)[::3]
    assert_close(check(case)[0], expected, 0)


@layouts
def test_row_depends_on_that_row_alone(layout: str) -> None:
    case = make_case((33, 150, 1, 16), layout, "float16")
    out, lse = check(case)
    for row in range(len(out)):
        arguments = case.arguments()
        for name in ("query", "block_tables", "seq_lens"):
            arguments[name] = arguments[name][row : row + 1]
        alone_out, alone_lse = reference.paged_attention(**arguments, scale=PLAIN["scale"])
        assert alone_out.tobytes() == out[row].tobytes()
        assert alone_lse.tobytes() == lse[row].tobytes()


@layouts
@pytest.mark.parametrize("group", [1, 3])
def test_alibi(layout: str, group: int) -> None:
    slopes = np.linspace(-0.5, 0.5, 3 * group).astype(np.float32)
    check(make_case((1, 17, 40), layout, num_kv_heads=3, group=group), alibi_slopes=slopes)


MASKS = [
    BlockSparse(local_blocks=1, vert_stride=3, block_size=16, head_sliding_step=0),
    BlockSparse(local_blocks=2, vert_stride=4, block_size=32, head_sliding_step=1),
    BlockSparse(local_blocks=1, vert_stride=5, block_size=16, head_sliding_step=2, tp_rank=3),
    BlockSparse(local_blocks=1, vert_stride=5, block_size=16, head_sliding_step=-2, tp_rank=1),
    BlockSparse(local_blocks=0, vert_stride=3, block_size=16, head_sliding_step=1),
    BlockSparse(local_blocks=99, vert_stride=2, block_size=64, head_sliding_step=0),
]


@layouts
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("block_size", [4, 16])
def test_block_sparse(layout: str, mask: BlockSparse, block_size: int) -> None:
    case = make_case((1, 16, 17, 0, 32, 95), layout, block_size=block_size)
    slopes = np.linspace(-0.2, 0.1, 6)
    check(case, mask=mask)
    check(case, mask=mask, alibi_slopes=slopes)


def test_block_sparse_goes_by_the_first_token_of_a_page() -> None:
    """With pages of 3 and mask blocks of 4, tokens 3..5 are one page, seen or hidden as one."""
    check(make_case((30,), block_size=3), mask=BlockSparse(1, 2, 4, 1))


def test_block_sparse_hides_nan() -> None:
    """A head that skips a page is untouched by what another of its group reads there."""
    mask = BlockSparse(local_blocks=1, vert_stride=3, block_size=16, head_sliding_step=1)
    case = make_case((90,), num_kv_heads=1)
    seen = np.array([[sees(mask, case, 90, head, t) for t in range(90)] for head in range(3)])
    expected, _ = check(case, mask=mask)
    for page in range(0, 90, 16):
        case = make_case((90,), num_kv_heads=1)
        for token in range(page, min(page + 16, 90)):
            for view in case.entries(0, token, 0):
                view[...] = np.nan
        out, _ = reference.paged_attention(**case.arguments(), **PLAIN | {"mask": mask})
        assert np.array_equal(np.isnan(out[0]).all(-1), seen[:, page])
        assert_close(out[0, ~seen[:, page]], expected[0, ~seen[:, page]], 0)


def test_block_sparse_hides_everything() -> None:
    case = make_case((16, 40))
    nowhere = BlockSparse(local_blocks=0, vert_stride=1000, block_size=16, head_sliding_step=0)
    out, lse = check(case, mask=nowhere)
    assert not out.any()
    assert np.isneginf(lse).all()


def partitions_of(case: Case, partition_size: int, num_partitions: int, **options: Any):
    return reference.paged_attention_partitions(
        **case.arguments(),
        **PLAIN | options,
        partition_size=partition_size,
        num_partitions=num_partitions,
    )


@layouts
@pytest.mark.parametrize("block_size", [7, 16])
@pytest.mark.parametrize("partition_size", [1, 5, 16, 32, 512])
@pytest.mark.parametrize("mask", [None, MASKS[4]], ids=["dense", "sparse"])
def test_partitions(layout, block_size, partition_size, mask) -> None:
    case = make_case((0, 1, 15, 16, 17, 32, 70), layout, "float8_e4m3fn", block_size=block_size)
    options = {"k_scale": 0.7, "v_scale": 0.3, "alibi_slopes": np.linspace(-0.2, 0.1, 6)}
    options["mask"] = mask
    num_partitions = -(-70 // partition_size) + 1
    exp_sums, max_logits, tmp_out, live = partitions_of(
        case, partition_size, num_partitions, **options
    )
    for row, partition in np.ndindex(live.shape):
        tokens = range(len(case.keys[row]))[partition * partition_size :][:partition_size]
        assert live[row, partition] == bool(tokens)
        for head in range(6):
            average, logits = attend(case, row, head, tokens, **PLAIN | options)
            where = (row, head, partition)
            if not tokens:
                assert (exp_sums[where], max_logits[where]) == (0, -np.inf)
            elif not logits:
                assert (exp_sums[where], max_logits[where]) == (len(tokens), LOWEST)
            else:
                lse = max_logits[where] + math.log(exp_sums[where])
                assert_close(np.array([max_logits[where], lse]), [max(logits), log_sum_exp(logits)])
            assert_close(tmp_out[where], average)

    out, lse = reference.combine_partitions(exp_sums, max_logits, tmp_out, live)
    whole_out, whole_lse = check(case, **options)
    assert_close(out, whole_out)
    assert_close(lse, whole_lse)


def test_combine_never_looks_at_dead_partitions() -> None:
    case = make_case((0, 1, 33, 70))
    scratch = partitions_of(case, 16, 6)
    expected = reference.combine_partitions(*scratch)
    live = scratch[-1]
    for poison in (np.nan, np.inf, 1e300):
        for array in scratch[:3]:
            array.swapaxes(1, 2)[~live] = poison
        got = reference.combine_partitions(*scratch)
        assert [a.tobytes() for a in got] == [a.tobytes() for a in expected]


def test_combine_keeps_nan_of_live_partitions() -> None:
    case = make_case((40,))
    case.entries(0, 20, 0)[0][...] = np.nan
    out, lse = reference.combine_partitions(*partitions_of(case, 16, 3))
    assert np.isnan(out[0, :3]).all()
    assert np.isnan(lse[0, :3]).all()
    assert np.isfinite(out[0, 3:]).all()


@pytest.mark.parametrize(("partition_size", "num_partitions"), [(16, 2), (11, 3)])
def test_too_many_tokens_for_the_partitions_is_nan(partition_size, num_partitions) -> None:
    case = make_case((32, 34))
    scratch = partitions_of(case, partition_size, num_partitions)
    out, lse = reference.combine_partitions(*scratch)
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()
    assert np.isnan(lse[1]).all()


def random_states(*lse_pair: float) -> tuple[np.ndarray, ...]:
    """Outputs [2, 3, 4] and lse [3, 2] of a prefix and a suffix, all tokens with the same lse."""
    rng = np.random.default_rng(0)
    outputs = rng.standard_normal((2, 2, 3, 4))
    prefix_lse, suffix_lse = (np.full((3, 2), lse) for lse in lse_pair)
    return outputs[0], prefix_lse, outputs[1], suffix_lse


@pytest.mark.parametrize("split", [1, 20, 36])
def test_merge_of_parts_is_the_whole(split: int) -> None:
    rng = np.random.default_rng(0)
    logits = 5 * rng.standard_normal((4, 3, 37))
    values = rng.standard_normal((4, 3, 37, 8))

    def state(part: slice) -> tuple[np.ndarray, np.ndarray]:
        weights = np.exp(logits[..., part])
        total = weights.sum(-1)
        return (weights[..., None] * values[:, :, part]).sum(2) / total[..., None], np.log(total).T

    got = reference.merge_attn_states(*state(slice(split)), *state(slice(split, None)))
    for array, expected in zip(got, state(slice(None)), strict=True):
        assert_close(array, expected)


@pytest.mark.parametrize("empty_lse", [-np.inf, np.inf])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3.0])
def test_merge_takes_the_other_side_of_an_empty_one(empty_lse: float, garbage: float) -> None:
    prefix, p_lse, suffix, s_lse = random_states(empty_lse, -700.25)
    prefix[...] = garbage
    for output, lse in (
        reference.merge_attn_states(prefix, p_lse, suffix, s_lse),
        reference.merge_attn_states(suffix, s_lse, prefix, p_lse),
    ):
        assert np.array_equal(output, suffix)
        assert np.array_equal(lse, s_lse)


@pytest.mark.parametrize("p_lse", [-np.inf, np.inf])
@pytest.mark.parametrize("s_lse", [-np.inf, np.inf])
def test_merge_of_two_empty_sides_keeps_the_prefix(p_lse: float, s_lse: float) -> None:
    states = random_states(p_lse, s_lse)
    states[2][...] = np.nan
    output, lse = reference.merge_attn_states(*states)
    assert np.array_equal(output, states[0])
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("lse", [0.0, 1e4, -1e4, 1e30, -1e30])
def test_merge_of_equals_is_the_mean(lse: float) -> None:
    states = random_states(lse, lse)
    output, merged_lse = reference.merge_attn_states(*states)
    assert_close(output, (states[0] + states[2]) / 2)
    assert_close(merged_lse, np.full((3, 2), lse + math.log(2)))


@pytest.mark.parametrize("gap", [1e3, 1e30])
def test_merge_of_far_apart_sides_takes_the_larger(gap: float) -> None:
    prefix, p_lse, suffix, s_lse = random_states(gap, -gap)
    for states in ((prefix, p_lse, suffix, s_lse), (suffix, s_lse, prefix, p_lse)):
        output, lse = reference.merge_attn_states(*states)
        assert np.array_equal(output, prefix)
        assert np.array_equal(lse, p_lse)


def test_merge_weighs_each_head_and_token_by_its_own_lse() -> None:
    prefix, _, suffix, _ = random_states(0, 0)
    p_lse, s_lse = np.arange(6.0).reshape(3, 2), np.array([[3.0, -np.inf], [1, 2], [9, np.inf]])
    output, lse = reference.merge_attn_states(prefix, p_lse, suffix, s_lse)
    for token, head in np.ndindex(2, 3):
        p, s = p_lse[head, token], s_lse[head, token]
        weight = 0.0 if math.isinf(s) else 1 / (1 + math.exp(p - s))
        mean = (1 - weight) * prefix[token, head] + weight * suffix[token, head]
        assert_close(output[token, head], mean)
        assert_close(lse[head, token], p - math.log1p(-weight))


@pytest.mark.parametrize("count", [0, 1, 2, None])
def test_merge_copies_tokens_without_context(count: int | None) -> None:
    prefix, p_lse, suffix, s_lse = random_states(0.5, 1.5)
    s_lse[1] = np.inf
    output, lse = reference.merge_attn_states(prefix, p_lse, suffix, s_lse, count)
    merged, merged_lse = reference.merge_attn_states(prefix, p_lse, suffix, s_lse)
    assert np.array_equal(output[:count], merged[:count])
    assert np.array_equal(lse[:, :count], merged_lse[:, :count])
    if count is not None:
        assert np.array_equal(output[count:], suffix[count:])
        assert np.array_equal(lse[:, count:], s_lse[:, count:])


def test_merge_leaves_its_arguments_alone() -> None:
    states = random_states(np.inf, 1.0)
    before = [state.copy() for state in states]
    output, lse = reference.merge_attn_states(*states, 1)
    output[...] = lse[...] = 9
    for state, copy in zip(states, before, strict=True):
        assert np.array_equal(state, copy)


def assert_written(cache, layout, slot_mapping, block_size, rows, before) -> None:
    """Each slot holds its row, bit for bit, and no other slot has changed."""
    expected = before.copy()
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            for head in range(rows.shape[1]):
                view = entry(expected, layout, slot // block_size, slot % block_size, head)
                view[...] = rows[token, head].reshape(view.shape)
    assert cache.tobytes() == expected.tobytes()


WRITES = [(dtype, dtype) for dtype in FLOATS] + [(dtype, fp8) for dtype in FLOATS for fp8 in FP8]


@layouts
@pytest.mark.parametrize(("dtype", "cache_dtype"), WRITES)
@pytest.mark.parametrize("block_size", [1, 7, 16])
@np.errstate(over="ignore", invalid="ignore")
def test_reshape_and_cache(layout: str, dtype: str, cache_dtype: str, block_size: int) -> None:
    """Every special value, scattered slots, skipped ones, and rows past the slot mapping."""
    rng = np.random.default_rng(0)
    shape = (14, 3, 32)
    key, value = (200 * rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    key[:, :, :6] = [np.nan, np.inf, -np.inf, -0.0, 1e-30, 3e38]
    key, value = key.astype(FLOATS[dtype]), value.astype(FLOATS[dtype])
    num_blocks = 24 // block_size + 1
    slot_mapping = rng.permutation(num_blocks * block_size)[:10]
    slot_mapping[[0, 4]] = -1, -(2**40)

    caches = new_cache(layout, num_blocks, block_size, 3, 32, (FLOATS | FP8)[cache_dtype], 1.5)
    caches = [bits(cache) for cache in caches]
    before = [cache.copy() for cache in caches]
    result = reference.reshape_and_cache(
        bits(key),
        bits(value),
        *caches,
        slot_mapping,
        layout=layout,
        dtype=dtype,
        cache_dtype=cache_dtype,
        k_scale=0.7,
        v_scale=0.3,
    )
    assert result is None
    for cache, old, rows, scale in zip(caches, before, (key, value), (0.7, 0.3), strict=True):
        if cache_dtype in FP8:
            quotient = rows.astype(np.float32) / np.float32(scale)
            largest = float(ml_dtypes.finfo(FP8[cache_dtype]).max)
            rows = np.clip(quotient, -largest, largest).astype(FP8[cache_dtype])
            codes = np.where(np.isnan(quotient), 0x7F, bits(rows)).astype(np.uint8)
        else:
            codes = bits(rows)
        assert_written(cache, layout, slot_mapping, block_size, codes, old)


@pytest.mark.parametrize("dtype", FLOATS)
def test_unquantised_writes_keep_nan_payloads(dtype: str) -> None:
    raw = {2: np.uint16, 4: np.uint32}[np.dtype(FLOATS[dtype]).itemsize]
    signalling = {"float32": 0xFF812345, "float16": 0xFD23, "bfloat16": 0xFFA3}[dtype]
    key = bits(np.full((1, 1, 8), signalling, raw).view(FLOATS[dtype]))
    caches = [bits(cache) for cache in new_cache("NHD", 1, 4, 1, 8, FLOATS[dtype], 0)]
    slots = np.array([2])
    reference.reshape_and_cache(
        key, key, *caches, slots, layout="NHD", dtype=dtype, cache_dtype=dtype
    )
    for cache in caches:
        assert (cache[0, 2].view(raw) == signalling).all()
        assert not cache[0, [0, 1, 3]].any()


def test_fp8_writes_divide_in_float32() -> None:
    """x / 0.3 is just above the tie between 1.0 and 1.125, and on it once rounded to float32."""
    x = np.float32(float(np.float32(0.3)) * 1.0625)
    assert float(x) / float(np.float32(0.3)) > 1.0625 == x / np.float32(0.3)
    key = np.full((1, 1, 16), x)
    caches = [bits(cache) for cache in new_cache("NHD", 1, 1, 1, 16, FP8["float8_e4m3fn"], 0)]
    reference.reshape_and_cache(
        key,
        key,
        *caches,
        np.array([0]),
        layout="NHD",
        dtype="float32",
        cache_dtype="float8_e4m3fn",
        k_scale=0.3,
        v_scale=0.3,
    )
    for cache in caches:
        assert (cache.view(FP8["float8_e4m3fn"]) == 1.0).all()


@layouts
def test_slot_past_the_end_writes_nothing(layout: str) -> None:
    key = np.ones((3, 2, 8), np.float32)
    caches = new_cache(layout, 2, 4, 2, 8, np.float32, 0)
    with pytest.raises(IndexError):
        reference.reshape_and_cache(
            key,
            key,
            *caches,
            np.array([0, 3, 8]),
            layout=layout,
            dtype="float32",
            cache_dtype="float32",
        )
    assert not caches[0].any()
    assert not caches[1].any()


@layouts
@pytest.mark.parametrize("cache_dtype", ["float32", "float8_e4m3fn"])
def test_what_is_written_is_attended(layout: str, cache_dtype: str) -> None:
    """Writer and reader agree on where everything lies, into strided caches too."""
    written = make_case((5, 33, 17), layout, cache_dtype)
    expected, _ = check(written, k_scale=0.5, v_scale=0.25)
    for name in ("key_cache", "value_cache"):
        setattr(written, name, strided(np.full_like(getattr(written, name), np.nan)))
    key = np.concatenate(written.keys).astype(np.float32) * np.float32(0.5)
    value = np.concatenate(written.values).astype(np.float32) * np.float32(0.25)
    if cache_dtype == "float32":
        key, value = 2 * key, 4 * value
    slots = [
        written.block_tables[row, token // 16] * 16 + token % 16
        for row, seq_len in enumerate(written.seq_lens)
        for token in range(seq_len)
    ]
    reference.reshape_and_cache(
        key,
        value,
        bits(written.key_cache),
        bits(written.value_cache),
        np.array(slots),
        layout=layout,
        dtype="float32",
        cache_dtype=cache_dtype,
        k_scale=0.5,
        v_scale=0.25,
    )
    assert_close(check(written, k_scale=0.5, v_scale=0.25)[0], expected, 0)
