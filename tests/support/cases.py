"""The attention cases: every value of every axis, spread evenly and seeded, not their product."""

import numpy as np

from support.data import Case
from support.oracle import BlockSparse

HEAD_SIZES = (8, 24, 32, 40, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256, 512)
BLOCK_SIZES = (1, 3, 5, 8, 16, 24, 32, 48, 64, 100, 128, 256)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 20, 64, 71)
DTYPES = ("float16", "bfloat16", "float32")
KV_CACHE_DTYPES = ("auto", "auto", "fp8", "fp8_e4m3", "fp8_e5m2")
LAYOUTS = ("vllm", "HND", "NHD")
# What tensor cores take: 16-byte rows, and head sizes that are whole operands.
TENSOR_HEAD_SIZES = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
TENSOR_BLOCK_SIZES = (1, 3, 5, 8, 16, 24, 32, 100, 256)
TENSOR_GROUPS = (*range(1, 17), 64, 71)
STRIDES = ("contiguous", "interleaved", "padded", "misaligned")
# (local_blocks, vert_stride, block_size in cache blocks, head_sliding_step, tp_rank)
SPARSE = (
    None,
    (1, 4, 2, 1, 0),
    None,
    (2, 3, 1, -1, 0),
    (0, 5, 1, 2, 3),
    None,
    (1, 8, 4, 0, 1),
    (3, 2, 2, -3, 2),
    (4, 1, 1, 1, 0),
)


def spread(count: int, seed: int, **axes):
    """`count` dictionaries that hold every axis's values equally often, in independent orders."""
    rng = np.random.default_rng(seed)
    columns = {
        name: [options[i] for i in rng.permutation(np.resize(np.arange(len(options)), count))]
        for name, options in axes.items()
    }
    return [{name: column[i] for name, column in columns.items()} for i in range(count)]


def attention(
    count: int, seed: int, lengths, head_sizes=HEAD_SIZES, block_sizes=BLOCK_SIZES
) -> list[Case]:
    """`count` cases; `lengths(block_size)` gives the sequence lengths of each."""
    drawn = spread(
        count,
        seed,
        dtype=DTYPES,
        kv_cache_dtype=KV_CACHE_DTYPES,
        layout=LAYOUTS,
        group=GROUPS,
        num_kv_heads=(1, 2, 3),
        head_size=head_sizes,
        block_size=block_sizes,
        alibi=(False, True, False),
        strides=STRIDES,
        sparse=SPARSE,
    )
    return [_legal(**axes, seq_lens=lengths(axes["block_size"])) for axes in drawn]


def tensor_cores(
    count: int, seed: int, lengths, head_sizes=TENSOR_HEAD_SIZES, block_sizes=TENSOR_BLOCK_SIZES
) -> list[Case]:
    """As `attention`, of cases that the kernel for tensor cores takes."""
    drawn = spread(
        count,
        seed,
        dtype=("float16", "bfloat16"),
        kv_cache_dtype=("auto", "fp8", "auto", "fp8_e5m2"),
        layout=LAYOUTS,
        group=TENSOR_GROUPS,
        num_kv_heads=(1, 2, 3),
        head_size=head_sizes,
        block_size=block_sizes,
        alibi=(False, True, False),
        strides=("contiguous", "interleaved", "padded"),
        sparse=(None,),
    )
    for axes in drawn:
        operand, row = (16, 8) if axes["kv_cache_dtype"] == "auto" else (32, 16)
        axes["head_size"] = -(-axes["head_size"] // operand) * operand
        if axes["layout"] == "vllm":  # whose rows of values run over the tokens of a block
            axes["block_size"] = -(-axes["block_size"] // row) * row
    return [_legal(**axes, seq_lens=lengths(axes["block_size"])) for axes in drawn]


def _legal(**axes) -> Case:
    if axes["group"] > 20:
        axes["num_kv_heads"] = 1
    if axes["layout"] == "vllm" and axes["kv_cache_dtype"] != "auto" and axes["head_size"] % 16:
        axes["layout"] = "HND"
    if axes["sparse"] is not None:
        local, stride, pages, step, rank = axes["sparse"]
        axes["sparse"] = BlockSparse(local, stride, pages * axes["block_size"], step, rank)
    return Case(**axes)


def around_blocks(block_size: int) -> tuple[int, ...]:
    """Lengths at the edges of cache blocks: 0, 1, a block and one more or less, and several."""
    return 0, 1, max(block_size - 1, 1), block_size, block_size + 1, 3 * block_size + 3


def around_partitions(block_size: int) -> tuple[int, ...]:
    """Lengths at the edges of cache blocks and of partitions of 512 tokens."""
    return *around_blocks(block_size), 511, 512, 513, 1030


def around_small_blocks(block_size: int) -> tuple[int, ...]:
    """Lengths at the edges of cache blocks that one partition of 512 tokens holds."""
    return tuple(length for length in around_blocks(block_size) if length + 2 * block_size <= 512)


HOST = attention(128, 1, around_blocks)
# Each is compiled for itself: few, but they meet every value of every axis.
TENSOR_CORES = [
    *tensor_cores(28, 7, around_partitions),
    *tensor_cores(8, 5, around_small_blocks, block_sizes=TENSOR_BLOCK_SIZES[:-1]),
]
GPU = [
    *attention(40, 2, around_partitions),
    *attention(14, 3, around_small_blocks),
    *TENSOR_CORES,
    # Storages that no draw has.
    Case("float32", "auto", "HND", 1, 3, 80, 24, around_partitions(24)),
    Case("float32", "fp8_e5m2", "vllm", 2, 5, 96, 8, around_partitions(8)),
]
