"""What the operators must compute: NumPy in float64, one sequence and one head at a time.

Written from the formulas alone and kept apart from `cupy_paged`, so that one mistake cannot
hide in both. Arrays hold real values: bfloat16 and float8 as the dtypes of `ml_dtypes`.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

FLT_MAX = float(np.finfo(np.float32).max)
FP8 = {
    "fp8": ml_dtypes.float8_e4m3fn,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}


class BlockSparse(NamedTuple):
    """The arguments `blocksparse_*` and `tp_rank`."""

    local_blocks: int
    vert_stride: int
    block_size: int
    head_sliding_step: int
    tp_rank: int = 0


class Partitions(NamedTuple):
    """What `paged_attention_v2` leaves in its scratch; only where `live` is anything written."""

    exp_sums: np.ndarray
    max_logits: np.ndarray
    tmp_out: np.ndarray
    live: np.ndarray


def values(array, kv_cache_dtype="auto"):
    """The numbers an array stands for; uint8 bytes are read as `kv_cache_dtype` says."""
    if array.dtype == np.uint8:
        array = array.view(FP8[kv_cache_dtype])
    return array.astype(np.float64)


def gather_keys(key_cache, blocks, offsets, kv_head, layout):
    """Keys [num_tokens, head_size] of the tokens at `offsets` in `blocks`, as stored."""
    if layout == "vllm":
        keys = key_cache[blocks, kv_head, :, offsets, :]
        return keys.reshape(len(blocks), keys.shape[1] * keys.shape[2])
    return gather_values(key_cache, blocks, offsets, kv_head, layout)


def gather_values(value_cache, blocks, offsets, kv_head, layout):
    """Values [num_tokens, head_size] of the tokens at `offsets` in `blocks`, as stored."""
    if layout == "vllm":
        return value_cache[blocks, kv_head, :, offsets]
    if layout == "HND":
        return value_cache[blocks, kv_head, offsets]
    return value_cache[blocks, offsets, kv_head]


def attended(seq_len, head, num_heads, num_kv_heads, block_size, sparse):
    """Whether each of a sequence's tokens is attended by `head`."""
    token = np.arange(seq_len)
    if sparse is None or sparse.vert_stride <= 1:
        return np.ones(seq_len, bool)
    query_block = (seq_len - 1) // sparse.block_size
    key_block = (token // block_size * block_size) // sparse.block_size
    step = sparse.head_sliding_step
    if step >= 0:
        offset = (sparse.tp_rank * num_heads + head) * step + 1
    else:
        kv_head = head // (num_heads // num_kv_heads)
        offset = (sparse.tp_rank * num_kv_heads + kv_head) * -step + 1
    remote = (key_block + offset) % sparse.vert_stride == 0
    local = key_block > query_block - sparse.local_blocks
    return remote | local


def softmax_sum(logits, value):
    """Attention over the given tokens: (output, maximum, sum of exponentials)."""
    if len(logits) == 0:
        return np.zeros(value.shape[1]), -np.inf, 0.0
    maximum = logits.max()
    weight = np.exp(logits - maximum)
    return weight @ value / weight.sum(), maximum, weight.sum()


def heads_of(
    query, key_cache, value_cache, table, seq_len, *, scale, layout, block_size,
    kv_cache_dtype="auto", k_scale=1.0, v_scale=1.0, alibi_slopes=None, sparse=None,
):  # fmt: skip
    """Yield (head, logits, values, attended) of one sequence, over its live tokens."""
    num_heads = query.shape[0]
    num_kv_heads = value_cache.shape[2 if layout == "NHD" else 1]
    if kv_cache_dtype not in FP8 and key_cache.dtype.itemsize > 1:
        k_scale = v_scale = 1.0
    token = np.arange(seq_len)
    blocks, offsets = table[token // block_size], token % block_size
    for kv_head in range(num_kv_heads):
        key = gather_keys(key_cache, blocks, offsets, kv_head, layout)
        value = gather_values(value_cache, blocks, offsets, kv_head, layout)
        key = values(key, kv_cache_dtype) * k_scale
        value = values(value, kv_cache_dtype) * v_scale
        group = num_heads // num_kv_heads
        for head in range(kv_head * group, (kv_head + 1) * group):
            logits = scale * (key @ values(query[head]))
            if alibi_slopes is not None:
                logits = logits + float(alibi_slopes[head]) * (token - seq_len + 1)
            mask = attended(seq_len, head, num_heads, num_kv_heads, block_size, sparse)
            yield head, logits, value, mask


def paged_attention(
    query, key_cache, value_cache, block_tables, seq_lens, *, block_size, max_seq_len=None, **rules
):
    """(out [num_seqs, num_heads, head_size], lse [num_seqs, num_heads]), both float64."""
    num_seqs, num_heads, head_size = query.shape
    out = np.zeros((num_seqs, num_heads, head_size))
    lse = np.full((num_seqs, num_heads), -np.inf)
    capacity = block_tables.shape[1] * block_size
    if max_seq_len is not None:
        capacity = min(capacity, max_seq_len)
    for seq, seq_len in enumerate(seq_lens.tolist()):
        if seq_len <= 0:
            continue
        if seq_len > capacity:
            out[seq], lse[seq] = np.nan, np.nan
            continue
        row = query[seq], key_cache, value_cache, block_tables[seq], seq_len
        for head, logits, value, mask in heads_of(*row, block_size=block_size, **rules):
            out[seq, head], maximum, total = softmax_sum(logits[mask], value[mask])
            lse[seq, head] = maximum + np.log(total) if total else -np.inf
    return out, lse


def paged_attention_partitions(
    query, key_cache, value_cache, block_tables, seq_lens, *,
    block_size, partition_size, num_partitions, **rules,
):  # fmt: skip
    """The scratch of `paged_attention_v2`, in float64."""
    num_seqs, num_heads, head_size = query.shape
    shape = num_seqs, num_heads, num_partitions
    found = Partitions(
        np.zeros(shape), np.zeros(shape), np.zeros((*shape, head_size)),
        np.zeros((num_seqs, num_partitions), bool),
    )  # fmt: skip
    for seq, seq_len in enumerate(seq_lens.tolist()):
        row = query[seq], key_cache, value_cache, block_tables[seq], max(seq_len, 0)
        for head, logits, value, mask in heads_of(*row, block_size=block_size, **rules):
            for part, start in enumerate(range(0, len(logits), partition_size)):
                tokens = slice(start, start + partition_size)
                here = mask[tokens]
                state = softmax_sum(logits[tokens][here], value[tokens][here])
                if not here.any():
                    state = np.zeros(head_size), -FLT_MAX, len(here)
                at = seq, head, part
                found.tmp_out[at], found.max_logits[at], found.exp_sums[at] = state
                found.live[seq, part] = True
    return found


def merge_attn_states(prefix_output, prefix_lse, suffix_output, suffix_lse, with_context=None):
    """(output [num_tokens, num_heads, head_size], lse [num_heads, num_tokens]), both float64."""
    num_tokens, num_heads, _ = prefix_output.shape
    with_context = num_tokens if with_context is None else with_context
    output = np.empty(prefix_output.shape)
    lse = np.empty((num_heads, num_tokens))
    for token in range(num_tokens):
        for head in range(num_heads):
            prefix, suffix = values(prefix_output[token, head]), values(suffix_output[token, head])
            p, s = float(prefix_lse[head, token]), float(suffix_lse[head, token])
            if token >= with_context:
                output[token, head], lse[head, token] = suffix, s
            elif np.isinf(p):
                output[token, head] = prefix if np.isinf(s) else suffix
                lse[head, token] = -np.inf if np.isinf(s) else s
            elif np.isinf(s):
                output[token, head], lse[head, token] = prefix, p
            else:
                maximum = max(p, s)
                p_weight, s_weight = np.exp(p - maximum), np.exp(s - maximum)
                total = p_weight + s_weight
                output[token, head] = (p_weight * prefix + s_weight * suffix) / total
                lse[head, token] = maximum + np.log(total)
    return output, lse


def quantise(array, scale, kv_cache_dtype):
    """Float values as float8: divided by `scale` in float32, clipped, rounded once."""
    dtype = FP8[kv_cache_dtype]
    limit = float(ml_dtypes.finfo(dtype).max)
    with np.errstate(over="ignore", invalid="ignore"):
        quotient = array.astype(np.float32) / np.float32(scale)
    return np.clip(quotient, -limit, limit).astype(dtype)


def reshape_and_cache(
    key, value, key_cache, value_cache, slot_mapping, *,
    layout, block_size, kv_cache_dtype="auto", k_scale=1.0, v_scale=1.0,
):  # fmt: skip
    """Copies of the caches with the tokens of `key` and `value` in their slots."""
    key_cache, value_cache = key_cache.copy(), value_cache.copy()
    if kv_cache_dtype in FP8:
        key = quantise(key, k_scale, kv_cache_dtype).view(key_cache.dtype)
        value = quantise(value, v_scale, kv_cache_dtype).view(value_cache.dtype)
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, block_size)
        for head in range(key.shape[1]):
            if layout == "vllm":
                chunks = key[token, head].reshape(key_cache.shape[2], key_cache.shape[4])
                key_cache[block, head, :, offset, :] = chunks
                value_cache[block, head, :, offset] = value[token, head]
            else:
                at = (block, head, offset) if layout == "HND" else (block, offset, head)
                key_cache[at], value_cache[at] = key[token, head], value[token, head]
    return key_cache, value_cache


def copy_blocks(cache, block_mapping):
    """A copy of `cache` with block i where block j was, for each pair (i, j) without a negative."""
    copied = cache.copy()
    for source, destination in block_mapping.tolist():
        if min(source, destination) >= 0:
            copied[destination] = cache[source]
    return copied


def gather_cache(key_cache, value_cache, tables, lengths, starts, *, layout, block_size):
    """(key, value) [num_tokens, num_kv_heads, head_size] of all sequences, as stored."""
    num_kv_heads = value_cache.shape[2 if layout == "NHD" else 1]
    found = []
    for table, length, start in zip(tables, lengths, starts, strict=True):
        tokens = np.arange(start, start + length)
        at = table[tokens // block_size], tokens % block_size
        for cache, gather in ((key_cache, gather_keys), (value_cache, gather_values)):
            heads = [gather(cache, *at, head, layout) for head in range(num_kv_heads)]
            found.append(np.stack(heads, axis=1))
    return np.concatenate(found[::2]), np.concatenate(found[1::2])


def concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, *, kv_cache_dtype="auto", scale=1.0):
    """A copy of the cache with the tokens of `kv_c` and `k_pe` in their slots."""
    kv_cache = kv_cache.copy()
    rank, block_size = kv_c.shape[1], kv_cache.shape[1]
    if kv_cache_dtype in FP8:
        kv_c, k_pe = (
            quantise(rows, scale, kv_cache_dtype).view(kv_cache.dtype) for rows in (kv_c, k_pe)
        )
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            row = kv_cache[slot // block_size, slot % block_size]
            row[:rank], row[rank:] = kv_c[token], k_pe[token]
    return kv_cache
