"""Copies of runs of blocks from one array to another: long ones by the driver, short by a kernel.

The copy engines need some 3 us for each copy, whatever its length. A kernel that reads and writes
host memory where it is moves short pieces as fast as long ones, but takes multiprocessors.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable

import numpy as np

from cupy_paged import gpu
from cupy_paged.arrays import HOST, Array
from cupy_paged.compiler import Kernel, template
from cupy_paged.dtypes import itemsize
from cupy_paged.launch import ParamStruct, launch

NUM_THREADS = 256
LONG_RUN = 1 << 20  # bytes
MAX_PAIRS = 480  # of one launch, as in kernels/swap_blocks.cu
HOST_GRID = 32  # thread blocks: what the way to the host needs, and the steps beside can spare
UNIT = 32 * 4  # accesses that a warp makes at a time

_PAIR = np.dtype(np.int32)
_PAIR_FIELDS = [
    f"pairs[{i}].{field}" for i in range(MAX_PAIRS) for field in ("source", "destination")
]

PARAMS = ParamStruct(
    "SwapBlocksParams",
    f"""
    pointer  source destination
    int64    source_stride destination_stride block_bytes num_pairs
    int      {" ".join(_PAIR_FIELDS)}
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


def runs(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the pairs blocks follow each other on both sides: (first pair, length) of each run.

    >>> starts, lengths = runs(np.array([[1, 5], [2, 6], [3, 8]]))
    >>> starts.tolist(), lengths.tolist()
    ([0, 2], [2, 1])

    pairs    int64 [num_pairs, 2], sorted
    """
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(pairs, axis=0) != 1).any(axis=1)]))
    return starts, np.diff(np.append(starts, len(pairs)))


def copy_runs(
    source: Array,
    destination: Array,
    pairs: np.ndarray,
    block_bytes: int,
    device: int,
    stream: int,
) -> None:
    """Queues copies of (block of source, block of destination), int64 [num_pairs, 2], sorted.

    Host arrays are pinned.
    """
    starts, lengths = runs(pairs)
    ends = [
        (a.pointer, gpu.mapped_address(a.pointer) if a.device is HOST else a.pointer)
        for a in (source, destination)
    ]
    steps = [a.strides[0] * itemsize(a.dtype) for a in (source, destination)]
    mapped = [address for _, address in ends if address is not None]
    reachable = len(mapped) == 2 and max(source.shape[0], destination.shape[0]) <= 2**31
    is_short = lengths * block_bytes < LONG_RUN if reachable else np.zeros(len(lengths), bool)
    for first, length in zip(starts[~is_short].tolist(), lengths[~is_short].tolist(), strict=True):
        begin, target = pairs[first].tolist()
        gpu.copy_rows(
            device,
            stream,
            ends[1][0] + target * steps[1],
            steps[1],
            ends[0][0] + begin * steps[0],
            steps[0],
            block_bytes,
            length,
        )
    short = pairs[np.repeat(is_short, lengths)].astype(_PAIR)
    if not len(short):
        return
    width = access_width(block_bytes, *mapped, *steps)
    kernel = swap_kernel(width)
    units_of_block = -(-block_bytes // (UNIT * width))
    to_host = HOST in (source.device, destination.device)
    for start in range(0, len(short), MAX_PAIRS):
        some = short[start : start + MAX_PAIRS]
        work = -(-len(some) * units_of_block // (NUM_THREADS // 32))
        params = PARAMS.pack_with([*mapped, *steps, block_bytes, len(some)], some)
        launch(kernel, device, stream, min(work, HOST_GRID) if to_host else work, params)
