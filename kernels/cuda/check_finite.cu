// Sets *fault to `code` if a value is NaN or infinite.
// values (n) f32   fault (1) i32
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    check_finite(const float* values, int* fault, long long count, int code) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    bool broken = false;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride)
        broken |= !(fabsf(values[i]) <= 3.402823466e38f);  // the largest finite number
    if (broken) *fault = code;
}
