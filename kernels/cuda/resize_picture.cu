// From a picture to the network's input, bit by bit as Pillow resizes it: one axis, then the other, each rounded to 8 bits, with
// weights in fixed point; then (pixel / 255 - mean) / std.
// resize_axis: from (outer,size,inner) u8 -> to (outer,target,inner) u8; columns: outer H, inner C; rows: outer 1, inner W C
// normalize_picture: pixels (h,w,C) u8 -> image (C,h,w) f32. One thread per number.
// spans: where each position's source positions begin, how many they are, and where their weights lie
#include "common.cuh"

constexpr int FRACTION_BITS = 22;  // of the weights

struct Span {
    int first, count, weights;
};

extern "C" __global__ void __launch_bounds__(THREADS)
    resize_axis(const unsigned char* from, const Span* spans, const int* weights, unsigned char* to, long long count,
                int size, int target, int inner) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        const long long outer = i / inner / target;
        const Span span = spans[i / inner % target];
        const unsigned char* source = from + (outer * size + span.first) * inner + i % inner;
        int sum = 1 << (FRACTION_BITS - 1);
        for (int n = 0; n < span.count; ++n)
            sum += source[static_cast<long long>(n) * inner] * weights[span.weights + n];
        const int value = sum >> FRACTION_BITS;
        to[i] = static_cast<unsigned char>(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    normalize_picture(const unsigned char* pixels, const float* mean, const float* std, float* image, long long plane,
                      int channels) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < plane * channels; i += stride) {
        const int c = static_cast<int>(i / plane);
        const float value = static_cast<float>(pixels[i % plane * channels + c]);
        image[i] = (value / 255.0f - mean[c]) / std[c];
    }
}
