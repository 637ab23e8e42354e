// cuBLAS: the matrix products and triangular solves, column-major as cuBLAS has them. Sums are taken in
// f64 and rounded once to the type of the result.

#include <cstdio>
#include <cstdlib>
#include <tuple>

#include "libraries.h"

namespace software_gpu {

enum {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
};

// ---- handles

API int cublasCreate_v2(Library** handle) {
    if (usable() != CUDA_SUCCESS) return CUBLAS_STATUS_NOT_INITIALIZED;
    *handle = new Library;
    return CUBLAS_STATUS_SUCCESS;
}

API int cublasDestroy_v2(Library* handle) {
    if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

#define SETTING(setter, getter, T, field)                                  \
    API int setter(Library* handle, T value) {                             \
        if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;       \
        handle->field = value;                                             \
        return CUBLAS_STATUS_SUCCESS;                                      \
    }                                                                      \
    API int getter(Library* handle, T* value) {                            \
        if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;       \
        *value = handle->field;                                            \
        return CUBLAS_STATUS_SUCCESS;                                      \
    }
SETTING(cublasSetStream_v2, cublasGetStream_v2, Stream*, stream)
SETTING(cublasSetPointerMode_v2, cublasGetPointerMode_v2, int, pointer_mode)
SETTING(cublasSetMathMode, cublasGetMathMode, int, math_mode)
SETTING(cublasSetAtomicsMode, cublasGetAtomicsMode, int, deterministic)
#undef SETTING

API int cublasSetWorkspace_v2(Library* handle, void* at, size_t bytes) {
    if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
    return bytes == 0 || is_device_range(at, bytes) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

API int cublasGetVersion_v2(Library*, int* version) {
    *version = 130000;
    return CUBLAS_STATUS_SUCCESS;
}

static int check_handle(const Library* handle) {
    if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
    return submit(handle->stream) == CUDA_SUCCESS ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

// A scalar is read where the handle's pointer mode says it lies; failing that, the status is not success.
static int scalar(const Library* handle, const char* who, Type type, const void* at, double* value) {
    if (at == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    if (handle->pointer_mode != 0) {
        if (!on_device(who, "a scalar", type, at, 1)) return CUBLAS_STATUS_EXECUTION_FAILED;
    } else if (is_device_range(at, 1)) {
        fail(CUDA_ERROR_ILLEGAL_ADDRESS, "%s: a scalar lies in device memory, which the handle's pointer mode does not say", who);
        return CUBLAS_STATUS_EXECUTION_FAILED;
    }
    *value = read(type, at, 0);
    return CUBLAS_STATUS_SUCCESS;
}

static bool is_op(int op) { return op == OP_N || op == OP_T || op == OP_C; }

// old, unless beta is 0: then it is not read.
static double plus(double sum, double beta, Type type, const void* at, size_t index) {
    return beta == 0.0 ? sum : sum + beta * read(type, at, index);
}

// ---- general products

struct Gemm {
    const char* who;
    int op_a, op_b;
    int64_t m, n, k;
    const void *alpha, *a, *b, *beta;
    void* c;
    Type a_type, b_type, c_type, scalar_type;
    int64_t lda, ldb, ldc, stride_a, stride_b, stride_c, batches;
};

static const char* shift(const void* at, Type type, int64_t count) {
    return static_cast<const char*>(at) + count * static_cast<int64_t>(size_of(type));
}

// In rows, column-major c is its transpose, and that is op(b)' op(a)'.
static int gemm_one(const Gemm& g, int64_t batch, double alpha, double beta) {
    Stored a = g.op_a == OP_N ? stored(g.a, g.a_type, g.m, g.k, g.lda) : stored(g.a, g.a_type, g.k, g.m, g.lda);
    Stored b = g.op_b == OP_N ? stored(g.b, g.b_type, g.k, g.n, g.ldb) : stored(g.b, g.b_type, g.n, g.k, g.ldb);
    Stored c = stored(shift(g.c, g.c_type, batch * g.stride_c), g.c_type, g.m, g.n, g.ldc);
    a.at = shift(g.a, g.a_type, batch * g.stride_a);
    b.at = shift(g.b, g.b_type, batch * g.stride_b);
    if (!on_device(g.who, "c", c)) return CUBLAS_STATUS_EXECUTION_FAILED;
    Matrix sum(c.columns, c.rows);
    if (alpha != 0.0 && g.k > 0) {
        if (!on_device(g.who, "a", a) || !on_device(g.who, "b", b)) return CUBLAS_STATUS_EXECUTION_FAILED;
        sum = product(read(b, g.op_b == OP_N), read(a, g.op_a == OP_N));
    }
    for (size_t j = 0; j < c.columns; j += 1) {
        for (size_t i = 0; i < c.rows; i += 1) sum[j][i] = plus(alpha * sum[j][i], beta, c.type, c.at, i + j * c.stride);
    }
    write(c, sum, true);
    return CUBLAS_STATUS_SUCCESS;
}

static int gemm(const Library* handle, const Gemm& g) {
    if (int status = check_handle(handle)) return status;
    bool sizes = g.m >= 0 && g.n >= 0 && g.k >= 0 && g.batches >= 0 && is_op(g.op_a) && is_op(g.op_b);
    sizes = sizes && g.lda >= std::max<int64_t>(1, g.op_a == OP_N ? g.m : g.k);
    sizes = sizes && g.ldb >= std::max<int64_t>(1, g.op_b == OP_N ? g.k : g.n) && g.ldc >= std::max<int64_t>(1, g.m);
    if (!sizes) return CUBLAS_STATUS_INVALID_VALUE;
    if (g.m == 0 || g.n == 0) return CUBLAS_STATUS_SUCCESS;
    double alpha = 0.0, beta = 0.0;
    if (int status = scalar(handle, g.who, g.scalar_type, g.alpha, &alpha)) return status;
    if (int status = scalar(handle, g.who, g.scalar_type, g.beta, &beta)) return status;
    for (int64_t batch = 0; batch < g.batches; batch += 1) {
        if (int status = gemm_one(g, batch, alpha, beta)) return status;
    }
    return CUBLAS_STATUS_SUCCESS;
}

template <typename T>
static int plain_gemm(const Library* handle, const char* who, int op_a, int op_b, int m, int n, int k, const T* alpha, const T* a, int lda,
                      int64_t stride_a, const T* b, int ldb, int64_t stride_b, const T* beta, T* c, int ldc, int64_t stride_c, int batches) {
    constexpr Type type = type_of<T>;
    return gemm(handle, {who, op_a, op_b, m, n, k, alpha, a, b, beta, c, type, type, type, type, lda, ldb, ldc, stride_a, stride_b, stride_c,
                         batches});
}

#define GEMM(letter, T)                                                                                                            \
    API int cublas##letter##gemm_v2(Library* handle, int op_a, int op_b, int m, int n, int k, const T* alpha, const T* a, int lda, \
                                    const T* b, int ldb, const T* beta, T* c, int ldc) {                                           \
        return plain_gemm(handle, "cublas" #letter "gemm", op_a, op_b, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c, ldc, 0, 1);  \
    }                                                                                                                              \
    API int cublas##letter##gemmStridedBatched(Library* handle, int op_a, int op_b, int m, int n, int k, const T* alpha,           \
                                               const T* a, int lda, long long stride_a, const T* b, int ldb, long long stride_b,   \
                                               const T* beta, T* c, int ldc, long long stride_c, int batches) {                    \
        return plain_gemm(handle, "cublas" #letter "gemmStridedBatched", op_a, op_b, m, n, k, alpha, a, lda, stride_a, b, ldb,     \
                          stride_b, beta, c, ldc, stride_c, batches);                                                              \
    }
GEMM(S, float)
GEMM(D, double)
#undef GEMM

// The types cuBLAS multiplies, of those this device has. TF32 is refused: it would lose bits silently.
static bool supported(int compute, int a, int b, int c) {
    bool single = compute == 68 || compute == 69, wide = compute == 70 || compute == 71;
    if (wide) return a == F64 && b == F64 && c == F64;
    if (!single || a != b) return false;
    return (a == BF16 && (c == BF16 || c == F32)) || (a == F32 && c == F32);
}

API int cublasGemmStridedBatchedEx(Library* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int a_type,
                                   int lda, long long stride_a, const void* b, int b_type, int ldb, long long stride_b, const void* beta,
                                   void* c, int c_type, int ldc, long long stride_c, int batches, int compute, int) {
    if (!supported(compute, a_type, b_type, c_type)) {
        fprintf(stderr, "software gpu: cublasGemmEx: no product of types %d and %d to %d by compute type %d\n", a_type, b_type, c_type, compute);
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    Type scalars = c_type == F64 ? F64 : F32;
    return gemm(handle, {"cublasGemmEx", op_a, op_b, m, n, k, alpha, a, b, beta, c, static_cast<Type>(a_type), static_cast<Type>(b_type),
                         static_cast<Type>(c_type), scalars, lda, ldb, ldc, stride_a, stride_b, stride_c, batches});
}

API int cublasGemmEx(Library* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
                     const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute, int algorithm) {
    return cublasGemmStridedBatchedEx(handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb, 0, beta, c, c_type, ldc, 0, 1,
                                      compute, algorithm);
}

// ---- symmetric products

template <typename T>
static int syrk(const Library* handle, const char* who, int fill, int op, int n, int k, const T* alpha, const T* a, int lda, const T* beta,
                T* c, int ldc) {
    if (int status = check_handle(handle)) return status;
    constexpr Type type = type_of<T>;
    if (n < 0 || k < 0 || !is_op(op) || lda < std::max(1, op == OP_N ? n : k) || ldc < std::max(1, n)) return CUBLAS_STATUS_INVALID_VALUE;
    if (n == 0) return CUBLAS_STATUS_SUCCESS;
    double scale = 0.0, old = 0.0;
    if (int status = scalar(handle, who, type, alpha, &scale)) return status;
    if (int status = scalar(handle, who, type, beta, &old)) return status;
    Stored left = op == OP_N ? stored(a, type, n, k, lda) : stored(a, type, k, n, lda), out = stored(c, type, n, n, ldc);
    if (!on_device(who, "a", left) || !on_device(who, "c", out)) return CUBLAS_STATUS_EXECUTION_FAILED;
    Matrix sum(out.rows, out.rows);
    if (scale != 0.0 && k > 0) sum = product(read(left, op != OP_N), read(left, op == OP_N));
    for (size_t i = 0; i < out.rows; i += 1) {
        for (size_t j = fill == FILL_LOWER ? 0 : i; j < (fill == FILL_LOWER ? i + 1 : out.rows); j += 1) {
            sum[i][j] = plus(scale * sum[i][j], old, type, c, i + j * out.stride);
        }
    }
    write_triangle(out, fill == FILL_LOWER, sum, false);
    return CUBLAS_STATUS_SUCCESS;
}

// ---- triangles

// One triangular operand, and the matrix it is applied to, with the side and shape checked.
struct Triangle {
    const char* who;
    int side, fill, op, diagonal;
    int64_t m, n;
    Type type;
    const void* a;
    int64_t lda;
};

static int check_triangle(const Library* handle, const Triangle& t, int64_t ldb) {
    if (int status = check_handle(handle)) return status;
    int64_t order = t.side == SIDE_LEFT ? t.m : t.n;
    bool enums = (t.side == SIDE_LEFT || t.side == SIDE_RIGHT) && (t.fill == FILL_LOWER || t.fill == FILL_UPPER) && is_op(t.op);
    bool sizes = t.m >= 0 && t.n >= 0 && t.lda >= std::max<int64_t>(1, order) && ldb >= std::max<int64_t>(1, t.m);
    return enums && sizes ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

// a x = b has rows of b as its unknowns; x a = b is a' x' = b'. Columns of b in one, its rows in the other.
static int apply(const Triangle& t, bool solve, double alpha, const Stored& b, const Stored& out) {
    int64_t order = t.side == SIDE_LEFT ? t.m : t.n;
    Stored a = stored(t.a, t.type, order, order, t.lda);
    if (!on_device(t.who, "a", a) || !on_device(t.who, "b", b) || !on_device(t.who, "c", out)) return CUBLAS_STATUS_EXECUTION_FAILED;
    bool transposed = (t.op != OP_N) != (t.side == SIDE_RIGHT), lower = t.fill == FILL_LOWER;
    if (alpha == 0.0) {
        write(out, Matrix(out.rows, out.columns), false);
        return CUBLAS_STATUS_SUCCESS;
    }
    Matrix triangle = read_triangle(a, lower, t.diagonal == DIAG_UNIT, transposed);
    Matrix values = read(b, t.side == SIDE_RIGHT);
    for (double& value : values.values) value *= alpha;
    if (solve) {
        solve_triangle(triangle, lower != transposed, values);
    } else {
        values = product(triangle, values);
    }
    write(out, values, t.side == SIDE_RIGHT);
    return CUBLAS_STATUS_SUCCESS;
}

template <typename T>
static int triangular(const Library* handle, const char* who, bool solve, int side, int fill, int op, int diagonal, int m, int n,
                      const T* alpha, const T* a, int lda, const T* b, int ldb, T* c, int ldc) {
    constexpr Type type = type_of<T>;
    Triangle t = {who, side, fill, op, diagonal, m, n, type, a, lda};
    if (int status = check_triangle(handle, t, std::min(ldb, ldc))) return status;
    if (m == 0 || n == 0) return CUBLAS_STATUS_SUCCESS;
    double scale = 0.0;
    if (int status = scalar(handle, who, type, alpha, &scale)) return status;
    return apply(t, solve, scale, stored(b, type, m, n, ldb), stored(c, type, m, n, ldc));
}

// ---- sums of matrices, and diagonals

template <typename T>
static int geam(const Library* handle, const char* who, int op_a, int op_b, int m, int n, const T* alpha, const T* a, int lda, const T* beta,
                const T* b, int ldb, T* c, int ldc) {
    if (int status = check_handle(handle)) return status;
    constexpr Type type = type_of<T>;
    bool sizes = m >= 0 && n >= 0 && is_op(op_a) && is_op(op_b) && lda >= std::max(1, op_a == OP_N ? m : n);
    sizes = sizes && ldb >= std::max(1, op_b == OP_N ? m : n) && ldc >= std::max(1, m);
    // In place only where each element is written over itself.
    bool in_place = (c != a || (op_a == OP_N && lda == ldc)) && (c != b || (op_b == OP_N && ldb == ldc));
    if (!sizes || !in_place) return CUBLAS_STATUS_INVALID_VALUE;
    if (m == 0 || n == 0) return CUBLAS_STATUS_SUCCESS;
    double scale_a = 0.0, scale_b = 0.0;
    if (int status = scalar(handle, who, type, alpha, &scale_a)) return status;
    if (int status = scalar(handle, who, type, beta, &scale_b)) return status;
    Stored left = op_a == OP_N ? stored(a, type, m, n, lda) : stored(a, type, n, m, lda);
    Stored right = op_b == OP_N ? stored(b, type, m, n, ldb) : stored(b, type, n, m, ldb), out = stored(c, type, m, n, ldc);
    if (!on_device(who, "c", out)) return CUBLAS_STATUS_EXECUTION_FAILED;
    Matrix sum(out.rows, out.columns);
    for (auto [operand, op, scale] : {std::tuple{left, op_a, scale_a}, std::tuple{right, op_b, scale_b}}) {
        if (scale == 0.0) continue;
        if (!on_device(who, "an operand", operand)) return CUBLAS_STATUS_EXECUTION_FAILED;
        Matrix part = read(operand, op != OP_N);
        for (size_t i = 0; i < sum.values.size(); i += 1) sum.values[i] += scale * part.values[i];
    }
    write(out, sum, false);
    return CUBLAS_STATUS_SUCCESS;
}

template <typename T>
static int dgmm(const Library* handle, const char* who, int side, int m, int n, const T* a, int lda, const T* x, int step, T* c, int ldc) {
    if (int status = check_handle(handle)) return status;
    constexpr Type type = type_of<T>;
    bool enums = side == SIDE_LEFT || side == SIDE_RIGHT;
    if (!enums || m < 0 || n < 0 || lda < std::max(1, m) || ldc < std::max(1, m)) return CUBLAS_STATUS_INVALID_VALUE;
    if (m == 0 || n == 0) return CUBLAS_STATUS_SUCCESS;
    Stored in = stored(a, type, m, n, lda), out = stored(c, type, m, n, ldc);
    size_t order = side == SIDE_LEFT ? in.rows : in.columns;
    auto distance = static_cast<size_t>(std::abs(step));
    if (!on_device(who, "a", in) || !on_device(who, "c", out)) return CUBLAS_STATUS_EXECUTION_FAILED;
    if (!on_device(who, "x", type, x, (order - 1) * distance + 1)) return CUBLAS_STATUS_EXECUTION_FAILED;
    Matrix values = read(in, false);
    for (size_t i = 0; i < in.rows; i += 1) {
        for (size_t j = 0; j < in.columns; j += 1) {
            size_t at = side == SIDE_LEFT ? i : j;
            values[i][j] *= x[(step < 0 ? order - 1 - at : at) * distance];
        }
    }
    write(out, values, false);
    return CUBLAS_STATUS_SUCCESS;
}

#define MATRIX_ROUTINES(letter, T)                                                                                                    \
    API int cublas##letter##syrk_v2(Library* handle, int fill, int op, int n, int k, const T* alpha, const T* a, int lda,             \
                                    const T* beta, T* c, int ldc) {                                                                   \
        return syrk(handle, "cublas" #letter "syrk", fill, op, n, k, alpha, a, lda, beta, c, ldc);                                    \
    }                                                                                                                                 \
    API int cublas##letter##trmm_v2(Library* handle, int side, int fill, int op, int diagonal, int m, int n, const T* alpha,          \
                                    const T* a, int lda, const T* b, int ldb, T* c, int ldc) {                                        \
        return triangular(handle, "cublas" #letter "trmm", false, side, fill, op, diagonal, m, n, alpha, a, lda, b, ldb, c, ldc);     \
    }                                                                                                                                 \
    API int cublas##letter##trsm_v2(Library* handle, int side, int fill, int op, int diagonal, int m, int n, const T* alpha,          \
                                    const T* a, int lda, T* b, int ldb) {                                                             \
        return triangular<T>(handle, "cublas" #letter "trsm", true, side, fill, op, diagonal, m, n, alpha, a, lda, b, ldb, b, ldb);   \
    }                                                                                                                                 \
    API int cublas##letter##geam(Library* handle, int op_a, int op_b, int m, int n, const T* alpha, const T* a, int lda,              \
                                 const T* beta, const T* b, int ldb, T* c, int ldc) {                                                 \
        return geam(handle, "cublas" #letter "geam", op_a, op_b, m, n, alpha, a, lda, beta, b, ldb, c, ldc);                          \
    }                                                                                                                                 \
    API int cublas##letter##dgmm(Library* handle, int side, int m, int n, const T* a, int lda, const T* x, int step, T* c, int ldc) { \
        return dgmm(handle, "cublas" #letter "dgmm", side, m, n, a, lda, x, step, c, ldc);                                            \
    }
MATRIX_ROUTINES(S, float)
MATRIX_ROUTINES(D, double)
#undef MATRIX_ROUTINES

}  // namespace software_gpu
