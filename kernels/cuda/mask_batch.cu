// masked[k,c,y,x] = image[c,y,x] * gate(up(activations[k])[y,x])
// image (C,H,W) f32   activations (K,h,w) f32   rows (H), columns (W) taps   masked (K,C,H,W) f32|f16
// a warp per row of 32 V columns and `maps_per_block` maps, all c. A gate is made once for all channels; pixels and taps are
// read once for all of the block's maps. V = 1 where W or an address does not fit.
#include "common.cuh"

constexpr int CHANNELS = 3;  // held in registers; further ones are read for every map

template <typename Out, int V>
__device__ inline void mask_strips(StripMemory<V>* shared, const float* image, const float* activations, const Tap* rows,
                                   const Tap* columns, const float* extremes, Out* masked, int maps, int channels,
                                   int height, int width, int h, int w, int gate, int maps_per_block) {
    const int plane = height * width, across = (width - 1) / Strip<V>::COLUMNS + 1;
    const unsigned tasks = static_cast<unsigned>(across) * height;
    for (unsigned task = blockIdx.x * WARPS + threadIdx.x / WARP; task < tasks; task += gridDim.x * WARPS) {
        const int y = static_cast<int>(task / across), left = static_cast<int>(task % across) * Strip<V>::COLUMNS;
        const Strip<V> strip(shared, rows, columns, y, left, width);
        const bool inside = strip.inside();
        const int at = y * width + strip.x;
        float pixels[CHANNELS][V] = {};
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
            if (inside && c < channels) load(image + static_cast<long long>(c) * plane + at, pixels[c]);
        for (long long start = static_cast<long long>(blockIdx.y) * maps_per_block; start < maps;
             start += static_cast<long long>(gridDim.y) * maps_per_block) {
            const long long end = start + maps_per_block < maps ? start + maps_per_block : maps;
            for (long long k = start; k < end; ++k) {
                float gates[V], values[V];
                strip.resize(activations + k * (h * w), w, gates);
                if (!inside) continue;
                open_gates(gates, gate, extremes + 2 * k);
                Out* to = masked + k * channels * plane + at;
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c)
                    if (c < channels) {
#pragma unroll
                        for (int j = 0; j < V; ++j) values[j] = pixels[c][j] * gates[j];
                        store(to + static_cast<long long>(c) * plane, values);
                    }
                for (int c = CHANNELS; c < channels; ++c) {
                    load(image + static_cast<long long>(c) * plane + at, values);
#pragma unroll
                    for (int j = 0; j < V; ++j) values[j] *= gates[j];
                    store(to + static_cast<long long>(c) * plane, values);
                }
            }
        }
    }
}

#define MASK_BATCH(name, Out, V)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                             \
        name(const float* image, const float* activations, const Tap* rows, const Tap* columns, const float* extremes,   \
             Out* masked, int maps, int channels, int height, int width, int h, int w, int gate, int maps_per_block) {   \
        SHARED(StripMemory<V>, shared, WARPS);                                                                           \
        mask_strips<Out, V>(shared, image, activations, rows, columns, extremes,                                         \
                            masked, maps, channels, height, width, h, w, gate, maps_per_block);                          \
    }

MASK_BATCH(mask_batch_f32, float, 1)
MASK_BATCH(mask_batch_f32_wide, float, 4)
MASK_BATCH(mask_batch_f16, __half, 1)
MASK_BATCH(mask_batch_f16_wide, __half, 4)
