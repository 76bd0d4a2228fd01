// Work divided on the device: lengths live there, so no host has to plan, and a captured graph may
// be replayed with other lengths.
#pragma once
#include "arch.cuh"
#include "reduce.cuh"

namespace cupy_paged {

// Tokens of a sequence that may be read. One longer than its table has entries that are missing or
// anybody's: it is not read at all, and comes out as NaN.
__device__ inline int readable_tokens(int seq_len, int max_seq_len) {
    return seq_len <= max_seq_len ? max(seq_len, 0) : 0;
}

constexpr int MIN_PARTITION_SIZE = 512, MAX_PARTITION_SIZE = 2048;
constexpr int ENOUGH_PARTITIONS = 64;

// Tokens of a partition: `fixed`, where that is not 0, or else by the sequence's own length. Small ones
// let a short sequence that is alone occupy the device; more than 64 would only be more to combine.
__device__ inline int partition_size_of(int seq_len, int fixed) {
    if (fixed) return fixed;
    int size = MIN_PARTITION_SIZE;
    while (size < MAX_PARTITION_SIZE && size * ENOUGH_PARTITIONS <= seq_len) size *= 2;
    return size;
}

// Partitions that are walked as one group, where a group is well below everybody's share of the tokens: their
// states are joined on the spot, and need no scratch memory. A row's sum is the sum of its groups' sums whether or
// not they were.
constexpr int GROUP = 8;

// Walks the partitions of all sequences in order, leaving out those past a sequence's end. Where a
// partition begins depends on its own sequence alone; only who works on it, and whether it is walked in
// a group, depends on the batch.
struct PartitionWalk {
    const int* seq_lens;  // [num_seqs]
    int num_seqs;
    int partition_size;   // 0: by partition_size_of
    int max_seq_len;      // longer sequences count as empty
    int min_partitions;   // 1 visits empty sequences too, 0 does not
    int for_all = 0;      // steps that keep everybody busy; 0 to walk all partitions one by one

    int seq = 0, seq_len = 0;  // the sequence that holds the step last sought
    bool is_grouped = false;   // it is walked in groups: it ends before those
    int num_steps = 0;         // through it
    int64 before = 0;          // steps through all sequences before it

    // A window of sequences, one a lane: to seek within it asks nothing of global memory.
    int first = -WARP, length = 0, count = 0;
    bool in_groups = false;
    int64 units_through = 0, through = 0;  // units and steps up to and with this lane's sequence
    // A unit is a partition of the smallest size.
    int grouped_units = 0;     // sequences that end within so many may be walked in groups
    int max_group_tokens = 0;  // if their groups are no larger

    __device__ int partitions_of(int tokens) const {
        const int size = partition_size_of(tokens, partition_size);
        // By its own length it is a power of two, and nobody has to wait for a division.
        const int partitions = partition_size ? ceil_div(tokens, size) : (tokens + size - 1) >> (31 - __clz(size));
        return max(partitions, min_partitions);
    }

    static __device__ int units_of(int tokens) { return (tokens + MIN_PARTITION_SIZE - 1) / MIN_PARTITION_SIZE; }

    // Decides on groups: three quarters of a share at most, and none at the end, where small pieces let all end at
    // the same time. `mine` are the units of the lane's sequence in the first window. By a whole warp.
    __device__ void limit_groups(int mine) {
        int units = mine;
#pragma unroll 4
        for (int i = WARP + threadIdx.x % WARP; i < num_seqs; i += WARP)
            units += units_of(readable_tokens(seq_lens[i], max_seq_len));
        units = __shfl_sync(ALL_LANES, lanes_prefix_sum(units), WARP - 1);
        grouped_units = units - for_all;
        max_group_tokens = min(units / for_all, 1 << 20) * (MIN_PARTITION_SIZE * 3 / 4);
    }

    __device__ bool may_be_grouped(int tokens) const {
        return units_through <= grouped_units &&
               min(GROUP * partition_size_of(tokens, partition_size), tokens) <= max_group_tokens;
    }

    // Moves forward to the sequence of step number `target`; false if there is none. By a whole warp.
    // Targets must not decrease.
    __device__ bool seek(int64 target) {
        const int lane = threadIdx.x % WARP;
        for (;;) {
            const uint32 reached = __ballot_sync(ALL_LANES, through > target);
            if (reached) {
                const int holder = __ffs(reached) - 1;
                seq = first + holder;
                seq_len = __shfl_sync(ALL_LANES, length, holder);
                is_grouped = __shfl_sync(ALL_LANES, int(in_groups), holder);
                num_steps = __shfl_sync(ALL_LANES, count, holder);
                before = __shfl_sync(ALL_LANES, through - count, holder);
                return true;
            }
            first += WARP;
            if (first >= num_seqs) return false;
            const bool there = first + lane < num_seqs;
            length = there ? seq_lens[first + lane] : 0;
            const int tokens = readable_tokens(length, max_seq_len);
            count = there ? partitions_of(tokens) : 0;
            if (for_all) {
                const int units = there ? units_of(tokens) : 0;
                units_through = __shfl_sync(ALL_LANES, units_through, WARP - 1) + lanes_prefix_sum(units);
                if (first == 0) limit_groups(units);
                in_groups = may_be_grouped(tokens);
                if (in_groups) count = ceil_div(count, GROUP);
            }
            through = __shfl_sync(ALL_LANES, through, WARP - 1) + lanes_prefix_sum(count);
        }
    }
};

}  // namespace cupy_paged
