// The nodes of a sequence's sum, in scratch memory, and its result, by whoever comes last.
//
// A sequence's partitions are summed up by fours, in groups, and the groups' sums to its result. Thread
// blocks leave what they did as nodes: groups, or single partitions that are grouped here. Each row of
// scratch, of one query head of one sequence, belongs to one KV head's thread blocks. They count their
// arrivals; the last one finds all of the row there and sums it up, in an order that follows from the number
// of partitions alone.
#pragma once
#include "attention_params.cuh"
#include "copies.cuh"
#include "dtypes.cuh"
#include "pieces.cuh"
#include "reduce.cuh"
#include "results.cuh"
#include "schedule.cuh"
#include "softmax.cuh"
#include "warp_states.cuh"

namespace cupy_paged {

// Groups of one head that are summed up in one step: nodes that have been fetched to shared memory.
template <class Scratch, int HEAD_SIZE, int NUM_GROUPS> struct alignas(16) StagedNodes {
    static constexpr int GROUPS = NUM_GROUPS, COUNT = GROUPS * GROUP;

    Scratch mean[COUNT][HEAD_SIZE];
    float max[COUNT], sum[COUNT];

    // Queues copies of the `count` nodes from number `first` of scratch on. By a whole warp.
    __device__ void fetch(const AttentionParams& p, int64 first, int count) {
        const int lane = threadIdx.x % WARP;
        const Scratch* source = static_cast<const Scratch*>(p.tmp_out) + first * HEAD_SIZE;
#pragma unroll 4
        for (int i = lane * 4; i < count * HEAD_SIZE; i += WARP * 4)
            copy_async<4 * sizeof(Scratch)>(&mean[0][0] + i, source + i, 4 * sizeof(Scratch));
        if (lane < count) {
            copy_async<4>(&max[lane], p.max_logits + first + lane, 4);
            copy_async<4>(&sum[lane], p.exp_sums + first + lane, 4);
        }
    }
};

// What is to be summed up next, of up to one head a worker.
struct SumOrder {
    Piece piece;      // any of the sequence
    int head, step;   // the first worker's head of the piece, and which of its steps is staged
    bool is_last;     // there is nothing to sum up, and will not be
};

// How a row's nodes are taken in steps: all sizes are in nodes.
template <int GROUPS> struct SumSteps {
    int group, step, total;

    __device__ explicit SumSteps(const Piece& piece)
        : group(piece.is_grouped ? 1 : GROUP), step(GROUPS * group), total(piece.num_nodes) {}

    __device__ int num_steps() const { return ceil_div(total, step); }
    __device__ int count(int i) const { return min(step, total - i * step); }
    __device__ bool is_one_group() const { return total <= group; }
};

// Whether the caller is the last of `expected` to arrive at a counter, and may have the others' partitions
// read. By one thread, after all that its thread block has written.
__device__ inline bool arrive_last(uint32* counter, int expected) {
    uint32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before == uint32(expected - 1);
}

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
