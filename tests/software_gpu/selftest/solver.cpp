// cuSOLVER: factors multiplied out again, inverses against the identity, eigenvectors against a v = v w.

#include <algorithm>

#include "check.h"
#include "numbers.h"

extern "C" {
int cusolverDnCreate(void**);
int cusolverDnDestroy(void*);
int cusolverDnXpotrf_bufferSize(void*, void*, int, int64_t, int, const void*, int64_t, int, size_t*, size_t*);
int cusolverDnXpotrf(void*, void*, int, int64_t, int, void*, int64_t, int, void*, size_t, void*, size_t, int*);
int cusolverDnXpotrs(void*, void*, int, int64_t, int64_t, int, const void*, int64_t, int, void*, int64_t, int*);
int cusolverDnXtrtri_bufferSize(void*, int, int, int64_t, int, void*, int64_t, size_t*, size_t*);
int cusolverDnXtrtri(void*, int, int, int64_t, int, void*, int64_t, void*, size_t, void*, size_t, int*);
int cusolverDnXsyevd_bufferSize(void*, void*, int, int, int64_t, int, const void*, int64_t, int, const void*, int, size_t*, size_t*);
int cusolverDnXsyevd(void*, void*, int, int, int64_t, int, void*, int64_t, int, void*, int, void*, size_t, void*, size_t, int*);
int cusolverDnDpotri_bufferSize(void*, int, int, double*, int, int*);
int cusolverDnDpotri(void*, int, int, double*, int, double*, int, int*);
}

static void* solver = nullptr;
static const int F64 = 1;

// Symmetric and positive definite, with the triangle that is not to be read as poison.
static Columns definite(int n, int fill, uint64_t seed) {
    Columns a(n, n, n, seed);
    for (int i = 0; i < n; i += 1) {
        for (int j = 0; j < i; j += 1) a(i, j) = a(j, i);
        a(i, i) = n;
    }
    a.poison_triangle(fill == 0);
    return a;
}

static double symmetric(const Columns& a, int fill, int i, int j) { return (i < j) == (fill == 0) ? a(j, i) : a(i, j); }

struct Room {
    Address device = 0, info = 0;
    size_t bytes = 0, host_bytes = 0;
    std::vector<char> host;

    void take() {
        host.resize(host_bytes);
        CHECK(cuMemAlloc_v2(&device, bytes) == 0);
        info = upload(std::vector<int>{-7});
    }
    int result() const { return download<int>(info, 1)[0]; }
    ~Room() {
        CHECK(cuMemFree_v2(device) == 0);
        CHECK(cuMemFree_v2(info) == 0);
    }
};

static int potrf(int fill, int n, Address a) {
    Room room;
    CHECK(cusolverDnXpotrf_bufferSize(solver, nullptr, fill, n, F64, (void*)a, n, F64, &room.bytes, &room.host_bytes) == 0);
    room.take();
    CHECK(cusolverDnXpotrf(solver, nullptr, fill, n, F64, (void*)a, n, F64, (void*)room.device, room.bytes - 1, room.host.data(), room.host_bytes,
                           (int*)room.info) == 3);
    CHECK(cusolverDnXpotrf(solver, nullptr, fill, n, F64, (void*)a, n, F64, (void*)room.device, room.bytes, room.host.data(), room.host_bytes,
                           (int*)room.info) == 0);
    return room.result();
}

static void cholesky(int fill, int n) {
    Columns a = definite(n, fill, 11);
    Address at = a.upload();
    CHECK(potrf(fill, n, at) == 0);
    Columns l = a.download(at);
    for (int i = 0; i < n; i += 1) {
        for (int j = 0; j < n; j += 1) {
            if (i != j && (i < j) == (fill == 0)) {
                CHECK(std::isnan(l(i, j)));  // not touched
                continue;
            }
            double sum = 0;
            for (int k = 0; k <= std::min(i, j); k += 1) sum += fill == 0 ? l(i, k) * l(j, k) : l(k, i) * l(k, j);
            CHECK(near(sum, a(i, j)));
        }
    }
    Columns b(n, 3, n + 1, 12);
    Address at_b = b.upload(), info = upload(std::vector<int>{-7});
    CHECK(cusolverDnXpotrs(solver, nullptr, fill, n, 3, F64, (void*)at, n, F64, (void*)at_b, n + 1, (int*)info) == 0);
    Columns x = b.download(at_b);
    for (int i = 0; i < n; i += 1) {
        for (int j = 0; j < 3; j += 1) {
            double sum = 0;
            for (int k = 0; k < n; k += 1) sum += symmetric(a, fill, i, k) * x(k, j);
            CHECK(near(sum, b(i, j)));
        }
    }
    int count = 0;
    CHECK(cusolverDnDpotri_bufferSize(solver, fill, n, (double*)at, n, &count) == 0);
    Address work = upload(std::vector<double>(count));
    CHECK(cusolverDnDpotri(solver, fill, n, (double*)at, n, (double*)work, count, (int*)info) == 0);
    Columns inverse = a.download(at);
    for (int i = 0; i < n; i += 1) {
        double sum = 0;
        for (int k = 0; k < n; k += 1) sum += symmetric(a, fill, i, k) * symmetric(inverse, fill, k, n / 2);
        CHECK(near(sum, i == n / 2 ? 1.0 : 0.0));
    }
    for (Address each : {at, at_b, info, work}) CHECK(cuMemFree_v2(each) == 0);
}

