"""Which blocks on the host hold the tokens of offloaded sequences, without arrays."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from cupy_paged.block_allocator import BlockAllocator
from cupy_paged.prefix_index import PrefixIndex


class HostBlocks:
    """A pool of blocks on the host; sequences that begin alike hold their full blocks together.

    >>> host = HostBlocks(num_blocks=8, block_size=4)
    >>> host.hold([1, 2, 3, 4, 5], 5, salt=None)
    ([0, 1], 0)
    >>> host.hold([1, 2, 3, 4, 6], 5, salt=None)
    ([0, 2], 1)

    prefix_caching    whether blocks are shared by their tokens
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._index = index = PrefixIndex(block_size)

        def dead(block: int) -> None:
            if block in index:
                index.remove(block)

        self.allocator = BlockAllocator(num_blocks, dead=dead, kind="host")

    def hold(self, tokens: Sequence[int], num_tokens: int, salt: Hashable) -> tuple[list[int], int]:
        """Blocks for the first tokens of a sequence, and how many of them hold theirs already.

        Raises OutOfBlocks, or NeverFits for more than there are at all; then nothing has changed.
        """
        size = self.block_size
        found = self._index.match(tokens[: num_tokens // size * size], salt)
        shared = [entry.block for entry in found]
        blocks = shared + self.allocator.allocate(-(-num_tokens // size) - len(shared))
        self.allocator.share(shared)
        if self.prefix_caching:
            self._index.extend(found, tokens, num_tokens, salt, blocks)
        return blocks, len(shared)

    def free(self, blocks: Sequence[int]) -> None:
        """One sequence less that holds these blocks."""
        self.allocator.free(blocks)
