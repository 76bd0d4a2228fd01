"""Sequences on their way to the host and back: which work waits for which, and for how long."""

import random
import weakref

import numpy as np
import pytest

import cupy_paged
from cupy_paged import NeverFits, OutOfBlocks, PagedKVCache, gpu, in_flight, kv_cache, staging
from cupy_paged.cache_memory import CacheMemory
from cupy_paged.host_copies import HostCopies
from support import compare, frameworks
from support.fake_cupy import host_empty
from support.kv_cache_suite import NUM_LAYERS, Story
from support.late_cupy import LateCuPy

STEPS = 7
"""The stream of all steps."""


@pytest.fixture
def late(seed, monkeypatch):
    late = LateCuPy(random.Random(seed))
    monkeypatch.setattr(gpu, "cupy", lambda: late)
    monkeypatch.setattr(in_flight, "_queues", {})

    def later(function):
        """The function, on the stream of the steps: its result is filled when it comes to it."""

        def queue(*arguments, stream=None, out=None, **options):
            assert stream in (None, STEPS)

            def work():
                result = function(*arguments, **options)
                if out is not None:
                    out[...] = result

            late.queue(STEPS, work)
            return out

        return queue

    monkeypatch.setattr(kv_cache, "held_stream", lambda leader, stream: (STEPS, stream))
    for name in ("copy_blocks", "reshape_and_cache_flash", "paged_attention"):
        monkeypatch.setattr(kv_cache, name, later(getattr(kv_cache, name)))
    fill = CacheMemory.fill_with_nan
    monkeypatch.setattr(
        CacheMemory, "fill_with_nan",
        lambda memory, blocks, stream: late.queue(stream, lambda: fill(memory, blocks, stream)),
    )  # fmt: skip
    monkeypatch.setattr("cupy_paged.batches.empty", host_empty)
    return late


class LateStory(Story):
    """A story whose steps, and whose copies to the host and back, run later."""

    def __init__(self, late, **options):
        super().__init__(frameworks.host()[0], **options)
        cache, self.late, self.expected = self.cache, late, []
        memory = cache._memory
        memory.whole = memory.whole._replace(device=1)
        cache._leader = cache._leader._replace(device=1)
        cache._host = HostCopies(memory.whole, cache.num_host_blocks)

    def check(self, batch, rows):
        query = self.query(len(batch.seq_lens))
        for layer in range(NUM_LAYERS):
            out = self.cache.attend(layer, query, batch, out=np.full(query.shape, np.nan))
            want = np.zeros(query.shape)
            for row, (sequence, length) in enumerate(rows):
                want[row] = self.attended(sequence, length, layer, query[row])
            self.expected.append((out, want))

    def finish(self, first=None):
        self.late.run(first=first)
        for out, want in self.expected:
            compare.close(out.astype(np.float32), want, self.dtype)
        self.expected.clear()


def side_stream(story):
    return story.cache._host._stream.ptr


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("poison", [True, False])
def test_random_story_whose_streams_run_in_any_order(late, poison, number, seed):
    story = LateStory(late, poison=poison, num_host_blocks=16, seed=seed)
    restored = 0
    for turn in range(1200):  # 120, and on until enough has happened
        for _ in range(story.random.randrange(1, 6)):
            try:
                story.attempt()
            except (OutOfBlocks, NeverFits):
                if story.random.random() < 0.6:
                    story.cache.free(story.random.choice(story.cache.sequences))
            late.run(story.random.choice((0, 0, 1, 5, 40)))
        story.step([s for s in story.on_device() if story.random.random() < 0.5])
        late.run(story.random.choice((0, 3, 30, 300)))
        if turn % 20 == 19:
            story.finish()
            restored = story.cache.statistics.restored
            if turn >= 119 and restored > 20:
                break
    assert restored > 20


def two(late, **options):
    """A story, and two sequences of it that are written and share nothing."""
    story = LateStory(late, num_host_blocks=16, **options)
    sequences = [story.cache.add(range(start, start + 9)) for start in (0, 50)]
    story.step(sequences)
    story.finish()
    late.waits.clear()
    late.copies.clear()
    return story, *sequences


