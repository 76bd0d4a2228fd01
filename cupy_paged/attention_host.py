"""Attention over arrays on the host, by the NumPy reference."""

from __future__ import annotations

import numpy as np

from cupy_paged import checks, reference
from cupy_paged.arrays import Array
from cupy_paged.attention_checks import PARTITION_SIZE, Call, Scratch
from cupy_paged.dtypes import decode, encode


def attend_on_host(
    call: Call, out: Array, lse: Array | None, scratch: Scratch | None, partition_size: int
) -> None:
    lens = call.seq_lens.bits
    arguments = {
        "query": decode(call.query.bits, call.query.dtype),
        "key_cache": call.key_cache.bits,
        "value_cache": call.value_cache.bits,
        "block_tables": call.block_tables.bits,
        "seq_lens": lens,
        "scale": call.scale,
        "layout": call.geometry.layout,
        "cache_dtype": call.cache_dtype,
        "k_scale": checks.host_scale(call.k_scale),
        "v_scale": checks.host_scale(call.v_scale),
        "alibi_slopes": None if call.alibi_slopes is None else call.alibi_slopes.bits,
        "mask": call.mask,
        "max_seq_len": call.capacity,
    }
    partition_size = partition_size or PARTITION_SIZE
    longest = min(call.capacity, int(lens.max()))
    if scratch is None and longest <= partition_size:
        result, result_lse = reference.paged_attention(**arguments)
    else:
        if scratch is not None:
            num_partitions = scratch.exp_sums.shape[2]
        else:
            num_partitions = -(-longest // partition_size)
        *states, live = reference.paged_attention_partitions(
            **arguments, partition_size=partition_size, num_partitions=num_partitions
        )
        result, result_lse = reference.combine_partitions(*states, live)
        for target, state in zip(scratch or (), states, strict=False):
            written = np.broadcast_to(live[:, None], state.shape[:3])
            target.bits[written] = encode(state[written], target.dtype)
    out.bits[...] = encode(result, out.dtype)
    if lse is not None:
        lse.bits[...] = result_lse
