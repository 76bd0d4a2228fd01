// What a cache keeps of a value.
#pragma once
#include "dtypes.cuh"

namespace cupy_paged {

// A float8 cache keeps saturate(x / scale), any other the bits.
template <class Cache, class Source> __device__ inline Cache stored(Source x, float scale) {
    if constexpr (is_float8<Cache>) return from_float<Cache>(to_float(x) / scale);
    else return x;
}

}  // namespace cupy_paged
