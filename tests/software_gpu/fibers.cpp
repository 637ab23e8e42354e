#include "fibers.h"

#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

namespace software_gpu {

static const size_t PAGE = 4096;

static char* new_stack() {
    size_t bytes = STACK_BYTES + PAGE;
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED || mprotect(at, PAGE, PROT_NONE) != 0) {
        perror("software gpu: no memory for a fiber's stack");
        abort();
    }
    return static_cast<char*>(at) + PAGE;
}

void reset(Fiber& fiber, void (*entry)()) {
    if (fiber.stack == nullptr) fiber.stack = new_stack();
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack;
    fiber.first.uc_stack.ss_size = STACK_BYTES;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, entry, 0);
    fiber.started = false;
}

void jump(Fiber& to) {
    if (to.started) _longjmp(to.place, 1);
    to.started = true;
    setcontext(&to.first);
    abort();
}

// Not inlined: a function that calls setjmp must hold nothing that changes between its two returns.
__attribute__((noinline)) void change(Fiber& from, Fiber& to) {
    if (_setjmp(from.place) == 0) jump(to);
}

}  // namespace software_gpu
