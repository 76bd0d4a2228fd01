"""`PagedKVCache` on a GPU: contents through attention, and decode steps in a CUDA graph."""

import cupy
import pytest

from support import compare, frameworks
from support.kv_cache_suite import NUM_LAYERS, KVCacheSuite, Story


@pytest.fixture(params=frameworks.writable(frameworks.device()), ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestKVCache(KVCacheSuite):
    pass


def test_decode_steps_replayed_from_a_graph():
    arrays = frameworks.device()[0]
    story = Story(arrays, "float16", max_num_seqs=4, max_num_tokens=16, max_seq_len=40)
    cache = story.cache
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        sequences = [cache.add(range(9)), cache.add(range(20, 25))]
        story.step(sequences)
        query = arrays.array(story.query(4))
        outs = [cupy.empty_like(query) for _ in range(NUM_LAYERS)]

        def step(replay=None):
            for sequence in cache.sequences:
                cache.append(sequence, [sequence.tokens[0]])
            starts = [s.num_written for s in cache.sequences]
            batch = cache.batch(cache.sequences, num_seqs=4, num_tokens=4)
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
            if number == 8:
                cache.free(sequences[1])
            batch = step(lambda: graph.launch(stream))
            eager = story.check(batch, [(s, len(s)) for s in cache.sequences])
            for got, want in zip(outs, eager, strict=True):
                compare.bitwise(arrays.numpy(got), want)
