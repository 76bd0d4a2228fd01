"""What attention and the cache writers read of a batch, in arrays that keep their addresses."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from cupy_paged import gpu
from cupy_paged.arrays import HOST, Array
from cupy_paged.results import empty, torch_stream
from cupy_paged.sequences import Sequence
from cupy_paged.staging import Piece, Staging

INT32, INT64 = np.dtype(np.int32), np.dtype(np.int64)


class Batch(NamedTuple):
    """Some sequences, and the pending tokens of them that one step computes.

    block_tables    int32 [num_rows, max_num_blocks_per_seq]
    seq_lens        int32 [num_rows]; 0 in padded rows
    slot_mapping    int64 [num_tokens], where the tokens' keys and values go; -1 for padding
    positions       int64 [num_tokens], of each token in its sequence; 0 for padding
    token_ids       int64 [num_tokens]; -1 where unknown, 0 for padding
    last_tokens     int64 [num_seqs], on the host: where in the tokens each sequence's last one is,
                    -1 for a sequence with none in this batch
    completed       int64, on the host: which of the sequences this batch brings to their end.
                    `last_tokens[completed]` are the tokens to sample after
    max_seq_len     upper bound on seq_lens, on the host
    ends            of each sequence: itself, how many of its tokens are written after this step,
                    and its version now
    """

    block_tables: Any
    seq_lens: Any
    slot_mapping: Any
    positions: Any
    token_ids: Any
    last_tokens: np.ndarray
    completed: np.ndarray
    max_seq_len: int
    ends: tuple[tuple[Sequence, int, int], ...]

    def __repr__(self) -> str:
        rows, tokens = len(self.seq_lens), len(self.slot_mapping)
        return f"<Batch of {rows} rows and {tokens} tokens, of {len(self.ends)} sequences>"


class HostBatch(NamedTuple):
    """The arrays of a `Batch` on the host; `tokens` holds slots, positions and ids."""

    tokens: np.ndarray  # int64 [3, num_tokens]
    seq_lens: np.ndarray  # int32 [num_rows]
    block_tables: np.ndarray  # int32 [num_rows, longest table here]
    blocks: np.ndarray  # int32, of all sequences
    last_tokens: np.ndarray  # int64 [num_seqs]
    completed: np.ndarray  # int64
    ends: tuple[tuple[Sequence, int, int], ...]


def on_host(
    sequences: Collection[Sequence],
    block_size: int,
    each_token: bool = False,
    max_tokens: int | None = None,
    num_seqs: int | None = None,
    num_tokens: int | None = None,
) -> HostBatch:
    """Lays out a batch; arguments as of `PagedKVCache.batch`.

    Raises ValueError for a sequence named twice, and for more rows or tokens than the padding has.
    """
    if len(set(sequences)) < len(sequences):
        raise ValueError("sequences: one is named twice")
    starts = np.array([s.num_written for s in sequences], INT64)
    pending = counts = np.array([len(s.tokens) for s in sequences], INT64) - starts
    if max_tokens is not None:
        before = np.cumsum(counts) - counts
        counts = np.clip(max_tokens - before, 0, counts)
    ends = starts + counts
    live = int(counts.sum())

    num_rows = len(sequences) if each_token else _padded("num_seqs", len(sequences), num_seqs)
    blocks = np.frombuffer(b"".join([s.blocks for s in sequences]), INT32)
    widths = np.array([len(s.blocks) for s in sequences], INT64)
    longest = int(widths.max(initial=0))
    tables = np.zeros((num_rows, longest), INT32)
    tables[: len(sequences)][np.arange(longest) < widths[:, None]] = blocks

    whose = np.repeat(np.arange(len(sequences)), counts)
    positions = np.arange(live) + np.repeat(ends - np.cumsum(counts), counts)
    slots = tables[whose, positions // block_size].astype(INT64) * block_size
    slots += positions % block_size
    ids = [
        token
        for s, start, end in zip(sequences, starts.tolist(), ends.tolist(), strict=True)
        for token in s.tokens[start:end]
    ]
    tokens = np.zeros((3, _padded("num_tokens", live, num_tokens)), INT64)
    tokens[0] = -1
    tokens[:, :live] = slots, positions, ids
    lens = ends
    if each_token:
        num_rows = tokens.shape[1]
        if num_seqs not in (None, num_rows):
            raise ValueError(f"num_seqs: got {num_seqs}, but each token has a row: {num_rows}")
        lens = positions + 1
        rows = np.zeros((num_rows, longest), INT32)
        np.take(tables, whose, axis=0, out=rows[:live])
        tables = rows
    seq_lens = np.zeros(num_rows, INT32)
    seq_lens[: len(lens)] = lens
    return HostBatch(
        tokens,
        seq_lens,
        tables,
        blocks,
        np.where(counts > 0, np.cumsum(counts) - 1, -1),
        np.flatnonzero((counts > 0) & (counts == pending)),
        tuple(zip(sequences, ends.tolist(), [s.version for s in sequences], strict=True)),
    )


def _padded(name: str, live: int, padded: int | None) -> int:
    if padded is None:
        return live
    if live > padded:
        raise ValueError(f"{name}: got {padded}, the batch has {live}")
    return padded


def current_for(leader: Array, stream: int) -> contextlib.AbstractContextManager[None]:
    """Where arrays beside `leader` can be assigned to, on a stream."""
    if leader.framework == "cupy":
        return gpu.using(leader.device, stream)
    if leader.framework == "torch":
        return torch_stream(leader.device, stream)
    return contextlib.nullcontext()


def fill_with(x: Any, value: int) -> None:
    """Queues a value for all of an array. torch would wait for the device to assign it."""
    (x.fill_ if hasattr(x, "fill_") else x.fill)(value)


class Buffers:
    """Arrays for batches of up to so many rows, tokens and blocks a row, beside `leader`."""

    def __init__(
        self, leader: Array, num_rows: int, num_tokens: int, max_blocks: int, stream: int
    ) -> None:
        self.num_rows, self.num_tokens, self.max_blocks = num_rows, num_tokens, max_blocks
        self._tokens = empty(leader, "tokens", (3, num_tokens), "int64", stream)
        self._seq_lens = empty(leader, "seq_lens", (num_rows,), "int32", stream)
        self._tables = empty(leader, "block_tables", (num_rows, max_blocks), "int32", stream)
        with current_for(leader, stream):
            for made in (self._tokens, self._seq_lens, self._tables):
                fill_with(
                    made.owner, 0
                )  # so that a table's unused entries are blocks that there are
        self._staging: Staging | None = None
        if leader.device is not HOST:
            sizes = (3 * num_tokens, INT64), (num_rows, INT32), (num_rows * max_blocks, INT32)
            arrays = [made.owner for made in (self._tokens, self._seq_lens, self._tables)]
            self._staging = Staging(leader.device, Staging.num_bytes(*sizes), arrays)

    def fits(self, host: HostBatch) -> bool:
        """Whether the arrays are large enough."""
        num_rows, max_blocks = host.block_tables.shape
        return (
            num_rows <= self.num_rows
            and host.tokens.shape[1] <= self.num_tokens
            and max_blocks <= self.max_blocks
        )

    def fill(self, host: HostBatch, max_seq_len: int, stream: int) -> Batch:
        """Sends a batch into the arrays: the one before is no more."""
        num_rows, max_blocks = host.block_tables.shape
        num_tokens = host.tokens.shape[1]
        if self._staging is None:
            self._tokens.bits[:, :num_tokens] = host.tokens
            self._seq_lens.bits[:num_rows] = host.seq_lens
            self._tables.bits[:num_rows, :max_blocks] = host.block_tables
        else:
            pieces = [
                Piece(host.tokens, self._tokens.pointer, self.num_tokens * INT64.itemsize),
                Piece(host.seq_lens[None], self._seq_lens.pointer, self.num_rows * INT32.itemsize),
                Piece(host.block_tables, self._tables.pointer, self.max_blocks * INT32.itemsize),
            ]
            self._staging.send(stream, pieces)
        tokens = self._tokens.owner
        return Batch(
            self._tables.owner[:num_rows],
            self._seq_lens.owner[:num_rows],
            *(tokens[kind, :num_tokens] for kind in range(3)),
            host.last_tokens,
            host.completed,
            max_seq_len,
            host.ends,
        )
