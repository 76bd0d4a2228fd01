"""Which blocks each sequence has: growth, forks, truncation and shared prefixes, without arrays."""

from __future__ import annotations

import operator
import sys
from array import array
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, NoReturn

from cupy_paged import checks
from cupy_paged.block_allocator import BlockAllocator, NeverFits
from cupy_paged.host_blocks import HostBlocks
from cupy_paged.prefix_index import UNKNOWN, Entry, PrefixIndex


class Sequence:
    """Handle of one sequence of a cache; only its cache changes it.

    `len(sequence)` is the number of its tokens, pending ones included.

    tokens        ids of all tokens, UNKNOWN where they were not given
    blocks        int32, its blocks in order; none while it is offloaded
    host_blocks   int32, the host's blocks of its written tokens while it is offloaded, else None
    num_cached    tokens that were in the cache already when it was added
    num_written   tokens whose keys and values are in the cache; the others are pending
    """

    __slots__ = (
        "blocks", "entries", "host_blocks", "num_cached", "num_written", "pool", "salt", "tokens",
        "version",
    )  # fmt: skip

    def __init__(self, pool: SequencePool, salt: Hashable) -> None:
        self.tokens: list[int] = []
        self.blocks = array("i")
        self.host_blocks: array[int] | None = None
        self.num_cached = 0
        self.num_written = 0
        self.salt = salt
        self.entries: list[Entry] = []  # of its leading blocks, or of others of the same content
        self.version = 0  # counts what may have taken tokens or blocks back
        self.pool: SequencePool | None = pool

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_pending(self) -> int:
        """Tokens that wait to be written."""
        return len(self.tokens) - self.num_written

    @property
    def is_offloaded(self) -> bool:
        """Whether it is on the host, and has to be restored before it can go on."""
        return self.host_blocks is not None

    def __reduce__(self) -> NoReturn:
        raise TypeError("sequence: can be neither copied nor pickled, see fork: it is its cache's")

    def __repr__(self) -> str:
        if self.pool is None:
            return "<Sequence, freed>"
        where = f"{len(self.blocks)} blocks"
        if self.host_blocks is not None:
            where = f"{len(self.host_blocks)} host blocks"
        return f"<Sequence of {len(self.tokens)} tokens in {where}, {self.num_pending} pending>"


