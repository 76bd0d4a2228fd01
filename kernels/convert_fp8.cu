// Converts between float8 storage and wider floats, element by element.
//
//   to float8:   output = saturate(input / scale)      from float8:   output = input * scale
#include "dtypes.cuh"

namespace cupy_paged {

// Packed by cupy_paged/cache_ops.py, field by field.
struct ConvertParams {
    void* output;              // [num_elements]
    const void* input;         // [num_elements]
    const float* scale_array;  // [1]; null where scale holds the value
    int64 num_elements;
    float scale;
};

// Grid: any number of thread blocks.
template <class Input, class Output, int NUM_THREADS>
__global__ void __launch_bounds__(NUM_THREADS) convert_fp8(const ConvertParams p) {
    const float scale = p.scale_array ? *p.scale_array : p.scale;
    const int64 step = int64(gridDim.x) * NUM_THREADS;
    for (int64 i = int64(blockIdx.x) * NUM_THREADS + threadIdx.x; i < p.num_elements; i += step) {
        const float x = to_float(static_cast<const Input*>(p.input)[i]);
        static_cast<Output*>(p.output)[i] = from_float<Output>(is_float8<Output> ? x / scale : x * scale);
    }
}

}  // namespace cupy_paged
