// The dynamic shared memory of a block.
#pragma once

#include <cstddef>

namespace software_gpu {

// `bytes` bytes that end at a page that must not be touched (16-byte steps), filled with 0xFF.
unsigned char* fresh_shared(size_t bytes);

}  // namespace software_gpu
