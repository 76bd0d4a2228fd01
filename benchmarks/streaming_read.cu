// Reads `count` 16-byte pieces once, and does as good as nothing with them: the floor under any
// kernel that must read as many bytes.

template <bool FAR_PREFETCH>
__device__ uint4 load(const uint4* from)
{
    uint4 x;
    if constexpr (FAR_PREFETCH)
        asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    else
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    return x;
}

// A thread block takes pieces of blockDim.x * LOADS loads in turn; all loads of a piece are in
// flight at once.
template <int LOADS, bool FAR_PREFETCH>
__global__ void streaming_read(const uint4* data, long long count, unsigned* sink)
{
    const long long piece = (long long)blockDim.x * LOADS;
    unsigned folded = 0;
    for (long long begin = blockIdx.x * piece; begin < count; begin += gridDim.x * piece) {
        const uint4* mine = data + begin + threadIdx.x;
        uint4 x[LOADS];
        if (begin + piece <= count) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) x[i] = load<FAR_PREFETCH>(mine + i * blockDim.x);
        } else {
            const long long left = count - begin - threadIdx.x;
#pragma unroll
            for (int i = 0; i < LOADS; i++)
                x[i] = i * (int)blockDim.x < left ? load<FAR_PREFETCH>(mine + i * blockDim.x)
                                                  : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) folded ^= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
    }
    // Which value it is not, the compiler cannot know: no load can be left out.
    if (folded == 0x5bd1e995u) *sink = folded;
}
