// Per row: clamp the positive entries at their own percentile T, then rescale them linearly to [low, high]; the rest is 0.
//   T = v[r] + (v[r+1] - v[r]) t of the sorted positive entries v,  r + t = quantile (n - 1)
//   result = low + (min(x, T) - v[0]) / (T - v[0]) (high - low);  `high` where quantile is 0 or T = v[0]
// rows (R,L) f32 -> result (R,L) f32. Infinity is allowed. A NaN makes its whole row NaN and sets *fault.
//
// Positive floats have the same order as their bits, so v[r] is found without sorting: digit by digit (11, 10, 10 bits), from
// histograms.
// winsorize_short: one block per row, the row held in shared memory: read once, written once.
// winsorize_reset, winsorize_count three times, winsorize_write: many blocks per row; the last block to finish a row picks its
// digit.
#include "common.cuh"

typedef unsigned long long Count;

constexpr int BINS = 2048;
constexpr int DIGITS = 3;
constexpr unsigned NONE = 0xffffffffu;  // above the bits of every positive float

__device__ inline int digit_shift(int digit) { return digit == 0 ? 20 : digit == 1 ? 10 : 0; }
__device__ inline int digit_bits(int digit) { return digit == 0 ? 11 : 10; }

// The bits of a positive float; 0 if it is not positive.
__device__ inline unsigned key_of(float value) { return value > 0.0f ? __float_as_uint(value) : 0u; }

__device__ inline bool starts_with(unsigned key, unsigned prefix, int digit) {
    return digit == 0 || key >> (digit_shift(digit) + digit_bits(digit)) == prefix;
}

__device__ inline unsigned digit_of(unsigned key, int digit) {
    return key >> digit_shift(digit) & ((1u << digit_bits(digit)) - 1);
}

// The constants that clamp and rescale one row.
struct Clamp {
    float minimum, limit;               // what is above, and so at the threshold or beyond, becomes `high`
    float unit_first, unit_second;      // powers of two that bring the span to [1/2, 1)
    float scale;
    int equal;                          // all positive entries become `high`
};

__device__ inline Clamp make_clamp(unsigned minimum_key, unsigned first_key, unsigned second_key, double fraction,
                                   double quantile, float low, float high) {
    const double minimum = __uint_as_float(minimum_key);
    const double first = __uint_as_float(first_key), second = __uint_as_float(second_key);
    double threshold = first;
    if (fraction > 0.0 && second_key != first_key) threshold = first + (second - first) * fraction;
    Clamp clamp = {__uint_as_float(minimum_key), 0.0f, 1.0f, 1.0f, 0.0f, 0};
    const double span = threshold - minimum;
    clamp.equal = quantile == 0.0 || !(span > 0.0);
    if (clamp.equal) return clamp;
    if (isinf(threshold)) {  // finite entries are at `low`, infinitely far below
        clamp.limit = 3.402823466e+38f;
        return clamp;
    }
    clamp.limit = static_cast<float>(threshold);
    if (clamp.limit >= threshold) clamp.limit = nextafterf(clamp.limit, 0.0f);
    int exponent;
    const double mantissa = frexp(span, &exponent);
    clamp.unit_first = ldexpf(1.0f, -exponent / 2);
    clamp.unit_second = ldexpf(1.0f, -exponent - -exponent / 2);
    clamp.scale = static_cast<float>((static_cast<double>(high) - low) / mantissa);
    return clamp;
}

__device__ inline float winsorized(float value, const Clamp& clamp, float low, float high) {
    if (!(value > 0.0f)) return 0.0f;
    if (clamp.equal || value > clamp.limit) return high;
    return low + (value - clamp.minimum) * clamp.unit_first * clamp.unit_second * clamp.scale;
}

struct Digit {
    unsigned value, inside;  // inside: how many keys share it
    Count rank;              // among those
};

// The bin of the rank-th (from 0) of the counted keys. Called by one warp; all its lanes get the answer.
__device__ inline Digit pick_digit(const unsigned* histogram, int bins, Count rank) {
    const int lane = threadIdx.x % WARP;
    int begin = 0;
    for (int share = bins / WARP;; share /= WARP) {  // bins of a lane: 64 or 32 of all, then 2 or 1 of those
        Count mine = 0;
        for (int i = 0; i < share; ++i) mine += histogram[begin + lane * share + (i + lane) % share];  // no bank twice
        Count upto = mine;
        for (int distance = 1; distance < WARP; distance *= 2) {
            const Count below = __shfl_up_sync(ALL_LANES, upto, distance);
            if (lane >= distance) upto += below;
        }
        const int holder = __ffs(__ballot_sync(ALL_LANES, rank >= upto - mine && rank < upto)) - 1;
        rank -= __shfl_sync(ALL_LANES, upto - mine, holder);
        begin += holder * share;
        if (share >= WARP) continue;
        while (rank >= histogram[begin]) rank -= histogram[begin++];
        return {static_cast<unsigned>(begin), histogram[begin], rank};
    }
}

