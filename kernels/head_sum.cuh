// The sum of the nodes of one head, by one warp, with the bits of RunningState for every group.
#pragma once
#include "attention_params.cuh"
#include "dtypes.cuh"
#include "nodes.cuh"
#include "pieces.cuh"
#include "reduce.cuh"
#include "results.cuh"
#include "schedule.cuh"
#include "softmax.cuh"
#include "warp_states.cuh"

namespace cupy_paged {

// The scalars of RunningState, of one group a lane.
struct GroupWeights {
    float weight[GROUP], rescale[GROUP];
    float max = LOWEST, sum = 0.0f;

    __device__ void take(int i, float node_max, float node_sum) {
        const float new_max = i == 0 ? node_max : fmaxf(max, node_max);
        rescale[i] = exp_difference(max, new_max);
        weight[i] = i == 0 ? node_sum : __fmul_rn(node_sum, exp_difference(node_max, new_max));
        sum = i == 0 ? node_sum : __fmaf_rn(sum, rescale[i], weight[i]);
        max = new_max;
    }
};

// One head's sum, by one warp: step by step, group by group.
template <int HEAD_SIZE> struct HeadSum {
    static constexpr int LANE_GROUPS = ceil_div(HEAD_SIZE, 4 * WARP);  // of 4 channels, for each lane

    float max, sum, weighted[LANE_GROUPS][4];

    __device__ void clear() {
        max = LOWEST, sum = 0.0f;
#pragma unroll
        for (int k = 0; k < LANE_GROUPS; k++)
#pragma unroll
            for (int c = 0; c < 4; c++) weighted[k][c] = 0.0f;
    }

    static __device__ int channel(int k) { return (k * WARP + threadIdx.x % WARP) * 4; }

    template <class Stage, class Steps> __device__ void take(const Stage& stage, const Steps& steps, int step) {
        const int lane = threadIdx.x % WARP, count = steps.count(step);

        // Lanes do a group's scalars each, then all lanes the channels of one group after the other.
        GroupWeights mine;
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            const int node = lane * steps.group + i;
            if (lane < Stage::GROUPS && i < steps.group && node < count) mine.take(i, stage.max[node], stage.sum[node]);
        }
        const float factor = mine.sum == 0.0f ? 0.0f : __frcp_rn(mine.sum);
        const float new_max = fmaxf(max, __shfl_sync(ALL_LANES, lanes_max<Stage::GROUPS>(mine.max), 0));
        const float old = exp_difference(max, new_max), group_weight = mine.sum * exp_difference(mine.max, new_max);
        max = new_max;
        sum = steps.is_one_group() ? mine.sum : sum * old + group_weight;
#pragma unroll
        for (int k = 0; k < LANE_GROUPS; k++)
#pragma unroll
            for (int c = 0; c < 4; c++) weighted[k][c] *= old;
#pragma unroll
        for (int group = 0; group < Stage::GROUPS; group++) {
            const int first = group * steps.group, nodes = min(steps.group, count - first);
            if (nodes <= 0) break;
            const float w = __shfl_sync(ALL_LANES, group_weight, group);
            const float f = __shfl_sync(ALL_LANES, factor, group);
            float node_weight[GROUP], rescale[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                node_weight[i] = __shfl_sync(ALL_LANES, mine.weight[i], group);
                rescale[i] = __shfl_sync(ALL_LANES, mine.rescale[i], group);
            }
#pragma unroll
            for (int k = 0; k < LANE_GROUPS; k++) {
                float mean[4], part[4];
                const auto read = [&](int i, float(&four)[4]) {
                    to_floats(load_vector<4>(&stage.mean[first + i][min(channel(k), HEAD_SIZE - 4)]), four);
                };
                read(0, mean);
                if (nodes > 1) {
#pragma unroll
                    for (int c = 0; c < 4; c++) mean[c] = __fmul_rn(mean[c], node_weight[0]);
#pragma unroll
                    for (int i = 1; i < GROUP; i++) {
                        if (i >= nodes) break;
                        read(i, part);
#pragma unroll
                        for (int c = 0; c < 4; c++)
                            mean[c] = __fmaf_rn(mean[c], rescale[i], __fmul_rn(part[c], node_weight[i]));
                    }
#pragma unroll
                    for (int c = 0; c < 4; c++) mean[c] = __fmul_rn(mean[c], f);
                }
#pragma unroll
                for (int c = 0; c < 4; c++)  // a sum would turn -0 into 0
                    weighted[k][c] = steps.is_one_group() ? mean[c] : __fmaf_rn(mean[c], w, weighted[k][c]);
            }
        }
    }

    template <class Query> __device__ void write(const AttentionParams& p, const Piece& piece, int head, bool is_one_group) {
        const float total = is_one_group ? __shfl_sync(ALL_LANES, sum, 0) : lanes_sum(sum);
        const float factor = is_one_group ? 1.0f : total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
        for (int k = 0; k < LANE_GROUPS; k++) {
            JoinedState state{max, total, {}};
#pragma unroll
            for (int c = 0; c < 4; c++) state.mean[c] = weighted[k][c] * factor;
            if (channel(k) < HEAD_SIZE) write_result<Query>(p, piece, head, channel(k), state);
        }
    }
};

}  // namespace cupy_paged
