"""A `PagedKVCache` of a few small blocks on the host, and rows for it."""

import numpy as np

from cupy_paged import PagedKVCache


def new(num_layers=1, num_blocks=8, **options):
    options = {
        "num_kv_heads": 2, "head_size": 8, "block_size": 4, "dtype": "float32",
        "framework": "numpy", **options,
    }  # fmt: skip
    return PagedKVCache(num_layers, num_blocks, **options)


def ones(count, num_heads=2):
    return np.ones((count, num_heads, 8), np.float32)
