"""What holds for `PagedKVCache` over the arrays of any framework that can be written.

A test module subclasses `KVCacheSuite` and gives it an `arrays` fixture: an adapter of
`support.frameworks`. What a sequence has cached is checked through attention, in a cache whose dead
blocks are NaN, against the float64 oracle over keys and values kept aside.
"""

import contextlib
import random
import zlib

import numpy as np
import pytest

from cupy_paged import NeverFits, OutOfBlocks, PagedKVCache
from support import compare, oracle
from support.data import DTYPES

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 2, 4, 2, 16
SCALES = {"k_scale": [0.5, 0.25], "v_scale": 2.0}
EVERY_STORAGE = pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        ("float16", "vllm"),
        ("bfloat16", "HND"),
        ("float32", "NHD"),
        ("fp8", "vllm"),
        ("fp8_e5m2", "HND"),
    ],
)


class Story:
    """A cache, and beside it the keys and values that each of its sequences must have."""

    def __init__(self, arrays, dtype="float32", layout="HND", *, seed=0, **options):
        self.arrays, self.dtype = arrays, dtype
        self.query_dtype = "bfloat16" if dtype.startswith("fp8") else dtype
        self.random = random.Random(seed)
        self._made = {}
        options = {"num_blocks": 24, "block_size": 4, "poison": True, **SCALES, **options}
        like = arrays.array(np.zeros(1, np.float32))
        self.cache = PagedKVCache(
            NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_SIZE, dtype=dtype, layout=layout,
            like=like, **options,
        )  # fmt: skip

    def rows(self, sequence, count, kind):
        """Keys or values of a sequence's first tokens, in all layers: made from the tokens alone.

        As in a model, they follow from a token and from all before it.
        """
        made, tag = [], zlib.crc32(f"{kind} {sequence.salt}".encode())
        for token in sequence.tokens[:count]:
            tag = hash((tag, token))
            if tag not in self._made:
                draw = np.random.default_rng(tag & (2**63 - 1)).standard_normal
                self._made[tag] = draw((NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE))
            made.append(self._made[tag])
        shape = (count, NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE)
        return np.array(made).reshape(shape).astype(DTYPES[self.query_dtype])

    def contents(self, batch, starts):
        """Key and value of a batch's tokens, each [num_layers, num_tokens, ...], with padding."""
        num_tokens = batch.slot_mapping.shape[0]
        for kind in ("key", "value"):
            made = np.zeros(
                (NUM_LAYERS, num_tokens, NUM_KV_HEADS, HEAD_SIZE), DTYPES[self.query_dtype]
            )
            done = 0
            for start, (sequence, end, _) in zip(starts, batch.ends, strict=True):
                rows = self.rows(sequence, end, kind)[start:]
                made[:, done : done + len(rows)] = rows.swapaxes(0, 1)
                done += len(rows)
            yield made

    def step(self, sequences, each_token=False, **options):
        """Writes the pending tokens of some sequences, and checks what they attend to."""
        starts = [s.num_written for s in sequences]
        batch = self.cache.batch(sequences, each_token=each_token, **options)
        for layer, (key, value) in enumerate(zip(*self.contents(batch, starts), strict=True)):
            self.cache.write(layer, self.arrays.array(key), self.arrays.array(value), batch)
        spans = [(s, start, end) for start, (s, end, _) in zip(starts, batch.ends, strict=True)]
        if each_token:
            self.check(batch, [(s, n + 1) for s, start, end in spans for n in range(start, end)])
        else:
            self.check(batch, [(s, end) for s, _, end in spans])
        return batch

    def check(self, batch, rows):
        """Attention of a batch's rows, (sequence, length) each, against the oracle.

        Returns the results of all layers.
        """
        lens = self.arrays.numpy(batch.seq_lens)
        assert lens.tolist() == [n for _, n in rows] + [0] * (len(lens) - len(rows))
        query = self.query(len(lens))
        outs = []
        for layer in range(NUM_LAYERS):
            out = self.cache.attend(layer, self.arrays.array(query), batch)
            got, want = self.arrays.numpy(out), np.zeros(query.shape)
            outs.append(got)
            for row, (sequence, length) in enumerate(rows):
                want[row] = self.attended(sequence, length, layer, query[row])
            compare.close(got, want, self.query_dtype)
        return outs

    def query(self, num_rows):
        query = np.random.default_rng(0).standard_normal((num_rows, NUM_HEADS, HEAD_SIZE))
        return query.astype(DTYPES[self.query_dtype])

    def attended(self, sequence, length, layer, query):
        key, value = (self.rows(sequence, length, kind)[:, layer] for kind in ("key", "value"))
        scales = SCALES["k_scale"][layer], SCALES["v_scale"]
        if self.dtype in oracle.FP8:
            key, value = (
                oracle.values(oracle.quantise(x, scale, self.dtype)) * scale
                for x, scale in zip((key, value), scales, strict=True)
            )
        key, value, query = (x.astype(np.float64) for x in (key, value, query))
        out = np.zeros((NUM_HEADS, HEAD_SIZE))
        for head in range(NUM_HEADS):
            kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
            logits = HEAD_SIZE**-0.5 * (key[:, kv_head] @ query[head])
            out[head], *_ = oracle.softmax_sum(logits, value[:, kv_head])
        return out

    def on_device(self):
        """The sequences that are not offloaded."""
        return [s for s in self.cache.sequences if not s.is_offloaded]

    def attempt(self):
        """One random operation on the sequences, which may find no room."""
        cache, draw = self.cache, self.random
        if not cache.sequences or draw.random() < 0.25:
            prompt = [draw.choice((0, 0, 0, 1)) for _ in range(draw.randrange(30))]
            cache.add(prompt, salt=draw.choice((None, None, "adapter")))
            return
        sequence = draw.choice(cache.sequences)
        kind = draw.random()
        if sequence.is_offloaded:
            if kind < 0.7:
                cache.restore(sequence)
            elif kind < 0.85:
                cache.truncate(sequence, draw.randrange(len(sequence) + 1))
            else:
                cache.free(sequence)
        elif cache.num_host_blocks and draw.random() < 0.2:
            cache.offload(sequence)
        elif kind < 0.5:
            cache.append(sequence, [draw.randrange(3) for _ in range(draw.choice((1, 1, 5)))])
        elif kind < 0.7 and not sequence.num_pending:
            cache.fork(sequence)
        elif kind < 0.85:
            cache.truncate(sequence, draw.randrange(len(sequence) + 1))
        else:
            cache.free(sequence)


