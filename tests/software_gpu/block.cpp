#include "block.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <pthread.h>
#include <string>
#include <utility>

#include "device.h"
#include "fibers.h"
#include "memory.h"
#include "shared.h"
#include "warp.h"

namespace software_gpu {

static const unsigned WARP = 32;

Thread* current = nullptr;
Index block_index, block_size, grid_size;
unsigned char* dynamic_shared = nullptr;

static std::mutex one_launch;
static pthread_t launcher;
static const Work* work = nullptr;

static Thread threads[MAX_THREADS];
static Fiber fibers[MAX_THREADS];
static bool idle[MAX_THREADS];  // the fiber waits for a thread to run
static Fiber host = [] { Fiber fiber; fiber.started = true; return fiber; }();
static unsigned count, live, waiting, votes;
static Status outcome;
static std::string failure;

// Threads that can go on, and in what order they do.
static unsigned ready[MAX_THREADS];
static unsigned ready_count;
static uint64_t random_state;
static bool deepest_first;

static unsigned random_below(unsigned bound) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<unsigned>((random_state >> 32) * bound >> 32);
}

static void make_ready(unsigned thread) { ready[ready_count++] = thread; }

// Either any thread, or, so that some warps run far ahead of others, one that was made ready last.
static unsigned take_ready() {
    if (!deepest_first) std::swap(ready[random_below(ready_count)], ready[ready_count - 1]);
    return ready[--ready_count];
}

static void new_phase() {
    deepest_first = random_below(2) == 0;
    for (unsigned i = ready_count; i > 1; i -= 1) std::swap(ready[i - 1], ready[random_below(i)]);
}

static void open_barrier() {
    for (unsigned i = 0; i < count; i += 1) {
        if (!threads[i].at_barrier) continue;
        threads[i].at_barrier = false;
        threads[i].barrier_sum = votes;
        make_ready(i);
    }
    waiting = votes = 0;
    new_phase();
}

// The lanes of the warp that starts at thread `first` and have not exited.
static uint32_t living(unsigned first) {
    uint32_t lanes = 0;
    for (unsigned lane = 0; lane < WARP && first + lane < count; lane += 1) {
        if (!threads[first + lane].exited) lanes |= 1u << lane;
    }
    return lanes;
}

// Whether all living lanes of `mask` wait for the same meeting.
static bool complete(unsigned first, Meeting meeting, uint32_t mask) {
    uint32_t lanes = mask & living(first);
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const Thread& thread = threads[first + static_cast<unsigned>(__builtin_ctz(rest))];
        if (thread.meeting != meeting || thread.mask != mask) return false;
    }
    return lanes != 0;
}

static void end_meeting(unsigned first, Meeting meeting, uint32_t mask) {
    uint32_t lanes = mask & living(first);
    settle(meeting, threads + first, lanes);
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        unsigned thread = first + static_cast<unsigned>(__builtin_ctz(rest));
        threads[thread].meeting = Meeting::None;
        if (&threads[thread] != current) make_ready(thread);
    }
}

// Lets another thread go on, or the host if none can.
static void wait() {
    Fiber& from = fibers[current->number];
    if (ready_count == 0) {
        change(from, host);
    } else {
        unsigned next = take_ready();
        if (&threads[next] == current) return;
        current = &threads[next];
        change(from, fibers[next]);
    }
}

unsigned meet_block(const char* called, bool predicate) {
    Thread& me = *current;
    me.called = called;
    me.at_barrier = true;
    waiting += 1;
    votes += predicate;
    if (waiting == live) open_barrier();
    wait();
    return me.barrier_sum;
}

void meet_warp(Meeting meeting, const char* called, uint32_t mask) {
    Thread& me = *current;
    unsigned lane = me.number % WARP, first = me.number - lane;
    if ((mask >> lane & 1) == 0) stop(CUDA_ERROR_LAUNCH_FAILED, "%s(0x%08x) by lane %u, which is not in the mask", called, mask, lane);
    me.called = called;
    me.mask = mask;
    me.meeting = meeting;
    if (complete(first, meeting, mask)) {
        end_meeting(first, meeting, mask);
    } else {
        wait();
    }
}

// A thread that exits no longer keeps others waiting.
static void leave() {
    unsigned first = current->number - current->number % WARP;
    current->exited = true;
    live -= 1;
    for (unsigned i = first; i < first + WARP && i < count; i += 1) {
        const Thread& thread = threads[i];
        if (thread.meeting != Meeting::None && complete(first, thread.meeting, thread.mask)) {
            end_meeting(first, thread.meeting, thread.mask);
        }
    }
    if (live > 0 && waiting == live) open_barrier();
}

