"""The operators that move blocks and gather tokens on a GPU, against the oracle."""

import cupy
import cupyx
import numpy as np
import pytest

import cupy_paged
from cupy_paged import block_runs, gpu
from support import compare, frameworks, oracle
from support.block_suite import CopyBlocksSuite, SwapBlocksSuite, pairs
from support.cache_suite import MlaSuite
from support.data import Case, owners, random_bits
from support.gather_suite import GUARD_ROWS, GatherSuite, gather_problem
from support.layout_suite import LayoutSuite

CUPY = frameworks.device()[0]
WRITABLE = frameworks.writable(frameworks.device())
BOUNDARY = 2**31
by_name = {"ids": lambda arrays: arrays.name}


@pytest.fixture(autouse=True)
def free_memory():
    yield
    cupy.get_default_memory_pool().free_all_blocks()


@pytest.fixture(params=WRITABLE, **by_name)
def arrays(request):
    return request.param


def pinned(array):
    """A copy in pinned memory."""
    copied = cupyx.empty_pinned(array.shape, array.dtype)
    copied[...] = array
    return copied


class Sides:
    """The two arrays of `swap_blocks`; None stands for pinned memory."""

    def __init__(self, start, end):
        self.name = f"{start.name if start else 'pinned'}_to_{end.name if end else 'pinned'}"
        self.source = start.array if start else pinned
        self.destination = end.array if end else pinned

    def numpy(self, array):
        cupy.cuda.Device().synchronize()
        if isinstance(array, np.ndarray):
            return array
        return next(made.numpy(array) for made in WRITABLE if made.owns(array))


class OnOlderChips:
    """The code paths of a Turing: software bfloat16 and float8."""

    @pytest.fixture
    def arrays(self, monkeypatch):
        monkeypatch.setattr(gpu, "emulated_sm", lambda: 75)
        return CUPY


class TestCopyBlocks(CopyBlocksSuite):
    def test_pairs_past_the_end_are_skipped(self, arrays, rng):
        made = arrays.array(cache := random_bits(rng, (5, 64), np.uint8))
        block_mapping = np.array([[0, 5], [5, 0], [1, 2], [2**62, 3]])
        cupy_paged.copy_blocks([made], [], arrays.array(block_mapping))
        compare.bitwise(arrays.numpy(made), oracle.copy_blocks(cache, block_mapping[2:3]))


class TestSwapBlocks(SwapBlocksSuite):
    @pytest.fixture(
        params=[
            Sides(*sides)
            for arrays in WRITABLE
            for sides in ((arrays, None), (None, arrays), (arrays, WRITABLE[0]))
        ],
        **by_name,
    )
    def sides(self, request):
        return request.param

    @pytest.mark.parametrize("name", ["source", "destination"])
    def test_pageable_memory_is_refused(self, arrays, name):
        given = {
            side: arrays.array(np.zeros((4, 16), np.float32)) for side in ("source", "destination")
        }
        given[name] = np.zeros((4, 16), np.float32)
        with pytest.raises(ValueError, match=f"^{name}: is pageable host memory, needs pinned"):
            cupy_paged.swap_blocks(**given, block_mapping=np.array([[0, 1]]))

    def test_pairs_on_the_gpu_are_refused(self, arrays):
        made = arrays.array(np.zeros((4, 16), np.float32))
        with pytest.raises(
            ValueError, match=r"^block_mapping: is on cuda:0, needs to be on the host"
        ):
            cupy_paged.swap_blocks(made, made, arrays.array(np.array([[0, 1]])))

    def test_runs_on_the_stream_that_it_is_given(self, rng):
        cache = cupy.asarray(random_bits(rng, (64, 4096), np.uint8))
        kept = cupyx.zeros_pinned((64, 4096), np.uint8)
        block_mapping = np.stack([np.arange(64), np.arange(64)[::-1]], axis=1)
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        for step in range(20):
            with stream:
                cache += np.uint8(step)
            cupy_paged.swap_blocks(cache, kept, block_mapping, stream=stream)
            stream.synchronize()
            np.testing.assert_array_equal(kept[::-1], cache.get())


class TestSwapBlocksByTheDriver(SwapBlocksSuite):
    """As where runs are long, or a kernel cannot reach the host's memory."""

    @pytest.fixture(params=[Sides(CUPY, None), Sides(None, CUPY), Sides(CUPY, CUPY)], **by_name)
    def sides(self, request, monkeypatch):
        monkeypatch.setattr(block_runs, "LONG_RUN", 0)
        return request.param


