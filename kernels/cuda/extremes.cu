// extremes[k] = lowest and highest value of up(maps[k]), for the min-max gate
// maps (K,h,w) f32   rows (H), columns (W) taps -> extremes (K,2) f32
// resized_extremes: a block per map and part of its rows, a warp per row of 128 columns -> (K,parts,2), which with one part are
// the extremes. join_extremes: a warp per map. A lowest value of zero is always -0, so that gates do not depend on the order.
#include "common.cuh"

constexpr int COLUMNS_OF_A_LANE = 4;

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    resized_extremes(const float* maps, const Tap* rows, const Tap* columns, float* extremes, int count, int height,
                     int width, int h, int w, int parts) {
    SHARED(StripMemory<COLUMNS_OF_A_LANE>, strips, WARPS);
    SHARED(float, shared, WARP);
    const long long across = (width - 1) / Strip<COLUMNS_OF_A_LANE>::COLUMNS + 1;
    for (long long k = blockIdx.x; k < count; k += gridDim.x)
        for (int part = blockIdx.y; part < parts; part += gridDim.y) {
            const int first = part * WARPS + threadIdx.x / WARP;
            float low = INFINITY, high = -INFINITY;
            for (long long i = 0; i < across && first < height; ++i) {
                Strip<COLUMNS_OF_A_LANE> strip(strips, rows, columns, first,
                                               static_cast<int>(i) * Strip<COLUMNS_OF_A_LANE>::COLUMNS, width);
                for (long long y = first; y < height; y += parts * WARPS) {
                    float values[COLUMNS_OF_A_LANE];
                    strip.row = rows[y];
                    strip.resize(maps + k * h * w, w, values);
#pragma unroll
                    for (int j = 0; j < COLUMNS_OF_A_LANE; ++j) {  // beyond the last column it is repeated
                        low = Least()(low, values[j]);
                        high = Greatest()(high, values[j]);
                    }
                }
            }
            low = reduce_block(low, shared, Least());
            high = reduce_block(high, shared, Greatest());
            if (threadIdx.x == 0) {
                extremes[2 * (k * parts + part)] = low == 0.0f ? -0.0f : low;  // the gate of either zero is then +0
                extremes[2 * (k * parts + part) + 1] = high;
            }
        }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    join_extremes(const float* partial, float* extremes, int count, int parts) {
    const int lane = threadIdx.x % WARP;
    for (long long k = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / WARP; k < count;
         k += static_cast<long long>(gridDim.x) * WARPS) {
        float low = INFINITY, high = -INFINITY;
        for (int part = lane; part < parts; part += WARP) {
            low = Least()(low, partial[2 * (k * parts + part)]);
            high = Greatest()(high, partial[2 * (k * parts + part) + 1]);
        }
        low = reduce_warp(low, Least());
        high = reduce_warp(high, Greatest());
        if (lane == 0) {
            extremes[2 * k] = low;
            extremes[2 * k + 1] = high;
        }
    }
}
