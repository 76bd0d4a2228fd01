"""What others left in shared memory, which every kernel finds there, changes no bit."""

from dataclasses import replace

import cupy
import numpy as np
import pytest

import cupy_paged
from cupy_paged import launch, prepared
from support import compare, frameworks, merge_suite, ops
from support.data import Case, build, empty_caches
from support.oracle import BlockSparse
from support.workers import CYCLES_PER_MS

CUPY = frameworks.device()[0]
NAN = 0xFFFFFFFF  # in all floats of 4, 2 and 1 bytes; as an integer -1
HUGE = 0x7B7B7B7B  # 1e36 as a float32, 6e4 as a float16, 352 as an e4m3: fmaxf passes over NaN
SEQ_LENS = 1, 0, 15, 17, 33, 511, 513, 1100, 3000
CASES = [
    Case("float16", "auto", "vllm", 1, 8),
    Case("bfloat16", "auto", "NHD", 2, 4, head_size=128, block_size=32),
    Case("bfloat16", "auto", "HND", 2, 4, head_size=128),
    Case("bfloat16", "fp8", "vllm", 1, 8, head_size=128),
    Case("float16", "fp8_e5m2", "NHD", 2, 1, alibi=True),
    Case("float32", "auto", "HND", 1, 3),
    Case("float16", "auto", "vllm", 2, 4, sparse=BlockSparse(2, 3, 16, 1, 0)),
]

# Volatile, because nobody reads what one of them writes, nor writes what the other reads.
SOURCE = """
extern "C" __global__ void fill(unsigned word, int num_words, long long cycles) {
    extern __shared__ volatile unsigned words[];
    for (int i = threadIdx.x; i < num_words; i += blockDim.x) words[i] = word;
    long long start = clock64();
    while (clock64() - start < cycles);
}

extern "C" __global__ void count(unsigned word, int num_words, unsigned long long* found) {
    extern __shared__ volatile unsigned words[];
    unsigned long long mine = 0;
    for (int i = threadIdx.x; i < num_words; i += blockDim.x) mine += words[i] == word;
    atomicAdd(found, mine);
}
"""


class SharedMemory:
    """That of all multiprocessors, filled with one word before each kernel of an op."""

    def __init__(self):
        attributes = cupy.cuda.Device().attributes
        self.num_bytes = attributes["MaxSharedMemoryPerBlockOptin"]
        # As much of it as a thread block can have leaves room for no second one on a
        # multiprocessor, and each takes a while: no multiprocessor is left out.
        self._grid, self._block = (2 * attributes["MultiProcessorCount"],), (1024,)
        self._fill, self._count = (cupy.RawKernel(SOURCE, name) for name in ("fill", "count"))
        for kernel in self._fill, self._count:
            kernel.max_dynamic_shared_size_bytes = self.num_bytes
        self.word, self.num_fills = 0, 0

    def fill(self):
        given = np.uint32(self.word), np.int32(self.num_bytes // 4), np.int64(CYCLES_PER_MS // 20)
        self._fill(self._grid, self._block, given, shared_mem=self.num_bytes)
        self.num_fills += 1

    def num_found(self, num_bytes):
        """Words that thread blocks with so much shared memory find filled."""
        found = cupy.zeros(1, np.uint64)
        given = np.uint32(self.word), np.int32(num_bytes // 4), found
        self.fill()
        self._count(self._grid, self._block, given, shared_mem=num_bytes)
        return int(found[0])


@pytest.fixture
def shared_memory(monkeypatch):
    filled, launch_of = SharedMemory(), launch.Launch

    def launch_after_filling(function, start):
        def fill_and_start(*arguments):
            filled.fill()
            start(*arguments)

        return launch_of(function, fill_and_start)

    monkeypatch.setattr(launch, "Launch", launch_after_filling)
    monkeypatch.setattr(prepared, "_kept", prepared._Kept())  # others were prepared without
    return filled


def check_bits(shared_memory, call):
    """Check that the NumPy arrays that `call` returns do not depend on what its kernels find."""
    shared_memory.word = 0
    expected = call()
    assert shared_memory.num_fills > 0, "a kernel was started past Launch"
    for word in NAN, HUGE, NAN, HUGE:
        shared_memory.word = word
        for i, (got, want) in enumerate(zip(call(), expected, strict=True)):
            compare.bitwise(got, want, f"result {i}, shared memory full of {word:#x}")


@pytest.mark.parametrize("share", [16, 2, 1])
def test_kernels_do_find_what_others_left(share, shared_memory):
    """Or the tests below show nothing. Several tries: other processes share the device."""
    shared_memory.word = HUGE
    num_bytes = shared_memory.num_bytes // share // 4 * 4
    assert any(shared_memory.num_found(num_bytes) for _ in range(50)), (
        f"thread blocks with {num_bytes} bytes of shared memory find nothing of what was there "
        "before: this device clears it"
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "call",
    [ops.paged_attention, ops.paged_attention_v1, ops.paged_attention_v2],
    ids=lambda call: call.__name__,
)
def test_attention(call, case, shared_memory):
    problem = build(replace(case, seq_lens=SEQ_LENS))
    check_bits(shared_memory, lambda: call(problem, CUPY))


@pytest.mark.parametrize(
    "case",
    [
        Case("float16", "fp8", "vllm"),
        Case("bfloat16", "auto", "NHD", block_size=32),
        Case("float32", "auto", "HND"),
    ],
    ids=str,
)
def test_gather(case, shared_memory):
    problem = build(replace(case, seq_lens=SEQ_LENS))
    ends = np.cumsum([0, *SEQ_LENS]).astype(np.int32)
    shape = ends[-1], case.num_kv_heads, case.head_size
    caches = map(ops.cache_bytes, (problem.key_cache, problem.value_cache))
    held = [CUPY.array(array) for array in (*caches, problem.block_tables, ends)]

    def gather():
        rows = [ops.empty(shape, case.dtype, CUPY, ops.SENTINEL) for _ in range(2)]
        settings = None, case.kv_cache_dtype, *case.scales
        cupy_paged.gather_cache(*rows, *held, *settings, layout=case.layout)
        return map(CUPY.numpy, rows)

    check_bits(shared_memory, lambda: list(gather()))


@pytest.mark.parametrize(("layout", "new_layout"), [("vllm", "HND"), ("NHD", "vllm")])
def test_convert_layout(layout, new_layout, shared_memory, rng):
    problem = build(Case(layout=layout, seq_lens=SEQ_LENS))
    old = [CUPY.array(cache) for cache in (problem.key_cache, problem.value_cache)]
    empty = empty_caches(Case(layout=new_layout), len(problem.key_cache), rng)

    def convert():
        new = [CUPY.array(cache) for cache in empty]
        cupy_paged.convert_layout(*old, layout, *new, new_layout)
        return list(map(CUPY.numpy, new))

    check_bits(shared_memory, convert)


@pytest.mark.parametrize("head_size", [64, 80])  # rows of a power of two threads, and others
def test_merge(head_size, shared_memory, rng):
    given = merge_suite.states(rng, "float16", head_size=head_size)
    check_bits(shared_memory, lambda: merge_suite.merge(given, CUPY, "float16"))
