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
    const auto free_slot = [&] {
        const int slot = sums % Shared::SUMS;
        shared.sum_empty[slot].wait(sums / Shared::SUMS % 2 ^ 1);
        return slot;
    };
    // What is to be summed up once the copies of this warp have come, which nobody waits for here.
    const auto post = [&](int slot, const SumOrder& order) {
        if (lane == 0) shared.sum_order[slot] = order;
        shared.sum_full[slot].arrive_after_copies();
        shared.sum_full[slot].arrive();
        sums++;
    };
    const auto sum_up = [&](const Piece& piece) {
        const SumSteps<Shared::Stage::COUNT> steps(piece);
        for (int head = 0; head < piece.num_heads; head += Shared::WORKERS)
            for (int step = 0; step < steps.num_steps(); step++) {
                const int slot = free_slot();
#pragma unroll
                for (int i = 0; i < Shared::WORKERS; i++) {
                    const int64 row = int64(piece.seq) * p.num_heads + piece.head + head + i;
                    if (head + i < piece.num_heads)
                        shared.staged[slot][i].fetch(p, row * p.max_partitions + step * Shared::Stage::COUNT, steps.count(step));
                }
                post(slot, {piece, head, step, false});
            }
    };

    for (uint32 number = 0;; number++) {
        auto& order = shared.order[number % Shared::ORDERS];
        const uint32 parity = number / Shared::ORDERS % 2;
        order.full.wait(parity);
        if (order.is_last) break;
        const Piece piece = order.piece;
        const bool counts = piece.is_last && piece.num_nodes > 1;
        order.stored.wait(parity);  // for every piece: synccheck takes a phase that nobody awaits for a fault
        order.empty.arrive_as_warp();  // before the sums, which nobody is to wait for
        if (!counts) continue;
        bool is_last = false;
        if (lane == 0) is_last = arrive_last(p.work->arrivals + piece.counter, piece.num_nodes);
        is_last = __shfl_sync(ALL_LANES, int(is_last), 0);
        __syncwarp();  // what the first lane has seen, all may read
        if (is_last) sum_up(piece);
    }
    // The fetcher has drawn its last piece, or there would be no last order. Nodes may be on their way still.
    leave(p);
    post(free_slot(), {{}, 0, 0, true});
    wait_for_copies();
}

}  // namespace cupy_paged
