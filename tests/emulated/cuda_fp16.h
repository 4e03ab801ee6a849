// Stands in for CUDA's header where the kernels are compiled for the host.
#pragma once
struct __half {
    _Float16 value;
};
struct __half2 {
    __half x, y;
};
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
