// What the kernels share: positions of a resize, gates, reductions over a block, access to neighbours at once.
#pragma once
#include <cuda_fp16.h>

#ifndef SHARED  // the tests' emulation brings its own
#define SHARED(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(type, name)                     \
    extern __shared__ __align__(16) char name##_raw[]; \
    type* name = reinterpret_cast<type*>(name##_raw)
#endif

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

constexpr int THREADS = 256;  // of most blocks, in gpu/queue.py too
constexpr int WARPS = THREADS / WARP;

enum Gate { TANH, SIGMOID_RELU, MINMAX, IDENTITY };  // in operations/gates.py: GATES

// ---- resizing

// The source of one position of a resized axis: (1 - weight) source[low] + weight source[high]. resize_taps in
// operations/resizing.py makes the tables of taps, one for each pair of sizes.
struct Tap {
    int low, high;
    float weight;
};

// Interpolates. A neighbour with weight 0 has no influence, and two equal values give exactly that value: otherwise min-max
// scaling would turn the rounding errors of a constant map into a full-range map.
__device__ inline float between(float first, float second, float weight) {
    return weight == 0.0f || first == second ? first : fmaf(weight, second, (1.0f - weight) * first);
}

// The source positions that `used` adjacent taps read: a contiguous range, or, if that is longer, two for each tap.
struct Sources {
    int first, count;
    bool contiguous;
};

__device__ inline Sources sources_of(const Tap* taps, int used) {
    const int reach = taps[used - 1].high - taps[0].low + 1;
    Sources sources = {taps[0].low, 2 * used, false};
    if (reach <= 2 * used) sources = {taps[0].low, reach, true};
    return sources;
}

__device__ inline int source(const Sources& sources, const Tap* taps, int i) {
    if (sources.contiguous) return sources.first + i;
    return i % 2 ? taps[i / 2].high : taps[i / 2].low;
}

__device__ inline int place(const Sources& sources, const Tap* taps, int tap, bool high) {
    if (sources.contiguous) return (high ? taps[tap].high : taps[tap].low) - sources.first;
    return 2 * tap + high;
}

// Shared memory of a warp's strip. Each lane reads only the places and weights that it wrote: they would need too many
// registers.
template <int V>
struct StripMemory {
    static constexpr int COLUMNS = WARP * V;
    float row[2 * COLUMNS];    // of a map, resized along the columns
    unsigned places[COLUMNS];  // in `row`: of the lower neighbour, and, 16 bits higher, of the upper one
    float weights[COLUMNS];
};

// A warp's part of resized maps: a row of 32 V columns, V adjacent columns for each lane. Rows are resized first, once for
// all lanes, into shared memory; then columns.
template <int V>
struct Strip {
    static constexpr int COLUMNS = StripMemory<V>::COLUMNS;

    StripMemory<V>* memory;  // the warp's
    int x, columns;          // the lane's first column; how many the warp has
    Tap row;
    const Tap* taps;
    Sources sources;

    __device__ Strip(StripMemory<V>* shared, const Tap* rows, const Tap* all_columns, int y, int left, int width) {
        const int lane = threadIdx.x % WARP;
        memory = shared + threadIdx.x / WARP;
        x = left + lane * V;
        columns = width - left < COLUMNS ? width - left : COLUMNS;
        row = rows[y];
        taps = all_columns + left;
        sources = sources_of(taps, columns);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const int tap = lane * V + j < columns ? lane * V + j : columns - 1;
            const unsigned low = place(sources, taps, tap, false), high = place(sources, taps, tap, true);
            memory->places[lane * V + j] = low | high << 16;
            memory->weights[lane * V + j] = taps[tap].weight;
        }
    }

    // Whether the lane has columns; it then has all V of them, since V divides the width.
    __device__ bool inside() const { return static_cast<int>(threadIdx.x % WARP) * V < columns; }

    // The whole warp calls it.
    __device__ void resize(const float* map, int w, float (&values)[V]) const {
        const float* upper = map + static_cast<long long>(row.low) * w;
        const float* lower = map + static_cast<long long>(row.high) * w;
        const int lane = threadIdx.x % WARP;
        for (int i = lane; i < sources.count; i += WARP) {
            const int column = source(sources, taps, i);
            memory->row[i] = row.weight == 0.0f ? upper[column] : between(upper[column], lower[column], row.weight);
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const unsigned places = memory->places[lane * V + j];
            values[j] = between(memory->row[places & 0xffff], memory->row[places >> 16], memory->weights[lane * V + j]);
        }
        __syncwarp();  // before the next map overwrites it
    }
};

