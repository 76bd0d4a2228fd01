// The role that counts the nodes of sequences, see paged_attention_mma.cu.
#pragma once
#include "attention_params.cuh"
#include "copies.cuh"
#include "nodes.cuh"
#include "pieces.cuh"

namespace cupy_paged {

template <class Shared> __device__ inline void count_nodes(const AttentionParams& p, Shared& shared) {
    const int lane = threadIdx.x % WARP;
    uint32 sums = 0;
    const auto post = [&](const Piece& piece, int head, int step, bool is_last) {
        wait_for_copies();
        __syncwarp();
        if (lane == 0) {
            shared.sum_order = {piece, head, step, is_last};
            shared.sum_full.arrive();
        }
        sums++;
    };
    bool has_left = false;
    const auto sum_up = [&](const Piece& piece, bool is_over) {
        const SumSteps<Shared::Stage::GROUPS> steps(piece);
        for (int head = 0; head < piece.num_heads; head += Shared::WORKERS)
            for (int step = 0; step < steps.num_steps(); step++) {
                shared.sum_empty.wait(sums % 2 ^ 1);
#pragma unroll
                for (int i = 0; i < Shared::WORKERS; i++) {
                    const int64 row = int64(piece.seq) * p.num_heads + piece.head + head + i;
                    if (head + i < piece.num_heads)
                        shared.staged[i].fetch(p, row * p.max_partitions + step * steps.step, steps.count(step));
                }
                if (is_over && !has_left) {  // while the copies are on their way
                    leave(p);
                    has_left = true;
                }
                post(piece, head, step, false);
            }
    };

    for (uint32 number = 0;; number++) {
        auto& order = shared.order[number % Shared::ORDERS];
        const uint32 parity = number / Shared::ORDERS % 2;
        order.full.wait(parity);
        if (order.is_last) break;
        const Piece piece = order.piece;
        const bool counts = piece.is_last && piece.num_nodes > 1;
        if (counts) order.stored.wait(parity);
        __syncwarp();
        if (lane == 0) order.empty.arrive();  // before the sums, which nobody is to wait for
        if (!counts) continue;
        bool is_last = false;
        if (lane == 0) is_last = arrive_last(p.work->arrivals + piece.counter, piece.num_nodes);
        is_last = __shfl_sync(ALL_LANES, int(is_last), 0);
        __syncwarp();  // what the first lane has seen, all may read
        if (!is_last) continue;
        const auto& next = shared.order[(number + 1) % Shared::ORDERS];
        const bool is_known = __all_sync(ALL_LANES, next.full.is_past((number + 1) / Shared::ORDERS % 2));
        sum_up(piece, is_known && next.is_last);
    }
    shared.sum_empty.wait(sums % 2 ^ 1);
    post({}, 0, 0, true);
    if (!has_left) leave(p);  // the fetcher has drawn its last piece, or there would be no last order
}

}  // namespace cupy_paged