class Statistics(NamedTuple):
    """What prefix caching and offloading have done, in blocks.

    hits         full blocks of added sequences that were found
    misses       full blocks of added sequences that were not
    evictions    kept blocks that were given up
    copies       shared blocks that were copied because one of their sequences went on
    offloaded    blocks that were copied to the host; those that were there already do not count
    restored     blocks that were copied back; those that were still found do not count
    """

    hits: int
    misses: int
    evictions: int
    copies: int
    offloaded: int
    restored: int

    @property
    def hit_rate(self) -> float:
        """Share of looked-up blocks that were found; 0.0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)


class SequencePool:
    """The sequences of one cache, and the block pool that they share.

    >>> pool = SequencePool(num_blocks=8, block_size=4)
    >>> first = pool.add([1, 2, 3, 4, 5])
    >>> pool.commit(first, 5)
    >>> second = pool.add([1, 2, 3, 4, 6])
    >>> second.num_cached, list(first.blocks), list(second.blocks)
    (4, [0, 1], [0, 2])

    max_blocks        most blocks that a sequence may have; all of the pool if None
    copy              called with a block's number and the number of the one to copy it to
    copy_out,         called with pairs (from, to) of blocks: of the pool and of the host, and the
    copy_in           other way
    dead              as in BlockAllocator
    prefix_caching    whether full blocks are found again by their tokens
    num_host_blocks   blocks on the host, to which sequences can be offloaded

    What raises has changed nothing. OutOfBlocks: not enough blocks now; NeverFits: not ever.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        max_blocks: int | None = None,
        copy: Callable[[int, int], None] = lambda source, destination: None,
        copy_out: Callable[[list[tuple[int, int]]], None] = lambda pairs: None,
        copy_in: Callable[[list[tuple[int, int]]], None] = lambda pairs: None,
        dead: Callable[[int], None] = lambda block: None,
        prefix_caching: bool = True,
        num_host_blocks: int = 0,
    ) -> None:
        self.block_size = block_size
        self.allocator = BlockAllocator(
            num_blocks, evicting=self._evicting, dead=dead, remedy=self._remedy
        )
        self.max_blocks = num_blocks if max_blocks is None else min(max_blocks, num_blocks)
        self.index = PrefixIndex(block_size)
        self.prefix_caching = prefix_caching
        self.sequences: dict[Sequence, None] = {}  # in the order of their adding
        self.unused_slots = 0  # of the last blocks, each sequence's counted
        self.num_taken_back = 0  # times that any sequence has lost tokens or blocks
        self.host: HostBlocks | None = None
        if num_host_blocks:
            self.host = HostBlocks(num_host_blocks, block_size, prefix_caching=prefix_caching)
        self._copy, self._copy_out, self._copy_in = copy, copy_out, copy_in
        self._hits = self._misses = self._copies = self._offloaded = self._restored = 0

    @property
    def statistics(self) -> Statistics:
        return Statistics(
            self._hits, self._misses, self.allocator.num_evictions, self._copies, self._offloaded,
            self._restored,
        )  # fmt: skip

    def add(self, tokens: Iterable[int] = (), *, count: int = 0, salt: Hashable = None) -> Sequence:
        """A new sequence of these tokens, followed by `count` unknown ones.

        Leading full blocks that are in the cache are shared, all but that of the last token:
        attention has to run for it at least. Sequences of different salts share nothing.
        """
        self._num_blocks(_count(count))  # before room is made for that many
        ids = _ids(tokens, count)
        _check_hashable(salt)
        found: list[Entry] = []
        looked_up = max(len(ids) - 1, 0) // self.block_size if self.prefix_caching else 0
        if looked_up:
            found = self.index.match(ids[: looked_up * self.block_size], salt)
        sequence = Sequence(self, salt)
        sequence.blocks.extend(self._hold(found, len(ids)))
        sequence.entries = found
        sequence.tokens = ids
        sequence.num_cached = sequence.num_written = len(found) * self.block_size
        self.sequences[sequence] = None
        self.unused_slots += self._unused(sequence)
        self._hits += len(found)
        self._misses += looked_up - len(found)
        return sequence

    def append(self, sequence: Sequence, tokens: Iterable[int] = (), *, count: int = 0) -> None:
        """Makes room for more tokens. A last block that others hold as well is copied first."""
        self.check_on_device(sequence)
        self._num_blocks(len(sequence) + _count(count))  # before room is made for that many
        ids = _ids(tokens, count)
        if not ids:
            return
        allocator = self.allocator
        needed = self._num_blocks(len(sequence) + len(ids)) - len(sequence.blocks)
        last = sequence.blocks[-1] if len(sequence) % self.block_size else None
        is_shared = last is not None and allocator.ref_count(last) > 1
        new = allocator.allocate(needed + is_shared)
        if is_shared:
            copied = new.pop()
            self._copy(last, copied)
            self._copies += 1
            sequence.blocks[-1] = copied
            allocator.free([last])
        elif last in self.index:
            # It was full and findable before it was truncated; its content ends here.
            allocator.forget(self.index.remove(last))
        sequence.blocks.extend(new)
        sequence.tokens += ids
        self.unused_slots += len(new) * self.block_size - len(ids)

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence of the same tokens in the same blocks.

        Raises ValueError where tokens are pending: both would write them into the same slots.
        """
        self.check_on_device(sequence)
        if sequence.num_pending:
            raise ValueError(
                f"sequence: {sequence.num_pending} tokens are pending; fork before they are "
                "appended, or after they are written"
            )
        self.allocator.share(sequence.blocks)
        twin = Sequence(self, sequence.salt)
        twin.tokens = sequence.tokens[:]
        twin.blocks = sequence.blocks[:]
        twin.entries = sequence.entries[:]
        twin.num_cached = twin.num_written = sequence.num_written
        self.sequences[twin] = None
        self.unused_slots += self._unused(twin)
        return twin

    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Takes back all but the first tokens, and the blocks that held the others alone."""
        self.check(sequence)
        num_tokens = checks.is_int(num_tokens, "num_tokens", 0, sys.maxsize)
        if num_tokens > len(sequence):
            raise ValueError(f"num_tokens: got {num_tokens}, the sequence has {len(sequence)}")
        self.unused_slots -= self._unused(sequence)
        sequence.num_written = min(sequence.num_written, num_tokens)
        sequence.version += 1
        self.num_taken_back += 1
        del sequence.tokens[num_tokens:], sequence.entries[num_tokens // self.block_size :]
        if sequence.host_blocks is None:
            remaining = -(-num_tokens // self.block_size)
            self.allocator.free(sequence.blocks[remaining:])
            del sequence.blocks[remaining:]
        else:
            remaining = -(-sequence.num_written // self.block_size)
            self._host().free(sequence.host_blocks[remaining:])
            del sequence.host_blocks[remaining:]
        self.unused_slots += self._unused(sequence)

    def free(self, sequence: Sequence) -> None:
        """Ends a sequence; what others hold stays, what can be found again is kept."""
        self.truncate(sequence, 0)
        del self.sequences[sequence]
        sequence.pool = None

    def offload(self, sequence: Sequence) -> None:
        """Moves what is written of a sequence to the host, and gives up all of its blocks.

        Blocks that others hold stay theirs, and what can be found again is kept.
        Raises OutOfBlocks or NeverFits, of kind "host", where the host has no room.
        """
        self.check_on_device(sequence)
        host = self._host()
        held, num_there = host.hold(sequence.tokens, sequence.num_written, sequence.salt)
        pairs = list(zip(sequence.blocks[num_there:], held[num_there:], strict=False))
        try:
            if pairs:
                self._copy_out(pairs)
        except BaseException:
            host.free(held)  # or others would find there what was never copied
            raise
        self._offloaded += len(pairs)
        self.unused_slots -= self._unused(sequence)
        self.allocator.free(sequence.blocks)
        sequence.blocks, sequence.host_blocks = array("i"), array("i", held)
        sequence.entries = []
        sequence.version += 1
        self.num_taken_back += 1

    def restore(self, sequence: Sequence) -> None:
        """Gives an offloaded sequence blocks for all of its tokens, with what it had written.

        Full blocks that are found by their tokens are shared, the others are copied back.
        """
        self.check(sequence)
        if sequence.host_blocks is None:
            raise ValueError("sequence: was not offloaded, has nothing to be restored")
        full = sequence.num_written // self.block_size * self.block_size
        found = self.index.match(sequence.tokens[:full], sequence.salt)
        blocks = self._hold(found, len(sequence))
        pairs = list(zip(sequence.host_blocks[len(found) :], blocks[len(found) :], strict=False))
        try:
            if pairs:
                self._copy_in(pairs)
        except BaseException:
            self.allocator.free(blocks)
            raise
        self._restored += len(pairs)
        self._host().free(sequence.host_blocks)
        sequence.blocks, sequence.host_blocks = array("i", blocks), None
        sequence.entries = found
        self.unused_slots += self._unused(sequence)
        self.commit(sequence, sequence.num_written)

    def commit(self, sequence: Sequence, num_tokens: int) -> None:
        """The first tokens' keys and values are written: their full blocks can be found now.

        Raises ValueError for more tokens than there are.
        """
        self.check_on_device(sequence)
        if num_tokens > len(sequence):
            raise ValueError(f"num_tokens: got {num_tokens}, the sequence has {len(sequence)}")
        sequence.num_written = max(sequence.num_written, num_tokens)
        if not self.prefix_caching:
            return
        entries, blocks = sequence.entries, sequence.blocks
        while entries and not entries[-1].is_alive:
            entries.pop()
        before = len(entries)
        self.index.extend(entries, sequence.tokens, sequence.num_written, sequence.salt, blocks)
        for i in range(before, len(entries)):
            if entries[i].block == blocks[i]:
                self.allocator.keep(blocks[i])

    def _hold(self, found: list[Entry], num_tokens: int) -> list[int]:
        """Blocks for so many tokens, those that were found first: all of them or none."""
        shared = [entry.block for entry in found]
        needed = self._num_blocks(num_tokens) - len(shared)
        self.allocator.check_available(needed, sum(map(self.allocator.is_kept, shared)))
        self.allocator.share(shared)
        return shared + self.allocator.allocate(needed)

    def _host(self) -> HostBlocks:
        if self.host is None:
            raise ValueError(
                "num_host_blocks: is 0, needs to be more for sequences to be offloaded"
            )
        return self.host

    def _evicting(self, block: int) -> None:
        self.allocator.forget(b for b in self.index.remove(block) if b != block)

    def _remedy(self) -> str:
        holders = sum(len(sequence.blocks) > 0 for sequence in self.sequences)
        who = "1 sequence" if holders == 1 else f"{holders} sequences"
        return f"; held by {who}: free {'or offload ' if self.host else ''}one"

    def _num_blocks(self, num_tokens: int) -> int:
        needed = -(-num_tokens // self.block_size)
        if needed > self.max_blocks:
            total = self.allocator.num_blocks
            limit = "in all" if self.max_blocks == total else "to a sequence"
            raise NeverFits(needed, self.max_blocks, limit)
        return needed

    def _unused(self, sequence: Sequence) -> int:
        if sequence.is_offloaded:
            return 0
        return len(sequence.blocks) * self.block_size - len(sequence)

    def check(self, sequence: Sequence) -> None:
        """Raises unless this is a live sequence of this pool: TypeError or ValueError."""
        if not isinstance(sequence, Sequence):
            raise TypeError(f"sequence: got {type(sequence).__name__}, needs a Sequence")
        if sequence.pool is not self:
            whose = "was freed" if sequence.pool is None else "is another cache's"
            raise ValueError(f"sequence: {whose}")

    def check_on_device(self, sequence: Sequence) -> None:
        """Raises as `check` does, and ValueError for a sequence that is offloaded."""
        self.check(sequence)
        if sequence.host_blocks is not None:
            raise ValueError("sequence: is offloaded, needs to be restored first")


def _count(count: int) -> int:
    return checks.is_int(count, "count", 0, sys.maxsize)


def _check_hashable(salt: Hashable) -> None:
    try:
        hash(salt)
    except TypeError as error:
        raise TypeError(f"salt: {error}, needs a value that can be hashed") from None


def _ids(tokens: Iterable[int], count: int) -> list[int]:
    try:
        ids = list(map(operator.index, tokens))
    except TypeError as error:
        raise TypeError(
            f"tokens: got {type(tokens).__name__}, needs token ids, one integer each, as in a list "
            f"({error})"
        ) from None
    if ids and not 0 <= min(ids) <= max(ids) < 2**63:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"tokens: got id {wrong}, needs ids from 0 to 2**63 - 1")
    return ids + [UNKNOWN] * count
