"""Paged attention in NumPy and float64: the oracle of the tests, and what host arrays run.

For one sequence and one head, over the tokens t < seq_len of its blocks:

    logit[t] = scale * dot(query, key[t]) + slope * (t - seq_len + 1)
    lse      = log(sum_t exp(logit[t]))                          natural logarithm
    out      = sum_t exp(logit[t] - lse) * value[t]

A sequence without tokens has out = 0 and lse = -inf. One with more tokens than its row of
`block_tables` (or `max_seq_len`) has room for gives NaN rather than a wrong answer.

Caches come as *storage* (see `dtypes`), strided views included, and only the blocks that a
sequence lives in are read. Dead slots, dead blocks and dead table entries may hold anything.

Sources: vLLM's `paged_attention_v2`, `merge_attn_states` and `reshape_and_cache` for the contract;
Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018) for the merge.
"""

import numpy as np

from cupy_paged.dtypes import decode, encode, is_fp8
from cupy_paged.masks import BlockSparse

LOWEST = float(np.finfo(np.float32).min)
"""The logit of a token that a mask hides, by vLLM's contract for the scratch of v2."""

_BLOCK_SIZE_AXIS = {"NHD": 1, "HND": 2, "vllm": 3}


def by_token(cache: np.ndarray, layout: str) -> np.ndarray:
    """View a key or value cache as [num_blocks, block_size, num_kv_heads, head_size].

    The "vllm" key cache keeps its head_size in two axes, [..., head_size/x, x].
    """
    return np.moveaxis(cache, _BLOCK_SIZE_AXIS[layout], 1)