class TestGather(GatherSuite):
    def test_tokens_without_a_block_are_left_out(self, arrays, rng):
        case = Case(num_kv_heads=1)
        *caches, _ = gather_problem(case, (0,), (48,), rng)
        tables = np.array([[1, len(caches[0]), -1]], np.int32)
        rows = [random_bits(rng, (70 + GUARD_ROWS, 2, 80), np.float16) for _ in range(2)]
        found = self.gather(arrays, case, caches, tables, [8], [60], rows)
        tokens = oracle.gather_cache(*caches, tables, [8], [8], layout="HND", block_size=16)
        for got, owner, stored in zip(found, rows, tokens, strict=True):
            owner[:8, :-1, :64] = stored
            compare.bitwise(got, owner)


class TestGatherOnOlderChips(OnOlderChips):
    gather, check = GatherSuite.gather, GatherSuite.check
    STARTS, LENGTHS = GatherSuite.STARTS, GatherSuite.LENGTHS
    test_dequantises = GatherSuite.test_dequantises


class TestLayout(LayoutSuite):
    pass


class TestMla(MlaSuite):
    def test_slots_past_the_end_are_skipped(self, arrays, rng):
        rows, cache = rng.random((2, 8), np.float32), random_bits(rng, (3, 4, 16), np.float32)
        made = arrays.array(cache)
        cupy_paged.concat_and_cache_mla(
            arrays.array(rows),
            arrays.array(rows),
            made,
            arrays.array(np.array([12, 11])),
            "auto",
            1.0,
        )
        cache[2, 3] = np.tile(rows[1], 2)
        compare.bitwise(arrays.numpy(made), cache)


class TestMlaOnOlderChips(OnOlderChips, MlaSuite):
    pass


# ---- CUDA graphs ----


def captured(call):
    """A function that replays `call`, which gets the stream."""
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    call(stream.ptr)
    stream.synchronize()
    with stream:
        stream.begin_capture()
        call(stream.ptr)
        graph = stream.end_capture()

    def replay():
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()

    return replay


@pytest.mark.parametrize("on_host", [False, True])
def test_copies_in_a_graph(arrays, rng, on_host):
    cache = random_bits(rng, (300, 3, 64), np.float16)
    made = arrays.array(cache)
    mappings = [pairs(rng, 300, 120, skipped=share) for share in (0.2, 0.9, 0.0)]
    block_mapping = mappings[0].copy() if on_host else arrays.array(mappings[0])
    replay = captured(
        lambda stream: cupy_paged.copy_blocks([made[:, 1]], [], block_mapping, stream=stream)
    )
    for mapping in mappings:
        if on_host:
            block_mapping[...], mapping = -1, mappings[0]  # the graph has the pairs by value
        else:
            arrays.fill(block_mapping, mapping)
        arrays.fill(made, cache)
        replay()
        expected = cache.copy()
        expected[:, 1] = oracle.copy_blocks(cache[:, 1], mapping)
        compare.bitwise(arrays.numpy(made), expected)


def test_swaps_in_a_capture_that_is_the_first_to_need_the_kernel(arrays, rng, monkeypatch):
    monkeypatch.setattr(block_runs, "is_loaded", lambda kernel, device: False)
    cache = random_bits(rng, (40, 64), np.float16)
    made, kept = arrays.array(cache), pinned(np.zeros((40, 64), np.float16))
    block_mapping = np.stack([rng.permutation(40), rng.permutation(40)], axis=1)
    replay = captured(
        lambda stream: cupy_paged.swap_blocks(made, kept, block_mapping, stream=stream)
    )
    kept[...] = 0
    replay()
    compare.bitwise(kept[block_mapping[:, 1]], cache[block_mapping[:, 0]])


def test_swaps_in_a_graph(arrays, rng):
    cache = random_bits(rng, (40, 3, 64), np.float16)
    made, kept = arrays.array(cache), pinned(np.zeros((40, 64), np.float16))
    block_mapping = np.stack([np.arange(40), np.roll(np.arange(40), 7)], axis=1)
    replay = captured(
        lambda stream: cupy_paged.swap_blocks(made[:, 1], kept, block_mapping, stream=stream)
    )
    for _ in range(3):
        cache = random_bits(rng, cache.shape, np.float16)
        arrays.fill(made, cache)
        replay()
        compare.bitwise(kept[block_mapping[:, 1]], cache[:, 1])


