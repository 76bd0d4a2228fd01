"""How an attention problem is cut into thread blocks: the sizes that its kernels are compiled for.

Every size here follows from the shape of one head's problem and from nothing of the batch. That is
what makes a sequence's result independent of its company.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

from cupy_paged.compiler import Kernel, cpp, template
from cupy_paged.dtypes import itemsize
from cupy_paged.launch import ParamStruct

# Tokens of a partition, by the sequence's own length: the same numbers as in kernels/schedule.cuh.
MIN_PARTITION_SIZE, MAX_PARTITION_SIZE = 512, 2048
ENOUGH_PARTITIONS = 64
BY_LENGTH = 0  # in place of a partition size

WORK_COUNTERS = 2  # that come before the arrivals in `Work` of kernels/attention_params.cuh

NUM_THREADS = 128
MAX_STAGE_BYTES = 32 * 1024  # of keys and values in flight at once
MAX_QUERY_FLOATS = 4096  # query channels that a thread block keeps
HEADS_PER_THREAD = 8

MMA_WORKERS = 4  # warps
MMA_HEADS = 8  # columns of an operand
MMA_ORDERS = 3
MMA_MAX_SLOTS = 32  # tiles in flight
ROOMY = 200 * 1024  # bytes of shared memory, as sm_90 and sm_100 have
RESERVED_BYTES = 1024  # of shared memory, by the system, for each thread block

PARAMS = ParamStruct(
    "AttentionParams",
    """
    pointer  out lse tmp_out exp_sums max_logits query key_cache value_cache block_tables seq_lens
    pointer  alibi_slopes k_scale_array v_scale_array work
    int64    query_stride_seq query_stride_head out_stride_seq out_stride_head
    int64    key_strides.block key_strides.head key_strides.token
    int64    value_strides.block value_strides.head value_strides.token block_tables_stride
    int      num_seqs num_heads num_kv_heads group_size tiles_per_group
    int      partition_size max_partitions max_seq_len
    float    scale k_scale v_scale
    int      sparse_local_blocks sparse_vert_stride sparse_block_size sparse_head_sliding_step
    int      tp_rank
    """,
)


class HeadProblem(NamedTuple):
    """Attention of one group of query heads over one KV head: all that a kernel is compiled for."""

    query_dtype: str
    cache_dtype: str
    layout: str
    head_size: int
    block_size: int
    group_size: int  # query heads per KV head
    key_alignment: int  # bytes
    value_alignment: int
    query_alignment: int
    has_alibi: bool
    is_block_sparse: bool


class Plan(NamedTuple):
    """The kernels of a problem, and how many of its thread blocks share a KV head."""

    kernel: Kernel
    tiles_per_group: int
    combine: Kernel | None  # joins partitions, where the first kernel leaves that to a second


def partition_size_of(seq_len: int) -> int:
    """Tokens of a partition of a sequence, where no caller's scratch decides."""
    size = MIN_PARTITION_SIZE
    while size < MAX_PARTITION_SIZE and size * ENOUGH_PARTITIONS <= seq_len:
        size *= 2
    return size


