"""The cache of multi-head latent attention: one row a token, a latent and a rotary key."""

from __future__ import annotations

import functools
import math
from typing import Any

from cupy_paged import checked_mode, checks, reference
from cupy_paged.arrays import HOST, META, Array, array
from cupy_paged.compiler import Kernel, cpp, template
from cupy_paged.dtypes import FLOATS, itemsize, kv_cache_dtype_name
from cupy_paged.graph_breaks import breaks_graphs
from cupy_paged.launch import ParamStruct, launch, scale_fields
from cupy_paged.streams import launch_stream, ordered

NUM_THREADS = 128

PARAMS = ParamStruct(
    "ConcatParams",
    """
    pointer  kv_c k_pe kv_cache slot_mapping scale_array
    int64    kv_c_stride_token k_pe_stride_token cache_stride_block cache_stride_token
    int64    block_size num_slots
    int      kv_lora_rank pe_dim
    float    scale
    """,
)


@functools.lru_cache(maxsize=256)
def concat_kernel(dtype: str, cache_dtype: str, width: int) -> Kernel:
    """The writer for rows that may be moved `width` elements at a time."""
    name = template("concat_and_cache_mla", cpp(dtype), cpp(cache_dtype), width, NUM_THREADS)
    return Kernel("concat_and_cache_mla.cu", name, NUM_THREADS)


@breaks_graphs
def concat_and_cache_mla(
    kv_c: Any,
    k_pe: Any,
    kv_cache: Any,
    slot_mapping: Any,
    kv_cache_dtype: str,
    scale: Any,
    *,
    stream: Any = None,
) -> None:
    """Writes the latents and rotary keys of tokens into their slots of an MLA cache.

    >>> import numpy as np
    >>> kv_c, k_pe = np.ones((2, 4), np.float32), np.full((2, 2), 2, np.float32)
    >>> kv_cache = np.zeros((3, 16, 6), np.float32)
    >>> concat_and_cache_mla(kv_c, k_pe, kv_cache, np.array([17, -1]), "auto", 1.0)
    >>> kv_cache[1, 1].tolist()
    [1.0, 1.0, 1.0, 1.0, 2.0, 2.0]

    kv_c             [num_tokens, kv_lora_rank], float16, bfloat16 or float32; tokens may be any
                     distance apart; may have more tokens than slot_mapping
    k_pe             [num_tokens, pe_dim], as kv_c
    kv_cache         [num_blocks, block_size, kv_lora_rank + pe_dim], of the same dtype, or fp8;
                     blocks and tokens may be any distance apart; written in place, so not JAX's;
                     no element shares memory with one of another array
    slot_mapping     int64 [num_tokens], block * block_size + offset; negative: skip the token. A
                     slot past the end of the cache is an IndexError on the host, and is skipped on
                     a GPU
    kv_cache_dtype   "auto": the cache's own dtype; "fp8" = "fp8_e4m3", "fp8_e5m2": how to fill a
                     uint8 cache
    scale            float, or one-element float32 array: an fp8 cache stores saturate(x / scale);
                     any other keeps the bits
    stream           CUDA stream to run on; by default the current one of kv_c's framework

    If a slot is named twice, either token may be the one that is kept.
    Raises ValueError or TypeError, before anything is written, for arguments that do not fit.
    Source: vLLM's csrc/cache_kernels.cu, without its "fp8_ds_mla".
    """
    on = launch_stream(kv_c, stream)
    latent, rotary = array(kv_c, "kv_c", on), array(k_pe, "k_pe", on)
    cache, slots = array(kv_cache, "kv_cache", on), array(slot_mapping, "slot_mapping", on)
    scale = checks.scale(scale, "scale", on)
    given = [a for a in (latent, rotary, cache, slots, scale) if isinstance(a, Array)]
    checks.same_place(given, latent)
    for a in given:
        checks.runs_forward(a)

    checks.has_dims(latent, "[num_tokens, kv_lora_rank]")
    checks.has_dims(rotary, "[num_tokens, pe_dim]")
    for a in (latent, rotary):
        checks.is_dtype(a, *FLOATS)
        checks.is_packed(a, 1)
    num_tokens, rank = latent.shape
    pe_dim = rotary.shape[1]
    checks.is_shape(rotary, (num_tokens, pe_dim), "[num_tokens, pe_dim]")
    if rotary.dtype != latent.dtype:
        raise TypeError(f"k_pe: dtype {rotary.dtype} does not match kv_c's {latent.dtype}")
    cache_dtype = kv_cache_dtype_name(kv_cache_dtype, cache.dtype, latent.dtype, "kv_cache")
    checks.has_dims(cache, "[num_blocks, block_size, kv_lora_rank + pe_dim]")
    checks.is_writable(cache, checks.CACHE_OF_JAX)
    checks.is_packed(cache, 2)
    num_blocks, block_size, width = cache.shape
    if width != rank + pe_dim:
        raise ValueError(
            f"kv_cache: rows of {width} elements, needs kv_lora_rank + pe_dim = "
            f"{rank} + {pe_dim} = {rank + pe_dim}"
        )
    if block_size < 1:
        raise ValueError(f"kv_cache: shape {cache.shape}, needs a block_size of at least 1")
    checks.has_dims(slots, "[num_tokens]")
    checks.is_dtype(slots, "int64")
    checks.is_packed(slots)
    if slots.shape[0] > num_tokens:
        raise ValueError(
            f"slot_mapping: {slots.shape[0]} slots for kv_c's {num_tokens} tokens, needs no more"
        )
    checks.are_apart([cache], [a for a in given if a is not cache])
    if slots.shape[0] == 0 or width == 0 or latent.device == META:
        return
    if checked_mode.is_on():
        checked_mode.check_slots(slots, num_blocks * block_size, on, latent.framework)
    if latent.device is HOST:
        reference.concat_and_cache_mla(
            latent.bits,
            rotary.bits,
            cache.bits,
            slots.bits,
            dtype=latent.dtype,
            cache_dtype=cache_dtype,
            scale=checks.host_scale(scale),
        )
        return
    sizes = math.gcd(rank, pe_dim)
    width = math.gcd(
        sizes,
        latent.alignment(range(1), sizes) // itemsize(latent.dtype),
        rotary.alignment(range(1), sizes) // itemsize(rotary.dtype),
        cache.alignment(range(2), sizes) // itemsize(cache.dtype),
    )
    params = PARAMS.pack(
        scale_fields("scale", scale)
        | {
            "kv_c": latent.pointer,
            "k_pe": rotary.pointer,
            "kv_cache": cache.pointer,
            "slot_mapping": slots.pointer,
            "kv_c_stride_token": latent.strides[0],
            "k_pe_stride_token": rotary.strides[0],
            "cache_stride_block": cache.strides[0],
            "cache_stride_token": cache.strides[1],
            "block_size": block_size,
            "num_slots": num_blocks * block_size,
            "kv_lora_rank": rank,
            "pe_dim": pe_dim,
        }
    )
    kernel = concat_kernel(latent.dtype, cache_dtype, width)
    with ordered(on, latent.device, latent.framework, given):
        launch(kernel, latent.device, on, slots.shape[0], params)
