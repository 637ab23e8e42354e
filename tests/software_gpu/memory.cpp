#include "queues.h"

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <sys/mman.h>

namespace software_gpu {

static const size_t PAGE = 4096;
static const size_t ALIGN = 16;

struct Allocation {
    size_t bytes;
    Device* device;  // null for pinned host memory
    char* mapping;   // null for host memory that was only registered
    size_t mapped;
    uint64_t number;  // no other allocation has, or had, it
};

static std::mutex guard;
static std::map<Address, Allocation> live;  // by address
static uint64_t allocations = 0;

static char* pointer(Address at) { return reinterpret_cast<char*>(at); }

// The allocation that `at` lies in or is the end of.
static std::map<Address, Allocation>::iterator find(Address at) {
    auto after = live.upper_bound(at);
    if (after == live.begin()) return live.end();
    auto found = std::prev(after);
    return at - found->first <= found->second.bytes ? found : live.end();
}

// A guard page, whole pages that end with the allocation, a guard page.
static Status map(size_t bytes, Device* device, Address* at) {
    size_t body = (bytes + PAGE - 1) / PAGE * PAGE;
    size_t mapped = body + 2 * PAGE;
    void* mapping = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    char* first = static_cast<char*>(mapping) + PAGE;
    if (mprotect(first, body, PROT_READ | PROT_WRITE) != 0) {
        munmap(mapping, mapped);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    memset(first, POISON, body);
    *at = reinterpret_cast<Address>(first + body - (bytes + ALIGN - 1) / ALIGN * ALIGN);
    std::lock_guard<std::mutex> lock(guard);
    live[*at] = Allocation{bytes, device, static_cast<char*>(mapping), mapped, ++allocations};
    return CUDA_SUCCESS;
}

Status allocate(Address* at, size_t bytes) {
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    Device* device = current_context()->device;
    size_t used = device->used.load();
    do {
        if (bytes > device->total - used) return CUDA_ERROR_OUT_OF_MEMORY;
    } while (!device->used.compare_exchange_weak(used, used + bytes));
    if (used + bytes > device->used_high) device->used_high = used + bytes;
    Status status = map(bytes, device, at);
    if (status != CUDA_SUCCESS) device->used -= bytes;
    return status;
}

// The number of bytes beside an allocation, on its own pages, that something wrote to.
static size_t strayed(Address at, const Allocation& block) {
    const char* first = block.mapping + PAGE;
    const char* end = block.mapping + block.mapped - PAGE;
    size_t count = 0;
    for (const char* byte = first; byte < pointer(at); byte += 1) count += *byte != static_cast<char>(POISON);
    for (const char* byte = pointer(at) + block.bytes; byte < end; byte += 1) {
        count += *byte != static_cast<char>(POISON);
    }
    return count;
}

static Status unmap(Address at, bool pinned) {
    std::lock_guard<std::mutex> lock(guard);
    auto found = live.find(at);
    if (found == live.end()) return CUDA_ERROR_INVALID_VALUE;
    Allocation block = found->second;
    if (pinned != (block.device == nullptr) || block.mapping == nullptr) return CUDA_ERROR_INVALID_VALUE;
    size_t wild = strayed(at, block);
    live.erase(found);
    munmap(block.mapping, block.mapped);
    if (block.device != nullptr) block.device->used -= block.bytes;
    if (wild == 0) return CUDA_SUCCESS;
    return fail(CUDA_ERROR_ILLEGAL_ADDRESS, "something wrote %zu bytes beside an allocation of %zu bytes", wild, block.bytes);
}

Status release(Address at) { return unmap(at, false); }

bool is_device_range(const void* at, size_t bytes) {
    std::lock_guard<std::mutex> lock(guard);
    Address address = reinterpret_cast<Address>(at);
    auto found = find(address);
    if (found == live.end() || found->second.device == nullptr) return false;
    if (current_context() != nullptr && found->second.device != current_context()->device) return false;
    return bytes <= found->second.bytes - (address - found->first);
}

bool is_kernel_pointer(const void* at) {
    std::lock_guard<std::mutex> lock(guard);
    return find(reinterpret_cast<Address>(at)) != live.end();
}

// Whether the allocation that `at` lies in, if there is one, has `bytes` from there.
static bool has(std::map<Address, Allocation>::iterator found, const void* at, size_t bytes) {
    return found != live.end() && bytes <= found->second.bytes - (reinterpret_cast<Address>(at) - found->first);
}

bool is_deferrable(void* to, const void* from, size_t bytes, bool upload, Copy* copy) {
    const void *device = upload ? to : from, *host = upload ? from : to;
    std::lock_guard<std::mutex> lock(guard);
    auto there = find(reinterpret_cast<Address>(device)), here = find(reinterpret_cast<Address>(host));
    if (bytes == 0 || !has(there, device, bytes) || !has(here, host, bytes)) return false;
    if (there->second.device == nullptr || here->second.device != nullptr) return false;
    *copy = {to, from, bytes, there->second.number, upload};
    return true;
}

Status make(const Copy& copy, Context* context) {
    std::lock_guard<std::mutex> lock(guard);
    const void* device = copy.upload ? copy.to : copy.from;
    auto found = find(reinterpret_cast<Address>(device));
    if (found == live.end() || found->second.number != copy.allocation) {
        return fail(context, CUDA_ERROR_ILLEGAL_ADDRESS, "a copy of %zu bytes %s device memory at %p: that memory was freed before the copy",
                    copy.bytes, copy.upload ? "to" : "from", device);
    }
    memcpy(copy.to, copy.from, copy.bytes);
    return CUDA_SUCCESS;
}

// Called when the process is about to die: takes no lock.
bool describe(const void* at, char* text, size_t bytes) {
    Address address = reinterpret_cast<Address>(at);
    for (const auto& [start, block] : live) {
        if (block.mapping == nullptr || address < reinterpret_cast<Address>(block.mapping)) continue;
        if (address >= reinterpret_cast<Address>(block.mapping + block.mapped)) continue;
        snprintf(text, bytes, "%lld bytes from the start of an allocation of %zu bytes",
                 static_cast<long long>(address - start), block.bytes);
        return true;
    }
    return false;
}

// ---- the driver API for memory

API int cuMemAlloc_v2(Address* at, size_t bytes) {
    if (Status status = usable()) return status;
    return allocate(at, bytes);
}

API int cuMemFree_v2(Address at) {
    if (Status status = usable()) return status;
    if (Status status = finish(current_context())) return status;
    return release(at);
}

API int cuMemAllocAsync(Address* at, size_t bytes, Stream* stream) {
    if (Status status = usable(stream)) return status;
    return allocate(at, bytes);
}

API int cuMemAllocFromPoolAsync(Address* at, size_t bytes, Device*, Stream* stream) {
    return cuMemAllocAsync(at, bytes, stream);
}

API int cuMemFreeAsync(Address at, Stream* stream) {
    if (Status status = submit(stream)) return status;
    return release(at);
}

API int cuMemGetInfo_v2(size_t* free, size_t* total) {
    if (Status status = usable()) return status;
    Device* device = current_context()->device;
    *total = device->total;
    *free = device->total - device->used;
    return CUDA_SUCCESS;
}

API int cuMemGetAddressRange_v2(Address* start, size_t* bytes, Address at) {
    if (Status status = usable()) return status;
    std::lock_guard<std::mutex> lock(guard);
    auto found = find(at);
    if (found == live.end()) return CUDA_ERROR_NOT_FOUND;
    if (start != nullptr) *start = found->first;
    if (bytes != nullptr) *bytes = found->second.bytes;
    return CUDA_SUCCESS;
}

API int cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    if (Status status = usable()) return status;
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    Address address = 0;
    Status status = map(bytes, nullptr, &address);
    *at = pointer(address);
    return status;
}

API int cuMemAllocHost_v2(void** at, size_t bytes) { return cuMemHostAlloc(at, bytes, 0); }

API int cuMemFreeHost(void* at) {
    if (Status status = usable()) return status;
    finish_all();  // copies of this memory too
    return unmap(reinterpret_cast<Address>(at), true);
}

API int cuMemHostRegister_v2(void* at, size_t bytes, unsigned) {
    if (Status status = usable()) return status;
    if (at == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    std::lock_guard<std::mutex> lock(guard);
    bool added = live.emplace(reinterpret_cast<Address>(at), Allocation{bytes, nullptr, nullptr, 0, ++allocations}).second;
    return added ? CUDA_SUCCESS : CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
}

API int cuMemHostUnregister(void* at) {
    if (Status status = usable()) return status;
    finish_all();
    std::lock_guard<std::mutex> lock(guard);
    auto found = live.find(reinterpret_cast<Address>(at));
    if (found == live.end() || found->second.mapping != nullptr) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    live.erase(found);
    return CUDA_SUCCESS;
}

API int cuMemHostGetDevicePointer_v2(Address* at, void* host, unsigned) {
    if (Status status = usable()) return status;
    *at = reinterpret_cast<Address>(host);
    return is_kernel_pointer(host) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace software_gpu
