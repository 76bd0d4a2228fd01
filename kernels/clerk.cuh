// The role that counts partitions, see paged_attention_mma.cu.
#pragma once
#include "attention_params.cuh"
#include "partition_states.cuh"
#include "pieces.cuh"
#include "results.cuh"

namespace cupy_paged {

// A warp can sum up so many partitions by itself before anybody would miss it. Where there are more, it
// takes all workers. Sums are in another order then, but which it is follows from the number alone.
constexpr int FEW_PARTITIONS = 4;

template <class Query, class Scratch, int HEADS, int HEAD_SIZE, class Shared>
__device__ inline void count_partitions(const AttentionParams& p, Shared& shared) {
    constexpr int AT_ONCE = HEADS_AT_ONCE<HEADS, HEAD_SIZE>;
    const int lane = threadIdx.x % WARP;
    int posted = 0;
    for (uint32 number = 0;; number++) {
        auto& order = shared.order[number % Shared::ORDERS];
        const uint32 parity = number / Shared::ORDERS % 2;
        order.full.wait(parity);
        if (order.is_last) break;
        const Piece piece = order.piece;
        if (piece.num_partitions > 1) {
            order.stored.wait(parity);
            bool is_last = false;
            if (lane == 0) is_last = arrive_last(p.work->arrivals + piece.counter, piece.num_partitions);
            is_last = __shfl_sync(ALL_LANES, int(is_last), 0);
            __syncwarp();  // what the first lane has seen, all may read
            if (is_last) {
                if (piece.num_partitions <= FEW_PARTITIONS) {
                    for (int head = 0; head < piece.num_heads; head += AT_ONCE) {
                        const WarpResult<Query> result{p, piece, head};
                        sum_partitions<Scratch, 1, AT_ONCE, HEAD_SIZE>(p, result, piece, head, 0);
                    }
                } else if (lane == 0) {
                    shared.job[posted % Shared::JOBS] = piece;
                    __threadfence_block();
                    *const_cast<volatile int*>(&shared.jobs_posted) = ++posted;
                }
            }
        }
        __syncwarp();
        if (lane == 0) order.empty.arrive();
    }
    if (lane == 0) shared.clerk_done.arrive();
    leave<HEADS>(p);  // the fetcher has drawn its last piece, or there would be no last order
}

}  // namespace cupy_paged
