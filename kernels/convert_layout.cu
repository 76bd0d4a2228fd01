// Copies a whole cache into another layout, bit by bit.
#include "layouts.cuh"
#include "token_moves.cuh"

namespace cupy_paged {

// Packed by cupy_paged/layout_ops.py, field by field. Strides count elements.
struct ConvertLayoutParams {
    const void* key_cache;    // see layouts.cuh
    const void* value_cache;
    void* new_key_cache;      // the same blocks, heads and tokens in another layout
    void* new_value_cache;
    CacheStrides key_strides, value_strides, new_key_strides, new_value_strides;
    int num_kv_heads;
    int heads_of_block;  // heads that a thread block moves
};

// Grid: one thread block for each (block, TOKENS of its tokens, group of heads, keys or values).
// WIDTHs are elements that both sides' alignment allows at once: KEY_WIDTH and VALUE_WIDTH channels of a
// token, TOKEN_WIDTH tokens of a channel where a value is turned. Element is an integer of their size.
template <class Element, class Layout, class NewLayout, int HEAD_SIZE, int BLOCK_SIZE, int TOKENS, int KEY_WIDTH,
          int VALUE_WIDTH, int TOKEN_WIDTH, int NUM_THREADS>
__global__ void __launch_bounds__(NUM_THREADS) convert_layout(const ConvertLayoutParams p) {
    constexpr int TILES = ceil_div(BLOCK_SIZE, TOKENS);
    const int groups = (p.num_kv_heads + p.heads_of_block - 1) / p.heads_of_block;
    const int part = blockIdx.x % (2 * groups);
    const int first_head = part / 2 * p.heads_of_block;
    const int end_head = min(first_head + p.heads_of_block, p.num_kv_heads);
    const int64 block = blockIdx.x / (2 * groups) / TILES;
    const int first_token = int(blockIdx.x / (2 * groups) % TILES) * TOKENS;
    const auto live = [&](int token) { return first_token + token < BLOCK_SIZE; };

    if (part % 2 == 0) {
        const auto from = [&](int head, int token, int channel) {
            return Layout::template key<Element, HEAD_SIZE, BLOCK_SIZE>(p.key_strides, block, head, first_token + token,
                                                                        channel);
        };
        const auto to = [&](int head, int token, int channel) {
            return NewLayout::template key<Element, HEAD_SIZE, BLOCK_SIZE>(p.new_key_strides, block, head,
                                                                           first_token + token, channel);
        };
        constexpr int RUN = Layout::KEYS_BY_TOKEN && NewLayout::KEYS_BY_TOKEN ? HEAD_SIZE / KEY_WIDTH : 4;
        move_channels<HEAD_SIZE, TOKENS, KEY_WIDTH, RUN, NUM_THREADS>(
            static_cast<const Element*>(p.key_cache), static_cast<Element*>(p.new_key_cache), 1.0f, first_head,
            end_head, live, from, to);
    } else {
        const auto from = [&](int head, int token, int channel) {
            return Layout::template value<Element, HEAD_SIZE, BLOCK_SIZE>(p.value_strides, block, head,
                                                                          first_token + token, channel);
        };
        const auto to = [&](int head, int token, int channel) {
            return NewLayout::template value<Element, HEAD_SIZE, BLOCK_SIZE>(p.new_value_strides, block, head,
                                                                             first_token + token, channel);
        };
        const Element* source = static_cast<const Element*>(p.value_cache);
        Element* target = static_cast<Element*>(p.new_value_cache);
        if constexpr (Layout::VALUES_BY_TOKEN && NewLayout::VALUES_BY_TOKEN)
            move_channels<HEAD_SIZE, TOKENS, VALUE_WIDTH, HEAD_SIZE / VALUE_WIDTH, NUM_THREADS>(
                source, target, 1.0f, first_head, end_head, live, from, to);
        else if constexpr (NewLayout::VALUES_BY_TOKEN)
            move_columns_to_rows<HEAD_SIZE, TOKENS, TOKEN_WIDTH, VALUE_WIDTH, NUM_THREADS>(
                source, target, 1.0f, first_head, end_head, live, from, to);
        else
            move_rows_to_columns<HEAD_SIZE, TOKENS, TOKEN_WIDTH, VALUE_WIDTH, NUM_THREADS>(
                source, target, first_head, end_head, live, from, to);
    }
}

}  // namespace cupy_paged
