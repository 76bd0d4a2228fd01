"""Copies of runs of blocks from one array to another: long ones by the driver, short by a kernel.

The copy engines need some 3 us for each copy, whatever its length. A kernel that reads and writes
host memory where it is moves short pieces as fast as long ones, but takes multiprocessors.
"""

from __future__ import annotations

import functools
import operator

import numpy as np

from cupy_paged import gpu
from cupy_paged.arrays import HOST, Array
from cupy_paged.compiler import Kernel, is_loaded, template
from cupy_paged.dtypes import itemsize
from cupy_paged.launch import ParamStruct, launch

NUM_THREADS = 256
LONG_RUN = 1 << 20  # bytes
MAX_PAIRS = 480  # of one launch, as in kernels/swap_blocks.cu
HOST_GRID = 32  # thread blocks: what the way to the host needs, and the steps beside can spare
UNIT = 32 * 4  # accesses that a warp makes at a time, as in kernels/block_copy.cuh

_BLOCK_ID = np.dtype(np.int32)
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


def runs(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the pairs blocks follow each other on both sides: (first pair, length) of each run.

    >>> starts, lengths = runs(np.array([[1, 5], [2, 6], [3, 8]]))
    >>> starts.tolist(), lengths.tolist()
    ([0, 2], [2, 1])

    pairs    int64 [num_pairs, 2], sorted
    """
    sources, destinations = pairs.T
    breaks = (np.diff(sources) != 1) | (np.diff(destinations) != 1)
    starts = np.flatnonzero(np.concatenate([[True], breaks]))
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
    sides = source, destination
    steps = [a.strides[0] * itemsize(a.dtype) for a in sides]
    addresses = _reached(sides, steps, block_bytes, device)
    width = access_width(block_bytes, *steps, *(addresses or ()))
    kernel = swap_kernel(width)
    if gpu.is_capturing(device, stream) and not is_loaded(kernel, device):
        addresses = None  # a capture may be the first that needs it: nobody knows that before

    starts, lengths = runs(pairs)
    is_short = lengths * block_bytes < (LONG_RUN if addresses else 0)
    for first, length in zip(starts[~is_short].tolist(), lengths[~is_short].tolist(), strict=True):
        begin, target = pairs[first].tolist()
        gpu.copy_rows(
            device,
            stream,
            destination.pointer + target * steps[1],
            steps[1],
            source.pointer + begin * steps[0],
            steps[0],
            block_bytes,
            length,
        )
    if addresses is None or not is_short.any():
        return
    short = pairs[np.repeat(is_short, lengths)].astype(_BLOCK_ID)
    units_of_block = -(-block_bytes // (UNIT * width))
    through_host = HOST in (source.device, destination.device)
    for start in range(0, len(short), MAX_PAIRS):
        some = short[start : start + MAX_PAIRS]
        work = -(-len(some) * units_of_block // (NUM_THREADS // 32))
        params = PARAMS.pack_with([*addresses, *steps, block_bytes, len(some)], some)
        launch(kernel, device, stream, min(work, HOST_GRID) if through_host else work, params)


def _reached(
    sides: tuple[Array, Array], steps: list[int], block_bytes: int, device: int
) -> list[int] | None:
    """Where the kernel finds both arrays. None if it does not reach all of them."""
    if max(a.shape[0] for a in sides) > 2**31:
        return None
    found = [
        a.pointer
        if a.device is not HOST
        else gpu.mapped_address(device, a.pointer, (a.shape[0] - 1) * step + block_bytes)
        for a, step in zip(sides, steps, strict=True)
    ]
    return None if None in found else found
