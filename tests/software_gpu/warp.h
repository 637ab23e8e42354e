// What a warp operation gives each of its lanes.
#pragma once

#include "block.h"

namespace software_gpu {

// How the lanes' values are put together in a Reduce meeting (operand[1]).
enum Reduction : uint32_t { ADD, MIN, MAX, MIN_SIGNED, MAX_SIGNED, AND, OR, XOR };

// Fills in the `result` of the threads in `lanes`, of the warp whose lane 0 is `warp`.
void settle(Meeting meeting, Thread* warp, uint32_t lanes);

}  // namespace software_gpu
