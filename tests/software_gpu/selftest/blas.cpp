// cuBLAS against plain sums, all options; what must not be read is poison.

#include <cmath>
#include <cstring>

#include "check.h"
#include "numbers.h"

extern "C" {
int cublasCreate_v2(void**);
int cublasDestroy_v2(void*);
int cublasSgemm_v2(void*, int, int, int, int, int, const float*, const float*, int, const float*, int, const float*, float*, int);
int cublasDgemm_v2(void*, int, int, int, int, int, const double*, const double*, int, const double*, int, const double*, double*, int);
int cublasGemmEx(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*, void*, int, int, int, int);
int cublasDgemmStridedBatched(void*, int, int, int, int, int, const double*, const double*, int, long long, const double*, int, long long,
                              const double*, double*, int, long long, int);
int cublasDsyrk_v2(void*, int, int, int, int, const double*, const double*, int, const double*, double*, int);
int cublasDtrmm_v2(void*, int, int, int, int, int, int, const double*, const double*, int, const double*, int, double*, int);
int cublasDtrsm_v2(void*, int, int, int, int, int, int, const double*, const double*, int, double*, int);
int cublasDgeam(void*, int, int, int, int, const double*, const double*, int, const double*, const double*, int, double*, int);
int cublasDdgmm(void*, int, int, int, const double*, int, const double*, int, double*, int);
int cublasDnrm2_v2(void*, int, const double*, int, double*);
}

static void* blas = nullptr;

static double element(const Columns& a, int op, int i, int j) { return op == 0 ? a(i, j) : a(j, i); }

static void gemm() {
    const double alpha = 0.5, zero = 0.0, two = 2.0;
    for (int options = 0; options < 4; options += 1) {
        int op_a = options % 2, op_b = options / 2, m = 13, n = 70, k = 300;
        Columns a = op_a == 0 ? Columns(m, k, m + 2, 1) : Columns(k, m, k + 1, 1);
        Columns b = op_b == 0 ? Columns(k, n, k, 2) : Columns(n, k, n + 3, 2);
        Columns c(m, n, m + 1, 3);
        Address at_a = a.upload(), at_b = b.upload(), at_c = c.upload(), fresh = 0;
        CHECK(cublasDgemm_v2(blas, op_a, op_b, m, n, k, &alpha, (double*)at_a, a.stride, (double*)at_b, b.stride, &two, (double*)at_c, c.stride) == 0);
        CHECK(cuMemAlloc_v2(&fresh, c.values.size() * 8) == 0);  // poison: not read when beta is 0
        CHECK(cublasDgemm_v2(blas, op_a, op_b, m, n, k, &alpha, (double*)at_a, a.stride, (double*)at_b, b.stride, &zero, (double*)fresh, c.stride) == 0);
        Columns with = c.download(at_c), without = c.download(fresh);
        for (int i = 0; i < m; i += 1) {
            for (int j = 0; j < n; j += 1) {
                double sum = 0;
                for (int t = 0; t < k; t += 1) sum += element(a, op_a, i, t) * element(b, op_b, t, j);
                CHECK(near(without(i, j), 0.5 * sum));
                CHECK(near(with(i, j), 0.5 * sum + 2 * c(i, j)));
            }
        }
        CHECK(cublasDgemm_v2(blas, op_a, op_b, m, n, k, &alpha, (double*)at_a, a.rows - 1, (double*)at_b, b.stride, &two, (double*)at_c, c.stride) == 7);
        for (Address at : {at_a, at_b, at_c, fresh}) CHECK(cuMemFree_v2(at) == 0);
    }
}

static void gemm_types() {
    const float one = 1, zero = 0;
    std::vector<uint16_t> a = {0x3F80, 0x4000, 0x4040, 0x4080};  // 1 2 3 4, column-major 2 x 2
    Address at = upload(a), out = upload(std::vector<float>(4)), narrow = upload(std::vector<uint16_t>(4));
    CHECK(cublasGemmEx(blas, 0, 1, 2, 2, 2, &one, (void*)at, 14, 2, (void*)at, 14, 2, &zero, (void*)out, 0, 2, 68, -1) == 0);
    CHECK((download<float>(out, 4) == std::vector<float>{10, 14, 14, 20}));
    CHECK(cublasGemmEx(blas, 0, 1, 2, 2, 2, &one, (void*)at, 14, 2, (void*)at, 14, 2, &zero, (void*)narrow, 14, 2, 68, -1) == 0);
    CHECK((download<uint16_t>(narrow, 4) == std::vector<uint16_t>{0x4120, 0x4160, 0x4160, 0x41A0}));
    CHECK(cublasGemmEx(blas, 0, 1, 2, 2, 2, &one, (void*)out, 0, 2, (void*)out, 0, 2, &zero, (void*)out, 0, 2, 77, -1) == 15);  // TF32
    CHECK(cublasGemmEx(blas, 0, 1, 2, 2, 2, &one, (void*)at, 14, 2, (void*)out, 0, 2, &zero, (void*)out, 0, 2, 68, -1) == 15);

    const double alpha = 1, beta = 0;
    Address batch = upload(std::vector<double>{1, 2, 3, 4, 5, 6}), squares = upload(std::vector<double>(6));
    CHECK(cublasDgemmStridedBatched(blas, 0, 0, 1, 1, 1, &alpha, (double*)batch, 1, 1, (double*)batch, 1, 1, &beta, (double*)squares, 1, 1, 6) == 0);
    CHECK((download<double>(squares, 6) == std::vector<double>{1, 4, 9, 16, 25, 36}));
    double norm = 0;
    CHECK(cublasDnrm2_v2(blas, 2, (double*)(batch + 16), 1, &norm) == 0 && norm == 5.0);
    for (Address each : {at, out, narrow, batch, squares}) CHECK(cuMemFree_v2(each) == 0);
}