class KVCacheSuite:
    @EVERY_STORAGE
    def test_random_story_through_attention(self, arrays, seed, dtype, layout):
        story = Story(arrays, dtype, layout, seed=seed, num_host_blocks=16)
        refused = 0
        for number in range(600):  # 60, and on until everything has happened
            for _ in range(story.random.randrange(1, 6)):
                try:
                    story.attempt()
                except (OutOfBlocks, NeverFits):
                    refused += 1
            story.step([s for s in story.on_device() if story.random.random() < 0.7])
            found = story.cache.statistics
            seen = min(refused, *found[:1], *found[2:]) > 0
            if seen and number >= 60:
                break
        assert seen

    def test_random_story_without_poison(self, arrays, seed):
        """Copies wait for the next batch then, whatever becomes of their blocks before."""
        story = Story(arrays, seed=seed, poison=False, num_host_blocks=16)
        for _ in range(60):
            for _ in range(story.random.randrange(1, 12)):
                with contextlib.suppress(OutOfBlocks, NeverFits):
                    story.attempt()
            story.step(story.on_device())

    @pytest.mark.parametrize("length", range(9))
    def test_fork_at_every_offset(self, arrays, length):
        story = Story(arrays)
        first = story.cache.add(range(length))
        story.step([first])
        twins = [first, story.cache.fork(first), story.cache.fork(first)]
        for step in range(6):
            for number, twin in enumerate(twins):
                story.cache.append(twin, [100 * number + step])
            story.step(twins)

    def test_sequences_come_back_from_the_host(self, arrays):
        story = Story(arrays, num_host_blocks=24, prefix_caching=False)
        cache = story.cache
        sequences = [cache.add(range(start, start + 9)) for start in (0, 50)]
        story.step(sequences)
        sequences.append(cache.fork(sequences[0]))
        for step in range(8):
            for number, sequence in enumerate(sequences):
                cache.append(sequence, [100 * number + step])
            for sequence in sequences[step % 2 :]:  # some with a copy that waits for the batch
                cache.offload(sequence)
            story.step(story.on_device())
            if step == 5:  # all blocks are used once between
                other = cache.add(count=4 * cache.num_available)
                cache.batch([other])
                cache.free(other)
            for sequence in sequences[step % 2 :]:
                cache.restore(sequence)
            story.step(sequences)
        assert cache.num_host_available == 24
        assert cache.statistics.restored == cache.statistics.offloaded > 40

    def test_chunks_of_a_prompt_in_padded_batches(self, arrays):
        story = Story(arrays)
        sequences = [story.cache.add(range(start, start + 11)) for start in (0, 50)]
        batch = story.step(sequences, max_tokens=8, num_seqs=4, num_tokens=12)
        assert [s.num_written for s in sequences] == [8, 0]
        assert (batch.last_tokens.tolist(), batch.completed.tolist()) == ([7, -1], [])
        batch = story.step(sequences, max_tokens=8, num_seqs=4, num_tokens=12)
        assert [s.num_written for s in sequences] == [11, 5]
        assert (batch.last_tokens.tolist(), batch.completed.tolist()) == ([2, 7], [0])
        batch = story.step(sequences, num_seqs=4, num_tokens=12)
        assert (batch.last_tokens.tolist(), batch.completed.tolist()) == ([-1, 5], [1])
        assert story.arrays.numpy(batch.positions).tolist() == [5, 6, 7, 8, 9, 10] + [0] * 6
        assert story.arrays.numpy(batch.token_ids).tolist()[:6] == list(range(55, 61))
        assert story.arrays.numpy(batch.slot_mapping).tolist()[6:] == [-1] * 6

    def test_row_for_each_token(self, arrays):
        story = Story(arrays)
        sequences = [story.cache.add(range(start, start + 9)) for start in (0, 50)]
        story.cache.append(sequences[0], [7])
        story.step(sequences, each_token=True, num_tokens=24)

    def test_arrays_of_batches_keep_their_addresses(self, arrays):
        story = Story(arrays, max_num_seqs=3, max_num_tokens=20, max_seq_len=18)
        first = story.cache.add(range(5))
        one = story.step([first])
        second = story.cache.add(range(18))
        two = story.step([first, second], num_seqs=3)
        for name in ("block_tables", "seq_lens", "slot_mapping", "positions", "token_ids"):
            assert same_address(getattr(one, name), getattr(two, name))
        assert one.max_seq_len == two.max_seq_len == 20
        assert two.block_tables.shape[1] == 5

    def test_dead_blocks_are_nan(self, arrays):
        story = Story(arrays, "float16", prefix_caching=False)
        sequence = story.cache.add(range(11))
        story.step([sequence])
        blocks = list(sequence.blocks)

        def is_nan():
            caches = story.cache.key_caches + story.cache.value_caches
            return [np.isnan(story.arrays.numpy(cache)).all((1, 2, 3)) for cache in caches]

        assert not any(nan[blocks].any() for nan in is_nan())
        story.cache.free(sequence)
        assert all(nan.all() for nan in is_nan())


def same_address(a, b):
    def pointer(x):
        if hasattr(x, "data_ptr"):
            return x.data_ptr()
        return x.data.ptr if hasattr(x.data, "ptr") else x.ctypes.data

    return pointer(a) == pointer(b)
