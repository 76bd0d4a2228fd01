"""Operators run where the caller's framework works, await its pending writes, and never block."""

import os
import subprocess
import sys

import cupy
import numpy as np
import pytest

import cupy_paged
from support import compare, frameworks, ops, oracle, per_thread
from support.data import Case, build
from support.receipt import ROOT
from support.workers import delay, is_busy

CUPY, *OTHERS = frameworks.device()
TORCH = [arrays for arrays in OTHERS if arrays.name == "torch"]
WRITABLE = frameworks.writable([CUPY, *OTHERS])
by_name = {"ids": lambda arrays: arrays.name}


def side_stream(arrays):
    """A new stream of the framework: (the stream, its address)."""
    if arrays.name == "torch":
        stream = arrays.torch.cuda.Stream()
        return stream, stream.cuda_stream
    stream = cupy.cuda.Stream(non_blocking=True)
    return stream, stream.ptr


def current(arrays, stream):
    """Makes `stream` the framework's current one."""
    return arrays.torch.cuda.stream(stream) if arrays.name == "torch" else stream


@pytest.fixture(scope="module")
def problem():
    return build(Case(seq_lens=(2000, 17, 0, 513)))


def pending(arrays, problem, name):
    """(arguments, write): the argument `name` holds NaN until `write()` is queued."""
    given = ops.arguments(problem, arrays)
    late, right = given[name], arrays.array(arrays.numpy(given[name]))
    wrong = arrays.array(np.full_like(arrays.numpy(right), np.nan))

    def write():
        late[...] = right

    # Once before: compiling takes longer than the delay.
    write()
    cupy_paged.paged_attention(**given)
    late[...] = wrong
    arrays.synchronize()
    return given, write


@pytest.mark.parametrize("arrays", WRITABLE, **by_name)
@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache"])
def test_the_current_stream_of_the_framework_is_used(arrays, name, problem):
    given, write = pending(arrays, problem, name)
    stream, address = side_stream(arrays)
    with current(arrays, stream):
        delay(address)
        write()
        out = cupy_paged.paged_attention(**given)
        assert is_busy(address), "the call waited for the device"
        copied = out + 0
    stream.synchronize()
    compare.close(arrays.numpy(copied), problem.expected[0], "float16")


class WithProtocol:
    """A stream that only `__cuda_stream__` tells."""

    def __init__(self, address):
        self.address = address

    def __cuda_stream__(self):
        return 0, self.address


@pytest.mark.parametrize("arrays", WRITABLE, **by_name)
@pytest.mark.parametrize("form", ["object", "address", "protocol"])
def test_a_given_stream_is_used(arrays, form, problem):
    given, write = pending(arrays, problem, "query")
    stream, address = side_stream(arrays)
    delay(address)
    with current(arrays, stream):
        write()
    spelled = {"object": stream, "address": address, "protocol": WithProtocol(address)}[form]
    out = cupy_paged.paged_attention(**given, stream=spelled)
    assert is_busy(address), "the call waited for the device"
    stream.synchronize()
    compare.close(arrays.numpy(out), problem.expected[0], "float16")


@pytest.mark.parametrize("torch_arrays", TORCH, **by_name)
def test_a_write_on_the_stream_of_another_framework_is_awaited(torch_arrays, problem):
    given, write = pending(CUPY, problem, "key_cache")
    given["query"] = torch_arrays.array(problem.query)
    stream, address = side_stream(CUPY)
    with stream:
        delay(address)
        write()
        out = cupy_paged.paged_attention(**given)
    torch_arrays.torch.cuda.current_stream().synchronize()
    compare.close(torch_arrays.numpy(out), problem.expected[0], "float16")


@pytest.mark.parametrize("torch_arrays", TORCH, **by_name)
def test_another_framework_may_overwrite_its_array_after_the_call(torch_arrays, problem):
    given = ops.arguments(problem, CUPY)
    given["query"] = torch_arrays.array(problem.query)
    cupy_paged.paged_attention(**given)
    given["value_cache"].copy().view(np.uint16)[...] = 0x7E00
    cupy.cuda.Device().synchronize()
    delay(torch_arrays.torch.cuda.current_stream().cuda_stream)
    stream, _ = side_stream(CUPY)
    with stream:
        out = cupy_paged.paged_attention(**given)
        given["value_cache"].view(np.uint16)[...] = 0x7E00
    cupy.cuda.Device().synchronize()
    compare.close(torch_arrays.numpy(out), problem.expected[0], "float16")


