"""Which arrays share memory: those that lie in each other's gaps do not."""

import itertools

import numpy as np
import pytest

from cupy_paged import overlap
from cupy_paged.arrays import HOST, Array, array

NUM_BLOCKS, HEADS, BLOCK_SIZE, HEAD_SIZE = 5, 2, 4, 8


def named(**views):
    return [array(view, name) for name, view in views.items()]


def names(found):
    return found and tuple(a.name for a in found)


def at(name, pointer, shape, strides, dtype="uint8"):
    """An array of addresses alone."""
    return Array(name, None, "cupy", dtype, shape, strides, pointer, 0, True)


INTERLEAVED = {
    "block by block": ((NUM_BLOCKS, 2, HEADS, BLOCK_SIZE, HEAD_SIZE), 1),
    "head by head": ((NUM_BLOCKS, HEADS, 2, BLOCK_SIZE, HEAD_SIZE), 2),
    "token by token": ((NUM_BLOCKS, BLOCK_SIZE, 2, HEADS, HEAD_SIZE), 2),
    "token and head": ((NUM_BLOCKS, BLOCK_SIZE, HEADS, 2, HEAD_SIZE), 3),
    "channel by channel": ((NUM_BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE, 2), 4),
}


@pytest.mark.parametrize(("shape", "axis"), INTERLEAVED.values(), ids=INTERLEAVED)
def test_keys_and_values_take_turns_in_one_allocation(shape, axis):
    memory = np.zeros(shape, np.float16)
    turns = np.moveaxis(memory, axis, 0)
    keys, values = named(keys=turns[0], values=turns[1])
    assert overlap.sharing([keys, values], []) is None
    assert overlap.sharing([keys], [values]) is None
    both = array(memory, "both")
    assert names(overlap.sharing([keys], [both])) == ("keys", "both")
    assert names(overlap.sharing([both], [values])) == ("both", "values")


def test_blocks_of_several_sizes_lie_in_one_period():
    memory = np.zeros((NUM_BLOCKS, 100), np.uint8)
    parts = named(a=memory[:, :10], b=memory[:, 10:70], c=memory[:, 75:76], d=memory[:, 99:])
    assert overlap.sharing(parts, []) is None
    (late,) = named(late=memory[1:, 69:75])
    assert names(overlap.sharing(parts, [late])) == ("b", "late")


def test_a_block_goes_on_past_the_end_of_a_period():
    memory = np.zeros(NUM_BLOCKS * 100 + 50, np.uint8)
    first = memory[: NUM_BLOCKS * 100].reshape(-1, 100)[:, :30]
    second = memory[80 : NUM_BLOCKS * 100 + 80 - 100].reshape(-1, 100)
    wraps = named(first=first, wraps=second[:, :20])
    assert overlap.sharing(wraps, []) is None
    wraps = named(first=first, wraps=second[:, :21])
    assert names(overlap.sharing(wraps, [])) == ("wraps", "first")


@pytest.mark.parametrize("moved", [-1, 0, 1])
def test_one_byte_in_common_is_enough(moved):
    step = 2 * 4096
    keys = at("keys", 2**40, (100_000, 2048), (step // 2, 1), "float16")
    values = at("values", 2**40 + 4096 + moved, (100_000, 4096), (step, 1))
    found = overlap.sharing([keys, values], [])
    assert names(found) == (None if moved == 0 else ("values", "keys"))


def test_arrays_that_are_only_read_may_share():
    memory = np.zeros((4, 8), np.float32)
    written, again, whole = named(written=np.zeros_like(memory), again=memory[1:], whole=memory)
    assert overlap.sharing([written], [again, whole, whole]) is None


def test_the_array_that_is_written_is_named_first():
    memory = np.zeros((4, 8), np.float32)
    for written, read in itertools.permutations(named(low=memory[:2], high=memory[1:])):
        assert names(overlap.sharing([written], [read])) == (written.name, read.name)


def test_empty_arrays_and_single_elements():
    memory = np.zeros(8, np.float32)
    whole, none, one = named(whole=memory, none=memory[3:3], one=memory[3:4])
    assert overlap.sharing([whole, none], []) is None
    assert names(overlap.sharing([whole], [one])) == ("whole", "one")
    assert names(overlap.sharing([one], [array(memory[3:4], "same")])) == ("one", "same")


def test_an_array_that_repeats_its_elements():
    memory = np.zeros(8, np.float32)
    row, rows = named(row=memory[4:], rows=np.broadcast_to(memory[:4], (3, 4)))
    assert overlap.sharing([row], [rows]) is None
    (rows,) = named(rows=np.broadcast_to(memory[:5], (3, 5)))
    assert names(overlap.sharing([row], [rows])) == ("row", "rows")


def test_the_third_is_compared_with_the_first():
    whole = at("whole", 1000, (100,), (1,))
    parts = at("low", 2000, (10,), (1,)), at("high", 1095, (10,), (1,))
    inside = at("inside", 1010, (5,), (1,))
    assert overlap.sharing(parts[:1], [whole, inside]) is None
    assert names(overlap.sharing([parts[1]], [whole, inside])) == ("high", "whole")


def test_all_layers_of_one_allocation_are_compared_at_once(monkeypatch):
    memory = np.zeros((NUM_BLOCKS, 80, 2, 64), np.uint8)
    caches = named(**{f"{i}, {j}": memory[:, i, j] for i in range(80) for j in range(2)})
    monkeypatch.setattr(overlap, "_view", None)
    assert overlap.sharing(caches, []) is None


def random_view(rng, memory):
    """Part of a memory, with separate elements: strides are multiples of what is inside of them."""
    dtype = rng.choice(["uint8", "float16", "float32"])
    size = np.dtype(dtype).itemsize
    while True:
        shape, strides, step = [], [], 1
        for _ in range(rng.integers(1, 4)):
            shape.append(int(rng.integers(1, 5)))
            strides.append(step + int(rng.integers(0, 4)))
            step = strides[-1] * shape[-1]
        order = rng.permutation(len(shape))
        reach = size * (1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)))
        starts = np.arange(0, len(memory) - reach + 1, size)
        if len(starts):
            start = rng.choice(starts)
            whole = memory[start : start + reach].view(dtype)
            return np.lib.stride_tricks.as_strided(
                whole, [shape[i] for i in order], [strides[i] * size for i in order]
            )


def addresses(view):
    steps = np.indices(view.shape).reshape(view.ndim, -1).T @ np.array(view.strides)
    begins = steps + view.ctypes.data
    return {int(begin) + byte for begin in begins for byte in range(view.itemsize)}


def test_random_arrays_share_what_their_elements_share(rng):
    memory = np.zeros(160, np.uint8)
    outcomes = set()
    for _ in range(3000):
        views = [random_view(rng, memory) for _ in range(rng.integers(2, 4))]
        arrays = [array(view, str(i)) for i, view in enumerate(views)]
        num_written = rng.integers(1, len(views) + 1)
        found = overlap.sharing(arrays[:num_written], arrays[num_written:])
        taken = [addresses(view) for view in views]
        shared = {
            (i, j)
            for i, j in itertools.combinations(range(len(views)), 2)
            if i < num_written and taken[i] & taken[j]
        }
        if found is None:
            assert not shared
        else:
            assert all(a.device is HOST for a in found)
            pair = [int(a.name) for a in found]
            assert pair[0] < num_written
            assert tuple(sorted(pair)) in shared
        outcomes.add(found is None)
    assert outcomes == {True, False}