// ---- gates

// (value - low) / (high - low); 0 if high = low; NaN if an argument is NaN. All are halved if high - low overflows.
__device__ inline float scaled(float value, float low, float high) {
    const float half = isinf(high - low) ? 0.5f : 1.0f;
    const float span = high * half - low * half;
    const float above = value * half - low * half;
    return span > 0.0f ? above / span : above;
}

// In place. extremes: lowest and highest value of the resized map, read by MINMAX alone.
template <int V>
__device__ inline void open_gates(float (&values)[V], int gate, const float* extremes) {
    if (gate == TANH) {
#pragma unroll
        for (int j = 0; j < V; ++j) values[j] = tanhf(values[j]);
    } else if (gate == SIGMOID_RELU) {
#pragma unroll
        for (int j = 0; j < V; ++j) values[j] = 1.0f / (1.0f + expf(values[j] < 0.0f ? 0.0f : -0.5f * values[j]));
    } else if (gate == MINMAX) {
        const float low = extremes[0], high = extremes[1];
#pragma unroll
        for (int j = 0; j < V; ++j) values[j] = scaled(values[j], low, high);
    }
}

// ---- access to V neighbours at once, which must be aligned to their size; V = 1 for arrays that are not

template <int V>
__device__ inline void load(const float* from, float (&values)[V]) {
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int j = 0; j < V; j += 4) {
            const float4 four = *reinterpret_cast<const float4*>(from + j);
            values[j] = four.x, values[j + 1] = four.y, values[j + 2] = four.z, values[j + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int j = 0; j < V; ++j) values[j] = from[j];
    }
}

template <int V>
__device__ inline void store(float* to, const float (&values)[V]) {
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int j = 0; j < V; j += 4)
            *reinterpret_cast<float4*>(to + j) = make_float4(values[j], values[j + 1], values[j + 2], values[j + 3]);
    } else {
#pragma unroll
        for (int j = 0; j < V; ++j) to[j] = values[j];
    }
}

template <int V>
__device__ inline void store(__half* to, const float (&values)[V]) {
    if constexpr (V == 4) {
        union {
            __half2 pairs[2];
            uint2 bytes;
        } packed;
#pragma unroll
        for (int j = 0; j < 2; ++j) packed.pairs[j] = __floats2half2_rn(values[2 * j], values[2 * j + 1]);
        *reinterpret_cast<uint2*>(to) = packed.bytes;
    } else {
#pragma unroll
        for (int j = 0; j < V; ++j) to[j] = __float2half_rn(values[j]);
    }
}

// ---- reductions over a warp, and over a block of whole warps; every thread gets the result

struct Least {  // of floats with a NaN among them: NaN, as NumPy has it
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return b < a || b != b ? b : a;
    }
};
struct Greatest {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a < b || b != b ? b : a;
    }
};
struct Plus {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};

template <typename T, typename Operation>
__device__ inline T reduce_warp(T value, Operation join) {
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value = join(value, __shfl_xor_sync(ALL_LANES, value, distance));
    return value;
}

// shared: one place per warp, free for reuse after the call
template <typename T, typename Operation>
__device__ inline T reduce_block(T value, T* shared, Operation join) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    value = reduce_warp(value, join);
    if (lane == 0) shared[warp] = value;
    __syncthreads();
    value = shared[0];
    for (int i = 1; i < warps; ++i) value = join(value, shared[i]);
    __syncthreads();
    return value;
}
