// The chip this is compiled for, and the fixed-width integers NVRTC does not define by itself.
#pragma once

// Compute capability times ten. CUPY_PAGED_SM lets a newer chip run the code of an older one,
// so that every path can be tested on whatever GPU is at hand.
#ifdef CUPY_PAGED_SM
#define SM CUPY_PAGED_SM
#else
#define SM (__CUDA_ARCH__ / 10)
#endif

namespace cupy_paged {

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;

constexpr int WARP = 32;
constexpr uint32 ALL_LANES = 0xffffffffu;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }

}  // namespace cupy_paged