static void not_definite() {
    Columns a = definite(150, 0, 13);
    a(99, 99) = -1;
    Address at = a.upload();
    CHECK(potrf(0, 150, at) == 100);
    CHECK(cuMemFree_v2(at) == 0);
    a(99, 99) = NAN;
    at = a.upload();
    CHECK(potrf(0, 150, at) == 100);
    CHECK(cuMemFree_v2(at) == 0);
}

static void inverse(int fill, int diagonal) {
    int n = 100;
    Columns a = definite(n, fill, 14);
    if (diagonal == 1) {
        for (int i = 0; i < n; i += 1) a(i, i) = NAN;
        for (double& value : a.values) value /= n;
    }
    Address at = a.upload();
    Room room;
    CHECK(cusolverDnXtrtri_bufferSize(solver, fill, diagonal, n, F64, (void*)at, n, &room.bytes, &room.host_bytes) == 0);
    room.take();
    CHECK(cusolverDnXtrtri(solver, fill, diagonal, n, F64, (void*)at, n, (void*)room.device, room.bytes, room.host.data(), room.host_bytes,
                           (int*)room.info) == 0);
    CHECK(room.result() == 0);
    Columns out = a.download(at);
    for (int i = 0; i < n; i += 1) {
        for (int j = 0; j < n; j += 1) {
            if (i != j && (i < j) == (fill == 0)) {
                CHECK(std::isnan(out(i, j)));
                continue;
            }
            double sum = 0;
            for (int k = std::min(i, j); k <= std::max(i, j); k += 1) {
                double left = diagonal == 1 && i == k ? 1.0 : a(i, k), right = diagonal == 1 && k == j ? 1.0 : out(k, j);
                sum += left * right;
            }
            CHECK(near(sum, i == j ? 1.0 : 0.0));
        }
    }
    CHECK(cuMemFree_v2(at) == 0);
}

static int syevd(int mode, int fill, int n, Address a, Address w) {
    Room room;
    CHECK(cusolverDnXsyevd_bufferSize(solver, nullptr, mode, fill, n, F64, (void*)a, n, F64, (void*)w, F64, &room.bytes, &room.host_bytes) == 0);
    room.take();
    CHECK(cusolverDnXsyevd(solver, nullptr, mode, fill, n, F64, (void*)a, n, F64, (void*)w, F64, (void*)room.device, room.bytes, room.host.data(),
                           room.host_bytes, (int*)room.info) == 0);
    return room.result();
}

static void eigenvalues(int fill, int n, bool twice) {
    Columns a = definite(n, fill, 15);
    if (twice) {  // all eigenvalues but a few are the same
        for (double& value : a.values) value = std::isnan(value) ? value : 0.0;
        for (int i = 0; i < n; i += 1) a(i, i) = i < 3 ? i - 1 : 5;
    }
    Address at = a.upload(), w = upload(std::vector<double>(n));
    CHECK(syevd(1, fill, n, at, w) == 0);
    Columns v = a.download(at);
    auto values = download<double>(w, n);
    CHECK(std::is_sorted(values.begin(), values.end()));
    for (int j = 0; j < n; j += 1) {
        for (int i = 0; i < n; i += 1) {
            double sum = 0, along = 0;
            for (int k = 0; k < n; k += 1) {
                sum += symmetric(a, fill, i, k) * v(k, j);
                along += v(k, i) * v(k, j);
            }
            CHECK(std::fabs(sum - values[j] * v(i, j)) < 1e-12 * n);
            CHECK(std::fabs(along - (i == j)) < 1e-12);
        }
    }
    CHECK(cuMemFree_v2(at) == 0);
    at = a.upload();
    CHECK(syevd(0, fill, n, at, w) == 0);
    auto alone = download<double>(w, n);
    for (int i = 0; i < n; i += 1) CHECK(std::fabs(alone[i] - values[i]) < 1e-12 * n);
    a(n / 2, n / 2) = NAN;
    CHECK(cuMemFree_v2(at) == 0);
    at = a.upload();
    CHECK(syevd(1, fill, n, at, w) > 0);
    for (Address each : {at, w}) CHECK(cuMemFree_v2(each) == 0);
}

void test_solver() {
    CHECK(cusolverDnCreate(&solver) == 0);
    for (int fill = 0; fill < 2; fill += 1) {
        for (int n : {1, 5, 64, 150}) {
            cholesky(fill, n);
            eigenvalues(fill, n, n == 64);
        }
        inverse(fill, 0);
        inverse(fill, 1);
    }
    not_definite();
    CHECK(cusolverDnDestroy(solver) == 0);
}
