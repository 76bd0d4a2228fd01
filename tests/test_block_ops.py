"""The operators that move blocks and gather tokens, on host arrays, against the oracle."""

import contextlib
import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from cupy_paged import block_ops, gpu
from support import frameworks
from support.block_suite import (
    CopyBlocksSuite,
    GatherSuite,
    LayoutSuite,
    MlaSuite,
    SwapBlocksSuite,
)


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
    assert block_ops.runs(np.array(pairs)) == [(0, 4, 3), (3, 0, 2), (7, 3, 1), (8, 2, 1)]


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
