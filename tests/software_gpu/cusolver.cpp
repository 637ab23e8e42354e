// cuSOLVER, dense: Cholesky factors, solves and inverses, triangular inverses, symmetric eigenvalues, in
// the 64-bit API and the older one. Computed in f64 and rounded once to the type of the result.

#include <cmath>
#include <cstring>
#include <limits>

#include "libraries.h"

namespace software_gpu {

enum {
    CUSOLVER_STATUS_SUCCESS = 0,
    CUSOLVER_STATUS_NOT_INITIALIZED = 1,
    CUSOLVER_STATUS_INVALID_VALUE = 3,
    CUSOLVER_STATUS_EXECUTION_FAILED = 6,
    CUSOLVER_STATUS_NOT_SUPPORTED = 9,
};

struct Parameters {
    int function, algorithm;
};

API int cusolverDnCreate(Library** handle) {
    if (usable() != CUDA_SUCCESS) return CUSOLVER_STATUS_NOT_INITIALIZED;
    *handle = new Library;
    return CUSOLVER_STATUS_SUCCESS;
}

API int cusolverDnDestroy(Library* handle) {
    if (handle == nullptr) return CUSOLVER_STATUS_NOT_INITIALIZED;
    delete handle;
    return CUSOLVER_STATUS_SUCCESS;
}

#define SETTING(setter, getter, T, field)                              \
    API int setter(Library* handle, T value) {                         \
        if (handle == nullptr) return CUSOLVER_STATUS_NOT_INITIALIZED; \
        handle->field = value;                                         \
        return CUSOLVER_STATUS_SUCCESS;                                \
    }                                                                  \
    API int getter(Library* handle, T* value) {                        \
        if (handle == nullptr) return CUSOLVER_STATUS_NOT_INITIALIZED; \
        *value = handle->field;                                        \
        return CUSOLVER_STATUS_SUCCESS;                                \
    }
SETTING(cusolverDnSetStream, cusolverDnGetStream, Stream*, stream)
SETTING(cusolverDnSetDeterministicMode, cusolverDnGetDeterministicMode, int, deterministic)
#undef SETTING

API int cusolverDnCreateParams(Parameters** parameters) {
    *parameters = new Parameters{};
    return CUSOLVER_STATUS_SUCCESS;
}

API int cusolverDnDestroyParams(Parameters* parameters) {
    delete parameters;
    return CUSOLVER_STATUS_SUCCESS;
}

API int cusolverDnSetAdvOptions(Parameters* parameters, int function, int algorithm) {
    if (parameters == nullptr) return CUSOLVER_STATUS_INVALID_VALUE;
    *parameters = {function, algorithm};
    return CUSOLVER_STATUS_SUCCESS;
}

API int cusolverGetVersion(int* version) {
    *version = 12000;
    return CUSOLVER_STATUS_SUCCESS;
}

// ---- what every routine checks

// A routine's square matrix, where it says how it went, and the room it is lent.
struct Task {
    const char* who;
    int fill;
    int64_t n;
    int type;
    const void* a;
    int64_t lda;
    int* info;
    void *device_room, *host_room;
    size_t device_bytes, host_bytes;  // lent
    size_t device_needs, host_needs;
};

// The room the 64-bit routines ask for; they write over all of it.
static size_t device_room(int64_t n, size_t number) { return static_cast<size_t>(std::max<int64_t>(n, 1)) * 32 * number; }
static size_t host_room(int64_t n) { return 64 + 8 * static_cast<size_t>(std::max<int64_t>(n, 0)); }

static int check_square(const Library* handle, int fill, int64_t n, int type, int64_t lda) {
    if (handle == nullptr) return CUSOLVER_STATUS_NOT_INITIALIZED;
    if (type != F32 && type != F64) return CUSOLVER_STATUS_NOT_SUPPORTED;
    bool sizes = n >= 0 && lda >= std::max<int64_t>(1, n) && (fill == FILL_LOWER || fill == FILL_UPPER);
    return sizes ? CUSOLVER_STATUS_SUCCESS : CUSOLVER_STATUS_INVALID_VALUE;
}

static int begin(const Library* handle, const Task& task) {
    if (int status = check_square(handle, task.fill, task.n, task.type, task.lda)) return status;
    if (submit(handle->stream) != CUDA_SUCCESS) return CUSOLVER_STATUS_EXECUTION_FAILED;
    if (task.device_bytes < task.device_needs || task.host_bytes < task.host_needs) return CUSOLVER_STATUS_INVALID_VALUE;
    Type type = static_cast<Type>(task.type);
    bool present = on_device(task.who, "a", stored(task.a, type, task.n, task.n, task.lda)) && on_device(task.who, "info", F32, task.info, 1);
    present = present && on_device(task.who, "the workspace", type, task.device_room, task.device_needs / size_of(type));
    if (!present) return CUSOLVER_STATUS_EXECUTION_FAILED;
    if (task.device_needs > 0) memset(task.device_room, POISON, task.device_needs);
    if (task.host_needs > 0) memset(task.host_room, POISON, task.host_needs);
    *task.info = 0;
    return CUSOLVER_STATUS_SUCCESS;
}

static Stored square(const Task& task) { return stored(task.a, static_cast<Type>(task.type), task.n, task.n, task.lda); }

// ---- Cholesky: a = l l' below, or u' u above; u' is taken for l

static int potrf(const Library* handle, const Task& task) {
    if (int status = begin(handle, task)) return status;
    bool lower = task.fill == FILL_LOWER;
    Matrix l = read_triangle(square(task), lower, false, !lower);
    *task.info = factor(l);
    write_triangle(square(task), lower, l, !lower);
    return CUSOLVER_STATUS_SUCCESS;
}

static int potrs(const Library* handle, const Task& task, int64_t count, void* b, int64_t ldb) {
    if (count < 0 || ldb < std::max<int64_t>(1, task.n)) return CUSOLVER_STATUS_INVALID_VALUE;
    if (int status = begin(handle, task)) return status;
    Stored right = stored(b, static_cast<Type>(task.type), task.n, count, ldb);
    if (!on_device(task.who, "b", right)) return CUSOLVER_STATUS_EXECUTION_FAILED;
    bool lower = task.fill == FILL_LOWER;
    Matrix x = read(right, false);
    solve_triangle(read_triangle(square(task), lower, false, !lower), true, x);
    solve_triangle(read_triangle(square(task), lower, false, lower), false, x);
    write(right, x, false);
    return CUSOLVER_STATUS_SUCCESS;
}

static Matrix identity(int64_t n) {
    Matrix out(static_cast<size_t>(n), static_cast<size_t>(n));
    for (size_t i = 0; i < out.rows; i += 1) out[i][i] = 1.0;
    return out;
}

// The first diagonal element that is zero, counted from 1; 0 if none is.
static int zero_pivot(const Matrix& triangle) {
    for (size_t i = 0; i < triangle.rows; i += 1) {
        if (triangle[i][i] == 0.0) return static_cast<int>(i) + 1;
    }
    return 0;
}

static int potri(const Library* handle, const Task& task) {
    if (int status = begin(handle, task)) return status;
    bool lower = task.fill == FILL_LOWER;
    Matrix l = read_triangle(square(task), lower, false, !lower);
    *task.info = zero_pivot(l);
    if (*task.info != 0) return CUSOLVER_STATUS_SUCCESS;
    Matrix inverse = identity(task.n);
    solve_triangle(l, true, inverse);
    solve_triangle(read_triangle(square(task), lower, false, lower), false, inverse);
    write_triangle(square(task), lower, inverse, false);
    return CUSOLVER_STATUS_SUCCESS;
}

static int trtri(const Library* handle, const Task& task, int diagonal) {
    if (int status = begin(handle, task)) return status;
    bool lower = task.fill == FILL_LOWER, unit = diagonal == DIAG_UNIT;
    Matrix triangle = read_triangle(square(task), lower, unit, false);
    *task.info = zero_pivot(triangle);
    if (*task.info != 0) return CUSOLVER_STATUS_SUCCESS;
    Matrix inverse = identity(task.n);
    solve_triangle(triangle, lower, inverse);
    if (unit) {  // the diagonal is not written
        for (size_t i = 0; i < inverse.rows; i += 1) inverse[i][i] = read(square(task).type, task.a, i + i * square(task).stride);
    }
    write_triangle(square(task), lower, inverse, false);
    return CUSOLVER_STATUS_SUCCESS;
}

// ---- eigenvalues

static int syevd(const Library* handle, const Task& task, int mode, void* w) {
    if (mode != 0 && mode != 1) return CUSOLVER_STATUS_INVALID_VALUE;
    if (int status = begin(handle, task)) return status;
    Stored at = square(task);
    if (!on_device(task.who, "w", at.type, w, at.rows)) return CUSOLVER_STATUS_EXECUTION_FAILED;
    if (task.n == 0) return CUSOLVER_STATUS_SUCCESS;
    Matrix a = read_triangle(at, task.fill == FILL_LOWER, false, task.fill != FILL_LOWER);
    for (size_t i = 0; i < a.rows; i += 1) {
        for (size_t j = 0; j < i; j += 1) a[j][i] = a[i][j];
    }
    std::vector<double> values;
    *task.info = eigen(a, values, mode == 1);
    for (size_t i = 0; i < values.size(); i += 1) write(at.type, w, i, values[i]);
    // Without vectors, what is left in a is of no use: nobody may count on it.
    if (mode == 0) a.values.assign(at.rows * at.rows, std::numeric_limits<double>::quiet_NaN());
    if (mode == 0) a.columns = a.rows = at.rows;
    write(at, a, true);
    return CUSOLVER_STATUS_SUCCESS;
}

// ---- the 64-bit API

static int room(const Library* handle, int fill, int64_t n, int type, int64_t lda, size_t* device_bytes, size_t* host_bytes) {
    if (int status = check_square(handle, fill, n, type, lda)) return status;
    *device_bytes = device_room(n, size_of(static_cast<Type>(type)));
    *host_bytes = host_room(n);
    return CUSOLVER_STATUS_SUCCESS;
}

static Task task(const char* who, int fill, int64_t n, int type, const void* a, int64_t lda, int* info, void* device_at,
                 size_t device_bytes, void* host_at, size_t host_bytes) {
    size_t number = type == F64 ? 8 : 4;
    return {who, fill, n, type, a, lda, info, device_at, host_at, device_bytes, host_bytes, device_room(n, number), host_room(n)};
}

API int cusolverDnXpotrf_bufferSize(Library* handle, Parameters*, int fill, int64_t n, int type, const void*, int64_t lda, int compute,
                                    size_t* device_bytes, size_t* host_bytes) {
    if (compute != type) return CUSOLVER_STATUS_NOT_SUPPORTED;
    return room(handle, fill, n, type, lda, device_bytes, host_bytes);
}

API int cusolverDnXpotrf(Library* handle, Parameters*, int fill, int64_t n, int type, void* a, int64_t lda, int compute, void* device_at,
                         size_t device_bytes, void* host_at, size_t host_bytes, int* info) {
    if (compute != type) return CUSOLVER_STATUS_NOT_SUPPORTED;
    return potrf(handle, task("cusolverDnXpotrf", fill, n, type, a, lda, info, device_at, device_bytes, host_at, host_bytes));
}

API int cusolverDnXpotrs(Library* handle, Parameters*, int fill, int64_t n, int64_t count, int type, const void* a, int64_t lda,
                         int b_type, void* b, int64_t ldb, int* info) {
    if (b_type != type) return CUSOLVER_STATUS_NOT_SUPPORTED;
    return potrs(handle, {"cusolverDnXpotrs", fill, n, type, a, lda, info, nullptr, nullptr, 0, 0, 0, 0}, count, b, ldb);
}

API int cusolverDnXtrtri_bufferSize(Library* handle, int fill, int, int64_t n, int type, void*, int64_t lda, size_t* device_bytes,
                                    size_t* host_bytes) {
    return room(handle, fill, n, type, lda, device_bytes, host_bytes);
}

API int cusolverDnXtrtri(Library* handle, int fill, int diagonal, int64_t n, int type, void* a, int64_t lda, void* device_at,
                         size_t device_bytes, void* host_at, size_t host_bytes, int* info) {
    return trtri(handle, task("cusolverDnXtrtri", fill, n, type, a, lda, info, device_at, device_bytes, host_at, host_bytes), diagonal);
}

API int cusolverDnXsyevd_bufferSize(Library* handle, Parameters*, int, int fill, int64_t n, int type, const void*, int64_t lda, int w_type,
                                    const void*, int compute, size_t* device_bytes, size_t* host_bytes) {
    if (compute != type || w_type != type) return CUSOLVER_STATUS_NOT_SUPPORTED;
    return room(handle, fill, n, type, lda, device_bytes, host_bytes);
}

API int cusolverDnXsyevd(Library* handle, Parameters*, int mode, int fill, int64_t n, int type, void* a, int64_t lda, int w_type, void* w,
                         int compute, void* device_at, size_t device_bytes, void* host_at, size_t host_bytes, int* info) {
    if (compute != type || w_type != type) return CUSOLVER_STATUS_NOT_SUPPORTED;
    return syevd(handle, task("cusolverDnXsyevd", fill, n, type, a, lda, info, device_at, device_bytes, host_at, host_bytes), mode, w);
}

// ---- the older API: one type a name, room counted in numbers, none on the host

static int numbers(const Library* handle, int fill, int n, int type, int lda, int* count) {
    if (int status = check_square(handle, fill, n, type, lda)) return status;
    *count = std::max(n, 1) * 32;
    return CUSOLVER_STATUS_SUCCESS;
}

template <typename T>
static Task older(const char* who, int fill, int n, const T* a, int lda, T* work, int count, int* info) {
    size_t lent = count < 0 ? 0 : static_cast<size_t>(count) * sizeof(T);
    return {who, fill, n, type_of<T>, a, lda, info, work, nullptr, lent, 0, device_room(n, sizeof(T)), 0};
}

#define OLDER(letter, T)                                                                                                              \
    API int cusolverDn##letter##potrf_bufferSize(Library* handle, int fill, int n, T*, int lda, int* count) {                         \
        return numbers(handle, fill, n, type_of<T>, lda, count);                                                                      \
    }                                                                                                                                 \
    API int cusolverDn##letter##potrf(Library* handle, int fill, int n, T* a, int lda, T* work, int count, int* info) {               \
        return potrf(handle, older<T>("cusolverDn" #letter "potrf", fill, n, a, lda, work, count, info));                             \
    }                                                                                                                                 \
    API int cusolverDn##letter##potrs(Library* handle, int fill, int n, int count, const T* a, int lda, T* b, int ldb, int* info) {   \
        return potrs(handle, {"cusolverDn" #letter "potrs", fill, n, type_of<T>, a, lda, info, nullptr, nullptr, 0, 0, 0, 0}, count,  \
                     b, ldb);                                                                                                         \
    }                                                                                                                                 \
    API int cusolverDn##letter##potri_bufferSize(Library* handle, int fill, int n, T*, int lda, int* count) {                         \
        return numbers(handle, fill, n, type_of<T>, lda, count);                                                                      \
    }                                                                                                                                 \
    API int cusolverDn##letter##potri(Library* handle, int fill, int n, T* a, int lda, T* work, int count, int* info) {               \
        return potri(handle, older<T>("cusolverDn" #letter "potri", fill, n, a, lda, work, count, info));                             \
    }                                                                                                                                 \
    API int cusolverDn##letter##syevd_bufferSize(Library* handle, int, int fill, int n, const T*, int lda, const T*, int* count) {    \
        return numbers(handle, fill, n, type_of<T>, lda, count);                                                                      \
    }                                                                                                                                 \
    API int cusolverDn##letter##syevd(Library* handle, int mode, int fill, int n, T* a, int lda, T* w, T* work, int count,            \
                                      int* info) {                                                                                    \
        return syevd(handle, older<T>("cusolverDn" #letter "syevd", fill, n, a, lda, work, count, info), mode, w);                    \
    }
OLDER(S, float)
OLDER(D, double)
#undef OLDER

}  // namespace software_gpu
