// Where joined states go: into scratch memory, as those of a partition, or into the result.
#pragma once
#include "attention_params.cuh"
#include "dtypes.cuh"
#include "pieces.cuh"
#include "softmax.cuh"
#include "warp_states.cuh"

namespace cupy_paged {

// The joined state of a piece, as a partition in scratch memory.
template <class Scratch, int HEAD_SIZE, int NUM_THREADS, class States>
__device__ inline void write_partition(const AttentionParams& p, const Piece& piece, const States& states, float scale) {
    for (int i = threadIdx.x * 4; i < piece.num_heads * HEAD_SIZE; i += NUM_THREADS * 4) {
        const int head = i / HEAD_SIZE, channel = i % HEAD_SIZE;
        const auto joined = states.join(head, channel);
        const int64 slot = (int64(piece.seq) * p.num_heads + piece.head + head) * p.max_partitions + piece.partition;
        Vector<Scratch, 4> mean;
#pragma unroll
        for (int c = 0; c < 4; c++) mean.element[c] = from_float<Scratch>(joined.mean[c] * scale);
        store_vector(static_cast<Scratch*>(p.tmp_out) + slot * HEAD_SIZE + channel, mean);
        if (channel == 0) p.max_logits[slot] = joined.max, p.exp_sums[slot] = joined.sum;
    }
}

// Four channels of a sequence's result, and its lse. A sequence longer than its table gives NaN: loud,
// where leaving tokens out would be silently wrong.
template <class Query>
__device__ inline void write_channels(const AttentionParams& p, const Piece& piece, int head_of_piece, int channel,
                                      const JoinedState& joined, float scale) {
    const int head = piece.head + head_of_piece;
    Query* out = static_cast<Query*>(p.out) + piece.seq * p.out_stride_seq + head * p.out_stride_head + channel;
#pragma unroll
    for (int c = 0; c < 4; c++) out[c] = from_float<Query>(piece.fits ? joined.mean[c] * scale : not_a_number());
    if (channel == 0 && p.lse)
        p.lse[int64(piece.seq) * p.num_heads + head] =
            piece.fits ? log_sum_exp(joined.max, joined.sum) : not_a_number();
}

// Joined states of a whole sequence, of up to HEADS heads from `first_head` on, as its result.
template <class Query, int HEADS, int HEAD_SIZE, int NUM_THREADS, class States>
__device__ inline void write_result(const AttentionParams& p, const Piece& piece, int first_head, const States& states,
                                    float scale) {
    for (int i = threadIdx.x * 4; i < min(HEADS, piece.num_heads - first_head) * HEAD_SIZE; i += NUM_THREADS * 4)
        write_channels<Query>(p, piece, first_head + i / HEAD_SIZE, i % HEAD_SIZE,
                              states.join(i / HEAD_SIZE, i % HEAD_SIZE), scale);
}

// Takes the sum of one warp straight into the result.
template <class Query> struct WarpResult {
    const AttentionParams& p;
    const Piece& piece;
    int first_head;

    __device__ void take(int /*warp*/, int head, int channel, float max, float sum, const float (&weighted)[4]) const {
        JoinedState joined{max, sum, {}};
#pragma unroll
        for (int c = 0; c < 4; c++) joined.mean[c] = weighted[c] / sum;
        write_channels<Query>(p, piece, first_head + head, channel, joined, 1.0f);
    }
};

}  // namespace cupy_paged