def test_gathers_in_a_graph(arrays, rng):
    case = Case("float16", "fp8", "vllm")
    starts, lengths = (0, 5, 16), (33, 1, 16)
    *caches, tables = gather_problem(case, starts, lengths, rng)
    held = [arrays.array(cache.view(np.uint8)) for cache in caches]
    rows = [arrays.array(np.zeros((64, 2, 64), np.float16)) for _ in range(2)]
    made = [arrays.array(np.array(array, np.int32)) for array in (tables, [0, 0, 0, 0], [0, 0, 0])]
    replay = captured(
        lambda stream: cupy_paged.gather_cache(
            *rows, *held, *made, "fp8", *case.scales, layout="vllm", stream=stream
        )
    )
    arrays.fill(made[1], np.array([0, *np.cumsum(lengths)], np.int32))
    arrays.fill(made[2], np.array(starts, np.int32))
    replay()
    tokens = oracle.gather_cache(*caches, tables, lengths, starts, layout="vllm", block_size=16)
    for got, stored, scale in zip(rows, tokens, case.scales, strict=True):
        expected = np.zeros((64, 2, 64), np.float16)
        expected[: len(stored)] = stored.astype(np.float32) * np.float32(scale)
        compare.bitwise(arrays.numpy(got), expected)


# ---- offsets past 2**31 elements ----


def large_pool(num_blocks, *block):
    """Bytes that are those of their place in the block, plus the number of the block."""
    pool = cupy.empty((num_blocks, *block), np.uint8)
    pool[...] = cupy.arange(int(np.prod(block))).astype(np.uint8).reshape(block)
    pool += cupy.arange(num_blocks).astype(np.uint8).reshape(-1, *[1] * len(block))
    return pool


def taken(pool, blocks):
    return np.stack([pool[block].get() for block in blocks.tolist()])


def test_copies_and_swaps_past_two_to_the_31_elements():
    num_blocks = BOUNDARY // 4096 + 40
    pool = large_pool(num_blocks, 4096)
    near = BOUNDARY // 4096
    block_mapping = np.array([[0, near], [near - 1, num_blocks - 1], [near + 1, 1]])
    expected = taken(pool, block_mapping[:, 0])
    cupy_paged.copy_blocks([pool], [], cupy.asarray(block_mapping))
    np.testing.assert_array_equal(taken(pool, block_mapping[:, 1]), expected)

    kept = cupyx.zeros_pinned((3, 4096), np.uint8)
    into = np.stack([block_mapping[:, 1], np.arange(3)], axis=1)
    cupy_paged.swap_blocks(pool, kept, into)
    cupy.cuda.Device().synchronize()
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("layout", ["vllm", "HND", "NHD"])
def test_gathers_past_two_to_the_31_elements(layout):
    num_heads, block_size, head_size = 2, 16, 128
    block = num_heads * block_size * head_size
    num_blocks = BOUNDARY // block + 40
    shapes = {
        "vllm": [(num_heads, head_size // 16, block_size, 16), (num_heads, head_size, block_size)],
        "HND": 2 * [(num_heads, block_size, head_size)],
        "NHD": 2 * [(block_size, num_heads, head_size)],
    }[layout]
    pools = [large_pool(num_blocks, *shape) for shape in shapes]
    tables = np.array([[num_blocks - 1, 0, BOUNDARY // block, BOUNDARY // block - 1]], np.int32)
    rows = [cupy.zeros((60, num_heads, head_size), np.uint8) for _ in range(2)]
    made = [cupy.asarray(np.array(array, np.int32)) for array in (tables, [0, 60], [3])]
    cupy_paged.gather_cache(*rows, *pools, *made, layout=layout)
    caches = [taken(pool, tables[0]) for pool in pools]
    tokens = oracle.gather_cache(
        *caches, [np.arange(4)], [60], [3], layout=layout, block_size=block_size
    )
    for got, want in zip(rows, tokens, strict=True):
        compare.bitwise(got.get(), want)


@pytest.mark.parametrize(("layout", "new_layout"), [("vllm", "HND"), ("NHD", "vllm")])
def test_layouts_past_two_to_the_31_elements(layout, new_layout, rng):
    case = Case("float16", "fp8", layout, 2, 1, 128, 16)
    num_blocks = BOUNDARY // (2 * 128 * 16) + 40
    shapes = {
        name: owners(Case(**{**case.__dict__, "layout": name}), 1, rng)
        for name in (layout, new_layout)
    }
    old, new = (
        [large_pool(num_blocks, *owner.shape[2:]) for owner in shapes[name]]
        for name in (layout, new_layout)
    )
    cupy_paged.convert_layout(*old, layout, *new, new_layout)
    last = np.array([0, num_blocks - 41, num_blocks - 40, num_blocks - 1])
    where = {"block_size": 16}
    given = [np.arange(4)], [64], [0]
    got, want = (
        oracle.gather_cache(*(taken(pool, last) for pool in pools), *given, layout=name, **where)
        for pools, name in ((new, new_layout), (old, layout))
    )
    for found, expected in zip(got, want, strict=True):
        compare.bitwise(found, expected)
