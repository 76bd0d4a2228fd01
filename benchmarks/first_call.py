"""Prints the seconds that the first call of paged_attention takes in this process, as JSON.

Run by benchmarks.compile_suite: python -m benchmarks.first_call LAYOUT DTYPES
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from benchmarks.frameworks import numpy_dtype
from benchmarks.shapes import DTYPES


def cache_shapes(layout: str, item: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of two blocks of 16 tokens, 8 KV heads of size 128."""
    if layout == "vllm":
        return (2, 8, 128 * item // 16, 16, 16 // item), (2, 8, 128, 16)
    rows = (2, 8, 16, 128) if layout == "HND" else (2, 16, 8, 128)
    return rows, rows


def main(layout: str, dtypes: str) -> float:
    import cupy

    import cupy_paged

    dtype, kv_dtype = (numpy_dtype(name) for name in DTYPES[dtypes])
    key, value = (cupy.empty(s, kv_dtype) for s in cache_shapes(layout, kv_dtype.itemsize))
    query, out = cupy.empty((1, 32, 128), dtype), cupy.empty((1, 32, 128), dtype)
    table = cupy.asarray(np.zeros((1, 1), np.int32))
    seq_lens = cupy.asarray(np.ones(1, np.int32))
    device = cupy.cuda.Device()
    device.synchronize()
    start = time.perf_counter()
    cupy_paged.paged_attention(
        query, key, value, table, seq_lens,
        layout=layout, kv_cache_dtype="fp8_e4m3" if dtypes == "fp8" else "auto", out=out,
    )  # fmt: skip
    device.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps({"seconds": main(*sys.argv[1:])}))
