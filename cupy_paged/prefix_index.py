"""Which block holds which tokens, after which tokens: full blocks found again by their content.

A block's keys and values follow from its tokens and from all tokens before them, so an entry is
known by its tokens and by its parent, the entry of the block before. Lookups hash that content and
then compare it whole: two contents with the same hash cost time, never text.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

UNKNOWN = -1
"""Stands for a token whose id the caller did not give. Its block is never found by content."""


def content_hash(parent_hash: int, tokens: tuple[int, ...]) -> int:
    """Hash of a block's content, chained over its parents."""
    return hash((parent_hash, tokens))


class _Content:
    """What an entry is known by: a dictionary's key, with a hash that is computed once."""

    __slots__ = ("hash", "parent", "tokens")

    def __init__(self, parent: Entry | Hashable, tokens: tuple[int, ...]) -> None:
        self.parent, self.tokens = parent, tokens
        parent_hash = parent.content.hash if isinstance(parent, Entry) else hash(parent)
        self.hash = content_hash(parent_hash, tokens)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        # Parents are compared by identity, where they are entries, and so stand for their chain.
        return (
            isinstance(other, _Content)
            and self.tokens == other.tokens
            and self.parent == other.parent
        )


class Entry:
    """A full block that can be found.

    block       where its keys and values are
    is_alive    False once it has been removed
    """

    __slots__ = ("block", "children", "content", "is_alive")

    def __init__(self, content: _Content, block: int) -> None:
        self.content, self.block = content, block
        self.children: dict[Entry, None] = {}
        self.is_alive = True


class PrefixIndex:
    """Entries of full blocks, each after its parent, or after a salt where it is a first block.

    The caller says what differs between caches whose tokens look alike (an adapter, say) by the
    salt: any hashable value, compared whole as well.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._entries: dict[_Content, Entry] = {}
        self._by_block: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: int) -> bool:
        """Whether an entry stands for this block."""
        return block in self._by_block

    def match(self, tokens: Sequence[int], salt: Hashable) -> list[Entry]:
        """The longest run of known full blocks with which the tokens begin."""
        found: list[Entry] = []
        parent: Entry | Hashable = salt
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            content = _Content(parent, tuple(tokens[start : start + self.block_size]))
            entry = self._entries.get(content)
            if entry is None:
                break
            found.append(entry)
            parent = entry
        return found

    def insert(self, parent: Entry | Hashable, tokens: tuple[int, ...], block: int) -> Entry:
        """The entry of these tokens after `parent`: a new one of `block`, if there is none yet."""
        content = _Content(parent, tokens)
        entry = self._entries.get(content)
        if entry is None:
            entry = self._entries[content] = self._by_block[block] = Entry(content, block)
            if isinstance(parent, Entry):
                parent.children[entry] = None
        return entry

    def extend(
        self,
        entries: list[Entry],
        tokens: Sequence[int],
        num_tokens: int,
        salt: Hashable,
        blocks: Sequence[int],
    ) -> None:
        """Adds to the entries of a sequence's first blocks those of its other full blocks.

        entries       of so many of its blocks, one after the other
        num_tokens    of the tokens, so many count
        blocks        where the tokens are, from the first one on

        Ends before a token of unknown id. Where an entry of the same content is there already, that
        one is added: its block is another.
        """
        size = self.block_size
        for i in range(len(entries), num_tokens // size):
            content = tuple(tokens[i * size : (i + 1) * size])
            if UNKNOWN in content:
                break
            entries.append(self.insert(entries[-1] if entries else salt, content, blocks[i]))

    def remove(self, block: int) -> Iterable[int]:
        """Removes a block's entry, and those after it, which no lookup could reach any more.

        Returns the blocks of all of them.
        """
        entry = self._by_block[block]
        parent = entry.content.parent
        if isinstance(parent, Entry):
            parent.children.pop(entry, None)
        removed = []
        todo = [entry]
        while todo:
            entry = todo.pop()
            todo.extend(entry.children)
            entry.children.clear()
            entry.is_alive = False
            del self._entries[entry.content], self._by_block[entry.block]
            removed.append(entry.block)
        return removed
