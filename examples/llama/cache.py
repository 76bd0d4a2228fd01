"""The paged KV cache: one pool of blocks, and the arrays of every layer that it numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

import cupy_paged

LAYOUTS = ("HND", "NHD", "vllm")


class BlockPool:
    """Hands out block numbers. A block is the same number in every layer's cache."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.peak = 0
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def used(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self) -> int:
        if not self._free:
            raise MemoryError(f"all {self.num_blocks} cache blocks are in use")
        block = self._free.pop()
        self.peak = max(self.peak, self.used)
        return block

    def free(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))


class KVCache:
    """The key and value cache of each layer, in one layout."""

    def __init__(self, layout: str, layers: list[tuple[Any, Any]], block_size: int) -> None:
        self.layout = layout
        self.layers = layers
        self.block_size = block_size
        self.num_bytes = sum(key.nbytes + value.nbytes for key, value in layers)

    @classmethod
    def empty(
        cls,
        xp: Any,
        layout: str,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        dtype: str,
    ) -> KVCache:
        x = 16 // np.dtype(dtype).itemsize
        key_shape, value_shape = {
            "HND": ((num_blocks, num_kv_heads, block_size, head_size),) * 2,
            "NHD": ((num_blocks, block_size, num_kv_heads, head_size),) * 2,
            "vllm": (
                (num_blocks, num_kv_heads, head_size // x, block_size, x),
                (num_blocks, num_kv_heads, head_size, block_size),
            ),
        }[layout]
        # Not cleared: attention reads no slot that no token was written to.
        layers = [(xp.empty(key_shape, dtype), xp.empty(value_shape, dtype))
                  for _ in range(num_layers)]  # fmt: skip
        return cls(layout, layers, block_size)

    def write(
        self, key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any
    ) -> None:
        """Puts each row's key and value into its slot of one layer's caches."""
        arguments = (key, value, key_cache, value_cache, slot_mapping, "auto", 1.0, 1.0)
        if self.layout == "vllm":
            cupy_paged.reshape_and_cache(*arguments)
        else:
            cupy_paged.reshape_and_cache_flash(*arguments, layout=self.layout)
