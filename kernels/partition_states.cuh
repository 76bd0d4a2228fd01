// What the partitions of a sequence leave in scratch memory, and its result, by whoever comes last.
//
// Each row of scratch, of one query head of one sequence, belongs to one KV head's thread blocks. They
// count their arrivals; the last one finds all of the row there and sums it up, in an order that follows
// from the number of partitions alone.
#pragma once
#include "attention_params.cuh"
#include "dtypes.cuh"
#include "pieces.cuh"
#include "reduce.cuh"
#include "softmax.cuh"

namespace cupy_paged {

// Loads past the first-level cache, which does not see what other multiprocessors write.
__device__ inline float load_fresh(const float* source) {
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(source) : "memory");
    return x;
}

__device__ inline Vector<float, 4> load_fresh_vector(const float* source) {
    Vector<float, 4> v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.element[0]), "=f"(v.element[1]), "=f"(v.element[2]), "=f"(v.element[3])
                 : "l"(source)
                 : "memory");
    return v;
}

template <class T> __device__ inline Vector<T, 4> load_fresh_vector(const T* source) {
    static_assert(sizeof(T) == 2, "scratch is float or 16 bits wide");
    uint32 word[2];
    asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(source) : "memory");
    return {{{uint16(word[0])}, {uint16(word[0] >> 16)}, {uint16(word[1])}, {uint16(word[1] >> 16)}}};
}

// Whether the caller is the last of `expected` to arrive at a counter, and may have the others' partitions
// read. By one thread, after all that its thread block has written.
__device__ inline bool arrive_last(uint32* counter, int expected) {
    uint32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before == uint32(expected - 1);
}

// Sums up partitions `warp`, `warp` + NUM_WARPS, ... for HEADS heads of a piece's sequence, and gives what
// it has of each four channels to `taker`. Heads past the piece's last one repeat it: no branch is to keep
// loads apart.
template <class Scratch, int NUM_WARPS, int HEADS, int HEAD_SIZE, class Taker>
__device__ inline void sum_partitions(const AttentionParams& p, Taker& taker, const Piece& piece, int first_head,
                                      int warp) {
    constexpr int LANE_GROUPS = ceil_div(HEAD_SIZE, 4 * WARP);  // of 4 channels, for each lane
    const int lane = threadIdx.x % WARP, num_partitions = piece.num_partitions;

    int64 row[HEADS];  // of scratch
    float max[HEADS], sum[HEADS] = {}, weighted[HEADS][LANE_GROUPS][4] = {};
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        row[h] = (int64(piece.seq) * p.num_heads + piece.head + min(first_head + h, piece.num_heads - 1)) *
                 p.max_partitions;
        max[h] = LOWEST;
    }
    for (int first = warp; first < num_partitions; first += NUM_WARPS * WARP) {
        const int mine = first + lane * NUM_WARPS;
        float logit[HEADS], weight[HEADS];
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            logit[h] = mine < num_partitions ? load_fresh(p.max_logits + row[h] + mine) : LOWEST;
            weight[h] = mine < num_partitions ? load_fresh(p.exp_sums + row[h] + mine) : 0.0f;
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            const float new_max = fmaxf(max[h], lanes_max(logit[h]));
            const float rescale = exp_difference(max[h], new_max);
            max[h] = new_max;
            weight[h] *= exp_difference(logit[h], new_max);
            sum[h] = sum[h] * rescale + weight[h];
#pragma unroll
            for (int group = 0; group < LANE_GROUPS; group++)
#pragma unroll
                for (int c = 0; c < 4; c++) weighted[h][group][c] *= rescale;
        }
        const int count = min(WARP, ceil_div(num_partitions - first, NUM_WARPS));
#pragma unroll 12 / (HEADS * LANE_GROUPS)
        for (int k = 0; k < count; k++)
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                const float w = __shfl_sync(ALL_LANES, weight[h], k);
#pragma unroll
                for (int group = 0; group < LANE_GROUPS; group++) {
                    const int channel = min((group * WARP + lane) * 4, HEAD_SIZE - 4);
                    float part[4];
                    to_floats(load_fresh_vector(static_cast<const Scratch*>(p.tmp_out) +
                                                (row[h] + first + k * NUM_WARPS) * HEAD_SIZE + channel),
                              part);
#pragma unroll
                    for (int c = 0; c < 4; c++) weighted[h][group][c] += w * part[c];
                }
            }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        const float total = lanes_sum(sum[h]);
        if (first_head + h >= piece.num_heads) continue;
#pragma unroll
        for (int group = 0; group < LANE_GROUPS; group++) {
            const int channel = (group * WARP + lane) * 4;
            if (channel < HEAD_SIZE) taker.take(warp, h, channel, max[h], total, weighted[h][group]);
        }
    }
}

// So many heads at a time keep their loads in flight without running out of registers.
template <int HEADS, int HEAD_SIZE>
constexpr int HEADS_AT_ONCE = min_of(HEADS, ceil_div(HEAD_SIZE, 4 * WARP) > 1 ? 2 : 4);

}  // namespace cupy_paged
