"""Thousands of hand-offs from framework to framework, on streams that wait for nobody.

Each round is queued while the device is still at earlier ones. All that they read and wrote is
compared at the end, so that nothing but the ops' own order keeps them apart.
"""

import functools
import itertools

import cupy
import numpy as np
import pytest

import cupy_paged
from support import frameworks
from support.workers import delay, is_busy, worker

ADAPTERS = frameworks.device()
CUPY = ADAPTERS[0]
ROUNDS = 1000
LAYOUT = {"layout": "HND"}
HEAD_SIZE, BLOCK_SIZE = 64, 16

PAIRS = list(itertools.permutations(ADAPTERS, 2))

by_name = {"ids": lambda arrays: arrays.name}
at_work = functools.cache(worker)


def delays(longest=0.2):
    """Milliseconds of each round: up to `longest`, and every hundredth time so many that a queue
    builds up."""
    short = np.random.default_rng(0).uniform(longest / 10, longest, ROUNDS)
    return [20.0 if i % 100 == 10 else ms for i, ms in enumerate(short.tolist())]


def numbered(rounds, *shape):
    """An array of `rounds` lines, each full of its own number; float16 has all of them."""
    lines = np.arange(rounds, dtype=np.float16).reshape(rounds, *[1] * len(shape))
    return np.broadcast_to(lines, (rounds, *shape)).copy()


def check_numbers(found, rounds=ROUNDS):
    want = numbered(rounds, *found.shape[1:])
    wrong = np.flatnonzero((found != want).reshape(rounds, -1).any(axis=1))
    at = f"first in round {wrong[0]}: {found[wrong[0]].ravel()[:4]}" if len(wrong) else ""
    assert not len(wrong), f"{len(wrong)} of {rounds} results are stale or overwritten, {at}"


