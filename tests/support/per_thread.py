"""Ops that several threads call at once, each on its own default stream.

`python -m support.per_thread` (from tests/) runs them where CuPy takes that stream by itself, as it
does with CUPY_CUDA_PER_THREAD_DEFAULT_STREAM=1.
"""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import cupy
import numpy as np

import cupy_paged
from cupy_paged import gpu
from support import compare, ops, oracle
from support.data import Case, build
from support.framework_suite import OnlyDLPack
from support.frameworks import CuPy
from support.workers import CYCLES_PER_MS, spin

NUM_THREADS, ROUNDS = 4, 25
ARRAYS = CuPy()


class Attention:
    """Calls over long sequences, which are cut in parts that need scratch memory and counters."""

    def __init__(self, number):
        problem = build(Case(seq_lens=(4000 + 500 * number, 17, 513), seed=number))
        self._given = ops.arguments(problem, ARRAYS)
        if number == 1:
            self._given["key_cache"] = OnlyDLPack(self._given["key_cache"])
        self.late = self._given["query"]
        self._query = self.late.copy()
        (expected,) = self.run()
        self._expected = ARRAYS.numpy(expected)

    def input_of(self, round_):
        return self._query

    def run(self):
        return (cupy_paged.paged_attention(**self._given),)

    def check(self, round_, found):
        compare.bitwise(ARRAYS.numpy(found[0]), self._expected, f"round {round_}")


class Moves:
    """All other ops, each of which reads what the one before it has written."""

    def __init__(self, number):
        shape = 6, 2, 64
        random = np.random.default_rng(number).standard_normal((ROUNDS, *shape))
        self._tokens = random.astype(np.float16)
        self._inputs = cupy.asarray(self._tokens)
        self.late = self._inputs[0].copy()
        self._slots = cupy.arange(6)
        self._pairs = cupy.asarray([[0, 1]])
        self._table, self._ends = cupy.asarray([[1]], np.int32), cupy.asarray([0, 6], np.int32)
        self._lse = cupy.zeros((2, 6), np.float32)
        self._nhd = [cupy.zeros((2, 16, 2, 64), np.float16) for _ in range(2)]
        self._hnd = [cupy.zeros((2, 2, 16, 64), np.float16) for _ in range(2)]
        self._rows = [cupy.zeros(shape, np.float16) for _ in range(2)]
        self._merged = cupy.zeros(shape, np.float16)
        self._vllm = [cupy.zeros(s, np.float16) for s in ((1, 2, 8, 16, 8), (1, 2, 64, 16))]
        self._latents = cupy.zeros((1, 16, 128), np.float16)
        self._codes = cupy.zeros(shape, np.uint8)
        self.run()

    def input_of(self, round_):
        return self._inputs[round_]

    def run(self):
        """(values in layout "vllm", latents, codes) of the tokens in `late`."""
        settings = self._slots, "auto", 1.0, 1.0
        cupy_paged.reshape_and_cache_flash(self.late, self.late, *self._nhd, *settings)
        cupy_paged.copy_blocks([self._nhd[0]], [self._nhd[1]], self._pairs)
        cupy_paged.convert_layout(*self._nhd, "NHD", *self._hnd, "HND")
        cupy_paged.gather_cache(*self._rows, *self._hnd, self._table, self._ends, layout="HND")
        key, value = self._rows
        cupy_paged.merge_attn_states(self._merged, key, self._lse, value, self._lse)
        cupy_paged.reshape_and_cache(self._merged, self._merged, *self._vllm, *settings)
        halves = self._merged[:, 0], self._merged[:, 1]
        cupy_paged.concat_and_cache_mla(*halves, self._latents, self._slots, "auto", 1.0)
        cupy_paged.convert_fp8(self._codes, self._merged)
        return self._vllm[1].copy(), self._latents.copy(), self._codes.copy()

    def check(self, round_, found):
        tokens = self._tokens[round_]
        values, latents, codes = map(ARRAYS.numpy, found)
        what = f"round {round_}"
        compare.bitwise(values[0, :, :, :6].transpose(2, 0, 1), tokens, what)
        compare.bitwise(latents[0, :6], tokens.reshape(6, 128), what)
        compare.bitwise(codes.view(oracle.FP8["fp8"]), oracle.quantise(tokens, 1.0, "fp8"), what)


def check_threads(surround):
    """Check ops in threads, where `surround()` makes the thread's own stream the current one.

    Each thread has a problem of its own, and all share a device.
    """
    for kind in Attention, Moves:
        problems = [kind(number) for number in range(NUM_THREADS)]
        _check_order(surround, problems)
        _check_apart(surround, problems)


def _check_order(surround, problems):
    """Ops whose input is late wait for it, and their callers do not."""
    cupy.cuda.Device().synchronize()
    together = threading.Barrier(NUM_THREADS)

    def work(problem):
        found, started = [], []
        with surround():
            stream = cupy.cuda.get_current_stream()
            assert stream.ptr == gpu.PER_THREAD_DEFAULT_STREAM
            together.wait(timeout=60)
            for round_ in range(ROUNDS):
                problem.late[...] = np.nan
                spin((1,), (1,), (np.int64(4 * CYCLES_PER_MS),))
                problem.late[...] = problem.input_of(round_)
                found.append(problem.run())
                started.append(not stream.done)
            stream.synchronize()
            assert any(started), "the calls waited for the device"
            for round_, arrays in enumerate(found):
                problem.check(round_, arrays)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(work, problems))  # raises what a thread has raised


def _check_apart(surround, problems):
    """Ops wait for no stream of another thread, as they would on the default stream of all."""
    cupy.cuda.Device().synchronize()
    together = threading.Barrier(NUM_THREADS + 1)
    busy = cupy.cuda.Event(disable_timing=True)

    def work(problem):
        with surround():
            stream = cupy.cuda.get_current_stream()
            problem.run()  # the thread has memory then, and need not ask the device for it
            stream.synchronize()
            together.wait(timeout=60)
            together.wait(timeout=60)
            problem.run()
            stream.synchronize()
            return busy.done

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        waited = [pool.submit(work, problem) for problem in problems]
        with surround():
            together.wait(timeout=60)
            spin((1,), (1,), (np.int64(300 * CYCLES_PER_MS),))
            busy.record()
            together.wait(timeout=60)
        # A device has few queues: one of the threads may share that of the busy stream.
        assert not all([thread.result() for thread in waited]), "the threads waited for another"


if __name__ == "__main__":
    check_threads(contextlib.nullcontext)
