"""Paged-attention kernels for any program that holds GPU arrays."""

from cupy_paged.attention import paged_attention, paged_attention_v1, paged_attention_v2
from cupy_paged.block_allocator import BlockAllocator, NeverFits, OutOfBlocks
from cupy_paged.block_ops import copy_blocks, swap_blocks
from cupy_paged.cache_ops import convert_fp8, reshape_and_cache, reshape_and_cache_flash
from cupy_paged.checked_mode import checked
from cupy_paged.kv_cache import PagedKVCache
from cupy_paged.layout_ops import convert_layout, gather_cache
from cupy_paged.merge import merge_attn_states
from cupy_paged.mla import concat_and_cache_mla

__version__ = "0.1.0"

__all__ = [
    "BlockAllocator",
    "NeverFits",
    "OutOfBlocks",
    "PagedKVCache",
    "checked",
    "concat_and_cache_mla",
    "convert_fp8",
    "convert_layout",
    "copy_blocks",
    "gather_cache",
    "merge_attn_states",
    "paged_attention",
    "paged_attention_v1",
    "paged_attention_v2",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "swap_blocks",
]
