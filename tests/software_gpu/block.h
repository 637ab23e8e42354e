// One block of threads: a fiber each, run in a pseudo-random order between the points where they meet.
#pragma once

#include <cstddef>
#include <cstdint>

#include "status.h"

namespace software_gpu {

struct Index {
    unsigned x, y, z;
};

// What a lane brings to a meeting of its warp.
enum class Meeting : uint8_t { None, Sync, Shuffle, Vote, Reduce, Product };

struct Thread {
    Index index;
    unsigned number;  // in the block
    bool exited;
    bool at_barrier;
    Meeting meeting;       // what the thread waits for in its warp
    const char* called;    // the builtin it waits in
    uint32_t mask;         // the lanes that must meet
    unsigned source;       // Shuffle: the lane it reads
    uint32_t operand[10];  // what it brings: a value, or the fragments a, b and d of a product
    uint32_t result[4];    // what it takes away
    unsigned barrier_sum;  // how many threads brought a true predicate to the last barrier
};

// The thread that runs now; kernels read their index from it.
extern Thread* current;
extern Index block_index, block_size, grid_size;

// The dynamic shared memory of the block.
extern unsigned char* dynamic_shared;

// Waits for all threads of the block that have not exited; how many of them brought `predicate`.
unsigned meet_block(const char* called, bool predicate);

// Waits for the lanes of `mask`; what each brings is in its `operand`.
void meet_warp(Meeting meeting, const char* called, uint32_t mask);

// Ends the launch: the kernel did something that a GPU would stop for.
[[noreturn]] void stop(Status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Whether a kernel runs on this host thread, and where it is, for messages.
bool running();
void describe_current(char* text, size_t bytes);

// A launch, as the blocks see it.
struct Work {
    const char* name;
    void (*call)(void** arguments);
    void** arguments;
    Index grid, block;
    size_t shared_bytes;
    unsigned char* static_shared;  // poisoned before each block
    size_t static_bytes;
};

// Runs the blocks one after the other.
Status run(const Work& work);

}  // namespace software_gpu
