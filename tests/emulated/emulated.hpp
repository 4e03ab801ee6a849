// As much of CUDA as the kernels use, on the host: blocks run one after another, the threads of a block are fibres that take
// turns at barriers and shuffles; a seed decides both orders. Shared memory is new for every block, filled with NaN and of its
// exact size, so that the sanitizers see what runs over it and a missing barrier shows in the numbers.
#pragma once
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define SHARED(type, name, count) type* const name = static_cast<type*>(emulated::shared(__COUNTER__, sizeof(type) * (count)))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(emulated::shared(-1, emulated::dynamic_bytes))

struct Index {
    unsigned x = 1, y = 1, z = 1;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
using std::isinf;

namespace emulated {

constexpr std::size_t STACK = 256 * 1024, STATIC_LIMIT = 48 * 1024;
enum class Waits { NOT, FOR_BLOCK, FOR_WARP, DONE };

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    void* fake_stack = nullptr;
    Waits waits = Waits::NOT;
    int line = 0;
    unsigned char slots[2][16];  // of shuffles, in turns: one is read while the next is written
    unsigned exchanges = 0;
};

inline std::vector<std::unique_ptr<Fibre>> fibres;
inline ucontext_t scheduler;
inline void* scheduler_fake_stack;
inline const void* scheduler_stack;
inline std::size_t scheduler_size;
inline unsigned running;
inline std::function<void()> kernel;
inline std::map<int, std::unique_ptr<char[]>> shared_memory;
inline std::size_t dynamic_bytes, static_bytes;

[[noreturn]] inline void fail(const char* what, int line) {
    std::fprintf(stderr, "emulated: %s, line %d\n", what, line);
    std::fflush(stderr);
    std::abort();
}

inline void* shared(int key, std::size_t bytes) {
    auto& memory = shared_memory[key];
    if (!memory) {
        memory.reset(new char[bytes]);
        std::memset(memory.get(), 0xff, bytes);
        if (key >= 0 && (static_bytes += bytes) > STATIC_LIMIT) fail("more than 48 KiB of static shared memory", key);
    }
    return memory.get();
}

inline void wait(Waits what, int line) {
    Fibre& self = *fibres[running];
    self.waits = what;
    self.line = line;
    __sanitizer_start_switch_fiber(&self.fake_stack, scheduler_stack, scheduler_size);
    swapcontext(&self.context, &scheduler);
    __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
}

inline void enter() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
    kernel();
    fibres[running]->waits = Waits::DONE;
    __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_size);
    swapcontext(&fibres[running]->context, &scheduler);
}

inline void resume(unsigned thread) {
    Fibre& fibre = *fibres[thread];
    fibre.waits = Waits::NOT;
    running = thread;
    threadIdx = {thread, 0, 0};
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fibre.stack.get(), STACK);
    swapcontext(&scheduler, &fibre.context);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

// Of threads [first, last): whether all that are not done wait for `what`, at one line.
inline bool together(unsigned first, unsigned last, Waits what) {
    int line = 0;
    for (unsigned i = first; i < last; ++i) {
        if (fibres[i]->waits == Waits::DONE) continue;
        if (fibres[i]->waits != what) return false;
        if (line != 0 && line != fibres[i]->line) fail("threads wait at different barriers", line);
        line = fibres[i]->line;
    }
    return line != 0;
}

