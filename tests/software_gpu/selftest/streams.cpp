// What streams put off, and what makes them do it.

#include <cstring>
#include <thread>

#include "check.h"

extern "C" {
int cuMemFreeAsync(Address, void*);
int cuMemHostAlloc(void**, size_t, unsigned);
int cuMemFreeHost(void*);
int cuMemHostRegister_v2(void*, size_t, unsigned);
int cuMemHostUnregister(void*);
int cuMemcpyHtoDAsync_v2(Address, const void*, size_t, void*);
int cuMemcpyDtoHAsync_v2(void*, Address, size_t, void*);
int cuMemcpyDtoDAsync_v2(Address, Address, size_t, void*);
int cuMemsetD32Async(Address, unsigned, size_t, void*);
int cuStreamCreate(void**, unsigned);
int cuStreamDestroy_v2(void*);
int cuStreamSynchronize(void*);
int cuStreamQuery(void*);
int cuStreamWaitEvent(void*, void*, unsigned);
int cuLaunchHostFunc(void*, void (*)(void*), void*);
int cuEventCreate(void**, unsigned);
int cuEventDestroy_v2(void*);
int cuEventRecord(void*, void*);
int cuEventQuery(void*);
int cuEventSynchronize(void*);
int cuEventElapsedTime_v2(float*, void*, void*);
int cublasCreate_v2(void**);
int cublasDestroy_v2(void*);
int cublasSetStream_v2(void*, void*);
int cublasSscal_v2(void*, int, const float*, float*, int);
int cusolverDnCreate(void**);
int cusolverDnDestroy(void*);
int cusolverDnSetStream(void*, void*);
int cusolverDnSpotrf_bufferSize(void*, int, int, float*, int, int*);
int cusolverDnSpotrf(void*, int, int, float*, int, float*, int, int*);
}

static const unsigned PLAIN = 0, NON_BLOCKING = 1;
static const int NOT_READY = 600, GONE = 700;
static const uint32_t NOTHING = 0xFFFFFFFF;
static const size_t COUNT = 4, BYTES = COUNT * sizeof(uint32_t);

// Pinned memory, device memory and a stream.
struct Setting {
    uint32_t* host = nullptr;
    Address device = 0;
    void *stream = nullptr, *event = nullptr;

    explicit Setting(unsigned flags = NON_BLOCKING) {
        CHECK(cuMemHostAlloc(reinterpret_cast<void**>(&host), BYTES, 0) == 0);
        CHECK(cuMemAlloc_v2(&device, BYTES) == 0);
        CHECK(cuStreamCreate(&stream, flags) == 0);
        CHECK(cuEventCreate(&event, 0) == 0);
    }

    ~Setting() {
        CHECK(cuEventDestroy_v2(event) == 0);
        CHECK(cuStreamDestroy_v2(stream) == 0);
        CHECK(cuMemFree_v2(device) == 0);
        CHECK(cuMemFreeHost(host) == 0);
    }

    // Begins to copy `value` to the device, and records the event behind that.
    void upload(uint32_t value) {
        for (size_t i = 0; i < COUNT; i += 1) host[i] = value;
        CHECK(cuMemcpyHtoDAsync_v2(device, host, BYTES, stream) == 0);
        CHECK(cuEventRecord(event, stream) == 0);
    }

    // What the device has now; nothing is waited for, as the stream of the copy is not.
    uint32_t seen() const {
        void* other = nullptr;
        uint32_t values[COUNT];
        CHECK(cuStreamCreate(&other, NON_BLOCKING) == 0);
        CHECK(cuMemcpyDtoHAsync_v2(values, device, BYTES, other) == 0);
        CHECK(cuStreamDestroy_v2(other) == 0);
        for (uint32_t value : values) CHECK(value == values[0]);
        return values[0];
    }
};

static void uploads() {
    Setting early;
    early.upload(1);
    CHECK(early.seen() == NOTHING);  // read before the event
    CHECK(cuStreamQuery(early.stream) == NOT_READY);
    CHECK(cuEventQuery(early.event) == NOT_READY);
    CHECK(cuEventSynchronize(early.event) == 0);
    CHECK(early.seen() == 1);
    CHECK(cuEventQuery(early.event) == 0);
    CHECK(cuStreamQuery(early.stream) == 0);

    Setting reused;
    reused.upload(2);
    reused.host[0] = reused.host[1] = reused.host[2] = reused.host[3] = 3;  // before the event
    CHECK(cuStreamSynchronize(reused.stream) == 0);
    CHECK(reused.seen() == 3);
}

