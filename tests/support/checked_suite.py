"""What checked mode finds, with the arrays of any framework."""

import contextlib
import re

import numpy as np
import pytest

import cupy_paged
from cupy_paged import checked_mode
from support import compare, ops
from support.data import Case, build

BLOCK_SIZE, NUM_BLOCKS, HEADS, HEAD_SIZE = 16, 12, 2, 32
SHAPE = NUM_BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE


def problem():
    """Three sequences, of which the second needs all its columns and the last leaves some."""
    return build(Case(seq_lens=(0, 100, 40), num_kv_heads=HEADS, head_size=HEAD_SIZE))


def with_number(array, at, number):
    changed = array.copy()
    changed[at] = number
    return changed


class Mode:
    @pytest.fixture(autouse=True)
    def mode(self, tally):
        self.tally = tally
        with cupy_paged.checked():
            yield

    @contextlib.contextmanager
    def refused(self, kind, message):
        """Expects an error that begins with these words, and counts it."""
        with pytest.raises(kind, match=f"^{re.escape(message)}"):
            yield
        self.tally("faults named in checked mode", 1)


class CheckedReadsSuite(Mode):
    def attend(self, arrays, **changes):
        given = ops.arguments(problem(), arrays)
        given |= {name: arrays.array(value) for name, value in changes.items()}
        return arrays.numpy(cupy_paged.paged_attention(**given))

    def test_right_calls_come_out_as_ever(self, arrays):
        found = self.attend(arrays)
        with cupy_paged.checked(False):
            assert not checked_mode.is_on()
            compare.bitwise(found, self.attend(arrays))

    @pytest.mark.parametrize("excess", [None, 1, 10_000])
    def test_lengths(self, arrays, excess):
        given = problem()
        capacity = given.block_tables.shape[1] * BLOCK_SIZE
        length = -1 if excess is None else capacity + excess
        message = f"seq_lens: sequence 2 has {length} tokens, needs 0 to {capacity}"
        with self.refused(ValueError, message):
            self.attend(arrays, seq_lens=with_number(given.seq_lens, 2, length))

    @pytest.mark.parametrize("block", [-1, 10**6, 2**31 - 1])
    @pytest.mark.parametrize(("seq", "position"), [(1, 0), (1, 6), (2, 2)])
    def test_blocks(self, arrays, seq, position, block):
        tables = with_number(problem().block_tables, (seq, position), block)
        message = f"block_tables: sequence {seq} has block {block} at position {position}, needs 0"
        with self.refused(IndexError, message):
            self.attend(arrays, block_tables=tables)

    def test_the_first_block_past_the_end(self, arrays):
        given = problem()
        end = given.key_cache.shape[0]
        tables = with_number(given.block_tables, (1, 3), end)
        message = f"block_tables: sequence 1 has block {end} at position 3, needs 0 to {end - 1}"
        with self.refused(IndexError, message):
            self.attend(arrays, block_tables=tables)

    def test_what_is_not_live_may_be_anything(self, arrays):
        tables = problem().block_tables.copy()
        tables[0], tables[2, 3:] = -7, 10**6
        compare.bitwise(self.attend(arrays, block_tables=tables), self.attend(arrays))

    def test_a_call_like_one_that_was_right_is_checked(self, arrays):
        with cupy_paged.checked(False):
            self.attend(arrays)  # prepares the calls that are like it
        with self.refused(IndexError, "block_tables: sequence 1"):
            self.attend(arrays, block_tables=with_number(problem().block_tables, (1, 0), 999))


class CheckedWritesSuite(Mode):
    """For arrays that can be written."""

    def write(self, arrays, slots):
        """What a writer leaves in a cache of zeros, or what it raises, with the cache unchanged."""
        rows = np.ones((len(slots), HEADS, HEAD_SIZE), np.float16)
        caches = [arrays.array(np.zeros(SHAPE, np.float16)) for _ in range(2)]
        key, value, mapping = map(arrays.array, (rows, rows, np.array(slots, np.int64)))
        try:
            cupy_paged.reshape_and_cache_flash(key, value, *caches, mapping, "auto", 1.0, 1.0)
        except Exception:
            assert not any(arrays.numpy(cache).any() for cache in caches)
            raise
        return arrays.numpy(caches[0])

    def test_slots(self, arrays):
        end = NUM_BLOCKS * BLOCK_SIZE
        with self.refused(
            IndexError, f"slot_mapping: token 2 has slot {end}, needs less than {end}"
        ):
            self.write(arrays, [3, -1, end, end + 1])
        with self.refused(ValueError, "slot_mapping: tokens 1 and 4 have one slot, 9"):
            self.write(arrays, [3, 9, -1, -1, 9])
        assert np.count_nonzero(self.write(arrays, [3, 9, -1, -1])) == 2 * HEADS * HEAD_SIZE

    def test_slots_of_latents(self, arrays):
        latent, cache = np.ones((2, 32), np.float16), np.zeros((3, 16, 40), np.float16)
        given = [arrays.array(a) for a in (latent, latent[:, :8], cache, np.array([5, 48]))]
        with self.refused(IndexError, "slot_mapping: token 1 has slot 48, needs less than 48"):
            cupy_paged.concat_and_cache_mla(*given, "auto", 1.0)
        assert not arrays.numpy(given[2]).any()

    @pytest.mark.parametrize(
        ("ends", "starts", "kind", "message"),
        [
            ([0, 5, 3], [0, 0], ValueError, "cu_seq_lens: 3 at 2, needs at least 5"),
            ([-1, 5, 9], [0, 0], ValueError, "cu_seq_lens: -1 at 0, needs at least 0"),
            ([0, 5, 9], [0, -2], ValueError, "seq_starts: sequence 1 starts at token -2, needs 0"),
            ([0, 5, 9], [44, 0], IndexError, "block_tables: sequence 0 is asked for 49 tokens"),
            (
                [0, 5, 9],
                [14, 30],
                IndexError,
                "block_tables: sequence 1 has block 77 at",
            ),
        ],
    )
    def test_gathered_tokens(self, arrays, ends, starts, kind, message):
        rows = [arrays.array(np.zeros((9, HEADS, HEAD_SIZE), np.float16)) for _ in range(2)]
        caches = [arrays.array(np.ones(SHAPE, np.float16)) for _ in range(2)]
        tables = arrays.array(np.array([[1, 2, 99], [99, 4, 77]], np.int32))
        ends, starts = (arrays.array(np.array(x, np.int32)) for x in (ends, starts))
        with self.refused(kind, message):
            cupy_paged.gather_cache(*rows, *caches, tables, ends, starts, layout="NHD")
        assert not arrays.numpy(rows[0]).any()

    def test_copied_blocks(self, arrays):
        cache = arrays.array(np.arange(4, dtype=np.float32).reshape(4, 1))
        with self.refused(IndexError, "block_mapping: destination block 4, needs less than 4"):
            cupy_paged.copy_blocks([cache], [], arrays.array(np.array([[0, 4]])))
        with self.refused(ValueError, "block_mapping: block 2 is the destination of two pairs"):
            cupy_paged.copy_blocks([cache], [], arrays.array(np.array([[0, 2], [1, 2]])))
        cupy_paged.copy_blocks([cache], [], arrays.array(np.array([[3, 0]])))
        assert arrays.numpy(cache)[:, 0].tolist() == [3, 1, 2, 3]
