// importance[b,l] = ReLU(aggregate_k alphas[b,k]), relative[b,l] = aggregate_k / mean_k |alphas[b,k]|, k over the channels
// of layer l, infinite where all alphas are 0
// alphas (B, sum K) f32   offsets (L+1) i32, where each layer's channels begin   zero (L) f64
//   -> importance (B,L) f32   relative (B,L) f32
// kind: 0 mean (0 where |mean| <= zero[l] mean |alpha|), 1 max, 2 min, 3 absmean, 4 absmax, 5 l2; all are 0 where
// zero[l] >= 2. One block per image and layer; sums in float64. The results are NaN if an alpha is NaN.
#include "common.cuh"

enum Aggregation { MEAN, MAX, MIN, ABSMEAN, ABSMAX, L2 };

extern "C" __global__ void __launch_bounds__(THREADS)
    layer_importance(const float* alphas, const int* offsets, const double* zero, float* importance, float* relative,
                     int images, int layers, int kind) {
    SHARED(double, sums, WARP);
    SHARED(float, extremes, WARP);
    const long long width = offsets[layers], tasks = static_cast<long long>(images) * layers;
    for (long long task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int layer = static_cast<int>(task % layers), begin = offsets[layer], end = offsets[layer + 1];
        const float* row = alphas + task / layers * width;
        double sum = 0, magnitude = 0, squares = 0;
        float most = -INFINITY, least = INFINITY;
        for (int k = begin + threadIdx.x; k < end; k += blockDim.x) {
            const float value = row[k];
            sum += value;
            magnitude += fabsf(value);
            squares += static_cast<double>(value) * value;
            most = Greatest()(most, value);
            least = Least()(least, value);
        }
        sum = reduce_block(sum, sums, Plus());
        magnitude = reduce_block(magnitude, sums, Plus());
        squares = reduce_block(squares, sums, Plus());
        most = reduce_block(most, extremes, Greatest());
        least = reduce_block(least, extremes, Least());
        if (threadIdx.x != 0) continue;
        const int channels = end - begin;
        double found = 0;
        if (kind == MEAN) found = sum / channels;
        if (kind == MAX) found = most;
        if (kind == MIN) found = least;
        if (kind == ABSMEAN) found = magnitude / channels;
        if (kind == ABSMAX) found = Greatest()(most, -least);
        if (kind == L2) found = sqrt(squares);
        relative[task] = static_cast<float>(magnitude == 0 ? INFINITY : found * channels / magnitude);
        const bool cancelled = zero[layer] >= 2 || (kind == MEAN && fabs(sum) <= zero[layer] * magnitude);
        if (cancelled && magnitude == magnitude) found = 0;  // NaN stays
        importance[task] = static_cast<float>(found < 0 ? 0 : found);
    }
}