@pytest.mark.parametrize("arrays", WRITABLE, **by_name)
def test_inputs_may_be_dropped_and_their_memory_reused_at_once(arrays, problem):
    given = ops.arguments(problem, arrays)
    cupy_paged.paged_attention(**given)
    arrays.synchronize()
    stream, address = side_stream(arrays)
    with current(arrays, stream):
        for _ in range(10):
            given = ops.arguments(problem, arrays)
            shapes = [given[name].shape for name in ("query", "key_cache", "value_cache")]
            delay(address)
            out = cupy_paged.paged_attention(**given)
            given.clear()
            taken = [ops.empty(shape, "float16", arrays, np.nan) for shape in shapes]
            stream.synchronize()
            compare.close(arrays.numpy(out), problem.expected[0], "float16")
            del taken


@pytest.mark.parametrize("arrays", WRITABLE, **by_name)
def test_concurrent_streams_do_not_disturb_each_other(arrays):
    problems = [build(Case(seq_lens=(4000 + 500 * i, 17, 513), seed=i)) for i in range(4)]
    given = [ops.arguments(problem, arrays) for problem in problems]
    streams = [side_stream(arrays)[0] for _ in problems]
    arrays.synchronize()
    found = []
    for _ in range(20):
        for arguments, stream in zip(given, streams, strict=True):
            with current(arrays, stream):
                found.append(cupy_paged.paged_attention(**arguments))
    arrays.synchronize()
    for i, out in enumerate(found):
        compare.close(arrays.numpy(out), problems[i % 4].expected[0], "float16")


def test_threads_on_default_streams_of_their_own():
    per_thread.check_threads(lambda: cupy.cuda.Stream.ptds)


def test_threads_where_their_own_streams_are_the_default():
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "support.per_thread"],
        cwd=ROOT / "tests",
        env={**os.environ, "CUPY_CUDA_PER_THREAD_DEFAULT_STREAM": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_the_stream_argument_of_every_other_operator(problem):
    stream, address = side_stream(CUPY)
    rng = np.random.default_rng(0)
    source = CUPY.array(rng.standard_normal((6, 2, 64)).astype(np.float16))
    lse = CUPY.array(np.zeros((2, 6), np.float32))
    late = source.copy()
    caches = [cupy.zeros((1, 16, 2, 64), np.float16) for _ in range(2)]
    packed = [cupy.zeros(shape, np.float16) for shape in ((1, 2, 8, 16, 8), (1, 2, 64, 16))]
    slots = CUPY.array(np.arange(6))
    merged = cupy.empty_like(source)
    codes = cupy.zeros(source.shape, np.uint8)

    def run(**on):
        cupy_paged.merge_attn_states(merged, late, lse, late, lse, **on)
        cupy_paged.reshape_and_cache_flash(late, late, *caches, slots, "auto", 1.0, 1.0, **on)
        cupy_paged.reshape_and_cache(late, late, *packed, slots, "auto", 1.0, 1.0, **on)
        cupy_paged.convert_fp8(codes, late, **on)

    run()
    late[...] = source
    late.fill(np.nan)
    cupy.cuda.Device().synchronize()
    delay(address)
    with stream:
        late[...] = source
    run(stream=stream)
    assert is_busy(address), "a call waited for the device"
    stream.synchronize()
    want = source.get()
    np.testing.assert_allclose(merged.get(), want, rtol=2e-3)
    for cache in caches:
        compare.bitwise(cache.get()[0, :6], want)
    compare.bitwise(packed[1].get()[0, :, :, :6].transpose(2, 0, 1), want)
    compare.bitwise(codes.get().view(oracle.FP8["fp8"]), oracle.quantise(want, 1.0, "fp8"))
