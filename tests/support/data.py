"""Seeded inputs: paged caches that punish a kernel for reading what it must not read.

Every pool starts as poison (NaN and infinities) and only live tokens are written into it, in
shuffled blocks; block-table entries past the last live block are wild. Keys and queries are unit
normal and scores are peaked, so that a wrong token shows.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from support import oracle
from support.oracle import FP8, BlockSparse

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
WILD_IDS = -1, 2**31 - 1, -(2**31)
SHARPNESS = 1.5


@dataclass(frozen=True)
class Case:
    """One attention problem: shapes, dtypes, features, and the seed of its contents."""

    dtype: str = "float16"
    kv_cache_dtype: str = "auto"
    layout: str = "HND"
    num_kv_heads: int = 2
    group: int = 2
    head_size: int = 64
    block_size: int = 16
    seq_lens: tuple[int, ...] = (33, 0, 1)
    alibi: bool = False
    sparse: BlockSparse | None = None
    strides: str = "contiguous"
    seed: int = 0

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def cache_dtype(self) -> np.dtype:
        return np.dtype(FP8.get(self.kv_cache_dtype, DTYPES[self.dtype]))

    @property
    def scales(self) -> tuple[float, float]:
        return (0.75, 0.3125) if self.kv_cache_dtype in FP8 else (1.0, 1.0)

    @property
    def given_scales(self) -> tuple[float, float]:
        """What operators are told: scales count for fp8 caches alone."""
        return self.scales if self.kv_cache_dtype in FP8 else (0.6, 3.0)

    def __str__(self) -> str:
        features = [
            self.dtype,
            "" if self.kv_cache_dtype == "auto" else self.kv_cache_dtype,
            self.layout,
            f"d{self.head_size}",
            f"b{self.block_size}",
            f"h{self.num_heads}:{self.num_kv_heads}",
            "alibi" if self.alibi else "",
            f"sparse{tuple(self.sparse)}".replace(" ", "") if self.sparse else "",
            "" if self.strides == "contiguous" else self.strides,
            f"seed{self.seed}" if self.seed else "",
        ]
        return "-".join(filter(None, features))


@dataclass(frozen=True)
class Problem:
    """The arguments of one attention call, as NumPy arrays, and what is expected of it."""

    case: Case
    query: np.ndarray
    key_cache: np.ndarray
    value_cache: np.ndarray
    block_tables: np.ndarray
    seq_lens: np.ndarray
    alibi_slopes: np.ndarray | None
    scale: float
    max_seq_len: int | None = None
    dense: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    @property
    def rules(self) -> dict[str, Any]:
        k_scale, v_scale = self.case.scales
        return {
            "scale": self.scale,
            "layout": self.case.layout,
            "block_size": self.case.block_size,
            "kv_cache_dtype": self.case.kv_cache_dtype,
            "k_scale": k_scale,
            "v_scale": v_scale,
            "alibi_slopes": self.alibi_slopes,
            "sparse": self.case.sparse,
        }

    @property
    def capacity(self) -> int:
        return self.block_tables.shape[1] * self.case.block_size

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        return self.query, self.key_cache, self.value_cache, self.block_tables, self.seq_lens

    @cached_property
    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) in float64."""
        return oracle.paged_attention(*self.inputs, max_seq_len=self.max_seq_len, **self.rules)

    def expected_partitions(self, partition_size: int, num_partitions: int) -> oracle.Partitions:
        return oracle.paged_attention_partitions(
            *self.inputs,
            partition_size=partition_size,
            num_partitions=num_partitions,
            **self.rules,
        )

    def rows(self, index) -> "Problem":
        """The problem of some of the sequences, in the order of `index`."""
        index = np.asarray(index)
        return replace(
            self,
            query=self.query[index],
            block_tables=self.block_tables[index],
            seq_lens=self.seq_lens[index],
        )

    def unpoisoned(self) -> "Problem":
        """The same live tokens in zero-filled caches, with tables that are zero where dead."""
        caches = self.key_cache.copy(), self.value_cache.copy()
        for cache in caches:
            cache[~np.isfinite(cache.astype(np.float32))] = 0
        pages = -(-self.seq_lens[:, None] // self.case.block_size)
        live = np.arange(self.block_tables.shape[1]) < pages
        tables = np.where(live, self.block_tables, 0).astype(np.int32)
        return replace(self, key_cache=caches[0], value_cache=caches[1], block_tables=tables)


def poison(shape, dtype, rng):
    """An array of NaN and infinities, or of the float8 codes nearest to them."""
    if dtype == DTYPES["float8_e4m3fn"]:
        codes = np.array([0x7F, 0xFF], np.uint8).view(dtype)
    elif dtype == DTYPES["float8_e5m2"]:
        codes = np.array([0x7F, 0x7C, 0xFC], np.uint8).view(dtype)
    else:
        codes = np.array([np.nan, np.inf, -np.inf]).astype(dtype)
    # A short pattern repeated: drawing every element of a large pool would take seconds.
    pattern = codes[rng.integers(len(codes), size=1009)]
    return np.resize(pattern, shape)


def store(array, case, scale):
    """Float values as the elements of the cache."""
    if case.kv_cache_dtype in FP8:
        return oracle.quantise(array, scale, case.kv_cache_dtype)
    return array.astype(case.cache_dtype)


def empty_caches(case, num_blocks, rng):
    """A poisoned (key_cache, value_cache) in the layout and the strides of `case`."""
    dtype, kv_heads = case.cache_dtype, case.num_kv_heads
    if case.layout == "vllm":
        x = 16 // dtype.itemsize
        key_shape = kv_heads, case.head_size // x, case.block_size, x
        value_shape = kv_heads, case.head_size, case.block_size
    elif case.layout == "HND":
        key_shape = value_shape = kv_heads, case.block_size, case.head_size
    else:
        key_shape = value_shape = case.block_size, kv_heads, case.head_size
    if case.strides == "interleaved":
        pair = poison((num_blocks, 2, int(np.prod(key_shape))), dtype, rng)
        key_cache, value_cache = pair[:, 0], pair[:, 1]
        return (
            key_cache.reshape(num_blocks, *key_shape),
            value_cache.reshape(num_blocks, *value_shape),
        )
    # Blocks and heads, and in the row layouts tokens, may lie any distance apart.
    free_dims = 2 if case.layout == "vllm" else 3
    return (
        spaced((num_blocks, *key_shape), free_dims, case.strides, dtype, rng),
        spaced((num_blocks, *value_shape), free_dims, case.strides, dtype, rng),
    )


def spaced(shape, free_dims, strides, dtype, rng):
    """A poisoned array, with gaps between the elements of its first `free_dims` dimensions.

    With "misaligned" strides, no row begins at a multiple of more than one element.
    """
    if strides == "contiguous":
        return poison(shape, dtype, rng)
    gap, first = {"padded": (32, 16), "misaligned": (3, 1)}[strides]
    inner = int(np.prod(shape[free_dims:]))
    wide = poison((shape[0], *(n + 1 for n in shape[1:free_dims]), inner + gap), dtype, rng)
    rows = tuple(slice(n) for n in shape[:free_dims])
    return wide[(*rows, slice(first, first + inner))].reshape(shape)


def random_bits(rng, shape, dtype):
    """An array of any bits at all, NaN among them."""
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


def middle(owner):
    """The cache in what `owners` has made."""
    return owner[:, 1]


def write(case, key_cache, value_cache, table, start, key, value):
    """Put the stored tokens key, value [num_tokens, num_kv_heads, head_size] at `start`."""
    token = start + np.arange(len(key))
    blocks, offsets = table[token // case.block_size], token % case.block_size
    if case.layout == "vllm":
        chunks = key.reshape(len(key), case.num_kv_heads, *key_cache.shape[2::2])
        key_cache[blocks, :, :, offsets, :] = chunks
        value_cache[blocks, :, :, offsets] = value
    elif case.layout == "HND":
        key_cache[blocks, :, offsets], value_cache[blocks, :, offsets] = key, value
    else:
        key_cache[blocks, offsets], value_cache[blocks, offsets] = key, value


def packed_query(query, case, rng):
    """`query` as the view that a slice of a packed, otherwise poisoned QKV is."""
    num_seqs = len(query)
    width = case.num_heads * case.head_size
    first = 1 if case.strides == "misaligned" else 0
    packed_width = width + 2 * case.num_kv_heads * case.head_size + first
    packed = poison((num_seqs, packed_width), DTYPES[case.dtype], rng)
    view = packed[:, first : first + width].reshape(query.shape)
    view[:] = query
    return view


def slopes(num_heads):
    """ALiBi slopes of both signs and zero, in an order that no head count divides evenly."""
    head = np.arange(num_heads)
    positive = 2.0 ** -(1.0 + head % 8)
    return np.choose(head % 5, [positive, -1 / 64, 0.0, positive / 3, -1 / 48]).astype(np.float32)


def tables_of(seq_lens, block_size, num_blocks, rng, spare=2):
    """Shuffled block tables, no block in two of them, with wild ids in their dead entries."""
    used = [-(-max(n, 0) // block_size) for n in seq_lens]
    width = max(used, default=0) + spare
    wild = np.array([*WILD_IDS, num_blocks], np.int32)
    tables = wild[rng.integers(len(wild), size=(len(used), width))]
    order = rng.permutation(num_blocks).astype(np.int32)
    for table, count in zip(tables, used, strict=True):
        table[:count], order = order[:count], order[count:]
    return tables


def build(case: Case, logits: float | None = None) -> Problem:
    """The problem of `case`; with `logits`, scores are stretched to reach +-`logits`."""
    rng = np.random.default_rng(
        [case.seed, case.head_size, case.block_size, *map(abs, case.seq_lens)]
    )
    num_blocks = sum(-(-max(n, 0) // case.block_size) for n in case.seq_lens) + 3
    key_cache, value_cache = empty_caches(case, num_blocks, rng)
    tables = tables_of(case.seq_lens, case.block_size, num_blocks, rng)
    scale = 1.25 * case.head_size**-0.5
    query = rng.standard_normal((len(case.seq_lens), case.num_heads, case.head_size))
    query *= SHARPNESS if logits is None else 1.0
    dense = []
    for table, seq_len in zip(tables, case.seq_lens, strict=True):
        shape = 2, max(seq_len, 0), case.num_kv_heads, case.head_size
        key, value = rng.standard_normal(shape, np.float32)
        key, value = (
            store(array, case, s) for array, s in zip((key, value), case.scales, strict=True)
        )
        write(case, key_cache, value_cache, table, 0, key, value)
        dense.append((key, value))
    if logits is not None:
        query *= _stretch(query, dense, case, scale, logits)
    query = packed_query(query.astype(DTYPES[case.dtype]), case, rng)
    seq_lens = np.array(case.seq_lens, np.int32)
    alibi_slopes = slopes(case.num_heads) if case.alibi else None
    return Problem(
        case, query, key_cache, value_cache, tables, seq_lens, alibi_slopes, scale, dense=dense
    )


def _stretch(query, dense, case, scale, logits):
    """Factors [num_seqs, num_heads, 1] that bring each row's largest |score| to `logits`."""
    factors = np.ones((*query.shape[:2], 1))
    for seq, (key, _) in enumerate(dense):
        for head in range(case.num_heads) if len(key) else ():
            k = oracle.values(key[:, head // case.group]) * case.scales[0]
            factors[seq, head] = logits / np.abs(scale * (k @ query[seq, head])).max()
    return factors


def needles(case: Case, seq_len: int, tokens) -> Problem:
    """One sequence of `seq_len` tokens for each of `tokens`, which alone answers its query.

    The sequences share their blocks, except the one that holds the needle: its key is aligned
    with the queries so that it takes most of the weight.
    """
    rng = np.random.default_rng([case.seed, seq_len, *tokens])
    num_seqs, block_size = len(tokens), case.block_size
    length = -(-seq_len // block_size)
    num_blocks = length + num_seqs + 3
    key_cache, value_cache = empty_caches(case, num_blocks, rng)
    order = rng.permutation(num_blocks).astype(np.int32)
    shared, private = order[:length], order[length:]
    shape = 2, seq_len, case.num_kv_heads, case.head_size
    key, value = rng.standard_normal(shape, np.float32)
    key, value = (store(array, case, s) for array, s in zip((key, value), case.scales, strict=True))
    write(case, key_cache, value_cache, shared, 0, key, value)

    scale = case.head_size**-0.5
    direction = rng.standard_normal((num_seqs, case.num_kv_heads, case.head_size))
    noise = rng.standard_normal((num_seqs, case.num_kv_heads, case.group, case.head_size))
    query = (direction[:, :, None] + 0.1 * noise).reshape(num_seqs, case.num_heads, -1)
    # The other scores are normal with the deviation of |direction| / sqrt(head_size), about 1.
    wanted = np.log(seq_len) + 4.0
    norm = np.sum(direction**2, axis=-1, keepdims=True)
    needle = direction * wanted / (scale * norm)

    tables = np.full((num_seqs, length + 2), WILD_IDS[1], np.int32)
    tables[:, :length] = shared
    for seq, token in enumerate(tokens):
        page = token // block_size
        tables[seq, page] = private[seq]
        start = page * block_size
        stop = min(start + block_size, seq_len)
        own_key, own_value = key[start:stop].copy(), value[start:stop]
        own_key[token - start] = store(needle[seq], case, case.scales[0])
        write(case, key_cache, value_cache, tables[seq], start, own_key, own_value)
    return Problem(
        case,
        packed_query(query.astype(DTYPES[case.dtype]), case, rng),
        key_cache,
        value_cache,
        tables,
        np.full(num_seqs, seq_len, np.int32),
        slopes(case.num_heads) if case.alibi else None,
        scale,
    )


def edges(seq_len, *sizes):
    """The first and last token of every run of each of `sizes` tokens."""
    starts = {start for size in sizes for start in range(0, seq_len, size)}
    return sorted({t for s in starts for t in (s - 1, s) if t >= 0} | {seq_len - 1})