inline void run_block(const std::vector<unsigned>& order) {
    const unsigned threads = blockDim.x;
    shared_memory.clear();
    static_bytes = 0;
    while (fibres.size() < threads) fibres.push_back(std::make_unique<Fibre>());
    for (unsigned i = 0; i < threads; ++i) {
        Fibre& fibre = *fibres[i];
        fibre.waits = Waits::NOT;
        fibre.exchanges = 0;
        getcontext(&fibre.context);
        fibre.context.uc_stack = {fibre.stack.get(), 0, STACK};
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, enter, 0);
    }
    std::vector<bool> ready(threads, true);
    for (bool going = true; going;) {
        for (unsigned i : order)
            if (ready[i]) resume(i);
        std::fill(ready.begin(), ready.end(), false);
        going = false;
        for (unsigned first = 0; first < threads; first += 32)
            if (together(first, first + 32, Waits::FOR_WARP)) {
                for (unsigned i = first; i < first + 32; ++i) ready[i] = fibres[i]->waits != Waits::DONE;
                going = true;
            }
        if (going) continue;
        if (together(0, threads, Waits::FOR_BLOCK)) {
            for (unsigned i = 0; i < threads; ++i) ready[i] = fibres[i]->waits != Waits::DONE;
            going = true;
            continue;
        }
        for (unsigned i = 0; i < threads; ++i)
            if (fibres[i]->waits != Waits::DONE) fail("a thread waits for others that never come", fibres[i]->line);
    }
}

inline void launch(Index grid, unsigned threads, std::size_t dynamic, unsigned seed, std::function<void()> body) {
    if (threads == 0 || threads > 1024 || threads % 32 != 0) fail("a block is of 1 to 32 whole warps", threads);
    if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535) fail("the grid does not fit", grid.y);
    gridDim = grid;
    blockDim = {threads, 1, 1};
    dynamic_bytes = dynamic;
    kernel = std::move(body);
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    std::mt19937 random(seed);
    if (seed == 1) std::reverse(order.begin(), order.end());
    std::vector<std::uint64_t> blocks(static_cast<std::uint64_t>(grid.x) * grid.y);
    std::iota(blocks.begin(), blocks.end(), std::uint64_t{0});
    if (seed == 1) std::reverse(blocks.begin(), blocks.end());
    if (seed > 1) std::shuffle(blocks.begin(), blocks.end(), random);
    for (const std::uint64_t block : blocks) {
        blockIdx = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x), 0};
        if (seed > 1) std::shuffle(order.begin(), order.end(), random);
        run_block(order);
    }
}

// Shows a value to the warp; returns the turn in which the others' are to be read.
template <typename T>
unsigned show(T value, int line) {
    static_assert(sizeof(T) <= sizeof(Fibre::slots[0]));
    const unsigned turn = fibres[running]->exchanges++ % 2;
    std::memcpy(fibres[running]->slots[turn], &value, sizeof(T));
    wait(Waits::FOR_WARP, line);
    return turn;
}

template <typename T>
T exchange(T value, unsigned source, int line) {
    const unsigned turn = show(value, line);
    T other;
    std::memcpy(&other, fibres[running / 32 * 32 + source]->slots[turn], sizeof(T));
    return other;
}

inline unsigned ballot(bool vote, int line) {
    const unsigned turn = show(vote, line);
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i) votes |= static_cast<unsigned>(fibres[running / 32 * 32 + i]->slots[turn][0]) << i;
    return votes;
}

}  // namespace emulated

#define __syncthreads() emulated::wait(emulated::Waits::FOR_BLOCK, __LINE__)
#define __syncwarp() emulated::wait(emulated::Waits::FOR_WARP, __LINE__)
#define __threadfence() ((void)0)
#define __shfl_sync(mask, value, source) emulated::exchange(value, static_cast<unsigned>(source) % 32, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) emulated::exchange(value, (emulated::running % 32) ^ (lanes), __LINE__)
#define __shfl_up_sync(mask, value, lanes) \
    emulated::exchange(value, std::max(static_cast<int>(emulated::running % 32) - (lanes), 0), __LINE__)
#define __ballot_sync(mask, vote) emulated::ballot(vote, __LINE__)

template <typename T>
T atomicAdd(T* at, T value) {
    const T before = *at;
    *at += value;
    return before;
}
template <typename T>
T atomicMin(T* at, T value) {
    const T before = *at;
    *at = std::min(before, value);
    return before;
}
