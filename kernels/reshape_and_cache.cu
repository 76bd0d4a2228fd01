// Writes new keys and values into their slots of a paged cache.
//
// Slot = block * block_size + offset. A negative slot marks padding and is skipped, and so is a slot
// past the end of the cache: there is no memory behind it. A float8 cache stores
// saturate(x / scale); any other keeps the bits.
#include "layouts.cuh"
#include "quantise.cuh"

namespace cupy_paged {

// Packed by cupy_paged/cache_ops.py, field by field. Strides count elements.
struct WriteParams {
    const void* key;            // [>= num_tokens, num_kv_heads, head_size]
    const void* value;          // [>= num_tokens, num_kv_heads, head_size]
    void* key_cache;            // see layouts.cuh
    void* value_cache;
    const int64* slot_mapping;  // [num_tokens]
    const float* k_scale_array; // [1]; null where k_scale holds the value
    const float* v_scale_array; // [1]; null where v_scale holds the value

    int64 key_stride_token, key_stride_head;
    int64 value_stride_token, value_stride_head;
    CacheStrides key_strides, value_strides;
    int64 num_slots;

    int num_kv_heads;
    float k_scale, v_scale;
};

// Moves WIDTH adjacent channels, which lie STRIDE elements apart in the cache.
template <int WIDTH, int STRIDE, class Source, class Cache>
__device__ inline void write(const Source* source, Cache* target, float scale) {
    const Vector<Source, WIDTH> in = load_vector<WIDTH>(source);
    Vector<Cache, WIDTH> out;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) out.element[i] = stored<Cache>(in.element[i], scale);
    if constexpr (STRIDE == 1) {
        store_vector(target, out);
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) target[int64(i) * STRIDE] = out.element[i];
    }
}

// Grid: one thread block per token. WIDTHs are elements that both sides' alignment allows at once.
template <class Source, class Cache, class Layout, int HEAD_SIZE, int BLOCK_SIZE, int KEY_WIDTH, int VALUE_WIDTH,
          int NUM_THREADS>
__global__ void __launch_bounds__(NUM_THREADS) reshape_and_cache(const WriteParams p) {
    static_assert(HEAD_SIZE % KEY_WIDTH == 0 && HEAD_SIZE % VALUE_WIDTH == 0, "vectors must tile a row");
    const int64 token = blockIdx.x, slot = p.slot_mapping[token];
    if (slot < 0 || slot >= p.num_slots) return;
    const int64 block = slot / BLOCK_SIZE;
    const int offset = int(slot % BLOCK_SIZE);
    const float k_scale = p.k_scale_array ? *p.k_scale_array : p.k_scale;
    const float v_scale = p.v_scale_array ? *p.v_scale_array : p.v_scale;

    constexpr int KEY_UNITS = HEAD_SIZE / KEY_WIDTH, VALUE_UNITS = HEAD_SIZE / VALUE_WIDTH;
    for (int i = threadIdx.x; i < p.num_kv_heads * KEY_UNITS; i += NUM_THREADS) {
        const int head = i / KEY_UNITS, channel = i % KEY_UNITS * KEY_WIDTH;
        write<KEY_WIDTH, 1>(
            static_cast<const Source*>(p.key) + token * p.key_stride_token + head * p.key_stride_head + channel,
            static_cast<Cache*>(p.key_cache) +
                Layout::template key<Cache, HEAD_SIZE, BLOCK_SIZE>(p.key_strides, block, head, offset, channel),
            k_scale);
    }
    for (int i = threadIdx.x; i < p.num_kv_heads * VALUE_UNITS; i += NUM_THREADS) {
        const int head = i / VALUE_UNITS, channel = i % VALUE_UNITS * VALUE_WIDTH;
        write<VALUE_WIDTH, Layout::VALUES_BY_TOKEN ? 1 : BLOCK_SIZE>(
            static_cast<const Source*>(p.value) + token * p.value_stride_token + head * p.value_stride_head + channel,
            static_cast<Cache*>(p.value_cache) +
                Layout::template value<Cache, HEAD_SIZE, BLOCK_SIZE>(p.value_strides, block, head, offset, channel),
            v_scale);
    }
}

}  // namespace cupy_paged
