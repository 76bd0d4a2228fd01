"""Attention over arrays on a GPU: the kernels for a call, their scratch and their launch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from cupy_paged import counters, gpu, in_flight
from cupy_paged.arrays import Array
from cupy_paged.attention_checks import Call, Scratch
from cupy_paged.attention_kernels import (
    PARAMS,
    WORK_COUNTERS,
    HeadProblem,
    attention_plan,
    most_partitions,
)
from cupy_paged.dtypes import is_fp8
from cupy_paged.launch import (
    Launch,
    ParamTemplate,
    cache_strides,
    prepare,
    queue,
    scale_fields,
)
from cupy_paged.masks import BlockSparse
from cupy_paged.prepared import Likeness, find
from cupy_paged.results import blank, pool_memory, scratch_memory
from cupy_paged.streams import Ordering, current, pointer_of


class PreparedAttention(NamedTuple):
    """A checked call without its addresses and its stream."""

    framework: str  # of the query
    device: int
    shape: tuple[int, int, int]  # of query and out
    dtype: str
    reads_scales: bool
    launches: list[Launch]
    params: ParamTemplate
    num_counters: int
    num_states: int  # partitions of all heads; 0 where none needs scratch of ours

    @property
    def scratch_bytes(self) -> int:
        return 4 * self.num_states * (self.shape[2] + 2)

    def states(self, scratch: int) -> tuple[int, int, int]:
        """Addresses of tmp_out, exp_sums and max_logits in scratch memory."""
        exp_sums = scratch + 4 * self.num_states * self.shape[2]
        return scratch, exp_sums, exp_sums + 4 * self.num_states


def prepare_attention(
    call: Call, out: Array, scratch: Scratch | None, partition_size: int
) -> PreparedAttention:
    """The kernels of a call, loaded; raises RuntimeError where a capture forbids to load them."""
    query, cache = call.query, call.geometry
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
    tiles = num_seqs * cache.num_kv_heads * plan.tiles_per_group
    launches = [
        prepare(plan.kernel, query.device, call.stream, tiles * max_partitions, resident=True)
    ]
    if plan.combine is not None:
        launches.append(prepare(plan.combine, query.device, call.stream, num_seqs * num_heads))

    mask = call.mask or BlockSparse(0, 1, 1, 0)
    reads_scales = is_fp8(call.cache_dtype)
    fields = (
        scale_fields("k_scale", call.k_scale if reads_scales else 1.0)
        | scale_fields("v_scale", call.v_scale if reads_scales else 1.0)
        | cache_strides("key_strides", cache.key_strides)
        | cache_strides("value_strides", cache.value_strides)
        | {
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
    return PreparedAttention(
        query.framework,
        query.device,
        query.shape,
        query.dtype,
        reads_scales,
        launches,
        PARAMS.template(fields),
        WORK_COUNTERS + tiles,
        0 if direct or scratch is not None else num_seqs * num_heads * max_partitions,
    )


def attend_on_gpu(
    call: Call, out: Array, lse: Array | None, scratch: Scratch | None, partition_size: int
) -> PreparedAttention:
    """Queues a checked call, into arrays of the caller's device.

    partition_size    of the caller's scratch; else BY_LENGTH, each sequence's own length decides

    Returns what serves other calls like this one.
    """
    query, stream = call.query, call.stream
    prepared = prepare_attention(call, out, scratch, partition_size)
    written = [a for a in (out, lse, *(scratch or ())) if a is not None]
    ordering = Ordering(stream, query.device, query.framework, [*call.arrays, *written])
    ordering.before()
    given = (*call[:5], call.alibi_slopes, call.k_scale, call.v_scale, out)
    pointers = [a.pointer if isinstance(a, Array) else 0 for a in given]
    lse_pointer = 0 if lse is None else lse.pointer
    memory = contextlib.nullcontext(0)
    if prepared.num_states:
        memory = scratch_memory(query, prepared.scratch_bytes, stream)
    with (
        memory as address,
        counters.counters(query.device, stream, prepared.num_counters) as work,
    ):
        if scratch is not None:
            states = scratch.tmp_out.pointer, scratch.exp_sums.pointer, scratch.max_logits.pointer
        else:
            states = prepared.states(address)
        _queue(prepared, stream, pointers, lse_pointer, states, work)
    ordering.after()
    return prepared


def attend_again(
    seen: Likeness | None, query: Any, out: Any, return_lse: bool, stream: Any
) -> tuple[Any, Any] | None:
    """Queues a call if one like it was queued before, without checking it again.

    seen    with the pointers of query, key_cache, value_cache, block_tables, seq_lens,
            alibi_slopes, k_scale, v_scale and out

    Returns (out, lse), lse None unless asked for. Returns None, and has done nothing, for a call
    unlike all others, and while the stream is being captured: a graph needs memory of its own.
    """
    prepared = find(seen)
    if prepared is None:
        return None
    pointers = seen.pointers
    framework, device, shape, dtype, *_ = prepared
    stream = current(framework, device) if stream is None else pointer_of(stream)
    with gpu.on(device):
        if gpu.is_capturing(device, stream):
            return None
        lse, lse_pointer = None, 0
        if out is None:
            out = blank(framework, device, query, shape, dtype, stream)
            pointers[-1] = _pointer(framework, out)
        if return_lse:
            lse = blank(framework, device, query, shape[:2], "float32", stream)
            lse_pointer = _pointer(framework, lse)
        address = memory = 0
        if prepared.num_states:
            address, memory = pool_memory(framework, device, query, prepared.scratch_bytes, stream)
        work = counters.of_stream(device, stream, prepared.num_counters)
        _queue(prepared, stream, pointers, lse_pointer, prepared.states(address), work)
        del memory  # not before
        in_flight.release_finished(device, stream)
    return out, lse


def _pointer(framework: str, x: Any) -> int:
    return x.data_ptr() if framework == "torch" else x.data.ptr


def _queue(
    prepared: PreparedAttention,
    stream: int,
    pointers: Sequence[int],
    lse: int,
    states: tuple[int, int, int],
    work: int,
) -> None:
    *inputs, k_scale, v_scale, out = pointers
    if not prepared.reads_scales:
        k_scale = v_scale = 0
    # In the order of PARAMS.
    params = prepared.params.filled(out, lse, *states, *inputs, k_scale, v_scale, work)
    queue(prepared.launches, prepared.device, stream, params)
    prepared.params.give_back(params)
