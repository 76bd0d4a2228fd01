// Copies from global to shared memory that need not pass through registers.
#pragma once
#include "arch.cuh"

namespace cupy_paged {

// What tells the second-level cache that lines will not be read again soon.
__device__ inline unsigned long long read_once() {
    unsigned long long policy = 0;
#if SM >= 80
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
#endif
    return policy;
}

// Copies the first `live` of BYTES bytes and fills the rest with zeros. Bytes past `live` may hold
// anything, NaN patterns included: they never arrive. The copy is complete after wait_for_copies.
template <int BYTES>
__device__ inline void copy_async(void* shared, const void* global, int live) {
    static_assert(BYTES == 1 || BYTES == 2 || BYTES == 4 || BYTES == 8 || BYTES == 16, "copy width");
#if SM >= 80
    if constexpr (BYTES >= 4) {
        const uint32 target = uint32(__cvta_generic_to_shared(shared));
        if constexpr (BYTES == 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(live)
                         : "memory");
        else
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(BYTES),
                         "r"(live)
                         : "memory");
        return;
    }
#endif
    if constexpr (BYTES >= 4) {
        struct alignas(BYTES) Words { uint32 word[BYTES / 4]; };
        Words words = {};
        if (live > 0) words = *static_cast<const Words*>(global);
#pragma unroll
        for (int i = 0; i < BYTES / 4; i++) {
            const int keep = 8 * (live - 4 * i);
            if (keep <= 0) words.word[i] = 0;
            else if (keep < 32) words.word[i] &= (1u << keep) - 1;
        }
        *static_cast<Words*>(shared) = words;
    } else if constexpr (BYTES == 2) {
        *static_cast<uint16*>(shared) = live > 0 ? *static_cast<const uint16*>(global) : uint16(0);
    } else {
        *static_cast<uint8*>(shared) = live > 0 ? *static_cast<const uint8*>(global) : uint8(0);
    }
}

// A copy of 16 bytes that are not read again before much else is: they make room first in the second-level
// cache, where what is written meanwhile then stays. For sm_80 and later.
__device__ inline void copy_async_once(void* shared, const void* global, int live) {
#if SM >= 80
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(
                     uint32(__cvta_generic_to_shared(shared))),
                 "l"(global), "r"(live), "l"(read_once())
                 : "memory");
#endif
}

// Waits for this thread's copies; a barrier must follow before other threads read them.
__device__ inline void wait_for_copies() {
#if SM >= 80
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace cupy_paged
