// Where a finished partition goes.
#pragma once
#include "attention_params.cuh"
#include "dtypes.cuh"
#include "softmax.cuh"

namespace cupy_paged {

// Into the scratch of a later combine. As in vLLM, a partition of which a head attends to nothing
// keeps its token count as exp_sum.
template <class Scratch> struct ToPartitions {
    static constexpr int MIN_PARTITIONS = 0;

    template <int HEAD_SIZE>
    static __device__ void write(const AttentionParams& p, int seq, int head, int partition, int channel,
                                 float value) {
        const int64 slot = (int64(seq) * p.num_heads + head) * p.max_partitions + partition;
        static_cast<Scratch*>(p.tmp_out)[slot * HEAD_SIZE + channel] = from_float<Scratch>(value);
    }

    static __device__ void write_state(const AttentionParams& p, int seq, int head, int partition, float max,
                                       float sum, int num_tokens) {
        const int64 slot = (int64(seq) * p.num_heads + head) * p.max_partitions + partition;
        p.max_logits[slot] = max;
        p.exp_sums[slot] = sum == 0.0f ? float(num_tokens) : sum;
    }
};

// Straight into the result. A sequence longer than its table gives NaN: loud, where leaving tokens
// out would be silently wrong.
template <class Query> struct ToOutput {
    static constexpr int MIN_PARTITIONS = 1;

    template <int HEAD_SIZE>
    static __device__ void write(const AttentionParams& p, int seq, int head, int /*partition*/, int channel,
                                 float value) {
        const bool fits = p.seq_lens[seq] <= p.max_seq_len;
        static_cast<Query*>(p.out)[seq * p.out_stride_seq + head * p.out_stride_head + channel] =
            from_float<Query>(fits ? value : not_a_number());
    }

    static __device__ void write_state(const AttentionParams& p, int seq, int head, int /*partition*/, float max,
                                       float sum, int /*num_tokens*/) {
        const bool fits = p.seq_lens[seq] <= p.max_seq_len;
        if (p.lse) p.lse[int64(seq) * p.num_heads + head] = fits ? log_sum_exp(max, sum) : not_a_number();
    }
};

}  // namespace cupy_paged
