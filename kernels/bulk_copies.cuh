// Whole pieces of global memory into shared memory by the bulk copy engine of sm_90 and later.
//
// A barrier in shared memory counts the bytes that are to arrive; its phase flips when all have. On
// older chips, whose kernels never call them, these functions are empty.
// Source: PTX ISA, cp.async.bulk and mbarrier.
#pragma once
#include "arch.cuh"

namespace cupy_paged {

struct ArrivalBarrier {
    unsigned long long state;

    __device__ uint32 address() const { return uint32(__cvta_generic_to_shared(&state)); }

    __device__ void init() {
#if SM >= 90
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address()) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }

    // Opens the next phase, which ends when `bytes` have arrived. By one thread.
    __device__ void expect(int bytes) {
#if SM >= 90
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
#endif
    }

    __device__ void wait(uint32 phase) const {
#if SM >= 90
        uint32 done = 0;
        while (!done)
            asm volatile(
                "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                : "=r"(done)
                : "r"(address()), "r"(phase)
                : "memory");
#endif
    }
};

// Queues a copy of a multiple of 16 bytes, aligned to 16 on both sides. By one thread.
__device__ inline void copy_bulk(void* shared, const void* global, int bytes, ArrivalBarrier& arrival) {
#if SM >= 90
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     uint32(__cvta_generic_to_shared(shared))),
                 "l"(global), "r"(bytes), "r"(arrival.address())
                 : "memory");
#endif
}

// Orders this thread's ordinary accesses to shared memory before later bulk copies into it.
__device__ inline void fence_before_bulk() {
#if SM >= 90
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace cupy_paged
