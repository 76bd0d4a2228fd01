// The sum of the nodes of one head, by one warp, with the bits that a thread block gets that does a group.
#pragma once
#include "attention_params.cuh"
#include "nodes.cuh"
#include "pieces.cuh"
#include "results.cuh"
#include "schedule.cuh"
#include "warp_states.cuh"

namespace cupy_paged {

// One head's sum, by one warp, four channels a lane at a time.
template <int HEAD_SIZE> struct HeadSum {
    static constexpr int LANE_GROUPS = ceil_div(HEAD_SIZE, 4 * WARP);  // of 4 channels, for each lane

    RunningState group[LANE_GROUPS];  // the one that is being summed up
    RunningState total[LANE_GROUPS];  // of all groups
    JoinedState last[LANE_GROUPS];    // group

    static __device__ int channel(int k) { return (k * WARP + threadIdx.x % WARP) * 4; }

    template <class Stage, class Steps> __device__ void take(const Stage& stage, const Steps& steps, int step) {
        constexpr int COUNT = Stage::COUNT;
        static_assert(GROUP % COUNT == 0, "a step must not be of two groups");
        const int first = step * COUNT, count = steps.count(step), end = first + count;
#pragma unroll
        for (int k = 0; k < LANE_GROUPS; k++) {
            // All that may be there at once, so that their sum waits for shared memory only once.
            JoinedState node[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; i++) node[i] = stage.node(i, min(channel(k), HEAD_SIZE - 4));
            if (steps.group == 1) {
#pragma unroll
                for (int i = 0; i < COUNT; i++)
                    if (i < count) add_group(k, node[i], first + i == 0);
                continue;
            }
            const bool begins = first % GROUP == 0;
            if (begins) group[k].begin(node[0]);
            else group[k].take(node[0]);
#pragma unroll
            for (int i = 1; i < COUNT; i++)
                if (i < count) group[k].take(node[i]);
            if (end % GROUP == 0 || end == steps.total)
                add_group(k, begins && count == 1 ? node[0] : group[k].joined(), first < GROUP);
        }
    }

    template <class Query, class Steps>
    __device__ void write(const AttentionParams& p, const Piece& piece, int head, const Steps& steps) const {
#pragma unroll
        for (int k = 0; k < LANE_GROUPS; k++)
            if (channel(k) < HEAD_SIZE)
                write_result<Query>(p, piece, head, channel(k), steps.is_one_group() ? last[k] : total[k].joined());
    }

private:
    __device__ void add_group(int k, const JoinedState& state, bool is_first) {
        last[k] = state;
        if (is_first) total[k].begin(state);
        else total[k].take(state);
    }
};

}  // namespace cupy_paged
