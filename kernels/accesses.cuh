// Memory accesses by their size alone, for what is moved and not looked at.
#pragma once
#include "dtypes.cuh"

namespace cupy_paged {

// N bytes that move as one access, in words where they fill words: bytes would be taken apart.
template <int N> struct Access { using Type = Vector<uint32, N / 4>; };
template <> struct Access<2> { using Type = uint16; };
template <> struct Access<1> { using Type = uint8; };

template <int N> using Bytes = typename Access<N>::Type;

template <int N> __device__ inline Bytes<N> load_bytes(const void* source) {
    return *static_cast<const Bytes<N>*>(source);
}

template <int N> __device__ inline void store_bytes(void* target, const Bytes<N>& bytes) {
    *static_cast<Bytes<N>*>(target) = bytes;
}

}  // namespace cupy_paged
