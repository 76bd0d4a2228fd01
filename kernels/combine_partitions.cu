// Joins the partitions of each sequence into its result.
//
//   out = sum_i w_i out_i / sum_i w_i,   w_i = exp_sum_i * exp(max_i - max over all partitions)
//
// Partitions are summed in an order that follows from their number alone. A single partition is
// copied, so a short sequence gives the bits that it gives without partitions.
#include "attention_params.cuh"
#include "dtypes.cuh"
#include "reduce.cuh"
#include "schedule.cuh"
#include "softmax.cuh"

namespace cupy_paged {

template <int NUM_WARPS> __device__ inline float block_max(float x, float (&per_warp)[NUM_WARPS]) {
    x = lanes_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) per_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    x = per_warp[0];
    for (int i = 1; i < NUM_WARPS; i++) x = fmaxf(x, per_warp[i]);
    return x;
}

// Grid: one thread block per (sequence, query head). A thread owns 4 channels of every
// SLOTS-th partition.
template <class Query, class Scratch, int HEAD_SIZE, int NUM_THREADS>
__global__ void __launch_bounds__(NUM_THREADS, 4) combine_partitions(const AttentionParams p) {
    constexpr int CHANNELS = 4;
    constexpr int CHANNEL_GROUPS = HEAD_SIZE / CHANNELS;
    constexpr int SLOTS = NUM_THREADS / CHANNEL_GROUPS;
    static_assert(SLOTS >= 1, "too many channels for this many threads");

    __shared__ float weight[NUM_THREADS];
    __shared__ float per_warp[NUM_THREADS / WARP];
    __shared__ float slot_sum[SLOTS];
    __shared__ float slot_out[SLOTS][HEAD_SIZE];

    const int seq = blockIdx.x / p.num_heads, head = blockIdx.x % p.num_heads;
    const int64 row = blockIdx.x;
    const int seq_len = p.seq_lens[seq];
    const bool fits = seq_len <= p.max_seq_len;
    const int num_partitions = fits ? ceil_div(max(seq_len, 0), partition_size_of(seq_len, p.partition_size)) : 0;
    const float* max_logits = p.max_logits + row * p.max_partitions;
    const float* exp_sums = p.exp_sums + row * p.max_partitions;
    const Scratch* tmp_out = static_cast<const Scratch*>(p.tmp_out) + row * p.max_partitions * HEAD_SIZE;
    Query* out = static_cast<Query*>(p.out) + seq * p.out_stride_seq + head * p.out_stride_head;

    // A row without partitions is empty, or longer than its table and NaN: loud, where leaving
    // tokens out would be silently wrong.
    if (num_partitions <= 1) {
        const float filler = fits ? 0.0f : not_a_number();
        for (int channel = threadIdx.x; channel < HEAD_SIZE; channel += NUM_THREADS)
            out[channel] = from_float<Query>(num_partitions ? to_float(tmp_out[channel]) : filler);
        if (threadIdx.x == 0 && p.lse)
            p.lse[row] = num_partitions ? log_sum_exp(max_logits[0], exp_sums[0]) : fits ? minus_infinity() : filler;
        return;
    }

    float max = LOWEST;
    for (int i = threadIdx.x; i < num_partitions; i += NUM_THREADS) max = fmaxf(max, max_logits[i]);
    max = block_max(max, per_warp);

    const int channel = threadIdx.x % CHANNEL_GROUPS * CHANNELS, slot = threadIdx.x / CHANNEL_GROUPS;
    float sum = 0.0f, weighted[CHANNELS] = {};
    for (int first = 0; first < num_partitions; first += NUM_THREADS) {
        __syncthreads();
        const int mine = first + threadIdx.x;
        if (mine < num_partitions) weight[threadIdx.x] = exp_sums[mine] * exp_difference(max_logits[mine], max);
        __syncthreads();
        if (slot >= SLOTS) continue;
        const int count = min(NUM_THREADS, num_partitions - first);
#pragma unroll 4
        for (int i = (slot + SLOTS - first % SLOTS) % SLOTS; i < count; i += SLOTS) {
            float partial[CHANNELS];
            to_floats(load_vector<CHANNELS>(tmp_out + int64(first + i) * HEAD_SIZE + channel), partial);
            sum += weight[i];
#pragma unroll
            for (int j = 0; j < CHANNELS; j++) weighted[j] += weight[i] * partial[j];
        }
    }
    if (slot < SLOTS) {
        if (channel == 0) slot_sum[slot] = sum;
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) slot_out[slot][channel + j] = weighted[j];
    }
    __syncthreads();

    sum = 0.0f;
    for (int i = 0; i < SLOTS; i++) sum += slot_sum[i];
    for (int c = threadIdx.x; c < HEAD_SIZE; c += NUM_THREADS) {
        float total = 0.0f;
        for (int i = 0; i < SLOTS; i++) total += slot_out[i][c];
        out[c] = from_float<Query>(total / sum);
    }
    if (threadIdx.x == 0 && p.lse) p.lse[row] = log_sum_exp(max, sum);
}

}  // namespace cupy_paged
