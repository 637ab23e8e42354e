#include "queues.h"

#include <deque>
#include <mutex>
#include <vector>

namespace software_gpu {

// How many times a query says that work is not done before it does it.
static const unsigned PATIENCE = 100;

static const unsigned STREAM_NON_BLOCKING = 1;

// What a stream waits for from other streams, of its context: the legacy stream for the blocking ones, and
// each of those for it.
enum class Order { Legacy, Blocking, Free };

struct Item {
    Copy copy;
    Place after;  // with a queue: in place of a copy, all before this place
};

struct Queue {
    Context* context;
    Order order;
    std::deque<Item> items{};
    uint64_t done = 0;  // of all items it ever had
    unsigned asked = 0;

    uint64_t end() const { return done + items.size(); }
};

static std::mutex guard;  // of all queues; taken before that of memory
static std::vector<std::weak_ptr<Queue>> queues;

static std::shared_ptr<Queue> add(Context* context, Order order) {
    size_t kept = 0;
    for (size_t i = 0; i < queues.size(); i += 1) {
        if (!queues[i].expired()) queues[kept++] = queues[i];
    }
    queues.resize(kept);
    auto made = std::make_shared<Queue>(Queue{context, order});
    queues.push_back(made);
    return made;
}

std::shared_ptr<Queue> new_queue(Context* context, unsigned flags) {
    std::lock_guard<std::mutex> lock(guard);
    return add(context, flags == STREAM_NON_BLOCKING ? Order::Free : Order::Blocking);
}

static const std::shared_ptr<Queue>& queue_of(const Stream* stream) {
    if (!is_legacy(stream)) return stream->queue;
    Context* context = current_context();
    if (context->legacy == nullptr) context->legacy = add(context, Order::Legacy);
    return context->legacy;
}

// An event that is waited for was recorded before the wait, so what is before it never comes back to this wait.
static void reach(Queue& queue, uint64_t items) {
    while (queue.done < items) {
        Item item = queue.items.front();
        queue.items.pop_front();
        queue.done += 1;
        if (queue.context->failure != CUDA_SUCCESS) continue;
        if (item.after.queue != nullptr) {
            reach(*item.after.queue, item.after.items);
        } else {
            make(item.copy, queue.context);
        }
    }
}

// The queues of other streams, all of which the next work of `queue` comes after.
static std::vector<std::shared_ptr<Queue>> others(const Queue& queue) {
    std::vector<std::shared_ptr<Queue>> found;
    if (queue.order == Order::Free) return found;
    Order wanted = queue.order == Order::Legacy ? Order::Blocking : Order::Legacy;
    for (const auto& weak : queues) {
        auto other = weak.lock();
        if (other != nullptr && other->context == queue.context && other->order == wanted) found.push_back(other);
    }
    return found;
}

static void reach_others(const Queue& queue) {
    for (const auto& other : others(queue)) reach(*other, other->end());
}

Status submit(const Stream* stream) {
    if (Status status = usable(stream)) return status;
    {
        std::lock_guard<std::mutex> lock(guard);
        Queue& queue = *queue_of(stream);
        reach_others(queue);
        reach(queue, queue.end());
    }
    return usable(stream);
}

static Status put_off(const Stream* stream, Item item) {
    Queue& queue = *queue_of(stream);
    reach_others(queue);
    queue.items.push_back(std::move(item));
    return CUDA_SUCCESS;
}

Status put_off(const Stream* stream, const Copy& copy) {
    std::lock_guard<std::mutex> lock(guard);
    return put_off(stream, Item{copy, {}});
}

Status put_off(const Stream* stream, const Place& place) {
    std::lock_guard<std::mutex> lock(guard);
    if (place.queue == nullptr || place.queue->done >= place.items) return CUDA_SUCCESS;
    return put_off(stream, Item{{}, place});
}

Place end_of(const Stream* stream) {
    std::lock_guard<std::mutex> lock(guard);
    const auto& queue = queue_of(stream);
    reach_others(*queue);
    return {queue, queue->end()};
}

Status reach(const Place& place) {
    if (place.queue != nullptr) {
        std::lock_guard<std::mutex> lock(guard);
        reach(*place.queue, place.items);
    }
    return usable();
}

static Status query(Queue& queue, uint64_t items) {
    if (queue.done >= items) return CUDA_SUCCESS;
    queue.asked += 1;
    if (queue.asked % PATIENCE == 0) reach(queue, items);
    return CUDA_ERROR_NOT_READY;
}

Status query(const Stream* stream) {
    if (Status status = usable(stream)) return status;
    std::lock_guard<std::mutex> lock(guard);
    Queue& queue = *queue_of(stream);
    for (const auto& other : others(queue)) {
        if (Status status = query(*other, other->end())) return status;
    }
    return query(queue, queue.end());
}

Status query(const Place& place) {
    if (Status status = usable()) return status;
    std::lock_guard<std::mutex> lock(guard);
    return place.queue != nullptr ? query(*place.queue, place.items) : CUDA_SUCCESS;
}

void finish(const Stream* stream) {
    std::lock_guard<std::mutex> lock(guard);
    reach(*stream->queue, stream->queue->end());
}

Status finish(Context* context) {
    {
        std::lock_guard<std::mutex> lock(guard);
        for (const auto& weak : queues) {
            auto queue = weak.lock();
            if (queue != nullptr && queue->context == context) reach(*queue, queue->end());
        }
    }
    return static_cast<Status>(context->failure.load());
}

void finish_all() {
    std::lock_guard<std::mutex> lock(guard);
    for (const auto& weak : queues) {
        if (auto queue = weak.lock()) reach(*queue, queue->end());
    }
}

}  // namespace software_gpu
