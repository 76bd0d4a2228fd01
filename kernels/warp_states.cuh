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

// The sum of joined states, taken in one after the other. Whoever takes in the same states in the same order
// gets the same bits: no product and sum are left for the compiler to contract, or not.
struct RunningState {
    float max, sum;
    float weighted[4];

    __device__ void begin(const JoinedState& state) {
        max = state.max, sum = state.sum;
#pragma unroll
        for (int c = 0; c < 4; c++) weighted[c] = __fmul_rn(state.mean[c], sum);
    }

    __device__ void take(const JoinedState& state) {
        const float new_max = fmaxf(max, state.max);
        const float rescale = exp_difference(max, new_max);
        const float weight = __fmul_rn(state.sum, exp_difference(state.max, new_max));
        max = new_max, sum = __fmaf_rn(sum, rescale, weight);
#pragma unroll
        for (int c = 0; c < 4; c++) weighted[c] = __fmaf_rn(weighted[c], rescale, __fmul_rn(state.mean[c], weight));
    }

    __device__ JoinedState joined() const {
        const float factor = sum == 0.0f ? 0.0f : __frcp_rn(sum);
        JoinedState state{max, sum, {}};
#pragma unroll
        for (int c = 0; c < 4; c++) state.mean[c] = __fmul_rn(weighted[c], factor);
        return state;
    }
};

// For each warp and head: (max, sum, sum of weighted values). Warps fill it in; a barrier later any thread
// may ask for the joined state, with values times `value_scale`. Warps are summed in order of their number.
template <int NUM_WARPS, int HEADS, int HEAD_SIZE> struct WarpStates {
    static constexpr int ROW = HEAD_SIZE + 4;  // lanes that write heads two apart meet different banks

    float weighted[NUM_WARPS][HEADS][ROW];
    float max[NUM_WARPS][HEADS], sum[NUM_WARPS][HEADS];

    __device__ JoinedState join(int head, int channel, float value_scale) const {
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
        const float factor = joined.sum == 0.0f ? 0.0f : value_scale / joined.sum;
#pragma unroll
        for (int i = 0; i < 4; i++) joined.mean[i] = __fmul_rn(joined.mean[i], factor);
        return joined;
    }
};

}  // namespace cupy_paged
