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
from support import compare, ops
from support.data import Case, build
from support.framework_suite import OnlyDLPack
from support.frameworks import CuPy
from support.workers import CYCLES_PER_MS, spin

NUM_THREADS, ROUNDS = 4, 25


def check_threads(surround):
    """Check ops in threads, where `surround()` makes the thread's own stream the current one.

    The threads have problems of their own, whose queries are late, and share a device.
    """
    arrays = CuPy()
    # Long sequences are cut in parts, which need scratch memory and counters.
    problems = [build(Case(seq_lens=(4000 + 500 * i, 17, 513), seed=i)) for i in range(NUM_THREADS)]
    given = [ops.arguments(problem, arrays) for problem in problems]
    given[1]["key_cache"] = OnlyDLPack(given[1]["key_cache"])
    expected = [arrays.numpy(cupy_paged.paged_attention(**one)) for one in given]
    queries = [one["query"].copy() for one in given]
    cupy.cuda.Device().synchronize()
    together = threading.Barrier(NUM_THREADS)

    def work(i):
        late, found, started = given[i]["query"], [], []
        with surround():
            stream = cupy.cuda.get_current_stream()
            assert stream.ptr == gpu.PER_THREAD_DEFAULT_STREAM
            together.wait(timeout=60)
            for _ in range(ROUNDS):
                late[...] = np.nan
                spin((1,), (1,), (np.int64(CYCLES_PER_MS),))
                late[...] = queries[i]
                found.append(cupy_paged.paged_attention(**given[i]))
                started.append(not stream.done)
            stream.synchronize()
            assert any(started), "the calls waited for the device"
            for out in found:
                compare.bitwise(arrays.numpy(out), expected[i])

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(work, range(NUM_THREADS)))  # raises what a thread has raised


if __name__ == "__main__":
    check_threads(contextlib.nullcontext)
