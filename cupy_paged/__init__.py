"""Paged-attention kernels for any program that holds GPU arrays."""

from cupy_paged.attention import paged_attention, paged_attention_v1, paged_attention_v2
from cupy_paged.cache_ops import convert_fp8, reshape_and_cache, reshape_and_cache_flash
from cupy_paged.merge import merge_attn_states

__version__ = "0.1.0"

__all__ = [
    "convert_fp8",
    "merge_attn_states",
    "paged_attention",
    "paged_attention_v1",
    "paged_attention_v2",
    "reshape_and_cache",
    "reshape_and_cache_flash",
]
