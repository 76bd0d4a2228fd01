// The role that computes, see paged_attention_mma.cu.
#pragma once
#include "attention_params.cuh"
#include "barriers.cuh"
#include "head_sum.cuh"
#include "mma.cuh"
#include "nodes.cuh"
#include "orders.cuh"
#include "reduce.cuh"
#include "results.cuh"
#include "softmax.cuh"
#include "warp_tiles.cuh"

namespace cupy_paged {

template <class Query, bool FLOAT8_CACHE> struct OperandOf {
    using type = Query;
};
template <class Query> struct OperandOf<Query, true> {
    using type = float16;
};

// The power of two that brings a number of this magnitude to between 1 and 2.
__device__ inline float shift_to_one(float magnitude) {
    const int exponent = min(max(int(__float_as_uint(magnitude) >> 23), 1), 253);
    return __uint_as_float(uint32(254 - exponent) << 23);
}

// The queries of a piece as operands B of [channels][heads], and what the logits of heads 2 * j and the next
// are scaled by. Lanes 4 * g + j: see mma.cuh.
template <class Query, class Operand, class KeyTile, int HEADS, int HEAD_SIZE, class Order>
__device__ inline void read_queries(const Order& order, float logit_scale, uint32 (&query)[HEAD_SIZE / 16][2],
                                    float (&head_scale)[2]) {
    constexpr bool SHIFTED = !same_type<Query, Operand>;
    constexpr int STEPS = HEAD_SIZE / 16;
    const int lane = threadIdx.x % WARP, g = lane / 4, j = lane % 4;
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // float8 keys come four adjacent channels to a lane, see TokenRows::keys.
            const int channel = 16 * step + (KeyTile::OPERANDS == 1 ? 2 * j + 8 * half : 4 * j + 2 * half);
            query[step][half] =
                g < HEADS ? *reinterpret_cast<const uint32*>(&order.query[min(g, HEADS - 1)][channel]) : 0u;
        }
    float shift = 1.0f;
    if constexpr (SHIFTED) {
        float magnitude = 0.0f;
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                magnitude = fmaxf(magnitude, fmaxf(fabsf(to_float(low_half<Query>(query[step][half]))),
                                                   fabsf(to_float(high_half<Query>(query[step][half])))));
        shift = shift_to_one(lanes_max<4>(magnitude));
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                query[step][half] = pack<Operand>(to_float(low_half<Query>(query[step][half])) * shift,
                                                  to_float(high_half<Query>(query[step][half])) * shift);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        head_scale[i] = SHIFTED ? logit_scale / __shfl_sync(ALL_LANES, shift, (2 * j + i) * 4) : logit_scale;
}

// Leaves the workers' states in shared memory, where whoever reads them joins them: those of all workers, or
// where that takes too much memory, of pairs of them, (worker, worker + NUM_WORKERS / 2).
template <class ValueTile, int NUM_WORKERS, int HEADS, int HEAD_SIZE, class Shared>
__device__ inline void leave_states(Shared& shared, const float (&max)[2], const float (&sum)[2],
                                    const float (&weighted)[HEAD_SIZE / 16][4]) {
    constexpr int NUM_THREADS = NUM_WORKERS * WARP, STEPS = HEAD_SIZE / 16;
    constexpr bool IN_PAIRS = Shared::STATES < NUM_WORKERS;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, j = lane % 4;
    const bool is_first = warp < Shared::STATES;
    auto& states = shared.states;
    // The worker's own state, scaled to `state_max`, or that and what is there already.
    const auto leave = [&](int i, float state_max, bool alone) {
        const int state = warp % Shared::STATES, head = 2 * j + i;
        const bool there = head < HEADS;
        const float rescale = IN_PAIRS ? exp_difference(max[i], state_max) : 1.0f;
        float total = sum[i] * rescale;
#pragma unroll
        for (int step = 4; step < WARP; step *= 2) total += __shfl_xor_sync(ALL_LANES, total, step);
        if (!there) return;
        if (g == 0) {
            states.max[state][head] = state_max;
            states.sum[state][head] = alone ? total : states.sum[state][head] + total;
        }
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float& left = states.weighted[state][head][ValueTile::channel(step, g + 8 * k)];
                const float mine = weighted[step][i + 2 * k] * rescale;
                left = alone ? mine : left + mine;
            }
    };