static void downloads() {
    Setting it;
    CHECK(cuMemsetD32_v2(it.device, 4, COUNT) == 0);
    CHECK(cuMemcpyDtoHAsync_v2(it.host, it.device, BYTES, it.stream) == 0);
    CHECK(cuEventRecord(it.event, it.stream) == 0);
    CHECK(it.host[0] == NOTHING);
    CHECK(cuMemsetD32_v2(it.device, 5, COUNT) == 0);  // another stream writes before the event
    CHECK(cuEventSynchronize(it.event) == 0);
    CHECK(it.host[0] == 5 && it.host[3] == 5);
}

// Each is submitted to the stream of a copy, so it comes after it.
static void submissions() {
    uint32_t plain[COUNT];
    Address index_at = upload(std::vector<uint32_t>(8));
    for (int what = 0; what < 6; what += 1) {
        Setting it;
        it.upload(6);
        Address unused = upload(std::vector<uint32_t>(1));
        uint32_t index = 0;
        void* arguments[] = {&index_at, &index};
        auto note = [](void* data) { *static_cast<bool*>(data) = true; };
        bool called = false;
        switch (what) {
            case 0: CHECK(cuLaunchKernel(kernel("write_array_at"), 1, 1, 1, 1, 1, 1, 0, it.stream, arguments, nullptr) == 0); break;
            case 1: CHECK(cuMemsetD32Async(index_at, 0, 1, it.stream) == 0); break;
            case 2: CHECK(cuMemcpyHtoDAsync_v2(index_at, plain, 4, it.stream) == 0); break;
            case 3: CHECK(cuMemcpyDtoDAsync_v2(index_at, index_at + 4, 4, it.stream) == 0); break;
            case 4: CHECK(cuMemFreeAsync(unused, it.stream) == 0); break;
            default: CHECK(cuLaunchHostFunc(it.stream, note, &called) == 0 && called); break;
        }
        CHECK(it.seen() == 6);
        if (what != 4) CHECK(cuMemFree_v2(unused) == 0);
    }
    CHECK(cuMemFree_v2(index_at) == 0);
}

static void libraries() {
    void *blas = nullptr, *solver = nullptr;
    CHECK(cublasCreate_v2(&blas) == 0);
    CHECK(cusolverDnCreate(&solver) == 0);
    Setting scaled, factored;
    Address matrix = upload(std::vector<float>{4.0f}), work = upload(std::vector<float>(64)), info = upload(std::vector<int>(1));
    const float two = 2.0f;
    auto at = [](Address address) { return reinterpret_cast<float*>(address); };
    scaled.upload(7);
    CHECK(cublasSetStream_v2(blas, scaled.stream) == 0);
    CHECK(cublasSscal_v2(blas, 1, &two, at(matrix), 1) == 0);
    CHECK(scaled.seen() == 7);
    factored.upload(8);
    int count = 0;
    CHECK(cusolverDnSetStream(solver, factored.stream) == 0);
    CHECK(cusolverDnSpotrf_bufferSize(solver, 0, 1, at(matrix), 1, &count) == 0 && count <= 64);
    CHECK(cusolverDnSpotrf(solver, 0, 1, at(matrix), 1, at(work), count, reinterpret_cast<int*>(info)) == 0);
    CHECK(factored.seen() == 8);
    for (Address address : {matrix, work, info}) CHECK(cuMemFree_v2(address) == 0);
    CHECK(cublasDestroy_v2(blas) == 0);
    CHECK(cusolverDnDestroy(solver) == 0);
}