def test_copies_wait_for_the_steps_and_only_steps_that_touch_their_blocks_wait(late):
    story, first, second = two(late, poison=False, prefix_caching=False)
    cache, side = story.cache, side_stream(story)
    cache.offload(first)
    assert late.waits == [(side, STEPS)]
    cache.append(second, [1])
    story.step([second])
    assert late.waits == [(side, STEPS)]
    third = cache.add(range(40))  # goes into blocks that are being copied
    story.step([third])
    assert late.waits == [(side, STEPS), (STEPS, side)]
    late.run()
    late.waits.clear()

    cache.restore(first)
    cache.append(second, [2])
    story.step([second])
    assert late.waits == [(side, STEPS)]
    cache.append(first, [3])
    story.step([first])
    assert late.waits == [(side, STEPS), (STEPS, side)]
    late.run()
    cache.append(first, [4])
    story.step([first])  # they are done
    assert late.waits == [(side, STEPS), (STEPS, side)]
    story.finish()


def test_a_shared_prefix_can_be_read_while_it_is_copied(late):
    story, first, _ = two(late, poison=False)
    cache = story.cache
    twin = cache.fork(first)
    cache.append(twin, [1])  # its last block is its own from here on
    story.step([twin])
    late.run()
    late.waits.clear()
    cache.offload(first)
    cache.append(twin, [2])
    story.step([twin])
    assert late.waits == [(side_stream(story), STEPS)]
    story.finish()


@pytest.fixture(params=["steps", "copies"])
def fast(request):
    """Which of the two is first wherever nothing holds it back."""
    return lambda story: STEPS if request.param == "steps" else side_stream(story)


def test_a_copy_for_a_fork_into_a_block_that_leaves(late, fast):
    story, first, second = two(late, poison=False, prefix_caching=False)
    cache = story.cache
    leaving = list(second.blocks)
    cache.offload(second)
    twin = cache.fork(first)
    cache.append(twin, [1])
    assert twin.blocks[-1] in leaving
    story.step([twin])
    late.run(first=fast(story))
    cache.restore(second)
    story.step([first, second])
    story.finish(fast(story))


def test_a_copy_for_a_fork_of_a_block_that_comes_back(late, fast):
    story, first, second = two(late, poison=False, prefix_caching=False)
    cache = story.cache
    cache.offload(first)
    late.run()
    cache._memory.fill_with_nan(list(set(range(24)) - set(second.blocks)), STEPS)
    late.run()
    cache.restore(first)
    twin = cache.fork(first)
    cache.append(twin, [1])
    story.step([twin])
    story.finish(fast(story))


def test_a_fork_that_leaves_before_its_block_was_copied(late, fast):
    story, first, _ = two(late, poison=False, prefix_caching=False)
    cache = story.cache
    twin = cache.fork(first)
    cache.append(twin, [1])
    cache.offload(twin)
    cache.restore(twin)
    story.step([twin])
    story.finish(fast(story))


def test_a_block_that_is_still_to_be_copied_when_another_sequence_comes_back_into_it(late, fast):
    story, first, second = two(late, poison=False, prefix_caching=False)
    cache = story.cache
    cache.offload(second)
    twin = cache.fork(first)
    cache.append(twin, [1])
    last = first.blocks[-1]
    cache.free(first)
    cache.restore(second)
    assert last in second.blocks
    story.step([twin, second])
    story.finish(fast(story))


def test_whoever_finds_a_restored_prefix_waits_for_it(late):
    story, first, _ = two(late)
    cache, side = story.cache, side_stream(story)
    cache.offload(first)
    cache.pool.allocator.evict()
    late.run()
    cache.restore(first)
    late.waits.clear()
    other = cache.add(range(12))
    assert other.num_cached == 8
    story.step([other])
    assert late.waits == [(STEPS, side)]
    story.finish()


