// Merges two partial attentions over disjoint sets of tokens by their log-sum-exps.
//
//   lse = log(exp(lse_p) + exp(lse_s)),   out = out_p exp(lse_p - lse) + out_s exp(lse_s - lse)
//
// As in FlashInfer (Ye et al., arXiv:2501.01005, section 2.2) and vLLM. An infinite lse
// of either sign marks a side that saw no token (some kernels report +inf): the other side is then
// taken as it is, never multiplied, so that an unwritten output cannot poison it.
#include "dtypes.cuh"
#include "softmax.cuh"

namespace cupy_paged {

// Packed by cupy_paged/merge.py, field by field. Strides count elements.
struct MergeParams {
    void* output;                    // [num_tokens, num_heads, head_size]
    const void* prefix_output;       // [num_tokens, num_heads, head_size]
    const void* suffix_output;       // [num_tokens, num_heads, head_size]
    const float* prefix_lse;         // [num_heads, num_tokens]
    const float* suffix_lse;         // [num_heads, num_tokens]
    float* output_lse;               // [num_heads, num_tokens]; may be null
    const float* output_scale_array; // [1]; null where output_scale holds the value

    int64 output_stride_token, output_stride_head;
    int64 prefix_stride_token, prefix_stride_head;
    int64 suffix_stride_token, suffix_stride_head;
    int64 prefix_lse_stride_head, prefix_lse_stride_token;
    int64 suffix_lse_stride_head, suffix_lse_stride_token;
    int64 output_lse_stride_head, output_lse_stride_token;
    int64 num_tokens, num_merged_tokens;  // tokens from num_merged_tokens on have no prefix

    int num_heads;
    float output_scale;
};

__device__ inline bool is_empty(float lse) { return fabsf(lse) == -minus_infinity(); }

// Grid: any number of thread blocks. A thread block takes as many whole rows, of one (token, head)
// each, as it has threads for; a thread takes WIDTH channels at a time. All of a row's threads have
// read its lse before one of them writes it, so the result may replace either side.
template <class Input, class Output, int HEAD_SIZE, int WIDTH, int NUM_THREADS>
__global__ void __launch_bounds__(NUM_THREADS) merge_attn_states(const MergeParams p) {
    constexpr int CHUNKS = HEAD_SIZE / WIDTH;
    constexpr int ROW_THREADS = min_of(CHUNKS, NUM_THREADS);
    constexpr int ROWS = NUM_THREADS / ROW_THREADS;
    static_assert(HEAD_SIZE % WIDTH == 0, "vectors must tile a row");
    float factor = 1.0f;
    if constexpr (is_float8<Output>) factor = 1.0f / (p.output_scale_array ? *p.output_scale_array : p.output_scale);

    const int64 num_rows = p.num_tokens * p.num_heads;
    for (int64 first = int64(blockIdx.x) * ROWS; first < num_rows; first += int64(gridDim.x) * ROWS) {
        const int64 row = first + threadIdx.x / ROW_THREADS;
        const bool mine = threadIdx.x < ROWS * ROW_THREADS && row < num_rows;
        const int64 token = row / p.num_heads;
        const int head = int(row % p.num_heads);
        const bool has_prefix = token < p.num_merged_tokens;

        float prefix_lse = minus_infinity(), suffix_lse = minus_infinity();
        if (mine) {
            suffix_lse = p.suffix_lse[head * p.suffix_lse_stride_head + token * p.suffix_lse_stride_token];
            if (has_prefix)
                prefix_lse = p.prefix_lse[head * p.prefix_lse_stride_head + token * p.prefix_lse_stride_token];
        }
        __syncthreads();
        if (!mine) continue;

        const bool prefix_only = has_prefix && is_empty(suffix_lse);
        const bool suffix_only = !prefix_only && is_empty(prefix_lse);
        const float max = fmaxf(prefix_lse, suffix_lse);
        const float prefix_weight = exp_difference(prefix_lse, max);
        const float suffix_weight = exp_difference(suffix_lse, max);
        const float sum = prefix_weight + suffix_weight;

        const Input* prefix_row = static_cast<const Input*>(p.prefix_output) + token * p.prefix_stride_token +
                                  head * p.prefix_stride_head;
        const Input* suffix_row = static_cast<const Input*>(p.suffix_output) + token * p.suffix_stride_token +
                                  head * p.suffix_stride_head;
        Output* output_row =
            static_cast<Output*>(p.output) + token * p.output_stride_token + head * p.output_stride_head;
        for (int chunk = threadIdx.x % ROW_THREADS; chunk < CHUNKS; chunk += ROW_THREADS) {
            const int channel = chunk * WIDTH;
            float prefix[WIDTH], suffix[WIDTH];
            if (!suffix_only) to_floats(load_vector<WIDTH>(prefix_row + channel), prefix);
            if (!prefix_only) to_floats(load_vector<WIDTH>(suffix_row + channel), suffix);
            Vector<Output, WIDTH> result;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                float merged = prefix_only   ? prefix[i]
                               : suffix_only ? suffix[i]
                                             : prefix[i] * (prefix_weight / sum) + suffix[i] * (suffix_weight / sum);
                if constexpr (is_float8<Output>) merged *= factor;
                result.element[i] = from_float<Output>(merged);
            }
            store_vector(output_row + channel, result);
        }
        if (threadIdx.x % ROW_THREADS == 0 && p.output_lse) {
            // A token without prefix keeps the lse it came with, be it infinite of either sign.
            const float lse = !has_prefix   ? suffix_lse
                              : prefix_only ? (is_empty(prefix_lse) ? minus_infinity() : prefix_lse)
                              : suffix_only ? suffix_lse
                                            : logf(sum) + max;
            p.output_lse[head * p.output_lse_stride_head + token * p.output_lse_stride_token] = lse;
        }
    }
}

}  // namespace cupy_paged
