// Storage types and their way to float and back.
//
// Written out here, not taken from cuda_fp16.h and its siblings: those differ between CUDA
// releases, are absent from a bare NVRTC install, and take longer to parse than our kernels.
// Type names are the dtype names of the Python side. Every narrowing rounds to nearest even;
// narrowing to 8 bits saturates to the largest finite value and keeps NaN.
#pragma once
#include "arch.cuh"

namespace cupy_paged {

struct float16 { uint16 bits; };
struct bfloat16 { uint16 bits; };
struct float8_e4m3fn { uint8 bits; };
struct float8_e5m2 { uint8 bits; };
using float32 = float;

template <class A, class B> constexpr bool same_type = false;
template <class A> constexpr bool same_type<A, A> = true;

template <class T> constexpr bool is_float8 = same_type<T, float8_e4m3fn> || same_type<T, float8_e5m2>;

// ---- to float ----

__device__ inline float to_float(float x) { return x; }

__device__ inline float to_float(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ inline float to_float(bfloat16 x) { return __uint_as_float(uint32(x.bits) << 16); }

// e4m3 has one exponent bit less than float16: shifted into place it reads 2^8 too small.
__device__ inline float to_float(float8_e4m3fn x) {
    const uint32 magnitude = x.bits & 0x7fu;
    const uint32 half = (x.bits & 0x80u) << 8 | magnitude << 7;
    const float value = to_float(float16{uint16(half)}) * 256.0f;
    return magnitude == 0x7fu ? __uint_as_float(0x7fffffffu) : value;
}

// e5m2 is the upper byte of a float16.
__device__ inline float to_float(float8_e5m2 x) { return to_float(float16{uint16(x.bits << 8)}); }

// ---- from float ----

template <class T> __device__ T from_float(float x);

template <> __device__ inline float from_float<float>(float x) { return x; }

template <> __device__ inline float16 from_float<float16>(float x) {
    float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

template <> __device__ inline bfloat16 from_float<bfloat16>(float x) {
#if SM >= 80
    bfloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    if (x != x) return {0x7fff};
    const uint32 bits = __float_as_uint(x);
    return {uint16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

// Rounds |x| to a multiple of the format's spacing at x. Subnormals share the spacing of the
// smallest normals, so the code is the exponent's offset plus the multiple, carries included.
template <int MANTISSA_BITS, int MIN_EXPONENT, int MAX_CODE>
__device__ inline uint8 round_to_float8(float x, float largest) {
    if (x != x) return 0x7f;
    const uint32 sign = __float_as_uint(x) >> 24 & 0x80u;
    const float magnitude = fabsf(x);
    if (magnitude >= largest) return uint8(sign | MAX_CODE);
    const int exponent = max(int(__float_as_uint(magnitude) >> 23) - 127, MIN_EXPONENT);
    const float per_spacing = __uint_as_float(uint32(127 + MANTISSA_BITS - exponent) << 23);
    const int multiple = __float2int_rn(magnitude * per_spacing);
    const int code = (exponent - MIN_EXPONENT << MANTISSA_BITS) + multiple;
    return uint8(sign | min(code, MAX_CODE));
}

template <> __device__ inline float8_e4m3fn from_float<float8_e4m3fn>(float x) {
#if SM >= 89
    uint16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    return {uint8(pair)};
#else
    return {round_to_float8<3, -6, 0x7e>(x, 448.0f)};
#endif
}

template <> __device__ inline float8_e5m2 from_float<float8_e5m2>(float x) {
#if SM >= 89
    uint16 pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    return {uint8(pair)};
#else
    return {round_to_float8<2, -14, 0x7b>(x, 57344.0f)};
#endif
}

// ---- vectors ----

// N elements that move as one access.
template <class T, int N> struct alignas(N * sizeof(T)) Vector {
    T element[N];
};

template <int N, class T> __device__ inline Vector<T, N> load_vector(const T* source) {
    return *reinterpret_cast<const Vector<T, N>*>(source);
}

template <int N, class T> __device__ inline void store_vector(T* target, const Vector<T, N>& v) {
    *reinterpret_cast<Vector<T, N>*>(target) = v;
}

#if SM >= 89
// Two 8-bit codes become two float16 in one instruction.
__device__ inline uint32 halves_of_pair(float8_e4m3fn, uint16 pair) {
    uint32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
    return halves;
}
#endif

template <int N, class T> __device__ inline void to_floats(const Vector<T, N>& v, float (&out)[N]) {
#if SM >= 89
    if constexpr (same_type<T, float8_e4m3fn> && N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const uint32 pair = v.element[i].bits | uint32(v.element[i + 1].bits) << 8;
            const uint32 halves = halves_of_pair(T{}, uint16(pair));
            out[i] = to_float(float16{uint16(halves)});
            out[i + 1] = to_float(float16{uint16(halves >> 16)});
        }
        return;
    }
#endif
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = to_float(v.element[i]);
}

// N floats in the fewest accesses; `source` is aligned to 16 bytes, or to 4 * N where that is less.
template <int N> __device__ inline void read_floats(const float* source, float (&out)[N]) {
    constexpr int WIDTH = N % 4 == 0 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < N; i += WIDTH) {
        const Vector<float, WIDTH> v = load_vector<WIDTH>(source + i);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) out[i + j] = v.element[j];
    }
}

}  // namespace cupy_paged
