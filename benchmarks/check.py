"""Whether a system computed the right thing: a fast wrong kernel is no peer."""

from __future__ import annotations

from typing import Any

import numpy as np

import cupy_paged
from benchmarks.data import DataSets
from benchmarks.prepared import Like
from cupy_paged.dtypes import is_fp8

WRONG = 0.1
"""A larger relative error is no rounding: some peers turn the query into fp8, which costs 0.05."""


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def kv_cache_dtype(kv_dtype: str) -> str:
    return "fp8_e4m3" if is_fp8(kv_dtype) else "auto"


def ours_like(like: Like, sets: DataSets, arrays: Any) -> np.ndarray:
    """Our result of the last data set, float32 [batch, num_heads, head_size]."""
    key, value, layout = sets.caches(arrays, like.arrangement)
    out = cupy_paged.paged_attention(
        sets.query_views(arrays)[-1],
        key,
        value,
        arrays.array(like.tables[-1]),
        arrays.array(sets.seq_lens),
        scale=like.scale,
        layout=layout,
        kv_cache_dtype=kv_cache_dtype(sets.kv_dtype),
    )
    return arrays.floats(out, sets.dtype)


def sample(sets: DataSets) -> tuple[int, int]:
    """The sequence of middle length, and the last KV head: what NumPy checks ours by."""
    order = np.argsort(sets.seq_lens, kind="stable")
    return int(order[len(order) // 2]), sets.shape.num_kv_heads - 1


def expected_sample(sets: DataSets, arrays: Any, layout: str) -> np.ndarray:
    """NumPy's result of the sample in the last data set, float32 [group_size, head_size]."""
    shape = sets.shape
    seq, head = sample(sets)
    seq_len = shape.seq_lens[seq]
    blocks = sets.tables[-1, seq, : shape.blocks_per_seq[seq]]
    key, value, _ = sets.caches(arrays, layout)
    group = shape.num_heads // shape.num_kv_heads
    heads = slice(head * group, (head + 1) * group)
    query = arrays.floats(sets.query_views(arrays)[-1, seq, heads], sets.dtype)

    def tokens(cache: Any) -> np.ndarray:
        by_block = cache[:, :, head] if layout == "NHD" else cache[:, head]
        found = arrays.floats(by_block, sets.kv_dtype, rows=blocks)
        if layout == "vllm":
            # The token is the last dimension of a value, the last but one of a key.
            found = np.moveaxis(found, 2, 1)
        return found.reshape(-1, shape.head_size)[:seq_len]

    scores = query @ tokens(key).T * np.float32(shape.default_scale)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ tokens(value)


def found_sample(output: np.ndarray, sets: DataSets) -> np.ndarray:
    """The sample in our output of the last data set."""
    seq, head = sample(sets)
    group = sets.shape.num_heads // sets.shape.num_kv_heads
    return output[seq, head * group : (head + 1) * group]