def most_partitions(capacity: int) -> int:
    """Partitions that a sequence of up to `capacity` tokens can have."""
    longest_of_most = min(capacity, MIN_PARTITION_SIZE * ENOUGH_PARTITIONS)
    return max(
        -(-longest_of_most // MIN_PARTITION_SIZE), -(-capacity // partition_size_of(capacity)), 1
    )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@functools.lru_cache(maxsize=1024)
def attention_plan(
    problem: HeadProblem, sm: int, shared_limit: int, scratch_dtype: str | None
) -> Plan:
    """The attention kernel for a problem, on a chip.

    sm               compute capability, times ten
    shared_limit     bytes of shared memory that a thread block can have
    scratch_dtype    dtype of tmp_out; None where each sequence is one partition and goes
                     straight to the output
    """
    # float32 scratch takes the most memory. The caller's must not decide, or bits depended on it.
    if sm >= 80 and (plan := _mma_plan(problem, sm, shared_limit, "float32")):
        return _mma_plan(problem, sm, shared_limit, scratch_dtype or "float32") or plan
    return _cuda_core_plan(problem, shared_limit, scratch_dtype)


def _mma_plan(problem: HeadProblem, sm: int, shared_limit: int, scratch_dtype: str) -> Plan | None:
    """A kernel of paged_attention_mma.cu; None for what it does not do.

    Its products are of 16-bit operands and its copies of 16 bytes, and matrix instructions cannot
    leave out a token for one head alone, which block-sparse attention asks for.
    """
    size = itemsize(problem.cache_dtype)
    head_size = problem.head_size
    by_channel = problem.layout == "vllm"
    if (
        problem.query_dtype == "float32"
        or problem.is_block_sparse
        or head_size % (32 if size == 1 else 16)
        or head_size > 256
        or min(problem.key_alignment, problem.value_alignment) < 16
        or (by_channel and problem.block_size * size % 16)
    ):
        return None
    tiles_per_group = -(-problem.group_size // MMA_HEADS)
    heads = -(-problem.group_size // tiles_per_group)

    # The same sizes as in kernels/warp_tiles.cuh, warp_states.cuh and paged_attention_mma.cu.
    chunks = head_size * size // 16
    padded = not by_channel and chunks % 8
    tile_bytes = 2 * 16 * 16 * (chunks | 1 if padded else chunks)
    order_bytes = heads * (head_size + 8) * 2 + 112
    # States that workers leave, and the nodes that they sum up: stages, and nodes of each. What
    # saves time here must not cost tiles in flight. Two thread blocks an SM hide each other's
    # pauses, where registers and shared memory allow. A slot is one worker's, who takes its tiles
    # in order.
    is_roomy = shared_limit >= ROOMY
    states = MMA_WORKERS if is_roomy and heads <= 4 else MMA_WORKERS // 2
    for sums, blocks in itertools.product([(2, 8)] if is_roomy else [(1, 4), (1, 1)], (2, 1)):
        sum_stages, sum_nodes = sums
        stage_bytes = sum_stages * sum_nodes * (head_size * itemsize(scratch_dtype) + 8)
        other_bytes = MMA_ORDERS * order_bytes + states * heads * (head_size + 4 + 2) * 4
        other_bytes += MMA_WORKERS * (heads * 4 + stage_bytes)
        # Barriers, and what is to be summed up.
        other_bytes += 16 * MMA_MAX_SLOTS + sum_stages * (64 + 16) + 64
        room = (shared_limit + RESERVED_BYTES) // blocks - RESERVED_BYTES - other_bytes
        slots = min(room // tile_bytes, MMA_MAX_SLOTS) // MMA_WORKERS * MMA_WORKERS
        if slots > 0 and (blocks == 1 or head_size <= 128):
            break
    else:
        return None
    shared_bytes = _up(slots * tile_bytes + other_bytes, 16)
    name = template(
        "paged_attention_mma",
        cpp(problem.query_dtype),
        cpp(problem.cache_dtype),
        cpp("Vllm" if by_channel else "Rows"),
        head_size,
        problem.block_size,
        heads,
        MMA_WORKERS,
        slots,
        states,
        sum_stages,
        sum_nodes,
        "true" if sm >= 90 and by_channel and problem.block_size == 16 else "false",
        16 if problem.query_alignment == 16 else 2,
        shared_bytes,
        blocks,
        cpp("Alibi" if problem.has_alibi else "NoBias"),
        cpp(scratch_dtype),
    )
    kernel = Kernel("paged_attention_mma.cu", name, 32 * (MMA_WORKERS + 2), shared_bytes)
    return Plan(kernel, tiles_per_group, None)


def _cuda_core_plan(problem: HeadProblem, shared_limit: int, scratch_dtype: str | None) -> Plan:
    """A kernel of paged_attention.cu, which does everything."""
    size = itemsize(problem.cache_dtype)
    head_size, block_size = problem.head_size, problem.block_size
    by_channel = problem.layout == "vllm"

    combine = None
    if scratch_dtype is None:
        sink = template("ToOutput", cpp(problem.query_dtype))
    else:
        sink = template("ToPartitions", cpp(scratch_dtype))
        dtypes = cpp(problem.query_dtype), cpp(scratch_dtype)
        combining = template("combine_partitions", *dtypes, head_size, NUM_THREADS)
        combine = Kernel("combine_partitions.cu", combining, NUM_THREADS)

    # Tokens of a tile: a warp's worth, fewer where rows are long.
    tile = 32
    while tile > 8 and 2 * tile * head_size * size > MAX_STAGE_BYTES:
        tile //= 2

    # Query heads of a thread block: the whole group, or an even share of it. The same cuts as in
    # kernels/paged_attention.cu.
    channels = 4 if by_channel else min(16 // size, 8)
    tokens = min(16 // size, 8) if by_channel else 1
    slots = NUM_THREADS // (head_size // channels)
    most_heads = min(HEADS_PER_THREAD * slots, max(MAX_QUERY_FLOATS // head_size, 1), 64)
    tiles_per_group = -(-problem.group_size // most_heads)
    group = -(-problem.group_size // tiles_per_group)
    head_slots = -(-group // HEADS_PER_THREAD)
    token_slots = min(slots // head_slots, tile // tokens)

    chunk_bytes = 16 if head_size * size % 16 == 0 else 8
    key_bytes = head_size * size // chunk_bytes * (tile + 2) * chunk_bytes
    value_bytes = head_size * (tile * size + 16) if by_channel else tile * head_size * size
    stage_bytes = _up(key_bytes, 16) + _up(value_bytes, 16)
    partial_bytes = token_slots * group * head_size * 4
    blocks_per_tile = (tile + block_size - 2) // block_size + 1
    state_bytes = group * (head_size + tile + 3) * 4 + 2 * blocks_per_tile * 4

    def shared_bytes(stages: int) -> int:
        return _up(max(stages * stage_bytes, partial_bytes) + state_bytes + 16, 16)

    stages = 2 if shared_bytes(2) <= shared_limit else 1
    key_copy = min(problem.key_alignment, chunk_bytes)
    value_copy = min(problem.value_alignment, 16)
    name = template(
        "paged_attention",
        cpp(problem.query_dtype),
        cpp(problem.cache_dtype),
        cpp("Vllm" if by_channel else "Rows"),
        head_size,
        block_size,
        group,
        tile,
        stages,
        NUM_THREADS,
        key_copy,
        value_copy,
        shared_bytes(stages),
        cpp("BlockSparse" if problem.is_block_sparse else "Dense"),
        cpp("Alibi" if problem.has_alibi else "NoBias"),
        sink,
    )
    kernel = Kernel("paged_attention.cu", name, NUM_THREADS, shared_bytes(stages))
    return Plan(kernel, tiles_per_group, combine)