@pytest.mark.parametrize("length", [9, 16, 17])
def test_blocks_that_follow_each_other_are_one_copy_for_all_layers(late, length):
    story = LateStory(late, num_host_blocks=16, poison=False, prefix_caching=False)
    cache, side = story.cache, side_stream(story)
    sequence = cache.add(range(length))
    story.step([sequence])
    num_blocks = len(sequence.blocks)
    late.copies.clear()
    cache.offload(sequence)
    cache.restore(sequence)
    block_bytes = cache.block_bytes // (2 * NUM_LAYERS)
    rows = [(side, num_blocks * block_bytes, 2 * NUM_LAYERS)]
    assert sum(width * height for _, width, height in late.copies) == (
        2 * num_blocks * cache.block_bytes
    )
    assert late.copies[:1] == rows
    story.finish()


def test_a_cache_dropped_with_copies_on_their_way_keeps_its_memory_until_they_are_done(late):
    story, first, _ = two(late, poison=False)
    whole, host = story.cache._memory.whole.owner, story.cache._host
    memory = [weakref.ref(whole), weakref.ref(host._pinned)]
    story.cache.offload(first)
    gone = weakref.ref(story.cache)
    del story, first, whole, host
    late.run(2)
    in_flight.release_finished(1, STEPS)
    assert gone() is None
    assert all(ref() is not None for ref in memory)
    late.run()
    in_flight.release_finished(1, STEPS)
    assert all(ref() is None for ref in memory)


def test_a_batch_on_its_way_outlives_its_cache(late):
    to, sent = np.zeros((1, 4), np.int64), np.arange(4)[None]
    target = np.zeros(0)
    sender = staging.Staging(1, 64, [target])
    sender.send(STEPS, [staging.Piece(sent, to.ctypes.data, 32)])
    ref = weakref.ref(target)
    del sender, target
    assert ref() is not None
    late.run()
    assert to.tolist() == sent.tolist()
    in_flight.release_finished(1, STEPS)
    assert ref() is None
    sender = staging.Staging(1, 64)
    sender.send(STEPS, [staging.Piece(sent, to.ctypes.data, 32)])
    late.run()
    del sender  # nothing is on its way
    assert not in_flight._queues


def test_nothing_moves_while_a_graph_is_captured(late):
    story, first, second = two(late)
    story.cache.offload(second)
    late.capturing.add(STEPS)
    with pytest.raises(RuntimeError, match="offload: is done from the host, needs to be outside"):
        story.cache.offload(first)
    with pytest.raises(RuntimeError, match="restore: is done from the host, needs to be outside"):
        story.cache.restore(second)
    assert (first.is_offloaded, second.is_offloaded) == (False, True)


# ---- what a user sees, on host arrays ----


def new(num_blocks=8, **options):
    options = {
        "num_kv_heads": 2, "head_size": 8, "block_size": 4, "dtype": "float32",
        "framework": "numpy", "num_host_blocks": 4, **options,
    }  # fmt: skip
    return PagedKVCache(1, num_blocks, **options)


def written(cache, tokens, value=1):
    sequence = cache.add(tokens)
    rows = np.full((len(tokens), 2, 8), value, np.float32)
    cache.write(0, rows, rows, cache.batch([sequence]))
    return sequence


def test_offloaded_sequences_take_no_part_in_steps():
    cache = new()
    sequence = written(cache, range(6))
    cache.offload(sequence)
    assert (cache.num_used, cache.num_host_available) == (0, 2)
    assert cache.sequences == [sequence]
    for call in (
        lambda: cache.batch([sequence]),
        lambda: cache.append(sequence, [1]),
        lambda: cache.fork(sequence),
        lambda: cache.offload(sequence),
    ):
        with pytest.raises(ValueError, match="is offloaded, needs to be restored first"):
            call()
    cache.free(sequence)
    assert cache.num_host_available == 4


def test_a_step_that_was_not_written_is_left_out():
    cache = new()
    sequence = written(cache, range(5))
    cache.append(sequence, [6])
    batch = cache.batch([sequence])
    cache.offload(sequence)
    cache.commit(batch)
    cache.restore(sequence)
    assert sequence.num_pending == 1
    cache.commit(batch)
    assert sequence.num_pending == 1


