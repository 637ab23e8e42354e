// Says which kernel did what, when a kernel goes outside its memory.
//
// An index outside an array whose length the compiler knows is caught by -fsanitize=bounds, whose
// handler is here in place of the sanitizer's library: the launch fails. Any other access outside device
// memory hits a guard page: the place is printed, and the signal goes on to whoever had it before.

#include <csignal>
#include <cstdio>
#include <cstring>
#include <unistd.h>

#include "block.h"
#include "memory.h"

namespace software_gpu {

// As GCC lays out the sanitizer's data.
struct SourcePlace {
    const char* file;
    uint32_t line, column;
};

struct BoundsData {
    SourcePlace place;
    const void *array_type, *index_type;
};

extern "C" __attribute__((noreturn)) void __ubsan_handle_out_of_bounds_abort(BoundsData* data, uintptr_t index) {
    const char* name = strrchr(data->place.file, '/');
    stop(CUDA_ERROR_ILLEGAL_ADDRESS, "%s:%u: index %lld is outside the array", name != nullptr ? name + 1 : data->place.file,
         data->place.line, static_cast<long long>(index));
}

static struct sigaction before[2];

static void report(int signal, siginfo_t* info, void*) {
    static volatile sig_atomic_t reported = 0;
    if (running() && reported == 0) {
        reported = 1;
        char place[256], near[128], text[512];
        describe_current(place, sizeof place);
        bool known = describe(info->si_addr, near, sizeof near);
        int length = snprintf(text, sizeof text, "software gpu: %s: access at %p, %s\n", place, info->si_addr,
                              known ? near : "which is near no allocation");
        if (length > 0 && write(2, text, static_cast<size_t>(length)) < 0) _exit(1);
    }
    sigaction(signal, &before[signal == SIGBUS], nullptr);  // the access is tried again, and that handler called
}

__attribute__((constructor)) static void watch() {
    struct sigaction action = {};
    action.sa_sigaction = report;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &before[0]);
    sigaction(SIGBUS, &action, &before[1]);
}

}  // namespace software_gpu
