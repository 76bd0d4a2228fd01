// The softmax states of several warps over the same query heads, each of other tokens, and their sum.
#pragma once
#include "arch.cuh"
#include "dtypes.cuh"
#include "softmax.cuh"

namespace cupy_paged {

// Of one head: (max, sum), and the mean of four channels.
struct JoinedState {
    float max, sum;
    float mean[4];
};

// For each warp and head: (max, sum, sum of weighted values). Warps fill it in; a barrier later any thread
// may ask for the joined state. Warps are summed in order of their number.
template <int NUM_WARPS, int HEADS, int HEAD_SIZE> struct WarpStates {
    static constexpr int ROW = HEAD_SIZE + 4;  // lanes that write heads two apart meet different banks

    float weighted[NUM_WARPS][HEADS][ROW];
    float max[NUM_WARPS][HEADS], sum[NUM_WARPS][HEADS];

    // What `warp` has of four channels of a head.
    __device__ void take(int warp, int head, int channel, float new_max, float new_sum, const float (&four)[4]) {
        if (channel == 0) max[warp][head] = new_max, sum[warp][head] = new_sum;
        store_vector(&weighted[warp][head][channel], Vector<float, 4>{four[0], four[1], four[2], four[3]});
    }

    __device__ JoinedState join(int head, int channel) const {
        JoinedState joined{LOWEST, 0.0f, {}};
#pragma unroll
        for (int w = 0; w < NUM_WARPS; w++) joined.max = fmaxf(joined.max, max[w][head]);
#pragma unroll
        for (int w = 0; w < NUM_WARPS; w++) {
            const float rescale = exp_difference(max[w][head], joined.max);
            const Vector<float, 4> part = load_vector<4>(&weighted[w][head][channel]);
            joined.sum += sum[w][head] * rescale;
#pragma unroll
            for (int i = 0; i < 4; i++) joined.mean[i] += part.element[i] * rescale;
        }
        const float factor = joined.sum == 0.0f ? 0.0f : 1.0f / joined.sum;
#pragma unroll
        for (int i = 0; i < 4; i++) joined.mean[i] *= factor;
        return joined;
    }
};

}  // namespace cupy_paged
