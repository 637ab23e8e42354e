// Checks, and the driver calls that the self-test makes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

extern int failures;

#define CHECK(condition)                                                      \
    do {                                                                      \
        if (!(condition)) {                                                   \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
            failures += 1;                                                    \
        }                                                                     \
    } while (0)

using Address = uint64_t;

extern "C" {
int cuInit(unsigned);
int cuDeviceGetCount(int*);
int cuDevicePrimaryCtxRetain(void**, int);
int cuCtxSetCurrent(void*);
int cuCtxSynchronize();
int cuMemAlloc_v2(Address*, size_t);
int cuMemFree_v2(Address);
int cuMemGetInfo_v2(size_t*, size_t*);
int cuMemcpyHtoD_v2(Address, const void*, size_t);
int cuMemcpyDtoH_v2(void*, Address, size_t);
int cuMemsetD32_v2(Address, unsigned, size_t);
int cuModuleLoadData(void**, const void*);
int cuModuleGetFunction(void**, void*, const char*);
int cuFuncSetAttribute(void*, int, int);
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
int nvrtcCreateProgram(void**, const char*, const char*, int, const char* const*, const char* const*);
int nvrtcCompileProgram(void*, int, const char* const*);
int nvrtcGetCUBINSize(void*, size_t*);
int nvrtcGetCUBIN(void*, char*);
}

// Makes device 0 the current one.
void open_device();

// The function `name` of probes.cu.
void* kernel(const char* name);

int launch(const char* name, unsigned blocks, unsigned threads, unsigned shared, std::vector<void*> arguments);

template <typename T>
Address upload(const std::vector<T>& values) {
    Address at = 0;
    CHECK(cuMemAlloc_v2(&at, values.size() * sizeof(T)) == 0);
    CHECK(cuMemcpyHtoD_v2(at, values.data(), values.size() * sizeof(T)) == 0);
    return at;
}

template <typename T>
std::vector<T> download(Address at, size_t count) {
    std::vector<T> values(count);
    CHECK(cuMemcpyDtoH_v2(values.data(), at, count * sizeof(T)) == 0);
    return values;
}

// Runs one of the scenes below in a process of its own, with `setting` in its environment; returns how it ended:
// its exit status, or minus the signal. What it wrote to stderr goes to `said`.
int run_scene(const char* scene, const char* setting, std::string* said);

// What a scene does in that process.
int scene_out_of_bounds();
int scene_deadlock();
int scene_array();
int scene_host_pointer();
int scene_stray();
int scene_lost();
int scene_memory();
int scene_none();
int scene_freed_before_copy();

void test_execution();
void test_streams();
void test_faults();
void test_blas();
void test_solver();
