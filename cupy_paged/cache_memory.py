"""The key and value arrays of all layers, in one piece of memory: a block is at one place in each.

So a run of blocks is copied to the host or back in one go, whatever the number of layers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupy_paged.arrays import Array, array
from cupy_paged.batches import current_for, fill_with
from cupy_paged.dtypes import FLOATS, FP8, STORAGE, itemsize
from cupy_paged.layouts import LAYOUTS, geometry
from cupy_paged.results import empty
from cupy_paged.streams import launch_stream

_NAN = {"float16": 0x7E00, "bfloat16": 0x7FC0, "float32": 0x7FC00000}
_NAN_FP8 = 0x7F
_INTEGERS = {1: "uint8", 2: "int16", 4: "int32"}
_STAND_INS = {1: "uint8", 2: "float16", 4: "float32"}


def storage_dtype(dtype: str) -> str:
    """Dtype of the arrays of a cache of `dtype`.

    Raises ValueError for what no cache can hold.
    """
    if dtype in FP8:
        return "uint8"
    if dtype not in FLOATS:
        raise ValueError(f"dtype: got {dtype!r}, needs one of {', '.join([*FLOATS, *FP8])}")
    return dtype


def cache_shapes(
    layout: str, num_blocks: int, num_kv_heads: int, head_size: int, block_size: int, dtype: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a key and a value cache of `dtype` in `layout`, see cupy_paged.layouts.

    Raises ValueError for sizes that are not supported.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: unknown {layout!r}, needs one of {', '.join(LAYOUTS)}")
    size = itemsize(storage_dtype(dtype))
    if layout == "HND":
        key = value = (num_blocks, num_kv_heads, block_size, head_size)
    elif layout == "NHD":
        key = value = (num_blocks, block_size, num_kv_heads, head_size)
    else:
        x = 16 // size
        if head_size % x:
            raise ValueError(
                f'head_size: got {head_size}, layout "vllm" of {dtype} needs a multiple of {x}'
            )
        key = (num_blocks, num_kv_heads, head_size // x, block_size, x)
        value = (num_blocks, num_kv_heads, head_size, block_size)
    stand_ins = [
        array(np.empty((0, *shape[1:]), STORAGE[_STAND_INS[size]]), name)
        for name, shape in (("key_cache", key), ("value_cache", value))
    ]
    geometry(layout, *stand_ins, storage_dtype(dtype))
    return key, value


def _apart(leader: Array, part: Any) -> Any:
    """A part of the memory, as an array with no other beside it as far as torch knows.

    What shares torch's storage with something else that is written, torch.compile copies.
    """
    if leader.framework != "torch":
        return part
    import torch

    with torch.cuda.device_of(part):  # torch exports from the current device alone
        return torch.from_dlpack(part)


class CacheMemory:
    """The arrays of a cache, beside `leader`.

    key_caches,      of each layer, as `cache_shapes` says
    value_caches
    whole            the memory of all, [2 * num_layers, num_blocks, elements of a block]: the keys
                     of all layers, then the values
    """

    def __init__(
        self, leader: Array, num_layers: int, layout: str, num_blocks: int, dtype: str, **shape: int
    ) -> None:
        shapes = cache_shapes(layout, num_blocks, dtype=dtype, **shape)
        stream = launch_stream(leader.owner, None)
        elements = math.prod(shapes[0][1:])
        size = (2 * num_layers, num_blocks, elements)
        self._leader, self._dtype = leader, dtype
        self.whole = empty(leader, "cache", size, storage_dtype(dtype), stream)
        caches = [
            _apart(leader, self.whole.owner[i].reshape(-1)).reshape(shapes[i // num_layers])
            for i in range(2 * num_layers)
        ]
        self.key_caches, self.value_caches = caches[:num_layers], caches[num_layers:]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers, keys and values."""
        num_arrays, _, elements = self.whole.shape
        return num_arrays * elements * itemsize(self.whole.dtype)

    def fill_with_nan(self, blocks: Any, stream: int) -> None:
        """Queues NaN for some blocks of all layers, or for all of them, `...`."""
        name = _INTEGERS[itemsize(self.whole.dtype)]
        kind: Any = np.dtype(name)
        if self._leader.framework == "torch":
            import torch

            kind = getattr(torch, name)
        with current_for(self._leader, stream):
            fill_with(self.whole.owner.view(kind)[:, blocks], _NAN.get(self._dtype, _NAN_FP8))
