// total[s,y,x] += sum_k scores[s,k] gate(up(activations[k])[y,x]), without storing a gate
// total (S,H,W) f32   scores (S,K) f32   activations (K,h,w) f32   rows (H), columns (W) taps
// accumulate_maps: a warp sums one chunk of maps for one row of 32 V columns and all s -> partial sums (chunks,S,H,W); with a
// single chunk, into total. add_partials: adds the chunks, always in the same order. No atomics: every run gives the same bits.
#include "common.cuh"

constexpr int SCORES = 3;  // sums held in registers together

template <int V>
__device__ inline void sum_strips(StripMemory<V>* shared, const float* scores, const float* activations, const Tap* rows,
                                  const Tap* columns, const float* extremes, float* total, float* partial, int count,
                                  int maps, int height, int width, int h, int w, int gate, int maps_per_chunk,
                                  int chunks) {
    const int plane = height * width, across = (width - 1) / Strip<V>::COLUMNS + 1;
    const unsigned tasks = static_cast<unsigned>(across) * height;
    const bool same_size = h == height && w == width;
    for (unsigned task = blockIdx.x * WARPS + threadIdx.x / WARP; task < tasks; task += gridDim.x * WARPS) {
        const int y = static_cast<int>(task / across), left = static_cast<int>(task % across) * Strip<V>::COLUMNS;
        const Strip<V> strip(shared, rows, columns, y, left, width);
        const bool inside = strip.inside();
        const int at = y * width + strip.x;
        for (int chunk = blockIdx.y; chunk < chunks; chunk += gridDim.y) {
            const int start = chunk * maps_per_chunk;  // chunks are as few as the maps need: no overflow
            const int end = maps - start > maps_per_chunk ? start + maps_per_chunk : maps;
            for (int first = 0; first < count; first += SCORES) {
                float sums[SCORES][V] = {};
                for (int k = start; k < end; ++k) {
                    float gates[V];
                    if (same_size) {
                        if (inside) load(activations + static_cast<long long>(k) * (h * w) + at, gates);
                    } else {
                        strip.resize(activations + static_cast<long long>(k) * (h * w), w, gates);
                    }
                    if (!inside) continue;
                    open_gates(gates, gate, extremes + 2ll * k);
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
                            float* sum = total + static_cast<long long>(first + s) * plane + at;
                            float before[V];
                            load(sum, before);
#pragma unroll
                            for (int j = 0; j < V; ++j) sums[s][j] += before[j];
                            store(sum, sums[s]);
                        } else {
                            store(partial + (static_cast<long long>(chunk) * count + first + s) * plane + at, sums[s]);
                        }
                    }
            }
        }
    }
}

#define ACCUMULATE_MAPS(name, V)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                             \
        name(const float* scores, const float* activations, const Tap* rows, const Tap* columns, const float* extremes,  \
             float* total, float* partial, int count, int maps, int height, int width, int h, int w, int gate,           \
             int maps_per_chunk, int chunks) {                                                                           \
        SHARED(StripMemory<V>, shared, WARPS);                                                                           \
        sum_strips<V>(shared, scores, activations, rows, columns, extremes,                                              \
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
