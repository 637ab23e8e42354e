// What the driver says of the device: an H100's figures.

#include <cstdio>
#include <cstring>

#include "device.h"

namespace software_gpu {

struct Property {
    int attribute;  // CUdevice_attribute
    int value;
};

static const Property PROPERTIES[] = {
    {1, MAX_THREADS},         // MAX_THREADS_PER_BLOCK
    {2, 1024},                // MAX_BLOCK_DIM_X
    {3, 1024},                // MAX_BLOCK_DIM_Y
    {4, 64},                  // MAX_BLOCK_DIM_Z
    {5, 2147483647},          // MAX_GRID_DIM_X
    {6, 65535},               // MAX_GRID_DIM_Y
    {7, 65535},               // MAX_GRID_DIM_Z
    {8, MAX_SHARED_UNASKED},  // MAX_SHARED_MEMORY_PER_BLOCK
    {9, 65536},               // TOTAL_CONSTANT_MEMORY
    {10, 32},                 // WARP_SIZE
    {11, 2147483647},         // MAX_PITCH
    {12, 65536},              // MAX_REGISTERS_PER_BLOCK
    {13, 1980000},            // CLOCK_RATE, kHz
    {14, 512},                // TEXTURE_ALIGNMENT
    {15, 1},                  // GPU_OVERLAP
    {16, MULTIPROCESSORS},    // MULTIPROCESSOR_COUNT
    {19, 1},                  // CAN_MAP_HOST_MEMORY
    {31, 1},                  // CONCURRENT_KERNELS
    {32, 1},                  // ECC_ENABLED
    {36, 2619000},            // MEMORY_CLOCK_RATE, kHz
    {37, 5120},               // GLOBAL_MEMORY_BUS_WIDTH, bits
    {38, 50 << 20},           // L2_CACHE_SIZE
    {39, 2048},               // MAX_THREADS_PER_MULTIPROCESSOR
    {40, 3},                  // ASYNC_ENGINE_COUNT
    {41, 1},                  // UNIFIED_ADDRESSING
    {75, 9},                  // COMPUTE_CAPABILITY_MAJOR
    {76, 0},                  // COMPUTE_CAPABILITY_MINOR
    {78, 1},                  // STREAM_PRIORITIES_SUPPORTED
    {79, 1},                  // GLOBAL_L1_CACHE_SUPPORTED
    {80, 1},                  // LOCAL_L1_CACHE_SUPPORTED
    {81, 228 * 1024},         // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
    {82, 65536},              // MAX_REGISTERS_PER_MULTIPROCESSOR
    {87, 2},                  // SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO
    {90, 1},                  // COMPUTE_PREEMPTION_SUPPORTED
    {97, MAX_SHARED},         // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    {99, 1},                  // HOST_REGISTER_SUPPORTED
    {106, 32},                // MAX_BLOCKS_PER_MULTIPROCESSOR
    {111, 1024},              // RESERVED_SHARED_MEMORY_PER_BLOCK
    {115, 1},                 // MEMORY_POOLS_SUPPORTED
};

API int cuDeviceGetCount(int* count) {
    *count = device_count();
    if (device_count() == 0) return CUDA_SUCCESS;
    return initialized() ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

API int cuDeviceGet(int* device, int ordinal) {
    if (!initialized()) return CUDA_ERROR_NOT_INITIALIZED;
    if (device_at(ordinal) == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

API int cuDeviceGetName(char* name, int bytes, int ordinal) {
    if (device_at(ordinal) == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    if (bytes <= 0) return CUDA_ERROR_INVALID_VALUE;
    snprintf(name, static_cast<size_t>(bytes), "Software GPU");
    return CUDA_SUCCESS;
}

API int cuDeviceGetUuid_v2(unsigned char uuid[16], int ordinal) {
    if (device_at(ordinal) == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    memcpy(uuid, "software gpu \0\0", 16);
    uuid[15] = static_cast<unsigned char>(ordinal);
    return CUDA_SUCCESS;
}

API int cuDeviceGetUuid(unsigned char uuid[16], int ordinal) { return cuDeviceGetUuid_v2(uuid, ordinal); }

API int cuDeviceTotalMem_v2(size_t* bytes, int ordinal) {
    Device* device = device_at(ordinal);
    if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = device->total;
    return CUDA_SUCCESS;
}

API int cuDeviceGetAttribute(int* value, int attribute, int ordinal) {
    if (device_at(ordinal) == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    if (attribute < 1 || attribute > 200) return CUDA_ERROR_INVALID_VALUE;
    *value = attribute == 33 ? ordinal : 0;  // PCI_BUS_ID; what is not named is not supported
    for (const Property& property : PROPERTIES) {
        if (property.attribute == attribute) *value = property.value;
    }
    return CUDA_SUCCESS;
}

API int cuDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return CUDA_SUCCESS;
}

API int cuGetErrorName(int status, const char** name) {
#define SOFTWARE_GPU_STATUS(label, code, text) \
    if (status == code) return *name = #label, CUDA_SUCCESS;
    SOFTWARE_GPU_STATUSES(SOFTWARE_GPU_STATUS)
#undef SOFTWARE_GPU_STATUS
    *name = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

API int cuGetErrorString(int status, const char** text) {
#define SOFTWARE_GPU_STATUS(label, code, words) \
    if (status == code) return *text = words, CUDA_SUCCESS;
    SOFTWARE_GPU_STATUSES(SOFTWARE_GPU_STATUS)
#undef SOFTWARE_GPU_STATUS
    *text = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

}  // namespace software_gpu
