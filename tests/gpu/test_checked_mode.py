"""Checked mode on a GPU: by a context, by the environment, and in captures, which it leaves."""

import os
import subprocess
import sys

import cupy
import numpy as np
import pytest

import cupy_paged
from support import compare, frameworks, ops
from support.checked_suite import CheckedReadsSuite, CheckedWritesSuite, problem, with_number
from support.receipt import ROOT

ARRAYS = frameworks.device()
CUPY = ARRAYS[0]
by_name = {"ids": lambda arrays: arrays.name}


class TestCheckedReads(CheckedReadsSuite):
    @pytest.fixture(params=ARRAYS, **by_name)
    def arrays(self, request):
        return request.param


class TestCheckedWrites(CheckedWritesSuite):
    @pytest.fixture(params=frameworks.writable(ARRAYS), **by_name)
    def arrays(self, request):
        return request.param


def test_a_table_with_strides_of_its_own_is_read_right():
    given = ops.arguments(problem(), CUPY)
    wide = cupy.full((3, 50), 10**6, np.int32)
    wide[:, : given["block_tables"].shape[1]] = given["block_tables"]
    strided = wide[:, : given["block_tables"].shape[1]]
    with cupy_paged.checked():
        expected = cupy_paged.paged_attention(**given)
        found = cupy_paged.paged_attention(**given | {"block_tables": strided})
        compare.bitwise(found.get(), expected.get())
        wide[1, 6] = 12345
        with pytest.raises(IndexError, match="sequence 1 has block 12345 at position 6"):
            cupy_paged.paged_attention(**given | {"block_tables": strided})


def test_a_capture_is_not_checked_and_says_so():
    given = ops.arguments(problem(), CUPY)
    out = cupy.empty_like(given["query"])
    expected = cupy_paged.paged_attention(**given)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream, cupy_paged.checked():
        stream.begin_capture()
        with pytest.warns(RuntimeWarning, match="captured into a CUDA graph is not checked"):
            cupy_paged.paged_attention(**given, out=out)
        graph = stream.end_capture()
        graph.launch(stream)
    stream.synchronize()
    compare.bitwise(out.get(), expected.get())


SCRIPT = """
import cupy as cp
import numpy as np

import cupy_paged

query, cache = cp.ones((1, 2, 64), np.float16), cp.ones((4, 1, 16, 64), np.float16)
tables, lens = cp.array([[2, 2**30]], np.int32), cp.array([20], np.int32)
try:
    cupy_paged.paged_attention(query, cache, cache, tables, lens, layout="HND")
except IndexError as error:
    print(error)
tables[0, 1] = 3
print(float(cupy_paged.paged_attention(query, cache, cache, tables, lens, layout="HND").sum()))
"""


def test_the_device_is_usable_after_a_call_that_was_refused():
    command = [sys.executable, "-c", SCRIPT]
    environment = os.environ | {"CUPY_PAGED_CHECK": "1"}
    lines = subprocess.check_output(command, cwd=ROOT, env=environment, text=True).splitlines()
    assert lines == [
        "block_tables: sequence 0 has block 1073741824 at position 1, needs 0 to 3",
        "128.0",
    ]


FAULT = """
import cupy as cp
import numpy as np

import cupy_paged

# Blocks of 2**16 bytes: the last of them is 2**47 bytes away, behind all that a process can map.
query, cache = cp.ones((1, 2, 128), np.float16), cp.ones((4, 1, 256, 128), np.float16)
tables, lens = cp.array([[2, 2**31 - 1]], np.int32), cp.array([300], np.int32)
cupy_paged.paged_attention(query, cache, cache, tables, lens, layout="HND")
cp.cuda.Device().synchronize()
print("passed")
"""


def test_a_fault_ends_its_process_and_no_other():
    given = ops.arguments(problem(), CUPY)
    expected = cupy_paged.paged_attention(**given)
    done = subprocess.run(
        [sys.executable, "-c", FAULT],
        cwd=ROOT,
        env=os.environ | {"CUPY_PAGED_CHECK": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0, done.stdout
    assert "an illegal memory access was encountered" in done.stderr, done.stderr
    assert done.stdout == "", "a synchronisation passed over the fault"
    compare.bitwise(cupy_paged.paged_attention(**given).get(), expected.get())


def test_a_wrong_block_in_tables_of_a_cache():
    cache = cupy_paged.PagedKVCache(
        1, 8, num_kv_heads=2, head_size=64, dtype="float16", framework="cupy"
    )
    batch = cache.batch([cache.add(range(40))])
    tables = with_number(cupy.asnumpy(batch.block_tables), (0, 1), 8)
    query = cupy.ones((1, 4, 64), np.float16)
    caches = cache.key_caches[0], cache.value_caches[0]
    with cupy_paged.checked(), pytest.raises(IndexError, match="has block 8 at position 1"):
        cupy_paged.paged_attention(
            query, *caches, cupy.asarray(tables), batch.seq_lens, layout=cache.layout
        )
