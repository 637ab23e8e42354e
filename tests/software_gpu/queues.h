// What streams put off: copies between pinned memory and the device, and the events they come after.
#pragma once

#include <cstdint>
#include <memory>

#include "memory.h"

namespace software_gpu {

// The work that one stream has put off.
struct Queue;

// A place in a stream: behind the first `items` that its queue ever had.
struct Place {
    std::shared_ptr<Queue> queue;  // null: before everything
    uint64_t items = 0;
};

// The queue of a new stream with these flags.
std::shared_ptr<Queue> new_queue(Context* context, unsigned flags);

// Takes what a stream does at once: as `usable`, and all that it comes after is done.
Status submit(const Stream* stream);

// Puts work off until something comes after it. The stream is usable.
Status put_off(const Stream* stream, const Copy& copy);
Status put_off(const Stream* stream, const Place& place);

// The end of all that was submitted to the stream.
Place end_of(const Stream* stream);

// Does what is before a place.
Status reach(const Place& place);

// CUDA_ERROR_NOT_READY as long as something before the end of the stream, or before the place, is not done.
// Who goes on asking gets it done in the end.
Status query(const Stream* stream);
Status query(const Place& place);

// Does what the stream has put off.
void finish(const Stream* stream);

// Does what all streams of the context, or of all contexts, have put off.
Status finish(Context* context);
void finish_all();

}  // namespace software_gpu
