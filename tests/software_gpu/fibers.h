// Fibers: threads of control that take turns on one host thread. A switch makes no system call.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <ucontext.h>

namespace software_gpu {

// One place a thread of control can stand at.
struct Fiber {
    jmp_buf place;
    ucontext_t first;
    bool started = false;
    char* stack = nullptr;
};

// Makes `fiber` start anew, at `entry`, when it is next switched to. What it was doing is dropped.
void reset(Fiber& fiber, void (*entry)());

// Leaves `from` where it is, and goes on where `to` left off. Returns when something switches to `from`.
void change(Fiber& from, Fiber& to);

// Goes on where `to` left off, and forgets where the caller was.
[[noreturn]] void jump(Fiber& to);

// The bytes of stack a fiber has, with a page below them that must not be touched.
constexpr size_t STACK_BYTES = 128 * 1024;

}  // namespace software_gpu
