// Blocks copied as bytes, a warp a unit.
#pragma once
#include "accesses.cuh"

namespace cupy_paged {

constexpr int ACCESSES_OF_A_UNIT = 4;  // of each lane, all in flight

template <int WIDTH> constexpr int64 COPY_UNIT = ACCESSES_OF_A_UNIT * WARP * WIDTH;  // bytes

// Copies the unit-th piece of a block. Every lane of a warp calls it.
template <int WIDTH> __device__ inline void copy_unit(uint8* to, const uint8* from, int64 unit, int64 block_bytes) {
    constexpr int64 STEP = WARP * WIDTH;
    const int64 begin = unit * COPY_UNIT<WIDTH> + threadIdx.x % WARP * WIDTH;
    Bytes<WIDTH> bytes[ACCESSES_OF_A_UNIT];
#pragma unroll
    for (int i = 0; i < ACCESSES_OF_A_UNIT; i++) {
        const int64 at = begin + i * STEP;
        if (at < block_bytes) bytes[i] = load_bytes<WIDTH>(from + at);
    }
#pragma unroll
    for (int i = 0; i < ACCESSES_OF_A_UNIT; i++) {
        const int64 at = begin + i * STEP;
        if (at < block_bytes) store_bytes<WIDTH>(to + at, bytes[i]);
    }
}

}  // namespace cupy_paged
