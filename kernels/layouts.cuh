// Where a token's keys and values lie in a paged cache. An index counts elements.
#pragma once
#include "arch.cuh"

namespace cupy_paged {

// Distances in elements. `token` is meaningful in Rows only.
struct CacheStrides {
    int64 block, head, token;
};

// A token's channels are contiguous: "HND" [num_blocks, num_kv_heads, block_size, head_size] and
// "NHD" [num_blocks, block_size, num_kv_heads, head_size] differ by their strides alone.
struct Rows {
    static constexpr bool KEYS_BY_TOKEN = true;    // channels, then tokens, run contiguously
    static constexpr bool VALUES_BY_TOKEN = true;

    template <class T, int HEAD_SIZE, int BLOCK_SIZE>
    static __device__ int64 key(const CacheStrides& stride, int64 block, int head, int offset, int channel) {
        return block * stride.block + head * stride.head + offset * stride.token + channel;
    }

    template <class T, int HEAD_SIZE, int BLOCK_SIZE>
    static __device__ int64 value(const CacheStrides& stride, int64 block, int head, int offset, int channel) {
        return key<T, HEAD_SIZE, BLOCK_SIZE>(stride, block, head, offset, channel);
    }
};

// vLLM's layout: keys [num_blocks, num_kv_heads, head_size / x, block_size, x] with x elements in
// 16 bytes, values [num_blocks, num_kv_heads, head_size, block_size].
struct Vllm {
    static constexpr bool KEYS_BY_TOKEN = false;
    static constexpr bool VALUES_BY_TOKEN = false;

    template <class T, int HEAD_SIZE, int BLOCK_SIZE>
    static __device__ int64 key(const CacheStrides& stride, int64 block, int head, int offset, int channel) {
        constexpr int X = 16 / sizeof(T);
        static_assert(HEAD_SIZE % X == 0, "head_size must fill whole 16-byte chunks");
        return block * stride.block + head * stride.head + (channel / X * BLOCK_SIZE + offset) * X + channel % X;
    }

    template <class T, int HEAD_SIZE, int BLOCK_SIZE>
    static __device__ int64 value(const CacheStrides& stride, int64 block, int head, int offset, int channel) {
        return block * stride.block + head * stride.head + channel * BLOCK_SIZE + offset;
    }
};

}  // namespace cupy_paged