// What every fiber does for ever: the kernel for one thread, then for that thread of the next block.
static void fiber_main() {
    for (;;) {
        unsigned number = current->number;
        idle[number] = false;
        work->call(work->arguments);
        leave();
        idle[number] = true;
        wait();
    }
}

static void fail_deadlocked() {
    char text[512];
    int at = 0;
    unsigned named = 0;
    const char* last = nullptr;
    for (unsigned i = 0; i < count && named < 4; i += 1) {
        const Thread& thread = threads[i];
        if (thread.exited || thread.called == last) continue;
        last = thread.called;
        named += 1;
        at += snprintf(text + at, sizeof text - static_cast<size_t>(at), "%s thread (%u, %u, %u) waits in %s", named > 1 ? "," : "",
                       thread.index.x, thread.index.y, thread.index.z, last);
        if (!thread.at_barrier) {
            at += snprintf(text + at, sizeof text - static_cast<size_t>(at), " for lanes 0x%08x", thread.mask);
        }
    }
    char message[768];
    snprintf(message, sizeof message, "kernel %s, block (%u, %u, %u): the threads wait for one another:%s", work->name,
             block_index.x, block_index.y, block_index.z, text);
    failure = message;
    outcome = CUDA_ERROR_LAUNCH_FAILED;
}

static uint64_t seed_of(const Work& launch) {
    uint64_t hash = 0xcbf29ce484222325u;
    auto add = [&](uint64_t value) { hash = (hash ^ value) * 0x100000001b3u; hash ^= hash >> 29; };
    for (const char* c = launch.name; *c != 0; c += 1) add(static_cast<unsigned char>(*c));
    for (uint64_t value : {grid_size.x, grid_size.y, grid_size.z, block_index.x, block_index.y, block_index.z}) add(value);
    static const char* seed = getenv("SOFTWARE_GPU_SEED");
    if (seed != nullptr) add(strtoull(seed, nullptr, 10) + 1);
    return hash | 1;
}

static void run_block(const Work& launch) {
    random_state = seed_of(launch);
    for (int i = 0; i < 4; i += 1) random_below(2);
    memset(launch.static_shared, POISON, launch.static_bytes);
    dynamic_shared = fresh_shared(launch.shared_bytes);
    live = count = block_size.x * block_size.y * block_size.z;
    waiting = votes = ready_count = 0;
    for (unsigned i = 0; i < count; i += 1) {
        threads[i] = Thread{};
        threads[i].number = i;
        threads[i].index = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
        if (!idle[i]) {
            reset(fibers[i], fiber_main);
            idle[i] = true;
        }
        make_ready(i);
    }
    new_phase();
    current = &threads[take_ready()];
    change(host, fibers[current->number]);
    if (outcome == CUDA_SUCCESS && live > 0) fail_deadlocked();
    current = nullptr;
}

static Index index_at(uint64_t block, Index grid) {
    return {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
            static_cast<unsigned>(block / grid.x / grid.y)};
}

Status run(const Work& launch) {
    std::lock_guard<std::mutex> lock(one_launch);
    launcher = pthread_self();
    work = &launch;
    grid_size = launch.grid;
    block_size = launch.block;
    outcome = CUDA_SUCCESS;
    uint64_t blocks = static_cast<uint64_t>(grid_size.x) * grid_size.y * grid_size.z;
    for (uint64_t block = 0; block < blocks && outcome == CUDA_SUCCESS; block += 1) {
        block_index = index_at(block, grid_size);
        run_block(launch);
    }
    work = nullptr;
    return outcome == CUDA_SUCCESS ? outcome : fail(outcome, "%s", failure.c_str());
}

bool running() { return work != nullptr && current != nullptr && pthread_equal(launcher, pthread_self()); }

void describe_current(char* text, size_t bytes) {
    snprintf(text, bytes, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u)", work->name, block_index.x, block_index.y,
             block_index.z, current->index.x, current->index.y, current->index.z);
}

void stop(Status status, const char* format, ...) {
    char place[256], message[512];
    describe_current(place, sizeof place);
    va_list rest;
    va_start(rest, format);
    vsnprintf(message, sizeof message, format, rest);
    va_end(rest);
    failure = std::string(place) + ": " + message;
    outcome = status;
    jump(host);
}

}  // namespace software_gpu
