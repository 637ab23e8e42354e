// The status codes of the driver API that this device returns (cuda.h, enum cudaError_enum).
#pragma once

namespace software_gpu {

#define SOFTWARE_GPU_STATUSES(X)                                                     \
    X(CUDA_SUCCESS, 0, "no error")                                                   \
    X(CUDA_ERROR_INVALID_VALUE, 1, "invalid argument")                               \
    X(CUDA_ERROR_OUT_OF_MEMORY, 2, "out of memory")                                  \
    X(CUDA_ERROR_NOT_INITIALIZED, 3, "initialization error")                         \
    X(CUDA_ERROR_NO_DEVICE, 100, "no CUDA-capable device is detected")               \
    X(CUDA_ERROR_INVALID_DEVICE, 101, "invalid device ordinal")                      \
    X(CUDA_ERROR_INVALID_IMAGE, 200, "device kernel image is invalid")               \
    X(CUDA_ERROR_INVALID_CONTEXT, 201, "invalid device context")                     \
    X(CUDA_ERROR_NO_BINARY_FOR_GPU, 209, "no kernel image is available for execution on the device") \
    X(CUDA_ERROR_ECC_UNCORRECTABLE, 214, "uncorrectable ECC error encountered")      \
    X(CUDA_ERROR_FILE_NOT_FOUND, 301, "file not found")                              \
    X(CUDA_ERROR_INVALID_HANDLE, 400, "invalid resource handle")                     \
    X(CUDA_ERROR_NOT_FOUND, 500, "named symbol not found")                           \
    X(CUDA_ERROR_NOT_READY, 600, "device not ready")                                 \
    X(CUDA_ERROR_ILLEGAL_ADDRESS, 700, "an illegal memory access was encountered")   \
    X(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, 701, "too many resources requested for launch") \
    X(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, 712, "part or all of the requested memory range is already mapped") \
    X(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, 713, "pointer does not correspond to a registered memory region") \
    X(CUDA_ERROR_MISALIGNED_ADDRESS, 716, "misaligned address")                      \
    X(CUDA_ERROR_LAUNCH_FAILED, 719, "unspecified launch failure")                   \
    X(CUDA_ERROR_NOT_SUPPORTED, 801, "operation not supported")

enum Status : int {
#define SOFTWARE_GPU_STATUS(name, code, text) name = code,
    SOFTWARE_GPU_STATUSES(SOFTWARE_GPU_STATUS)
#undef SOFTWARE_GPU_STATUS
};

}  // namespace software_gpu

// A function that the dynamic library offers.
#define API extern "C" __attribute__((visibility("default")))
