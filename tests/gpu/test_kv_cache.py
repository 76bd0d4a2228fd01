"""`PagedKVCache` on a GPU: contents through attention, steps in a CUDA graph, moves to the host."""

import contextlib
import weakref
from types import SimpleNamespace

import cupy
import numpy as np
import pytest

from cupy_paged import PagedKVCache
from support import compare, frameworks
from support.kv_cache_suite import NUM_LAYERS, KVCacheSuite, Story
from support.workers import delay, is_busy


@pytest.fixture(params=frameworks.writable(frameworks.device()), ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestKVCache(KVCacheSuite):
    pass


def test_decode_steps_replayed_from_a_graph():
    arrays = frameworks.device()[0]
    bounds = {"max_num_seqs": 4, "max_num_tokens": 16, "max_seq_len": 40}
    story = Story(arrays, "float16", num_host_blocks=8, **bounds)
    cache = story.cache
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        sequences = [cache.add(range(9)), cache.add(range(20, 25))]
        story.step(sequences)
        query = arrays.array(story.query(4))
        outs = [cupy.empty_like(query) for _ in range(NUM_LAYERS)]

        def step(replay=None):
            running = story.on_device()
            for sequence in running:
                cache.append(sequence, [sequence.tokens[0]])
            starts = [s.num_written for s in running]
            batch = cache.batch(running, num_seqs=4, num_tokens=4)
            for target, source in zip(given, story.contents(batch, starts), strict=True):
                arrays.fill(target, source)
            if replay is None:
                run(batch)
            else:
                replay()
                cache.commit(batch)
            return batch

        def run(batch):
            for layer in range(NUM_LAYERS):
                cache.write(layer, given[0][layer], given[1][layer], batch)
                cache.attend(layer, query, batch, out=outs[layer])

        for sequence in sequences:
            cache.append(sequence, [0])
        shaped = cache.batch(sequences, num_seqs=4, num_tokens=4)
        starts = [s.num_written for s in sequences]
        given = [arrays.array(x) for x in story.contents(shaped, starts)]
        run(shaped)
        batch = step()
        stream.begin_capture()
        run(batch)
        graph = stream.end_capture()
        for number in range(12):
            if number == 4:
                cache.fork(sequences[0])
            if number in (2, 6):
                cache.offload(sequences[0])
            if number in (3, 7):
                cache.restore(sequences[0])
            if number == 8:
                cache.free(sequences[1])
            batch = step(lambda: graph.launch(stream))
            eager = story.check(batch, [(s, len(s)) for s in story.on_device()])
            for got, want in zip(outs, eager, strict=True):
                compare.bitwise(arrays.numpy(got), want)


@pytest.mark.parametrize("device", [None, 0])
def test_a_cache_by_the_name_of_its_framework(device):
    cache = PagedKVCache(
        1, 4, num_kv_heads=1, head_size=8, dtype="float16", framework="cupy", device=device
    )
    assert isinstance(cache.key_caches[0], cupy.ndarray) and cache.place == "cupy on cuda:0"


# ---- moves to the host and back, beside the steps ----


@contextlib.contextmanager
def new_stream(arrays):
    """A new stream of the framework, its current one inside the `with`: its address."""
    if arrays.name == "torch":
        stream = arrays.torch.cuda.Stream()
        with arrays.torch.cuda.stream(stream):
            yield stream.cuda_stream
    else:
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            yield stream.ptr


class Moves(Story):
    """A story of sequences of three blocks, 11 tokens each, in a cache that has room for two.

    What it queues makes no host array, whose way to the device would wait for the stream.
    """

    def __init__(self, arrays, num_host_blocks=6):
        super().__init__(
            arrays,
            "float16",
            num_blocks=6,
            num_host_blocks=num_host_blocks,
            poison=False,
            prefix_caching=False,
        )
        self.queries = self.query(1)
        self.query_array = arrays.array(self.queries)
        # Once before: compiling takes longer than the delay.
        first = self.written(900)
        if num_host_blocks:
            self.side = self.cache._host._stream.ptr
            delay(self.side)
            self.cache.offload(first)
            self.cache.restore(first)
        self.read(first)
        self.cache.free(first)
        cupy.cuda.Device().synchronize()

    def given(self, start):
        """(tokens, key, value): the keys and values of all layers, on the device."""
        tokens = list(range(start, start + 11))
        like = SimpleNamespace(tokens=tokens, salt=None)
        made = (self.rows(like, 11, kind).swapaxes(0, 1) for kind in ("key", "value"))
        return tokens, *(self.arrays.array(np.ascontiguousarray(rows)) for rows in made)

    def write(self, given):
        """Queues a new sequence's keys and values."""
        tokens, key, value = given
        sequence = self.cache.add(tokens)
        batch = self.cache.batch([sequence])
        for layer in range(NUM_LAYERS):
            self.cache.write(layer, key[layer], value[layer], batch)
        return sequence

    def written(self, start):
        sequence = self.write(self.given(start))
        cupy.cuda.Device().synchronize()
        return sequence

    def read(self, sequence):
        """Queues attention in all layers: (what it gives, what it must give)."""
        batch = self.cache.batch([sequence])
        outs = [self.cache.attend(layer, self.query_array, batch) for layer in range(NUM_LAYERS)]
        want = [
            self.attended(sequence, len(sequence), layer, self.queries[0])
            for layer in range(NUM_LAYERS)
        ]
        return outs, want

    def compare(self, found):
        for out, want in zip(*found, strict=True):
            compare.close(self.arrays.numpy(out)[0], want, "float16")


def test_a_copy_out_waits_for_the_steps_before_it(arrays):
    with new_stream(arrays) as stream:
        story = Moves(arrays)
        given = story.given(0)
        delay(stream)
        first = story.write(given)
        story.cache.offload(first)
        story.cache.restore(first)
        found = story.read(first)
        assert is_busy(stream), "the host waited for the device"
        story.compare(found)


def test_whoever_writes_into_a_block_that_is_copied_out_waits(arrays):
    with new_stream(arrays):
        story = Moves(arrays)
        first, given = story.written(0), story.given(50)
        blocks = set(first.blocks)
        delay(story.side)
        story.cache.offload(first)
        other = story.write(given)
        assert set(other.blocks) == blocks
        assert is_busy(story.side), "the host waited for the device"
        story.cache.restore(first)
        found = [story.read(sequence) for sequence in (other, first)]
        for each in found:
            story.compare(each)


def test_only_steps_of_a_restored_sequence_wait_for_it(arrays):
    beside = False
    for _ in range(20):  # streams that share one of the device's queues follow each other
        if beside:
            break
        with new_stream(arrays) as stream:
            story = Moves(arrays)
            first, second = story.written(0), story.written(50)
            story.cache.offload(first)
            other = story.written(100)  # where the first one was
            story.cache.free(other)
            delay(story.side)
            story.cache.restore(first)
            found = [story.read(second)]
            cupy.cuda.ExternalStream(stream).synchronize()
            beside = is_busy(story.side)
            found.append(story.read(first))
            for each in found:
                story.compare(each)
    assert beside, "a step waited for copies of blocks that it does not touch"


def test_a_copy_in_waits_for_the_steps_before_it(arrays):
    with new_stream(arrays) as stream:
        story = Moves(arrays)
        first, second = story.written(0), story.written(50)
        blocks = set(second.blocks)
        story.cache.offload(first)
        story.written(100)  # where the first one was
        delay(stream)
        found = [story.read(second)]
        story.cache.free(second)
        story.cache.restore(first)
        assert set(first.blocks) == blocks
        found.append(story.read(first))
        assert is_busy(stream), "the host waited for the device"
        for each in found:
            story.compare(each)


def test_a_cache_dropped_while_blocks_come_back_writes_into_no_others_memory(arrays):
    with new_stream(arrays):
        story = Moves(arrays)
        first, side = story.written(0), story.side
        story.cache.offload(first)
        cupy.cuda.Device().synchronize()
        zeros = np.zeros(story.cache.num_bytes, np.uint8)
        gone = weakref.ref(story.cache)
        delay(side)
        story.cache.restore(first)
        del story, first
        assert gone() is None
        taken = [arrays.array(zeros) for _ in range(3)]
        cupy.cuda.Device().synchronize()
        for array in taken:
            assert not arrays.numpy(array).any()


def test_a_cache_dropped_behind_a_queued_step(arrays):
    with new_stream(arrays) as stream:
        delay(stream)
        # Without host blocks: to give pinned memory back, CUDA waits for the device.
        story, later = (Moves(arrays, num_host_blocks=0) for _ in range(2))
        first = story.written(0)
        later.written(50)
        other = later.written(100)
        later.cache._buffers = None  # so that it takes the first one's, were they to be had
        delay(stream)
        found = story.read(first)
        gone = weakref.ref(story.cache)
        del story, first
        assert gone() is None
        for _ in range(4):
            later.cache.batch([other])
        assert is_busy(stream), "the host waited for the device"
        later.compare(found)