static void waits() {
    Setting first, second, third;
    first.upload(1);
    CHECK(cuStreamWaitEvent(second.stream, first.event, 0) == 0);
    CHECK(first.seen() == NOTHING);  // a wait is put off with what comes after it
    second.upload(2);
    CHECK(cuStreamWaitEvent(third.stream, second.event, 0) == 0);
    CHECK(cuEventRecord(first.event, first.stream) == 0);  // another place: the wait keeps the first
    CHECK(cuMemcpyHtoDAsync_v2(first.device + 4, second.host, 4, first.stream) == 0);
    CHECK(cuMemsetD32Async(third.device, 3, COUNT, third.stream) == 0);
    CHECK(first.seen() == 1);  // through the second, but no further
    CHECK(second.seen() == 2);
    CHECK(cuStreamQuery(first.stream) == NOT_READY);

    // An event that nothing was recorded in, and one whose work is done, are not waited for.
    void* never = nullptr;
    CHECK(cuEventCreate(&never, 0) == 0);
    CHECK(cuEventQuery(never) == 0 && cuEventSynchronize(never) == 0);
    CHECK(cuStreamWaitEvent(third.stream, never, 0) == 0);
    CHECK(cuStreamWaitEvent(third.stream, second.event, 0) == 0);
    CHECK(cuStreamQuery(third.stream) == 0);
    CHECK(cuEventDestroy_v2(never) == 0);
}

// An event is done when what was before it is, not with what comes later.
static void places() {
    Setting it;
    void* later = nullptr;
    float milliseconds = 0.0f;
    CHECK(cuEventCreate(&later, 0) == 0);
    it.upload(1);
    CHECK(cuMemcpyHtoDAsync_v2(it.device, it.host, BYTES, it.stream) == 0);
    CHECK(cuEventRecord(later, it.stream) == 0);
    CHECK(cuEventElapsedTime_v2(&milliseconds, it.event, later) == NOT_READY);
    CHECK(cuEventSynchronize(it.event) == 0);
    it.host[0] = it.host[1] = it.host[2] = it.host[3] = 2;
    CHECK(cuEventQuery(later) == NOT_READY);
    CHECK(it.seen() == 1);
    CHECK(cuEventDestroy_v2(later) == 0);  // waits for nothing
    CHECK(it.seen() == 1);
    CHECK(cuStreamSynchronize(it.stream) == 0);
    CHECK(it.seen() == 2);
}

static void patience() {
    Setting it;
    it.upload(1);
    int asked = 0;
    while (cuEventQuery(it.event) == NOT_READY && asked < 1000) asked += 1;
    CHECK(asked > 1 && asked < 1000);
    CHECK(it.seen() == 1);
}

static void null_stream() {
    Setting free, blocking(PLAIN);
    free.upload(1);
    blocking.upload(2);
    CHECK(cuMemsetD32_v2(upload(std::vector<uint32_t>(1)), 0, 1) == 0);  // on the null stream
    CHECK(free.seen() == NOTHING);
    CHECK(blocking.seen() == 2);

    // What the null stream puts off, a blocking stream waits for and another does not.
    Setting null;
    null.host[0] = null.host[1] = null.host[2] = null.host[3] = 3;
    CHECK(cuMemcpyHtoDAsync_v2(null.device, null.host, BYTES, nullptr) == 0);
    CHECK(cuStreamQuery(nullptr) == NOT_READY);
    CHECK(cuStreamQuery(blocking.stream) == NOT_READY);
    CHECK(cuStreamQuery(null.stream) == 0);
    CHECK(null.seen() == NOTHING);
    CHECK(cuMemsetD32Async(blocking.device, 4, 1, blocking.stream) == 0);
    CHECK(null.seen() == 3);

    // A copy that is not asynchronous is done, of pinned memory too, and after the blocking streams'.
    blocking.upload(5);
    null.host[0] = null.host[1] = null.host[2] = null.host[3] = 6;
    CHECK(cuMemcpyHtoD_v2(null.device, null.host, BYTES) == 0);
    CHECK(null.seen() == 6);
    CHECK(blocking.seen() == 5);

    // The order of both is kept where both are put off, and an event of one comes after the other.
    CHECK(cuMemcpyHtoDAsync_v2(blocking.device, null.host, BYTES, nullptr) == 0);
    blocking.upload(7);
    CHECK(cuStreamSynchronize(nullptr) == 0);
    CHECK(blocking.seen() == 7);
    blocking.upload(8);
    CHECK(cuEventRecord(null.event, nullptr) == 0);
    CHECK(cuEventSynchronize(null.event) == 0);
    CHECK(blocking.seen() == 8);
}