    if constexpr (IN_PAIRS) {
        if (g == 0)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (2 * j + i < HEADS) shared.max[warp][2 * j + i] = max[i];
        sync_warps<STATES_LEFT, NUM_THREADS>();  // also for those who still read what is written here next
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (is_first == (half == 0))
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int head = min(2 * j + i, HEADS - 1);
                    const float other = shared.max[(warp + NUM_WORKERS / 2) % NUM_WORKERS][head];
                    leave(i, fmaxf(max[i], other), half == 0);
                }
            sync_warps<STATES_LEFT, NUM_THREADS>();
        }
    } else {
        sync_warps<STATES_LEFT, NUM_THREADS>();  // for those who still read what is written here next
#pragma unroll
        for (int i = 0; i < 2; i++) leave(i, max[i], true);
        sync_warps<STATES_LEFT, NUM_THREADS>();
    }
}

template <class Query, class Cache, class Layout, int HEAD_SIZE, int HEADS, int NUM_WORKERS, int SLOTS, bool BULK,
          class Bias, class Scratch, class Tiles, class Shared>
__device__ inline void attend_to_pieces(const AttentionParams& p, Shared& shared) {
    using KeyTile = TokenRows<Cache, HEAD_SIZE, Layout::KEYS_BY_TOKEN>;
    using ValueTile = typename WarpValues<Layout, Cache, HEAD_SIZE>::Tile;
    // float8 widens to float16, exactly. A bfloat16 query then follows, shifted into float16's range.
    using Operand = typename OperandOf<Query, is_float8<Cache>>::type;
    constexpr int NUM_THREADS = NUM_WORKERS * WARP;
    constexpr int STEPS = HEAD_SIZE / 16;
    constexpr int PAIRS = STEPS / KeyTile::OPERANDS;
    static_assert(HEADS <= 8, "query heads are the columns of one operand");
    static_assert(HEAD_SIZE % (16 * KeyTile::OPERANDS) == 0, "operands must be whole");
    // Within a piece a slot is one worker's, who takes its tiles in order; the join keeps pieces apart. Else a
    // worker could meet a slot a whole round too early.
    static_assert(SLOTS % NUM_WORKERS == 0, "slots must be the workers' own");

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int g = lane / 4, j = lane % 4;  // see mma.cuh
    const float logit_scale = p.scale * (p.k_scale_array ? *p.k_scale_array : p.k_scale);
    const float value_scale = p.v_scale_array ? *p.v_scale_array : p.v_scale;

    // Of a group of pieces: what this thread writes at its end.
    constexpr int STATES = ceil_div(HEADS * HEAD_SIZE, NUM_THREADS * 4);
    RunningState group[STATES];

    uint32 sums = 0;
    HeadSum<HEAD_SIZE> head_sum;
    bool more_sums = true;
    // What the clerk has brought, of one head a worker.
    const auto sum_up = [&] {
        const int slot = sums % Shared::SUMS;
        const Piece piece = shared.sum_order[slot].piece;
        const int head = shared.sum_order[slot].head + warp, step = shared.sum_order[slot].step;
        const bool is_last = shared.sum_order[slot].is_last;
        if (!is_last && head < piece.num_heads) {
            const SumSteps<Shared::Stage::COUNT> steps(piece);
            head_sum.take(shared.staged[slot][warp], steps, step);
            if (step == steps.num_steps() - 1) head_sum.template write<Query>(p, piece, head, steps);
        }
        shared.sum_empty[slot].arrive_as_warp();
        sums++;
        more_sums = !is_last;
    };
    const auto is_sum_there = [&] { return shared.sum_full[sums % Shared::SUMS].is_past(sums / Shared::SUMS % 2); };

    for (uint32 number = 0;; number++) {
        auto& order = shared.order[number % Shared::ORDERS];
        // Not only a wait for the order: the clerk may be waiting for a sum, and the fetcher for the clerk. The
        // lanes take one decision, whatever each of them has seen.
        for (;;) {
            if (more_sums && __all_sync(ALL_LANES, is_sum_there())) sum_up();
            if (__all_sync(ALL_LANES, order.full.is_past(number / Shared::ORDERS % 2))) break;
            pause();
        }
        if (order.is_last) break;
        const int begin = order.piece.begin, end = order.piece.end, seq_len = order.piece.seq_len;
        const int first_head = order.piece.head, num_heads = order.piece.num_heads;

        uint32 query[STEPS][2];
        float head_scale[2];  // of the logits of heads 2 * j and the next, as all that follows
        read_queries<Query, Operand, KeyTile, HEADS, HEAD_SIZE>(order, logit_scale, query, head_scale);

        float max[2] = {LOWEST, LOWEST}, sum[2] = {};
        float weighted[STEPS][4] = {};

        uint32 tile = order.first_tile + warp;
        for (int first = begin + warp * TILE_TOKENS; first < end;
             first += NUM_WORKERS * TILE_TOKENS, tile += NUM_WORKERS) {
            const int slot = tile % SLOTS;
            Tiles& tiles = shared.tiles[slot];
            shared.full[slot].wait(tile / SLOTS % 2);
            if constexpr (BULK)
                if (first + TILE_TOKENS > end) {
                    tiles.values.clear_from(end - first);
                    fence_before_bulk();
                    __syncwarp();
                }

            // ---- score ----
            float score[4] = {};
            const int my_row = ValueTile::token_of_row(lane % TILE_TOKENS);
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                uint32 keys[KeyTile::OPERANDS][4];
                tiles.keys.keys(pair, my_row, keys);
#pragma unroll
                for (int i = 0; i < KeyTile::OPERANDS; i++)
                    mma<Operand>(score, keys[i], query[pair * KeyTile::OPERANDS + i]);
            }

            // ---- mask, and fold into the softmax state ----
            float weight[4], rescale[2];
            bool moved = false;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int token = first + ValueTile::token_of_row(g + i / 2 * 8);
                const int head = first_head + min(2 * j + i % 2, num_heads - 1);
                const float logit = Bias::add(p, score[i] * head_scale[i % 2], head, token, seq_len);
                score[i] = token < end ? logit : LOWEST;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float highest = fmaxf(score[i], score[i + 2]);
#pragma unroll
                for (int step = 4; step < WARP; step *= 2)
                    highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, step));
                const float new_max = fmaxf(max[i], highest);
                moved |= new_max != max[i];
                rescale[i] = exp_difference(max[i], new_max);
                max[i] = new_max;
                weight[i] = exp_difference(score[i], new_max);
                weight[i + 2] = exp_difference(score[i + 2], new_max);
                sum[i] = sum[i] * rescale[i] + (weight[i] + weight[i + 2]);
            }
            const uint32 weights[2] = {transpose_matrix(pack<Operand>(weight[0], weight[1])),
                                       transpose_matrix(pack<Operand>(weight[2], weight[3]))};
            // Most tiles leave every maximum where it is.
            if (__any_sync(ALL_LANES, moved))
