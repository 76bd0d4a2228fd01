// Warp-wide matrix instructions of sm_80 and later, and the fragments that they work on.
//
// Lane 4 * g + j of a warp holds, of a 16 x 16 operand A: rows g and g + 8, columns 2j, 2j + 1,
// 2j + 8 and 2j + 9; of a 16 x 8 operand B: the same of its rows in column g; of the 16 x 8 sum:
// rows g and g + 8, columns 2j and 2j + 1. Source: PTX ISA, mma.m16n8k16.
#pragma once
#include "arch.cuh"
#include "dtypes.cuh"

namespace cupy_paged {

// Two 16-bit elements in one register, the first in the lower half.
template <class T> __device__ inline uint32 pack(float low, float high) {
    return from_float<T>(low).bits | uint32(from_float<T>(high).bits) << 16;
}

template <class T> __device__ inline T low_half(uint32 pair) { return {uint16(pair)}; }
template <class T> __device__ inline T high_half(uint32 pair) { return {uint16(pair >> 16)}; }

// sum += A * B
template <class T>
__device__ inline void mma(float (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2]);

template <>
__device__ inline void mma<float16>(float (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void mma<bfloat16>(float (&sum)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane i names the address of row i % 8
// of matrix i / 8; lane 4 * g + j receives elements 2j and 2j + 1 of row g of each matrix.
__device__ inline void load_matrices(uint32 (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(uint32(__cvta_generic_to_shared(row)))
                 : "memory");
}

// The same of the transposed matrices.
__device__ inline void load_matrices_transposed(uint32 (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(uint32(__cvta_generic_to_shared(row)))
                 : "memory");
}

// Transposes an 8 x 8 matrix of 16-bit elements that lies across the warp.
__device__ inline uint32 transpose_matrix(uint32 m) {
    uint32 t;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(m));
    return t;
}

// Two bytes of float8 to two float16.
template <class T> __device__ inline uint32 halves(uint32 pair);

template <> __device__ inline uint32 halves<float8_e4m3fn>(uint32 pair) {
#if SM >= 89
    uint32 h;
    asm("{.reg .b16 p, z; mov.b32 {p, z}, %1; cvt.rn.f16x2.e4m3x2 %0, p;}" : "=r"(h) : "r"(pair));
    return h;
#else
    return pack<float16>(to_float(float8_e4m3fn{uint8(pair)}), to_float(float8_e4m3fn{uint8(pair >> 8)}));
#endif
}

template <> __device__ inline uint32 halves<float8_e5m2>(uint32 pair) {
    return __byte_perm(pair, 0, 0x1404);  // a float16's upper byte, zeros below
}

}  // namespace cupy_paged