static void ends() {
    Setting context;
    context.upload(1);
    CHECK(cuCtxSynchronize() == 0);
    CHECK(context.seen() == 1);

    Setting freed;
    freed.upload(1);
    CHECK(cuMemFree_v2(upload(std::vector<uint32_t>(1))) == 0);  // of any memory
    CHECK(freed.seen() == 1);

    Setting destroyed;
    destroyed.upload(1);
    CHECK(cuStreamDestroy_v2(destroyed.stream) == 0);
    CHECK(destroyed.seen() == 1);
    CHECK(cuEventQuery(destroyed.event) == 0);
    CHECK(cuStreamCreate(&destroyed.stream, NON_BLOCKING) == 0);

    Setting unpinned;
    unpinned.upload(1);
    CHECK(cuMemFreeHost(unpinned.host) == 0);
    CHECK(unpinned.seen() == 1);
    CHECK(cuMemHostAlloc(reinterpret_cast<void**>(&unpinned.host), BYTES, 0) == 0);
}

static void registered() {
    Setting it;
    std::vector<uint32_t> values(COUNT, 9);
    CHECK(cuMemHostRegister_v2(values.data(), BYTES, 0) == 0);
    CHECK(cuMemcpyHtoDAsync_v2(it.device, values.data(), BYTES, it.stream) == 0);
    CHECK(it.seen() == NOTHING);
    CHECK(cuMemHostUnregister(values.data()) == 0);
    CHECK(it.seen() == 9);
    CHECK(cuMemcpyHtoDAsync_v2(it.device, std::vector<uint32_t>(COUNT, 10).data(), BYTES, it.stream) == 0);
    CHECK(it.seen() == 10);  // not pinned: done at once
}

// Four threads, each with a stream that waits for its neighbour's events.
static void threads() {
    void* context = nullptr;
    CHECK(cuDevicePrimaryCtxRetain(&context, 0) == 0);
    Setting each[4];
    std::vector<std::thread> running;
    for (uint32_t mine = 0; mine < 4; mine += 1) {
        running.emplace_back([&each, context, mine] {
            cuCtxSetCurrent(context);
            for (uint32_t round = 1; round <= 200; round += 1) {
                cuStreamWaitEvent(each[mine].stream, each[(mine + 1) % 4].event, 0);
                for (size_t i = 0; i < COUNT; i += 1) each[mine].host[i] = round;
                cuMemcpyHtoDAsync_v2(each[mine].device, each[mine].host, BYTES, each[mine].stream);
                cuEventRecord(each[mine].event, each[mine].stream);
                if (round % 2 == 0) cuEventSynchronize(each[mine].event);
                if (round % 2 == 1) cuStreamSynchronize(each[mine].stream);
            }
        });
    }
    for (auto& thread : running) thread.join();
    CHECK(cuCtxSynchronize() == 0);
    for (const Setting& it : each) CHECK(it.seen() == 200);
}

// Memory that another stream frees, not waiting for the copy to it; then the place may be another's.
int scene_freed_before_copy() {
    open_device();
    void *copies = nullptr, *other = nullptr, *host = nullptr;
    Address device = 0, next = 0;
    CHECK(cuStreamCreate(&copies, NON_BLOCKING) == 0 && cuStreamCreate(&other, NON_BLOCKING) == 0);
    CHECK(cuMemHostAlloc(&host, BYTES, 0) == 0 && cuMemAlloc_v2(&device, BYTES) == 0);
    CHECK(cuMemcpyHtoDAsync_v2(device, host, BYTES, copies) == 0);
    CHECK(cuMemFreeAsync(device, other) == 0);
    CHECK(cuMemAlloc_v2(&next, BYTES) == 0);
    CHECK(cuStreamSynchronize(copies) == GONE);
    CHECK(cuCtxSynchronize() == GONE);
    return failures;
}

void test_streams() {
    uploads();
    downloads();
    submissions();
    libraries();
    waits();
    places();
    patience();
    null_stream();
    ends();
    registered();
    threads();
    std::string said;
    CHECK(run_scene("freed_before_copy", nullptr, &said) == 0);
    CHECK(said.find("a copy of 16 bytes to device memory at") != std::string::npos);
    CHECK(said.find("that memory was freed before the copy") != std::string::npos);
}