def paged_attention(
    query: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    block_tables: np.ndarray,
    seq_lens: np.ndarray,
    *,
    scale: float,
    layout: str,
    cache_dtype: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    alibi_slopes: np.ndarray | None = None,
    mask: BlockSparse | None = None,
    max_seq_len: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of one query token per sequence over its paged keys and values.

    query                    [num_seqs, num_heads, head_size], values of any float dtype
    key_cache, value_cache   storage of `cache_dtype`, in `layout` "vllm", "HND" or "NHD"
    block_tables             int32 [num_seqs, max_num_blocks_per_seq]
    seq_lens                 int32 [num_seqs]; the query is the token at seq_len - 1
    k_scale, v_scale         value of a cached 1.0; used for fp8 caches only
    alibi_slopes             [num_heads]

    Returns out [num_seqs, num_heads, head_size] and lse [num_seqs, num_heads], float64.
    Raises IndexError for a block of a live token that the cache does not have.
    """
    exp_sums, max_logits, tmp_out, _ = paged_attention_partitions(
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        scale=scale,
        layout=layout,
        cache_dtype=cache_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
        alibi_slopes=alibi_slopes,
        mask=mask,
        max_seq_len=max_seq_len,
        partition_size=2**31,
        num_partitions=1,
    )
    return tmp_out[:, :, 0], _lse(exp_sums, max_logits)[:, :, 0]


@np.errstate(all="ignore")
def paged_attention_partitions(
    query: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    block_tables: np.ndarray,
    seq_lens: np.ndarray,
    *,
    scale: float,
    layout: str,
    cache_dtype: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    alibi_slopes: np.ndarray | None = None,
    mask: BlockSparse | None = None,
    max_seq_len: int | None = None,
    partition_size: int,
    num_partitions: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Attention over each run of `partition_size` tokens of a sequence on its own.

    Arguments as in `paged_attention`. Returns, in float64 unless noted,

    exp_sums     [num_seqs, num_heads, num_partitions], sum of exp(logit - max_logits)
    max_logits   [num_seqs, num_heads, num_partitions]
    tmp_out      [num_seqs, num_heads, num_partitions, head_size], normalised
    live         bool [num_seqs, num_partitions], whether the partition has tokens at all

    Dead partitions hold 0, -inf, 0. Live ones hidden whole by the mask hold their number of
    tokens, LOWEST, 0. Sequences too long hold NaN in all partitions, which then count as live.
    """
    num_seqs, num_heads, head_size = query.shape
    keys, values = by_token(key_cache, layout), by_token(value_cache, layout)
    block_size, num_kv_heads = keys.shape[1:3]
    heads = (num_kv_heads, num_heads // num_kv_heads)
    if is_fp8(cache_dtype):
        scale *= k_scale
    else:
        v_scale = 1.0
    query = scale * query.astype(np.float64).reshape(num_seqs, *heads, head_size)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.astype(np.float64).reshape(*heads, 1)
    if mask is not None:
        offsets = [mask.head_offset(head, num_heads, num_kv_heads) for head in range(num_heads)]
        head_offsets = np.reshape(offsets, (*heads, 1))

    block_tables = block_tables.astype(np.uint32)  # a negative block must not count from the end
    capacity = min(block_tables.shape[1] * block_size, partition_size * num_partitions)
    if max_seq_len is not None:
        capacity = min(capacity, max_seq_len)

    exp_sums = np.zeros((num_seqs, *heads, num_partitions))
    max_logits = np.full_like(exp_sums, -np.inf)
    tmp_out = np.zeros((*exp_sums.shape, head_size))
    live = np.zeros((num_seqs, num_partitions), bool)

    for row, seq_len in enumerate(seq_lens.tolist()):
        if seq_len > capacity:
            exp_sums[row] = max_logits[row] = tmp_out[row] = np.nan
            live[row] = True
            continue
        for partition, start in enumerate(range(0, seq_len, partition_size)):
            stop = min(start + partition_size, seq_len)
            first = start // block_size
            blocks = block_tables[row, first : -(-stop // block_size)]
            tokens = slice(start - first * block_size, stop - first * block_size)
            try:
                key = _gather(keys, blocks, cache_dtype)[:, tokens]
                value = _gather(values, blocks, cache_dtype)[:, tokens]
            except IndexError:
                bad = np.argmax(blocks >= len(keys))
                raise IndexError(
                    f"block_tables[{row}, {first + bad}]: block {blocks.view(np.int32)[bad]} "
                    f"of a live token, needs 0 <= block < {len(keys)}"
                ) from None

            logits = query[row] @ key.swapaxes(1, 2)  # [num_kv_heads, group, num_tokens]
            if alibi_slopes is not None:
                logits += alibi_slopes * np.arange(start - seq_len + 1, stop - seq_len + 1)
            if mask is not None:
                page_starts = np.arange(start, stop) // block_size * block_size
                attended = _attended(mask, page_starts, seq_len, head_offsets)
                logits = np.where(attended, logits, LOWEST)
            maximum = logits.max(-1, keepdims=True)
            weights = np.exp(np.subtract(logits, maximum, out=logits), out=logits)
            total = weights.sum(-1, keepdims=True)
            out = weights @ value if mask is None else _weigh(weights, value, attended)

            max_logits[row, ..., partition] = maximum[..., 0]
            exp_sums[row, ..., partition] = total[..., 0]
            tmp_out[row, ..., partition, :] = out * (v_scale / total)
            live[row, partition] = True

    by_head = (num_seqs, num_heads, num_partitions)
    return (
        exp_sums.reshape(by_head),
        max_logits.reshape(by_head),
        tmp_out.reshape(*by_head, head_size),
        live,
    )


@np.errstate(all="ignore")
def combine_partitions(
    exp_sums: np.ndarray, max_logits: np.ndarray, tmp_out: np.ndarray, live: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Merge the partitions of each sequence, as `paged_attention_partitions` returns them.

    What dead partitions hold is not looked at.
    Returns out [num_seqs, num_heads, head_size] and lse [num_seqs, num_heads], float64.
    """
    live = live[:, None]
    lse = np.where(live, _lse(exp_sums, max_logits), -np.inf)
    maximum = lse.max(-1, keepdims=True)
    weights = np.where(lse == -np.inf, 0.0, np.exp(lse - maximum))
    total = weights.sum(-1, keepdims=True)
    weights /= np.where(total == 0, 1.0, total)
    out = weights[..., None, :] @ np.where(live[..., None], tmp_out, 0.0)
    return out[..., 0, :], (maximum + np.log(total))[..., 0]


@np.errstate(all="ignore")
def merge_attn_states(
    prefix_output: np.ndarray,
    prefix_lse: np.ndarray,
    suffix_output: np.ndarray,
    suffix_lse: np.ndarray,
    prefill_tokens_with_context: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over prefix and suffix together, from attention over each.

    prefix_output, suffix_output   [num_tokens, num_heads, head_size], any float dtype
    prefix_lse, suffix_lse         [num_heads, num_tokens], natural log; infinite, of either sign,
                                   where there was nothing to attend to
    prefill_tokens_with_context    tokens from here on have no prefix: suffix output and lse are
                                   copied as they are

    Where one side is empty the other's output is taken exactly, whatever the empty one holds;
    where both are, the output is prefix_output and lse is -inf.
    Returns output [num_tokens, num_heads, head_size] and lse [num_heads, num_tokens], float64.
    """
    prefix, suffix = prefix_output.astype(np.float64), suffix_output.astype(np.float64)
    p_lse = np.where(np.isinf(prefix_lse), -np.inf, prefix_lse.astype(np.float64))
    s_lse = np.where(np.isinf(suffix_lse), -np.inf, suffix_lse.astype(np.float64))

    lse = np.logaddexp(p_lse, s_lse)
    p_weight, s_weight = (np.exp(side - lse).T[..., None] for side in (p_lse, s_lse))
    # Where |lse| is so large that log(2) is lost in it, the weights do not add up to 1.
    output = (prefix * p_weight + suffix * s_weight) / (p_weight + s_weight)
    output = np.where(np.isneginf(p_lse).T[..., None], suffix, output)
    output = np.where(np.isneginf(s_lse).T[..., None], prefix, output)

    if prefill_tokens_with_context is not None:
        output[prefill_tokens_with_context:] = suffix[prefill_tokens_with_context:]
        lse[:, prefill_tokens_with_context:] = suffix_lse[:, prefill_tokens_with_context:]
    return output, lse


@np.errstate(all="ignore")
def reshape_and_cache(
    key: np.ndarray,
    value: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    slot_mapping: np.ndarray,
    *,
    layout: str,
    dtype: str,
    cache_dtype: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Write keys and values into their cache slots, in place.

    key, value               [num_tokens or more, num_kv_heads, head_size], storage of `dtype`
    key_cache, value_cache   storage of `cache_dtype`, in `layout` "vllm", "HND" or "NHD"
    slot_mapping             int64 [num_tokens], block * block_size + offset; negative: skip
    k_scale, v_scale         for fp8 caches, which store saturate(x / scale), divided in float32

    Between equal dtypes bits are copied, NaN payloads and all.
    Raises IndexError for a slot past the end of the cache, before anything is written.
    """
    num_blocks, block_size = by_token(key_cache, layout).shape[:2]
    token = np.flatnonzero(slot_mapping >= 0)
    if token.size and (last := slot_mapping[token].max()) >= num_blocks * block_size:
        raise IndexError(
            f"slot_mapping: slot {last} is past the end, needs less than {num_blocks * block_size} "
            f"({num_blocks} blocks of {block_size})"
        )
    slot = np.divmod(slot_mapping[token], block_size)
    for source, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        cache = by_token(cache, layout)
        rows = source[token]
        if dtype != cache_dtype:
            rows = encode(decode(rows, dtype, np.float32) / np.float32(scale), cache_dtype)
        cache[slot] = rows.reshape(len(token), *cache.shape[2:])


def _gather(cache: np.ndarray, blocks: np.ndarray, dtype: str) -> np.ndarray:
    """Values of the blocks of a `by_token` cache, [num_kv_heads, num_tokens, head_size]."""
    pages = cache[blocks]
    pages = decode(pages.transpose(2, 0, 1, *range(3, pages.ndim)), dtype)
    num_kv_heads, num_pages, block_size = pages.shape[:3]
    return pages.reshape(num_kv_heads, num_pages * block_size, -1)


def _attended(
    mask: BlockSparse, page_starts: np.ndarray, seq_len: int, head_offsets: np.ndarray
) -> np.ndarray:
    """Whether each head sees the tokens whose pages start there, bool [*heads, num_tokens]."""
    newest = (seq_len - 1) // mask.block_size
    block = page_starts // mask.block_size
    local = block > newest - mask.local_blocks
    return local | ((block + head_offsets) % mask.vert_stride == 0)


@np.errstate(all="ignore")
def _lse(exp_sums: np.ndarray, max_logits: np.ndarray) -> np.ndarray:
    """Log-sum-exp of a partition, -inf for one that is empty or hidden whole by the mask."""
    return np.where(max_logits <= LOWEST, -np.inf, max_logits + np.log(exp_sums))


def _weigh(weights: np.ndarray, value: np.ndarray, attended: np.ndarray) -> np.ndarray:
    """`weights @ value` over the attended tokens alone, since 0 * NaN is NaN."""
    out = np.empty((*weights.shape[:2], value.shape[-1]))
    for kv_head, query_head in np.ndindex(*weights.shape[:2]):
        seen = attended[kv_head, query_head]
        out[kv_head, query_head] = weights[kv_head, query_head, seen] @ value[kv_head, seen]
    return out


@np.errstate(all="ignore")
def concat_and_cache_mla(
    kv_c: np.ndarray,
    k_pe: np.ndarray,
    kv_cache: np.ndarray,
    slot_mapping: np.ndarray,
    *,
    dtype: str,
    cache_dtype: str,
    scale: float = 1.0,
) -> None:
    """Write latents and rotary keys into their slots of an MLA cache, in place.

    kv_c, k_pe     [num_tokens or more, kv_lora_rank] and [.., pe_dim], storage of `dtype`
    kv_cache       [num_blocks, block_size, kv_lora_rank + pe_dim], storage of `cache_dtype`
    slot_mapping, scale, errors: as in `reshape_and_cache`
    """
    rows = np.concatenate([kv_c, k_pe], axis=1)[:, None]
    cache = kv_cache[:, :, None]
    reshape_and_cache(
        rows,
        rows,
        cache,
        cache,
        slot_mapping,
        layout="NHD",
        dtype=dtype,
        cache_dtype=cache_dtype,
        k_scale=scale,
        v_scale=scale,
    )


@np.errstate(all="ignore")
def gather_cache(
    key: np.ndarray,
    value: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    block_tables: np.ndarray,
    cu_seq_lens: np.ndarray,
    seq_starts: np.ndarray | None,
    *,
    layout: str,
    dtype: str,
    cache_dtype: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Gather tokens of sequences into `key` and `value`, in place.

    key, value               [num_tokens, num_kv_heads, head_size], storage of `dtype`
    key_cache, value_cache   storage of `cache_dtype`, in `layout` "vllm", "HND" or "NHD"
    block_tables             int32 [num_seqs, max_num_blocks_per_seq]
    cu_seq_lens              int32 [num_seqs + 1], where the rows of each sequence begin and end
    seq_starts               int32 [num_seqs], the first token of each; None: 0
    k_scale, v_scale         for fp8 that becomes float: code * scale, in float32

    Between equal dtypes bits are copied. Rows past the end are left out.
    Raises ValueError for a cu_seq_lens that decreases, IndexError for a token without a block,
    before anything is written.
    """
    num_blocks, block_size = by_token(key_cache, layout).shape[:2]
    ends = cu_seq_lens.astype(np.int64)
    if ends[0] < 0 or (np.diff(ends) < 0).any():
        raise ValueError("cu_seq_lens: decreases, needs the running sum of the lengths")
    seq = np.repeat(np.arange(len(block_tables)), np.diff(ends))
    row = ends[0] + np.arange(len(seq))
    seq, row = seq[row < len(key)], row[row < len(key)]
    position = row - ends[seq] + (0 if seq_starts is None else seq_starts[seq].astype(np.int64))
    page, offset = np.divmod(position, block_size)
    capacity = block_tables.shape[1] * block_size
    if (lost := (position < 0) | (position >= capacity)).any():
        first = np.argmax(lost)
        length = np.count_nonzero(seq == seq[first])
        if position[first] >= 0 and length > capacity:  # too many, wherever they start
            raise IndexError(
                f"cu_seq_lens: {length} tokens of sequence {seq[first]}, needs at most the "
                f"{capacity} that block_tables has columns for"
            )
        raise IndexError(
            f"seq_starts: token {position[first]} of sequence {seq[first]}, needs a token that "
            f"block_tables has a column for: 0 <= token < {capacity}"
        )
    block = block_tables[seq, page]
    if (lost := (block < 0) | (block >= num_blocks)).any():
        first = np.argmax(lost)
        raise IndexError(
            f"block_tables[{seq[first]}, {page[first]}]: block {block[first]} of a token to "
            f"gather, needs 0 <= block < {num_blocks}"
        )
    for target, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        rows = by_token(cache, layout)[block, offset].reshape(len(row), *key.shape[1:])
        if dtype != cache_dtype:
            rows = encode(decode(rows, cache_dtype, np.float32) * np.float32(scale), dtype)
        target[row] = rows


def convert_layout(
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    new_key_cache: np.ndarray,
    new_value_cache: np.ndarray,
    *,
    layout: str,
    new_layout: str,
) -> None:
    """Copy caches in `layout` into `new_key_cache` and `new_value_cache` in `new_layout`."""
    for source, target in ((key_cache, new_key_cache), (value_cache, new_value_cache)):
        target = by_token(target, new_layout)
        target[...] = by_token(source, layout).reshape(target.shape)
