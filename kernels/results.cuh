// Where joined states go: into scratch memory, as those of a sequence's node, or into the result.
#pragma once
#include "attention_params.cuh"
#include "dtypes.cuh"
#include "pieces.cuh"
#include "softmax.cuh"
#include "warp_states.cuh"

namespace cupy_paged {

// Four channels of a node's joined state, to scratch memory.
template <class Scratch, int HEAD_SIZE>
__device__ inline void write_node(const AttentionParams& p, const Piece& piece, int head_of_piece, int channel,
                                  const JoinedState& state) {
    const int64 row = int64(piece.seq) * p.num_heads + piece.head + head_of_piece;
    const int64 slot = row * p.max_partitions + piece.node;
    Vector<Scratch, 4> mean;
#pragma unroll
    for (int c = 0; c < 4; c++) mean.element[c] = from_float<Scratch>(state.mean[c]);
    store_vector(static_cast<Scratch*>(p.tmp_out) + slot * HEAD_SIZE + channel, mean);
    if (channel == 0) p.max_logits[slot] = state.max, p.exp_sums[slot] = state.sum;
}

// Four channels of a sequence's result, and its lse. A sequence longer than its table gives NaN: loud,
// where leaving tokens out would be silently wrong.
template <class Query>
__device__ inline void write_result(const AttentionParams& p, const Piece& piece, int head_of_piece, int channel,
                                    const JoinedState& state) {
    const int head = piece.head + head_of_piece;
    Query* out = static_cast<Query*>(p.out) + piece.seq * p.out_stride_seq + head * p.out_stride_head + channel;
#pragma unroll
    for (int c = 0; c < 4; c++) out[c] = from_float<Query>(piece.fits ? state.mean[c] : not_a_number());
    if (channel == 0 && p.lse)
        p.lse[int64(piece.seq) * p.num_heads + head] =
            piece.fits ? log_sum_exp(state.max, state.sum) : not_a_number();
}

}  // namespace cupy_paged
