// channel_extremes: extremes[k] = lowest and highest value of activations[k]; one block per channel; NaN if one value is NaN
// take_channels:    taken[i] = activations[index[i]]
// activations (K,h,w) f32   index (n) i32 -> extremes (K,2) f32, taken (n,h,w) f32
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    channel_extremes(const float* activations, float* extremes, int count, long long size) {
    SHARED(float, shared, WARP);
    for (long long k = blockIdx.x; k < count; k += gridDim.x) {
        const float* channel = activations + k * size;
        float low = INFINITY, high = -INFINITY;
        for (long long i = threadIdx.x; i < size; i += blockDim.x) {
            low = Least()(low, channel[i]);
            high = Greatest()(high, channel[i]);
        }
        low = reduce_block(low, shared, Least());
        high = reduce_block(high, shared, Greatest());
        if (threadIdx.x == 0) {
            extremes[2 * k] = low;
            extremes[2 * k + 1] = high;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    take_channels(const float* activations, const int* index, float* taken, long long entries, long long size) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < entries; i += stride)
        taken[i] = activations[index[i / size] * size + i % size];
}
