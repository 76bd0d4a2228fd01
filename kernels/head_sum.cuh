// The sum of the nodes of one head, by one warp, with the bits that a thread block gets that does a group.
#pragma once
#include "attention_params.cuh"
#include "nodes.cuh"
#include "pieces.cuh"
#include "results.cuh"
#include "schedule.cuh"
#include "warp_states.cuh"

namespace cupy_paged {

// One head's sum, by one warp: step by step, group by group, four channels a lane at a time.
template <int HEAD_SIZE> struct HeadSum {
    static constexpr int LANE_GROUPS = ceil_div(HEAD_SIZE, 4 * WARP);  // of 4 channels, for each lane

    JoinedState group[LANE_GROUPS];   // the last one
    RunningState total[LANE_GROUPS];  // of all groups

    static __device__ int channel(int k) { return (k * WARP + threadIdx.x % WARP) * 4; }

    template <class Stage> __device__ void take(const Stage& stage, const SumSteps& steps, int step) {
        const int count = steps.count(step);
        for (int first = 0; first < count; first += steps.group)
#pragma unroll
            for (int k = 0; k < LANE_GROUPS; k++) {
                const int at = min(channel(k), HEAD_SIZE - 4);
                group[k] = stage.node(first, at);
                if (steps.group > 1 && count > 1) {
                    RunningState sum;
                    sum.begin(group[k]);
#pragma unroll
                    for (int i = 1; i < GROUP; i++)
                        if (i < count) sum.take(stage.node(i, at));
                    group[k] = sum.joined();
                }
                if (step == 0 && first == 0) total[k].begin(group[k]);
                else total[k].take(group[k]);
            }
    }

    template <class Query>
    __device__ void write(const AttentionParams& p, const Piece& piece, int head, const SumSteps& steps) const {
#pragma unroll
        for (int k = 0; k < LANE_GROUPS; k++)
            if (channel(k) < HEAD_SIZE)
                write_result<Query>(p, piece, head, channel(k), steps.is_one_group() ? group[k] : total[k].joined());
    }
};

}  // namespace cupy_paged
