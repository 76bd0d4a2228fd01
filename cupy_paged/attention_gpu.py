"""Attention over arrays on a GPU: the kernels for a call, their scratch and their launch."""

from __future__ import annotations

import contextlib

from cupy_paged import gpu
from cupy_paged.arrays import Array
from cupy_paged.attention_checks import Call, Scratch
from cupy_paged.attention_kernels import (
    PARAMS,
    WORK_COUNTERS,
    HeadProblem,
    attention_plan,
    most_partitions,
)
from cupy_paged.counters import counters
from cupy_paged.dtypes import is_fp8
from cupy_paged.launch import cache_strides, launch, scale_fields
from cupy_paged.masks import BlockSparse
from cupy_paged.results import scratch_memory
from cupy_paged.streams import Ordering


def attend_on_gpu(
    call: Call, out: Array, lse: Array | None, scratch: Scratch | None, partition_size: int
) -> None:
    """Queues a checked call, into arrays of the caller's device.

    partition_size    of the caller's scratch; else BY_LENGTH, each sequence's own length decides
    """
    query, cache, stream = call.query, call.geometry, call.stream
    num_seqs, num_heads, head_size = query.shape
    if scratch is not None:
        max_partitions, scratch_dtype = scratch.exp_sums.shape[2], scratch.tmp_out.dtype
    else:
        max_partitions, scratch_dtype = most_partitions(call.capacity), "float32"
    direct = scratch is None and max_partitions == 1

    limits = gpu.device_limits(query.device, gpu.emulated_sm())
    problem = HeadProblem(
        query.dtype,
        call.cache_dtype,
        cache.layout,
        head_size,
        cache.block_size,
        num_heads // cache.num_kv_heads,
        cache.key_alignment,
        cache.value_alignment,
        query.alignment(range(2), head_size),
        call.alibi_slopes is not None,
        call.mask is not None,
    )
    plan = attention_plan(
        problem, limits.sm, limits.shared_bytes, None if direct else scratch_dtype
    )
    mask = call.mask or BlockSparse(0, 1, 1, 0)
    fields = (
        {name: a.pointer for name, a in zip(call._fields, call[:5], strict=False)}
        | scale_fields("k_scale", call.k_scale if is_fp8(call.cache_dtype) else 1.0)
        | scale_fields("v_scale", call.v_scale if is_fp8(call.cache_dtype) else 1.0)
        | cache_strides("key_strides", cache.key_strides)
        | cache_strides("value_strides", cache.value_strides)
        | {
            "out": out.pointer,
            "lse": 0 if lse is None else lse.pointer,
            "alibi_slopes": 0 if call.alibi_slopes is None else call.alibi_slopes.pointer,
            "query_stride_seq": query.strides[0],
            "query_stride_head": query.strides[1],
            "out_stride_seq": out.strides[0],
            "out_stride_head": out.strides[1],
            "block_tables_stride": call.block_tables.strides[0],
            "num_seqs": num_seqs,
            "num_heads": num_heads,
            "num_kv_heads": cache.num_kv_heads,
            "partition_size": partition_size,
            "max_partitions": max_partitions,
            "max_seq_len": call.capacity,
            "scale": call.scale,
            "sparse_local_blocks": mask.local_blocks,
            "sparse_vert_stride": mask.vert_stride,
            "sparse_block_size": mask.block_size,
            "sparse_head_sliding_step": mask.head_sliding_step,
            "tp_rank": mask.tp_rank,
        }
    )

    written = [a for a in (out, lse, *(scratch or ())) if a is not None]
    ordering = Ordering(stream, query.device, query.framework, [*call.arrays, *written])
    ordering.before()
    slots = num_seqs * num_heads * max_partitions
    if direct or scratch is not None:
        memory = contextlib.nullcontext(0)
    else:
        memory = scratch_memory(query, 4 * slots * (head_size + 2), stream)
    work = num_seqs * max_partitions * cache.num_kv_heads * plan.tiles_per_group
    num_counters = WORK_COUNTERS + num_seqs * cache.num_kv_heads * plan.tiles_per_group
    with memory as tmp_out, counters(query.device, stream, num_counters) as work_counters:
        if scratch is not None:
            states = {name: a.pointer for name, a in scratch._asdict().items()}
        elif direct:
            states = dict.fromkeys(Scratch._fields, 0)
        else:
            exp_sums = tmp_out + 4 * slots * head_size
            states = {"tmp_out": tmp_out, "exp_sums": exp_sums, "max_logits": exp_sums + 4 * slots}
        params = PARAMS.pack(fields | states | {"work": work_counters})
        launch(plan.kernel, query.device, stream, work, params, resident=True)
        if plan.combine is not None:
            launch(plan.combine, query.device, stream, num_seqs * num_heads, params)
    ordering.after()
