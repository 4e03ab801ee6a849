// total[s,y,x] += sum_k scores[s,k] gate(up(activations[k])[y,x]), without storing a gate
// total (S,H,W) f32   scores (S,K) f32   activations (K,h,w) f32   rows (H), columns (W) taps
// accumulate_maps: a warp sums one chunk of maps for one row of 32 V columns and all s -> partial sums (chunks,S,H,W); with a
// single chunk, into total. add_partials: adds the chunks, always in the same order. No atomics: every run gives the same bits.
#include "common.cuh"

constexpr int SCORES = 4;  // sums held in registers together

template <int V>
__device__ inline void sum_strips(float* staged, const float* scores, const float* activations, const Tap* rows,
                                  const Tap* columns, const float* extremes, float* total, float* partial, int count,
                                  int maps, int height, int width, int h, int w, int gate, int maps_per_chunk,
                                  int chunks) {
    const long long plane = static_cast<long long>(height) * width, map_size = static_cast<long long>(h) * w;
    const long long across = (width - 1) / Strip<V>::COLUMNS + 1, tasks = across * height;
    const bool same_size = h == height && w == width;
    for (long long task = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / WARP; task < tasks;
         task += static_cast<long long>(gridDim.x) * WARPS) {
        const int y = static_cast<int>(task / across), left = static_cast<int>(task % across) * Strip<V>::COLUMNS;
        const Strip<V> strip(rows, columns, y, left, width);
        const bool inside = strip.inside();
        const long long at = static_cast<long long>(y) * width + strip.x;
        for (int chunk = blockIdx.y; chunk < chunks; chunk += gridDim.y) {
            const long long start = static_cast<long long>(chunk) * maps_per_chunk;
            const long long end = start + maps_per_chunk < maps ? start + maps_per_chunk : maps;
            for (int first = 0; first < count; first += SCORES) {
                float sums[SCORES][V] = {};
                for (long long k = start; k < end; ++k) {
                    float gates[V];
                    if (same_size) {
                        if (inside) load(activations + k * map_size + at, gates);
                    } else {
                        strip.resize(activations + k * map_size, w, staged, gates);
                    }
                    if (!inside) continue;
                    open_gates(gates, gate, extremes + 2 * k);
#pragma unroll
                    for (int s = 0; s < SCORES; ++s)
                        if (first + s < count) {
                            const float score = scores[static_cast<long long>(first + s) * maps + k];
#pragma unroll
                            for (int j = 0; j < V; ++j) sums[s][j] = fmaf(score, gates[j], sums[s][j]);
                        }
                }
                if (!inside) continue;
#pragma unroll
                for (int s = 0; s < SCORES; ++s)
                    if (first + s < count) {
                        if (chunks == 1) {
                            float before[V];
                            load(total + (first + s) * plane + at, before);
#pragma unroll
                            for (int j = 0; j < V; ++j) sums[s][j] += before[j];
                            store(total + (first + s) * plane + at, sums[s]);
                        } else {
                            store(partial + (static_cast<long long>(chunk) * count + first + s) * plane + at, sums[s]);
                        }
                    }
            }
        }
    }
}

#define ACCUMULATE_MAPS(name, V)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
        name(const float* scores, const float* activations, const Tap* rows, const Tap* columns, const float* extremes,  \
             float* total, float* partial, int count, int maps, int height, int width, int h, int w, int gate,           \
             int maps_per_chunk, int chunks) {                                                                           \
        SHARED(float, staged, WARPS * Strip<V>::STAGED);                                                                 \
        sum_strips<V>(staged + threadIdx.x / WARP * Strip<V>::STAGED, scores, activations, rows, columns, extremes,      \
                      total, partial, count, maps, height, width, h, w, gate, maps_per_chunk, chunks);                   \
    }

ACCUMULATE_MAPS(accumulate_maps, 1)
ACCUMULATE_MAPS(accumulate_maps_wide, 4)

extern "C" __global__ void __launch_bounds__(THREADS)
    add_partials(float* total, const float* partial, long long count, int chunks) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        float sum = total[i];
        for (int chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * count + i];
        total[i] = sum;
    }
}
