// The nodes of a sequence's sum, in scratch memory, and its result, by whoever comes last.
//
// A sequence's partitions are summed up by eights, in groups, and the groups' sums to its result. Thread
// blocks leave what they did as nodes: groups, or single partitions that are grouped here. Each row of
// scratch, of one query head of one sequence, belongs to one KV head's thread blocks. They count their
// arrivals; the last one finds all of the row there and sums it up, in an order that follows from the number
// of partitions alone.
#pragma once
#include "attention_params.cuh"
#include "copies.cuh"
#include "dtypes.cuh"
#include "pieces.cuh"
#include "schedule.cuh"
#include "warp_states.cuh"

namespace cupy_paged {

// Nodes of one head, on their way from scratch to the worker who sums them up.
template <class Scratch, int HEAD_SIZE, int NODES> struct alignas(16) StagedNodes {
    static constexpr int COUNT = NODES;

    Scratch mean[COUNT][HEAD_SIZE];
    float max[COUNT], sum[COUNT];

    __device__ JoinedState node(int i, int channel) const {
        JoinedState state{max[i], sum[i], {}};
        to_floats(load_vector<4>(&mean[i][channel]), state.mean);
        return state;
    }

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

// How a row's nodes are taken, STEP at a time. Groups may be of several steps, and steps of several groups.
template <int STEP> struct SumSteps {
    int group, total;  // nodes

    __device__ explicit SumSteps(const Piece& piece) : group(piece.is_grouped ? 1 : GROUP), total(piece.num_nodes) {}

    __device__ int num_steps() const { return ceil_div(total, STEP); }
    __device__ int count(int step) const { return min(STEP, total - step * STEP); }
    __device__ bool is_one_group() const { return total <= group; }
};

// Whether the caller is the last of `expected` to arrive at a counter, and may have the others' nodes read.
// By one thread, after all that its thread block has written.
__device__ inline bool arrive_last(uint32* counter, int expected) {
    uint32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before == uint32(expected - 1);
}

}  // namespace cupy_paged
