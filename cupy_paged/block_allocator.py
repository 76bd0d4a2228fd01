"""A pool of numbered blocks with reference counts. It knows nothing of what the blocks hold.

A block is *free*, or *used* by one holder or more (then it is *shared*), or *kept*: nobody holds
it, but it is worth finding again, and it is given up, longest unused first, when the free ones run
out. free + kept + used = total, always.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from cupy_paged import checks
from cupy_paged.graph_breaks import breaks_graphs


class OutOfBlocks(MemoryError):
    """The blocks are not there now; they may be once others are freed.

    needed    blocks that the request takes from the pool
    free      blocks that the pool could give, kept ones included
    total     blocks of the pool
    kind      "cache", or "host" for blocks that sequences are offloaded to
    remedy    the end of the message: who could give blocks back
    """

    def __init__(
        self, needed: int, free: int, total: int, kind: str = "cache", remedy: str = ""
    ) -> None:
        super().__init__(
            f"out of {kind} blocks: {needed} needed, {free} free, {total} in all{remedy}"
        )
        self.needed, self.free, self.total, self.kind = needed, free, total, kind


class NeverFits(ValueError):
    """The request is larger than the whole pool: no freeing can help.

    needed    blocks of the request
    total     blocks there can ever be for it
    kind      as in OutOfBlocks
    """

    def __init__(self, needed: int, total: int, limit: str = "in all", kind: str = "cache") -> None:
        super().__init__(f"can never fit: {needed} {kind} blocks needed, {total} {limit}")
        self.needed, self.total, self.kind = needed, total, kind


@breaks_graphs
class BlockAllocator:
    """Hands out blocks 0 to num_blocks - 1. Every operation takes time for its own blocks alone.

    >>> pool = BlockAllocator(3)
    >>> blocks = pool.allocate(2)
    >>> pool.share(blocks[:1])
    >>> pool.free(blocks)
    >>> pool.num_free, pool.num_used, pool.ref_count(blocks[0])
    (2, 1, 1)

    evicting    called with a kept block before it is given up
    dead        called with each block whose contents nobody can want any more
    kind        what errors call the blocks
    remedy      called for the end of the message of OutOfBlocks

    What raises has changed nothing.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        evicting: Callable[[int], None] = lambda block: None,
        dead: Callable[[int], None] = lambda block: None,
        kind: str = "cache",
        remedy: Callable[[], str] = lambda: "",
    ) -> None:
        self.num_blocks = num_blocks = checks.is_int(num_blocks, "num_blocks", 1)
        self.kind = kind
        self.num_shared = 0
        self.num_evictions = 0
        self._evicting, self._dead, self._remedy = evicting, dead, remedy
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._worth_keeping = [False] * num_blocks
        # In the order of their last use, oldest first. A dict would search past what was deleted.
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_kept(self) -> int:
        """Blocks that nobody holds, kept to be found again."""
        return len(self._kept)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_available

    def ref_count(self, block: int) -> int:
        """How many hold the block."""
        self._check(block)
        return self._refs[block]

    def is_kept(self, block: int) -> bool:
        """Whether nobody holds the block, and it can still be found again."""
        return block in self._kept

    def allocate(self, count: int) -> list[int]:
        """Blocks for one holder: all of them or none.

        Raises OutOfBlocks, or NeverFits for more than the pool has; TypeError or ValueError for
        what is no count.
        """
        self.check_available(count)
        blocks: list[int] = []
        while len(blocks) < count:
            if not self._free:
                self._evict(next(iter(self._kept)))
            block = self._free.pop()
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def check_available(self, count: int, reviving: int = 0) -> None:
        """Raises as `allocate` would, if `reviving` kept blocks were taken up again before."""
        checks.is_int(count, "count", 0, sys.maxsize)
        if count > self.num_blocks:
            raise NeverFits(count, self.num_blocks, kind=self.kind)
        free = self.num_available - reviving
        if count > free:
            raise OutOfBlocks(count, free, self.num_blocks, self.kind, self._remedy())

    def share(self, blocks: Sequence[int]) -> None:
        """One more holder for each of the blocks, which are used or kept.

        Raises ValueError for a block that is free, foreign, or named twice.
        """
        self._check_all(blocks)
        for block in blocks:
            if not self._refs[block] and block not in self._kept:
                raise ValueError(f"block {block}: is free, needs a holder to be shared")
        for block in blocks:
            self._kept.pop(block, None)
            self._refs[block] += 1
            self.num_shared += self._refs[block] == 2

    def free(self, blocks: Sequence[int]) -> None:
        """One holder less for each of the blocks.

        The last blocks count as used longest ago: the end of a prefix is of no use without its
        beginning. Raises ValueError for a block that nobody holds, is foreign, or is named twice.
        """
        self._check_all(blocks)
        for block in blocks:
            if not self._refs[block]:
                raise ValueError(f"block {block}: freed twice, nobody holds it")
        for block in reversed(blocks):
            self._refs[block] -= 1
            self.num_shared -= self._refs[block] == 1
            if self._refs[block] == 0:
                if self._worth_keeping[block]:
                    self._kept[block] = None
                else:
                    self._release(block)

    def keep(self, block: int) -> None:
        """From now on, the block is kept when its last holder frees it.

        Raises ValueError for a block that nobody holds.
        """
        self._check(block)
        if not self._refs[block]:
            raise ValueError(f"block {block}: nobody holds it, needs a holder to be kept later")
        self._worth_keeping[block] = True

    def forget(self, blocks: Iterable[int]) -> None:
        """Takes `keep` back; blocks that are kept now become free."""
        for block in blocks:
            self._check(block)
            self._worth_keeping[block] = False
            if block in self._kept:
                del self._kept[block]
                self.num_evictions += 1
                self._release(block)

    def evict(self) -> int:
        """Gives up all kept blocks; returns how many."""
        before = self.num_kept
        while self._kept:
            self._evict(next(iter(self._kept)))
        return before

    def _evict(self, block: int) -> None:
        self._evicting(block)
        self.forget([block])

    def _release(self, block: int) -> None:
        self._free.append(block)
        self._dead(block)

    def _check(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"block {block}: is not of this pool, which has {self.num_blocks}")

    def _check_all(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._check(block)
        if len(set(blocks)) < len(blocks):
            twice = next(block for block in blocks if list(blocks).count(block) > 1)
            raise ValueError(f"block {twice}: is named twice")
