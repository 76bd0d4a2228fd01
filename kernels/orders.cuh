// What the warps of paged_attention_mma.cu share: tiles and pieces on their way from one role to the next.
#pragma once
#include "barriers.cuh"
#include "nodes.cuh"
#include "pieces.cuh"
#include "warp_states.cuh"

namespace cupy_paged {

// A piece on its way from the fetcher to all others.
template <class Query, int HEADS, int HEAD_SIZE> struct alignas(16) Order {
    static constexpr int ROW = HEAD_SIZE + 8;  // keeps the lanes that read an operand in different banks

    Query query[HEADS][ROW];
    Piece piece;
    uint32 first_tile;  // counted over all pieces of the thread block
    bool is_last;       // there is no such piece, and none will follow
    Barrier full, stored, empty;
};

template <class Tiles, class Query, class StagedNodes, int NUM_WORKERS, int SLOTS, int NUM_STATES, int SUM_STAGES,
          int HEADS, int HEAD_SIZE>
struct alignas(16) MmaShared {
    using Stage = StagedNodes;
    static constexpr int ORDERS = 3, SUMS = SUM_STAGES, WORKERS = NUM_WORKERS;
    static constexpr int STATES = NUM_STATES;  // that the workers leave, see leave_states

    Tiles tiles[SLOTS];
    Order<Query, HEADS, HEAD_SIZE> order[ORDERS];
    WarpStates<STATES, HEADS, HEAD_SIZE> states;
    float max[NUM_WORKERS][HEADS];
    StagedNodes staged[SUMS][NUM_WORKERS];
    SumOrder sum_order[SUMS];
    Barrier full[SLOTS], empty[SLOTS], sum_full[SUMS], sum_empty[SUMS];
};

template <class KeyTile, class ValueTile> struct TilePair {
    KeyTile keys;
    ValueTile values;
};

}  // namespace cupy_paged
