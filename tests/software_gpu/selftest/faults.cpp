// What must fail, and how.

#include <csignal>
#include <cstring>

#include "check.h"

int scene_out_of_bounds() {
    open_device();
    Address at = upload(std::vector<float>(100));
    int64_t index = 100;
    launch("write_at", 1, 1, 0, {&at, &index});
    return 0;  // not reached
}

// Each of the next three fails for good, so each has a process.
static int stays_failed(int status, int expected) {
    CHECK(status == expected);
    CHECK(cuCtxSynchronize() == expected);
    return failures;
}

int scene_deadlock() {
    open_device();
    Address out = upload(std::vector<uint32_t>(64));
    return stays_failed(launch("divided_barrier", 1, 64, 0, {&out}), 719);
}

int scene_array() {
    open_device();
    Address out = upload(std::vector<uint32_t>(1));
    uint32_t index = 4;
    return stays_failed(launch("write_array_at", 1, 1, 0, {&out, &index}), 700);
}

int scene_host_pointer() {
    open_device();
    uint32_t here[64];
    void* out = here;
    return stays_failed(launch("early_exit", 1, 64, 0, {&out}), 700);
}

// Beside an allocation, but on its pages: seen when it is freed.
int scene_stray() {
    open_device();
    Address at = upload(std::vector<float>(5));
    int64_t index = -1;
    CHECK(launch("write_at", 1, 1, 0, {&at, &index}) == 0);
    CHECK(cuMemFree_v2(at) == 700);
    return failures;
}

int scene_lost() {
    open_device();
    Address out = upload(std::vector<uint32_t>(64));
    void* function = kernel("early_exit");
    void* arguments[] = {&out};
    for (int expected : {0, 214, 214}) {
        CHECK(cuLaunchKernel(function, 1, 1, 1, 64, 1, 1, 0, nullptr, arguments, nullptr) == expected);
    }
    CHECK(cuCtxSynchronize() == 214);
    CHECK(cuMemFree_v2(out) == 214);
    return failures;
}

int scene_memory() {
    open_device();
    size_t free = 0, total = 0;
    Address first = 0, second = 0;
    CHECK(cuMemAlloc_v2(&first, 600) == 0);
    CHECK(cuMemAlloc_v2(&second, 401) == 2);
    CHECK(cuMemGetInfo_v2(&free, &total) == 0);
    CHECK(free == 400 && total == 1000);
    CHECK(cuMemFree_v2(first) == 0);
    CHECK(cuMemAlloc_v2(&second, 1000) == 0);
    return failures;
}

int scene_none() {
    int count = 1;
    CHECK(cuInit(0) == 100);
    CHECK(cuDeviceGetCount(&count) == 0 && count == 0);
    return failures;
}

static bool contains(const std::string& text, const char* words) { return text.find(words) != std::string::npos; }

static void scenes() {
    std::string said;
    CHECK(run_scene("out_of_bounds", nullptr, &said) == -SIGSEGV);
    CHECK(contains(said, "kernel write_at, block (0, 0, 0), thread (0, 0, 0)"));
    CHECK(contains(said, "400 bytes from the start of an allocation of 400 bytes"));
    CHECK(run_scene("deadlock", nullptr, &said) == 0);
    CHECK(contains(said, "kernel divided_barrier, block (0, 0, 0): the threads wait for one another:"));
    CHECK(contains(said, "thread (0, 0, 0) waits in __syncthreads, thread (32, 0, 0) waits in __shfl_sync for lanes 0xffffffff"));
    CHECK(run_scene("array", nullptr, &said) == 0);
    CHECK(contains(said, "kernel write_array_at, block (0, 0, 0), thread (0, 0, 0): probes.cu:"));
    CHECK(contains(said, "index 4 is outside the array"));
    CHECK(run_scene("host_pointer", nullptr, &said) == 0);
    CHECK(contains(said, "kernel early_exit: argument 0"));
    CHECK(run_scene("stray", nullptr, &said) == 0);
    CHECK(contains(said, "something wrote 4 bytes beside an allocation of 20 bytes"));
    CHECK(run_scene("lost", "SOFTWARE_GPU_LOST_AFTER=2", &said) == 0);
    CHECK(contains(said, "the device is lost at launch 2"));
    CHECK(run_scene("memory", "SOFTWARE_GPU_MEMORY=1000", &said) == 0);
    CHECK(run_scene("none", "SOFTWARE_GPU_COUNT=0", &said) == 0);
}

static void copies() {
    Address at = upload(std::vector<float>(8));
    float values[9] = {};
    CHECK(cuMemcpyDtoH_v2(values, at, 36) == 1);
    CHECK(cuMemcpyHtoD_v2(at + 4, values, 32) == 1);
    CHECK(cuMemsetD32_v2(at, 0, 9) == 1);
    CHECK(cuMemsetD32_v2(at + 2, 0, 1) == 1);
    CHECK(cuMemFree_v2(at + 4) == 1);
    CHECK(cuMemFree_v2(at) == 0);
    CHECK(cuMemFree_v2(at) == 1);
    CHECK(cuMemcpyDtoH_v2(values, at, 4) == 1);
}

void test_faults() {
    copies();
    scenes();
}
