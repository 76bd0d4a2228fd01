// Copies whole blocks, as bytes, from one array to another; either may be host memory that is mapped
// for the device.
#include "block_copy.cuh"

namespace cupy_paged {

constexpr int MAX_SWAPS = 480;  // what a launch's 4 KiB of parameters have room for

struct BlockSwap {
    int source, destination;
};

// Packed by cupy_paged/block_runs.py: field by field, then the pairs as one array.
struct SwapBlocksParams {
    const uint8* source;
    uint8* destination;
    int64 source_stride, destination_stride;  // bytes from block to block
    int64 block_bytes;                        // a multiple of WIDTH
    int64 num_pairs;
    BlockSwap pairs[MAX_SWAPS];
};

// Grid: any number of thread blocks.
template <int WIDTH, int NUM_THREADS>
__global__ void __launch_bounds__(NUM_THREADS) swap_blocks(const __grid_constant__ SwapBlocksParams p) {
    constexpr int WARPS = NUM_THREADS / WARP;
    const int64 units_of_block = (p.block_bytes + COPY_UNIT<WIDTH> - 1) / COPY_UNIT<WIDTH>;
    const int64 units = p.num_pairs * units_of_block;

    for (int64 unit = int64(blockIdx.x) * WARPS + threadIdx.x / WARP; unit < units; unit += int64(gridDim.x) * WARPS) {
        const BlockSwap& pair = p.pairs[unit / units_of_block];
        copy_unit<WIDTH>(p.destination + pair.destination * p.destination_stride,
                         p.source + pair.source * p.source_stride, unit % units_of_block, p.block_bytes);
    }
}

}  // namespace cupy_paged
