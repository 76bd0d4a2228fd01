// Barriers in shared memory between warps of different roles, and the copies that arrive at them.
//
// A barrier's phase ends when so many arrivals have come as it was made for, and all bytes that it was
// told to expect. Phases alternate in parity; a fresh barrier counts as past a phase of parity 1.
// Source: PTX ISA, mbarrier, cp.async.mbarrier.arrive and cp.async.bulk.
#pragma once
#include "arch.cuh"
#include "copies.cuh"

namespace cupy_paged {

// Whether each lane waits and arrives for itself where one could do it for its warp: slower, but compute-sanitizer's
// racecheck does not see that __syncwarp comes between what a lane does and what another one signals.
#ifdef CUPY_PAGED_EVERY_LANE
constexpr bool EVERY_LANE = true;
#else
constexpr bool EVERY_LANE = false;
#endif

struct Barrier {
    // Of a warp that arrives as one.
    static constexpr int WARP_ARRIVALS = EVERY_LANE ? WARP : 1;

    unsigned long long state;

    __device__ uint32 address() const { return uint32(__cvta_generic_to_shared(&state)); }

    __device__ void init(int arrivals) {
#if SM >= 80
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
#endif
    }

    // Makes fresh barriers known to the bulk copy engine. A barrier of the thread block must follow.
    static __device__ void publish() {
#if SM >= 90
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }

    __device__ void arrive() {
#if SM >= 80
        asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" ::"r"(address()) : "memory");
#endif
    }

    // Arrives after what all lanes have done. By a whole warp.
    __device__ void arrive_as_warp() {
        __syncwarp();
        if (EVERY_LANE || threadIdx.x % WARP == 0) arrive();
    }

    // Arrives, and lets the phase wait for so many bytes of bulk copies.
    __device__ void arrive_expecting(int bytes) {
#if SM >= 90
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
#endif
    }

    // Arrives once this thread's earlier asynchronous copies are complete. Does not wait for them.
    __device__ void arrive_after_copies() {
#if SM >= 80
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address()) : "memory");
#endif
    }

    // Whether a phase of this parity is past.
    __device__ bool is_past(uint32 parity) const {
        uint32 done = 0;
#if SM >= 80
        asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(address()), "r"(parity)
                     : "memory");
#endif
        return done;
    }

    __device__ void wait(uint32 parity) const {
#if SM >= 90
        uint32 done = 0;
        while (!done)
            asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                         : "=r"(done)
                         : "r"(address()), "r"(parity)
                         : "memory");
#else
        while (!is_past(parity)) continue;
#endif
    }
};

// Leaves the multiprocessor to others for some ten cycles, in a loop that asks several barriers by turns.
__device__ inline void pause() {
#if SM >= 70
    __nanosleep(20);
#endif
}

// True on one lane, as the compiler knows: it makes no loop of what takes uniform registers. By a whole warp, for
// sm_90 and later.
__device__ inline bool elect_lane() {
    uint32 elected = 0;
#if SM >= 90
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
#endif
    return elected;
}

// Queues a copy of a multiple of 16 bytes, aligned to 16 on both sides and not read again soon. By one thread.
__device__ inline void copy_bulk(void* shared, const void* global, int bytes, Barrier& arrival) {
#if SM >= 90
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            uint32(__cvta_generic_to_shared(shared))),
        "l"(global), "r"(bytes), "r"(arrival.address()), "l"(read_once())
        : "memory");
#endif
}

// Orders this thread's ordinary accesses to shared memory before later bulk copies into it.
__device__ inline void fence_before_bulk() {
#if SM >= 90
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Barriers of warps, by number. 0 is __syncthreads.
constexpr int STATES_LEFT = 1;

// A barrier of some warps of a thread block, THREADS in all.
template <int ID, int THREADS> __device__ inline void sync_warps() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

}  // namespace cupy_paged
