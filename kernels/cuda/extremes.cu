// extremes[k] = lowest and highest value of up(maps[k]), for the min-max gate
// maps (K,h,w) f32   rows (H), columns (W) taps -> extremes (K,2) f32   one block per map, a warp per strip of 32 columns
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    resized_extremes(const float* maps, const Tap* rows, const Tap* columns, float* extremes, int count, int height,
                     int width, int h, int w) {
    SHARED(StripMemory<1>, strips, WARPS);
    SHARED(float, shared, WARP);
    const int warp = threadIdx.x / WARP;
    const long long across = (width - 1) / WARP + 1;
    for (long long k = blockIdx.x; k < count; k += gridDim.x) {
        const float* map = maps + k * h * w;
        float low = INFINITY, high = -INFINITY;
        for (long long task = warp; task < across * height; task += WARPS) {
            const Strip<1> strip(strips, rows, columns, static_cast<int>(task / across),
                                 static_cast<int>(task % across) * WARP, width);
            float values[1];
            strip.resize(map, w, values);
            if (!strip.inside()) continue;
            low = Least()(low, values[0]);
            high = Greatest()(high, values[0]);
        }
        low = reduce_block(low, shared, Least());
        high = reduce_block(high, shared, Greatest());
        if (threadIdx.x == 0) {
            extremes[2 * k] = low;
            extremes[2 * k + 1] = high;
        }
    }
}
