// Copies whole blocks, as bytes, inside the caches of many layers.
//
// A pair is (source, destination). One that names a block that is not there, as the negative ones
// that fill up a captured graph's table do, is skipped. Pairs run in parallel: a block that one pair
// reads and another writes may be read before or after.
#include "block_copy.cuh"

namespace cupy_paged {

// As many as a launch's 4 KiB of parameters have room for.
constexpr int MAX_POOLS = 160, MAX_PAIRS = 80;

// The blocks of one cache.
struct BlockPool {
    uint8* blocks;
    int64 stride;  // bytes from block to block
};

struct BlockPair {
    int64 source, destination;
};

// Packed by cupy_paged/block_ops.py, field by field. It holds the pools by value: a captured graph
// then needs no memory that somebody would have to keep.
struct CopyBlocksParams {
    BlockPool pools[MAX_POOLS];
    BlockPair pairs[MAX_PAIRS];
    const BlockPair* block_mapping;  // [num_pairs]; null where `pairs` holds them
    int64 num_pairs, num_blocks;
    int64 block_bytes;  // a multiple of WIDTH
    int num_pools;
};

// Grid: any number of thread blocks.
template <int WIDTH, int NUM_THREADS>
__global__ void __launch_bounds__(NUM_THREADS) copy_blocks(const __grid_constant__ CopyBlocksParams p) {
    constexpr int WARPS = NUM_THREADS / WARP;
    const int64 units_of_block = (p.block_bytes + COPY_UNIT<WIDTH> - 1) / COPY_UNIT<WIDTH>;
    const int64 units = p.num_pairs * p.num_pools * units_of_block;

    for (int64 unit = int64(blockIdx.x) * WARPS + threadIdx.x / WARP; unit < units; unit += int64(gridDim.x) * WARPS) {
        const int64 copy = unit / units_of_block;
        const BlockPool& pool = p.pools[copy % p.num_pools];
        const BlockPair pair = p.block_mapping ? p.block_mapping[copy / p.num_pools] : p.pairs[copy / p.num_pools];
        const int64 source = pair.source, destination = pair.destination;
        if (source < 0 || source >= p.num_blocks || destination < 0 || destination >= p.num_blocks) continue;

        copy_unit<WIDTH>(pool.blocks + destination * pool.stride, pool.blocks + source * pool.stride,
                         unit % units_of_block, p.block_bytes);
    }
}

}  // namespace cupy_paged
