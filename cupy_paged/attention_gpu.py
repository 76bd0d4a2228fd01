"""Attention over arrays on a GPU: the kernels for a call, their scratch and their launch."""

from __future__ import annotations

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
from cupy_paged.counters import SIZE
from cupy_paged.dtypes import is_fp8
from cupy_paged.launch import cache_strides, prepare, scale_fields
from cupy_paged.masks import BlockSparse
from cupy_paged.prepared_call import PreparedCall

OUT, LSE, TMP_OUT, K_SCALE, V_SCALE = map(
    PARAMS.pointers.index, ("out", "lse", "tmp_out", "k_scale_array", "v_scale_array")
)


def prepare_attention(
    call: Call, made: dict[int, Array], out: Array, scratch: Scratch | None, partition_size: int
) -> PreparedCall:
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
            "group_size": num_heads // cache.num_kv_heads,
            "tiles_per_group": plan.tiles_per_group,
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
    unread = []
    if not reads_scales:
        scales = (K_SCALE, call.k_scale), (V_SCALE, call.v_scale)
        unread = [place for place, scale in scales if isinstance(scale, Array)]
    # Without the caller's scratch there are places for ours, whether or not it is needed.
    tmp_out_bytes, state_bytes = _scratch_bytes(call, 0 if direct else max_partitions)
    return PreparedCall(
        query,
        launches,
        PARAMS.template(fields),
        made=made,
        unread=unread,
        scratch_bytes=0 if scratch is not None else tmp_out_bytes + 2 * state_bytes,
        scratch=() if scratch is not None else (0, tmp_out_bytes, tmp_out_bytes + state_bytes),
        scratch_at=TMP_OUT,
        num_counters=WORK_COUNTERS + tiles,
    )


def _scratch_bytes(call: Call, num_partitions: int) -> tuple[int, int]:
    """Size of tmp_out, and of either of the states beside it."""
    num_seqs, num_heads, head_size = call.query.shape
    num_states = num_seqs * num_heads * num_partitions
    return 4 * num_states * head_size, 4 * num_states


def workspace_bytes(call: Call) -> int:
    """Device memory that is enough for scratch and counters of a call, on whatever chip."""
    max_partitions = most_partitions(call.capacity)
    tmp_out_bytes, state_bytes = _scratch_bytes(call, 0 if max_partitions == 1 else max_partitions)
    num_seqs, num_heads = call.state_shape  # no chip has more tiles than heads
    return tmp_out_bytes + 2 * state_bytes + SIZE * (WORK_COUNTERS + num_seqs * num_heads)


def attend_on_gpu(
    call: Call,
    out: Array,
    lse: Array | None,
    makes_out: bool,
    scratch: Scratch | None,
    partition_size: int,
    workspace: int = 0,
) -> PreparedCall:
    """Queues a checked call, into arrays of the caller's device.

    makes_out         whether out was made for the caller, as lse always is
    partition_size    of the caller's scratch; else BY_LENGTH, each sequence's own length decides
    workspace         address of `workspace_bytes` that are the call's; 0 to have them seen to

    Returns what serves other calls like this one.
    """
    made = {}
    if makes_out:
        made[OUT] = out
    if lse is not None:
        made[LSE] = lse
    prepared = prepare_attention(call, made, out, scratch, partition_size)
    states = () if scratch is None else (scratch.tmp_out, scratch.exp_sums, scratch.max_logits)
    # In the order of PARAMS.
    given = (out, lse, *states, *call[:5], call.alibi_slopes, call.k_scale, call.v_scale)
    prepared.first(call.query, given, call.stream, workspace)
    return prepared
