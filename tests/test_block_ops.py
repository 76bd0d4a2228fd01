"""The operators that move blocks and gather tokens, on host arrays, against the oracle."""

import contextlib
import ctypes
import functools
import itertools
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from cupy_paged import block_ops, block_runs, gpu, in_flight
from support import compare, fake_cupy, frameworks, oracle
from support.block_suite import CopyBlocksSuite, SwapBlocksSuite, pairs
from support.cache_suite import MlaSuite
from support.data import random_bits
from support.gather_suite import GatherSuite
from support.layout_suite import LayoutSuite


class BothOnHost:
    """The two arrays of `swap_blocks`, of one framework each."""

    def __init__(self, start, end):
        self.name = f"{start.name}_to_{end.name}"
        self.source, self.destination = start.array, end.array

    def numpy(self, array):
        return frameworks.NumPy().numpy(np.asarray(array))


WRITABLE = frameworks.writable(frameworks.host())
by_name = {"ids": lambda arrays: arrays.name}


@pytest.fixture(params=WRITABLE, **by_name)
def arrays(request):
    return request.param


class TestCopyBlocks(CopyBlocksSuite):
    pass


class TestSwapBlocks(SwapBlocksSuite):
    @pytest.fixture(params=[BothOnHost(*WRITABLE[:1] * 2)], **by_name)
    def sides(self, request):
        return request.param


class TestGather(GatherSuite):
    pass


class TestLayout(LayoutSuite):
    pass


class TestMla(MlaSuite):
    pass


def test_runs_are_as_long_as_they_can_be():
    pairs = [[0, 4], [1, 5], [2, 6], [3, 0], [4, 1], [7, 3], [8, 2]]
    starts, lengths = block_runs.runs(np.array(pairs))
    assert (starts.tolist(), lengths.tolist()) == ([0, 3, 5, 6], [3, 2, 1, 1])


@pytest.fixture
def machine(monkeypatch):
    """A CuPy that copies blocks as the kernel would, by the parameters that it is launched with."""
    machine = fake_cupy.FakeCuPy()
    machine.install(monkeypatch)
    monkeypatch.setattr(in_flight, "_queues", {})
    machine.launched = copy_as_launched
    return machine


def launched_fields(params, address):
    codes = {"pointer": "P", "int64": "q", "int": "i"}
    layout = "@" + "".join(codes[kind] for kind in params.fields.values()) + "0q"
    packed = ctypes.string_at(address, params.size)
    return dict(zip(params.fields, struct.unpack(layout, packed), strict=True))


def copy_as_launched(address):
    fields = launched_fields(block_ops.COPY_PARAMS, address)
    num_pairs = fields["num_pairs"]
    if fields["block_mapping"]:
        mapping = struct.unpack(
            f"@{2 * num_pairs}q", ctypes.string_at(fields["block_mapping"], 16 * num_pairs)
        )
    else:
        ends = ("source", "destination")
        mapping = [fields[f"pairs[{i}].{end}"] for i in range(num_pairs) for end in ends]
    copies = list(zip(mapping[::2], mapping[1::2], strict=True))
    for pool, (start, end) in itertools.product(range(fields["num_pools"]), copies):
        if min(start, end) >= 0 and max(start, end) < fields["num_blocks"]:
            blocks, stride = (fields[f"pools[{pool}].{name}"] for name in ("blocks", "stride"))
            ctypes.memmove(blocks + end * stride, blocks + start * stride, fields["block_bytes"])


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize(
    ("num_layers", "num_pairs", "num_launches"),
    [(1, 1, (1, 1)), (80, 80, (1, 1)), (81, 170, (2, 6))],
)
def test_launches_are_given_every_cache_and_pair(
    machine, rng, num_layers, num_pairs, num_launches, on_host
):
    owner = random_bits(rng, (400, num_layers, 2, 20), np.uint8)
    expected = owner.copy()
    block_mapping = pairs(rng, 400, num_pairs, skipped=0)
    parts = [[owner[:, i, part, :18] for i in range(num_layers)] for part in range(2)]
    caches = [[fake_cupy.ndarray(cache) for cache in some] for some in parts]
    mapping = block_mapping if on_host else fake_cupy.ndarray(block_mapping)
    block_ops.copy_blocks(*caches, mapping)
    expected[..., :18] = oracle.copy_blocks(expected[..., :18], block_mapping)
    compare.bitwise(owner, expected)
    assert sum(call[1] == "launchKernel" for call in machine.take()) == num_launches[on_host]


