// What cuBLAS and cuSOLVER have in common: their enums, handles and the checks of what they are given.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device.h"
#include "matrices.h"
#include "queues.h"

namespace software_gpu {

enum { FILL_LOWER = 0, FILL_UPPER = 1 };
enum { SIDE_LEFT = 0, SIDE_RIGHT = 1 };
enum { OP_N = 0, OP_T = 1, OP_C = 2 };
enum { DIAG_NON_UNIT = 0, DIAG_UNIT = 1 };

// What a cublasHandle_t or a cusolverDnHandle_t points to.
struct Library {
    Stream* stream = nullptr;
    int pointer_mode = 0;  // 0: scalars lie in host memory
    int math_mode = 0;
    int deterministic = 0;
};

// Whether `count` numbers from `at` are device memory; says so and fails the context if not.
inline bool on_device(const char* who, const char* what, Type type, const void* at, size_t count) {
    if (count == 0) return true;
    if (!is_device_range(at, count * size_of(type))) {
        fail(CUDA_ERROR_ILLEGAL_ADDRESS, "%s: %s, %zu numbers at %p, is not inside one allocation of device memory", who, what, count, at);
        return false;
    }
    if (reinterpret_cast<uintptr_t>(at) % size_of(type) == 0) return true;
    fail(CUDA_ERROR_MISALIGNED_ADDRESS, "%s: %s, at %p, is not a multiple of %zu", who, what, at, size_of(type));
    return false;
}

inline bool on_device(const char* who, const char* what, const Stored& stored) {
    size_t count = stored.rows == 0 || stored.columns == 0 ? 0 : (stored.columns - 1) * stored.stride + stored.rows;
    return on_device(who, what, stored.type, stored.at, count);
}

inline Stored stored(const void* at, Type type, int64_t rows, int64_t columns, int64_t stride) {
    return {at, type, static_cast<size_t>(rows), static_cast<size_t>(columns), static_cast<size_t>(stride)};
}

template <typename T>
constexpr Type type_of = sizeof(T) == 8 ? F64 : F32;

}  // namespace software_gpu
