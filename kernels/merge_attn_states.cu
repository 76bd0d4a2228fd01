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
    int tile_bits;                   // log2 of the tokens whose rows of one head are next to each other
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
// each, as it has threads for, and AT_ONCE times that, so that much is in flight; a thread takes WIDTH
// channels at a time. Rows are taken in tiles of some tokens, head by head, for their lse lie side by
// side; Row holds a row's number: where that is uint32, division is much cheaper. Both sides are read
// before it is known whether they count: what an empty one holds is read, but never used. All of a row's
// threads have read its lse before one of them writes it, so the result may replace either side.
template <class Input, class Output, class Row, int HEAD_SIZE, int WIDTH, int NUM_THREADS>
__global__ void __launch_bounds__(NUM_THREADS) merge_attn_states(const MergeParams p) {
    constexpr int CHUNKS = HEAD_SIZE / WIDTH;
    constexpr int ROW_THREADS = min_of(CHUNKS, NUM_THREADS);
    constexpr int ROWS = NUM_THREADS / ROW_THREADS;
    constexpr int AT_ONCE = CHUNKS == ROW_THREADS ? 2 : 1;
    static_assert(HEAD_SIZE % WIDTH == 0, "vectors must tile a row");
    float factor = 1.0f;
    if constexpr (is_float8<Output>) factor = 1.0f / (p.output_scale_array ? *p.output_scale_array : p.output_scale);

    const uint32 tile_rows = uint32(p.num_heads) << p.tile_bits;
    const int64 num_rows = ((p.num_tokens - 1 >> p.tile_bits) + 1) * tile_rows;
    const int first_chunk = threadIdx.x % ROW_THREADS;
    for (int64 first = int64(blockIdx.x) * ROWS * AT_ONCE; first < num_rows;
         first += int64(gridDim.x) * ROWS * AT_ONCE) {
        int64 token[AT_ONCE];
        int head[AT_ONCE];
        bool mine[AT_ONCE], has_prefix[AT_ONCE];
        float prefix_lse[AT_ONCE], suffix_lse[AT_ONCE];
        Vector<Input, WIDTH> prefix[AT_ONCE], suffix[AT_ONCE];  // of the first chunk
        const auto prefix_row = [&](int k) {
            return static_cast<const Input*>(p.prefix_output) + token[k] * p.prefix_stride_token +
                   head[k] * p.prefix_stride_head;
        };
        const auto suffix_row = [&](int k) {
            return static_cast<const Input*>(p.suffix_output) + token[k] * p.suffix_stride_token +
                   head[k] * p.suffix_stride_head;
        };
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int64 row = first + k * ROWS + threadIdx.x / ROW_THREADS;
            const Row tile = Row(row) / tile_rows;
            const uint32 in_tile = uint32(row) - uint32(tile) * tile_rows;
            head[k] = int(in_tile >> p.tile_bits);
            token[k] = (int64(tile) << p.tile_bits) + (in_tile & (1u << p.tile_bits) - 1);
            mine[k] = threadIdx.x < ROWS * ROW_THREADS && row < num_rows && token[k] < p.num_tokens;
            if (!mine[k]) continue;
            has_prefix[k] = token[k] < p.num_merged_tokens;
            suffix_lse[k] = lse_at(p.suffix_lse, p.suffix_lse_stride_head, p.suffix_lse_stride_token, token[k], head[k]);
            prefix_lse[k] = lse_at(p.prefix_lse, p.prefix_lse_stride_head, p.prefix_lse_stride_token, token[k], head[k]);
            prefix[k] = load_vector<WIDTH>(prefix_row(k) + first_chunk * WIDTH);
            suffix[k] = load_vector<WIDTH>(suffix_row(k) + first_chunk * WIDTH);
        }
        if constexpr (WARP % ROW_THREADS == 0) __syncwarp();
        else __syncthreads();

#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (!mine[k]) continue;
            if (!has_prefix[k]) prefix_lse[k] = minus_infinity();
            const bool prefix_only = has_prefix[k] && is_empty(suffix_lse[k]);
            const bool suffix_only = !prefix_only && is_empty(prefix_lse[k]);
            const float max = fmaxf(prefix_lse[k], suffix_lse[k]);
            const float prefix_weight = exp_difference(prefix_lse[k], max);
            const float suffix_weight = exp_difference(suffix_lse[k], max);
            const float sum = prefix_weight + suffix_weight;
            Output* output_row =
                static_cast<Output*>(p.output) + token[k] * p.output_stride_token + head[k] * p.output_stride_head;

            for (int chunk = first_chunk; chunk < CHUNKS; chunk += ROW_THREADS) {
                if (chunk != first_chunk) {
                    prefix[k] = load_vector<WIDTH>(prefix_row(k) + chunk * WIDTH);
                    suffix[k] = load_vector<WIDTH>(suffix_row(k) + chunk * WIDTH);
                }
                float from_prefix[WIDTH], from_suffix[WIDTH];
                to_floats(prefix[k], from_prefix);
                to_floats(suffix[k], from_suffix);
                Vector<Output, WIDTH> result;
#pragma unroll
                for (int i = 0; i < WIDTH; i++) {
                    float merged = prefix_only ? from_prefix[i]
                                   : suffix_only
                                       ? from_suffix[i]
                                       : from_prefix[i] * (prefix_weight / sum) + from_suffix[i] * (suffix_weight / sum);
                    if constexpr (is_float8<Output>) merged *= factor;
                    result.element[i] = from_float<Output>(merged);
                }
                store_once(output_row + chunk * WIDTH, result);
            }
            if (first_chunk == 0 && p.output_lse) {
                // A token without prefix keeps the lse it came with, be it infinite of either sign.
                const float lse = !has_prefix[k] ? suffix_lse[k]
                                  : prefix_only  ? (is_empty(prefix_lse[k]) ? minus_infinity() : prefix_lse[k])
                                  : suffix_only  ? suffix_lse[k]
                                                 : logf(sum) + max;
                p.output_lse[head[k] * p.output_lse_stride_head + token[k] * p.output_lse_stride_token] = lse;
            }
        }
    }
}

}  // namespace cupy_paged