@pytest.mark.parametrize(
    ("address", "stride", "width"), [(0, 32, 16), (8, 32, 8), (0, 20, 4), (2, 64, 2)]
)
def test_accesses_are_as_wide_as_blocks_allow(machine, address, stride, width):
    memory = np.zeros(1024, np.uint8)
    memory = memory[-memory.ctypes.data % 64 + address :]
    cache = np.lib.stride_tricks.as_strided(memory, (4, 16), (stride, 1))
    block_ops.copy_blocks([fake_cupy.ndarray(cache)], [], np.array([[0, 1]]))
    (name,) = {call[2] for call in machine.take() if call[1] == "launchKernel"}
    assert f"copy_blocks<{width}," in name


def swap_as_launched(address):
    fields = launched_fields(block_runs.PARAMS, address)
    for i in range(fields["num_pairs"]):
        end, start = (
            fields[name] + fields[f"pairs[{i}].{name}"] * fields[f"{name}_stride"]
            for name in ("destination", "source")
        )
        ctypes.memmove(end, start, fields["block_bytes"])


def copy_row_by_row(copied, device, stream, end, end_step, start, start_step, row_bytes, num_rows):
    copied.append(num_rows)
    for row in range(num_rows):
        ctypes.memmove(end + row * end_step, start + row * start_step, row_bytes)


@pytest.mark.parametrize("is_mapped", [True, False])
@pytest.mark.parametrize("is_out", [True, False])
def test_short_runs_are_a_kernels_work_and_long_ones_the_drivers(
    machine, monkeypatch, rng, is_mapped, is_out
):
    machine.launched, copied = swap_as_launched, []
    monkeypatch.setattr(block_runs, "LONG_RUN", 4 * 48)
    monkeypatch.setattr(gpu, "is_pinned", lambda pointer: True)
    monkeypatch.setattr(
        gpu, "mapped_address", lambda device, pointer, num_bytes: pointer if is_mapped else None
    )
    monkeypatch.setattr(gpu, "copy_rows", functools.partial(copy_row_by_row, copied))
    owner, kept = random_bits(rng, (1000, 2, 48), np.uint8), random_bits(rng, (1000, 48), np.uint8)
    short = np.stack([rng.permutation(600), rng.permutation(600)], axis=1)
    long = [
        np.stack([first + np.arange(7), target + np.arange(7)], axis=1)
        for first, target in ((600, 700), (610, 720))
    ]
    block_mapping = rng.permutation(np.concatenate([short, *long]))
    cache = fake_cupy.ndarray(owner[:, 1])
    arrays = (cache, kept) if is_out else (kept, cache)
    here, there = (owner[:, 1], kept) if is_out else (kept, owner[:, 1])
    expected = oracle_of_swap(here, there, block_mapping)
    block_ops.swap_blocks(*arrays, block_mapping)
    compare.bitwise(there, expected)
    launches = [call[2] for call in machine.take() if call[1] == "launchKernel"]
    assert len(launches) == (2 if is_mapped else 0)
    assert all("swap_blocks<16," in name for name in launches)
    assert [n for n in copied if n > 3] == [7, 7]
    assert is_mapped == (sum(copied) == 14)


def oracle_of_swap(source, destination, block_mapping):
    expected = destination.copy()
    expected[block_mapping[:, 1]] = source[block_mapping[:, 0]]
    return expected


@pytest.mark.parametrize(
    ("target_step", "source_step", "num_rows", "expected"),
    [
        (64, 64, 5, ["memcpyAsync"]),
        (192, 64, 5, ["memcpy2DAsync"]),
        (64, 65, 5, ["memcpy2DAsync"]),
        (192, 64, 1, ["memcpyAsync"]),
        (200, 64, 5, 5 * ["memcpyAsync"]),
    ],
)
def test_rows_are_copied_with_few_calls(monkeypatch, target_step, source_step, num_rows, expected):
    calls = []

    def copy(target, source, num_bytes, kind, stream):
        assert (kind, stream) == (4, 77)
        calls.append("memcpyAsync")
        ctypes.memmove(target, source, num_bytes)

    def copy_2d(target, target_pitch, source, source_pitch, width, height, kind, stream):
        assert (kind, stream) == (4, 77)
        calls.append("memcpy2DAsync")
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

    runtime = SimpleNamespace(memcpyDefault=4, memcpyAsync=copy, memcpy2DAsync=copy_2d)
    fake = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(gpu, "cupy", lambda: fake)
    monkeypatch.setattr(gpu, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(gpu, "_MAX_PITCH", 192)
    source = np.arange(num_rows * source_step, dtype=np.uint32).astype(np.uint8)
    target = np.full(num_rows * target_step, 255, np.uint8)
    want = target.copy()
    for row in range(num_rows):
        start = row * source_step
        want[row * target_step : row * target_step + 64] = source[start : start + 64]
    gpu.copy_rows(
        0, 77, target.ctypes.data, target_step, source.ctypes.data, source_step, 64, num_rows
    )
    np.testing.assert_array_equal(target, want)
    assert calls == expected