#pragma unroll
                for (int step = 0; step < STEPS; step++)
#pragma unroll
                    for (int i = 0; i < 4; i++) weighted[step][i] *= rescale[i % 2];

#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                uint32 values[KeyTile::OPERANDS][4];
                tiles.values.values(pair, values);
#pragma unroll
                for (int i = 0; i < KeyTile::OPERANDS; i++)
                    mma<Operand>(weighted[pair * KeyTile::OPERANDS + i], values[i], weights);
            }
            shared.empty[slot].arrive_as_warp();
        }

        leave_states<ValueTile, NUM_WORKERS, HEADS, HEAD_SIZE>(shared, max, sum, weighted);
        const Piece& piece = order.piece;
        const bool is_result = piece.num_nodes == 1;
        const bool is_kept = !is_result || (p.partition_size && begin < end);  // a caller's scratch has all nodes
#pragma unroll
        for (int k = 0; k < STATES; k++) {
            const int i = (k * NUM_THREADS + threadIdx.x) * 4, head = i / HEAD_SIZE, channel = i % HEAD_SIZE;
            if (i >= num_heads * HEAD_SIZE) break;
            JoinedState state = shared.states.join(head, channel, value_scale);
            if (piece.is_first) group[k].begin(state);
            else group[k].take(state);
            if (!piece.is_last) continue;
            if (!piece.is_first) state = group[k].joined();
            if (is_kept) write_node<Scratch, HEAD_SIZE>(p, piece, head, channel, state);
            if (is_result) write_result<Query>(p, piece, head, channel, state);
        }
        order.stored.arrive_as_warp();
        order.empty.arrive_as_warp();
    }
    while (more_sums) {
        shared.sum_full[sums % Shared::SUMS].wait(sums / Shared::SUMS % 2);
        sum_up();
    }
}

}  // namespace cupy_paged
