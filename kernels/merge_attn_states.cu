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

__device__ inline float lse_at(const float* lse, int64 stride_head, int64 stride_token, int64 token, int head) {
    return lse[head * stride_head + token * stride_token];
}

// Stores what is not read again soon.
template <int N, class T> __device__ inline void store_once(T* target, const Vector<T, N>& v) {
    if constexpr (sizeof(v) == 16) __stcs(reinterpret_cast<uint4*>(target), reinterpret_cast<const uint4&>(v));
    else store_vector(target, v);
}

// Grid: any number of thread blocks. A thread block takes as many whole rows, of one (token, head)
// each, as it has threads for, a thread WIDTH channels at a time: more rows a thread are more registers,
// and fewer threads in flight. Told of four thread blocks an SM, the compiler takes some registers more than
// it needs, and 2% less time. Row holds a row's number: where that is uint32, division is much cheaper.
// Both sides are read before it is known whether they count: what an empty one holds is read, but never
// used. All of a row's threads have read its lse before one of them writes it, so the result may replace
// either side.
template <class Input, class Output, class Row, int HEAD_SIZE, int WIDTH, int NUM_THREADS>
__global__ void __launch_bounds__(NUM_THREADS, 4) merge_attn_states(const MergeParams p) {
    constexpr int CHUNKS = HEAD_SIZE / WIDTH;
    constexpr int ROW_THREADS = min_of(CHUNKS, NUM_THREADS);
    constexpr int ROWS = NUM_THREADS / ROW_THREADS;
    static_assert(HEAD_SIZE % WIDTH == 0, "vectors must tile a row");
    float factor = 1.0f;
    if constexpr (is_float8<Output>) factor = 1.0f / (p.output_scale_array ? *p.output_scale_array : p.output_scale);

    const int64 num_rows = p.num_tokens * p.num_heads;
    const int first_chunk = threadIdx.x % ROW_THREADS;
    for (int64 first = int64(blockIdx.x) * ROWS; first < num_rows; first += int64(gridDim.x) * ROWS) {
        const int64 row = first + threadIdx.x / ROW_THREADS;
        const bool mine = threadIdx.x < ROWS * ROW_THREADS && row < num_rows;
        const int64 token = Row(row) / Row(p.num_heads);
        const int head = int(row - token * p.num_heads);
        const bool has_prefix = token < p.num_merged_tokens;
        const Input* prefix_row = static_cast<const Input*>(p.prefix_output) + token * p.prefix_stride_token +
                                  head * p.prefix_stride_head;
        const Input* suffix_row = static_cast<const Input*>(p.suffix_output) + token * p.suffix_stride_token +
                                  head * p.suffix_stride_head;
        float prefix_lse, suffix_lse;
        Vector<Input, WIDTH> prefix, suffix;  // of the first chunk
        if (mine) {
            suffix_lse = lse_at(p.suffix_lse, p.suffix_lse_stride_head, p.suffix_lse_stride_token, token, head);
            prefix_lse = lse_at(p.prefix_lse, p.prefix_lse_stride_head, p.prefix_lse_stride_token, token, head);
            prefix = load_vector<WIDTH>(prefix_row + first_chunk * WIDTH);
            suffix = load_vector<WIDTH>(suffix_row + first_chunk * WIDTH);
        }
        if constexpr (WARP % ROW_THREADS == 0) __syncwarp();
        else __syncthreads();
        if (!mine) continue;

        if (!has_prefix) prefix_lse = minus_infinity();
        const bool prefix_only = has_prefix && is_empty(suffix_lse);
        const bool suffix_only = !prefix_only && is_empty(prefix_lse);
        const float max = fmaxf(prefix_lse, suffix_lse);
        const float prefix_weight = exp_difference(prefix_lse, max);
        const float suffix_weight = exp_difference(suffix_lse, max);
        const float sum = prefix_weight + suffix_weight;
        Output* output_row =
            static_cast<Output*>(p.output) + token * p.output_stride_token + head * p.output_stride_head;

        for (int chunk = first_chunk; chunk < CHUNKS; chunk += ROW_THREADS) {
            if (chunk != first_chunk) {
                prefix = load_vector<WIDTH>(prefix_row + chunk * WIDTH);
                suffix = load_vector<WIDTH>(suffix_row + chunk * WIDTH);
            }
            float from_prefix[WIDTH], from_suffix[WIDTH];
            to_floats(prefix, from_prefix);
            to_floats(suffix, from_suffix);
            Vector<Output, WIDTH> result;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                float merged = prefix_only   ? from_prefix[i]
                               : suffix_only ? from_suffix[i]
                                             : from_prefix[i] * (prefix_weight / sum) +
                                                   from_suffix[i] * (suffix_weight / sum);
                if constexpr (is_float8<Output>) merged *= factor;
                result.element[i] = from_float<Output>(merged);
            }
            store_once(output_row + chunk * WIDTH, result);
        }
        if (first_chunk == 0 && p.output_lse) {
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
