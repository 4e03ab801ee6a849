// fused[b,y,x] = sum_l weights[b,l] up(up(M_l[b] -> the largest grid) -> (H,W))[y,x],  M_l rectified and min-max scaled
// maps (B, sum h w) f32, layers side by side at offsets[l]   weights (B,L) f32   fused (B,H,W) f32
// taps: of every layer to the largest grid; result_rows (H), result_columns (W): from there to the result
// layer_scales: one block per image and layer. fuse_layers: one block per tile of the result; it sums the layers in shared
// memory, at the positions of the largest grid that its tile reads, then resizes this sum to the tile. One launch each for
// all layers, whatever their sizes. If scales is null, the maps are not rectified and not scaled.
#include "common.cuh"

constexpr int TILE_HEIGHT = 8, TILE_WIDTH = 32;  // in operations/fuse_layers.py: TILE; a thread per pixel
static_assert(TILE_HEIGHT * TILE_WIDTH == THREADS, "a thread per pixel");
constexpr int POINTS = 4 * THREADS;  // at most two rows and two columns per pixel's own

struct Layer {  // in operations/fuse_layers.py: a row of `layers`
    int width, rows, columns;  // of the map; where its taps to the largest grid begin
};

// Min-max scaling of a rectified layer without a division: (x - low) unit inverse. unit is a power of two: with it, the inverse
// of a very small or very large span is still a normal number.
struct Scale {
    float low, unit, inverse;
};

__device__ inline float rectified(float value) { return value < 0.0f ? 0.0f : value; }

extern "C" __global__ void __launch_bounds__(1024)
    layer_scales(const float* maps, const long long* offsets, Scale* scales, int images, int layers) {
    SHARED(float, shared, WARP);
    const long long blocks = static_cast<long long>(images) * layers, total = offsets[layers];
    for (long long i = blockIdx.x; i < blocks; i += gridDim.x) {
        const long long image = i / layers, layer = i % layers;
        const float* map = maps + image * total + offsets[layer];
        const long long length = offsets[layer + 1] - offsets[layer];
        float low = INFINITY, high = -INFINITY;
#pragma unroll 4
        for (long long j = threadIdx.x; j < length; j += blockDim.x) {
            const float value = rectified(map[j]);
            low = Least()(low, value);
            high = Greatest()(high, value);
        }
        low = reduce_block(low, shared, Least());
        high = reduce_block(high, shared, Greatest());
        if (threadIdx.x == 0) {
            const float span = high - low;
            const float unit = span < 0x1p-100f ? 0x1p100f : span > 0x1p100f ? 0x1p-100f : 1.0f;
            scales[i] = {low, unit, span == 0.0f ? 0.0f : 1.0f / (span * unit)};
        }
    }
}

// Sum of layers [start, end) at one position of the largest grid.
__device__ inline float sum_layers(const float* maps, const long long* offsets, const Layer* layers, const Tap* taps,
                                   const float* weights, const Scale* scales, int start, int end, int y, int x) {
    float sum = 0.0f;
#pragma unroll 2
    for (int i = start; i < end; ++i) {
        const Layer layer = layers[i];
        const float weight = weights[i];
        const Tap row = taps[layer.rows + y], column = taps[layer.columns + x];
        const float* low = maps + offsets[i] + static_cast<long long>(row.low) * layer.width;
        const float* high = maps + offsets[i] + static_cast<long long>(row.high) * layer.width;
        float corners[4] = {low[column.low], low[column.high], high[column.low], high[column.high]};
        if (scales != nullptr) {
            const Scale scale = scales[i];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                corners[j] = (rectified(corners[j]) - scale.low) * scale.unit * scale.inverse;
        }
        const float value = between(between(corners[0], corners[1], column.weight),
                                    between(corners[2], corners[3], column.weight), row.weight);
        sum = fmaf(weight, value, sum);
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    fuse_layers(const float* maps, const long long* offsets, const Layer* layers, const Tap* taps, const Tap* result_rows,
                const Tap* result_columns, const float* weights, const Scale* scales, float* fused, int images,
                int count_layers, int height, int width) {
    SHARED(Tap, rows, TILE_HEIGHT);
    SHARED(Tap, columns, TILE_WIDTH);
    SHARED(float, points, POINTS);
    const long long tiles_across = (width - 1) / TILE_WIDTH + 1, tiles_down = (height - 1) / TILE_HEIGHT + 1;
    const long long tiles = tiles_across * tiles_down * images, total = offsets[count_layers];
    for (long long tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const long long image = tile / (tiles_across * tiles_down);
        const int top = static_cast<int>(tile / tiles_across % tiles_down) * TILE_HEIGHT;
        const int left = static_cast<int>(tile % tiles_across) * TILE_WIDTH;
        const int down = height - top < TILE_HEIGHT ? height - top : TILE_HEIGHT;
        const int across = width - left < TILE_WIDTH ? width - left : TILE_WIDTH;
        if (static_cast<int>(threadIdx.x) < down) rows[threadIdx.x] = result_rows[top + threadIdx.x];
        if (static_cast<int>(threadIdx.x) < across)
            columns[threadIdx.x] = result_columns[left + threadIdx.x];
        __syncthreads();
        const Sources from_rows = sources_of(rows, down), from_columns = sources_of(columns, across);
        const int count = from_rows.count * from_columns.count;
        const float* image_maps = maps + image * total;
        const float* image_weights = weights + image * count_layers;
        const Scale* image_scales = scales == nullptr ? nullptr : scales + image * count_layers;
        // where a tile reads few positions, several threads share the layers of one
        int parts = THREADS / count < 1 ? 1 : THREADS / count;
        if (parts > count_layers) parts = count_layers;
        for (int i = threadIdx.x; i < count * parts; i += THREADS) {
            const int part = i / count, point = i % count;
            const int y = source(from_rows, rows, point / from_columns.count);
            const int x = source(from_columns, columns, point % from_columns.count);
            points[i] = sum_layers(image_maps, offsets, layers, taps, image_weights, image_scales,
                                   static_cast<int>(static_cast<long long>(count_layers) * part / parts),
                                   static_cast<int>(static_cast<long long>(count_layers) * (part + 1) / parts), y, x);
        }
        __syncthreads();
        for (int point = threadIdx.x; point < count; point += THREADS)
            for (int part = 1; part < parts; ++part) points[point] += points[part * count + point];
        __syncthreads();
        const int y = threadIdx.x / TILE_WIDTH, x = threadIdx.x % TILE_WIDTH;
        if (y < down && x < across) {
            const float* low = points + place(from_rows, rows, y, false) * from_columns.count;
            const float* high = points + place(from_rows, rows, y, true) * from_columns.count;
            const int first = place(from_columns, columns, x, false), second = place(from_columns, columns, x, true);
            const float weight = columns[x].weight;
            fused[(image * height + top + y) * width + left + x] =
                between(between(low[first], low[second], weight), between(high[first], high[second], weight),
                        rows[y].weight);
        }
        __syncthreads();  // before the next tile overwrites the shared memory
    }
}
