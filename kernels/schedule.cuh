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

// Walks the partitions of all sequences in order, leaving out those past a sequence's end. Where a
// partition begins depends on its own sequence alone; only who works on it depends on the batch.
struct PartitionWalk {
    const int* seq_lens;  // [num_seqs]
    int num_seqs;
    int partition_size;
    int max_seq_len;      // longer sequences count as empty
    int min_partitions;   // 1 visits empty sequences too, 0 does not

    int seq = 0;          // the sequence that holds the partition last sought
    int64 before = 0;     // partitions of all sequences before `seq`

    __device__ int num_partitions(int seq_len) const {
        return max(ceil_div(readable_tokens(seq_len, max_seq_len), partition_size), min_partitions);
    }

    // Moves `seq` forward to the sequence of partition number `target`; false if there is none.
    // Every warp walks by itself, all lanes together. Targets must not decrease.
    __device__ bool seek(int64 target) {
        const int lane = threadIdx.x % WARP;
        while (seq < num_seqs) {
            const int count = seq + lane < num_seqs ? num_partitions(seq_lens[seq + lane]) : 0;
            const int64 through = before + lanes_prefix_sum(count);
            const uint32 reached = __ballot_sync(ALL_LANES, through > target);
            if (reached) {
                const int first = __ffs(reached) - 1;
                before = __shfl_sync(ALL_LANES, through - count, first);
                seq += first;
                return true;
            }
            before = __shfl_sync(ALL_LANES, through, WARP - 1);
            seq += WARP;
        }
        return false;
    }
};

}  // namespace cupy_paged
