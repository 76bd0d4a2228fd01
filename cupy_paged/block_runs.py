"""Copies of runs of blocks from one array to another: long ones by the driver, short by a kernel.

The copy engines need some 3 us for each copy, whatever its length. A kernel that reads and writes
host memory where it is moves short pieces as fast as long ones, but takes multiprocessors.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence

import numpy as np

from cupy_paged import gpu
from cupy_paged.arrays import HOST, Array
from cupy_paged.compiler import Kernel, template
from cupy_paged.dtypes import itemsize
from cupy_paged.launch import ParamStruct, launch

NUM_THREADS = 256
LONG_RUN = 1 << 20  # bytes
MAX_PAIRS = 250  # of one launch, as in kernels/swap_blocks.cu
HOST_GRID = 32  # thread blocks: what the way to the host needs, and the steps beside can spare
UNIT = 32 * 4  # accesses that a warp makes at a time

_PAIR_FIELDS = [
    f"pairs[{i}].{field}" for i in range(MAX_PAIRS) for field in ("source", "destination")
]

PARAMS = ParamStruct(
    "SwapBlocksParams",
    f"""
    pointer  source destination
    int64    source_stride destination_stride block_bytes
    int64    {" ".join(_PAIR_FIELDS)}
    int      num_pairs
    """,
)


@functools.cache
def swap_kernel(width: int) -> Kernel:
    """The copy from one array to another of blocks that may be moved `width` bytes at a time."""
    return Kernel("swap_blocks.cu", template("swap_blocks", width, NUM_THREADS), NUM_THREADS)


def access_width(*numbers: int) -> int:
    """The most bytes, 16 or less, that divide addresses, steps and sizes."""
    bits = functools.reduce(operator.or_, numbers, 16)
    return bits & -bits


def filled(numbers: Iterable[int], length: int) -> list[int]:
    """The numbers, with zeros for those that are missing."""
    found = list(numbers)
    return found + [0] * (length - len(found))


def runs(pairs: np.ndarray) -> list[tuple[int, int, int]]:
    """(first source, first destination, length) of the blocks that follow each other on both sides.

    >>> runs(np.array([[1, 5], [2, 6], [3, 8]]))
    [(1, 5, 2), (3, 8, 1)]

    pairs    int64 [num_pairs, 2], sorted
    """
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(pairs, axis=0) != 1).any(axis=1)]))
    lengths = np.diff(np.append(starts, len(pairs)))
    return [
        (*pair, length)
        for pair, length in zip(pairs[starts].tolist(), lengths.tolist(), strict=True)
    ]


def copy_runs(
    source: Array,
    destination: Array,
    runs: Sequence[tuple[int, int, int]],
    block_bytes: int,
    device: int,
    stream: int,
) -> None:
    """Queues copies of runs of blocks, as `runs` has them.

    Host arrays are pinned.
    """
    ends = [
        (a.pointer, gpu.mapped_address(a.pointer) if a.device is HOST else a.pointer)
        for a in (source, destination)
    ]
    steps = [a.strides[0] * itemsize(a.dtype) for a in (source, destination)]
    mapped = [address for _, address in ends if address is not None]
    pairs: list[int] = []
    for first, target, length in runs:
        if len(mapped) == 2 and length * block_bytes < LONG_RUN:
            for i in range(length):
                pairs += first + i, target + i
            continue
        gpu.copy_rows(
            device,
            stream,
            ends[1][0] + target * steps[1],
            steps[1],
            ends[0][0] + first * steps[0],
            steps[0],
            block_bytes,
            length,
        )
    if not pairs:
        return
    width = access_width(block_bytes, *mapped, *steps)
    kernel = swap_kernel(width)
    warps = NUM_THREADS // 32
    units_of_block = -(-block_bytes // (UNIT * width))
    to_host = HOST in (source.device, destination.device)
    for start in range(0, len(pairs), 2 * MAX_PAIRS):
        some = pairs[start : start + 2 * MAX_PAIRS]
        fields = filled(some, len(_PAIR_FIELDS))
        params = PARAMS.pack_in_order([*mapped, *steps, block_bytes, *fields, len(some) // 2])
        work = -(-len(some) // 2 * units_of_block // warps)
        launch(kernel, device, stream, min(work, HOST_GRID) if to_host else work, params)
