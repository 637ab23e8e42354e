// Device memory: every allocation between two pages that must not be touched, filled with 0xFF.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.h"

namespace software_gpu {

using Address = uint64_t;

// What a byte holds that nothing has written: as a float, a NaN; as an index, far out of bounds.
constexpr int POISON = 0xFF;

Status allocate(Address* at, size_t bytes);
Status release(Address at);

// Whether the `bytes` at `at` lie in one live allocation of the current device.
bool is_device_range(const void* at, size_t bytes);

// Whether a kernel may be given `at`: in, or at the end of, an allocation or pinned host memory.
bool is_kernel_pointer(const void* at);

// A copy between pinned host memory and device memory that may be made later.
struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    uint64_t allocation;  // the number of that on the device
    bool upload;
};

// Whether a copy of `bytes`, not 0, is between device memory and pinned memory that both cover it.
bool is_deferrable(void* to, const void* from, size_t bytes, bool upload, Copy* copy);

// Makes a copy. If its device memory was given back since, `context`, in which it was asked for, fails.
Status make(const Copy& copy, Context* context);

// Says into `text` which allocation `at` is in or beside; false if none is near.
bool describe(const void* at, char* text, size_t bytes);

}  // namespace software_gpu