// ---- one block per row

extern "C" __global__ void __launch_bounds__(1024)
    winsorize_short(const float* rows, float* result, int* fault, int count, int length, double quantile, float low,
                    float high) {
    DYNAMIC_SHARED(float, row);  // length
    SHARED(unsigned, histogram, BINS);
    SHARED(unsigned, warps, WARP);
    SHARED(Digit, found, 1);
    SHARED(Clamp, clamp, 1);
    for (long long r = blockIdx.x; r < count; r += gridDim.x) {
        const float* from = rows + r * length;
        float* to = result + r * length;
        unsigned positive = 0, minimum = NONE, broken = 0;
#pragma unroll 4
        for (int i = threadIdx.x; i < length; i += blockDim.x) {
            const float value = from[i];
            row[i] = value;
            broken |= value != value;
            const unsigned key = key_of(value);
            positive += key != 0;
            if (key != 0 && key < minimum) minimum = key;
        }
        positive = reduce_block(positive, warps, Plus());
        minimum = reduce_block(minimum, warps, Least());
        broken = reduce_block(broken, warps, Greatest());
        if (broken || positive == 0) {
            if (broken && threadIdx.x == 0) *fault = 1;
            for (int i = threadIdx.x; i < length; i += blockDim.x) to[i] = broken ? NAN : 0.0f;
            continue;
        }
        const double position = quantile * (positive - 1);
        unsigned prefix = 0, inside = 0;
        Count rank = static_cast<Count>(position);
        for (int digit = 0; digit < DIGITS; ++digit) {
            const int bins = 1 << digit_bits(digit);
            for (int i = threadIdx.x; i < bins; i += blockDim.x) histogram[i] = 0;
            __syncthreads();
            for (int i = threadIdx.x; i < length; i += blockDim.x) {
                const unsigned key = key_of(row[i]);
                if (key != 0 && starts_with(key, prefix, digit)) atomicAdd(&histogram[digit_of(key, digit)], 1u);
            }
            __syncthreads();
            if (threadIdx.x < WARP) {
                const Digit picked = pick_digit(histogram, bins, rank);
                if (threadIdx.x == 0) found[0] = picked;
            }
            __syncthreads();
            prefix = prefix << digit_bits(digit) | found[0].value;
            rank = found[0].rank;
            inside = found[0].inside;
        }
        unsigned above = prefix;
        if (rank + 1 >= inside) {  // the next in order is greater
            above = NONE;
            for (int i = threadIdx.x; i < length; i += blockDim.x) {
                const unsigned key = key_of(row[i]);
                if (key > prefix && key < above) above = key;
            }
            above = reduce_block(above, warps, Least());
            if (above == NONE) above = prefix;
        }
        if (threadIdx.x == 0)
            clamp[0] = make_clamp(minimum, prefix, above, position - floor(position), quantile, low, high);
        __syncthreads();
        const Clamp clamped = clamp[0];
        for (int i = threadIdx.x; i < length; i += blockDim.x) to[i] = winsorized(row[i], clamped, low, high);
        __syncthreads();  // before the next row overwrites the shared memory
    }
}

// ---- many blocks per row

struct RowState {
    unsigned histogram[BINS];
    Count positive, rank;
    double fraction;
    unsigned minimum, prefix, inside, above, finished;
    int broken;
    Clamp clamp;
};

static_assert(sizeof(RowState) == 8264, "ROW_STATE_BYTES in operations/winsorize.py");

extern "C" __global__ void __launch_bounds__(THREADS) winsorize_reset(RowState* states, int count) {
    for (long long r = blockIdx.x; r < count; r += gridDim.x) {
        RowState& state = states[r];
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) state.histogram[i] = 0;
        if (threadIdx.x == 0) {
            state.positive = state.rank = 0;
            state.fraction = 0.0;
            state.minimum = state.above = NONE;
            state.prefix = state.inside = state.finished = 0;
            state.broken = 0;
        }
    }
}

__device__ inline bool settled(const RowState& state) { return state.broken || state.positive == 0; }

