// cuBLAS: vectors. Steps may be negative, as in BLAS: the vector is then read from its end.

#include <cmath>

#include "libraries.h"

namespace software_gpu {

enum { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_EXECUTION_FAILED = 13 };

template <typename T>
struct Vector {
    T* at;
    int64_t count, step;

    T& operator[](int64_t i) const { return at[(step < 0 ? i - count + 1 : i) * step]; }

    bool present(const char* who) const {
        return count <= 0 || on_device(who, "a vector", type_of<T>, at, static_cast<size_t>((count - 1) * std::abs(step) + 1));
    }
};

static int check_handle(const Library* handle) {
    if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
    return submit(handle->stream) == CUDA_SUCCESS ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

// Whether a scalar lies where the handle's pointer mode says.
static bool scalar_place(const Library* handle, const void* at) {
    return at != nullptr && is_device_range(at, 1) == (handle->pointer_mode != 0);
}

template <typename T, typename Term>
static int sum_up(const Library* handle, const char* who, Vector<const T> x, Vector<const T> y, T* result, bool root, Term term) {
    if (int status = check_handle(handle)) return status;
    if (!scalar_place(handle, result)) return CUBLAS_STATUS_INVALID_VALUE;
    if (!x.present(who) || !y.present(who)) return CUBLAS_STATUS_EXECUTION_FAILED;
    double sum = 0.0;
    for (int64_t i = 0; i < x.count; i += 1) sum += term(static_cast<double>(x[i]), static_cast<double>(y[i]));
    *result = static_cast<T>(root ? std::sqrt(sum) : sum);
    return CUBLAS_STATUS_SUCCESS;
}

template <typename T>
static int axpy(const Library* handle, const char* who, const T* alpha, Vector<const T> x, Vector<T> y) {
    if (int status = check_handle(handle)) return status;
    if (!scalar_place(handle, alpha)) return CUBLAS_STATUS_INVALID_VALUE;
    if (!x.present(who) || !y.present(who)) return CUBLAS_STATUS_EXECUTION_FAILED;
    for (int64_t i = 0; i < x.count; i += 1) y[i] = std::fma(*alpha, x[i], y[i]);
    return CUBLAS_STATUS_SUCCESS;
}

template <typename T>
static int scal(const Library* handle, const char* who, const T* alpha, Vector<T> x) {
    if (int status = check_handle(handle)) return status;
    if (!scalar_place(handle, alpha)) return CUBLAS_STATUS_INVALID_VALUE;
    if (!x.present(who)) return CUBLAS_STATUS_EXECUTION_FAILED;
    for (int64_t i = 0; i < x.count; i += 1) x[i] *= *alpha;
    return CUBLAS_STATUS_SUCCESS;
}

template <typename T>
static int gemv(const Library* handle, const char* who, int op, int m, int n, const T* alpha, const T* a, int lda, const T* x_at, int x_step,
                const T* beta, T* y_at, int y_step) {
    if (int status = check_handle(handle)) return status;
    if (m < 0 || n < 0 || lda < std::max(1, m) || x_step == 0 || y_step == 0) return CUBLAS_STATUS_INVALID_VALUE;
    if (!scalar_place(handle, alpha) || !scalar_place(handle, beta)) return CUBLAS_STATUS_INVALID_VALUE;
    if (m == 0 || n == 0) return CUBLAS_STATUS_SUCCESS;
    Vector<const T> x = {x_at, op == OP_N ? n : m, x_step};
    Vector<T> y = {y_at, op == OP_N ? m : n, y_step};
    bool present = on_device(who, "a", stored(a, type_of<T>, m, n, lda)) && x.present(who) && y.present(who);
    if (!present) return CUBLAS_STATUS_EXECUTION_FAILED;
    for (int64_t i = 0; i < y.count; i += 1) {
        double sum = 0.0;
        for (int64_t j = 0; j < x.count; j += 1) sum += static_cast<double>(op == OP_N ? a[i + j * lda] : a[j + i * lda]) * x[j];
        sum *= *alpha;
        y[i] = static_cast<T>(*beta == 0 ? sum : sum + static_cast<double>(*beta) * y[i]);
    }
    return CUBLAS_STATUS_SUCCESS;
}

#define VECTOR_ROUTINES(letter, T)                                                                                                   \
    API int cublas##letter##dot_v2(Library* handle, int n, const T* x, int x_step, const T* y, int y_step, T* result) {              \
        auto term = [](double a, double b) { return a * b; };                                                                        \
        return sum_up<T>(handle, "cublas" #letter "dot", {x, n, x_step}, {y, n, y_step}, result, false, term);                       \
    }                                                                                                                                \
    API int cublas##letter##nrm2_v2(Library* handle, int n, const T* x, int step, T* result) {                                       \
        auto term = [](double a, double) { return a * a; };                                                                          \
        return sum_up<T>(handle, "cublas" #letter "nrm2", {x, n, step}, {x, n, step}, result, true, term);                           \
    }                                                                                                                                \
    API int cublas##letter##asum_v2(Library* handle, int n, const T* x, int step, T* result) {                                       \
        auto term = [](double a, double) { return std::fabs(a); };                                                                   \
        return sum_up<T>(handle, "cublas" #letter "asum", {x, n, step}, {x, n, step}, result, false, term);                          \
    }                                                                                                                                \
    API int cublas##letter##axpy_v2(Library* handle, int n, const T* alpha, const T* x, int x_step, T* y, int y_step) {              \
        return axpy<T>(handle, "cublas" #letter "axpy", alpha, {x, n, x_step}, {y, n, y_step});                                      \
    }                                                                                                                                \
    API int cublas##letter##scal_v2(Library* handle, int n, const T* alpha, T* x, int step) {                                        \
        return scal<T>(handle, "cublas" #letter "scal", alpha, {x, n, step});                                                        \
    }                                                                                                                                \
    API int cublas##letter##gemv_v2(Library* handle, int op, int m, int n, const T* alpha, const T* a, int lda, const T* x,          \
                                    int x_step, const T* beta, T* y, int y_step) {                                                   \
        return gemv(handle, "cublas" #letter "gemv", op, m, n, alpha, a, lda, x, x_step, beta, y, y_step);                           \
    }
VECTOR_ROUTINES(S, float)
VECTOR_ROUTINES(D, double)
#undef VECTOR_ROUTINES

}  // namespace software_gpu
