"""The block pool against a simple model, and what it refuses."""

import random
import time

import pytest

from cupy_paged.block_allocator import BlockAllocator, NeverFits, OutOfBlocks
from support.pool_model import TIMES

NUM_OPERATIONS = 600_000 * TIMES


def state(pool):
    counts = [pool.ref_count(block) for block in range(pool.num_blocks)]
    return counts, sorted(pool._free), list(pool._kept), pool.num_shared


def check(pool, holders, keepers):
    """Everything, against the model: holders of each block, and kept blocks in order."""
    used = {block: count for block, count in enumerate(holders) if count}
    counts, free, kept, num_shared = state(pool)
    assert counts == holders
    assert kept == list(keepers)
    assert not set(free) & (set(kept) | used.keys())
    assert len(set(free)) == len(free) == pool.num_free
    assert len(free) + len(kept) + len(used) == pool.num_blocks
    assert num_shared == sum(count > 1 for count in used.values())
    assert (pool.num_kept, pool.num_used) == (len(kept), len(used))


def test_pool_agrees_with_a_simple_model(seed, tally):
    draw, num_blocks = random.Random(seed), 50
    evicted, dead = [], []
    pool = BlockAllocator(num_blocks, evicting=evicted.append, dead=dead.append)
    holders, worth, kept = [0] * num_blocks, set(), {}
    handed = []  # lists of blocks, one for each holder
    refused = shared = 0
    for operation in range(NUM_OPERATIONS):
        kind = draw.random()
        dead.clear()
        evicted.clear()
        if kind < 0.35 or not handed:
            count = draw.randrange(12)
            available = num_blocks - sum(map(bool, holders))
            try:
                blocks = pool.allocate(count)
            except OutOfBlocks as error:
                assert (error.needed, error.free, error.total) == (count, available, num_blocks)
                assert not dead
                refused += 1
                continue
            assert len(blocks) == len(set(blocks)) == count <= available
            oldest = list(kept)[: len(evicted)]
            assert evicted == oldest == dead
            for block in oldest:
                del kept[block]
                worth.discard(block)
            for block in blocks:
                assert not holders[block]
                assert block not in kept
                holders[block] = 1
            handed.append(blocks)
        elif kind < 0.45:
            blocks = draw.choice(handed)
            blocks = blocks[: draw.randrange(len(blocks) + 1)]
            pool.share(blocks)
            for block in blocks:
                holders[block] += 1
            shared += len(blocks)
            handed.append(blocks[:])
        elif kind < 0.50 and kept:
            blocks = draw.sample(list(kept), draw.randrange(len(kept)) + 1)
            pool.share(blocks)
            for block in blocks:
                del kept[block]
                holders[block] = 1
            handed.append(blocks)
        elif kind < 0.60:
            for block in draw.choice(handed)[:2]:
                pool.keep(block)
                worth.add(block)
        elif kind < 0.63:
            blocks = draw.sample(range(num_blocks), 2)
            gone = [block for block in blocks if block in kept]
            pool.forget(blocks)
            worth.difference_update(blocks)
            for block in gone:
                del kept[block]
            assert dead == gone
        else:
            blocks = handed.pop(draw.randrange(len(handed)))
            pool.free(blocks)
            for block in reversed(blocks):
                holders[block] -= 1
                if not holders[block] and block in worth:
                    kept[block] = None
            assert set(dead) == {b for b in blocks if not holders[b] and b not in kept}
        assert pool.num_free + pool.num_kept + pool.num_used == num_blocks
        if operation % 200 == 0:
            check(pool, holders, kept)
    check(pool, holders, kept)
    assert refused > 1000
    assert shared > 1000
    tally("pool operations", NUM_OPERATIONS)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda pool, held: pool.free([held[0], held[0]]), "is named twice"),
        (lambda pool, held: pool.free([held[0], 5]), "freed twice"),
        (lambda pool, held: pool.free([held[0], 8]), "is not of this pool, which has 8"),
        (lambda pool, held: pool.free([held[0], -1]), "is not of this pool"),
        (lambda pool, held: pool.share([held[0], 5]), "is free, needs a holder"),
        (lambda pool, held: pool.share([held[0], held[0]]), "is named twice"),
        (lambda pool, held: pool.keep(5), "nobody holds it"),
        (lambda pool, held: pool.keep(8), "is not of this pool"),
        (lambda pool, held: pool.ref_count(-1), "is not of this pool"),
        (lambda pool, held: pool.allocate(-1), "count: got -1"),
        (lambda pool, held: BlockAllocator(0), "num_blocks: got 0"),
    ],
)
def test_wrong_calls_change_nothing(call, words):
    pool = BlockAllocator(8)
    held = pool.allocate(3)
    before = state(pool)
    with pytest.raises(ValueError, match=words):
        call(pool, held)
    assert state(pool) == before


@pytest.mark.parametrize("count", [1.5, "2", None, True])
def test_counts_are_ints(count):
    pool = BlockAllocator(8)
    with pytest.raises(TypeError, match=r"^count: got .*, needs an int"):
        pool.allocate(count)
    with pytest.raises(TypeError, match=r"^num_blocks: got .*, needs an int"):
        BlockAllocator(count)
    assert pool.num_free == 8


def test_shared_block_is_freed_by_each_holder_once():
    pool = BlockAllocator(2)
    held = pool.allocate(1)
    pool.share(held)
    pool.free(held)
    pool.free(held)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(held)


def test_never_fits_is_another_error_than_out_of_blocks():
    pool = BlockAllocator(4)
    pool.allocate(3)
    with pytest.raises(OutOfBlocks, match="2 needed, 1 free, 4 in all") as caught:
        pool.allocate(2)
    assert isinstance(caught.value, MemoryError)
    with pytest.raises(NeverFits, match="5 cache blocks needed, 4 in all"):
        pool.allocate(5)
    assert not issubclass(NeverFits, MemoryError)
    assert not issubclass(OutOfBlocks, ValueError)


def test_time_of_an_operation_does_not_grow_with_the_pool():
    def seconds(num_blocks):
        pool = BlockAllocator(num_blocks)
        pool.free([pool.keep(block) or block for block in pool.allocate(num_blocks // 2)])
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(100):
                held = pool.allocate(10)
                pool.share(held)
                pool.free(held)
                pool.free(held)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(1_000_000) < 5 * seconds(1000)
