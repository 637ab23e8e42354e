// Kernels by name: what a compiled .cu file registers, and how a launch calls one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace software_gpu {

// A kernel's parameter, as a launch checks it: where in device memory it points, and how aligned.
struct Parameter {
    bool pointer;
    size_t alignment;
};

struct Kernel {
    const char* name;
    unsigned bound;  // the threads a block may have, as __launch_bounds__ says; 0: not said
    void (*call)(void** arguments);
    const Parameter* parameters;
    size_t parameter_count;
};

// The static shared memory of a file's kernels, all together.
struct Region {
    unsigned char *begin, *end;
};

// A .cu file: its text, which a program handed to NVRTC must end with, and its kernels.
struct KernelFile {
    const char* name;
    const char *prelude, *prelude_end;
    const char *text, *text_end;
    Region shared;
    const Kernel* kernels;
    size_t kernel_count;
    KernelFile* next;
};

void register_file(KernelFile& file);
KernelFile* first_file();

// Stands at the start of an image.
constexpr const char* IMAGE_MAGIC = "software gpu module ";

// What "compiling" a file for an architecture gives: its name, and a digest of its text.
std::string image_of(const KernelFile& file, const std::string& architecture);

template <auto kernel>
struct Caller;

template <typename... T, void (*kernel)(T...)>
struct Caller<kernel> {
    template <size_t... place>
    static void unpack(void** arguments, std::index_sequence<place...>) {
        (void)arguments;
        kernel(*static_cast<std::remove_const_t<T>*>(arguments[place])...);
    }

    static void call(void** arguments) { unpack(arguments, std::index_sequence_for<T...>()); }

    template <typename P>
    static constexpr Parameter parameter() {
        if constexpr (!std::is_pointer_v<P>) {
            return {false, 1};
        } else if constexpr (std::is_void_v<std::remove_pointer_t<P>>) {
            return {true, 1};
        } else {
            return {true, alignof(std::remove_pointer_t<P>)};
        }
    }

    // One more than there are, as an array has no length of 0.
    static constexpr Parameter parameters[sizeof...(T) + 1] = {parameter<T>()..., {false, 1}};

    static constexpr Kernel entry(const char* name, unsigned bound) { return {name, bound, call, parameters, sizeof...(T)}; }
};

}  // namespace software_gpu
