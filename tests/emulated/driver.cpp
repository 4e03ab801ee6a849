// Stands in for libcuda.so.1: the part of the driver API that PyCUDA and camrt use, on the host's memory, with the project's own
// kernels emulated. Nothing runs when it is queued; an order, set by standin_order, decides when it does:
//   eager         at once
//   lazy          when something waits for it, and then only what that needs
//   newest_first  when something waits for anything: all streams, the one that was made last first
//   oldest_first  the other way round
//   random        at random moments, by a seed
// A stream never overtakes an event that it waits for. Memory is NaN where it is new or freed; the target of a queued download is
// NaN until the copy runs; pageable memory is read when the copy runs. Every copy and every pointer that a kernel gets is
// looked up in the allocations, when it is queued and when it runs. What is wrong is a complaint, which the tests read.
// KERNELS_FILE is generated from the sources, as for server.cpp.
#include <cuda.h>
#include <sys/uio.h>
#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "emulated.hpp"

#include KERNELS_FILE

extern "C" {  // this library is loaded into a process without the sanitizers
void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
}

namespace {

constexpr std::size_t SHARED_PER_BLOCK = 99 * 1024, STATIC_SHARED = 9 * 1024;
constexpr unsigned FATBIN = 0xba55ed50;

// ---- one lock over everything; host functions run outside it, since they take Python's lock

std::mutex lock_itself;
std::condition_variable freed;
thread_local int depth = 0;

struct Lock {
    Lock() {
        if (depth++ == 0) lock_itself.lock();
    }
    ~Lock() {
        if (--depth == 0) lock_itself.unlock();
    }
};

void outside(const std::function<void()>& work) {
    const int before = std::exchange(depth, 0);
    lock_itself.unlock();
    work();
    lock_itself.lock();
    depth = before;
}

// ---- complaints, and failures on demand

std::vector<std::string> complaints;
std::map<std::string, std::pair<long, CUresult>> planned;  // function -> which of its next calls fails, and how
std::map<std::string, long> calls;
CUresult sticky = CUDA_SUCCESS;  // after an illegal address, every call fails
bool does_nothing = false;  // nothing that is queued runs: to time the host

// Of new and freed memory: float32 NaN, int32 -1. Where nothing runs, numbers that a network's outputs could be.
void spoil(void* at, std::size_t bytes) {
    std::memset(at, 0xff, bytes);
    if (does_nothing)
        for (std::size_t i = 0; i < bytes / sizeof(float); ++i) static_cast<float*>(at)[i] = 0.5f + 0.001f * (i % 97);
}

CUresult complain(const std::string& what, CUresult code) {
    complaints.push_back(what);
    return code;
}

CUresult entered(const char* function) {
    ++calls[function];
    const auto found = planned.find(function);
    if (found == planned.end() || --found->second.first > 0) return sticky;
    const CUresult code = found->second.second;
    planned.erase(found);
    if (code == CUDA_ERROR_ILLEGAL_ADDRESS || code == CUDA_ERROR_LAUNCH_FAILED) sticky = code;
    return code;
}

// ---- contexts

int retained = 0;
char primary;
thread_local std::vector<CUcontext> current;

#define ENTER                                                             \
    const Lock lock;                                                      \
    if (const CUresult failed = entered(__func__); failed) return failed; \
    if (current.empty()) return complain(std::string(__func__) + ": no context is current", CUDA_ERROR_INVALID_CONTEXT)

// ---- memory

std::map<CUdeviceptr, std::size_t> device_memory, pinned_memory;
std::size_t allocated = 0, total_memory = std::size_t{1} << 33;

bool holds(const std::map<CUdeviceptr, std::size_t>& memory, CUdeviceptr at, std::size_t bytes) {
    auto next = memory.upper_bound(at);
    if (next == memory.begin()) return false;
    --next;
    return at + bytes <= next->first + next->second;
}

bool on_device(CUdeviceptr at, std::size_t bytes) { return holds(device_memory, at, bytes) || holds(pinned_memory, at, bytes); }

bool is_pinned(const void* at, std::size_t bytes) { return holds(pinned_memory, reinterpret_cast<CUdeviceptr>(at), bytes); }

CUresult misplaced(const std::string& what, CUdeviceptr at, std::size_t bytes) {
    sticky = CUDA_ERROR_ILLEGAL_ADDRESS;
    return complain(what + ": " + std::to_string(bytes) + " bytes at " + std::to_string(at) + " are no allocation's", sticky);
}

void* bytes_at(CUdeviceptr at) { return reinterpret_cast<void*>(at); }

// ---- streams and events

struct Stream;
struct Event {
    Stream* stream = nullptr;
    unsigned long recorded = 0, reached = 0;  // how often
};
struct Step {
    std::function<void()> run;  // empty for events
    bool on_host = false;
    Event* event = nullptr;  // that it records, or waits for
    bool waits = false;
    unsigned long turn = 0;  // of the event
};
struct Graph {
    std::vector<Step> steps;
};
struct Stream {
    std::deque<Step> steps;
    bool running = false;  // a host function, on some thread
    Graph* captured = nullptr;
    bool invalid = false;
};

Stream legacy;
std::vector<Stream*> streams{&legacy};  // in the order of their making
std::set<Event*> events;
std::string order = "eager";
std::mt19937 chance;

Stream* stream_of(CUstream handle) {
    return reinterpret_cast<std::uintptr_t>(handle) <= 2 ? &legacy : reinterpret_cast<Stream*>(handle);
}

bool blocked(const Stream* stream) {
    if (stream->steps.empty()) return true;
    const Step& next = stream->steps.front();
    return stream->running || (next.waits && events.count(next.event) && next.event->reached < next.turn);
}

void run_next(Stream* stream) {
    Step step = std::move(stream->steps.front());
    stream->steps.pop_front();
    if (step.run && !does_nothing) {
        if (step.on_host) {
            stream->running = true;
            outside(step.run);
            stream->running = false;
            freed.notify_all();
        } else {
            step.run();
        }
    }
    if (step.event && !step.waits && events.count(step.event))
        step.event->reached = std::max(step.event->reached, step.turn);
}

void wait_while_running(const Stream* stream) {
    while (stream->running) {
        std::unique_lock<std::mutex> held(lock_itself, std::adopt_lock);
        const int before = std::exchange(depth, 0);
        freed.wait(held);
        depth = before;
        held.release();
    }
}

// Runs what the stream needs until `done`.
void finish(Stream* stream, const std::function<bool()>& done) {
    while (!done()) {
        wait_while_running(stream);
        if (done() || stream->steps.empty()) return;
        const Step& next = stream->steps.front();
        if (blocked(stream)) {
            Event* event = next.event;
            const unsigned long turn = next.turn;
            Stream* other = event->stream;
            if (other == nullptr || (other->steps.empty() && !other->running)) event->reached = turn;
            else finish(other, [event, turn] { return !events.count(event) || event->reached >= turn; });
        } else {
            run_next(stream);
        }
    }
}

void advance_all(bool newest_first) {
    for (bool going = true; going;) {
        going = false;
        std::vector<Stream*> turns = streams;
        if (newest_first) std::reverse(turns.begin(), turns.end());
        for (Stream* stream : turns)
            while (!blocked(stream)) run_next(stream), going = true;
    }
}

void before_a_wait() {
    if (order == "newest_first" || order == "oldest_first") advance_all(order == "newest_first");
}

void finish_all() {
    before_a_wait();
    for (Stream* stream : std::vector<Stream*>(streams))
        if (!stream->running) finish(stream, [stream] { return stream->steps.empty(); });
}

void push(Stream* stream, Step step) {
    stream->steps.push_back(std::move(step));
    if (order == "eager") {
        finish(stream, [stream] { return stream->steps.empty(); });
    } else if (order == "random") {
        for (Stream* any : std::vector<Stream*>(streams))
            for (auto steps = chance() % 3; steps > 0 && !blocked(any); --steps) run_next(any);
    }
}

CUresult enqueue(CUstream handle, std::function<void()> run, bool on_host = false) {
    Stream* stream = stream_of(handle);
    Step step;
    step.run = std::move(run);
    step.on_host = on_host;
    if (stream->captured == nullptr) {
        push(stream, std::move(step));
        return CUDA_SUCCESS;
    }
    if (stream->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    stream->captured->steps.push_back(std::move(step));
    return CUDA_SUCCESS;
}

CUresult not_in_capture(Stream* stream, const char* function) {
    stream->invalid = true;
    return complain(std::string(function) + " on a stream that is being captured", CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

// ---- kernels

struct Bound {
    std::function<void()> run;
    std::vector<CUdeviceptr> pointers;
};
struct Kernel {
    std::string name;
    Bound (*bind)(const std::string& name, const char* arguments, std::size_t bytes);
    std::size_t most_dynamic = 48 * 1024 - STATIC_SHARED;
};

template <typename T>
T taken(const char* arguments, std::size_t bytes, std::size_t& at, std::vector<CUdeviceptr>& pointers) {
    at = (at + alignof(T) - 1) / alignof(T) * alignof(T);
    T value{};
    if (at + sizeof value <= bytes) std::memcpy(&value, arguments + at, sizeof value);
    at += sizeof value;
    if constexpr (std::is_pointer_v<T>) pointers.push_back(reinterpret_cast<CUdeviceptr>(value));
    return value;
}

template <typename... A>
Bound bound(void (*kernel)(A...), const std::string& name, const char* arguments, std::size_t bytes) {
    Bound result;
    std::size_t at = 0;
    std::tuple<A...> values{taken<A>(arguments, bytes, at, result.pointers)...};
    if (at != bytes) {
        complain(name + ": " + std::to_string(bytes) + " bytes of arguments, it takes " + std::to_string(at), CUDA_SUCCESS);
        return {};
    }
    result.run = [kernel, values] { std::apply(kernel, values); };
    return result;
}

std::unordered_map<std::string, Kernel> kernels = {
#define KERNEL(space, name)                                                                                  \
    {#name, Kernel{#name, [](const std::string& n, const char* arguments, std::size_t bytes) {               \
                       return bound(space::name, n, arguments, bytes);                                       \
                   }}},
    ALL_KERNELS
};

bool pointers_hold(const std::string& kernel, const std::vector<CUdeviceptr>& pointers) {
    for (const CUdeviceptr pointer : pointers)
        if (pointer != 0 && !on_device(pointer, 1)) {
            misplaced(kernel, pointer, 1);
            return false;
        }
    return true;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// ---- what the tests say to it

API void standin_order(const char* name, unsigned seed) {
    const Lock lock;
    order = name;
    chance.seed(seed);
}
API void standin_fail(const char* function, long nth, int code) {
    const Lock lock;
    planned[function] = {nth, static_cast<CUresult>(code)};
}
API void standin_recover() {
    const Lock lock;
    planned.clear();
    sticky = CUDA_SUCCESS;
}
API void standin_do_nothing(int nothing) {
    const Lock lock;
    does_nothing = nothing != 0;
}
API long standin_calls(const char* function) {
    const Lock lock;
    return calls[function];
}
API void standin_memory(std::size_t bytes) {
    const Lock lock;
    total_memory = bytes;
}
API std::size_t standin_allocated() {
    const Lock lock;
    return allocated;
}
API std::size_t standin_pending() {
    const Lock lock;
    std::size_t steps = 0;
    for (const Stream* stream : streams) steps += stream->steps.size();
    return steps;
}
API const char* standin_complaints() {  // since the last call, a line each
    const Lock lock;
    static std::string text;
    text.clear();
    for (const std::string& complaint : complaints) text += complaint + "\n";
    complaints.clear();
    return text.c_str();
}

// ---- the driver API: devices and contexts

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}
API CUresult cuGetErrorName(CUresult code, const char** text) {
    static std::map<int, std::string> names{{CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
                                            {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                                            {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
                                            {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"}};
    const Lock lock;
    std::string& name = names[code];
    if (name.empty()) name = "CUDA error " + std::to_string(code);
    *text = name.c_str();
    return CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult code, const char** text) { return cuGetErrorName(code, text); }
API CUresult cuDeviceGetCount(int* count) {
    *count = 1;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
API CUresult cuDeviceGetName(char* name, int size, CUdevice) {
    std::snprintf(name, size, "Stand-in");
    return CUDA_SUCCESS;
}
API CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice) {
    *major = 8, *minor = 9;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceTotalMem(std::size_t* bytes, CUdevice) {
    *bytes = total_memory;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT                  ? 8
             : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? static_cast<int>(SHARED_PER_BLOCK)
                                                                                    : 1;
    return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    const Lock lock;
    ++retained;
    *context = reinterpret_cast<CUcontext>(&primary);
    return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRelease(CUdevice) {
    const Lock lock;
    --retained;
    return CUDA_SUCCESS;
}
API CUresult cuCtxPushCurrent(CUcontext context) {
    current.push_back(context);
    return CUDA_SUCCESS;
}
API CUresult cuCtxPopCurrent(CUcontext* context) {
    const Lock lock;
    if (current.empty()) return complain("cuCtxPopCurrent: no context is current", CUDA_ERROR_INVALID_CONTEXT);
    if (context != nullptr) *context = current.back();
    current.pop_back();
    return CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = current.empty() ? nullptr : current.back();
    return CUDA_SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice* device) {
    ENTER;
    *device = 0;
    return CUDA_SUCCESS;
}
API CUresult cuCtxSynchronize() {
    ENTER;
    finish_all();
    return sticky;
}

// ---- memory

API CUresult cuMemGetInfo(std::size_t* free, std::size_t* total) {
    const Lock lock;  // answers after a failure too, so that a message can say how much memory is left
    *free = total_memory - std::min(allocated, total_memory), *total = total_memory;
    return CUDA_SUCCESS;
}
API CUresult cuMemAlloc(CUdeviceptr* at, std::size_t bytes) {
    ENTER;
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (allocated + bytes > total_memory || bytes > total_memory) return CUDA_ERROR_OUT_OF_MEMORY;
    void* memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
    if (memory == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
    spoil(memory, bytes);
    *at = reinterpret_cast<CUdeviceptr>(memory);
    device_memory[*at] = bytes;
    allocated += bytes;
    return CUDA_SUCCESS;
}
API CUresult cuMemFree(CUdeviceptr at) {
    ENTER;
    const auto found = device_memory.find(at);
    if (found == device_memory.end()) return complain("cuMemFree of what is not allocated", CUDA_ERROR_INVALID_VALUE);
    finish_all();  // as the driver does
    allocated -= found->second;
    spoil(bytes_at(at), found->second);
    std::free(bytes_at(at));
    device_memory.erase(found);
    return CUDA_SUCCESS;
}
API CUresult cuMemHostAlloc(void** at, std::size_t bytes, unsigned) {
    ENTER;
    *at = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (*at == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
    spoil(*at, bytes);
    pinned_memory[reinterpret_cast<CUdeviceptr>(*at)] = bytes;
    return CUDA_SUCCESS;
}
API CUresult cuMemAllocHost(void** at, std::size_t bytes) { return cuMemHostAlloc(at, bytes, 0); }
API CUresult cuMemFreeHost(void* at) {  // waits for nothing
    ENTER;
    const auto found = pinned_memory.find(reinterpret_cast<CUdeviceptr>(at));
    if (found == pinned_memory.end()) return complain("cuMemFreeHost of what is not allocated", CUDA_ERROR_INVALID_VALUE);
    spoil(at, found->second);
    std::free(at);
    pinned_memory.erase(found);
    return CUDA_SUCCESS;
}
API CUresult cuMemHostGetDevicePointer(CUdeviceptr* pointer, void* at, unsigned) {
    *pointer = reinterpret_cast<CUdeviceptr>(at);
    return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr at) {
    const Lock lock;
    if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL || !on_device(at, 1))
        return complain("cuPointerGetAttribute of what is not allocated", CUDA_ERROR_INVALID_VALUE);
    *static_cast<int*>(value) = 0;
    return CUDA_SUCCESS;
}

// ---- copies

API CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, std::size_t bytes, CUstream handle) {
    ENTER;
    if (!on_device(to, bytes)) return misplaced("an upload", to, bytes);
    const bool pinned = is_pinned(from, bytes);
    auto then = std::make_shared<std::string>();  // what pageable memory held when the copy was queued
    if (!pinned && stream_of(handle)->captured == nullptr) then->assign(static_cast<const char*>(from), bytes);
    return enqueue(handle, [=] {
        if (!on_device(to, bytes)) return void(misplaced("a queued upload", to, bytes));
        if (pinned) {
            if (!is_pinned(from, bytes)) return void(misplaced("a queued upload reads", reinterpret_cast<CUdeviceptr>(from), bytes));
            std::memcpy(bytes_at(to), from, bytes);
            return;
        }
        const iovec local{bytes_at(to), bytes}, remote{const_cast<void*>(from), bytes};  // the memory may be gone
        const bool read = process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == static_cast<ssize_t>(bytes);
        if (!read) spoil(bytes_at(to), bytes);
        if (!read || (!then->empty() && std::memcmp(bytes_at(to), then->data(), bytes) != 0))
            complain("an upload read pageable memory that had changed since it was queued", CUDA_SUCCESS);
    });
}
API CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, std::size_t bytes, CUstream handle) {
    ENTER;
    Stream* stream = stream_of(handle);
    if (!on_device(from, bytes)) return misplaced("a download", from, bytes);
    if (!is_pinned(to, bytes)) {
        if (stream->captured != nullptr) return not_in_capture(stream, __func__);
        before_a_wait();
        finish(stream, [stream] { return stream->steps.empty(); });
        std::memcpy(to, bytes_at(from), bytes);
        return CUDA_SUCCESS;
    }
    if (stream->captured == nullptr) spoil(to, bytes);
    return enqueue(handle, [=] {
        if (!on_device(from, bytes)) return void(misplaced("a queued download", from, bytes));
        if (!is_pinned(to, bytes)) return void(misplaced("a queued download writes", reinterpret_cast<CUdeviceptr>(to), bytes));
        std::memcpy(to, bytes_at(from), bytes);
    });
}
API CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream handle) {
    ENTER;
    for (const CUdeviceptr at : {to, from})
        if (!on_device(at, bytes)) return misplaced("a copy", at, bytes);
    return enqueue(handle, [=] {
        for (const CUdeviceptr at : {to, from})
            if (!on_device(at, bytes)) return void(misplaced("a queued copy", at, bytes));
        std::memmove(bytes_at(to), bytes_at(from), bytes);
    });
}

// ---- streams and events

API CUresult cuStreamCreate(CUstream* handle, unsigned flags) {
    ENTER;
    if (flags != CU_STREAM_NON_BLOCKING) complain("a stream that waits for the default stream", CUDA_SUCCESS);
    streams.push_back(new Stream);
    *handle = reinterpret_cast<CUstream>(streams.back());
    return CUDA_SUCCESS;
}
API CUresult cuStreamDestroy(CUstream handle) {
    ENTER;
    Stream* stream = stream_of(handle);
    finish(stream, [stream] { return stream->steps.empty(); });
    streams.erase(std::find(streams.begin(), streams.end(), stream));
    for (Event* event : events)
        if (event->stream == stream) event->stream = nullptr, event->reached = event->recorded;
    delete stream;
    return CUDA_SUCCESS;
}
API CUresult cuStreamSynchronize(CUstream handle) {
    ENTER;
    Stream* stream = stream_of(handle);
    if (stream->captured != nullptr) return not_in_capture(stream, __func__);
    before_a_wait();
    finish(stream, [stream] { return stream->steps.empty(); });
    return sticky;
}
API CUresult cuStreamQuery(CUstream handle) {
    ENTER;
    return stream_of(handle)->steps.empty() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
API CUresult cuEventCreate(CUevent* handle, unsigned) {
    ENTER;
    auto* event = new Event;
    events.insert(event);
    *handle = reinterpret_cast<CUevent>(event);
    return CUDA_SUCCESS;
}
API CUresult cuEventDestroy(CUevent handle) {
    ENTER;
    auto* event = reinterpret_cast<Event*>(handle);
    if (event->stream != nullptr)  // who waits for it still waits for what it recorded
        finish(event->stream, [event] { return event->reached >= event->recorded; });
    events.erase(event);
    delete event;
    return CUDA_SUCCESS;
}
API CUresult cuEventRecord(CUevent handle, CUstream stream_handle) {
    ENTER;
    auto* event = reinterpret_cast<Event*>(handle);
    Stream* stream = stream_of(stream_handle);
    if (stream->captured != nullptr) return not_in_capture(stream, __func__);
    if (event->stream != nullptr && event->stream != stream)
        finish(event->stream, [event] { return event->reached >= event->recorded; });
    event->stream = stream;
    Step step;
    step.event = event;
    step.turn = ++event->recorded;
    push(stream, std::move(step));
    return CUDA_SUCCESS;
}
API CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned) {
    ENTER;
    auto* event = reinterpret_cast<Event*>(event_handle);
    Stream* stream = stream_of(handle);
    if (stream->captured != nullptr) return not_in_capture(stream, __func__);
    if (!events.count(event)) return complain("a wait for an event that is gone", CUDA_ERROR_INVALID_HANDLE);
    Step step;
    step.event = event;
    step.waits = true;
    step.turn = event->recorded;
    push(stream, std::move(step));
    return CUDA_SUCCESS;
}
API CUresult cuEventQuery(CUevent handle) {
    ENTER;
    const auto* event = reinterpret_cast<Event*>(handle);
    return event->reached >= event->recorded ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
API CUresult cuEventSynchronize(CUevent handle) {
    ENTER;
    auto* event = reinterpret_cast<Event*>(handle);
    before_a_wait();
    if (event->stream != nullptr) finish(event->stream, [event] { return event->reached >= event->recorded; });
    return sticky;
}
API CUresult cuEventElapsedTime(float* milliseconds, CUevent, CUevent) {
    *milliseconds = 0.01f;
    return CUDA_SUCCESS;
}

// ---- kernels

API CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
    ENTER;
    unsigned magic = 0;
    std::memcpy(&magic, image, sizeof magic);
    if (magic != FATBIN) return CUDA_ERROR_INVALID_IMAGE;
    *module = reinterpret_cast<CUmodule>(new char);
    return CUDA_SUCCESS;
}
API CUresult cuModuleUnload(CUmodule module) {
    ENTER;
    delete reinterpret_cast<char*>(module);
    return CUDA_SUCCESS;
}
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
    ENTER;
    const auto found = kernels.find(name);
    if (found == kernels.end()) return CUDA_ERROR_NOT_FOUND;
    *function = reinterpret_cast<CUfunction>(&found->second);
    return CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute, CUfunction) {
    *value = static_cast<int>(STATIC_SHARED);
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    ENTER;
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    if (value < 0 || value + STATIC_SHARED > SHARED_PER_BLOCK) return CUDA_ERROR_INVALID_VALUE;
    reinterpret_cast<Kernel*>(function)->most_dynamic = value;
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetBlockShape(CUfunction, int, int, int) { return CUDA_SUCCESS; }
API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads,
                            unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** separate, void** packed) {
    ENTER;
    auto* kernel = reinterpret_cast<Kernel*>(function);
    if (separate != nullptr || grid_z != 1 || block_y != 1 || block_z != 1 || grid_x == 0 || grid_y == 0 || grid_y > 65535 ||
        threads == 0 || threads > 1024 || shared > kernel->most_dynamic)
        return complain(kernel->name + ": a launch that no GPU takes", CUDA_ERROR_INVALID_VALUE);
    const char* arguments = nullptr;
    std::size_t bytes = 0;
    for (void** entry = packed; entry != nullptr && *entry != CU_LAUNCH_PARAM_END; entry += 2) {
        if (*entry == CU_LAUNCH_PARAM_BUFFER_POINTER) arguments = static_cast<const char*>(entry[1]);
        if (*entry == CU_LAUNCH_PARAM_BUFFER_SIZE) bytes = *static_cast<std::size_t*>(entry[1]);
    }
    const Bound bound = kernel->bind(kernel->name, arguments, bytes);
    if (!bound.run) return CUDA_ERROR_INVALID_VALUE;
    if (!pointers_hold(kernel->name, bound.pointers)) return sticky;
    Index grid;
    grid.x = grid_x, grid.y = grid_y;
    return enqueue(stream, [=] {
        if (pointers_hold("a queued " + kernel->name, bound.pointers)) emulated::launch(grid, threads, shared, 0, bound.run);
    });
}
API CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
    ENTER;
    return enqueue(stream, [=] { function(data); }, true);
}

// ---- graphs

API CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode) {
    ENTER;
    Stream* stream = stream_of(handle);
    if (stream == &legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->captured != nullptr) return CUDA_ERROR_ILLEGAL_STATE;
    stream->captured = new Graph;
    stream->invalid = false;
    return CUDA_SUCCESS;
}
API CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    ENTER;
    Stream* stream = stream_of(handle);
    *graph = nullptr;
    if (stream->captured == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
    Graph* captured = std::exchange(stream->captured, nullptr);
    if (stream->invalid) {
        delete captured;
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    *graph = reinterpret_cast<CUgraph>(captured);
    return CUDA_SUCCESS;
}
API CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    ENTER;
    *executable = reinterpret_cast<CUgraphExec>(new Graph(*reinterpret_cast<Graph*>(graph)));
    return CUDA_SUCCESS;
}
API CUresult cuGraphDestroy(CUgraph graph) {
    ENTER;
    delete reinterpret_cast<Graph*>(graph);
    return CUDA_SUCCESS;
}
API CUresult cuGraphExecDestroy(CUgraphExec executable) {
    ENTER;
    delete reinterpret_cast<Graph*>(executable);  // queued launches have copies
    return CUDA_SUCCESS;
}
API CUresult cuGraphLaunch(CUgraphExec executable, CUstream handle) {
    ENTER;
    Stream* stream = stream_of(handle);
    if (stream->captured != nullptr) return not_in_capture(stream, __func__);
    for (const Step& step : reinterpret_cast<Graph*>(executable)->steps) push(stream, step);
    return CUDA_SUCCESS;
}
