// scores[s,n] = weights[n] (sum_c seeds[s,c] p[n,c] - offset[s]), p = softmax or sigmoid of the logits, or the logits
// logits (N,C) f32   seeds (S,C) f32   offset (S) f32 or null   weights (N) f32 or null -> scores (S,N) f32
// kind: 0 softmax, 1 sigmoid, 2 logits. One block per row of logits, all s; sums in float64, as the specification has them.
#include "common.cuh"

enum Probability { SOFTMAX, SIGMOID, LOGITS };

extern "C" __global__ void __launch_bounds__(THREADS)
    class_scores(const float* logits, const float* seeds, const float* offset, const float* weights, float* scores,
                 int rows, int count, int classes, int kind) {
    SHARED(double, sums, WARP);
    SHARED(float, extremes, WARP);
    for (long long n = blockIdx.x; n < rows; n += gridDim.x) {
        const float* row = logits + n * classes;
        float most = 0;
        double total = 1;
        if (kind == SOFTMAX) {
            most = -INFINITY;
            for (int c = threadIdx.x; c < classes; c += blockDim.x) most = Greatest()(most, row[c]);
            most = reduce_block(most, extremes, Greatest());
            total = 0;
            for (int c = threadIdx.x; c < classes; c += blockDim.x)
                total += exp(static_cast<double>(row[c]) - most);
            total = reduce_block(total, sums, Plus());
        }
        for (int s = 0; s < count; ++s) {
            const float* seed = seeds + static_cast<long long>(s) * classes;
            double score = 0;
            for (int c = threadIdx.x; c < classes; c += blockDim.x) {
                if (seed[c] == 0.0f) continue;  // most seeds are of one class
                double value = row[c];
                if (kind == SOFTMAX) value = exp(value - most) / total;
                if (kind == SIGMOID) value = 0.5 * (1 + tanh(value / 2));
                score += seed[c] * value;
            }
            score = reduce_block(score, sums, Plus());
            if (threadIdx.x != 0) continue;
            if (offset != nullptr) score -= offset[s];
            if (weights != nullptr) score *= weights[n];
            scores[static_cast<long long>(s) * rows + n] = static_cast<float>(score);
        }
    }
}
