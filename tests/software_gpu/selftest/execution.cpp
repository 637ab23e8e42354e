// How kernels run: barriers, warps, atomics, tensor-core products, shared memory, limits.

#include <cmath>
#include <cstring>

#include "check.h"

static std::vector<uint32_t> counted(uint32_t count) {
    std::vector<uint32_t> values(count);
    for (uint32_t i = 0; i < count; i += 1) values[i] = i;
    return values;
}

static void barriers() {
    auto reversed = counted(256);
    for (uint32_t i = 0; i < 256; i += 1) reversed[i] = 255 - i;
    Address at = upload(counted(256));
    CHECK(launch("reverse_with_barrier", 1, 256, 0, {&at}) == 0);
    CHECK(download<uint32_t>(at, 256) == reversed);
    CHECK(launch("reverse_without_barrier", 1, 256, 0, {&at}) == 0);
    CHECK(download<uint32_t>(at, 256) != counted(256));

    Address out = upload(std::vector<uint32_t>(64, 7));
    CHECK(launch("early_exit", 16, 64, 0, {&out}) == 0);  // in some blocks the last to act exits, in some it waits
    auto seen = download<uint32_t>(out, 64);
    for (uint32_t i = 0; i < 64; i += 1) CHECK(seen[i] == (i % 2 == 0 ? 0x55555555u : 7));
    CHECK(cuMemFree_v2(at) == 0);
    CHECK(cuMemFree_v2(out) == 0);
}

static void warps() {
    Address out = upload(std::vector<uint64_t>(32 * 8));
    CHECK(launch("shuffles", 1, 32, 0, {&out}) == 0);
    auto seen = download<uint64_t>(out, 32 * 8);
    for (uint64_t lane = 0; lane < 32; lane += 1) {
        const uint64_t* mine = &seen[8 * lane];
        CHECK(mine[0] == (31 - lane) << 40);
        CHECK(mine[1] == (lane < 3 ? lane : lane - 3));
        CHECK(mine[2] == (lane % 8 < 5 ? lane + 3 : lane));
        CHECK(mine[3] == (lane ^ 5));
        CHECK(mine[4] == 0x49249249);
        CHECK(mine[5] == 2);
        CHECK(mine[6] == (lane < 16 ? 120u : 376u));
        float read = lane < 16 ? 3.0f : NAN;  // lane 3 is not in the upper half's mask
        float value;
        uint32_t bits = static_cast<uint32_t>(mine[7]);
        memcpy(&value, &bits, 4);
        CHECK(lane < 16 ? value == read : std::isnan(value));
    }
    CHECK(cuMemFree_v2(out) == 0);
}

static void products() {
    std::vector<uint16_t> a(16 * 16), b(16 * 8);
    std::vector<float> c(16 * 8);
    auto bf16 = [](float value) {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        return static_cast<uint16_t>(bits >> 16);  // exact for the small integers here
    };
    auto left = [](int row, int k) { return static_cast<float>((row * 7 + k * 3) % 11 - 5); };
    auto right = [](int k, int column) { return static_cast<float>((k * 5 + column * 2) % 13 - 6); };
    for (int row = 0; row < 16; row += 1)
        for (int k = 0; k < 16; k += 1) a[row * 16 + k] = bf16(left(row, k));
    for (int k = 0; k < 16; k += 1)
        for (int column = 0; column < 8; column += 1) b[k * 8 + column] = bf16(right(k, column));
    for (int i = 0; i < 128; i += 1) c[i] = static_cast<float>(i);
    Address at_a = upload(a), at_b = upload(b), at_c = upload(c);
    CHECK(launch("product", 1, 32, 0, {&at_a, &at_b, &at_c}) == 0);
    auto seen = download<float>(at_c, 128);
    for (int row = 0; row < 16; row += 1) {
        for (int column = 0; column < 8; column += 1) {
            float sum = static_cast<float>(row * 8 + column);
            for (int k = 0; k < 16; k += 1) sum += left(row, k) * right(k, column);
            CHECK(seen[row * 8 + column] == sum);
        }
    }
    for (Address at : {at_a, at_b, at_c}) CHECK(cuMemFree_v2(at) == 0);
}

static void sums_and_atomics() {
    Address counts = upload(std::vector<uint32_t>(5)), sum = upload(std::vector<float>(1)), most = upload(std::vector<uint64_t>(1));
    CHECK(launch("atomics", 10, 200, 0, {&counts, &sum, &most}) == 0);
    CHECK((download<uint32_t>(counts, 5) == std::vector<uint32_t>{500, 500, 500, 500, 4000}));
    CHECK(download<float>(sum, 1)[0] == 1000.0f);
    CHECK(download<uint64_t>(most, 1)[0] == 1999);

    std::vector<float> values(1000);
    for (int i = 0; i < 1000; i += 1) values[i] = static_cast<float>(i);
    Address at = upload(values), out = upload(std::vector<double>(3));
    uint32_t count = 1000;
    CHECK(launch("sums", 3, 96, 0, {&at, &out, &count}) == 0);
    CHECK((download<double>(out, 3) == std::vector<double>(3, 499500.0)));
    CHECK(launch("sums", 3, 256, 0, {&at, &out, &count}) == 701);  // __launch_bounds__(128)
    for (Address each : {counts, sum, most, at, out}) CHECK(cuMemFree_v2(each) == 0);
}

static void shared_memory() {
    Address out = upload(std::vector<float>(64));
    CHECK(launch("unwritten_shared", 2, 32, 128, {&out}) == 0);
    for (float value : download<float>(out, 64)) CHECK(std::isnan(value));
    CHECK(launch("unwritten_shared", 1, 32, 48 * 1024 + 4, {&out}) == 1);
    void* function = kernel("unwritten_shared");
    void* arguments[] = {&out};
    CHECK(cuFuncSetAttribute(function, 8, 228 * 1024) == 1);
    CHECK(cuFuncSetAttribute(function, 8, 100 * 1024) == 0);
    CHECK(cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 100 * 1024, nullptr, arguments, nullptr) == 0);
    CHECK(cuMemFree_v2(out) == 0);
}

static void limits() {
    Address out = upload(std::vector<uint32_t>(64));
    CHECK(launch("early_exit", 0, 32, 0, {&out}) == 1);
    CHECK(launch("early_exit", 1, 0, 0, {&out}) == 1);
    CHECK(launch("early_exit", 1, 1025, 0, {&out}) == 1);
    void* arguments[] = {&out};
    CHECK(cuLaunchKernel(kernel("early_exit"), 1, 65536, 1, 32, 1, 1, 0, nullptr, arguments, nullptr) == 1);
    CHECK(cuMemFree_v2(out) == 0);
}

void test_execution() {
    barriers();
    warps();
    products();
    sums_and_atomics();
    shared_memory();
    limits();
}
