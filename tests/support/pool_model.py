"""A simple model of a sequence pool, run beside the real one and compared after every operation.

The model knows each sequence as the list of its tokens, and shadows the cache: every slot holds a
tag of the token written there and of all tokens before it, dead blocks hold nothing. Whatever a
sequence reads must be its own tags, and so must what waits for it on the host. (HAZARDS of such
systems: double frees, evicted blocks that are still found, shared tails, collisions, half-done
allocations, stale blocks.)
"""

import os
import random
from collections import Counter

from cupy_paged.block_allocator import NeverFits, OutOfBlocks
from cupy_paged.sequences import SequencePool

DEAD = None
TIMES = int(os.environ.get("CUPY_PAGED_TEST_TIMES", "1"))
"""As many operations as usual, so many times."""


class PoolModel:
    """Drives a pool; each method is one operation and its checks."""

    def __init__(
        self, num_blocks, block_size, *, max_blocks=None, prefix_caching=True, num_host_blocks=0
    ):
        self.slots = [[DEAD] * block_size for _ in range(num_blocks)]
        self.host_slots = [[DEAD] * block_size for _ in range(num_host_blocks)]
        self.pool = SequencePool(
            num_blocks, block_size, max_blocks=max_blocks, copy=self._copy, dead=self._die,
            copy_out=self._copy_out, copy_in=self._copy_in, prefix_caching=prefix_caching,
            num_host_blocks=num_host_blocks,
        )  # fmt: skip
        self.sequences = []
        self.tokens = {}
        self.tags = {}  # of each sequence: tag of each of its tokens
        self.outcomes = Counter()

    def _copy(self, source, destination):
        assert source != destination
        self.slots[destination][:] = self.slots[source]

    def _copy_out(self, pairs):
        for source, destination in pairs:
            assert self.pool.allocator.ref_count(source) > 0, "copied out after it was given up"
            assert self.pool.host.allocator.ref_count(destination) == 1
            self.host_slots[destination][:] = self.slots[source]

    def _copy_in(self, pairs):
        for source, destination in pairs:
            assert self.pool.host.allocator.ref_count(source) > 0, "copied in after it was given up"
            assert self.pool.allocator.ref_count(destination) == 1, "copied into a shared block"
            assert destination not in self.pool.index, "copied into a block that can be found"
            self.slots[destination][:] = self.host_slots[source]

    def _die(self, block):
        assert self.pool.allocator.ref_count(block) == 0, "a held block died"
        assert block not in self.pool.index, "a dead block can be found"
        self.slots[block][:] = [DEAD] * self.pool.block_size

    def _tags(self, tokens, before, salt):
        tag = before[-1] if before else hash(("salt", salt))
        tags = []
        for token in tokens:
            tag = hash((tag, token))
            tags.append(tag)
        return tags

    def _try(self, operation, *arguments, **options):
        """The operation's result; None if it did not fit, and then nothing has changed."""
        before = self.state()
        try:
            return operation(*arguments, **options)
        except OutOfBlocks as error:
            assert error.needed > error.free
            assert error.total == len(self.host_slots if error.kind == "host" else self.slots)
            self.outcomes[f"out of {error.kind} blocks"] += 1
        except NeverFits as error:
            assert error.needed > error.total
            self.outcomes["never fits"] += 1
        assert self.state() == before, "a failed call has changed something"
        return None

    def state(self):
        allocator, host = self.pool.allocator, self.pool.host
        return (
            allocator.num_free, allocator.num_shared, list(allocator._kept), self.pool.statistics,
            len(self.pool.index), self.pool.unused_slots, len(self.pool.sequences),
            host and (host.allocator._refs[:], len(host._index)),
        )  # fmt: skip

    # ---- operations ----

    def add(self, tokens, salt=None):
        sequence = self._try(self.pool.add, tokens, salt=salt)
        if sequence is not None:
            assert sequence.num_cached < max(len(tokens), 1)
            assert sequence.num_cached % self.pool.block_size == 0
            self.outcomes["prefix hit" if sequence.num_cached else "no hit"] += 1
            self.sequences.append(sequence)
            self.tokens[sequence] = list(tokens)
            self.tags[sequence] = self._tags(tokens, [], salt)
            self.check(sequence)
        return sequence

    def append(self, sequence, tokens):
        if sequence.is_offloaded:
            self._refuse(self.pool.append, sequence, tokens)
        elif self._try(lambda: (self.pool.append(sequence, tokens), True)) is not None:
            self.outcomes["appended"] += 1
            self.tokens[sequence] += tokens
            self.tags[sequence] += self._tags(tokens, self.tags[sequence], sequence.salt)
            self.check(sequence)

    def fork(self, sequence):
        if sequence.num_pending or sequence.is_offloaded:
            self._refuse(self.pool.fork, sequence)
            return
        twin = self.pool.fork(sequence)
        self.outcomes["forked"] += 1
        self.sequences.append(twin)
        self.tokens[twin] = self.tokens[sequence][:]
        self.tags[twin] = self.tags[sequence][:]
        self.check(twin)

    def truncate(self, sequence, num_tokens):
        self.pool.truncate(sequence, num_tokens)
        self.outcomes["truncated"] += 1
        del self.tokens[sequence][num_tokens:], self.tags[sequence][num_tokens:]
        self.check(sequence)

    def offload(self, sequence):
        if sequence.is_offloaded:
            self._refuse(self.pool.offload, sequence)
        elif self._try(lambda: (self.pool.offload(sequence), True)) is not None:
            self.outcomes["offloaded"] += 1
            self.check(sequence)

    def restore(self, sequence):
        if not sequence.is_offloaded:
            self._refuse(self.pool.restore, sequence)
        elif self._try(lambda: (self.pool.restore(sequence), True)) is not None:
            self.outcomes["restored"] += 1
            self.check(sequence)

    def _refuse(self, operation, *arguments):
        before = self.state()
        try:
            operation(*arguments)
        except ValueError:
            assert self.state() == before, "a refused call has changed something"
        else:
            raise AssertionError(f"{operation.__name__} was not refused")

    def free(self, sequence):
        self.pool.free(sequence)
        self.outcomes["freed"] += 1
        self.sequences.remove(sequence)
        del self.tokens[sequence], self.tags[sequence]
        self.check_counts()

    def write(self, sequence, num_tokens):
        """Writes pending tokens into their slots, then commits them."""
        block_size = self.pool.block_size
        for position in range(sequence.num_written, num_tokens):
            block = sequence.blocks[position // block_size]
            assert self.pool.allocator.ref_count(block) == 1, "written into a shared block"
            assert block not in self.pool.index, "written into a block that can be found"
            self.slots[block][position % block_size] = self.tags[sequence][position]
        self.pool.commit(sequence, num_tokens)
        self.outcomes["written"] += 1
        self.check(sequence)

    # ---- invariants ----

    def check(self, sequence):
        """What one sequence reads: its own tags, and nothing of anybody else's."""
        block_size = self.pool.block_size
        assert sequence.tokens == self.tokens[sequence]
        written = sequence.num_written
        slots, blocks, held = self.slots, sequence.blocks, len(sequence)
        if sequence.is_offloaded:
            assert not blocks
            slots, blocks, held = self.host_slots, sequence.host_blocks, written
        assert len(blocks) == -(-held // block_size)
        read = [tag for block in blocks for tag in slots[block]]
        assert read[:written] == self.tags[sequence][:written], "a sequence reads what is not its"
        self.check_counts()

    def check_counts(self):
        allocator = self.pool.allocator
        assert allocator.num_free + allocator.num_kept + allocator.num_used == len(self.slots)

    def check_all(self):
        """Everything, from scratch."""
        pool, allocator, index = self.pool, self.pool.allocator, self.pool.index
        for sequence in self.sequences:
            self.check(sequence)
            assert len(set(sequence.blocks)) == len(sequence.blocks)
        assert list(pool.sequences) == self.sequences
        holders = Counter(block for sequence in self.sequences for block in sequence.blocks)
        refs = [allocator.ref_count(block) for block in range(len(self.slots))]
        assert refs == [holders[block] for block in range(len(self.slots))]
        assert allocator.num_shared == sum(count > 1 for count in refs)
        free, kept = set(allocator._free), set(allocator._kept)
        assert len(free) == allocator.num_free
        assert not free & kept
        assert not (free | kept) & holders.keys()
        assert kept <= index._by_block.keys()
        for block in free:
            assert set(self.slots[block]) == {DEAD}, "a free block is not poisoned"
        for block, entry in index._by_block.items():
            assert block not in free
            assert entry.is_alive
            assert entry.block == block
            assert index._entries[entry.content] is entry
            parent = entry.content.parent
            assert getattr(parent, "is_alive", True), "an entry outlives its parent"
            before = (
                self.slots[parent.block] if hasattr(parent, "block") else [hash(("salt", parent))]
            )
            assert self.slots[block] == self._tags(entry.content.tokens, [before[-1]], None)
        assert len(index._entries) == len(index._by_block)
        assert pool.unused_slots == sum(
            len(s.blocks) * pool.block_size - len(s) for s in self.sequences if not s.is_offloaded
        )
        if pool.host is not None:
            self.check_host(pool.host)

    def check_host(self, host):
        """Of the blocks on the host: the sequences that are there hold them, and nobody else."""
        holders = Counter(block for s in self.sequences for block in s.host_blocks or ())
        refs = [host.allocator.ref_count(block) for block in range(len(self.host_slots))]
        assert refs == [holders[block] for block in range(len(self.host_slots))]
        assert host.allocator.num_kept == 0
        assert host._index._by_block.keys() <= holders.keys()


class Fuzzer:
    """Random operations on a model, half of them drawn so that prefixes are shared."""

    def __init__(self, seed, num_blocks, block_size, **options):
        self.random = random.Random(seed)
        self.model = PoolModel(num_blocks, block_size, **options)
        longest = num_blocks * block_size
        # Few prompts that begin alike, and few token ids: hits are frequent, and so are near ones.
        trunk = [self.random.randrange(3) for _ in range(longest)]
        self.prompts = [
            trunk[: self.random.randrange(longest)]
            + [self.random.randrange(3) for _ in range(self.random.randrange(longest // 2))]
            for _ in range(6)
        ]

    def step(self):
        """One operation."""
        draw, model = self.random, self.model
        if not model.sequences or draw.random() < 0.08:
            self.add()
            return
        sequence = draw.choice(model.sequences)
        kind = draw.random()
        if kind < 0.42:
            few = draw.choice((1, 1, 1, 2, model.pool.block_size, 3 * model.pool.block_size))
            model.append(sequence, [draw.randrange(3) for _ in range(few)])
        elif kind < 0.72 and model.pool.host is not None and draw.random() < 0.2:
            operation = model.restore if sequence.is_offloaded else model.offload
            if draw.random() < 0.05:
                operation = draw.choice((model.restore, model.offload))
            operation(sequence)
        elif kind < 0.72 and not sequence.is_offloaded:
            model.write(
                sequence, draw.choice((len(sequence), len(sequence) - sequence.num_pending // 2))
            )
        elif kind < 0.80:
            if len(model.sequences) < 12:
                model.fork(sequence)
            else:
                model.free(sequence)
        elif kind < 0.90:
            model.truncate(sequence, draw.randrange(len(sequence) + 1))
        else:
            model.free(sequence)

    def add(self):
        prompt = self.random.choice(self.prompts)
        tokens = prompt[: self.random.randrange(len(prompt) + 1)]
        if self.random.random() < 0.02:
            tokens = tokens * 40  # never fits
        self.model.add(tokens, salt=self.random.choice((None, None, None, "adapter")))
