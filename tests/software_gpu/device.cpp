#include "device.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "queues.h"

namespace software_gpu {

static long setting(const char* name, long otherwise) {
    const char* text = getenv(name);
    if (text == nullptr || *text == 0) return otherwise;
    char* end = nullptr;
    long value = strtol(text, &end, 10);
    if (*end != 0 || value < 0) {
        fprintf(stderr, "software gpu: %s=%s is not a number\n", name, text);
        abort();
    }
    return value;
}

static std::atomic<bool> ready{false};
static thread_local std::vector<Context*> contexts;  // the stack of the calling thread

static std::vector<std::unique_ptr<Device>>& devices() {
    static auto all = [] {
        std::vector<std::unique_ptr<Device>> made(static_cast<size_t>(setting("SOFTWARE_GPU_COUNT", 1)));
        for (auto& device : made) {
            device = std::make_unique<Device>();
            device->total = static_cast<size_t>(setting("SOFTWARE_GPU_MEMORY", 4L << 30));
            device->primary = new Context{device.get()};
        }
        return made;
    }();
    return all;
}

int device_count() { return static_cast<int>(devices().size()); }

Device* device_at(int ordinal) {
    if (ordinal < 0 || ordinal >= device_count()) return nullptr;
    return devices()[static_cast<size_t>(ordinal)].get();
}

int ordinal_of(const Device* device) {
    int at = 0;
    while (device_at(at) != device) at += 1;
    return at;
}

bool initialized() { return ready; }

Context* current_context() { return contexts.empty() ? nullptr : contexts.back(); }

Status usable() {
    if (!ready) return CUDA_ERROR_NOT_INITIALIZED;
    Context* context = current_context();
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    return static_cast<Status>(context->failure.load());
}

Status usable(const Stream* stream) {
    Status status = usable();
    if (status != CUDA_SUCCESS) return status;
    if (is_legacy(stream)) return CUDA_SUCCESS;
    return stream->context == current_context() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

static Status fail(Context* context, Status status, const char* format, va_list rest) {
    fputs("software gpu: ", stderr);
    vfprintf(stderr, format, rest);
    fputs("\n", stderr);
    if (context != nullptr) context->failure = status;
    return status;
}

Status fail(Status status, const char* format, ...) {
    va_list rest;
    va_start(rest, format);
    fail(current_context(), status, format, rest);
    va_end(rest);
    return status;
}

Status fail(Context* context, Status status, const char* format, ...) {
    va_list rest;
    va_start(rest, format);
    fail(context, status, format, rest);
    va_end(rest);
    return status;
}

Status count_launch() {
    static const long lost_after = setting("SOFTWARE_GPU_LOST_AFTER", 0);
    long launch = ++current_context()->device->launches;
    if (lost_after == 0 || launch < lost_after) return CUDA_SUCCESS;
    return fail(CUDA_ERROR_ECC_UNCORRECTABLE, "the device is lost at launch %ld, as SOFTWARE_GPU_LOST_AFTER says", launch);
}

// ---- the driver API for devices and contexts

API int cuInit(unsigned flags) {
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (device_count() == 0) return CUDA_ERROR_NO_DEVICE;
    ready = true;
    return CUDA_SUCCESS;
}

API int cuDriverGetVersion(int* version) {
    *version = static_cast<int>(setting("SOFTWARE_GPU_DRIVER_VERSION", 13000));
    return CUDA_SUCCESS;
}

API int cuCtxGetCurrent(Context** context) {
    *context = current_context();
    return ready ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

API int cuCtxSetCurrent(Context* context) {
    if (!ready) return CUDA_ERROR_NOT_INITIALIZED;
    if (!contexts.empty()) contexts.pop_back();
    if (context != nullptr) contexts.push_back(context);
    return CUDA_SUCCESS;
}

API int cuCtxPushCurrent_v2(Context* context) {
    if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
    contexts.push_back(context);
    return CUDA_SUCCESS;
}

API int cuCtxPopCurrent_v2(Context** context) {
    if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (context != nullptr) *context = contexts.back();
    contexts.pop_back();
    return CUDA_SUCCESS;
}

API int cuDevicePrimaryCtxRetain(Context** context, int ordinal) {
    if (!ready) return CUDA_ERROR_NOT_INITIALIZED;
    Device* device = device_at(ordinal);
    if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    device->retained += 1;
    *context = device->primary;
    return device->primary->failure;
}

API int cuDevicePrimaryCtxRelease_v2(int ordinal) {
    Device* device = device_at(ordinal);
    if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    if (device->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
    device->retained -= 1;
    return CUDA_SUCCESS;
}

API int cuDevicePrimaryCtxGetState(int ordinal, unsigned* flags, int* active) {
    Device* device = device_at(ordinal);
    if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    *flags = 0;
    *active = device->retained > 0;
    return CUDA_SUCCESS;
}

API int cuDevicePrimaryCtxSetFlags_v2(int ordinal, unsigned) {
    return device_at(ordinal) != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

API int cuCtxCreate_v4(Context** context, void*, unsigned, int ordinal) {
    if (!ready) return CUDA_ERROR_NOT_INITIALIZED;
    Device* device = device_at(ordinal);
    if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    *context = new Context{device};
    contexts.push_back(*context);
    return CUDA_SUCCESS;
}

API int cuCtxDestroy_v2(Context* context) {
    if (context == nullptr || context == context->device->primary) return CUDA_ERROR_INVALID_CONTEXT;
    finish(context);
    while (!contexts.empty() && contexts.back() == context) contexts.pop_back();
    return CUDA_SUCCESS;  // not freed: a stream of it may be destroyed later
}

API int cuCtxGetDevice(int* ordinal) {
    if (Status status = usable()) return status;
    *ordinal = ordinal_of(current_context()->device);
    return CUDA_SUCCESS;
}

API int cuCtxSynchronize() {
    if (Status status = usable()) return status;
    return finish(current_context());
}

API int cuCtxSetFlags(unsigned) { return usable(); }
API int cuCtxSetCacheConfig(int) { return usable(); }
API int cuCtxSetLimit(int, size_t) { return usable(); }

API int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    if (least != nullptr) *least = 0;
    if (greatest != nullptr) *greatest = -5;
    return usable();
}

API int cuCtxGetApiVersion(Context*, unsigned* version) {
    *version = 3020;
    return usable();
}

}  // namespace software_gpu