// A block counts `share` entries of a row; V entries are loaded together.
template <int V>
__device__ inline void count_digit(const float* rows, RowState* states, int* fault, int count, long long length,
                                   long long share, int digit, double quantile, float low, float high) {
    SHARED(unsigned, histogram, BINS);
    SHARED(unsigned, warps, WARP);
    SHARED(int, last, 1);
    const int bins = 1 << digit_bits(digit);
    for (long long r = blockIdx.y; r < count; r += gridDim.y) {
        RowState& state = states[r];
        if (digit > 0 && settled(state)) continue;  // no other block writes these two any more
        const float* row = rows + r * length;
        const unsigned prefix = state.prefix;
        for (int i = threadIdx.x; i < bins; i += blockDim.x) histogram[i] = 0;
        __syncthreads();
        unsigned positive = 0, minimum = NONE, above = NONE, broken = 0;
        for (long long start = blockIdx.x * share; start < length; start += gridDim.x * share) {
            const long long end = start + share < length ? start + share : length;
            for (long long i = start + threadIdx.x * V; i < end; i += blockDim.x * V) {
                float values[V];
                load(row + i, values);
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    broken |= values[j] != values[j];
                    const unsigned key = key_of(values[j]);
                    if (key == 0) continue;
                    ++positive;
                    if (key < minimum) minimum = key;
                    if (starts_with(key, prefix, digit))
                        atomicAdd(&histogram[digit_of(key, digit)], 1u);
                    else if (key >> digit_bits(digit) > prefix && key < above)  // read after the last digit alone
                        above = key;
                }
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < bins; i += blockDim.x)
            if (histogram[i] != 0) atomicAdd(&state.histogram[i], histogram[i]);
        if (digit == 0) {
            positive = reduce_block(positive, warps, Plus());
            minimum = reduce_block(minimum, warps, Least());
            broken = reduce_block(broken, warps, Greatest());
            if (threadIdx.x == 0) {
                atomicAdd(&state.positive, static_cast<Count>(positive));
                atomicMin(&state.minimum, minimum);
                if (broken) state.broken = *fault = 1;
            }
        }
        if (digit == DIGITS - 1) {
            above = reduce_block(above, warps, Least());
            if (threadIdx.x == 0) atomicMin(&state.above, above);
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) last[0] = atomicAdd(&state.finished, 1u) == gridDim.x - 1;
        __syncthreads();
        if (last[0]) {  // every other block's counts are in place
            __threadfence();
            volatile RowState& all = state;
            for (int i = threadIdx.x; i < bins; i += blockDim.x) {
                histogram[i] = all.histogram[i];
                state.histogram[i] = 0;  // for the next digit
            }
            __syncthreads();
            if (!(digit == 0 && (all.broken || all.positive == 0)) && threadIdx.x < WARP) {
                Count rank = all.rank;
                double fraction = all.fraction;
                if (digit == 0) {
                    const double position = quantile * (all.positive - 1);
                    rank = static_cast<Count>(position);
                    fraction = position - floor(position);
                }
                const Digit picked = pick_digit(histogram, bins, rank);
                if (threadIdx.x == 0) {
                    state.fraction = fraction;
                    state.rank = picked.rank;
                    state.inside = picked.inside;
                    state.prefix = prefix << digit_bits(digit) | picked.value;
                }
                if (digit == DIGITS - 1) {
                    unsigned next = all.above;  // the next key in order: here, a greater digit, or a greater prefix
                    if (picked.rank + 1 < picked.inside) {
                        next = prefix << digit_bits(digit) | picked.value;
                    } else {
                        for (int i = picked.value + 1 + threadIdx.x; i < bins; i += WARP)
                            if (histogram[i] != 0) {
                                next = prefix << digit_bits(digit) | i;
                                break;
                            }
                        next = reduce_warp(next, Least());
                    }
                    if (threadIdx.x == 0) {
                        const unsigned here = prefix << digit_bits(digit) | picked.value;
                        state.clamp = make_clamp(all.minimum, here, next == NONE ? here : next, fraction, quantile, low,
                                                 high);
                    }
                }
            }
            if (threadIdx.x == 0) state.finished = 0;
        }
        __syncthreads();  // before the next row overwrites the shared memory
    }
}

template <int V>
__device__ inline void write_rows(const float* rows, float* result, const RowState* states, int count, long long length,
                                  float low, float high) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x * V;
    for (long long r = blockIdx.y; r < count; r += gridDim.y) {
        const RowState& state = states[r];
        const Clamp clamp = state.clamp;
        const bool broken = state.broken, none = state.positive == 0;
        for (long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < length; i += stride) {
            float values[V];
            load(rows + r * length + i, values);
#pragma unroll
            for (int j = 0; j < V; ++j)
                values[j] = broken ? NAN : none ? 0.0f : winsorized(values[j], clamp, low, high);
            store(result + r * length + i, values);
        }
    }
}

#define WINSORIZE_LONG(suffix, V)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
        winsorize_count##suffix(const float* rows, RowState* states, int* fault, int count, long long length,            \
                                long long share, int digit, double quantile, float low, float high) {                    \
        count_digit<V>(rows, states, fault, count, length, share, digit, quantile, low, high);                           \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
        winsorize_write##suffix(const float* rows, float* result, const RowState* states, int count, long long length,   \
                                float low, float high) {                                                                 \
        write_rows<V>(rows, result, states, count, length, low, high);                                                   \
    }

WINSORIZE_LONG(, 1)
WINSORIZE_LONG(_wide, 4)
