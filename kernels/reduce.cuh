// Reductions over the lanes of a warp, in an order fixed by lane numbers alone.
#pragma once
#include "arch.cuh"

namespace cupy_paged {

template <int LANES = WARP> __device__ inline float lanes_sum(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

template <int LANES = WARP> __device__ inline float lanes_max(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// Sum of the values of this lane and of all lanes before it.
__device__ inline int lanes_prefix_sum(int x) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const int before = __shfl_up_sync(ALL_LANES, x, step);
        if (lane >= step) x += before;
    }
    return x;
}

}  // namespace cupy_paged
