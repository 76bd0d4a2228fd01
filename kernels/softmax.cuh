// Softmax over a set of tokens that is seen piece by piece.
//
// A piece is summed up by (max, sum): the largest logit in natural units and the sum of
// exp(logit - max). The piece without tokens is (LOWEST, 0). Finite LOWEST in place of -inf keeps
// every difference of maxima a number.
// Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867.
#pragma once
#include "arch.cuh"

namespace cupy_paged {

constexpr float LOWEST = -3.402823466e+38f;
constexpr float LOG2_E = 1.4426950408889634f;

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }
__device__ inline float not_a_number() { return __uint_as_float(0x7fffffffu); }

// exp(x - reference), for x <= reference.
__device__ inline float exp_difference(float x, float reference) { return exp2f((x - reference) * LOG2_E); }

// Natural-log log-sum-exp of a piece. Where every logit is NaN there is no maximum, but the sum is NaN.
__device__ inline float log_sum_exp(float max, float sum) {
    return max == LOWEST && sum == sum ? minus_infinity() : logf(sum) + max;
}

}  // namespace cupy_paged
