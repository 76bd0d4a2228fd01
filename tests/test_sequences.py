"""Sequences over shared blocks: a fuzzed model, prefix caching, collisions, errors."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cupy_paged import prefix_index
from cupy_paged.block_allocator import NeverFits, OutOfBlocks
from cupy_paged.sequences import SequencePool
from support.pool_model import TIMES, Fuzzer, PoolModel

NUM_STEPS = 100_000 * TIMES


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "options"),
    [
        (24, 4, {}),
        (7, 3, {}),
        (60, 1, {}),
        (40, 2, {"max_blocks": 9}),
        (24, 4, {"prefix_caching": False}),
        (24, 4, {"num_host_blocks": 9}),
        (7, 3, {"num_host_blocks": 3}),
        (24, 2, {"prefix_caching": False, "num_host_blocks": 7}),
    ],
)
def test_pool_agrees_with_a_simple_model(seed, num_blocks, block_size, options, tally):
    fuzzer = Fuzzer(seed, num_blocks, block_size, **options)
    for step in range(NUM_STEPS):
        fuzzer.step()
        if step % 500 == 0:
            fuzzer.model.check_all()
    fuzzer.model.check_all()
    outcomes = fuzzer.model.outcomes
    hits = {"prefix hit"} if options.get("prefix_caching", True) else set()
    kinds = {"out of cache blocks", "never fits", "no hit", "forked", "truncated", "freed"} | hits
    if options.get("num_host_blocks"):
        kinds |= {"out of host blocks", "offloaded", "restored"}
        found = fuzzer.model.pool.statistics
        assert 100 < found.restored < found.offloaded
    for kind in kinds:
        assert outcomes[kind] > 100, (kind, outcomes)
    assert (fuzzer.model.pool.statistics.copies > 100) == (block_size > 1)
    for sequence in list(fuzzer.model.sequences):
        fuzzer.model.free(sequence)
    fuzzer.model.pool.allocator.evict()
    fuzzer.model.check_all()
    assert fuzzer.model.pool.allocator.num_free == num_blocks
    assert len(fuzzer.model.pool.index) == 0
    if fuzzer.model.pool.host is not None:
        assert fuzzer.model.pool.host.allocator.num_used == 0
        assert len(fuzzer.model.pool.host._index) == 0
    tally("pool operations", NUM_STEPS)


def test_collisions_of_hashes_change_nothing(monkeypatch, seed):
    """With one hash for everything, the pool does what it does with real hashes."""
    honest = Fuzzer(seed, 16, 2)
    for _ in range(5000):
        honest.step()
    monkeypatch.setattr(prefix_index, "content_hash", lambda parent_hash, tokens: 0)
    fuzzer = Fuzzer(seed, 16, 2)
    for step in range(5000):
        fuzzer.step()
        if step % 50 == 0:
            fuzzer.model.check_all()
    assert fuzzer.model.state() == honest.model.state()
    assert fuzzer.model.outcomes == honest.model.outcomes
    assert honest.model.outcomes["prefix hit"] > 100


class PoolMachine(RuleBasedStateMachine):
    """The model, driven by hypothesis, which shrinks what fails to a short story."""

    def __init__(self):
        super().__init__()
        self.model = PoolModel(num_blocks=6, block_size=2, num_host_blocks=4)

    def pick(self, data):
        return data.draw(st.sampled_from(self.model.sequences))

    @rule(tokens=st.lists(st.integers(0, 1), max_size=9), salt=st.sampled_from([None, 7]))
    def add(self, tokens, salt):
        self.model.add(tokens, salt)

    @precondition(lambda self: self.model.sequences)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), max_size=5))
    def append(self, data, tokens):
        self.model.append(self.pick(data), tokens)

    @precondition(lambda self: self.model.sequences)
    @rule(data=st.data())
    def write(self, data):
        sequence = self.pick(data)
        if sequence.is_offloaded:
            return
        self.model.write(sequence, data.draw(st.integers(sequence.num_written, len(sequence))))

    @precondition(lambda self: self.model.sequences)
    @rule(data=st.data())
    def fork(self, data):
        self.model.fork(self.pick(data))

    @precondition(lambda self: self.model.sequences)
    @rule(data=st.data())
    def truncate(self, data):
        sequence = self.pick(data)
        self.model.truncate(sequence, data.draw(st.integers(0, len(sequence))))

    @precondition(lambda self: self.model.sequences)
    @rule(data=st.data())
    def offload(self, data):
        self.model.offload(self.pick(data))

    @precondition(lambda self: self.model.sequences)
    @rule(data=st.data())
    def restore(self, data):
        self.model.restore(self.pick(data))

    @precondition(lambda self: self.model.sequences)
    @rule(data=st.data())
    def free(self, data):
        self.model.free(self.pick(data))

    @invariant()
    def everything_holds(self):
        self.model.check_all()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def written(pool, tokens, **options):
    sequence = pool.add(tokens, **options)
    pool.commit(sequence, len(tokens))
    return sequence


def test_prefix_is_found_while_held_and_after():
    pool = SequencePool(8, 4)
    prompt = list(range(11))
    first = written(pool, prompt)
    second = pool.add(prompt)
    assert second.num_cached == second.num_written == 8
    assert list(second.blocks)[:2] == list(first.blocks)[:2]
    assert pool.allocator.num_shared == 2
    pool.free(first)
    pool.free(second)
    assert (pool.allocator.num_kept, pool.allocator.num_used) == (2, 0)
    assert pool.add(prompt).num_cached == 8
    assert pool.statistics[:3] == (4, 2, 0)
    assert pool.statistics.hit_rate == pytest.approx(4 / 6)


def test_last_token_is_never_taken_from_the_cache():
    pool = SequencePool(8, 4)
    written(pool, range(8))
    assert pool.add(range(8)).num_cached == 4
    assert pool.add(range(9)).num_cached == 8


def test_what_is_not_written_is_not_found():
    pool = SequencePool(12, 4)
    aborted = pool.add(range(9))
    assert pool.add(range(9)).num_cached == 0
    pool.free(aborted)
    assert pool.add(range(9)).num_cached == 0


def test_salts_share_nothing():
    pool = SequencePool(12, 4)
    written(pool, range(9), salt="one")
    assert pool.add(range(9), salt="two").num_cached == 0
    assert pool.add(range(9), salt="one").num_cached == 8


def test_unknown_tokens_are_never_found():
    pool = SequencePool(12, 4)
    first = pool.add([1, 2], count=10)
    pool.commit(first, 12)
    assert pool.add([1, 2], count=10).num_cached == 0


def test_same_tokens_after_another_beginning_are_not_found():
    pool = SequencePool(12, 2)
    written(pool, [1, 1, 5, 5, 6])
    assert pool.add([2, 2, 5, 5, 6]).num_cached == 0


def test_longest_unused_goes_first_and_the_end_before_the_beginning():
    pool = SequencePool(6, 2)
    for start in (0, 10):
        pool.free(written(pool, range(start, start + 6)))
    assert pool.allocator.num_kept == 6
    pool.free(pool.add([0, 1, 2]))  # the first is used again; it has lost nothing yet
    pool.free(pool.add([99] * 3))
    assert pool.add([10, 11, 12]).num_cached in (0, 2)
    assert pool.add([0, 1, 2]).num_cached == 2


def test_one_block_too_few_costs_a_kept_prefix_its_end_alone():
    pool = SequencePool(4, 2)
    pool.free(written(pool, range(6)))
    pool.free(pool.add([99] * 3))
    assert pool.statistics.evictions == 1
    assert pool.add(range(7)).num_cached == 4


def test_fork_copies_the_last_block_when_one_of_the_two_goes_on():
    copies = []
    pool = SequencePool(8, 4, copy=lambda *pair: copies.append(pair))
    first = written(pool, range(6))
    second = pool.fork(first)
    assert list(first.blocks) == list(second.blocks)
    pool.append(second, [7])
    assert copies == [(first.blocks[1], second.blocks[1])]
    pool.append(first, [8])
    assert len(copies) == 1  # it has the block for itself now
    assert first.blocks[0] == second.blocks[0]


@pytest.mark.parametrize("length", range(9))
def test_fork_at_every_offset(length):
    model = PoolModel(num_blocks=12, block_size=4)
    first = model.add(list(range(length)))
    model.write(first, length)
    model.fork(first)
    for number, sequence in enumerate(model.sequences):
        for token in range(6):
            model.append(sequence, [100 * number + token])
            model.write(sequence, len(sequence))
            model.check_all()


def test_block_that_was_found_is_not_written_after_a_truncation():
    model = PoolModel(num_blocks=8, block_size=4)
    first = model.add([0, 1, 2, 3, 4])
    model.write(first, 5)
    model.truncate(first, 2)
    model.append(first, [9, 9, 9])
    model.write(first, 5)
    model.check_all()
    assert model.add([0, 1, 2, 3, 4]).num_cached == 0
    assert model.add([0, 1, 9, 9, 9]).num_cached == 4


def test_every_allocation_fails_once_and_changes_nothing():
    rng = random.Random(0)
    for num_free in range(4):
        model = PoolModel(num_blocks=6, block_size=2)
        held = model.add([rng.randrange(9) for _ in range(2 * (6 - num_free))])
        model.write(held, len(held))
        assert (model.add([1, 2, 3]) is None) == (num_free < 2)
        model.append(held, [1] * 5)
        model.check_all()


def test_out_of_blocks_says_how_many():
    pool = SequencePool(4, 2)
    first = pool.add(range(5))
    with pytest.raises(OutOfBlocks, match="3 needed, 1 free, 4 in all") as caught:
        pool.add(range(10, 16))
    assert (caught.value.needed, caught.value.free, caught.value.total) == (3, 1, 4)
    assert str(caught.value).endswith(" 4 in all; held by 1 sequence: free one")
    pool.add([7])
    pool.add()  # holds nothing
    with pytest.raises(OutOfBlocks, match=r"; held by 2 sequences: free one$"):
        pool.append(first, range(2))
    with pytest.raises(NeverFits, match="5 cache blocks needed, 4 in all"):
        pool.add(range(9))
    with pytest.raises(NeverFits):
        pool.append(first, range(9))
    with pytest.raises(NeverFits, match="2 cache blocks needed, 1 to a sequence"):
        SequencePool(4, 2, max_blocks=1).add(range(3))


def test_wrong_sequences_and_tokens():
    pool, other = SequencePool(4, 2), SequencePool(4, 2)
    sequence = pool.add([1])
    with pytest.raises(ValueError, match="another cache's"):
        other.free(sequence)
    with pytest.raises(TypeError, match="got int, needs a Sequence"):
        pool.free(3)
    with pytest.raises(ValueError, match="1 tokens are pending"):
        pool.fork(sequence)
    with pytest.raises(ValueError, match="num_tokens: got 2, the sequence has 1"):
        pool.truncate(sequence, 2)
    with pytest.raises(ValueError, match="the sequence has 1"):
        pool.commit(sequence, 2)
    with pytest.raises(ValueError, match="got id -1"):
        pool.append(sequence, [-1])
    with pytest.raises(ValueError, match="count: got -1"):
        pool.add(count=-1)
    with pytest.raises(TypeError):
        pool.add([1.5])
    for call in (lambda: pool.add(count=1.5), lambda: pool.append(sequence, count=1.5)):
        with pytest.raises(TypeError, match=r"^count: got 1\.5, needs an int"):
            call()
    with pytest.raises(TypeError, match=r"^salt: unhashable type: 'list', needs a value"):
        pool.add([1], salt=[])
    assert repr(sequence) == "<Sequence of 1 tokens in 1 blocks, 1 pending>"
    pool.free(sequence)
    assert repr(sequence) == "<Sequence, freed>"
    with pytest.raises(ValueError, match="was freed"):
        pool.free(sequence)


def test_what_can_never_fit_is_refused_before_room_is_made_for_it():
    pool = SequencePool(8, 4)
    sequence = pool.add([1])
    for call in (lambda: pool.add(count=10**12), lambda: pool.append(sequence, count=10**12)):
        with pytest.raises(NeverFits):
            call()


def test_token_ids_have_63_bits():
    pool = SequencePool(8, 4)
    pool.add([2**63 - 1])
    with pytest.raises(ValueError, match=f"^tokens: got id {2**63},"):
        pool.add([1, 2**63])


# ---- on the host ----


def test_an_offloaded_sequence_gives_up_its_blocks_and_gets_them_back():
    copied = []
    pool = SequencePool(
        8, 4, num_host_blocks=8, copy_out=lambda pairs: copied.append(("out", pairs)),
        copy_in=lambda pairs: copied.append(("in", pairs)), prefix_caching=False,
    )  # fmt: skip
    sequence = written(pool, range(10))
    pool.append(sequence, range(7))  # a block more, of pending tokens alone
    blocks = list(sequence.blocks)
    pool.offload(sequence)
    assert (pool.allocator.num_free, len(sequence.blocks)) == (8, 0)
    assert repr(sequence) == "<Sequence of 17 tokens in 3 host blocks, 7 pending>"
    assert copied == [("out", list(zip(blocks, sequence.host_blocks, strict=False)))]
    host_blocks = list(sequence.host_blocks)
    pool.restore(sequence)
    assert (len(sequence.blocks), sequence.num_pending) == (5, 7)
    assert copied[1:] == [("in", list(zip(host_blocks, sequence.blocks, strict=False)))]
    assert pool.host.allocator.num_free == 8
    assert (pool.statistics.offloaded, pool.statistics.restored) == (3, 3)


def test_what_is_still_cached_is_found_when_a_sequence_is_restored():
    pool = SequencePool(8, 4, num_host_blocks=8)
    sequence = written(pool, range(10))
    blocks = list(sequence.blocks)
    pool.offload(sequence)
    assert (pool.allocator.num_kept, pool.allocator.num_used) == (2, 0)
    pool.restore(sequence)
    assert list(sequence.blocks)[:2] == blocks[:2]
    assert (pool.statistics.offloaded, pool.statistics.restored) == (3, 1)
    pool.offload(sequence)
    pool.free(pool.add(range(100, 132)))  # the whole cache
    pool.restore(sequence)
    assert pool.statistics.restored == 4
    assert pool.add(range(10)).num_cached == 8


def test_a_prefix_stays_for_the_others_and_is_on_the_host_once():
    pool = SequencePool(16, 4, num_host_blocks=4)
    first = written(pool, range(9))
    twin = pool.fork(first)
    pool.offload(first)
    assert pool.allocator.num_used == len(twin.blocks) == 3
    pool.offload(twin)
    assert pool.allocator.num_used == 0
    assert list(first.host_blocks)[:2] == list(twin.host_blocks)[:2]
    assert (pool.host.allocator.num_free, pool.statistics.offloaded) == (0, 4)
    pool.allocator.evict()
    pool.restore(twin)
    pool.restore(first)
    assert list(first.blocks)[:2] == list(twin.blocks)[:2]
    assert (pool.statistics.restored, pool.host.allocator.num_free) == (4, 4)


def test_offloaded_sequences_can_be_truncated_and_freed():
    pool = SequencePool(8, 4, num_host_blocks=8)
    sequence = written(pool, range(10))
    pool.append(sequence, [1, 2])
    pool.offload(sequence)
    pool.truncate(sequence, 11)
    assert (len(sequence.host_blocks), sequence.num_pending) == (3, 1)
    pool.truncate(sequence, 6)
    assert (len(sequence.host_blocks), sequence.num_pending) == (2, 0)
    pool.restore(sequence)
    assert (len(sequence.blocks), len(sequence)) == (2, 6)
    pool.offload(sequence)
    pool.free(sequence)
    assert pool.host.allocator.num_free == 8


def test_what_an_offloaded_sequence_cannot_do():
    pool = SequencePool(8, 4, num_host_blocks=2)
    sequence = written(pool, range(6))
    with pytest.raises(ValueError, match="was not offloaded, has nothing to be restored"):
        pool.restore(sequence)
    pool.offload(sequence)
    for call in (
        lambda: pool.append(sequence, [1]),
        lambda: pool.fork(sequence),
        lambda: pool.commit(sequence, 6),
        lambda: pool.offload(sequence),
    ):
        with pytest.raises(
            ValueError, match=r"^sequence: is offloaded, needs to be restored first"
        ):
            call()
    with pytest.raises(
        OutOfBlocks, match="out of host blocks: 1 needed, 0 free, 2 in all"
    ) as caught:
        pool.offload(written(pool, range(100, 103)))
    assert caught.value.kind == "host"
    with pytest.raises(NeverFits, match="can never fit: 3 host blocks needed, 2 in all"):
        pool.offload(written(pool, range(200, 210)))
    pool.add(range(300, 312))
    words = (
        r"out of cache blocks: 1 needed, 0 free, 8 in all; "
        r"held by \d sequences?: free or offload one$"
    )
    with pytest.raises(OutOfBlocks, match=words):
        pool.restore(sequence)
    with pytest.raises(ValueError, match="num_host_blocks: is 0"):
        pool = SequencePool(8, 4)
        pool.offload(pool.add([1]))
