// Streams and events. All but what `queues` puts off is done when it is submitted.

#include <chrono>
#include <cstdint>

#include "queues.h"

namespace software_gpu {

using Clock = std::chrono::steady_clock;

// What a CUevent points to.
struct Event {
    Context* context;
    unsigned flags;
    bool recorded;
    Clock::time_point at;
    Place place;  // where in its stream it was recorded
};

static const unsigned EVENT_DISABLE_TIMING = 2;

API int cuStreamCreateWithPriority(Stream** stream, unsigned flags, int priority) {
    if (Status status = usable()) return status;
    if (flags > 1) return CUDA_ERROR_INVALID_VALUE;
    *stream = new Stream{current_context(), flags, priority, new_queue(current_context(), flags)};
    return CUDA_SUCCESS;
}

API int cuStreamCreate(Stream** stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }

API int cuStreamDestroy_v2(Stream* stream) {
    if (is_legacy(stream)) return CUDA_ERROR_INVALID_HANDLE;
    finish(stream);
    int status = stream->context->failure;
    delete stream;
    return status;
}

API int cuStreamSynchronize(Stream* stream) { return submit(stream); }
API int cuStreamQuery(Stream* stream) { return query(stream); }

API int cuStreamGetCtx(Stream* stream, Context** context) {
    *context = is_legacy(stream) ? current_context() : stream->context;
    return CUDA_SUCCESS;
}

API int cuStreamIsCapturing(Stream* stream, int* capturing) {
    *capturing = 0;
    return usable(stream);
}

API int cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    if (Status status = usable(stream)) return status;
    return event != nullptr ? put_off(stream, event->place) : CUDA_ERROR_INVALID_HANDLE;
}

API int cuLaunchHostFunc(Stream* stream, void (*function)(void*), void* data) {
    if (Status status = submit(stream)) return status;
    function(data);
    return CUDA_SUCCESS;
}

API int cuEventCreate(Event** event, unsigned flags) {
    if (Status status = usable()) return status;
    *event = new Event{current_context(), flags, false, {}, {}};
    return CUDA_SUCCESS;
}

// What is before the event is not waited for.
API int cuEventDestroy_v2(Event* event) {
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    int status = event->context->failure;
    delete event;
    return status;
}

API int cuEventRecord(Event* event, Stream* stream) {
    if (Status status = usable(stream)) return status;
    if (event == nullptr || event->context != current_context()) return CUDA_ERROR_INVALID_HANDLE;
    event->place = end_of(stream);
    event->recorded = true;
    event->at = Clock::now();
    return CUDA_SUCCESS;
}

API int cuEventQuery(Event* event) { return event != nullptr ? query(event->place) : CUDA_ERROR_INVALID_HANDLE; }
API int cuEventSynchronize(Event* event) { return event != nullptr ? reach(event->place) : CUDA_ERROR_INVALID_HANDLE; }

API int cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
    if (Status status = usable()) return status;
    if (start == nullptr || end == nullptr || !start->recorded || !end->recorded) return CUDA_ERROR_INVALID_HANDLE;
    if (((start->flags | end->flags) & EVENT_DISABLE_TIMING) != 0) return CUDA_ERROR_INVALID_HANDLE;
    if (Status status = query(start->place)) return status;
    if (Status status = query(end->place)) return status;
    *milliseconds = std::chrono::duration<float, std::milli>(end->at - start->at).count();
    return CUDA_SUCCESS;
}

API int cuEventElapsedTime(float* milliseconds, Event* start, Event* end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}

}  // namespace software_gpu