def one_sequence(arrays, num_tokens):
    """Block tables and lengths of a sequence in the first blocks."""
    table = np.arange(-(-num_tokens // BLOCK_SIZE), dtype=np.int32)[None]
    return arrays.array(table), arrays.array(np.array([num_tokens], np.int32))


def caches_of_one_block(arrays):
    """Keys and values that are all zero: every token has the same weight."""
    shape = 1, 1, BLOCK_SIZE, HEAD_SIZE
    return [arrays.array(np.zeros(shape, np.float16)) for _ in "kv"]


class LateValues:
    """The giver writes the values; the query and the result are the taker's."""

    shape = 1, 1, HEAD_SIZE

    def __init__(self, giver, taker):
        giver.lines(numbered(ROUNDS, 1, 1, BLOCK_SIZE, HEAD_SIZE))
        self.query = taker.full(self.shape, 1)
        self.keys, _ = caches_of_one_block(taker.arrays)
        self.sequence = one_sequence(taker.arrays, BLOCK_SIZE)

    def __call__(self, values):
        return cupy_paged.paged_attention(self.query, self.keys, values, *self.sequence, **LAYOUT)


class LateQuery:
    """The giver writes the query, which finds one token by its key; the taker owns the output."""

    shape = 1, 1, HEAD_SIZE

    def __init__(self, giver, taker):
        keys = np.random.default_rng(0).choice([-1.0, 1.0], (ROUNDS, 1, 1, HEAD_SIZE))
        giver.lines(keys.astype(np.float16))
        num_blocks = -(-ROUNDS // BLOCK_SIZE)
        self.caches = []
        for lines in (keys, numbered(ROUNDS, HEAD_SIZE)):
            cache = np.full((num_blocks, 1, BLOCK_SIZE, HEAD_SIZE), np.nan, np.float16)
            cache.reshape(-1, HEAD_SIZE)[:ROUNDS] = lines.reshape(ROUNDS, HEAD_SIZE)
            self.caches.append(giver.arrays.array(cache))
        self.sequence = one_sequence(giver.arrays, ROUNDS)
        self.out = taker.full(self.shape, np.nan)

    def __call__(self, query):
        # The dot product is 64 with the right key, and at most 36 with the others: their
        # weights are nothing next to its.
        return cupy_paged.paged_attention(
            query, *self.caches, *self.sequence, out=self.out, scale=1.0, **LAYOUT
        )


class LateTokens:
    """The giver writes keys and values for the caches, which are the taker's."""

    shape = 2, 1, HEAD_SIZE

    def __init__(self, giver, taker):
        giver.lines(numbered(ROUNDS, 2, 1, HEAD_SIZE))
        self.cache, self.other = caches_of_one_block(taker.arrays)
        self.slots = taker.arrays.array(np.array([3, 4]))  # JAX has no int64

    def __call__(self, tokens):
        cupy_paged.reshape_and_cache_flash(
            tokens, tokens, self.other, self.cache, self.slots, "auto", 1.0, 1.0, **LAYOUT
        )
        return self.cache[0, :, 3:5].swapaxes(0, 1)


def check_hand_offs(task, giver, taker, tally):
    giver, taker = at_work(giver), at_work(taker)
    late = 0
    with giver, taker:
        run = task(giver, taker)
        run(giver.late(0, 0))  # compiles
        read, found = taker.reader(task.shape, ROUNDS)
        cupy.cuda.Device().synchronize()
        for i, milliseconds in enumerate(delays()):
            given = giver.late(i, milliseconds)
            result = run(given)
            late += giver.is_late(given)
            read(i, result)
        cupy.cuda.Device().synchronize()
        check_numbers(found())
    assert late >= ROUNDS // 10, f"only {late} of {ROUNDS} inputs were late: nothing is shown"
    tally("hand-offs", ROUNDS)
    tally("late hand-offs", late)
    tally("ways of hand-offs", 1)


@pytest.mark.parametrize(("giver", "taker"), PAIRS, **by_name)
def test_an_input_of_another_framework_is_awaited(giver, taker, tally):
    check_hand_offs(LateValues, giver, taker, tally)


@pytest.mark.parametrize("task", [LateQuery, LateTokens])
@pytest.mark.parametrize(("giver", "taker"), [p for p in PAIRS if p[1].writable], **by_name)
def test_an_output_of_another_framework_is_awaited_there(giver, taker, task, tally):
    check_hand_offs(task, giver, taker, tally)


@pytest.mark.parametrize(
    ("owner", "leader"), list(itertools.product(ADAPTERS, repeat=2)), **by_name
)
def test_memory_may_be_reused_right_after_the_call(owner, leader, tally):
    shape = 1, 1, BLOCK_SIZE, HEAD_SIZE
    owner, leader = at_work(owner), at_work(leader)
    late, places = 0, set()
    with owner, leader:
        query = leader.full((1, 1, HEAD_SIZE), 1)
        sequence = one_sequence(leader.arrays, BLOCK_SIZE)
        read, found = leader.reader((1, 1, HEAD_SIZE), ROUNDS)
        # JAX has no stream to offer: what it leads runs on CuPy's.
        address = getattr(leader, "address", cupy.cuda.get_current_stream().ptr)

        def attend(number):
            keys, values = owner.full(shape, 0), owner.full(shape, number)
            # Arrays that do not overlap never begin in the same place of their own size.
            places.add(owner.address_of(values) // values.nbytes)
            return cupy_paged.paged_attention(query, keys, values, *sequence, **LAYOUT)

        attend(0)
        cupy.cuda.Device().synchronize()
        places.clear()
        for i, milliseconds in enumerate(delays(longest=2)):  # than the host takes, when busy
            delay(address, milliseconds)
            out = attend(i)
            late += is_busy(address)
            for _ in range(2):
                owner.full(shape, np.nan)
            read(i, out)
        cupy.cuda.Device().synchronize()
        check_numbers(found())
    assert late >= ROUNDS // 10, f"only {late} of {ROUNDS} ops were late: nothing is shown"
    assert len(places) < ROUNDS, "no memory was used twice: nothing is shown"
    tally("hand-offs", ROUNDS)
    tally("late hand-offs", late)
    tally("ways of hand-offs", 1)


@pytest.mark.parametrize("arrays", [a for a in ADAPTERS if a.name == "jax"], **by_name)
def test_a_result_that_jax_still_reads_is_not_overwritten(arrays):
    rounds = 10  # JAX lets the host run ahead by some 30 computations, of which each takes two
    jax = at_work(arrays)
    query, keys = jax.full((1, 1, HEAD_SIZE), 1), jax.full((1, 1, BLOCK_SIZE, HEAD_SIZE), 0)
    values = [jax.full(keys.shape, i) for i in range(rounds)]
    sequence = one_sequence(arrays, BLOCK_SIZE)

    def attend_and_drop(i):
        return jax.negative(cupy_paged.paged_attention(query, keys, values[i], *sequence, **LAYOUT))

    jax.lines(numbered(1, 1))
    attend_and_drop(0).block_until_ready()
    for _ in range(3):
        jax.late(0, 20)  # JAX reads nothing before these are done
    negatives = [attend_and_drop(i) for i in range(rounds)]
    assert not negatives[0].is_ready(), "JAX was not late: nothing is shown"
    check_numbers(-np.stack([arrays.numpy(x) for x in negatives]), rounds)
