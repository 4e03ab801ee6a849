// Runs the kernels for test code at the other end of a pipe: allocate, write, read, free, launch.
// KERNELS_FILE is generated from the sources: each .cu in a namespace, and KERNEL(name) for each of its kernels.
#include <unistd.h>

#include <string>
#include <tuple>
#include <unordered_map>

#include "emulated.hpp"

#include KERNELS_FILE

namespace {

void read_all(void* into, std::size_t bytes) {
    for (char* at = static_cast<char*>(into); bytes > 0;) {
        const ssize_t got = read(STDIN_FILENO, at, bytes);
        if (got <= 0) std::exit(0);
        at += got, bytes -= got;
    }
}

void write_all(const void* from, std::size_t bytes) {
    for (const char* at = static_cast<const char*>(from); bytes > 0;) {
        const ssize_t put = write(STDOUT_FILENO, at, bytes);
        if (put <= 0) std::exit(1);
        at += put, bytes -= put;
    }
}

template <typename T>
T take() {
    T value;
    read_all(&value, sizeof value);
    return value;
}

// Arguments arrive as a size and bytes each; a size that is not the parameter's would be garbage on a GPU.
template <typename... A>
std::function<void()> bind(void (*kernel)(A...)) {
    const auto count = take<std::uint32_t>();
    if (count != sizeof...(A)) emulated::fail("a kernel takes another number of arguments", count);
    const auto argument = []<typename T>(T*) {
        const auto bytes = take<std::uint32_t>();
        if (bytes != sizeof(T)) emulated::fail("an argument is of another size", bytes);
        return take<T>();
    };
    std::tuple<A...> arguments{argument(static_cast<A*>(nullptr))...};
    return [kernel, arguments] { std::apply(kernel, arguments); };
}

const std::unordered_map<std::string, std::function<std::function<void()>()>> KERNELS = {
#define KERNEL(space, name) {#name, [] { return bind(space::name); }},
    ALL_KERNELS
};

}  // namespace

int main() {
    std::unordered_map<std::uint64_t, std::unique_ptr<char[]>> buffers;
    for (;;) switch (take<char>()) {
            case 'A': {
                const auto bytes = take<std::uint64_t>();
                std::unique_ptr<char[]> buffer(new char[bytes]);
                std::memset(buffer.get(), 0xff, bytes);
                const auto pointer = reinterpret_cast<std::uint64_t>(buffer.get());
                buffers[pointer] = std::move(buffer);
                write_all(&pointer, sizeof pointer);
                break;
            }
            case 'F':
                buffers.erase(take<std::uint64_t>());
                break;
            case 'W': {
                const auto pointer = take<std::uint64_t>(), bytes = take<std::uint64_t>();
                read_all(reinterpret_cast<char*>(pointer), bytes);
                break;
            }
            case 'R': {
                const auto pointer = take<std::uint64_t>(), bytes = take<std::uint64_t>();
                write_all(reinterpret_cast<char*>(pointer), bytes);
                break;
            }
            case 'L': {
                std::string name(take<std::uint32_t>(), ' ');
                read_all(name.data(), name.size());
                Index grid;
                grid.x = take<std::uint32_t>(), grid.y = take<std::uint32_t>();
                const auto threads = take<std::uint32_t>();
                const auto dynamic = take<std::uint64_t>();
                const auto seed = take<std::uint32_t>();
                const auto found = KERNELS.find(name);
                if (found == KERNELS.end()) emulated::fail(("no kernel " + name).c_str(), 0);
                emulated::launch(grid, threads, dynamic, seed, found->second());
                write_all("k", 1);
                break;
            }
            default:
                emulated::fail("an unknown command", 0);
        }
}