static void syrk() {
    const double alpha = 1, beta = 0.5;
    for (int options = 0; options < 4; options += 1) {
        int fill = options % 2, op = options / 2, n = 37, k = 9;
        Columns a = op == 0 ? Columns(n, k, n, 4) : Columns(k, n, k, 4), c(n, n, n, 5);
        c.poison_triangle(fill == 0);
        Address at_a = a.upload(), at_c = c.upload();
        CHECK(cublasDsyrk_v2(blas, fill, op, n, k, &alpha, (double*)at_a, a.stride, &beta, (double*)at_c, n) == 0);
        Columns out = c.download(at_c);
        for (int i = 0; i < n; i += 1) {
            for (int j = 0; j < n; j += 1) {
                if (i != j && (i < j) == (fill == 0)) {
                    CHECK(std::isnan(out(i, j)));
                    continue;
                }
                double sum = 0;
                for (int t = 0; t < k; t += 1) sum += element(a, op, i, t) * element(a, op, j, t);
                CHECK(near(out(i, j), sum + 0.5 * c(i, j)));
            }
        }
        for (Address at : {at_a, at_c}) CHECK(cuMemFree_v2(at) == 0);
    }
}

// trmm makes b of x, and trsm x of b; the unread triangle, and a unit diagonal, are poison.
static void triangles() {
    const double two = 2, half = 0.5;
    for (int options = 0; options < 16; options += 1) {
        int side = options & 1, fill = options >> 1 & 1, op = options >> 2 & 1, unit = options >> 3 & 1;
        int m = 90, n = 75, order = side == 0 ? m : n;
        Columns a(order, order, order + 1, 6), x(m, n, m, 7);
        for (int i = 0; i < order; i += 1) {
            for (int j = 0; j < order; j += 1) a(i, j) *= i == j ? 1.0 : 1.0 / order;
            a(i, i) = unit ? NAN : 2.0 + i % 3;
        }
        a.poison_triangle(fill == 0);
        Address at_a = a.upload(), at_x = x.upload(), at_b = x.upload();
        CHECK(cublasDtrmm_v2(blas, side, fill, op, unit, m, n, &two, (double*)at_a, a.stride, (double*)at_x, m, (double*)at_b, m) == 0);
        Columns b = x.download(at_b);
        for (int i = 0; i < m; i += 1) {
            for (int j = 0; j < n; j += 1) {
                double sum = 0;
                for (int t = 0; t < order; t += 1) {
                    int row = side == 0 ? i : t, column = side == 0 ? t : j;
                    int r = op == 0 ? row : column, c = op == 0 ? column : row;
                    if (r != c && (r < c) == (fill == 0)) continue;
                    double value = r == c && unit ? 1.0 : a(r, c);
                    sum += 2 * value * (side == 0 ? x(t, j) : x(i, t));
                }
                CHECK(near(b(i, j), sum));
            }
        }
        CHECK(cublasDtrsm_v2(blas, side, fill, op, unit, m, n, &half, (double*)at_a, a.stride, (double*)at_b, m) == 0);
        Columns back = x.download(at_b);
        for (size_t i = 0; i < x.values.size(); i += 1) CHECK(near(back.values[i], x.values[i]));
        for (Address at : {at_a, at_x, at_b}) CHECK(cuMemFree_v2(at) == 0);
    }
}

static void sums_and_diagonals() {
    const double alpha = 2, beta = -1, zero = 0;
    Columns a(5, 4, 6, 8), b(4, 5, 4, 9), c(5, 4, 5, 0);
    Address at_a = a.upload(), at_b = b.upload(), at_c = c.upload(), x = upload(std::vector<double>{1, 0, 2, 0, 3, 0, 4, 0, 5});
    CHECK(cublasDgeam(blas, 0, 1, 5, 4, &alpha, (double*)at_a, 6, &beta, (double*)at_b, 4, (double*)at_c, 5) == 0);
    Columns out = c.download(at_c);
    for (int i = 0; i < 5; i += 1)
        for (int j = 0; j < 4; j += 1) CHECK(near(out(i, j), 2 * a(i, j) - b(j, i)));
    CHECK(cublasDgeam(blas, 1, 0, 4, 5, &alpha, (double*)at_a, 6, &zero, nullptr, 4, (double*)at_b, 4) == 0);
    CHECK(near(b.download(at_b)(3, 2), 2 * a(2, 3)));
    CHECK(cublasDgeam(blas, 1, 0, 4, 4, &alpha, (double*)at_b, 4, &zero, (double*)at_b, 4, (double*)at_b, 4) == 7);
    for (int side = 0; side < 2; side += 1) {
        CHECK(cublasDdgmm(blas, side, 5, 4, (double*)at_a, 6, (double*)x, 2, (double*)at_c, 5) == 0);
        out = c.download(at_c);
        for (int i = 0; i < 5; i += 1)
            for (int j = 0; j < 4; j += 1) CHECK(near(out(i, j), a(i, j) * (side == 0 ? i + 1 : j + 1)));
    }
    for (Address at : {at_a, at_b, at_c, x}) CHECK(cuMemFree_v2(at) == 0);
}

void test_blas() {
    CHECK(cublasCreate_v2(&blas) == 0);
    gemm();
    gemm_types();
    syrk();
    triangles();
    sums_and_diagonals();
    CHECK(cublasDestroy_v2(blas) == 0);
}
