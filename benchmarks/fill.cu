// Random elements, drawn from a table of values by a hash of their index: any dtype, and as fast as
// memory can be written.

__device__ unsigned long long mix(unsigned long long x)  // the finaliser of splitmix64
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// table_size is a power of two.
template <typename Bits>
__global__ void fill(Bits* out, long long count, const Bits* table, int table_size, long long seed)
{
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const unsigned long long index = (i + (seed << 40)) * 0x9e3779b97f4a7c15ull;
        out[i] = table[mix(index) & (table_size - 1)];
    }
}
