"""Kernels with a fault each, which the tool of compute-sanitizer that it is planted for must find.

`python tests/sanitize.py` runs these first: a tool that finds nothing here sees nothing elsewhere.
"""

import cupy
import pytest

SOURCES = {
    "memcheck": 'extern "C" __global__ void f(int* x) { x[64 + threadIdx.x] = 1; }',
    "initcheck": 'extern "C" __global__ void f(int* x) { if (x[threadIdx.x] == 7) x[63] = 1; }',
    "racecheck": """extern "C" __global__ void f(int* x) {
        __shared__ int shared[64];
        shared[threadIdx.x] = threadIdx.x;
        x[threadIdx.x] = shared[63 - threadIdx.x];
    }""",
    "synccheck": """extern "C" __global__ void f(volatile int* x) {
        if (threadIdx.x < 32) {
            x[0] = 1;
            __syncthreads();
            x[1] = 2;
        } else {
            x[2] = 3;
            __syncthreads();
            x[3] = 4;
        }
    }""",
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_fault(source):
    x = cupy.empty(64, cupy.int32)
    cupy.RawKernel(source, "f")((1,), (64,), (x,))
    cupy.cuda.runtime.deviceSynchronize()
