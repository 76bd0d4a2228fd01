"""Checked mode: lengths, block ids and slots, which only the device knows, looked at before a call.

Ops neither wait for what lies on a device nor read it on the host, so a wrong block id is found by
nobody: it reads or writes another sequence's block. In checked mode an op copies its index arrays
to the host and raises for the first number that is wrong, before anything runs.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

import numpy as np

from cupy_paged import gpu
from cupy_paged.arrays import HOST, Array
from cupy_paged.dtypes import itemsize
from cupy_paged.graph_breaks import breaks_graphs
from cupy_paged.streams import ordered

_OFF = "", "0", "off", "no", "false"
_is_on = ContextVar(
    "cupy_paged_checked", default=os.environ.get("CUPY_PAGED_CHECK", "").lower() not in _OFF
)

is_on = _is_on.get
"""Whether calls of this context are checked."""


@breaks_graphs
@contextlib.contextmanager
def checked(on: bool = True) -> Iterator[None]:
    """Checks the contents of index arrays, too, before each call inside the `with`.

    >>> import numpy as np
    >>> import cupy_paged
    >>> query, cache = np.ones((1, 2, 8), np.float32), np.ones((4, 1, 16, 8), np.float32)
    >>> tables, lens = np.array([[2, 7]], np.int32), np.array([20], np.int32)
    >>> with cupy_paged.checked():
    ...     cupy_paged.paged_attention(query, cache, cache, tables, lens, layout="HND")
    Traceback (most recent call last):
    IndexError: block_tables: sequence 0 has block 7 at position 1, needs 0 to 3

    on    False leaves a part unchecked where the environment variable CUPY_PAGED_CHECK=1 has turned
          the mode on for the whole process

    What is looked at: `seq_lens` and the live part of `block_tables`; `slot_mapping`, also for two
    tokens in one slot; `cu_seq_lens` and `seq_starts`; the pairs of `copy_blocks`. A wrong length
    is a ValueError, a block or slot that does not exist an IndexError; either names the sequence
    or token, the position and the value. Nothing has run by then, caches are as they were, and the
    device can be used on.

    Each call waits for its index arrays, so that this is for tests and for the search of a fault.
    A call that is captured into a CUDA graph cannot wait: it is not checked, with a RuntimeWarning.
    The mode is of this thread (of this context, see contextvars).
    """
    token = _is_on.set(on)
    try:
        yield
    finally:
        _is_on.reset(token)


def check_sequences(
    lens: Array,
    tables: Array,
    capacity: int,
    block_size: int,
    num_blocks: int,
    stream: int,
    framework: str,
) -> None:
    """Lengths, and the blocks of tables that hold so many tokens.

    stream, framework    where the op runs, here and in the other checks
    """
    found = _values(stream, framework, lens, tables)
    if found is None:
        return
    lengths, blocks = found
    if (seq := _first((lengths < 0) | (lengths > capacity))) is not None:
        raise ValueError(
            f"seq_lens: sequence {seq} has {lengths[seq]} tokens, needs 0 to {capacity}"
        )
    _check_blocks(blocks, np.zeros_like(lengths), lengths, block_size, num_blocks)


def check_gathered(
    ends: Array,
    starts: Array | None,
    tables: Array,
    block_size: int,
    num_blocks: int,
    stream: int,
    framework: str,
) -> None:
    """Which tokens of sequences a gather takes, and their blocks."""
    found = _values(stream, framework, ends, tables, *([] if starts is None else [starts]))
    if found is None:
        return
    ends_of, blocks, *starts_of = found
    if (seq := _first(np.diff(ends_of, prepend=0) < 0)) is not None:
        before = ends_of[seq - 1] if seq else 0
        raise ValueError(f"cu_seq_lens: {ends_of[seq]} at {seq}, needs at least {before}")
    lengths = np.diff(ends_of).astype(np.int64)
    first = starts_of[0].astype(np.int64) if starts_of else np.zeros_like(lengths)
    if (seq := _first(first < 0)) is not None:
        raise ValueError(f"seq_starts: sequence {seq} starts at token {first[seq]}, needs 0")
    capacity = blocks.shape[1] * block_size
    if (seq := _first((lengths > 0) & (first + lengths > capacity))) is not None:
        raise IndexError(
            f"block_tables: sequence {seq} is asked for {first[seq] + lengths[seq]} tokens, "
            f"its row has blocks of {capacity}"
        )
    _check_blocks(blocks, first, first + lengths, block_size, num_blocks)


def check_slots(slot_mapping: Array, num_slots: int, stream: int, framework: str) -> None:
    """Slots that tokens are written to; negative ones are skipped."""
    found = _values(stream, framework, slot_mapping)
    if found is None:
        return
    (slots,) = found
    if (token := _first(slots >= num_slots)) is not None:
        raise IndexError(
            f"slot_mapping: token {token} has slot {slots[token]}, needs less than {num_slots}"
        )
    order = np.argsort(slots, kind="stable")
    ordered_slots = slots[order]
    again = (ordered_slots[1:] == ordered_slots[:-1]) & (ordered_slots[1:] >= 0)
    if (i := _first(again)) is not None:
        raise ValueError(
            f"slot_mapping: tokens {order[i]} and {order[i + 1]} have one slot, {ordered_slots[i]}"
        )


def values(a: Array, stream: int, framework: str) -> np.ndarray | None:
    """What an array of at most two dimensions holds. None while the stream is being captured."""
    found = _values(stream, framework, a)
    return None if found is None else found[0]


def _values(stream: int, framework: str, *arrays: Array) -> list[np.ndarray] | None:
    device = arrays[0].device
    if device is HOST:
        return [a.bits for a in arrays]
    if gpu.is_capturing(device, stream):
        message = "a call that is captured into a CUDA graph is not checked"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return None
    found = [np.empty(a.shape, a.dtype) for a in arrays]
    with ordered(stream, device, framework, arrays):
        for a, copy in zip(arrays, found, strict=True):
            if copy.size:
                row, rows = copy.shape[-1] * copy.itemsize, copy.size // copy.shape[-1]
                step = a.strides[0] * itemsize(a.dtype) if copy.ndim > 1 else row
                gpu.copy_rows(device, stream, copy.ctypes.data, row, a.pointer, step, row, rows)
        gpu.synchronize(device, stream)
    return found


def _first(wrong: np.ndarray) -> int | None:
    """Where the first true one is, counted in order."""
    return int(wrong.argmax()) if wrong.any() else None


def _check_blocks(
    blocks: np.ndarray, first: np.ndarray, end: np.ndarray, block_size: int, num_blocks: int
) -> None:
    """Blocks of the tokens from `first` to before `end` of each sequence."""
    positions = np.arange(blocks.shape[1])
    live = (positions >= first[:, None] // block_size) & (positions * block_size < end[:, None])
    wrong = live & ((blocks < 0) | (blocks >= num_blocks))
    if (place := _first(wrong)) is not None:
        seq, position = divmod(place, blocks.shape[1])
        raise IndexError(
            f"block_tables: sequence {seq} has block {blocks[seq, position]} at position "
            f"{position}, needs 0 to {num_blocks - 1}"
        )
