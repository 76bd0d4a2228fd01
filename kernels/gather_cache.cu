// Gathers the tokens of sequences out of a paged cache, one sequence after the other.
//
//   key[cu_seq_lens[s] + i] = the token at seq_starts[s] + i of sequence s
//
// Only slots of tokens that are asked for are read. A token whose block is not in the table's row, or
// not in the cache, is left out: there is no memory behind it.
#include "layouts.cuh"
#include "token_moves.cuh"

namespace cupy_paged {

constexpr int TILE_TOKENS = 16;

// Packed by cupy_paged/layout_ops.py, field by field. Strides count elements.
struct GatherParams {
    void* key;                   // [num_tokens, num_kv_heads, head_size]
    void* value;                 // [num_tokens, num_kv_heads, head_size]
    const void* key_cache;       // see layouts.cuh
    const void* value_cache;
    const int* block_tables;     // [num_seqs, max_num_blocks_per_seq]
    const int* cu_seq_lens;      // [num_seqs + 1]
    const int* seq_starts;       // [num_seqs]; null: all begin at token 0
    const float* k_scale_array;  // [1]; null where k_scale holds the value
    const float* v_scale_array;  // [1]; null where v_scale holds the value

    int64 key_stride_token, key_stride_head;
    int64 value_stride_token, value_stride_head;
    int64 table_stride;
    CacheStrides key_strides, value_strides;
    int64 num_tokens, num_blocks;

    int num_seqs, max_num_blocks_per_seq, num_kv_heads;
    int heads_of_block;  // heads that a thread block moves
    float k_scale, v_scale;
};

// Where a token is cached.
struct Slot {
    int64 block;  // -1: there is no such token
    int offset;
};

template <int BLOCK_SIZE> __device__ inline Slot slot_of(const GatherParams& p, int64 token) {
    const Slot none = {-1, 0};
    if (token >= p.num_tokens || token < p.cu_seq_lens[0] || token >= p.cu_seq_lens[p.num_seqs]) return none;
    int seq = 0;  // the last one that begins at or before the token
    for (int end = p.num_seqs; end - seq > 1;) {
        const int middle = seq + (end - seq) / 2;
        if (p.cu_seq_lens[middle] <= token) seq = middle;
        else end = middle;
    }
    const int64 position = token - p.cu_seq_lens[seq] + (p.seq_starts ? p.seq_starts[seq] : 0);
    if (position < 0 || position / BLOCK_SIZE >= p.max_num_blocks_per_seq) return none;
    const int64 block = p.block_tables[seq * p.table_stride + position / BLOCK_SIZE];
    if (block < 0 || block >= p.num_blocks) return none;
    return {block, int(position % BLOCK_SIZE)};
}

// Grid: one thread block for each (tile of tokens, group of heads, keys or values).
// WIDTHs are elements that both sides' alignment allows at once.
template <class Cache, class Target, class Layout, int HEAD_SIZE, int BLOCK_SIZE, int KEY_WIDTH, int VALUE_WIDTH,
          int NUM_THREADS>
__global__ void __launch_bounds__(NUM_THREADS) gather_cache(const GatherParams p) {
    __shared__ Slot slots[TILE_TOKENS];
    const int groups = (p.num_kv_heads + p.heads_of_block - 1) / p.heads_of_block;
    const int64 first_token = int64(blockIdx.x) / (2 * groups) * TILE_TOKENS;
    const int part = blockIdx.x % (2 * groups);
    const int first_head = part / 2 * p.heads_of_block;
    const int end_head = min(first_head + p.heads_of_block, p.num_kv_heads);
    if (threadIdx.x < TILE_TOKENS) slots[threadIdx.x] = slot_of<BLOCK_SIZE>(p, first_token + threadIdx.x);
    __syncthreads();
    const auto live = [&](int token) { return slots[token].block >= 0; };

    if (part % 2 == 0) {
        const float scale = p.k_scale_array ? *p.k_scale_array : p.k_scale;
        const auto from = [&](int head, int token, int channel) {
            const Slot at = slots[token];
            return Layout::template key<Cache, HEAD_SIZE, BLOCK_SIZE>(p.key_strides, at.block, head, at.offset,
                                                                      channel);
        };
        const auto to = [&](int head, int token, int channel) {
            return (first_token + token) * p.key_stride_token + head * p.key_stride_head + channel;
        };
        constexpr int RUN = Layout::KEYS_BY_TOKEN ? HEAD_SIZE / KEY_WIDTH : 4;
        move_channels<HEAD_SIZE, TILE_TOKENS, KEY_WIDTH, RUN, NUM_THREADS>(
            static_cast<const Cache*>(p.key_cache), static_cast<Target*>(p.key), scale, first_head, end_head, live,
            from, to);
    } else {
        const float scale = p.v_scale_array ? *p.v_scale_array : p.v_scale;
        const auto from = [&](int head, int token, int channel) {
            const Slot at = slots[token];
            return Layout::template value<Cache, HEAD_SIZE, BLOCK_SIZE>(p.value_strides, at.block, head, at.offset,
                                                                        channel);
        };
        const auto to = [&](int head, int token, int channel) {
            return (first_token + token) * p.value_stride_token + head * p.value_stride_head + channel;
        };
        const Cache* source = static_cast<const Cache*>(p.value_cache);
        Target* target = static_cast<Target*>(p.value);
        if constexpr (Layout::VALUES_BY_TOKEN)
            move_channels<HEAD_SIZE, TILE_TOKENS, VALUE_WIDTH, HEAD_SIZE / VALUE_WIDTH, NUM_THREADS>(
                source, target, scale, first_head, end_head, live, from, to);
        else
            move_columns_to_rows<HEAD_SIZE, TILE_TOKENS, 1, VALUE_WIDTH, NUM_THREADS>(source, target, scale, first_head,
                                                                                      end_head, live, from, to);
    }
}

}  // namespace cupy_paged
