// Devices, contexts and streams, and the errors that stay once they have happened.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "status.h"

namespace software_gpu {

// What a launch on the device may ask for: an H100's limits.
constexpr unsigned MAX_THREADS = 1024;
constexpr size_t MAX_SHARED_UNASKED = 48 * 1024;
constexpr size_t MAX_SHARED = 227 * 1024;
constexpr int MULTIPROCESSORS = 132;

struct Context;
struct Queue;

struct Device {
    size_t total = 0;
    std::atomic<size_t> used{0};
    std::atomic<size_t> used_high{0};
    uint64_t release_threshold = 0;
    Context* primary = nullptr;
    std::atomic<int> retained{0};
    std::atomic<long> launches{0};
};

// What a CUcontext points to.
struct Context {
    Device* device;
    std::atomic<int> failure{0};            // a Status: every later call on the context returns it
    std::shared_ptr<Queue> legacy = nullptr;  // what the null stream has put off; none before its first use
};

// What a CUstream points to; the null stream is the current context's.
struct Stream {
    Context* context;
    unsigned flags;
    int priority;
    std::shared_ptr<Queue> queue;
};

// Whether it is the null stream, by any of its handles. The stream of each thread (2) is taken for it, which
// orders more than CUDA does.
inline bool is_legacy(const Stream* stream) { return reinterpret_cast<uintptr_t>(stream) <= 2; }

int device_count();
Device* device_at(int ordinal);
int ordinal_of(const Device* device);

// Whether cuInit has succeeded.
bool initialized();

// The calling thread's context, or null.
Context* current_context();

// CUDA_SUCCESS if the calling thread has a context on which nothing has failed for good.
Status usable();

// The same for a call on `stream`, whose context must be the current one.
Status usable(const Stream* stream);

// Prints `message` to stderr and marks the current context as failed. Returns `status`.
Status fail(Status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The same for another context.
Status fail(Context* context, Status status, const char* format, ...) __attribute__((format(printf, 3, 4)));

// Counts a launch on the current device: past SOFTWARE_GPU_LOST_AFTER the device is lost.
Status count_launch();

}  // namespace software_gpu
