// Copies and fills. Each is done when the call returns, but for asynchronous copies of pinned memory; every
// device range is checked.

#include <cstring>

#include "queues.h"

namespace software_gpu {

static void* pointer(Address at) { return reinterpret_cast<void*>(at); }

static bool covers(Address at, size_t bytes) { return bytes == 0 || is_device_range(pointer(at), bytes); }

static Status move(void* to, const void* from, size_t bytes) {
    if (to == nullptr || from == nullptr) return bytes == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    memmove(to, from, bytes);
    return CUDA_SUCCESS;
}

// A copy that may be put off is, unless the caller is to have it `now`.
static Status copy(void* to, const void* from, size_t bytes, bool upload, const Stream* stream, bool now) {
    if (Status status = usable(stream)) return status;
    if (!covers(reinterpret_cast<Address>(upload ? to : from), bytes)) return CUDA_ERROR_INVALID_VALUE;
    Copy later{};
    if (!now && is_deferrable(to, from, bytes, upload, &later)) return put_off(stream, later);
    if (Status status = submit(stream)) return status;
    return move(to, from, bytes);
}

API int cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, Stream* stream) {
    return copy(pointer(to), from, bytes, true, stream, false);
}

API int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, Stream* stream) {
    return copy(to, pointer(from), bytes, false, stream, false);
}

API int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, Stream* stream) {
    if (Status status = submit(stream)) return status;
    if (!covers(to, bytes) || !covers(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
    return move(pointer(to), pointer(from), bytes);
}

API int cuMemcpyHtoD_v2(Address to, const void* from, size_t bytes) { return copy(pointer(to), from, bytes, true, nullptr, true); }
API int cuMemcpyDtoH_v2(void* to, Address from, size_t bytes) { return copy(to, pointer(from), bytes, false, nullptr, true); }
API int cuMemcpyDtoD_v2(Address to, Address from, size_t bytes) { return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr); }

template <typename T>
static Status fill(Address at, T value, size_t count, const Stream* stream) {
    if (Status status = submit(stream)) return status;
    if (at % sizeof(T) != 0 || count > SIZE_MAX / sizeof(T)) return CUDA_ERROR_INVALID_VALUE;
    if (!covers(at, count * sizeof(T))) return CUDA_ERROR_INVALID_VALUE;
    T* to = reinterpret_cast<T*>(at);
    for (size_t i = 0; i < count; i += 1) to[i] = value;
    return CUDA_SUCCESS;
}

API int cuMemsetD8Async(Address at, unsigned char value, size_t count, Stream* stream) { return fill(at, value, count, stream); }
API int cuMemsetD16Async(Address at, unsigned short value, size_t count, Stream* stream) { return fill(at, value, count, stream); }
API int cuMemsetD32Async(Address at, unsigned value, size_t count, Stream* stream) { return fill(at, value, count, stream); }
API int cuMemsetD8_v2(Address at, unsigned char value, size_t count) { return fill(at, value, count, nullptr); }
API int cuMemsetD16_v2(Address at, unsigned short value, size_t count) { return fill(at, value, count, nullptr); }
API int cuMemsetD32_v2(Address at, unsigned value, size_t count) { return fill(at, value, count, nullptr); }

// ---- the pool of a device: its memory is given back at once, so its settings only are kept

API int cuDeviceGetDefaultMemPool(Device** pool, int ordinal) {
    *pool = device_at(ordinal);
    return *pool != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

API int cuDeviceGetMemPool(Device** pool, int ordinal) { return cuDeviceGetDefaultMemPool(pool, ordinal); }

API int cuMemPoolGetAttribute(Device* pool, int attribute, void* value) {
    if (pool == nullptr || value == nullptr) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
        case 1: case 2: case 3: *static_cast<int*>(value) = 1; return CUDA_SUCCESS;  // reuse of freed memory
        case 4: *static_cast<uint64_t*>(value) = pool->release_threshold; return CUDA_SUCCESS;
        case 5: case 7: *static_cast<uint64_t*>(value) = pool->used; return CUDA_SUCCESS;
        case 6: case 8: *static_cast<uint64_t*>(value) = pool->used_high; return CUDA_SUCCESS;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
}

API int cuMemPoolSetAttribute(Device* pool, int attribute, void* value) {
    if (pool == nullptr || value == nullptr) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
        case 1: case 2: case 3: return CUDA_SUCCESS;
        case 4: pool->release_threshold = *static_cast<uint64_t*>(value); return CUDA_SUCCESS;
        case 6: case 8: pool->used_high = pool->used.load(); return CUDA_SUCCESS;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
}

API int cuMemPoolTrimTo(Device* pool, size_t) { return pool != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }

}  // namespace software_gpu
