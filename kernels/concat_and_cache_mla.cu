// Writes the latents and the rotary keys of new tokens into their slots of a paged cache of
// multi-head latent attention: one row a token, the latent first.
//
// Slot = block * block_size + offset. A negative slot marks padding and is skipped, and so is a slot
// past the end of the cache: there is no memory behind it.
#include "quantise.cuh"

namespace cupy_paged {

// Packed by cupy_paged/mla.py, field by field. Strides count elements.
struct ConcatParams {
    const void* kv_c;           // [>= num_tokens, kv_lora_rank]
    const void* k_pe;           // [>= num_tokens, pe_dim]
    void* kv_cache;             // [num_blocks, block_size, kv_lora_rank + pe_dim]
    const int64* slot_mapping;  // [num_tokens]
    const float* scale_array;   // [1]; null where scale holds the value

    int64 kv_c_stride_token, k_pe_stride_token;
    int64 cache_stride_block, cache_stride_token;
    int64 block_size, num_slots;

    int kv_lora_rank, pe_dim;  // multiples of WIDTH
    float scale;
};

// Grid: one thread block per token. WIDTH elements move at a time.
template <class Source, class Cache, int WIDTH, int NUM_THREADS>
__global__ void __launch_bounds__(NUM_THREADS) concat_and_cache_mla(const ConcatParams p) {
    const int64 token = blockIdx.x, slot = p.slot_mapping[token];
    if (slot < 0 || slot >= p.num_slots) return;
    const float scale = p.scale_array ? *p.scale_array : p.scale;
    const Source* latent = static_cast<const Source*>(p.kv_c) + token * p.kv_c_stride_token;
    const Source* rotary = static_cast<const Source*>(p.k_pe) + token * p.k_pe_stride_token;
    Cache* row = static_cast<Cache*>(p.kv_cache) + slot / p.block_size * p.cache_stride_block +
                 slot % p.block_size * p.cache_stride_token;
    for (int i = threadIdx.x * WIDTH; i < p.kv_lora_rank + p.pe_dim; i += NUM_THREADS * WIDTH) {
        const auto in = load_vector<WIDTH>(i < p.kv_lora_rank ? latent + i : rotary + (i - p.kv_lora_rank));
        Vector<Cache, WIDTH> out;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) out.element[j] = stored<Cache>(in.element[j], scale);
        store_vector(row + i, out);
    }
}

}  // namespace cupy_paged
