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

// Says into `text` which allocation `at` is in or beside; false if none is near.
bool describe(const void* at, char* text, size_t bytes);

}  // namespace software_gpu
