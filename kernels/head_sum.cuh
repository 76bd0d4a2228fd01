// The sum of the nodes of one head, by one warp, with the bits that a thread block gets that does a group.
#pragma once
#include "attention_params.cuh"
#include "nodes.cuh"
#include "pieces.cuh"
#include "results.cuh"
#include "schedule.cuh"
#include "warp_states.cuh"

namespace cupy_paged {

// One head's sum, by one warp, node by node, four channels a lane at a time.
template <int HEAD_SIZE> struct HeadSum {
    static constexpr int LANE_GROUPS = ceil_div(HEAD_SIZE, 4 * WARP);  // of 4 channels, for each lane

    RunningState group[LANE_GROUPS];  // the one that is being summed up
    RunningState total[LANE_GROUPS];  // of all groups
    JoinedState last[LANE_GROUPS];    // group

    static __device__ int channel(int k) { return (k * WARP + threadIdx.x % WARP) * 4; }

    template <class Stage, class Steps> __device__ void take(const Stage& stage, const Steps& steps, int step) {
        const int count = steps.count(step);
#pragma unroll
        for (int i = 0; i < Stage::COUNT; i++) {
            if (i >= count) break;
            const int node = step * Stage::COUNT + i;
            const bool begins = node % GROUP == 0 || steps.group == 1;
            const bool ends = node % GROUP == GROUP - 1 || node == steps.total - 1 || steps.group == 1;
#pragma unroll
            for (int k = 0; k < LANE_GROUPS; k++) {
                const JoinedState state = stage.node(i, min(channel(k), HEAD_SIZE - 4));
                if (begins) group[k].begin(state);
                else group[k].take(state);
                if (!ends) continue;
                last[k] = begins ? state : group[k].joined();
                if (node < steps.group) total[k].begin(last[k]);
                else total[k].take(last[k]);
            }
        }
    }

    template <class Query, class Steps>
    __device__ void write(const AttentionParams& p, const Piece& piece, int head, const Steps& steps) const {
#pragma unroll
        for (int k = 0; k < LANE_GROUPS; k++)
            if (channel(k) < HEAD_SIZE)
                write_result<Query>(p, piece, head, channel(k), steps.is_one_group() ? last[k] : total[k].joined());
    }
};

}  // namespace cupy_paged
