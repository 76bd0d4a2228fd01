// paged_attention.cu on tensor cores, for sm_80 and later: products of 16-bit operands, float32 sums.
//
// The scores of 16 tokens for 8 query heads are one 16 x 8 tile, keys being the 16-row operand: a
// group of up to 8 heads wastes nothing on padding it to 16. Their weights, transposed in registers,
// are the 8-column operand against values, [channels][tokens], whose sums again have a query head in
// every column. The parts of a larger group are neighbours' work at the same time: what the first of
// them fetches, the others find in the second-level cache.
//
// Under load every access to global memory waits behind the cache that streams by. Warps that compute
// therefore leave lengths, tables, queries and counters to others, and have them brought. The roles:
//
//   the fetcher   walks over the pieces of the thread block, looks up blocks, and copies queries and
//                 tiles of 16 tokens into rings in shared memory, as far ahead as there is room
//   the workers   take every NUM_WORKERS-th tile of a piece, each with a softmax state of its own, join
//                 their states at its end in a fixed order, and write the result, or a node of it: what a
//                 partition comes to, or a group of them that the thread block did one after the other
//   the clerk     counts the nodes that have been written, and when all those of a sequence are there, brings
//                 them to the workers, who sum them up between two pieces
//
// Where a cache block is a tile, and lies in memory as the tile does, the bulk copy engine moves it (BULK).
#include "attention_params.cuh"
#include "barriers.cuh"
#include "clerk.cuh"
#include "dtypes.cuh"
#include "fetcher.cuh"
#include "layouts.cuh"
#include "masks.cuh"
#include "orders.cuh"
#include "warp_tiles.cuh"
#include "workers.cuh"

namespace cupy_paged {

// Grid: any number of thread blocks. HEADS query heads of one KV head, 8 at most, to a piece.
// SHARED_BYTES is the planner's figure for the shared memory, BLOCKS_PER_SM what it is to allow.
template <class Query, class Cache, class Layout, int HEAD_SIZE, int BLOCK_SIZE, int HEADS, int NUM_WORKERS, int SLOTS,
          int STATES, int SUM_STAGES, int SUM_NODES, bool BULK, int QUERY_COPY_BYTES, int SHARED_BYTES,
          int BLOCKS_PER_SM, class Bias, class Scratch>
__global__ void __launch_bounds__((NUM_WORKERS + 2) * WARP, BLOCKS_PER_SM)
    paged_attention_mma(const __grid_constant__ AttentionParams p) {
    using KeyTile = TokenRows<Cache, HEAD_SIZE, Layout::KEYS_BY_TOKEN>;
    using ValueTile = typename WarpValues<Layout, Cache, HEAD_SIZE>::Tile;
    using Tiles = TilePair<KeyTile, ValueTile>;
    using Stage = StagedNodes<Scratch, HEAD_SIZE, SUM_NODES>;
    using Shared = MmaShared<Tiles, Query, Stage, NUM_WORKERS, SLOTS, STATES, SUM_STAGES, HEADS, HEAD_SIZE>;
    static_assert(sizeof(Shared) <= SHARED_BYTES, "planner and kernel disagree on shared memory");
    extern __shared__ __align__(128) uint8 shared_memory[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (warp < NUM_WORKERS) {
        // A warp makes its lanes' barriers one after the other, so each takes a share of them.
        static_assert(SLOTS <= NUM_WORKERS * WARP, "a lane makes the barriers of one slot");
        const int mine = lane * NUM_WORKERS + warp;
        if (mine < SLOTS) {
            shared.full[mine].init(BULK ? 1 : WARP);
            shared.empty[mine].init(Barrier::WARP_ARRIVALS);
        }
        if (mine < Shared::ORDERS) {
            shared.order[mine].full.init(2 * WARP);
            shared.order[mine].stored.init(NUM_WORKERS * Barrier::WARP_ARRIVALS);
            shared.order[mine].empty.init((NUM_WORKERS + 1) * Barrier::WARP_ARRIVALS);
        }
        if (mine < SUM_STAGES) {
            shared.sum_full[mine].init(2 * WARP);
            shared.sum_empty[mine].init(NUM_WORKERS * Barrier::WARP_ARRIVALS);
        }
        Barrier::publish();
    }
    // The fetcher looks for its first piece meanwhile. All come to the barrier at one place: compute-sanitizer's
    // synccheck would take two for divergence.
    PieceWalk<HEADS> walk(p);
    bool more = false;
    if (warp == NUM_WORKERS) more = walk.next();
    __syncthreads();
    if (warp == NUM_WORKERS)
        return fetch_pieces<Query, Cache, Layout, HEAD_SIZE, BLOCK_SIZE, HEADS, SLOTS, BULK, QUERY_COPY_BYTES, Tiles>(
            p, walk, more, shared);
    if (warp == NUM_WORKERS + 1) return count_nodes(p, shared);
    attend_to_pieces<Query, Cache, Layout, HEAD_SIZE, HEADS, NUM_WORKERS, SLOTS, BULK, Bias, Scratch, Tiles>(p, shared);
}

}  // namespace cupy_paged