def test_a_step_is_over_once_blocks_are_restored():
    cache = new(num_blocks=3, prefix_caching=False)
    first = written(cache, range(6))
    cache.offload(first)
    given_up = cache.add(range(3))
    batch = cache.batch([given_up])
    cache.free(given_up)
    cache.restore(first)
    junk = np.full((3, 2, 8), 666, np.float32)
    with pytest.raises(ValueError, match="batch: is over; another one"):
        cache.write(0, junk, junk, batch)
    assert (cache.key_caches[0] != 666).all()


def test_caches_without_room_on_the_host():
    cache = new(num_host_blocks=0)
    assert cache.num_host_available == 0
    with pytest.raises(ValueError, match="num_host_blocks: is 0"):
        cache.offload(cache.add([1]))
    with pytest.raises(ValueError, match="num_host_blocks: got -1"):
        new(num_host_blocks=-1)
    cache = new(num_host_blocks=1)
    sequence = written(cache, range(6))
    with pytest.raises(cupy_paged.NeverFits, match="2 host blocks needed, 1 in all"):
        cache.offload(sequence)
    assert not sequence.is_offloaded
    assert "host      1 blocks: 0 used, 0 sequences; 0 offloaded, 0 restored" in str(cache)


def test_the_picture_has_what_is_on_the_host():
    cache = new(num_blocks=16)
    sequence = written(cache, range(10))
    cache.add(range(50, 55))
    before = str(cache).splitlines()
    cache.offload(sequence)
    lines = str(cache).splitlines()
    assert lines[2] == before[2] == "  sequences 2, 15 tokens"
    assert lines[4] == (
        "  unused    3 slots of last blocks, 37.5% of all slots that sequences have"
    )
    assert lines[6] == "  host      4 blocks: 3 used, 1 sequences; 3 offloaded, 0 restored"
    assert "sequence 1: 5 tokens, 2 blocks" in cache._repr_html_()


# ---- what is interrupted ----


class Interrupted(BaseException):
    pass


@pytest.fixture
def of_ones():
    """A cache of ones on the host, which is full of sevens, and a sequence of all its blocks."""
    cache = PagedKVCache(
        1, 3, num_kv_heads=1, head_size=8, dtype="float32", framework="numpy", num_host_blocks=3
    )
    sequence = cache.add(range(40))
    ones = np.ones((40, 1, 8), np.float32)
    cache.write(0, ones, ones, cache.batch([sequence]))
    cache._host._bits[...] = 7
    return cache, sequence


def interrupt(*_):
    raise Interrupted


def attended(cache, sequence):
    cache.append(sequence, [1])
    batch = cache.batch([sequence])
    row = np.ones((1, 1, 8), np.float32)
    cache.write(0, row, row, batch)
    return cache.attend(0, row, batch)


def test_an_interrupted_offload_leaves_nothing_to_be_found(of_ones, monkeypatch):
    cache, sequence = of_ones
    with monkeypatch.context() as patch:
        patch.setattr(cache._host, "copy_out", interrupt)
        with pytest.raises(Interrupted):
            cache.offload(sequence)
    assert not sequence.is_offloaded and cache.num_host_available == 3
    cache.offload(sequence)
    cache.key_caches[0][...] = cache.value_caches[0][...] = np.nan
    cache.pool.allocator.evict()
    cache.restore(sequence)
    assert (attended(cache, sequence) == 1).all()


def test_an_interrupted_restore_holds_no_blocks(of_ones, monkeypatch):
    cache, sequence = of_ones
    cache.offload(sequence)
    cache.pool.allocator.evict()
    with monkeypatch.context() as patch:
        patch.setattr(cache._host, "copy_in", interrupt)
        with pytest.raises(Interrupted):
            cache.restore(sequence)
    assert sequence.is_offloaded and cache.num_available == 3
    cache.restore(sequence)
    assert (attended(cache, sequence) == 1).all()
